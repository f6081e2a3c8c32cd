"""What benchmarks measure: the models of a run, or any model, and the file in which their records are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.benchmarks.settings import Benchmarks
from gprune.discovery import family_of
from gprune.errors import UserError, optional_output
from gprune.models.embedded import model_label
from gprune.models.loading import fingerprint, load_model
from gprune.models.surgery import slice_model
from gprune.report.card import write_card
from gprune.runs.folder import RunFolder
from gprune.runs.numbers import keyed, task_frame
from gprune.runs.results import config_of, read_evaluation, read_numbers, read_run
from gprune.storage.files import key_of, write_json
from gprune.storage.paths import expanded

NOTHING: Mapping[str, Any] = MappingProxyType({})
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, and the entries of its records that describe the model."""

    about: dict[str, Any]  # model, stage, recovery, sparsity, scope
    load: Callable[[], Loaded]
    weights: str | None = None  # fingerprint of a dense model, which several runs may share


@dataclass(frozen=True)
class Evaluation:
    """A run, or any model: what is evaluated, and the file for its records."""

    folder: Path
    subjects: list[Subject]  # the dense model first, if it is evaluated too
    output: Path | None
    run_key: str | None  # None: not a run

    @property
    def origin(self) -> dict[str, str]:
        """The entries of records that name the run or model."""
        return {"run": self.folder.name, "origin": key_of(of=self.run_key or str(self.folder))[:12]}

    def store(self, records: Sequence[dict[str, Any]]) -> None:
        """Add records to the file, if there is one."""
        if self.output is not None:
            merge_records(self.output, records)

    def publish(self, records: Sequence[dict[str, Any]]) -> None:
        """Add stored records to the model card and to W&B, if this is a run."""
        if self.run_key is None:
            return
        with optional_output("numbers to the model card or to W&B", "evaluation.json has them"):
            log_evaluation(self.folder, records)
            run = read_numbers(self.folder)
            write_card(RunFolder(self.folder), config_of(run), run)


def find_evaluation(
    model: str, benchmarks: Benchmarks, *, dense: bool = False, output: Path | None = None,
    loading: Mapping[str, Any] = NOTHING,
) -> Evaluation:  # fmt: skip
    """Find what is evaluated without loading it. Raise UserError for an output file with other content."""
    subjects, run_output, run_key = find_subjects(
        model, dense=dense, dtype=benchmarks.dtype, trust_remote_code=benchmarks.trust_remote_code, loading=loading
    )
    evaluation = Evaluation(expanded(model).resolve(), subjects, output or run_output, run_key)
    if evaluation.output is not None:
        read_evaluation(evaluation.output)
    return evaluation


def find_subjects(
    name: str, *, dense: bool = False, dtype: str | None = None, trust_remote_code: bool = False,
    loading: Mapping[str, Any] = NOTHING,
) -> tuple[list[Subject], Path | None, str | None]:  # fmt: skip
    """Find the models to evaluate, without loading them. Return them with the file for records and the key of the run.

    File and key are None if `name` is not a run. `loading` has the arguments that offload weights.
    """
    path = expanded(name)
    if not (path / "manifest.json").is_file():
        if dense:
            raise UserError(f"--dense needs the folder of a run, which names the dense model; got '{name}'.")
        parent, *rest = Path(name).parts
        if rest and not path.exists() and Path(parent).is_dir():  # otherwise it may be a hub id
            raise UserError(f"'{name}' must be the folder of a run or a model; there is no such folder.")
        if path.is_dir() and not (path / "config.json").is_file():
            raise UserError(f"'{name}' must be a run (manifest.json) or a model folder (config.json); got neither.")
        about = {"model": model_label(name), "stage": "measured", "recovery": None, "sparsity": None, "scope": None}
        settings = {"dtype": dtype or "float32", "trust_remote_code": trust_remote_code, **loading}
        return [Subject(about, lambda: load_model(name, **settings))], None, None
    run = read_numbers(path)
    settings, label = run.settings, model_label(run.settings["model"]["name"])
    if settings["recovery"] != "none" and not (path / "model" / "config.json").is_file():
        reason = "the recovered model was not exported (--export none)"
        raise UserError(f"Cannot evaluate run '{path}': {reason}. Repeat the run with --export hf.")
    own_dtype = getattr(torch, dtype or settings["model"]["dtype"])
    load_arguments = (path, settings, own_dtype, trust_remote_code, loading)
    about_pruned = {
        "model": label,
        "stage": run.final,
        "recovery": settings["recovery"],
        "sparsity": run.records[-1]["sparsity"],
        "scope": settings["sparsity"]["scope"],
    }
    subjects = [Subject(about_pruned, lambda: _load_pruned(*load_arguments))]
    if dense:
        about_dense = {"model": label, "stage": "dense", "recovery": "none", "sparsity": 0.0, "scope": None}
        of_dense = Subject(about_dense, lambda: load_dense_of_run(*load_arguments), settings["inputs"]["model"])
        subjects.insert(0, of_dense)
    return subjects, path / "evaluation.json", run.key


def load_dense_of_run(
    run: Path, settings: Mapping[str, Any], dtype: torch.dtype, trust_remote_code: bool = False,
    loading: Mapping[str, Any] = NOTHING,
) -> Loaded:  # fmt: skip
    """Load the frozen dense model of a run in any dtype, and its tokenizer."""
    name, options = settings["model"]["name"], {"trust_remote_code": trust_remote_code, **loading}
    model, tokenizer = load_model(name, dtype=settings["model"]["dtype"], **options)
    if fingerprint(model) != settings["inputs"]["model"]:
        raise UserError(
            f"Cannot evaluate '{name}': it has other weights than the model that '{run}' pruned. Repeat the run."
        )
    if model.dtype != dtype:
        # Loaded again, because `.to` would also round the frequencies of the rotary embedding.
        model, _ = load_model(name, dtype=dtype, **options)
    family_of(model)
    return model, tokenizer


def _load_pruned(
    run: Path, settings: Mapping[str, Any], dtype: torch.dtype, trust_remote_code: bool, loading: Mapping[str, Any]
) -> Loaded:
    """Load the exported model of a run, and its tokenizer.

    If the run did not export a model, the dense model is pruned by the run's masks, which gives the same model because
    `find_subjects` accepts such a run only without recovery.
    """
    if (run / "model" / "config.json").is_file():
        return load_model(str(run / "model"), dtype=dtype, **loading)
    masks = read_run(run).masks
    model, tokenizer = load_dense_of_run(run, settings, dtype, trust_remote_code, loading)
    return slice_model(model, masks), tokenizer


def merge_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add records to a file, replacing earlier records of the same model, run and protocol."""
    names = ["model", "stage", "recovery", "task", "content_hash", "dtype", "run", "origin"]

    def identity(r: dict[str, Any]) -> tuple[Any, ...]:
        """Return a key that is equal for records of the same model and protocol."""
        return tuple(r.get(name) for name in names)

    new_identities = {identity(r) for r in records}
    kept = [r for r in read_evaluation(path) if identity(r) not in new_identities]
    write_json(path, {"records": [*kept, *records]})


def log_evaluation(run: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add the numbers of records to the summary of the run's W&B run, if it has one."""
    wandb_entry = RunFolder(run).manifest.get("wandb")
    if not wandb_entry:
        return
    from gprune.runs.tracking import resumed_run

    with resumed_run(run, wandb_entry) as wandb_run:
        if wandb_run is not None:
            wandb_run.summary.update(keyed(task_frame(records)))
