"""Model card: the README.md of an exported folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from gprune.config import RunConfig
from gprune.corpora.load import corpus_labels
from gprune.models.embedded import EMBEDDED_MODELS, model_label
from gprune.models.families import PRUNED
from gprune.models.loading import has_processor
from gprune.report.tables import in_markdown, result_table
from gprune.report.task_tables import evaluation_tables
from gprune.runs.folder import RunFolder
from gprune.runs.numbers import entries
from gprune.runs.results import FinishedRun, read_evaluation
from gprune.storage.files import replacing
from gprune.storage.paths import expanded

RESULTS = "## Perplexity"  # heading of the results


def write_card(folder: RunFolder, cfg: RunConfig, run: FinishedRun) -> None:
    """Write the card of a run's exported model, if there is one."""
    model = folder / "model"
    if not model.is_dir():
        return
    card = model_card(cfg, run, model, dtype=folder.manifest.get("exported_dtype"))
    for entry in entries(run.summary).values():
        card += "".join(f"\n{line}\n" for line in (entry["said"], *entry.get("warnings", ())))
    if evaluation := read_evaluation(folder / "evaluation.json"):
        tables = "\n\n".join(table.to_text() for table in evaluation_tables(evaluation))
        card += f"\n## Benchmarks\n\n{tables}\n"
    with replacing(model / "README.md") as new:
        new.write_text(card, encoding="utf-8")


def model_card(cfg: RunConfig, run: FinishedRun, model: Path, *, dtype: str | None = None) -> str:
    """Return the README.md of the exported folder `model`: description, method, results, and how to load it.

    `dtype` is that of the exported weights.
    """
    code = (
        "All blocks have the same shape: a stock model, which needs no code of its own."
        if _is_stock(model)
        else "`modeling_pruned.py` is the code that is run: one short file. Where `gprune` is installed,\n"
        f'`gprune.register("{_dense_type(model)}")` makes `trust_remote_code` unnecessary.'
    )
    embedded = EMBEDDED_MODELS.get(cfg.model.name)
    licence = embedded.license if embedded else "that of the base model"
    notice = f" {embedded.notice}" if embedded and embedded.notice else ""
    local_folder = _local_folder(cfg)
    # The name alone, because a path on this machine is not useful for others.
    label = in_markdown(local_folder.name if local_folder else model_label(cfg.model.name))
    labels = corpus_labels([*cfg.corpora.scored, *cfg.roles["drift"], *(r["corpus"] for r in run.records)])
    method = _describe_method(cfg, labels, sparsity=run.records[-1]["sparsity"])
    credit = "The method is our reading of GPrune-LLM (arXiv 2603.13418).\n" if cfg.gprune else ""
    return f"""---
{_metadata(cfg, model).to_yaml()}
---

# {label}, structurally pruned

{method}
Weights in {dtype or cfg.model.dtype}; pruned and measured in {cfg.model.dtype}.
{credit}
Base model: {label}. Licence: {licence}.{notice}

```python
{loading_code(model, "path/to/this/folder")}
```

{code}
{_results(cfg, run, labels)}"""


def _describe_method(cfg: RunConfig, labels: Mapping[str, str], *, sparsity: float) -> str:
    """Return a sentence on how the model was pruned."""
    method = "gprune" if cfg.gprune else "base metric alone"
    removed = f"{sparsity:.0%} of the {cfg.sparsity.currency.replace('_', ' ')}"
    score_corpora = ", ".join(in_markdown(labels[corpus]) for corpus in cfg.corpora.scored)
    drift_corpora = ", ".join(in_markdown(labels[corpus]) for corpus in cfg.roles["drift"])
    drift = f"drift measured on {drift_corpora},\n" if cfg.gprune else ""
    allocation = cfg.sparsity.allocation if cfg.gprune else cfg.base_allocation
    return (
        f"{removed} in scope `{cfg.sparsity.scope}` removed by {method}: importance\n"
        f"`{cfg.metrics}` scored on {score_corpora}, {drift}allocation `{allocation}`{_describe_recovery(cfg)}, "
        f"seed {cfg.run.seed}."
    )


def _describe_recovery(cfg: RunConfig) -> str:
    """Return the recovery as a part of a sentence; empty without recovery."""
    return "" if cfg.recovery == "none" else f", recovery `{cfg.recovery}`"


def loading_code(model: Path, name: str | None = None) -> str:
    """Return Python code that loads an exported folder. A stock model does not need `trust_remote_code`."""
    path = json.dumps(str(model) if name is None else name, ensure_ascii=False)
    arguments = path + ("" if _is_stock(model) else ", trust_remote_code=True")
    auto_class = "AutoModelForImageTextToText" if _needs_image_class(model) else "AutoModelForCausalLM"
    variable, text_class = ("processor", "AutoProcessor") if has_processor(model) else ("tokenizer", "AutoTokenizer")
    return (
        f"from transformers import {auto_class}, {text_class}\n\n"
        f"model = {auto_class}.from_pretrained({arguments})\n"
        f"{variable} = {text_class}.from_pretrained({arguments})"
    )


def _is_stock(model: Path) -> bool:
    """Return whether an exported folder is a stock model without custom code."""
    return not any(model.glob("*.py"))


def _dense_type(model: Path) -> str:
    """Return the model type of the dense model of an exported folder; "" if it has no config."""
    file = model / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return config.get("model_type", "").removeprefix(PRUNED)


def _needs_image_class(model: Path) -> bool:
    """Return whether transformers loads an exported folder only with the class for images and text."""
    model_type = _dense_type(model)
    has_images = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return has_images and model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _local_folder(cfg: RunConfig) -> Path | None:
    """Return the folder of the base model on this machine; None for a hub id or an embedded model."""
    path = expanded(cfg.model.name)
    return path.resolve() if path.exists() else None


def _metadata(cfg: RunConfig, model: Path) -> ModelCardData:
    """Return the card's metadata for the hub: base model, and licence if it is known."""
    embedded = EMBEDDED_MODELS.get(cfg.model.name)
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", cfg.model.name) and _local_folder(cfg) is None
    base_model = None
    if embedded:
        base_model = embedded.base or None  # empty if the original is not on the hub
    elif is_hub_id:
        base_model = cfg.model.name
    return ModelCardData(
        base_model=base_model,
        license=embedded.license.lower() if embedded else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if has_processor(model) else "text-generation",
        tags=["pruned", "gprune"],
    )


def _results(cfg: RunConfig, run: FinishedRun, labels: Mapping[str, str]) -> str:
    """Return the section with the result table and the protocol of evaluation."""
    num_samples, seq_len, split = cfg.evaluation.num_samples, cfg.evaluation.seq_len, cfg.evaluation.split
    bos = "with" if run.records[0]["bos"] else "no"
    return f"""
{RESULTS}

{result_table(run.frame(labels)).to_text()}

{num_samples} windows of {seq_len} tokens of {split} text per corpus (stride {seq_len}, {bos} BOS), computed in
{cfg.model.dtype}. Other documents of the seen corpora were used for pruning.
"""
