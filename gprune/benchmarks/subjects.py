"""Models to evaluate: the pruned and the dense model of a run, a model folder, or a model by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.config.elsewhere import made_elsewhere
from gprune.discovery import family_of
from gprune.errors import UserError
from gprune.models.elsewhere import load_elsewhere
from gprune.models.embedded import model_label
from gprune.models.loading import fingerprint, load_model
from gprune.models.surgery import prune
from gprune.runs.results import exported_model, read_numbers, read_run
from gprune.storage.reading import expanded

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, and the entries of its records that describe the model."""

    about: dict[str, Any]  # model, stage, recovery, sparsity, scope
    load: Callable[[], Loaded]


def find_subjects(
    name: str, *, dense: bool = False, dtype: str | None = None, trust_remote_code: bool = False
) -> tuple[list[Subject], Path | None, str | None]:
    """Find the models to evaluate, without loading them."""
    path = expanded(name)
    if not (path / "manifest.json").is_file():
        if dense:
            raise UserError(f"--dense needs the folder of a run, which names the dense model; got '{name}'.")
        if path.is_dir() and not (path / "config.json").is_file():
            raise UserError(f"'{name}' must be a run (manifest.json) or a model folder (config.json); got neither.")
        about = {"model": model_label(name), "stage": "model", "recovery": None, "sparsity": None, "scope": None}
        settings = {"dtype": getattr(torch, dtype or "float32"), "trust_remote_code": trust_remote_code}
        return [Subject(about, lambda: load_model(name, **settings))], None, None
    run = read_numbers(path)
    settings, label = run.settings, model_label(run.settings["model"]["name"])
    if settings["recovery"] != "none" and not (path / "model" / "config.json").is_file():
        reason = "the recovered model was not exported (--export none)"
        raise UserError(f"Cannot evaluate run '{path}': {reason}. Repeat the run with --export hf.")
    load_arguments = (path, settings, getattr(torch, dtype or settings["model"]["dtype"]), trust_remote_code)
    pruned_by_gprune = run.final != "model"  # otherwise made elsewhere, so the sparsity is unknown
    about_pruned = {
        "model": label,
        "stage": run.final,
        "recovery": settings["recovery"],
        "sparsity": run.records[-1]["sparsity"] if pruned_by_gprune else None,
        "scope": settings["sparsity"]["scope"] if pruned_by_gprune else None,
    }
    subjects = [Subject(about_pruned, lambda: _load_pruned(*load_arguments))]
    if dense:
        about_dense = {"model": label, "stage": "dense", "recovery": "none", "sparsity": 0.0, "scope": None}
        subjects.insert(0, Subject(about_dense, lambda: load_dense(*load_arguments)))
    return subjects, path / "evaluation.json", run.key


def load_dense(run: Path, settings: Mapping[str, Any], dtype: torch.dtype, trust_remote_code: bool = False) -> Loaded:
    """Load the frozen dense model of a run in any dtype, and its tokenizer."""
    model, tokenizer = _load_verified(
        load_model, settings["model"]["name"], settings, settings["inputs"]["model"], f"the model that '{run}' pruned",
        dtype=dtype, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    family_of(model)
    return model, tokenizer


def _load_verified(
    load: Callable[..., Loaded], name: str, settings: Mapping[str, Any], expected: str, what: str, *,
    dtype: torch.dtype, trust_remote_code: bool,
) -> Loaded:  # fmt: skip
    """Load a model and its tokenizer, and check that the weights are those that a run has used."""
    model, tokenizer = load(name, dtype=getattr(torch, settings["model"]["dtype"]), trust_remote_code=trust_remote_code)
    if fingerprint(model) != expected:
        raise UserError(f"Cannot evaluate '{name}': it has other weights than {what}. Repeat the run.")
    if model.dtype != dtype:
        # Loaded again, because `.to` would also round the frequencies of the rotary embedding.
        model, _ = load(name, dtype=dtype, trust_remote_code=trust_remote_code)
    return model, tokenizer


def _load_pruned(run: Path, settings: Mapping[str, Any], dtype: torch.dtype, trust_remote_code: bool) -> Loaded:
    """Load the exported model of a run, and its tokenizer.

    If the run did not export a model, the dense model is pruned by the run's masks, which gives the same model because
    `find_subjects` accepts such a run only without recovery. A model that gprune did not prune is loaded again.
    """
    if (run / "model" / "config.json").is_file():
        return load_model(str(exported_model(run)), dtype=dtype)
    if (other := made_elsewhere(settings)) is not None:
        return _load_verified(
            load_elsewhere, other, settings, settings["inputs"]["made_elsewhere"],
            f"the model made elsewhere that '{run}' measured", dtype=dtype, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    masks = read_run(run).masks
    model, tokenizer = load_dense(run, settings, dtype, trust_remote_code)
    return prune(model, masks), tokenizer
