"""Everything that depends on the layout of a commit: how `train.py` is run, and where a run folder has its results.

As a script, this file runs configurations with the code of another tree, so it imports gprune only from there. A commit
that moves something gets another place here. The places of earlier commits stay.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import runpy
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

Values = dict[str, Any]  # name -> tensor, number or list of numbers
RECORDS = "records"
# Group of results -> files of a run folder, as patterns.
TENSORS = {
    "labels": ["assignment.safetensors"],
    "thresholds": ["thresholds.safetensors"],
    "masks": ["masks.safetensors"],
    "weights": ["model/*.safetensors"],
}
GROUPS = (*TENSORS, RECORDS)
ALWAYS = ("masks", "weights", RECORDS)  # groups that every run has
METRICS = ["metrics.json"]
NUMBERS = ("perplexity", "nll", "tokens", "window_nll", "kl", "window_kl", "agreement", "window_agreement")
LATENCY_MODULES = ["gprune.benchmarks.speed", "gprune.evaluation.speed"]  # modules with `measure_table`
# The latency table of `tiny-random` that replaces a measurement. Times are linear in the width.
LATENCY_TABLE = {
    "neurons": [[1, 0.00101], [64, 0.00164], [128, 0.00228], [192, 0.00292], [256, 0.00356]],
    "groups": [[1, 0.003], [2, 0.00356]],
    "multiples": [[128, 0.00228], [256, 0.00356]],
    "rest": 0.002,
    "spread": 0.0,
}


def read_results(folder: Path) -> dict[str, Values]:
    """Read the results of a run folder: group -> name -> value. Groups that the run does not have are empty."""
    metrics = next((folder / name for name in METRICS if (folder / name).exists()), None)
    records = [] if metrics is None else json.loads(metrics.read_text(encoding="utf-8"))["records"]
    results: dict[str, Values] = {}
    for group, patterns in TENSORS.items():
        files = {file.stem: file for pattern in patterns for file in sorted(folder.glob(pattern))}
        if group == "masks" and not files and records:
            files = {"masks": folder / f"masks/{records[-1]['stage']}.safetensors"}
        results[group] = {
            f"{stem}: {current_name(name)}": tensor
            for stem, file in files.items()
            for name, tensor in sorted(load_file(file).items())
        }
    stages = stages_of_model(records)
    results[RECORDS] = {
        f"{stages[r['stage'], r['recovery']]}, {r['corpus']}: {number}": r[number]
        for r in records
        for number in NUMBERS
        if (r["stage"], r["recovery"]) in stages and r.get(number) is not None
    }
    return results


def current_name(name: str) -> str:
    """Return the name of a tensor of masks and thresholds; until commit c839d25e it had a scope instead of a kind."""
    name = re.sub(r"(^|\.)(offsets\.)(\d)", r"\1\2neurons.\3", name)
    return re.sub(r"(^|\.)ffn\.", r"\1neurons.", re.sub(r"(^|\.)attention\.", r"\1kv_groups.", name))


def stages_of_model(records: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """Return (stage, recovery) of records -> stage of the run's own model: dense, pruned or recovered.

    Until commit 5c9b025f `stage` was the variant of a row: the last row was the run's own model, its variant without
    recovery the model before recovery, and other rows were controls, which are left out.
    """
    if not records:
        return {}
    variant, recovery = records[-1]["stage"], records[-1]["recovery"]
    if variant in ("pruned", "recovered"):
        return {(r["stage"], r["recovery"]): r["stage"] for r in records}
    return {("dense", "none"): "dense", (variant, "none"): "pruned"} | {
        (variant, recovery): "pruned" if recovery == "none" else "recovered"
    }


def same(a: Any, b: Any) -> bool:
    """Return whether two values of `read_results` have the same type, shape and bits."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_as_bytes(a), _as_bytes(b))
    return type(a) is type(b) and a == b


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, (bytes,) uint8, in which NaN equals NaN, and 0.0 differs from -0.0."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def store_latency_table() -> None:
    """Replace the measurement of this machine's speed by `LATENCY_TABLE`. No run measures anything."""
    for name in LATENCY_MODULES:
        with contextlib.suppress(ModuleNotFoundError):
            module = importlib.import_module(name)
            module.measure_table = lambda *_: json.loads(json.dumps(LATENCY_TABLE))  # a copy, as if measured
            return
    raise ModuleNotFoundError(f"none of {', '.join(LATENCY_MODULES)} exists: add the module that measures latency")


def run_all(tree: Path, folder: Path, configurations: dict[str, list[str]]) -> None:
    """Run configurations, one after the other, in this process with the code of a tree.

    Run folders are `folder/NAME`, and the output of each run is in `folder/NAME.log`.
    """
    import gprune

    code = Path(gprune.__file__).resolve()
    if not code.is_relative_to(tree.resolve()):
        raise ImportError(f"gprune was imported from {code}, not from {tree}")
    store_latency_table()
    # Until commit 5c9b025f a run had controls. Of these only its own model before recovery is compared.
    has_controls = hasattr(gprune.RunConfig().evaluation, "controls")
    own_flags = ["--evaluation.controls=[unrecovered]"] if has_controls else []
    for name, flags in configurations.items():
        start = time.monotonic()
        with (
            (folder / f"{name}.log").open("w", encoding="utf-8", buffering=1) as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            sys.argv = ["train.py", *flags, *own_flags, f"--run.dir={folder}", f"--run.name={name}"]
            try:
                runpy.run_path(str(tree / "train.py"), run_name="__main__")
            except SystemExit:  # its exit code: a run that failed has no results
                pass
            except Exception:
                traceback.print_exc()
        print(f"{folder.name}: {name}, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
