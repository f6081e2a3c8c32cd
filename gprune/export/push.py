"""A pruned model on the Hugging Face Hub, by huggingface_hub: what would go up, or the upload itself."""

from __future__ import annotations

import re
from pathlib import Path

from gprune.errors import UserError, quoting
from gprune.export.convert import model_folder
from gprune.storage.reading import unsafe_entries


def push(run_or_folder: str | Path, repo: str, *, dry_run: bool = True) -> str:
    """Upload the model folder of a run in one commit, or only say what would go up; returns a file a line.

    A repository that is not there yet is made, and private. Raises UserError for a name that cannot be, a folder with
    links in it, and what the hub refuses.
    """
    from huggingface_hub import HfApi

    folder = model_folder(run_or_folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"--push: expected owner/name, got '{repo}'.")
    for what, path in unsafe_entries(folder):
        raise UserError(f"--push: {path} is {what}; expected a plain file, lest a private one be published.")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    listed = "".join(f"{path.stat().st_size:>14,}  {name}\n" for name, path in files.items())
    if dry_run:
        return f"Would go up to {repo}, bytes and names:\n{listed}Nothing went up; --no-dry-run uploads it.\n"
    with quoting(f"--push {repo}: the hub refused or was not reached (", ")."):
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        said = "Upload a pruned model"
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=list(files), commit_message=said)
    return f"Went up to {repo}, bytes and names:\n{listed}"
