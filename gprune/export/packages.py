"""What pip installs to run and to check exports; none of it is imported here."""

from __future__ import annotations

import importlib.util

LLAMA_CPP = "llama-cpp-py-sync"  # a ready-built llama.cpp
ONNX = ("onnx", "onnxscript", "onnxruntime")


def has_llama_cpp() -> bool:
    """Whether the build that GGUF files are checked with is installed."""
    return importlib.util.find_spec(LLAMA_CPP.replace("-", "_")) is not None
