"""What a run gives back: plain records that a notebook can hold, and that a run folder can bring back."""

from __future__ import annotations

import os
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gprune.artifacts import RunFolder, differences, exported_model, key_of, read_json
from gprune.config import RunConfig
from gprune.errors import UserError, first_line
from gprune.masks import Masks
from gprune.reliability import ModuleReliability
from gprune.statistics import CorpusStatistics

UNKNOWN = torch.tensor(float("nan"), dtype=torch.float64)


@dataclass(frozen=True)
class Drift:
    """Rank drift of one block's N neurons over D drift corpora."""

    scores: Tensor  # (D, N) importance per corpus
    ranks: Tensor  # (D, N) in (0, 1)
    drift: Tensor  # (N,) population standard deviation of ranks, the noise floor subtracted if asked for
    floor: Tensor  # (N,) what sampling alone would show
    halves: Tensor = UNKNOWN  # () Kendall tau between halves of a corpus, mean over corpora; NaN in earlier runs


@dataclass(frozen=True)
class Modules:
    """The partition of every block and what is known of its modules; one entry per block."""

    labels: list[Tensor]  # (N,) int64 in [0, K)
    drift: list[Drift]
    reliability: list[ModuleReliability]
    agreement: list[Tensor]  # (K,) Kendall tau inside modules, NaN where undefined
    block_agreement: list[float]  # Kendall tau over the whole block

    def tensors(self) -> dict[str, Tensor]:
        """Flat names to tensors, as saved in safetensors."""
        flat = {"block_agreement": torch.tensor(self.block_agreement, dtype=torch.float64)}
        for b, labels in enumerate(self.labels):
            flat |= {f"{b}.labels": labels, f"{b}.agreement": self.agreement[b]}
            flat |= {f"{b}.drift.{name}": value for name, value in vars(self.drift[b]).items()}
            flat |= {f"{b}.reliability.{name}": value for name, value in vars(self.reliability[b]).items()}
        return flat

    @classmethod
    def from_tensors(cls, flat: dict[str, Tensor]) -> Modules:
        def part(record: type, b: int, name: str) -> Any:
            named = {field: f"{b}.{name}.{field}" for field in record.__dataclass_fields__}
            # What a later version added is missing in a run of an earlier one, and has a default.
            return record(**{field: flat[key] for field, key in named.items() if key in flat})

        depth = range(len(flat["block_agreement"]))
        return cls(
            labels=[flat[f"{b}.labels"] for b in depth],
            drift=[part(Drift, b, "drift") for b in depth],
            reliability=[part(ModuleReliability, b, "reliability") for b in depth],
            agreement=[flat[f"{b}.agreement"] for b in depth],
            block_agreement=flat["block_agreement"].tolist(),
        )

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per module, for tables and figures; undefined agreement is None."""
        rows = []
        for index, (record, agreement) in enumerate(zip(self.reliability, self.agreement, strict=True)):
            for k in range(len(record.size)):
                tau = float(agreement[k])
                rows.append(
                    {
                        "block": index,
                        "module": k,
                        "neurons": int(record.size[k]),
                        "score": float(record.score[k]),
                        "sensitivity": float(record.sensitivity[k]),
                        "noise_floor": float(record.noise[k]),
                        "agreement": None if tau != tau else tau,
                        "switched": bool(record.switched[k]),
                    }
                )
        return rows


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
    from gprune.cli import parse  # here, because the command line imports the pipeline

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


def corpus_file(corpus: str) -> str:
    """A file name for a corpus, which may be a path."""
    plain = os.path.basename(os.path.normpath(corpus))
    return plain if plain == corpus else f"{plain}-{key_of(corpus=corpus)[:6]}"
