"""The model folder that is meant by a run or a path, and the model in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gprune.errors import UserError
from gprune.storage.reading import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def model_folder(run_or_folder: str | Path) -> Path:
    """The model folder of a finished run, or the model folder itself.

    Raises:
        UserError: for a run that is not finished, that kept no model or whose model is not what it left there, and for
            any other place.
    """
    path = expanded(run_or_folder)
    is_model, is_run = ((path / name).is_file() for name in ("config.json", "manifest.json"))
    if not path.exists():
        raise UserError(f"Export: expected a run folder or a model folder, but there is no '{path}'.")
    if not (is_model or is_run):
        raise UserError(f"Export: '{path}' is neither a run (manifest.json) nor a model folder (config.json).")
    from gprune.runs.folder import exported_model
    from gprune.runs.results import finished

    folder = path.resolve()
    if is_model:
        if folder.name == "model" and (folder.parent / "manifest.json").is_file():
            exported_model(folder.parent)  # or says why it is not what the run left
        return folder
    finished(path)  # or says why it is not
    if not (path / "model" / "config.json").is_file():
        raise UserError(f"Export: the run '{path}' kept no model (--export none); repeat it with --export hf.")
    return exported_model(folder)


def load_folder(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32, and its tokenizer; code that comes with a folder is not run.

    Raises:
        UserError: for a family that is not supported, and for files that are broken or missing.
    """
    from gprune.models.loading import check_finite, load_model

    try:
        model, tokenizer = load_model(str(folder))
        check_finite(model, folder)
    except UserError as error:
        raise UserError(f"Export: '{folder}' cannot be loaded: {error}") from error
    return model, tokenizer
