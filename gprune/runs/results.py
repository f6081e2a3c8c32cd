"""What a run gives back: plain records that a notebook can hold, and that a run folder can bring back."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gprune.calibration.statistics import CorpusStatistics
from gprune.config import RunConfig
from gprune.errors import UserError, first_line
from gprune.models.masks import Masks
from gprune.partition.record import Modules
from gprune.runs.folder import RunFolder, corpus_file, differences, exported_model
from gprune.storage.files import key_of, read_json


@dataclass
class PruningResult:
    """Everything a run found. `model` is the pruned model, really smaller."""

    path: Path
    config: RunConfig
    masks: Masks
    modules: Modules | None  # None for a base run
    thresholds: tuple[list[Tensor], list[Tensor]] | None  # logits per module, per block: neurons, KV groups
    statistics: Mapping[str, CorpusStatistics]  # by corpus
    records: list[dict[str, Any]]  # metrics.json
    summary: dict[str, Any]
    model: PreTrainedModel | None  # None, as the tokenizer, where a run with `--export none` is loaded
    tokenizer: PreTrainedTokenizerBase | None


def with_defaults(settings: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an earlier version with all that came since: what did not exist then had its default's effect."""
    nested = {k: with_defaults(settings.get(k) or {}, v) for k, v in default.items() if isinstance(v, dict)}
    return {**default, **settings, **nested}


def load_run(path: Path | str) -> PruningResult:
    """A finished run, from its folder alone: the dense model is not needed.

    Statistics come without Gram matrices, which stay in the cache; `model` and `tokenizer` are None after
    `--export none` (`gprune.apply_masks(dense, result.masks)` makes the model again, but for recovery).

    Raises:
        UserError: for a folder that holds no finished run, or a file in it that is not whole, or not this run's.
    """
    from gprune.parse import parse

    manifest = RunFolder(path).manifest
    settings = manifest.get("settings", {})
    folder = RunFolder(path, key=key_of(settings=settings))
    metrics = read_json(folder / "metrics.json", run=folder.key)
    if not manifest or not isinstance(metrics, dict) or not {"summary", "records"} <= metrics.keys():
        raise UserError(f"{folder.path} holds no finished run; expected manifest.json and metrics.json with a summary.")
    try:
        cfg = parse(["--config", str(folder / "config.yaml")])
    except ArgumentError as error:
        raise UserError(f"{folder / 'config.yaml'} was altered: {error}. Run the same command again.") from error
    before = with_defaults(settings, type(cfg)().settings())
    if changed := differences({name: before.get(name) for name in cfg.settings()}, cfg.settings()):
        raise UserError(f"{folder / 'config.yaml'} was altered: {changed[0]}. Run the same command again.")
    try:
        return _read_run(folder, cfg, metrics)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder.path} lacks what a run of its settings leaves ({error}); run the same command again."
        ) from error


def name_controls(cfg: RunConfig, records: Sequence[Mapping[str, Any]]) -> None:
    """Put `unrecovered` among the controls of a run whose records have such rows.

    Before this control had a name, every run with recovery was evaluated without it as well.
    """
    there = any(r["stage"] != "dense" and r["recovery"] == "none" for r in records)
    if there and cfg.recovery != "none" and "unrecovered" not in cfg.evaluation.controls:
        cfg.evaluation.controls = [*cfg.evaluation.controls, "unrecovered"]


def _read_run(folder: RunFolder, cfg: RunConfig, metrics: dict[str, Any]) -> PruningResult:
    def tensors(name: str) -> dict[str, Tensor]:
        found = folder.read(name)
        if found is None:
            raise UserError(f"{folder / name}.safetensors is missing or not whole; run the same command again.")
        return found

    name_controls(cfg, metrics["records"])
    modules = Modules.from_tensors(tensors("modules")) if cfg.gprune else None
    thresholds = None
    if cfg.gprune:
        flat = tensors("thresholds")
        depth = range(sum(name.startswith("ffn.") for name in flat))
        thresholds = tuple([flat[f"{kind}.{b}"] for b in depth] for kind in ("ffn", "attention"))
    model = tokenizer = None
    if (folder / "model").is_dir():
        exported_model(folder.path)
        try:  # False, not None: transformers would ask whether to run code that lies in the folder
            model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto", trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=False)
        except Exception as error:  # safetensors, tokenizers and transformers each raise their own
            raise UserError(
                f"{folder / 'model'} cannot be loaded: {first_line(error)} Run the same command again."
            ) from error
        model = model.eval().requires_grad_(False)
    return PruningResult(
        path=folder.path,
        config=cfg,
        masks=Masks.from_tensors(tensors(f"masks/{'gprune' if cfg.gprune else 'base'}")),
        modules=modules,
        thresholds=thresholds,
        statistics={
            corpus: CorpusStatistics.from_tensors(tensors(f"statistics/{corpus_file(corpus)}"))
            for corpus in cfg.calibration
        },
        records=metrics["records"],
        summary=metrics["summary"],
        model=model,
        tokenizer=tokenizer,
    )
