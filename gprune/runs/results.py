"""What a run gives back, and the one reader of run folders.

`finished` reads settings and numbers, `read_run` masks, modules and evaluation too, `load_run` everything down to the
pruned model. All of them check that the files belong to the run whose manifest stands beside them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gprune.calibration.statistics import CorpusStatistics
from gprune.checks import require
from gprune.config import RunConfig, configured, migrated
from gprune.errors import UnregisteredError, UserError, first_line
from gprune.models.loading import load_weights
from gprune.models.masks import Masks
from gprune.partition.modules import Modules
from gprune.runs import frames, schema
from gprune.runs.folder import RunFolder, differences
from gprune.runs.numbers import Record, row_name
from gprune.sparsity.allocation import removed_in_words
from gprune.sparsity.thresholds import Thresholds, thresholds_from_named
from gprune.storage.cache import cache_dir
from gprune.storage.files import file_hashes, inspected_json, key_of, read_tensors
from gprune.storage.reading import expanded
from gprune.storage.yaml_text import read_yaml

STAGES = ("base", "averaged", "gprune")  # of the pruned model

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run says of itself: settings and numbers and, where they were read, masks and modules."""

    path: Path
    name: str  # of the folder; longer where two folders have the same one
    settings: dict[str, Any]
    records: list[Record]
    summary: dict[str, Any]
    masks: Masks | None = None  # of the final stage; None where they were not read, or nobody kept them
    modules: Modules | None = None  # None for a base run as well
    evaluation: list[Record] = field(default_factory=list)  # of `gprune evaluate`; empty where nobody ran it
    steps: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # seconds, tokens, memory of each step
    environment: Mapping[str, Any] = field(default_factory=dict)  # versions and machine
    key: str | None = None  # what its files bear

    @property
    def seed(self) -> int:
        """The seed that the run was started with."""
        return self.settings["run"]["seed"]

    @property
    def final(self) -> str:
        """The stage the run was about."""
        if self.settings["model"].get("made_elsewhere") is not None:
            return "model"
        return "gprune" if self.settings["gprune"] else "base"

    @property
    def model(self) -> str:
        """Fingerprint of the dense model."""
        return self.settings["inputs"]["model"]

    @property
    def all_but_seed(self) -> str:
        """Equal for runs that differ in seed alone: settings, dense model and the text they are evaluated on."""
        plain = json.loads(json.dumps(self.settings))
        plain["run"].pop("seed")
        plain["inputs"].pop("text", None)  # the sample of calibration text goes with the seed
        text = sorted({(r["corpus"], r["content_hash"]) for r in self.records})
        return json.dumps([plain, text], sort_keys=True)


@dataclass(repr=False)
class PruningResult:
    """Everything a run found. `model` is the pruned model, really smaller; None if the run measured a model made
    elsewhere."""

    path: Path
    config: RunConfig
    masks: Masks | None  # None for a model made elsewhere
    modules: Modules | None  # None for a base run
    thresholds: Thresholds | None  # logits per module, per block: neurons, KV groups; None where none were learned
    statistics: Mapping[str, CorpusStatistics]  # by corpus
    records: list[dict[str, Any]]  # metrics.json
    summary: dict[str, Any]
    model: PreTrainedModel | None  # None, as the tokenizer, where a run with `--export none` is loaded
    tokenizer: PreTrainedTokenizerBase | None

    def to_frame(self) -> pandas.DataFrame:
        """A line for each stage of the run, its own result last: all numbers, with the ends of 95 % intervals.

        The columns are `frames.COLUMNS` and those of the corpora, the same as in `StudyResult.to_frame`, so the frames
        of several runs can be concatenated. `unseen_over_unrecovered_base` divides by this run's own `base`.
        """
        settings, steps = self.config.settings(), RunFolder(self.path).manifest.get("steps", {})
        of_run = {"row": self.path.name, "record": str(self.path / "metrics.json")}
        made = frames.lines(self.records, settings, self.summary, steps, base=self.records)
        return frames.frame([of_run | line for line in made])

    def table(self) -> pandas.DataFrame:
        """Perplexity by row of the run's table and corpus; corpora whose text the run has read are starred."""
        import pandas

        numbers = pandas.DataFrame(self.records)
        numbers["row"] = [row_name(r["stage"], r["recovery"]) for r in self.records]
        numbers["corpus"] = [f"{r['corpus']}*" if r["seen"] else r["corpus"] for r in self.records]
        table = numbers.pivot(index="row", columns="corpus", values="perplexity")
        order = [list(dict.fromkeys(numbers[name])) for name in ("row", "corpus")]
        return table.loc[order[0], order[1]].rename_axis(index=None, columns=None)

    def __repr__(self) -> str:
        lines, s = [f"PruningResult({str(self.path)!r})"], self.summary
        if s:
            asked, sizes = self.config.sparsity, f"{s['parameters_before']:,} -> {s['parameters_after']:,}"
            removed = "made elsewhere"
            if "sparsity_of_scope" in s:
                of_scope = removed_in_words(s["sparsity_of_scope"], asked.scope, asked.allocation)
                removed = f"{of_scope} removed, {s['sparsity_of_model']:.2%} of the model"
            lines.append(f"{removed}: {sizes}")
        if self.records:
            lines += self.table().to_string(float_format="{:.2f}".format, max_rows=7).splitlines()
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.table().to_html(float_format="{:.2f}".format) if self.records else f"<pre>{self!r}</pre>"


def finished(path: Path | str) -> FinishedRun:
    """What a finished run says of itself, from its manifest and its metrics alone: no masks, modules, evaluation.

    Raises:
        UserError: for a folder that is no run of gprune's, one that is not finished, or a file that is another run's.
    """
    require(path, (str, os.PathLike), "The run must be the path of a run folder")
    place = expanded(path)
    if not place.is_dir():
        raise UserError(f"Expected a run folder, but there is no folder '{path}'.")
    manifest, why = inspected_json(place / "manifest.json", check=schema.Manifest.problem)
    if why or manifest["settings"].get("inputs") is None:
        why = f"manifest.json: {why or 'nothing has begun'}"
        raise UserError(f"'{path}' is no run of gprune's, or one of an older version ({why}).")
    settings, key = migrated(manifest["settings"]), key_of(settings=manifest["settings"])
    metrics, why = inspected_json(place / "metrics.json", run=key, check=schema.Metrics.problem)
    if why or metrics.get("summary") is None:
        why = f"metrics.json: {why or 'no summary yet'}"
        raise UserError(f"The run '{path}' is not finished; run the same command again ({why}).")
    return FinishedRun(
        place, place.resolve().name, settings, metrics["records"], metrics["summary"], steps=manifest["steps"],
        environment=manifest.get("environment") or {}, key=key,
    )  # fmt: skip


def read_run(path: Path | str) -> FinishedRun:
    """A finished run with its masks, modules and evaluation, without the model and without its corpora.

    Raises:
        UserError: as `finished`, and for masks or modules that are missing, not whole, or another run's.
    """
    run = finished(path)
    return replace(_with_tensors(run), evaluation=read_evaluation(run.path / "evaluation.json", run=run.key))


def _with_tensors(run: FinishedRun) -> FinishedRun:
    if run.final == "model":  # made elsewhere, without masks
        return run
    masks = Masks.from_tensors(_tensors(run, f"masks/{run.final}"))
    modules = Modules.from_tensors(_tensors(run, "modules")) if run.final == "gprune" else None
    if modules is not None and [y.shape for y in modules.labels] != [m.shape for m in masks.ffn]:
        raise UserError(f"{run.path}: expected modules whose neurons are those of the masks; run it again.")
    return replace(run, masks=masks, modules=modules)


def _tensors(run: FinishedRun, name: str) -> dict[str, Tensor]:
    tensors = read_tensors(run.path / f"{name}.safetensors", run=run.key)
    if tensors is None:
        raise UserError(f"{run.path / name}.safetensors is missing or not whole; run the same command again.")
    return tensors


def read_evaluation(path: Path, *, run: str | None = None) -> list[Record]:
    """Records of `gprune evaluate`, none where there is no file.

    Args:
        run: the key of the run whose file it is.

    Raises:
        UserError: for a file that holds something else, or belongs to another run.
    """
    content, why = inspected_json(path, run=run, check=schema.Evaluation.problem)
    if why and os.path.lexists(path):
        raise UserError(f"'{path}' holds no records of gprune evaluate ({why}); move it away, or name another file.")
    return content["records"] if content else []


def load_run(path: Path | str) -> PruningResult:
    """A finished run, from its folder alone: the dense model is not needed.

    Statistics come without Gram matrices, which stay in the cache. `model` is the exported one, what other programs
    load, in `--export.dtype`: numbers were measured with weights in `--model.dtype`, which `--export.dtype` of the same
    name keeps. `model` and `tokenizer` are None after `--export none` (`gprune.apply_masks(dense, result.masks)` makes
    the pruned model again, without recovery).

    Args:
        path: the folder, or `wandb:entity/project/artifact:version`, an artifact of `--logging.artifacts`.

    Raises:
        UserError: as `read_run`, and for settings, statistics, thresholds or a model that are not the run's.
    """
    if str(path).startswith("wandb:"):
        path = _downloaded(str(path).removeprefix("wandb:"))
    run = finished(path)
    cfg = config_of(run)
    run = _with_tensors(run)
    statistics = {
        corpus: CorpusStatistics.from_tensors(_tensors(run, f"statistics/{corpus_file(corpus)}"))
        for corpus in cfg.calibration
    }
    thresholds = thresholds_from_named(_tensors(run, "thresholds")) if cfg.gprune else None
    return PruningResult(
        run.path, cfg, run.masks, run.modules, thresholds, statistics, run.records, run.summary, *_exported(run)
    )


def _downloaded(name: str) -> Path:
    """The folder of an artifact, by `entity/project/artifact:version`, in the cache; a UserError without an account."""
    import wandb  # takes a second, and only artifacts need it

    try:
        artifact = wandb.Api().artifact(name)
        return Path(artifact.download(root=str(cache_dir() / "artifacts" / artifact.digest)))
    except (wandb.errors.Error, ValueError, OSError) as error:
        expected = "expected an artifact, entity/project/artifact:version, and an account (`wandb login`)"
        raise UserError(f"wandb:{name}: {expected}: {first_line(error)}") from error


def exported_model(run: Path) -> Path:
    """The folder of the model that a run exported.

    Raises:
        UserError: where it is not what the run left there.
    """
    left = RunFolder(run).manifest.get("model")
    if left is not None and left != file_hashes(run / "model"):
        raise UserError(f"{run / 'model'} is not what the run left there; run the same command again.")
    return run / "model"


def corpus_file(corpus: str) -> str:
    """A file name for a corpus, which may be a path."""
    plain = os.path.basename(os.path.normpath(corpus))
    return plain if plain == corpus else f"{plain}-{key_of(corpus=corpus)[:6]}"


def config_of(run: FinishedRun) -> RunConfig:
    """The run's configuration, from config.yaml.

    Raises:
        UserError: where it is not the one whose settings the manifest holds.
    """
    file = run.path / "config.yaml"
    try:
        settings = read_yaml(file, "expected YAML in")  # not a pipe, as `read_settings` would take it
        if not isinstance(settings, dict):
            raise UserError("it holds no settings.")
        cfg = configured(migrated(settings), where="its settings")
        if changed := differences(run.settings, cfg.settings() | {"inputs": run.settings["inputs"]}):
            raise UserError(f"{changed[0]}.")
    except UnregisteredError as error:
        modules = (RunFolder(run.path).manifest["environment"] or {}).get("imports") or ["what registers it"]
        raise UserError(f"{run.path}: {error} Register it first: import {', '.join(map(str, modules))}.") from error
    except UserError as error:
        raise UserError(f"{file} was altered: {error} Run the same command again.") from error
    return cfg


def _exported(run: FinishedRun) -> tuple[PreTrainedModel | None, PreTrainedTokenizerBase | None]:
    """The pruned model, frozen, and its tokenizer; None where the run exported none."""
    if not (run.path / "model").is_dir():
        return None, None
    place, no_code = exported_model(run.path), {"trust_remote_code": False}  # for None, transformers would ask
    try:
        return load_weights(place, dtype="auto", **no_code), AutoTokenizer.from_pretrained(place, **no_code)
    except Exception as error:  # safetensors, tokenizers and transformers each raise their own
        imports = [str(name) for name in run.environment.get("imports") or ()]
        if unknown := [name for name in imports if Path(name).stem not in sys.modules and name not in sys.modules]:
            raise UserError(
                f"{place} cannot be loaded: the run imported {', '.join(unknown)}, which may register its model's "
                f"family. Import it first: --import {unknown[0]}, or in Python import it and call gprune.register()."
            ) from error
        raise UserError(f"{place} cannot be loaded: {first_line(error)} Run the same command again.") from error
