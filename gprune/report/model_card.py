"""Model card: the README.md of an exported folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import ModelCardData

from gprune.config import RunConfig
from gprune.corpora.load import corpus_labels
from gprune.errors import one_line
from gprune.models.embedded import EMBEDDED_MODELS, model_label
from gprune.report.benchmark_table import against, rated
from gprune.report.records import result_table
from gprune.report.table import in_markdown
from gprune.runs.folder import RunFolder
from gprune.runs.numbers import Record
from gprune.runs.results import read_evaluation
from gprune.storage.files import file_hashes, replacing
from gprune.storage.reading import expanded

RESULTS = "## Perplexity"  # heading of the results


def write_card(folder: RunFolder, cfg: RunConfig, records: Sequence[dict[str, Any]]) -> None:
    """Write the card of a run's exported model, if there is one, and store the card's hash in the manifest."""
    if (model := folder / "model").is_dir():
        manifest, stock = folder.manifest, not any(model.glob("*.py"))
        summary = manifest.get("summary", {})
        said, quality = (summary.get(name, {}).get("said") for name in ("speed", "quality"))
        card = model_card(cfg, records, stock=stock, dtype=manifest.get("exported_dtype"))
        card += f"\n{quality}\n" if quality else ""
        card += speed_section(read_evaluation(folder / "evaluation.json"), said)
        with replacing(model / "README.md") as new:
            new.write_text(card, encoding="utf-8")
        folder.update_manifest(model=file_hashes(model, "README.md"))


def model_card(
    cfg: RunConfig, records: Sequence[dict[str, Any]], *, stock: bool = False, dtype: str | None = None
) -> str:
    """Return the README.md of the exported folder: description, method, results, and how to load the model.

    Args:
        cfg: the configuration of the run.
        records: records of `metrics.json`.
        stock: whether the folder is a stock model without custom code.
        dtype: dtype of the exported weights; by default `--model.dtype`.
    """
    code = (
        "All blocks have the same shape: a stock model, which needs no code of its own."
        if stock
        else "`modeling_pruned.py` is the code that is run: one short file. Where `gprune` is installed, "
        "`gprune.register()`\nmakes `trust_remote_code` unnecessary."
    )
    embedded = EMBEDDED_MODELS.get(cfg.model.name)
    licence = embedded.license if embedded else "that of the base model"
    notice = f" {embedded.notice}" if embedded and embedded.notice else ""
    recovery = "" if cfg.recovery == "none" else f", recovery `{cfg.recovery}`"
    method = "gprune" if cfg.gprune else "base metric alone"
    folder = _folder(cfg)
    # A path on this machine is not useful for others.
    label = in_markdown(one_line(folder.name if folder else model_label(cfg.model.name)))
    labels = corpus_labels([cfg.corpora.score, *cfg.roles["drift"], *(r["corpus"] for r in records)])
    score, drift = labels[cfg.corpora.score], ", ".join(in_markdown(labels[corpus]) for corpus in cfg.roles["drift"])
    drift = f"drift measured on {drift},\n" if drift else ""
    allocation = cfg.sparsity.allocation if cfg.gprune else cfg.base_allocation
    removed = f"{records[-1]['sparsity']:.0%} of the {cfg.sparsity.currency.replace('_', ' ')}"
    heading, verb = "structurally pruned", "pruned and measured"
    made = f"""{removed} in scope `{cfg.sparsity.scope}` removed by {method}: importance
`{cfg.importance}` scored on {in_markdown(score)}, {drift}allocation `{allocation}`{recovery}, seed {cfg.run.seed}."""
    credit = "The method is our reading of GPrune-LLM (arXiv 2603.13418).\n"
    if (other := cfg.model.made_elsewhere) is not None:
        heading, verb, credit = "made elsewhere", "recovered and measured", ""
        made = f"A model that gprune did not prune (`{PurePath(other).name}`){recovery}, seed {cfg.run.seed}."
    return f"""---
{_metadata(cfg).to_yaml()}
---

# {label}, {heading}

{made}
Weights in {dtype or cfg.model.dtype}; {verb} in {cfg.model.dtype}.
{credit}
Base model: {label}. Licence: {licence}.{notice}

```python
{loading_code("path/to/this/folder", stock=stock)}
```

{code}
{_results(cfg, records, labels)}"""


def speed_section(records: Sequence[Record], said: str | None) -> str:
    """Return the section on speed: the speed target as text, and measurements of `gprune evaluate`."""
    dense = [r for r in records if r["stage"] == "dense"]
    lines = [f"{said}\n"] if said else []
    for r in (r for r in records if r["kind"] == "speed" and r["stage"] != "dense"):
        over = "".join(f", {ratio} of dense" for ratio in against([r], dense).values())
        lines.append(f"- {r['task']}, batch {r['batch']}: {rated(r)}{over} ({r['dtype']}, {r['note']})")
    return "\n".join(["\n## Speed\n", *lines, ""]) if lines else ""


def loading_code(place: str, *, stock: bool) -> str:
    """Return Python code that loads the exported folder; a stock model does not need `trust_remote_code`."""
    arguments = json.dumps(place, ensure_ascii=False) + ("" if stock else ", trust_remote_code=True")
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({arguments})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({arguments})"
    )


def _folder(cfg: RunConfig) -> Path | None:
    """Return the folder of the base model on this machine; None for a hub id or an embedded model."""
    path = expanded(cfg.model.name)
    return path.resolve() if path.exists() else None


def _metadata(cfg: RunConfig) -> ModelCardData:
    """Return the card's metadata for the hub: base model, and licence if it is known."""
    embedded = EMBEDDED_MODELS.get(cfg.model.name)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", cfg.model.name) and _folder(cfg) is None
    return ModelCardData(
        base_model=(embedded.base if embedded else cfg.model.name if on_hub else None) or None,
        license=embedded.license.lower() if embedded else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "gprune"],
    )


def _results(cfg: RunConfig, records: Sequence[dict[str, Any]], labels: Mapping[str, str]) -> str:
    e, bos = cfg.evaluation, "with" if records[0]["bos"] else "no"
    return f"""
{RESULTS}

{result_table(records, labels).to_text()}

{e.num_samples} windows of {e.seq_len} tokens of {e.split} text per corpus (stride {e.seq_len}, {bos} BOS), computed in
{cfg.model.dtype}. `base` is the metric alone. Seen corpora served the pruning, with other documents.
"""
