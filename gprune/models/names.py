"""Check `--model.name` without PyTorch, so that a wrong name is reported at once."""

from __future__ import annotations

from gprune.errors import UserError
from gprune.storage.reading import expanded

EMBEDDED = ("smollm2-135m", "gemma-3-270m", "tiny-random")  # the keys of `embedded.EMBEDDED_MODELS`


def check_model_name(name: str) -> None:
    """Raise UserError unless a name is an embedded model, a folder or an id on the hub."""
    path = expanded(name)
    if name in EMBEDDED or path.is_dir():
        return
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        allowed = f"an embedded model ({', '.join(EMBEDDED)}), a model folder or a hub id 'owner/name'"
        raise UserError(f"--model.name must be {allowed}; got '{name}'.")
