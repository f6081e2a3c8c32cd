"""Quantize and fine-tune a pruned model, and compare its perplexity with that of the quantized dense model.

    pip install peft torchao llama-cpp-py-sync
    python -m experiments.after_pruning runs/NAME            # a finished run with an exported model

Perplexity is measured on the run's windows of unseen corpora, in transformers or, for GGUF files, in llama.cpp. The
pruned model is then fine-tuned on one of these corpora (`--own`) by LoRA on the corpus's train split, merged, saved,
reloaded and quantized. Prints a table as Markdown.
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
from gprune.discovery import family_of
from gprune.errors import UserError
from gprune.evaluation.perplexity import perplexity
from gprune.export import export
from gprune.models.gguf import window_nll
from gprune.models.loading import load_weights, locate_model
from gprune.runs.results import PruningResult, load_run

PACKAGES = ("peft", "torchao")  # the export checks for llama.cpp
GGUF_TYPES = ("f16", "q8_0", "q4_k_m")


@dataclass(frozen=True)
class Text:
    """Windows of unseen corpora, and test and train windows of the corpus for fine-tuning."""

    unseen: list[Windows]
    tuned: Windows
    tuned_train: Windows

    @classmethod
    def of(cls, run: PruningResult, tuned: str, windows: int) -> Text:
        c, e = run.config.corpora, run.config.evaluation
        unseen = list(dict.fromkeys(r["corpus"] for r in run.records if not r["seen"]))
        if tuned not in unseen or len(unseen) == 1:
            raise UserError(
                f"--own must be one of several unseen corpora of the run ({', '.join(unseen)}); got '{tuned}'."
            )
        bos = leading_token(run.tokenizer, c.bos)

        def windows_of(corpus: str, split: str, count: int) -> Windows:
            sample = Sample(count, e.seq_len, bos=bos)
            return make_windows(load_corpus(corpus, split), run.tokenizer, sample, corpus=corpus, split=split)

        test = {name: windows_of(name, e.split, e.num_samples) for name in unseen}
        train = windows_of(tuned, "train", windows)
        return cls([w for name, w in test.items() if name != tuned], test[tuned], train)


@dataclass(frozen=True)
class Row:
    """Size and perplexities of a stored model."""

    name: str
    mib: float
    unseen: float
    tuned: float

    @classmethod
    def measured(cls, name: str, path: Path, text: Text, measure: Callable[[Windows], float]) -> Row:
        """Measure a model that is a file, or a folder with weights."""
        files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.pt")]
        unseen = math.exp(sum(math.log(measure(w)) for w in text.unseen) / len(text.unseen))
        return cls(name, sum(file.stat().st_size for file in files) / 2**20, unseen, measure(text.tuned))


def in_transformers(model: PreTrainedModel) -> Callable[[Windows], float]:
    return lambda windows: perplexity(model.eval(), windows).perplexity


def gguf_rows(name: str, folder: Path, text: Text, scratch: Path) -> list[Row]:
    """Export a model folder as GGUF files, and measure them in llama.cpp."""
    rows = []
    for kind in GGUF_TYPES:
        path = export(folder, type=kind, output=scratch / f"{name.replace(' ', '-').replace(',', '')}-{kind}.gguf")
        measure = lambda w, path=path: math.exp(np.mean(window_nll(path, w.tokens)) / (w.tokens.shape[1] - 1))  # noqa: E731
        rows.append(Row.measured(f"{name}, GGUF {kind}", path, text, measure))
    return rows


def int8_row(folder: Path, text: Text, scratch: Path) -> Row:
    """Quantize the weights of linear layers to 8 bits with torchao, except embeddings, and measure the model."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = load(folder)
    quantize_(model, Int8WeightOnlyConfig())
    torch.save(model.state_dict(), scratch / "int8.pt")
    return Row.measured("pruned, torchao int8", scratch / "int8.pt", text, in_transformers(model))


def load(folder: Path) -> PreTrainedModel:
    """Load a pruned or stock model in float32. Code in the folder is not run."""
    model = load_weights(folder, dtype=torch.float32)
    family_of(model)
    return model


def fine_tune(folder: Path, text: Text, into: Path) -> PreTrainedModel:
    """Train LoRA for two epochs, merge it into the weights, save the model, and load it again."""
    import peft

    model = peft.get_peft_model(load(folder), peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-3)
    batches = 2 * text.tuned_train.tokens.split(2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    for ids in batches:
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(into)
    AutoTokenizer.from_pretrained(folder).save_pretrained(into)
    again, ids = load(into).eval(), text.tuned.tokens[:1]
    with torch.no_grad():
        difference = float((again(ids).logits - merged(ids).logits).abs().max())
    sys.stderr.write(f"fine-tuned, merged and reloaded: largest difference of logits {difference:.1e}\n")
    return again


def table(rows: Sequence[Row], text: Text) -> str:
    head = f"| model | MiB | {', '.join(w.corpus for w in text.unseen)} | {text.tuned.corpus} |\n|---|---:|---:|---:|"
    return "\n".join([head, *(f"| {r.name} | {r.mib:.0f} | {r.unseen:.2f} | {r.tuned:.2f} |" for r in rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="experiments.after_pruning", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--own", default="stories", help="corpus for fine-tuning (default: stories)")
    parser.add_argument("--windows", type=int, default=48, help="windows of its train split (default: 48)")
    args = parser.parse_args(arguments)
    try:
        if args.windows < 1:
            raise UserError(f"--windows must be 1 or more; got {args.windows}.")
        if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
            raise UserError(f"This experiment needs the package {missing[0]}. Run `pip install {missing[0]}`.")
        run = load_run(args.run)
        if run.model is None:
            raise UserError(
                f"RUN must be a run with an exported model; got '{args.run}'. Repeat the run with --export hf."
            )
        text, pruned = Text.of(run, args.own, args.windows), args.run / "model"
        dense = Path(locate_model(run.config.model.name))
        with tempfile.TemporaryDirectory(prefix="after-pruning-") as temporary:
            scratch = Path(temporary)
            rows = [Row.measured("dense", dense, text, in_transformers(load(dense)))]
            rows += gguf_rows("dense", dense, text, scratch)
            rows += [Row.measured("pruned", pruned, text, in_transformers(load(pruned)))]
            rows += [int8_row(pruned, text, scratch), *gguf_rows("pruned", pruned, text, scratch)]
            tuned = fine_tune(pruned, text, scratch / "tuned")
            rows += [Row.measured(f"pruned, fine-tuned on {args.own}", scratch / "tuned", text, in_transformers(tuned))]
            rows += gguf_rows("pruned, fine-tuned", scratch / "tuned", text, scratch)
    except UserError as error:
        sys.stderr.write(f"after_pruning: {error}\n")
        return 2
    sys.stdout.write(table(rows, text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
