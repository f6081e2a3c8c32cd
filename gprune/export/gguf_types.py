"""Types of matrices in GGUF files. This file does not import PyTorch, because checks of flags use it."""

from __future__ import annotations

LLAMA_CPP = "llama-cpp-py-sync"  # a package with a compiled llama.cpp, which runs in a separate process
TYPES = {"f32": 32, "f16": 16, "q8_0": 8.5}  # bits per weight
QUANTISED = ("q4_k_m",)  # quantised by llama.cpp from f16
BLOCK_SIZES = {"f32": 1, "f16": 1, "q8_0": 32, "q4_k_m": 256}  # numbers of a row that are quantised together
