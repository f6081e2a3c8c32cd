"""Prune a tiny random model of each causal language model type of transformers: the table docs/architectures.csv.

    python -m experiments.architectures --write                # all types; about 30 minutes on one core
    python -m experiments.architectures qwen3_next gpt_oss     # some types, printed; with --write their rows change
    python -m experiments.architectures --part runs --write    # only the column *whole run*

Tiny models have the default configuration of their type (with the additions in `DEFAULTS`), but other widths and
weights than the copies that discovery makes. Columns of the table:

input            `image` for a type in a model that takes images, whose logits are compared with an image
structure        `record` of `gprune/models/families.py`, or `discovered`
FFN, attention   separate or fused projections, experts, KV groups
stays            FFNs and experts that are not pruned, with their share of the tiny model's parameters: their output
                 does not join the residual stream, such as a router's, or they have no units that can be removed
masked = sliced  largest difference between logits of the masked and the sliced model, over the largest logit
budget           `exact` if the number of removed parameters is the one counted by the budget
generation       whether greedy generation with a cache gives the same tokens with the masked and the sliced model;
                 *dense fails* if the dense model cannot generate
reloaded         `same bits` if the saved model, loaded in a process without gprune, has the same logits
seconds          of discovery; 0.0 if an earlier type has the same structure
whole run        scope and recovery with which `train.py` prunes the tiny model in all ten steps (`whole_runs.py`)
whole experts    how the folder loads without half of the experts, or why none can be removed (`whole_experts.py`)
reason           why the type is not pruned, or why its whole run is refused or has less in scope
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import inspect
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from experiments.whole_runs import in_words, whole_run
from gprune.discovery import family_of
from gprune.discovery.tiny import EXPERT_NEURONS, NEURONS, SHARED_NEURONS, shrunk, tiny_model
from gprune.errors import UserError, first_line
from gprune.export.hf import save_pruned
from gprune.models.agreement import random_masks
from gprune.models.experts import is_of_experts
from gprune.models.families import FAMILIES, decoder_layers
from gprune.models.masks import masked
from gprune.models.surgery import slice_model
from gprune.models.units import find_unpruned, units_by_layer, units_of
from gprune.sparsity.budget import budget_of
from gprune.units.structure import Units

TABLE = Path(__file__).parents[1] / "docs" / "architectures.csv"
COLUMNS = (
    "type", "input", "structure", "FFN", "attention", "stays", "masked = sliced", "budget", "generation", "reloaded",
    "seconds", "whole run", "whole experts", "reason",
)  # fmt: skip
Table = dict[tuple[str, str], dict[str, str]]  # (type, input) -> cells by column
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
    "hunyuan_v1_moe": {"head_dim": 128, "num_key_value_heads": 8, "num_experts": 64, "moe_topk": [8] * 32},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "xmod": {"default_language": "en_XX"},
}

# Name of a row -> type and settings with which another structure is found than with the default configuration.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "stablelm with qk_layernorm": ("stablelm", {"qk_layernorm": True}),
}

VISION = (
    "aya_vision", "gemma3", "got_ocr2", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mistral3",
    "paligemma", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
)  # fmt: skip


def image_inputs(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Yield the inputs for one image in the different formats of models in transformers."""
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
def image_arguments(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Return arguments of a forward pass with one image that affects the logits; None if no format is accepted."""
    config = model.config
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    for image in image_inputs(model):
        with contextlib.suppress(Exception):  # formats of other types raise exceptions of any class
            count = len(_features(model.get_image_features(**image)))
            ids = torch.tensor([[3, 4, *[token] * count, 5, 6, 7]])
            arguments = {"input_ids": ids, **image}
            if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:
                arguments["mm_token_type_ids"] = (ids == token).long()
            own = model(**arguments).logits
            other = model(**arguments | {"pixel_values": image["pixel_values"].flip(-1) / 2}).logits
            if (own - other).abs().max() > 1e-4:
                return arguments
    return None


def _features(found: Any) -> Tensor:
    """Return the image features (n, H) in the output of `get_image_features`."""
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(found, name, None) is not None:
            found = getattr(found, name)
    if isinstance(found, (list, tuple)):
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in found])
    return found.reshape(-1, found.shape[-1])


def default_config(model_type: str) -> PreTrainedConfig:
    """Return the default configuration of a type or of a variant, as a decoder if the type has encoders too."""
    model_type, settings = VARIANTS.get(model_type, (model_type, DEFAULTS.get(model_type, {})))
    config = CONFIG_MAPPING[model_type](**settings)
    for name, value in (("is_decoder", True), ("is_encoder_decoder", False)):
        if isinstance(config.__dict__.get(name), bool):
            setattr(config, name, value)
    return config


def example(model_type: str) -> PreTrainedModel:
    """Make a tiny random model of a type, with its structure."""
    model = random_model(model_type)
    family_of(model)
    return model


def random_model(model_type: str) -> PreTrainedModel:
    """Make a tiny random model of a type, wider than the copies that discovery makes."""
    config = shrunk(default_config(model_type))
    for own in (config, *(v for v in vars(config).values() if isinstance(v, PreTrainedConfig))):
        for name, value in list(vars(own).items()):
            if type(value) is int and value in (NEURONS, EXPERT_NEURONS, SHARED_NEURONS) and "size" in name + "size":
                setattr(own, name, value + 4)
    return tiny_model(config, seed=7).requires_grad_(False)


def describe(model: PreTrainedModel) -> tuple[str, str]:
    """Describe the discovered FFN and attention of a model, as in the table."""
    ffn: dict[str, int] = {}
    attention: dict[str, int] = {}
    layers = decoder_layers(model)
    for layer, own in zip(layers, units_by_layer(model), strict=True):
        ffns = [_ffn_name(layer, u) for u in own if u.kind == "neurons" and u.reads]
        heads = [u.settings["num_attention_heads"] for u in own if u.kind == "kv_groups" and u.reads]
        groups = ["heads" if per_group == 1 else "KV groups" for per_group in heads]
        for names, counts in ((ffns, ffn), (groups, attention)):
            name = " + ".join(names) or "none"
            counts[name] = counts.get(name, 0) + 1
    depth = len(layers)
    ffn_text, attention_text = (
        ", ".join(name if n == depth else f"{name} ({n} of {depth})" for name, n in counts.items())
        for counts in (ffn, attention)
    )
    return ffn_text, attention_text


def _ffn_name(layer: nn.Module, u: Units) -> str:
    """Name the projections of an FFN."""
    if is_of_experts(layer, u):
        return f"{u.rows} experts"
    rows = [name for s in u.inputs for name, _ in s.parts]
    return "up, down" if len(rows) == 1 else "gate and up fused" if len(u.inputs) == 1 else "gate, up, down"


def row_of(model_type: str, folder: Path, *, vision: bool = False) -> dict[str, Any]:
    """Make a row of the table, and save the pruned model and its logits in a folder below `folder`."""
    row: dict[str, Any] = {"type": model_type, "record": model_type in FAMILIES}
    try:
        model = random_model(model_type)
    except Exception as error:
        return row | {"reason": f"no tiny model: {first_line(error)}", "built": False}
    row["built"] = True
    try:
        started = time.process_time()  # CPU time does not depend on other processes
        family_of(model)
        row["seconds"] = round(time.process_time() - started, 1)
        row["ffn"], row["attention"] = describe(model)
        row["stays"] = {p: s.parameters / model.num_parameters() for p, s in find_unpruned(model).items()}
        row |= _compare(model, folder / model_type, vision=vision)
    except TimeoutError:
        raise
    except UserError as error:
        row["reason"] = str(error)
    except Exception as error:
        row["reason"] = f"{type(error).__name__}: {first_line(error)}"
    return row


def _compare(model: PreTrainedModel, folder: Path, *, vision: bool = False) -> dict[str, Any]:
    """Compare the masked with the sliced model, check budget and generation, and save the sliced model."""
    masks, found = random_masks(model), {}
    ids = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))
    inputs = image_arguments(model) if vision else {"input_ids": ids}
    if inputs is None:
        return {"reason": "no picture that the tiny model takes was made"}
    with torch.no_grad():
        dense = model(**inputs, use_cache=False).logits
        with masked(model, masks):
            expected = model(**inputs, use_cache=False).logits
        small = slice_model(model, masks)
        logits = small(**inputs, use_cache=False).logits
    found["moved"] = float((expected - dense).abs().max() / dense.abs().max())
    found["agrees"] = float((expected - logits).abs().max() / expected.abs().max())
    removed = model.num_parameters() - small.num_parameters()
    found["budget"] = removed == budget_of(units_of(model), scope="attention+ffn").removed_by(masks)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    try:
        model.generate(ids[:, :9], **settings)
    except Exception as error:  # a failure of the dense model, which is no failure of pruning
        found["generation"] = f"dense fails: {first_line(error)}"
    else:
        with masked(model, masks):
            expected_tokens = model.generate(ids[:, :9], **settings)
        found["generation"] = torch.equal(expected_tokens, small.generate(ids[:, :9], **settings))
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
    """Load all saved models in a process that cannot import gprune. Returns the largest difference of logits each."""
    script = folder.parent / "load.py"
    script.write_text(LOADER)
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(folder)], cwd=folder.parent, capture_output=True, text=True, check=False
    )
    rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    return dict(rows)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the context after some seconds."""

    def raise_timeout(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, raise_timeout)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def measure(types: Sequence[str], *, vision: bool = False) -> list[dict[str, Any]]:
    """Make the rows of the table, without whole runs."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="gprune-architectures-") as scratch:
        os.environ["GPRUNE_CACHE"] = f"{scratch}/cache"  # empty, so that each structure is discovered
        folder = Path(scratch) / "models"
        folder.mkdir()
        for name in types:
            try:
                with time_limit(LIMIT):
                    row = row_of(name, folder, vision=vision)
            except TimeoutError:
                row = {"type": name, "record": name in FAMILIES, "built": True, "reason": f"not done in {LIMIT} s"}
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            if not (folder / name / "expected.safetensors").exists():
                shutil.rmtree(folder / name, ignore_errors=True)
        differences = reloaded(folder)
    for row in rows:
        if row["type"] in differences:
            row["reloaded"] = differences[row["type"]]
    return rows


def runs_of(types: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the results of `whole_run` by type. Types without a tiny model have none."""
    results = {}
    with tempfile.TemporaryDirectory(prefix="gprune-runs-") as cache:
        os.environ["GPRUNE_CACHE"] = cache
        for name in types:
            try:
                model = random_model(name)
            except Exception:  # the survey has the reason
                continue
            try:
                with time_limit(LIMIT):
                    results[name] = whole_run(model)
            except TimeoutError:
                results[name] = {"scope": None, "recovery": None, "reasons": [], "failed": f"not done in {LIMIT} s"}
            print(json.dumps({"type": name, "run": results[name]}), file=sys.stderr, flush=True)
    return results


def passed(row: Mapping[str, Any]) -> bool:
    """Return whether the FFN of a type is pruned, and masked, sliced and reloaded models agree.

    The masks must change the logits (`moved`), so that agreement is not trivial.
    """
    if "reason" in row or row["ffn"] == "none" or not row["budget"] or row["generation"] is False:
        return False
    return row.get("reloaded") == 0.0 and row["agrees"] <= 1e-4 and row["moved"] >= 1e-3


def cells(row: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Return the cells of a type with the input `kind`, without those of a whole run and of whole experts."""
    of_type = {"type": row["type"], "input": kind}
    if not passed(row):
        measured = {name: row.get(name) for name in ("ffn", "moved", "agrees", "budget", "generation", "reloaded")}
        why = row.get("reason") or ", ".join(f"{name}: {value}" for name, value in measured.items())
        return of_type | {"reason": why.split(" Write a function")[0]}
    return of_type | {
        "structure": "record" if row["record"] else "discovered",
        "FFN": row["ffn"],
        "attention": row["attention"],
        "stays": ", ".join(f"{path} {share:.0%}" for path, share in row["stays"].items()),
        "masked = sliced": f"{row['agrees']:.0e}",
        "budget": "exact",
        "generation": "same" if row["generation"] is True else row["generation"],
        "reloaded": "same bits",
        "seconds": str(row["seconds"]),
    }


def run_cells(run: Mapping[str, Any], attention: str) -> dict[str, str]:
    """Return the cells of a whole run. There is a reason if it fails, or if another scope than `ffn` was refused."""
    reason = ""
    if run["failed"] or len(run["reasons"]) > (attention == "none"):
        reason = run["failed"] or run["reasons"][0 if run["scope"] else -1]
    return {"whole run": in_words(run), "reason": reason}


def read_table() -> Table:
    """Return the rows of docs/architectures.csv."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {(row["type"], row["input"]): row for row in csv.DictReader(file)}


def write_table(table: Table) -> None:
    """Write docs/architectures.csv, in the order of transformers, and its summary."""
    types = [(name, "text") for name in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS)]
    types += [(name, "image") for name in VISION]
    with TABLE.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table[key] for key in types if key in table)
    TABLE.with_suffix(".md").write_text(summary(table), encoding="utf-8")


def summary(table: Table) -> str:
    """Return the content of docs/architectures.md."""
    known = [row for (name, kind), row in table.items() if kind == "text" and name not in VARIANTS]
    built = [row for row in known if not row["reason"].startswith("no tiny model")]
    pruned = [row for row in known if row["FFN"]]
    heads = [row for row in pruned if row["attention"] != "none"]
    runs = Counter(row["whole run"] for row in pruned)
    scopes = ", ".join(f"*{words}* in {count}" for words, count in runs.most_common() if words != "refused")
    experts = [row["whole experts"] for row in table.values() if row["whole experts"]]
    removable = [cell for cell in experts if cell in ("stock model", "modelling file")]
    seconds = sorted(float(row["seconds"]) for row in pruned if row["structure"] == "discovered")
    images = sum(kind == "image" for _, kind in table)
    text = f"""
[architectures.csv](architectures.csv) has a row for each of the {len(known)} types that `AutoModelForCausalLM` of
transformers {transformers.__version__} knows, and for {images} types that take images. `python -m
experiments.architectures --write` makes both files, and describes the columns.

A tiny random model could be built for {len(built)} types. gprune prunes the FFN in {len(pruned)} of these, KV groups or
heads as well in {len(heads)}, and whole experts in {len(removable)} of {len(experts)} types with experts. In all of
them the masked, the sliced and the reloaded model compute the same logits. The others have a *reason*.

A *whole run* of `train.py` on the tiny model has the scope {scopes}; {runs["refused"]} types are refused, because
perplexity cannot be measured, but `gprune.apply_masks` prunes them. Discovery takes {seconds[len(seconds) // 2]} s
(median) and at most {seconds[-1]} s on one core. Types that are encoders by default, such as `bert`, are pruned with
`is_decoder` in config.json, and decoders of encoder-decoders, such as `bart`, without the encoder.
"""
    paragraphs = [
        textwrap.fill(part, 120, break_on_hyphens=False, break_long_words=False) for part in text.strip().split("\n\n")
    ]
    return "\n\n".join(["# Every causal type of transformers", *paragraphs]) + "\n"


def main(args: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; by default all, including those with images")
    parser.add_argument("--images", action="store_true", help="only the types with images")
    parser.add_argument("--part", choices=["survey", "runs"], help="only these columns")
    parser.add_argument("--write", action="store_true", help=f"write the rows to {TABLE.name}, and its summary")
    settings = parser.parse_args(args)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("gprune").setLevel(logging.ERROR)
    choices = VISION if settings.images else (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS)
    if unknown := [name for name in settings.types if name not in choices]:
        parser.error(f"unknown model type '{unknown[0]}'")
    types = [] if settings.images else settings.types or choices
    images = settings.types if settings.images and settings.types else () if settings.types else VISION
    table, surveyed = read_table(), []
    if settings.part != "runs":
        surveyed = [cells(row, "text") for row in measure(types)]
        surveyed += [cells(row, "image") for row in measure(images, vision=True)]
    for new in surveyed:
        old = table.get((new["type"], new["input"]), {}) if "structure" in new else {}
        kept = {name: old[name] for name in ("whole run", "whole experts", "reason") if old.get("structure")}
        table[new["type"], new["input"]] = dict.fromkeys(COLUMNS, "") | kept | new
    if settings.part != "survey":
        for name, run in runs_of(types).items():
            if (row := table.get((name, "text"), {})).get("structure"):
                row |= run_cells(run, row["attention"])
    if settings.write:
        write_table(table)
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    measured = [*((name, "text") for name in types), *((name, "image") for name in images)]
    writer.writerows(table[key] for key in measured if key in table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
