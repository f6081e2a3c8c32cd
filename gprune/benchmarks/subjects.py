"""Models to evaluate: the pruned and the dense model of a run, a model folder, or a model by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.errors import UserError
from gprune.models.elsewhere import load_elsewhere
from gprune.models.embedded import model_label
from gprune.models.loading import fingerprint, load_model
from gprune.models.surgery import prune
from gprune.runs.results import exported_model, finished, read_run
from gprune.storage.reading import expanded

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, and the entries of its records that describe the model."""

    about: dict[str, Any]  # model, stage, recovery, sparsity, scope
    load: Callable[[], Loaded]


def subjects_of(
    name: str, *, dense: bool = False, dtype: str | None = None, trust_remote_code: bool = False
) -> tuple[list[Subject], Path | None, str | None]:
    """Return the models of a name, the file for their records (`evaluation.json` in a run) and the run's key.

    The arguments are those of `measurement.evaluate`. `trust_remote_code` in a run's manifest is ignored, because it is
    not the consent of the person who evaluates.

    Raises:
        UserError: if a run is not finished or has no model, or a folder is neither a run nor a model.
    """
    path = expanded(name)
    if not (path / "manifest.json").is_file():
        if dense:
            raise UserError(f"--dense needs the folder of a run, which names the dense model; got '{name}'.")
        if path.is_dir() and not (path / "config.json").is_file():
            raise UserError(f"'{name}' must be a run (manifest.json) or a model folder (config.json); got neither.")
        about = {"model": model_label(name), "stage": "model", "recovery": None, "sparsity": None, "scope": None}
        settings = {"dtype": getattr(torch, dtype or "float32"), "trust_remote_code": trust_remote_code}
        return [Subject(about, lambda: load_model(name, **settings))], None, None
    run = finished(path)
    settings, label = run.settings, model_label(run.settings["model"]["name"])
    if settings["recovery"] != "none" and not (path / "model" / "config.json").is_file():
        reason = "the recovered model was not exported (--export none)"
        raise UserError(f"Cannot evaluate run '{path}': {reason}. Repeat the run with --export hf.")
    loading = (path, settings, getattr(torch, dtype or settings["model"]["dtype"]), trust_remote_code)
    after = {"model": label, "stage": run.final, "recovery": settings["recovery"]}
    ours = run.final != "model"  # with --model.made_elsewhere the sparsity is unknown
    after |= {"sparsity": run.records[-1]["sparsity"] if ours else None}
    after |= {"scope": settings["sparsity"]["scope"] if ours else None}
    subjects = [Subject(after, lambda: _load_pruned(*loading))]
    if dense:
        before = {"model": label, "stage": "dense", "recovery": "none", "sparsity": 0.0, "scope": None}
        subjects.insert(0, Subject(before, lambda: load_dense(*loading)))
    return subjects, path / "evaluation.json", run.key


def load_dense(run: Path, settings: Mapping[str, Any], dtype: torch.dtype, trust_remote_code: bool = False) -> Loaded:
    """Load the dense model of a run in any dtype, frozen, and its tokenizer; UserError if its weights have changed."""
    name = settings["model"]["name"]
    was = settings["inputs"]["model"], f"the model that '{run}' pruned"
    return _unchanged(load_model, name, settings, *was, dtype=dtype, trust_remote_code=trust_remote_code)


def _unchanged(
    load: Callable[..., Loaded], name: str, settings: Mapping[str, Any], expected: str, what: str, *,
    dtype: torch.dtype, trust_remote_code: bool,
) -> Loaded:  # fmt: skip
    """Load a model and its tokenizer; UserError unless its fingerprint in the run's dtype is the expected one."""
    model, tokenizer = load(name, dtype=getattr(torch, settings["model"]["dtype"]), trust_remote_code=trust_remote_code)
    if fingerprint(model) != expected:
        raise UserError(f"Cannot evaluate '{name}': it has other weights than {what}. Repeat the run.")
    if model.dtype != dtype:
        # Loaded again, because `.to` would also round the frequencies of the rotary embedding.
        model, _ = load(name, dtype=dtype, trust_remote_code=trust_remote_code)
    return model, tokenizer


def _load_pruned(run: Path, settings: Mapping[str, Any], dtype: torch.dtype, trust_remote_code: bool) -> Loaded:
    """Load the pruned model of a run: the exported folder or, without one, the dense model pruned by the masks.

    Without recovery both are the same. With `--model.made_elsewhere` that model is loaded.
    """
    if (run / "model" / "config.json").is_file():
        return load_model(str(exported_model(run)), dtype=dtype)
    if (other := settings["model"].get("made_elsewhere")) is not None:
        was = settings["inputs"]["made_elsewhere"], f"the model made elsewhere that '{run}' measured"
        return _unchanged(load_elsewhere, other, settings, *was, dtype=dtype, trust_remote_code=trust_remote_code)
    masks = read_run(run).masks
    model, tokenizer = load_dense(run, settings, dtype, trust_remote_code)
    return prune(model, masks), tokenizer
