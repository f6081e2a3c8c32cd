"""Files of a processor, which prepares images and text for a model that takes images."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, cached_file
from transformers.utils.hub import LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE

log = logging.getLogger("gprune")
CONFIG_FILES = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)  # a processor has at least one of them
PROCESSOR_FILES = (*CONFIG_FILES, LEGACY_PROCESSOR_CHAT_TEMPLATE_FILE)  # other templates are saved with the tokenizer


def has_processor(folder: Path) -> bool:
    """Return whether a model folder has the files of a processor."""
    return any((folder / name).is_file() for name in CONFIG_FILES)


def copy_processor(location: str, model: PreTrainedModel, folder: Path) -> None:
    """Copy the files of the dense model's processor without changes, if the model takes images.

    The processor is not loaded, because some processors need packages that pruning does not need. Files on the hub are
    read from its cache, or downloaded. If none is found there, a warning is logged.
    """
    if not location or "image" not in model.input_modalities:
        return
    for name in PROCESSOR_FILES:
        try:
            file = cached_file(location, name)
        except OSError:  # the file does not exist, or the hub cannot be reached
            continue
        shutil.copyfile(file, folder / name)
    if not has_processor(folder) and not Path(location).is_dir():
        log.warning(
            "The processor of '%s' is not saved with the model, because none of its files was found: %s. AutoProcessor "
            "needs one of them. Copy it into the model's folder.",
            location,
            ", ".join(CONFIG_FILES),
        )
