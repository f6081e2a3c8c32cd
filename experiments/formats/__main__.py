"""What we export, and who can read it: one Markdown table, format by consumer.

    OMP_NUM_THREADS=1 python -m experiments.formats --work runs/formats --fetch   # half an hour on one core, 8 GB
    python -m experiments.formats --small --work /tmp/formats                     # tiny model, what is installed

Three models are made of the embedded SmolLM2-135M, 30 % of the FFN gone, widths of 32: `ffn` with unequal widths,
`ffn+kv` with KV groups gone too, `uniform` with one width. Every consumer reads them in a process of its own and
computes the same few hundred tokens, in float32; what comes back is compared with the pruned model in memory. It is a
check of formats: the text is the one the masks were made from, so perplexity says nothing about pruning.

`--fetch` gets consumers from the package index into the work folder: older transformers, llama.cpp and
onnxruntime to be laid over this environment (`pip install --no-deps --target`), vLLM in an environment of its own.
Models and one record per row stay in the work folder too. A row that came out well is not computed again, so the
command can be stopped and repeated; `--again` starts all rows anew.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

from gprune.export.job import TYPES
from gprune.export.packages import LLAMA_CPP, ONNX, has_llama_cpp

from .models import MODELS, SPARSITY, WIDTH_MULTIPLE, make
from .packages import OLDER, fetch
from .readers import ROOT, FailedError, child, with_llama_cpp, with_reader, with_vllm

CONVERTED = ("ffn+kv", "uniform")  # to GGUF and ONNX: `ffn` asks nothing of them that `ffn+kv` does not


@dataclass(frozen=True)
class Row:
    """One line of the table. Figures are missing where nothing was computed."""

    format: str
    model: str
    consumer: str
    load: str
    result: str = "not installed"
    bytes: int | None = None
    difference: float | None = None
    of: str = "logits"  # or log-probabilities
    kl: float | None = None  # mean KL(model in memory || consumer), nats
    top1: float | None = None
    perplexity: float | None = None
    expected: float | None = None  # perplexity of the model in memory on the same tokens
    positions: int | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        return f"{self.format} {self.model} {self.consumer}"


@dataclass(frozen=True)
class Case:
    """Who reads what: `read(file, place)` returns figures for the row, or raises `FailedError`."""

    row: Row
    file: Path
    read: Callable[[Path, Path | None], dict]
    place: Path | None = None  # of packages that go before those installed; vLLM's python; None: installed here


def cases(work: Path, python: Path) -> Iterator[Case]:
    """All rows of the table; `python` is that of an environment with vLLM."""
    installed = importlib.metadata.version("transformers")
    versions = {version: work / "packages" / f"transformers-{version}" for version in OLDER} | {installed: None}
    for name in MODELS:
        folder = work / name / "hf"
        stock = not any(folder.glob("*.py"))
        flag = "" if stock else ", trust_remote_code=True"
        load = f"AutoModelForCausalLM.from_pretrained(FOLDER{flag})"
        for version, overlay in versions.items():
            read = with_reader("stock" if stock else "remote code")
            yield Case(Row("hf", name, f"transformers {version}", load), folder, read, overlay)
        if not stock:
            load = "gprune.register(); AutoModelForCausalLM.from_pretrained(FOLDER)"
            for version in (OLDER[-1], installed):
                row = Row("hf", name, f"gprune, transformers {version}", load)
                yield Case(row, folder, with_reader("gprune"), versions[version])
        yield Case(Row("hf", name, "vLLM", f"LLM(FOLDER{flag})"), folder, with_vllm, python)
    overlay = None if has_llama_cpp() else work / "packages" / LLAMA_CPP
    consumer, load = named(LLAMA_CPP, overlay), "llama_model_load_from_file(FILE)"
    for name in CONVERTED:
        for type in TYPES:
            file = work / name / f"{type}.gguf"
            yield Case(Row(f"gguf {type}", name, consumer, load), file, with_llama_cpp(type), overlay)
    overlay = None if all(map(importlib.util.find_spec, ONNX)) else work / "packages/onnx"
    consumer, load = named("onnxruntime", overlay), "InferenceSession(FOLDER/model.onnx)"
    for name in CONVERTED:
        yield Case(Row("onnx", name, consumer, load), work / name / "onnx", with_reader("onnx"), overlay)


def named(package: str, overlay: Path | None) -> str:
    """The package with its version, if it is there."""
    path = sys.path if overlay is None else [str(overlay)]
    found = next(iter(importlib.metadata.distributions(name=package, path=path)), None)
    return package if found is None else f"{package} {found.version}"


def write(case: Case) -> None:
    """Write the file of a case, if nobody has yet; folders are there already."""
    from gprune.export import export

    folder, (format, *type) = case.file.with_name("hf"), case.row.format.split()
    if case.file.exists():
        return
    if format == "gguf":
        export(folder, "gguf", case.file, type=type[0], unchecked=True)  # what checks it here is the row itself
    else:
        command = [sys.executable, "-m", "gprune", "export", str(folder), "--to", "onnx", "--output", str(case.file)]
        child(command, case.place, str(ROOT), own_code=True)


def row_of(case: Case) -> Row:
    """Write, read, compare; what goes wrong becomes the result."""
    row, started = case.row, time.monotonic()
    if case.place is None or case.place.exists():
        try:
            write(case)
            row = replace(row, **case.read(case.file, case.place))
        except FailedError as error:
            row = replace(row, result=f"FAILS: {str(error)[:160]}")
    size = size_of(case.file) if case.file.exists() else None
    return replace(row, bytes=size, seconds=round(time.monotonic() - started, 1))


def size_of(path: Path) -> int:
    """Bytes of a file, or of a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def table(rows: Sequence[Row], *, small: bool) -> str:
    """Markdown: the protocol, then a line per row, or per run of rows that only the consumer's version tells apart."""
    header = ["format", "model", "consumer", "max diff.", "KL, nats", "top-1", "perplexity", "expected", "tokens", "MB",
              "load", "result"]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|---|---|---|" + "---:|" * 7 + "---|---|"]
    for row, same in groupby(rows, key=lambda r: replace(r, consumer=program(r)[0], seconds=None)):
        of = {"logits": "logit", "log-probabilities": "log-prob."}[row.of]
        cells = [
            row.format, row.model, f"{row.consumer} {', '.join(program(r)[1] for r in same)}".strip(),
            "" if row.difference is None else f"{row.difference:.1e} {of}",
            number(row.kl, ".1e"), number(row.top1, ".4f"), number(row.perplexity, ".4f"), number(row.expected, ".4f"),
            number(row.positions, "d"), number(row.bytes and row.bytes / 1e6, ".1f"), f"`{row.load}`",
            row.result.replace("|", "\\|"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    of = "A tiny random model" if small else "SmolLM2-135M"
    return (
        f"{of}, {SPARSITY:.0%} of the FFN gone, widths of {WIDTH_MULTIPLE}; float32, the text that the masks were made "
        f"from; `expected` is the perplexity of the pruned model in memory.\n\n" + "\n".join(lines)
    )


def program(row: Row) -> tuple[str, str]:
    """Name and version of a consumer; the version may be empty."""
    name, _, last = row.consumer.rpartition(" ")
    return (name, last) if name and last[0].isdigit() else (row.consumer, "")


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit code is 1 where a consumer that is there fails or is off, else 0."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.formats", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--work", type=Path, help="folder of models, packages, records (default: runs/formats, or runs/formats-small)"
    )
    parser.add_argument("--only", default="", help="rows whose name (format, model, consumer) contains this")
    parser.add_argument("--fetch", action="store_true", help="get consumers from the package index")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="of an environment that has vLLM")
    parser.add_argument("--again", action="store_true", help="compute rows anew that came out well")
    parser.add_argument("--small", action="store_true", help="a tiny model; use a work folder of its own")
    args = parser.parse_args(arguments)
    work = (args.work or Path("runs/formats-small" if args.small else "runs/formats")).absolute()
    (work / "records").mkdir(parents=True, exist_ok=True)
    (work / "packages").mkdir(exist_ok=True)
    if args.fetch:
        fetch(work)
    make(work, small=args.small)
    rows = []
    for case in cases(work, args.vllm or work / "packages" / "vllm" / "bin" / "python"):
        if args.only not in case.row.name:
            continue
        key = "".join(c if c.isalnum() or c in ".+" else "-" for c in case.row.name)
        record = work / "records" / f"{key}.json"
        row = Row(**json.loads(record.read_text(encoding="utf-8"))) if record.exists() else None
        if row is None or row.result != "ok" or args.again:
            row = row_of(case)
            record.write_text(json.dumps(asdict(row), indent=1) + "\n", encoding="utf-8")
            print(f"{key}: {row.result}, {row.seconds} s", file=sys.stderr, flush=True)
        rows.append(row)
    print(table(rows, small=args.small))
    return int(any(row.result not in ("ok", "not installed") for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
