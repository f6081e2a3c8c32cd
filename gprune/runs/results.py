"""Results of a run, and functions that read run folders.

`read_numbers` reads settings and numbers, `read_run` also masks, modules and evaluation, and `load_run` everything
including the pruned model.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gprune.calibration.statistics import CorpusStatistics
from gprune.checks import require
from gprune.config import RunConfig, config_from_mapping
from gprune.discovery import family_of
from gprune.errors import UnregisteredError, UserError, first_line
from gprune.models.loading import load_weights
from gprune.models.masks import Masks
from gprune.partition.modules import Modules
from gprune.runs.folder import RunFolder
from gprune.runs.numbers import Record, by_stage, run_frame, same_windows
from gprune.sparsity.thresholds import ModuleSparsity, Thresholds
from gprune.storage.files import FORMAT_VERSION, MISSING, Cache, inspect_json, key_of, read_json, read_tensors
from gprune.storage.paths import expanded
from gprune.storage.yaml_text import read_yaml


@dataclass(frozen=True, repr=False)
class FinishedRun:
    """A finished run: settings, numbers and, if they were read, masks and modules."""

    path: Path
    name: str  # name of the folder; longer if two folders have the same name
    settings: dict[str, Any]
    records: list[Record]
    summary: dict[str, Any]
    masks: Masks | None = None  # None if they were not read or not stored
    modules: Modules | None = None  # None also with --gprune false
    evaluation: list[Record] = field(default_factory=list)  # records of `gprune evaluate`
    steps: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # seconds, tokens, memory of each step
    environment: Mapping[str, Any] = field(default_factory=dict)  # versions and machine
    key: str | None = None  # hash of the settings

    def __repr__(self) -> str:
        return f"FinishedRun({self.name!r}, seed {self.seed}, {str(self.path)!r})"

    @property
    def seed(self) -> int:
        """Random seed of the run."""
        return self.settings["run"]["seed"]

    @property
    def final(self) -> str:
        """Stage of the run's final model, which is measured last."""
        return self.records[-1]["stage"]

    def frame(self, labels: Mapping[str, str] | None = None) -> pd.DataFrame:
        """Return all numbers of the run, one per line (`runs.numbers.run_frame`)."""
        return run_frame(self.name, self.records, self.summary, self.steps, self.evaluation, labels=labels)

    @property
    def has_another_tokenizer(self) -> bool:
        """Whether the model was measured on other tokens than dense. Perplexities are not comparable then."""
        stages = by_stage(self.records)
        return any(not same_windows(of_stage, stages["dense"]) for of_stage in stages.values())

    @property
    def model(self) -> str:
        """Fingerprint of the dense model."""
        return self.settings["inputs"]["model"]

    @property
    def all_but_seed(self) -> str:
        """Settings, dense model and evaluation text as a string. It is equal for runs that differ in the seed only."""
        settings = json.loads(json.dumps(self.settings))  # a deep copy
        settings["run"].pop("seed")
        settings["inputs"].pop("text", None)  # the calibration windows depend on the seed
        text = sorted({(r["corpus"], r["content_hash"]) for r in self.records})
        return json.dumps([settings, text], sort_keys=True)


@dataclass(repr=False)
class PruningResult:
    """Result of a run. `model` is the pruned model with smaller matrices."""

    path: Path
    config: RunConfig
    masks: Masks
    modules: Modules | None  # None with --gprune false
    thresholds: Thresholds | None  # logits per module, per block: neurons, KV groups; None without modules
    statistics: Mapping[str, CorpusStatistics]  # by corpus
    records: list[dict[str, Any]]  # metrics.json
    summary: dict[str, Any]
    model: PreTrainedModel | None  # None, like the tokenizer, if a run with `--export none` is loaded
    tokenizer: PreTrainedTokenizerBase | None

    def to_frame(self) -> pd.DataFrame:
        """Return all numbers of the run with 95 % intervals, one per line (`runs.numbers.run_frame`).

        Columns: row (name of the run), stage (dense, pruned, recovered), corpus, seen, seed, number, value, low, high
        and windows. Numbers over corpora and of the whole model have an empty corpus. Frames can be concatenated.
        """
        steps = RunFolder(self.path).manifest.get("steps", {})
        evaluation = read_evaluation(self.path / "evaluation.json")
        return run_frame(self.path.name, self.records, self.summary, steps, evaluation)

    def table(self) -> pd.DataFrame:
        """Return perplexity by corpus and stage as a frame; seen corpora have a star."""
        frame = run_frame(self.path.name, self.records)
        frame = frame[frame["number"] == "perplexity"]
        stars = frame["seen"].map({True: "*", False: ""})
        table = frame.assign(corpus=frame["corpus"] + stars).pivot(index="corpus", columns="stage", values="value")
        return table.loc[:, frame["stage"].unique()].rename_axis(index=None, columns=None)

    def __repr__(self) -> str:
        """Return the path, the sizes, and the table."""
        lines = [f"PruningResult({str(self.path)!r})"]
        if summary := self.summary:
            of_scope = f"{summary['sparsity_of_scope']:.2%} of {self.config.sparsity.scope}"
            removed = f"{of_scope} removed, {summary['sparsity_of_model']:.2%} of the model"
            lines.append(f"{removed}: {summary['parameters_before']:,} -> {summary['parameters_after']:,}")
        if self.records:
            lines += self.table().to_string(float_format="{:.2f}".format, max_rows=7).splitlines()
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.table().to_html(float_format="{:.2f}".format) if self.records else f"<pre>{self!r}</pre>"


def read_numbers(path: Path | str) -> FinishedRun:
    """Read settings and numbers of a finished run, without masks, modules and evaluation."""
    require(path, (str, os.PathLike), "The run must be the path of a run folder")
    folder = expanded(path)
    if not folder.is_dir():
        raise UserError(f"Cannot read run '{path}': there is no folder '{path}'.")
    manifest, problem = inspect_json(folder / "manifest.json")
    if problem or manifest.get("format") != FORMAT_VERSION:
        reason = f"manifest.json: {problem or 'other format'}"
        raise UserError(f"Cannot read run '{path}': not a gprune run, or of another version ({reason}).")
    metrics = read_json(folder / "metrics.json") or {}
    if "summary" not in metrics:
        raise UserError(f"Cannot read run '{path}': the run is not finished. Run the same command again.")
    return FinishedRun(
        folder, folder.resolve().name, manifest["settings"], metrics["records"], metrics["summary"],
        steps=manifest["steps"], environment=manifest["environment"], key=key_of(settings=manifest["settings"]),
    )  # fmt: skip


def read_run(path: Path | str) -> FinishedRun:
    """Read a finished run with masks, modules and evaluation, but without the model."""
    run = read_numbers(path)
    return replace(_with_tensors(run), evaluation=read_evaluation(run.path / "evaluation.json"))


def _with_tensors(run: FinishedRun) -> FinishedRun:
    """Return the run with masks and, if it has modules, modules."""
    masks = Masks.from_tensors(_read_tensors_of(run, "masks"))
    modules = Modules.from_tensors(_read_tensors_of(run, "modules")) if run.settings["gprune"] else None
    return replace(run, masks=masks, modules=modules)


def _read_tensors_of(run: FinishedRun, name: str) -> dict[str, Tensor]:
    """Read `<name>.safetensors` of a run. Raise UserError if it cannot be read."""
    tensors = read_tensors(run.path / f"{name}.safetensors")
    if tensors is None:
        file = f"{run.path / name}.safetensors"
        raise UserError(f"Cannot read {file}: the file is missing or damaged. Run the same command again.")
    return tensors


def read_evaluation(path: Path) -> list[Record]:
    """Read records of `gprune evaluate`; empty if there is no file."""
    content, problem = inspect_json(path)
    if content is not None and "records" not in content:
        problem = "it has no records"
    if problem and problem != MISSING:
        remedy = "Move the file away, or choose another one"
        raise UserError(f"Cannot read records of gprune evaluate in '{path}': {problem}. {remedy}.")
    return content["records"] if content else []


def load_run(path: Path | str) -> PruningResult:
    """Load a finished run from its folder. The dense model is not needed.

    Statistics are loaded without Gram matrices, which are only in the cache. `model` is the exported model in
    `--export.dtype`, while perplexity was measured in `--model.dtype`. `model` and `tokenizer` are None after
    `--export none`; `gprune.apply_masks(dense, result.masks)` then constructs the pruned model without recovery.

    Args:
        path: the folder, or a W&B artifact `wandb:entity/project/artifact:version` (see `--logging.artifacts`).

    Raises:
        UserError: if the run is not finished, or one of its files cannot be read.
    """
    if str(path).startswith("wandb:"):
        path = _download_artifact(str(path).removeprefix("wandb:"))
    run = read_numbers(path)
    cfg = config_of(run)
    run = _with_tensors(run)
    statistics = {
        corpus: CorpusStatistics.from_tensors(_read_tensors_of(run, f"statistics/{corpus_file(corpus)}"))
        for corpus in cfg.calibration_corpora
    }
    thresholds = ModuleSparsity.from_tensors(_read_tensors_of(run, "thresholds")).thresholds if cfg.gprune else None
    model, tokenizer = _load_exported(run)
    return PruningResult(
        run.path, cfg, run.masks, run.modules, thresholds, statistics, run.records, run.summary, model, tokenizer
    )


def _download_artifact(name: str) -> Path:
    """Download a W&B artifact, `entity/project/artifact:version`, into the cache and return its folder."""
    import wandb  # slow to import, and needed for artifacts only

    try:
        artifact = wandb.Api().artifact(name)
        return Path(artifact.download(root=str(Cache("artifacts").path(artifact.digest))))
    except (wandb.errors.Error, ValueError, OSError) as error:
        remedy = "It must be entity/project/artifact:version, and needs an account (`wandb login`)"
        raise UserError(f"Cannot download artifact wandb:{name}: {first_line(error)}. {remedy}.") from error


def corpus_file(corpus: str) -> str:
    """Return a file name for a corpus, whose name may be a path."""
    base_name = os.path.basename(os.path.normpath(corpus))
    return base_name if base_name == corpus else f"{base_name}-{key_of(corpus=corpus)[:6]}"


def config_of(run: FinishedRun) -> RunConfig:
    """Read the configuration of a run from config.yaml. Raise UserError if it names what is not registered."""
    file = run.path / "config.yaml"
    try:
        return config_from_mapping(read_yaml(file, "The file must be YAML; got"))
    except UnregisteredError as error:
        modules = run.environment.get("imports") or ["the module that registers it"]
        raise UserError(f"{run.path}: {error} Register it first: import {', '.join(map(str, modules))}.") from error


def _load_exported(run: FinishedRun) -> tuple[PreTrainedModel | None, PreTrainedTokenizerBase | None]:
    """Load the exported model, frozen, and its tokenizer; (None, None) if the run did not export a model."""
    if not (run.path / "model").is_dir():
        return None, None
    folder = run.path / "model"
    no_code = {"trust_remote_code": False}  # with None transformers would ask the user
    try:
        model = load_weights(folder, dtype="auto", **no_code)
        family_of(model)
        return model, AutoTokenizer.from_pretrained(folder, **no_code)
    except Exception as error:  # safetensors, tokenizers and transformers raise many classes
        imports = [str(name) for name in run.environment.get("imports") or ()]  # modules or paths of files
        missing = [name for name in imports if Path(name).stem not in sys.modules and name not in sys.modules]
        if missing:
            raise UserError(
                f"Cannot load {folder}: the run imported {', '.join(missing)}, which may register its model's family. "
                f"Import it first: --import {missing[0]}, or in Python import it and call gprune.register()."
            ) from error
        raise UserError(f"Cannot load {folder}: {first_line(error)}. Run the same command again.") from error
