"""Remove half of the experts of a tiny random model of each type with experts, and print which types pass.

    python -m experiments.whole_experts                      # all types; about 2 minutes on one core
    python -m experiments.whole_experts gpt_oss deepseek_v3  # some types
    python -m experiments.whole_experts --write              # all types, written to docs/architectures.csv

The models are those of `experiments.architectures`: 4 experts, of which a token uses 2. A type passes if
masking and slicing give the same logits, the number of removed parameters is the one that the budget counts, and a
process without gprune computes the same bits from the folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from experiments.architectures import random_model, read_table, reloaded, write_table
from gprune.discovery import family_of
from gprune.errors import first_line
from gprune.export.hf import save_pruned
from gprune.models.agreement import random_masks
from gprune.models.copies import auto_class
from gprune.models.families import decoder_layers, record_of
from gprune.models.masks import Masks, masked
from gprune.models.surgery import slice_model
from gprune.models.units import places_in, units_of
from gprune.sparsity.budget import budget_of


def without_half_of_the_experts(model: PreTrainedModel) -> Masks:
    """Return masks that remove half of the experts and nothing else."""
    masks = random_masks(model, scope="experts")
    for u in units_of(model):
        if u.kind == "neurons":
            masks[u.key] = masks[u.key].view(u.rows, -1).any(1).repeat_interleave(u.count)
    return masks


@torch.no_grad()
def row_of(model_type: str, folder: Path) -> dict[str, Any]:
    """Return the results of a type, and save the pruned model and its logits in a folder below `folder`."""
    try:
        model = random_model(model_type)
        family_of(model)
        layers = decoder_layers(model)
        places = [p for layer in layers for p in places_in(layer, record_of(model).places) if p.whole_experts]
        if places:
            return {"type": model_type, "why": places[0].whole_experts}
        masks, ids = without_half_of_the_experts(model), torch.arange(3, 51).view(2, 24)
        dense = model(input_ids=ids, use_cache=False).logits
        with masked(model, masks):
            expected = model(input_ids=ids, use_cache=False).logits
        small = slice_model(model, masks)
        logits = small(input_ids=ids, use_cache=False).logits
        save_pruned(small, None, folder / model_type)
        save_file({"input_ids": ids, "logits": logits.contiguous()}, folder / model_type / "expected.safetensors")
        if auto_class(model.config) is AutoModelForImageTextToText:
            (folder / model_type / "images").touch()  # `reloaded` then uses this class
        removed = model.num_parameters() - small.num_parameters()
        return {
            "type": model_type,
            "moved": float((expected - dense).abs().max() / dense.abs().max()),
            "agrees": float((expected - logits).abs().max() / expected.abs().max()),
            "exact": removed == budget_of(units_of(model), scope="ffn+experts").removed_by(masks),
            "stock": not list((folder / model_type).glob("*.py")),
        }
    except Exception as error:
        return {"type": model_type, "why": f"{type(error).__name__}: {first_line(error)}"}


def measure(types: Sequence[str]) -> list[dict[str, Any]]:
    """Return the results of each type."""
    with tempfile.TemporaryDirectory(prefix="gprune-experts-") as scratch:
        folder = Path(scratch) / "models"
        folder.mkdir()
        rows = [row_of(name, folder) for name in types]
        differences = reloaded(folder)
    return [row | ({"reloaded": differences.get(row["type"])} if "why" not in row else {}) for row in rows]


def passed(row: Mapping[str, Any]) -> bool:
    """Return whether experts of a type can be removed as a whole, with an effect, and all checks agree."""
    if "why" in row:
        return False
    return row["moved"] >= 1e-3 and row["agrees"] <= 1e-4 and row["exact"] and row["reloaded"] == 0.0


def cell(row: Mapping[str, Any]) -> str:
    """Return the cell *whole experts* of a type: how its folder loads, or why experts cannot be removed."""
    if passed(row):
        return "stock model" if row["stock"] else "modelling file"
    return row.get("why") or f"fails: {row}"


def main(args: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; by default all with experts")
    parser.add_argument("--write", action="store_true", help="write the results to docs/architectures.csv")
    settings = parser.parse_args(args)
    warnings.simplefilter("ignore")
    table = read_table()
    with_experts = dict.fromkeys(name for (name, _), row in table.items() if " experts" in row["FFN"])
    by_type = {row["type"]: cell(row) for row in measure(settings.types or list(with_experts))}
    for (name, _), row in table.items():
        row["whole experts"] = by_type.get(name, row["whole experts"])
    if settings.write:
        write_table(table)
    sys.stdout.writelines(f"{name}: {text}\n" for name, text in by_type.items())
    return 0


if __name__ == "__main__":
    sys.exit(main())
