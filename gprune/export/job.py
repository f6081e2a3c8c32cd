"""A pruned model in the format another program reads, checked, all or nothing.

from gprune.export import export
export("runs/NAME", type="q8_0")      # the path of what was written comes back

A format is one class in `EXPORTS`: its fields are its options, its docstring is its line in `--help`. Whatever it
writes lies under a temporary name until it has been checked; then it is renamed. Only light modules are imported
here: a wrong argument should not have to wait for PyTorch.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gprune.errors import UserError, first_line
from gprune.export.packages import LLAMA_CPP, ONNX, has_llama_cpp
from gprune.models.families import family_of
from gprune.registry import Registry
from gprune.storage.reading import expanded, read_text, regular_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


MARKED = 2**26  # bytes of a file among which the mark is looked for
TYPES = ("f32", "f16", "q8_0")
QUANTISED = ("q4_k_m",)  # by llama.cpp's own quantiser, from f16


@dataclass(frozen=True)
class Source:
    """The model folder that is exported; `run` is the run it belongs to, if that is what was named."""

    folder: Path
    run: Path | None

    @property
    def name(self) -> str:
        """What the exported model is called."""
        return (self.run or self.folder).name


class Format(Protocol):
    """What `EXPORTS` holds: a dataclass of options. It refuses options it cannot serve when it is made."""

    suffix: str  # unless the caller says where, the result goes beside the model, under its name with this

    def replaceable(self, path: Path) -> bool:
        """Whether what is there is a former export, which may be overwritten."""

    def write(self, source: Source, output: Path) -> None:
        """Write and check. `output` does not exist; it is removed again if this raises."""


EXPORTS: Registry[type[Format]] = Registry("export format")


@EXPORTS.register("gguf")
@dataclass(frozen=True)
class Gguf:
    """One file for llama.cpp; checked in a llama.cpp build, if one is installed (else --unchecked).

    Attributes:
        type: of the matrices: f32, f16, q8_0, or q4_k_m, which llama.cpp itself quantises. Vectors stay f32.
        unchecked: write the file although nothing here can run it.
    """

    type: str = "f16"
    unchecked: bool = False

    def __post_init__(self) -> None:
        if self.type not in (*TYPES, *QUANTISED):
            raise UserError(f"Unknown GGUF type '{self.type}'. Available: {', '.join((*TYPES, *QUANTISED))}.")
        if self.type in QUANTISED and not has_llama_cpp():
            raise UserError(
                f"Export: {self.type} is quantised by llama.cpp, and no build is installed: `pip install {LLAMA_CPP}`. "
                f"Nothing was written."
            )
        if not self.unchecked and not has_llama_cpp():
            raise UserError(
                f"Export: no llama.cpp build is installed to check a GGUF file with: `pip install {LLAMA_CPP}`, "
                f"or pass --unchecked to write it unchecked. Nothing was written."
            )

    @property
    def suffix(self) -> str:
        return f"-{self.type}.gguf"

    def replaceable(self, path: Path) -> bool:
        return path.is_file() and marked(path, b"GGUF")

    def write(self, source: Source, output: Path) -> None:
        """Write the file, and unless told otherwise compare what it holds with the model that it came from."""
        from gprune.export.gguf import write_gguf
        from gprune.export.gguf_check import check_gguf, quantise

        model, tokenizer = load_folder(source.folder)
        if self.type in QUANTISED:
            with tempfile.TemporaryDirectory(dir=output.parent, prefix=".quantise-") as scratch:
                write_gguf(model, tokenizer, whole := Path(scratch) / "f16.gguf", type="f16", name=source.name)
                quantise(whole, output, type=self.type)
        else:
            write_gguf(model, tokenizer, output, type=self.type, name=source.name)
        if not self.unchecked:
            check_gguf(model, tokenizer, output, type=self.type)


@EXPORTS.register("onnx")
@dataclass(frozen=True)
class Onnx:
    """A folder with a graph that scores text in onnxruntime; checked there, on another batch than was traced."""

    suffix = "-onnx"

    def __post_init__(self) -> None:
        if missing := [name for name in ONNX if not importlib.util.find_spec(name)]:
            raise UserError(
                f"Export: ONNX needs {', '.join(ONNX)}, but {', '.join(missing)} is missing: `pip install "
                f"{' '.join(ONNX)}`. Nothing was written."
            )

    def replaceable(self, path: Path) -> bool:
        ours = {"model.onnx", "model.onnx.data"}
        return path.is_dir() and {p.name for p in path.iterdir()} <= ours and marked(path / "model.onnx")

    def write(self, source: Source, output: Path) -> None:
        from gprune.export.onnx import check_onnx, write_onnx

        model, _ = load_folder(source.folder)
        output.mkdir()
        write_onnx(model, output / "model.onnx")
        check_onnx(model, output / "model.onnx")


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
        family_of(model_type(source.folder))  # refuses one without a record
        chosen = made(**options)
        path = expanded(f"{source.folder}{chosen.suffix}" if output is None else output).absolute()
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
        from gprune.storage.files import replacing

        with replacing(self.output) as new:
            self.format.write(self.source, new)
        return self.output


def marked(path: Path, begins: bytes = b"") -> bool:
    """Whether a file begins so, and says that gprune wrote it: what else there is stays, whatever is asked for."""
    with suppress(OSError):
        regular_file(path)
        with path.open("rb") as file:
            content = file.read(MARKED)
        return content.startswith(begins) and b"gprune" in content
    return False


def find(run_or_folder: str | Path) -> Source:
    """The model folder that is meant."""
    path = expanded(run_or_folder)
    if (path / "config.json").is_file():
        from gprune.runs.folder import exported_model

        folder = path.resolve()
        if folder.name == "model" and (folder.parent / "manifest.json").is_file():
            exported_model(folder.parent)  # or says why it is not what the run left
        return Source(folder, None)
    if not path.exists():
        raise UserError(f"Export: expected a run folder or a model folder, but there is no '{path}'.")
    if not (path / "manifest.json").is_file():
        raise UserError(f"Export: '{path}' is neither a run (manifest.json) nor a model folder (config.json).")
    from gprune.runs.folder import exported_model
    from gprune.runs.results import finished

    finished(path)  # or says why it is not
    if not (path / "model" / "config.json").is_file():
        raise UserError(f"Export: the run '{path}' kept no model (--export none); repeat it with --export hf.")
    return Source(exported_model(path.resolve()), path.resolve())


def model_type(folder: Path) -> str:
    """What config.json says the model is; nothing where it is not readable."""
    try:
        content = json.loads(read_text(folder / "config.json", most=2**24))
    except (OSError, ValueError, RecursionError):
        return ""
    return str(content.get("model_type")) if isinstance(content, dict) else ""


def load_folder(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, in float32, and tokenizer."""
    import torch
    from transformers import AutoTokenizer

    from gprune.models.loading import check_finite, check_folder, load_weights, register

    register()
    try:
        check_folder(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = load_weights(folder, dtype=torch.float32)
        check_finite(model, folder)
        return model, tokenizer
    except Exception as error:  # safetensors, tokenizers and transformers each raise their own
        raise UserError(f"Export: '{folder}' cannot be loaded: {first_line(error)}") from error
