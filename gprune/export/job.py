"""A pruned model in the format another program reads.

python -m gprune.export.job runs/NAME --to gguf --type q8_0
python -m gprune.export.job runs/NAME/model --to hf --output /elsewhere/model

or from Python, where the path of what was written comes back:

from gprune.export.job import export
export("runs/NAME", to="gguf", type="q8_0")

A format is one class in `EXPORTS`: its fields are its options, its docstring is its line in `--help`. Whatever it
writes lies under a temporary name until it has been checked; then it is renamed. Only light modules are imported
here: a wrong argument should not have to wait for PyTorch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gprune.errors import UserError, first_line
from gprune.models.families import family_of
from gprune.registry import Registry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TYPES = ("f32", "f16", "q8_0")
# Ready-built llama.cpp on the package index, best first: the module that is imported, and what pip calls it.
LLAMA_CPP = {"llama_cpp_py_sync": "llama-cpp-py-sync", "xllamacpp": "xllamacpp"}


@dataclass(frozen=True)
class Source:
    """The model folder that is exported; `run` is the run it belongs to, if that is what was named."""

    folder: Path
    run: Path | None

    @property
    def name(self) -> str:
        return (self.run or self.folder).name

    def beside(self, suffix: str) -> Path:
        """A sibling of the model folder."""
        return self.folder.with_name(f"{self.folder.name}{suffix}")


class Format(Protocol):
    """What `EXPORTS` holds: a dataclass of options. It refuses options it cannot serve when it is made."""

    def default(self, source: Source) -> Path:
        """Where the result goes unless the caller says where."""

    def replaceable(self, path: Path) -> bool:
        """Whether what is there is a former export, which may be overwritten."""

    def write(self, source: Source, output: Path) -> None:
        """Write and check. `output` does not exist; it is removed again if this raises."""


EXPORTS: Registry[type[Format]] = Registry("export format")


@EXPORTS.register("hf")
@dataclass(frozen=True)
class HuggingFace:
    """A Hugging Face folder that loads in one line; checked in a fresh process, bit for bit."""

    def default(self, source: Source) -> Path:
        return source.run / "hf" if source.run else source.beside("-hf")

    def replaceable(self, path: Path) -> bool:
        return (path / "config.json").is_file()

    def write(self, source: Source, output: Path) -> None:
        from gprune.export.gguf import CHECK_TEXT
        from gprune.export.hf import check_reload, save_pruned

        model, tokenizer = load_folder(source.folder)
        card = source.folder / "README.md"
        save_pruned(model, tokenizer, output, model_card=card.read_text(encoding="utf-8") if card.is_file() else None)
        check_reload(model, output, tokenizer(CHECK_TEXT, return_tensors="pt").input_ids[:, :256])


@EXPORTS.register("gguf")
@dataclass(frozen=True)
class Gguf:
    """One file for llama.cpp; checked in a llama.cpp build, if one is installed (else --unchecked).

    Attributes:
        type: of the matrices: f32, f16 or q8_0. Vectors stay f32.
        unchecked: write the file although nothing here can run it.
    """

    type: str = "f16"
    unchecked: bool = False

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise UserError(f"Unknown GGUF type '{self.type}'. Available: {', '.join(TYPES)}.")
        if not self.unchecked and llama_cpp() is None:
            names = " or ".join(f"`pip install {name}`" for name in LLAMA_CPP.values())
            raise UserError(
                f"Export: no llama.cpp build is installed to check a GGUF file with: {names}, "
                f"or pass --unchecked to write it unchecked. Nothing was written."
            )

    def default(self, source: Source) -> Path:
        return source.beside(f"-{self.type}.gguf")

    def replaceable(self, path: Path) -> bool:
        return path.is_file()

    def write(self, source: Source, output: Path) -> None:
        from gprune.export.gguf import check_gguf, write_gguf

        model, tokenizer = load_folder(source.folder, upcast=True)
        write_gguf(model, tokenizer, output, type=self.type, name=source.name)
        if not self.unchecked:
            check_gguf(model, tokenizer, output, type=self.type, build=llama_cpp())


def llama_cpp() -> str | None:
    """The module of the llama.cpp build that is installed, if there is one."""
    return next((module for module in LLAMA_CPP if importlib.util.find_spec(module)), None)


def export(
    run_or_folder: str | Path,
    to: str = "gguf",
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Write a pruned model in another format, checked, all or nothing.

    Args:
        run_or_folder: a finished run, or a model folder (of gprune's, or of a stock Llama).
        to: a name in `EXPORTS`.
        output: file or folder to write; by default beside the model.
        overwrite: replace a former export; it stays until the new one has been checked.
        options: fields of the format's class, such as `type="q8_0"`.

    Returns:
        The absolute path of what was written.

    Raises:
        UserError: before anything heavy is done, for a format, option, model or output that cannot be; later, for
            a model that the format cannot hold, a disk that cannot be written, or a check that failed.
    """
    return Job.of(run_or_folder, to, output, overwrite=overwrite, **options).run()


@dataclass(frozen=True)
class Job:
    """An export whose arguments have been checked."""

    source: Source
    format: Format
    output: Path

    @classmethod
    def of(
        cls, run_or_folder: str | Path, to: str, output: str | Path | None, *, overwrite: bool, **options: Any
    ) -> Job:
        """The job for these arguments, as `export` takes them; a UserError for any that cannot be."""
        made = EXPORTS[to]
        for name in options:
            if name not in {field.name for field in fields(made)}:
                raise UserError(f"Export: format '{to}' has no option --{name}.")
        source = find(run_or_folder)
        family_of(str(_json(source.folder / "config.json").get("model_type")))  # refuses one without a record
        chosen = made(**options)
        path = (chosen.default(source) if output is None else Path(output)).expanduser().absolute()
        if path.exists() and not overwrite:
            raise UserError(f"Export: '{path}' exists already; choose another --output, or pass --overwrite.")
        if path.exists() and not chosen.replaceable(path):
            raise UserError(f"Export: '{path}' is no former export of format '{to}', so it is not overwritten.")
        if path == source.folder.absolute() or not path.parent.is_dir():
            raise UserError(
                f"Export: expected --output in a folder that exists, and not the model itself; got '{path}'."
            )
        return cls(source, chosen, path)

    def run(self) -> Path:
        """Write under a temporary name, check, rename."""
        try:
            with swapping(self.output, mark=f"{os.getpid()}.unchecked") as new:
                self.format.write(self.source, new)
        except OSError as error:
            raise UserError(f"Export: cannot write '{self.output}': {error.strerror or error}.") from error
        return self.output


@contextmanager
def swapping(path: Path, *, mark: str) -> Iterator[Path]:
    """Yield a hidden sibling to write, a file or a folder; it takes the place of `path` when the context ends well.

    What stood there before stays until then, and comes back if the exchange itself fails. `mark` is part of the
    sibling's name, and keeps those who write at once apart.
    """
    new, old = (path.with_name(f".{path.name}.{mark}{suffix}") for suffix in ("", ".old"))
    try:
        yield new
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for left in (new, old):
            _remove(left)


def find(run_or_folder: str | Path) -> Source:
    """The model folder that is meant.

    Raises:
        UserError: for a place that holds none, or a run that is not finished or kept no model.
    """
    path = Path(run_or_folder).expanduser()
    if (path / "config.json").is_file():
        return Source(path.resolve(), None)
    if not path.exists():
        raise UserError(f"Export: expected a run folder or a model folder, but there is no '{path}'.")
    if not (path / "manifest.json").is_file():
        raise UserError(f"Export: '{path}' is neither a run (manifest.json) nor a model folder (config.json).")
    if "summary" not in _json(path / "metrics.json"):
        raise UserError(f"Export: the run '{path}' is not finished; run the same command again, then export.")
    if not (path / "model" / "config.json").is_file():
        raise UserError(f"Export: the run '{path}' kept no model (--export none); repeat it with --export hf.")
    return Source(path.resolve() / "model", path.resolve())


def load_folder(folder: Path, *, upcast: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, in the dtype of the weights or in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gprune.models.loading import register

    register()
    dtype: torch.dtype | str = torch.float32 if upcast else "auto"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except Exception as error:  # safetensors, tokenizers and transformers each raise their own
        raise UserError(f"Export: '{folder}' cannot be loaded: {first_line(error)}") from error
    return model.eval().requires_grad_(False), tokenizer


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
