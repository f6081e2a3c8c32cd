"""Run the code of other tools (peers) on gprune's calibration windows: input and output of their drivers.

    python -m experiments.peers windows --output runs/peers/smollm2.safetensors --config protocol
    python -m experiments.peers.osscar --clone OSSCAR --windows FILE --output runs/peers/osscar
    python -m experiments.peers save --cut runs/peers/flap-cut --output runs/peers/flap
    python -m experiments.peers table

windows: write the calibration windows of a configuration (flags of `python train.py`) to a file for all drivers.
save: make a model folder in gprune's format, with blocks of unequal width, from the output of a driver.
table: print the committed records of the drivers as Markdown.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gprune.config.parse import parse
from gprune.console import quiet, run_guarded
from gprune.errors import UserError
from gprune.report.tables import Cell, Table
from gprune.storage.files import replacing

from .common import CUT, RECORD

RECORDS = Path(__file__).with_name("records")
COLUMNS = ["model", "peer", "licence", "tokens", "parameters", "stored", "CPU s", "peak MiB", "reloads"]
DIGITS = {"CPU s": 0, "peak MiB": 0}


def windows(output: Path, flags: Sequence[str]) -> str:
    """Write the training windows of a configuration's calibration corpora, int64 (n, seq_len) by corpus."""
    import torch
    from safetensors.torch import save_file

    from gprune.method.inputs import prepare_text
    from gprune.models.loading import load_model, locate_model

    cfg = parse(flags, "experiments.peers windows")
    model, tokenizer = load_model(cfg.model.name, dtype=torch.float32)
    embeddings = model.get_input_embeddings().num_embeddings
    unused = set(cfg.corpora.evaluate) - set(cfg.calibration_corpora)
    train = prepare_text(cfg, tokenizer, embeddings, without=unused).train
    source = str(Path(locate_model(cfg.model.name)).resolve())
    hashes = {name: w.content_hash for name, w in train.items()}
    metadata = {"model": source, "corpora": json.dumps(list(train)), "hashes": json.dumps(hashes)}
    with replacing(output) as new:
        save_file({name: w.tokens for name, w in train.items()}, new, metadata=metadata)
    sizes = ", ".join(f"{name} {tuple(w.tokens.shape)}" for name, w in train.items())
    return f"Wrote {output}: {sizes}; dense model: {source}"


def save(cut: Path, output: Path) -> str:
    """Slice the dense model by the masks of a driver, insert the peer's weights and biases, save, and reload.

    Raises:
        UserError: if the folder is not the output of a driver, or saving or reloading fails.
    """
    import torch
    from safetensors import safe_open
    from torch import nn

    from gprune.discovery import family_of
    from gprune.export.hf import check_reload, save_pruned
    from gprune.models.loading import load_model
    from gprune.models.masks import Masks
    from gprune.models.surgery import slice_model

    if not (cut / CUT).is_file() or not (cut / RECORD).is_file():
        raise UserError(f"--cut must be the output of a driver such as flap, with {CUT} and {RECORD}; got '{cut}'.")
    with safe_open(cut / CUT, "pt") as file:
        source, tensors = file.metadata()["model"], {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights = {name: tensors.pop(name) for name in list(tensors) if name.endswith((".weight", ".bias"))}
    model, tokenizer = load_model(source, dtype=torch.float32)
    family_of(model)
    small = slice_model(model, Masks.from_tensors(tensors), inplace=True)
    for name, value in weights.items():
        path, _, own = name.rpartition(".")
        setattr(small.get_submodule(path), own, nn.Parameter(value, requires_grad=False))
    save_pruned(small, tokenizer, output)
    difference = check_reload(small, output, torch.arange(1, 33).view(1, 32))
    record = json.loads((cut / RECORD).read_text(encoding="utf-8")) | {"reload_difference": difference}
    (output / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return f"Wrote {output}: {sum(p.numel() for p in small.parameters()):,} parameters"


def table(folder: Path = RECORDS) -> Table:
    """Table of cost and results of the drivers, from their committed records."""
    rows: list[list[Cell]] = []
    for path in sorted(folder.glob("*.json")):
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        peer, difference = record["peer"], record["reload_difference"]
        rows.append([
            re.sub(r"-[0-9a-f]{8}-\d+$", "", record["model"]), f"{peer['name']} {peer['commit'][:8]}", peer["license"],
            f"{record['calibration_tokens']:,}", f"{record['parameters_after']:,}", f"{record['parameters_stored']:,}",
            record["cpu_seconds"], record["peak_memory_mib"],
            None if difference is None else f"{difference:.1e}",
        ])  # fmt: skip
    note = (
        "tokens: read for calibration; stored: parameters of the folder, zeros included; CPU s: of the peer's work, "
        "one thread; peak MiB: resident, of the whole process; reloads: max |difference of logits| of the folder."
    )
    return Table("peers", "Peers", COLUMNS, rows, DIGITS, note)


def run(args: Sequence[str]) -> str:
    """Run a subcommand. Returns the text to print."""
    flags = argparse.ArgumentParser("python -m experiments.peers", description=__doc__)
    what = flags.add_subparsers(dest="what", required=True)
    first = what.add_parser("windows", help="write calibration windows for the drivers; accepts flags of train.py")
    first.add_argument("--output", type=Path, required=True, help="file for the windows")
    second = what.add_parser("save", help="make a model folder in gprune's format from the output of a driver")
    second.add_argument("--cut", type=Path, required=True, help="output folder of a driver")
    second.add_argument("--output", type=Path, required=True, help="folder for the model")
    what.add_parser("table", help="print the committed records of the drivers")
    known, others = flags.parse_known_args(args)
    quiet()
    if known.what == "windows":
        return windows(known.output, others)
    if others:
        raise UserError(f"Unknown flag '{others[0]}'.")
    return save(known.cut, known.output) if known.what == "save" else table().for_stdout()


def main(args: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    return run_guarded("experiments.peers", lambda: run(sys.argv[1:] if args is None else args))


if __name__ == "__main__":
    sys.exit(main())
