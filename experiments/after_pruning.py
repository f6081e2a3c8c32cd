"""What a pruned model is worth once it is quantised and fine-tuned, beside the dense model quantised to as few bytes.

    pip install peft torchao llama-cpp-py-sync
    python -m experiments.after_pruning runs/NAME            # a finished run that kept its model

Perplexity is measured on the run's own windows of text that it has not read, in transformers or, for GGUF files, in
llama.cpp. One of these corpora, `--own`, is then what somebody fine-tunes on: LoRA on its train text, merged, saved,
reloaded and quantised. Prints one table, in Markdown.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel

from gprune.corpora.load import load_corpus
from gprune.corpora.windows import Sample, Windows, leading_token, make_windows
from gprune.errors import UserError
from gprune.evaluation.perplexity import perplexity
from gprune.export import export
from gprune.models.loading import load_weights, locate_model
from gprune.runs.results import PruningResult, load_run

PACKAGES = ("peft", "torchao")  # beside llama.cpp, which the export asks for
GGUF_TYPES = ("f16", "q8_0", "q4_k_m")


@dataclass(frozen=True)
class Text:
    """Windows that no row has read, and somebody's own: to learn from, and to measure on."""

    unseen: list[Windows]
    own: Windows
    own_train: Windows

    @classmethod
    def of(cls, run: PruningResult, own: str, windows: int) -> Text:
        c, e = run.config.corpora, run.config.evaluation
        unseen = list(dict.fromkeys(r["corpus"] for r in run.records if not r["seen"]))
        if own not in unseen or len(unseen) == 1:
            raise UserError(
                f"--own: expected one of several corpora that the run has not read ({unseen}), got '{own}'."
            )
        bos = leading_token(run.tokenizer, c.bos)

        def windows_of(corpus: str, split: str, count: int) -> Windows:
            sample = Sample(count, e.seq_len, bos=bos)
            return make_windows(load_corpus(corpus, split), run.tokenizer, sample, corpus=corpus, split=split)

        test = {name: windows_of(name, e.split, e.num_samples) for name in unseen}
        train = windows_of(own, "train", windows)
        return cls([w for name, w in test.items() if name != own], test[own], train)


@dataclass(frozen=True)
class Row:
    """A model as it lies on the disk."""

    name: str
    mib: float
    unseen: float
    own: float

    @classmethod
    def measured(cls, name: str, path: Path, text: Text, measure: Callable[[Windows], float]) -> Row:
        """Of a file, or of the weights in a folder."""
        files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.pt")]
        unseen = math.exp(sum(math.log(measure(w)) for w in text.unseen) / len(text.unseen))
        return cls(name, sum(file.stat().st_size for file in files) / 2**20, unseen, measure(text.own))


def in_transformers(model: PreTrainedModel) -> Callable[[Windows], float]:
    return lambda windows: perplexity(model.eval(), windows).perplexity


def in_llama_cpp(path: Path, windows: Windows) -> list[float]:
    """Nats of each window, alone in the context, from its second token on, as `gprune.evaluation.perplexity` does."""
    from gprune.export.llamacpp import load_llama, logprobs_of  # which gprune itself runs in a process of its own

    ids = windows.tokens.numpy()
    model = load_llama({"model": str(path), "threads": torch.get_num_threads()}, ids.shape[1])
    steps = range(ids.shape[1] - 1)
    return [-float(logprobs_of(model, own.tolist())[steps, own[1:]].sum()) for own in ids]


def quantised_rows(name: str, folder: Path, text: Text, scratch: Path) -> list[Row]:
    """A folder as GGUF files, measured in llama.cpp."""
    rows = []
    for kind in GGUF_TYPES:
        path = export(folder, type=kind, output=scratch / f"{name.replace(' ', '-').replace(',', '')}-{kind}.gguf")
        measure = lambda w, path=path: math.exp(np.mean(in_llama_cpp(path, w)) / (w.tokens.shape[1] - 1))  # noqa: E731
        rows.append(Row.measured(f"{name}, GGUF {kind}", path, text, measure))
    return rows


def in_int8(folder: Path, text: Text, scratch: Path) -> Row:
    """Weights of linear layers in 8 bits by torchao, embeddings as they are."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = loaded(folder)
    quantize_(model, Int8WeightOnlyConfig())
    torch.save(model.state_dict(), scratch / "int8.pt")
    return Row.measured("pruned, torchao int8", scratch / "int8.pt", text, in_transformers(model))


def loaded(folder: Path) -> PreTrainedModel:
    """A model of ours or a stock one; code that comes with a folder is not run."""
    return load_weights(folder, dtype=torch.float32)


def fine_tuned(folder: Path, text: Text, into: Path) -> PreTrainedModel:
    """LoRA on one's own text, two passes over it, merged into the weights, saved, and loaded again."""
    import peft

    model = peft.get_peft_model(loaded(folder), peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3)
    batches = 2 * text.own_train.tokens.split(2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    for ids in batches:
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(into)
    AutoTokenizer.from_pretrained(folder).save_pretrained(into)
    again, ids = loaded(into).eval(), text.own.tokens[:1]
    with torch.no_grad():
        difference = float((again(ids).logits - merged(ids).logits).abs().max())
    sys.stderr.write(f"fine-tuned, merged and reloaded: largest difference of logits {difference:.1e}\n")
    return again


def table(rows: Sequence[Row], text: Text) -> str:
    head = f"| model | MiB | {', '.join(w.corpus for w in text.unseen)} | {text.own.corpus} |\n|---|---:|---:|---:|"
    return "\n".join([head, *(f"| {r.name} | {r.mib:.0f} | {r.unseen:.2f} | {r.own:.2f} |" for r in rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="experiments.after_pruning", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--own", default="stories", help="corpus that is fine-tuned on (default: stories)")
    parser.add_argument("--windows", type=int, default=48, help="of its train text (default: 48)")
    args = parser.parse_args(arguments)
    try:
        if args.windows < 1:
            raise UserError(f"--windows: expected 1 or more, got {args.windows}.")
        if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
            raise UserError(
                f"expected {', '.join(PACKAGES)}; {missing[0]} is not installed: `pip install {missing[0]}`."
            )
        run = load_run(args.run)
        if run.model is None:
            raise UserError(f"'{args.run}' kept no model; repeat the run with --export hf.")
        text, pruned = Text.of(run, args.own, args.windows), args.run / "model"
        dense = Path(locate_model(run.config.model.name))
        with tempfile.TemporaryDirectory(prefix="after-pruning-") as made_here:
            scratch = Path(made_here)
            rows = [Row.measured("dense", dense, text, in_transformers(loaded(dense)))]
            rows += quantised_rows("dense", dense, text, scratch)
            rows += [Row.measured("pruned", pruned, text, in_transformers(loaded(pruned)))]
            rows += [in_int8(pruned, text, scratch), *quantised_rows("pruned", pruned, text, scratch)]
            tuned = fine_tuned(pruned, text, scratch / "tuned")
            rows += [Row.measured(f"pruned, fine-tuned on {args.own}", scratch / "tuned", text, in_transformers(tuned))]
            rows += quantised_rows("pruned, fine-tuned", scratch / "tuned", text, scratch)
    except UserError as error:
        sys.stderr.write(f"after_pruning: {error}\n")
        return 2
    sys.stdout.write(table(rows, text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
