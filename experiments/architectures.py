"""Try every causal language model type of transformers on a tiny random model, and write the table of them.

    python -m experiments.architectures                        # all types; about 15 minutes on one core
    python -m experiments.architectures qwen3_next gpt_oss     # some types, printed
    python -m experiments.architectures --write                # all, into docs/architectures.md

A tiny model is made from the default configuration of the type (`DEFAULTS` has what some need beyond it), with other
widths and other weights than the copy that discovery looks at. Of each type the table says:

FFN, attention   what was found: separate or fused, experts, KV groups
agrees           logits of the masked and of the sliced model: largest difference over largest logit
budget           whether the parameters that went are those that the budget counts
stays            an FFN beside a larger one of its layer that adds nothing to the residual, such as a router's: its
                 share of the tiny model's parameters
generation       whether greedy generation with a cache gives the same tokens masked and sliced; *dense fails* where the
                 dense model cannot generate either
reloaded         the largest difference of logits of the saved model in a process without gprune: 0.0
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gprune.errors import UserError, first_line
from gprune.export.hf import save_pruned
from gprune.models.blocks import Block, blocks_of, by_layer, find_unpruned
from gprune.models.discovery.agreement import random_masks
from gprune.models.families import FAMILIES
from gprune.models.lookup import family_of
from gprune.models.surgery import prune
from gprune.models.tiny import EXPERT_NEURONS, NEURONS, SHARED_NEURONS, shrunk, tiny_model
from gprune.sparsity.budget import unit_costs
from gprune.sparsity.gates import masked

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
LIMIT = 90  # seconds for one type
SLIDING = {"rope_type": "default", "rope_theta": 10000.0}
DEFAULTS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": SLIDING, "sliding_attention": SLIDING}},
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 32]]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 16, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "granitemoehybrid": {"layer_types": (["mamba"] * 3 + ["attention"]) * 8},
    "hunyuan_v1_dense": {"head_dim": 128, "num_key_value_heads": 8},
    "hunyuan_v1_moe": {"head_dim": 128, "num_key_value_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "xmod": {"default_language": "en_XX"},
}


VISION = (
    "aya_vision", "gemma3", "got_ocr2", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mistral3",
    "paligemma", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
)  # fmt: skip


def pictures(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """What models take for one picture, in the forms that transformers has."""
    vision, generator = getattr(model.config, "vision_config", None), torch.Generator().manual_seed(2)
    size = getattr(vision, "image_size", None) or 32
    size = size if isinstance(size, int) else size[0]
    sizes = torch.tensor([[size, size]])
    for shape in ((1, 3, size, size), (1, 1, 3, size, size), (1, 2, 3, size, size)):
        pixels = torch.randn(shape, generator=generator)
        yield {"pixel_values": pixels}
        yield {"pixel_values": pixels, "image_sizes": sizes}
    patch, frames = getattr(vision, "patch_size", None), getattr(vision, "temporal_patch_size", None)
    if isinstance(patch, int) and isinstance(frames, int):
        pixels = torch.randn(16, 3 * frames * patch**2, generator=generator)
        yield {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}


@torch.no_grad()
def with_picture(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Arguments of a forward pass with one picture that changes the logits; None if no form is accepted."""
    config = model.config
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    for picture in pictures(model):
        with contextlib.suppress(Exception):  # of whatever class, for the forms of other types
            count = len(_features(model.get_image_features(**picture)))
            ids = torch.tensor([[3, 4, *[token] * count, 5, 6, 7]])
            arguments = {"input_ids": ids, **picture}
            if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:
                arguments["mm_token_type_ids"] = (ids == token).long()
            own = model(**arguments).logits
            other = model(**arguments | {"pixel_values": picture["pixel_values"].flip(-1) / 2}).logits
            if (own - other).abs().max() > 1e-4:
                return arguments
    return None


def _features(found: Any) -> Tensor:
    """Image features (n, H) in what `get_image_features` returns."""
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(found, name, None) is not None:
            found = getattr(found, name)
    if isinstance(found, (list, tuple)):
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in found])
    return found.reshape(-1, found.shape[-1])


def default_config(model_type: str) -> PreTrainedConfig:
    """The default configuration of a type, as a decoder where it may also be an encoder."""
    config = CONFIG_MAPPING[model_type](**DEFAULTS.get(model_type, {}))
    for name, value in (("is_decoder", True), ("is_encoder_decoder", False)):
        if isinstance(config.__dict__.get(name), bool):
            setattr(config, name, value)
    return config


def example(model_type: str) -> PreTrainedModel:
    """A tiny random model of a type, wider than the copies that discovery makes."""
    config = shrunk(default_config(model_type))
    for own in (config, *(v for v in vars(config).values() if isinstance(v, PreTrainedConfig))):
        for name, value in list(vars(own).items()):
            if type(value) is int and value in (NEURONS, EXPERT_NEURONS, SHARED_NEURONS) and "size" in name + "size":
                setattr(own, name, value + 4)
    return tiny_model(config, seed=7).requires_grad_(False)


def described(model: PreTrainedModel) -> tuple[str, str]:
    """What was found of a model's FFN and attention."""
    ffn: dict[str, int] = {}
    attention: dict[str, int] = {}
    layers = by_layer(blocks_of(model))
    for own in layers:
        words = [_ffn_in_words(block) for block in own if block.down is not None]
        groups = ["heads" if b.heads == b.kv_groups else "KV groups" for b in own if b.output is not None]
        for said, counts in ((words, ffn), (groups, attention)):
            word = " + ".join(said) or "none"
            counts[word] = counts.get(word, 0) + 1
    depth = len(layers)
    said = [", ".join(w if n == depth else f"{w} ({n} of {depth})" for w, n in own.items()) for own in (ffn, attention)]
    return said[0], said[1]


def _ffn_in_words(block: Block) -> str:
    """How a block stores its FFN."""
    if block.has_experts:
        return f"{block.experts} experts"
    fused = block.parts["up"].rows is not None
    return "up, down" if block.gate is None else "gate and up fused" if fused else "gate, up, down"


def row_of(model_type: str, folder: Path, *, vision: bool = False) -> dict[str, Any]:
    """One row of the table; the pruned model is saved below `folder`, its logits beside it."""
    row: dict[str, Any] = {"type": model_type, "record": model_type in FAMILIES}
    try:
        model = example(model_type)
    except Exception as error:
        return row | {"reason": f"no tiny model: {first_line(error)}", "built": False}
    row["built"] = True
    try:
        started = time.process_time()  # of one core, whatever else runs
        family_of(model)
        row["seconds"] = round(time.process_time() - started, 1)
        row["ffn"], row["attention"] = described(model)
        row["stays"] = {p: s.parameters / model.num_parameters() for p, s in find_unpruned(model).items()}
        row |= _compared(model, folder / model_type, vision=vision)
    except TimeoutError:
        raise
    except UserError as error:
        row["reason"] = str(error)
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {first_line(error)}"
    return row


def _compared(model: PreTrainedModel, folder: Path, *, vision: bool = False) -> dict[str, Any]:
    """Masked against sliced, the budget and generation; the sliced model is saved."""
    blocks, masks, found = blocks_of(model), random_masks(model), {}
    ids = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))
    inputs = with_picture(model) if vision else {"input_ids": ids}
    if inputs is None:
        return {"reason": "no picture that the tiny model takes was made"}
    with torch.no_grad():
        dense = model(**inputs, use_cache=False).logits
        with masked(model, masks):
            expected = model(**inputs, use_cache=False).logits
        small = prune(model, masks)
        logits = small(**inputs, use_cache=False).logits
    found["moved"] = float((expected - dense).abs().max() / dense.abs().max())
    found["agrees"] = float((expected - logits).abs().max() / expected.abs().max())
    gone = model.num_parameters() - small.num_parameters()
    costs = unit_costs(blocks, scope="attention+ffn")
    found["budget"] = gone == costs.removed(masks)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    try:
        model.generate(ids[:, :9], **settings)
    except Exception as error:  # of any class: of the type, and not of its pruning
        found["generation"] = f"dense fails: {first_line(error)}"
    else:
        with masked(model, masks):
            wanted = model.generate(ids[:, :9], **settings)
        found["generation"] = torch.equal(wanted, small.generate(ids[:, :9], **settings))
    save_pruned(small, None, folder)
    tensors = {name: value.contiguous() for name, value in inputs.items()}
    save_file(tensors | {"logits": logits.contiguous()}, folder / "expected.safetensors")
    if vision:
        (folder / "images").touch()
    return found


LOADER = """
import json, sys, warnings, logging
warnings.simplefilter("ignore")
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
transformers.logging.set_verbosity_error()
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        want = load_file(folder / "expected.safetensors")
        auto = AutoModelForImageTextToText if (folder / "images").exists() else AutoModelForCausalLM
        model = auto.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager").eval()
        logits = want.pop("logits")
        with torch.no_grad():
            got = model(**want, use_cache=False).logits
        result = float((got - logits).abs().max() / logits.abs().max())
    except Exception as error:
        result = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    print("ROW", json.dumps([folder.name, result]), flush=True)
assert "gprune" not in sys.modules
"""


def reloaded(folder: Path) -> dict[str, Any]:
    """The largest difference of logits of every saved model, in one process that cannot import gprune."""
    script = folder.parent / "load.py"
    script.write_text(LOADER)
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(folder)], cwd=folder.parent, capture_output=True, text=True, check=False
    )
    rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    return dict(rows)


def measured(types: Sequence[str], *, vision: bool = False) -> list[dict[str, Any]]:
    """The rows of the table."""

    def late(*_: Any) -> None:
        raise TimeoutError

    rows = []
    with tempfile.TemporaryDirectory(prefix="gprune-architectures-") as scratch:
        os.environ["GPRUNE_CACHE"] = f"{scratch}/cache"  # so that every structure is found anew
        folder = Path(scratch) / "models"
        folder.mkdir()
        signal.signal(signal.SIGALRM, late)
        for name in types:
            signal.alarm(LIMIT)
            try:
                row = row_of(name, folder, vision=vision)
            except TimeoutError:
                row = {"type": name, "record": name in FAMILIES, "built": True, "reason": f"not done in {LIMIT} s"}
            signal.alarm(0)
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            if not (folder / name / "expected.safetensors").exists():
                shutil.rmtree(folder / name, ignore_errors=True)
        differences = reloaded(folder)
    for row in rows:
        if row["type"] in differences:
            row["reloaded"] = differences[row["type"]]
    return rows


def passed(row: Mapping[str, Any]) -> bool:
    """Whether a type is pruned in its FFN, masked = sliced = reloaded."""
    return row.get("reloaded") == 0.0 and row.get("agrees", 1) <= 1e-4 and row.get("ffn") != "none" and row["budget"]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| type | FFN | attention | stays | masked = sliced | budget | generation | reloaded | seconds |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        if not passed(row):
            continue
        generation = {True: "same", False: "differs"}.get(row["generation"], "dense fails")
        stays = ", ".join(f"{path} {share:.0%}" for path, share in row["stays"].items())
        lines.append(
            f"| `{row['type']}`{' (record)' if row['record'] else ''} | {row['ffn']} | {row['attention']} | {stays} | "
            f"{row['agrees']:.0e} | exact | {generation} | same bits | {row['seconds']} |"
        )
    return "\n".join(lines)


def reasons(rows: Sequence[Mapping[str, Any]]) -> str:
    """Types that are not pruned, and why not."""
    lines = ["| type | why not |", "|---|---|"]
    for row in rows:
        if not passed(row):
            why = row.get("reason")
            if why is None:
                got = {n: row.get(n) for n in ("agrees", "budget", "reloaded")}
                why = ", ".join(f"{name}: {value}" for name, value in got.items())
            short = str(why).replace("|", "/").split(" Give it a record")[0][:240]
            lines.append(f"| `{row['type']}` | {short} |")
    return "\n".join(lines)


def failures(rows: Sequence[Mapping[str, Any]]) -> str:
    """Types whose dense model does not generate, and why."""
    failing = {row["type"]: row["generation"] for row in rows if passed(row) and type(row["generation"]) is str}
    return "\n".join(f"- `{name}`: {why.removeprefix('dense fails: ')}" for name, why in failing.items())


def page(rows: Sequence[Mapping[str, Any]], images: Sequence[Mapping[str, Any]]) -> str:
    """docs/architectures.md."""
    good = [row for row in rows if passed(row)]
    heads = [row for row in good if row["attention"] != "none"]
    built = [row for row in rows if row["built"]]
    seconds = sorted(row["seconds"] for row in good if not row["record"])
    return (
        "# Every causal type of transformers\n\n"
        "Made by `python -m experiments.architectures` on tiny random models, one for each of the "
        f"{len(rows)} types that `AutoModelForCausalLM` of transformers {transformers.__version__} knows; "
        f"{len(built)} of them can be built tiny. *{len(good)} are pruned in the FFN, {len(heads)} of them in KV "
        "groups or heads as well*: the masked, the sliced and the reloaded model compute the same logits. Reloading "
        "is in a process without gprune. A type with *(record)* is in `gprune/models/families.py`; the structure of "
        "the others "
        f"is discovered, in {seconds[len(seconds) // 2] if seconds else 0} s (median) and at most "
        f"{seconds[-1] if seconds else 0} s on one core, and read from the cache afterwards. Where a layer has several "
        "FFNs, such as experts and shared experts, all are pruned (`+`); *stays* has those that add nothing to the "
        "residual, such as a router's, with their share of the tiny model's parameters (`--dry_run true` prints the "
        "share of a real one).\n\n"
        f"{table(rows)}\n\n"
        "*dense fails*: `generate` of transformers fails on the tiny model before anything is pruned:\n\n"
        f"{failures(rows)}\n\n## With images\n\n"
        "Types that take images are pruned in their language model, on text. Logits are compared on a random picture "
        "and a few words; *reloaded* is `AutoModelForImageTextToText` on the saved folder.\n\n"
        f"{table(images)}\n\n## Not pruned\n\n{reasons([*rows, *images])}\n"
    )


def main(args: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; by default all, and those with images")
    parser.add_argument("--images", action="store_true", help="only the types with images")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--rows", type=Path, help="write the rows as JSON, or add to those that are there")
    parser.add_argument("--from-rows", action="store_true", help="make the page from --rows alone")
    settings = parser.parse_args(args)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("gprune").setLevel(logging.ERROR)
    known = {}
    if settings.rows and settings.rows.exists():
        known = json.loads(settings.rows.read_text())
    types = settings.types or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if settings.images:
        known |= {f"{row['type']} (images)": row for row in measured(settings.types or VISION, vision=True)}
    elif not settings.from_rows:
        known |= {row["type"]: row for row in measured(types)}
        if not settings.types:
            known |= {f"{row['type']} (images)": row for row in measured(VISION, vision=True)}
    if settings.rows:
        settings.rows.write_text(json.dumps(known, indent=1))
    rows = [known[name] for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in known]
    text = page(rows, [row for name, row in known.items() if "(images)" in name])
    if settings.write:
        PAGE.write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
