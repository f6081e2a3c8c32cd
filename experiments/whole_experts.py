"""Remove half of the experts of a tiny random model of each type with experts, and print which types pass.

    python -m experiments.whole_experts                      # all types; about 2 minutes on one core
    python -m experiments.whole_experts gpt_oss deepseek_v3  # some types
    python -m experiments.whole_experts --write              # all types, written to docs/families.md

The models are those of `experiments.architectures`: 4 experts, of which a token uses 2. A type passes if
masking and slicing give the same logits (the text has the largest difference, divided by the largest logit), the number
of removed parameters is the one that the budget counts, and a process without gprune computes the same bits from the
folder.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, PreTrainedModel

from experiments.architectures import PAGE, random_model, reloaded
from gprune.discovery import family_of
from gprune.errors import first_line
from gprune.export.hf import save_pruned
from gprune.models.agreement import random_masks
from gprune.models.blocks import blocks_of
from gprune.models.copies import auto_class
from gprune.models.masks import Masks, masked
from gprune.models.surgery import slice_model
from gprune.sparsity.budget import Budget, block_units

FAMILIES_PAGE = PAGE.with_name("families.md")
START, END = "<!-- output of python -m experiments.whole_experts -->", "<!-- end of its output -->"


def types_with_experts() -> list[str]:
    """Return the types whose FFN is a mixture, from the table of docs/architectures.md."""
    return re.findall(r"^\| `([\w-]+)`[^|]*\|[^|]*\d experts", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def without_half_of_the_experts(model: PreTrainedModel) -> Masks:
    """Return masks that remove half of the experts and nothing else."""
    masks, ffn = random_masks(model, scope="experts"), []
    for block, keep in zip(blocks_of(model), masks.ffn, strict=True):
        kept = keep.view(block.experts, -1).any(1)
        ffn.append(kept.repeat_interleave(block.neurons))
    return Masks(ffn, [torch.ones_like(keep) for keep in masks.attention])


@torch.no_grad()
def row_of(model_type: str, folder: Path) -> dict[str, Any]:
    """Return the results of a type, and save the pruned model and its logits in a folder below `folder`."""
    try:
        model = random_model(model_type)
        family_of(model)
        blocks = blocks_of(model)
        reasons = [block.family.whole_experts for block in blocks if block.has_experts and not block.family.per_expert]
        if reasons:
            return {"type": model_type, "why": reasons[0]}
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
            "exact": removed == Budget(block_units(blocks, scope="ffn+experts"), 0).removed_by(masks),
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


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the results as Markdown: types that pass, and the reasons of the others."""
    good, bad = [row for row in rows if passed(row)], [row for row in rows if not passed(row)]
    largest = max((row["agrees"] for row in good), default=0.0)
    differ = f"differ by at most {largest:.0e}" if largest else "are equal"
    lines = [f"These {len(good)} types pass. Logits of masked and sliced models {differ}."]
    for stock, folder in ((True, "The folder is a stock model"), (False, "The folder has a modelling file")):
        names = [f"`{row['type']}`" for row in good if row["stock"] == stock]
        if names:
            lines += ["", textwrap.fill(f"{folder}: {', '.join(names)}", 120, break_on_hyphens=False)]
    lines += ["", f"Of {len(rows)} types with experts these {len(bad)} can only be narrowed:", ""]
    lines += [f"- `{row['type']}`: {row.get('why', row)}" for row in bad]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; by default all with experts")
    parser.add_argument("--write", action="store_true", help=f"write the result to {FAMILIES_PAGE.name}")
    settings = parser.parse_args(args)
    warnings.simplefilter("ignore")
    text = summary(measure(settings.types or types_with_experts()))
    if settings.write:
        page = FAMILIES_PAGE.read_text(encoding="utf-8")
        before, after = page.partition(START)[0], page.partition(END)[2]
        FAMILIES_PAGE.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    sys.stdout.write(f"{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
