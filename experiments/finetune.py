"""The same after recovery fine-tuning (LoRA): what is left of the differences between pruned models?

    export GPRUNE_DATA_DIR=mirrors
    python -m experiments.finetune runs/A runs/B --dense --tokens 100000 --corpora wikitext2 c4 code_github
    python -m experiments.finetune runs/A runs/B --rank 8 --learning-rate 1e-3 --dtype bfloat16 --reference A
    python -m experiments.finetune --table                        # from the records that are kept

Each RUN is a finished run that exported its model (`--export hf`). Every row learns from the same windows in the same
order: train text, drawn with a seed of its own, so that the sample is not that of calibration; how much of it
calibration has read all the same is recorded. One pass with AdamW, equal settings and seeds, plain next-token
cross-entropy. The adapters sit on every linear layer of the decoder layers that the family's record names (experts,
stacked tensors and no layers, stay as they are), are float32, and stay apart from the weights: nothing is merged.

Evaluated before and after on the windows of the runs themselves. A row is refused where that text, or the perplexity
before, is not what its run recorded, and so are rows that were evaluated on different text.

What LoRA reads is *seen* text. A corpus counts as seen, in all rows, if any row's run used it, if fine-tuning reads it,
or if it shares more than 1 % of its 13-word n-grams with what fine-tuning reads; the table is about the others.

One JSON record per row in `experiments/records/finetune/`; a row whose settings stand there is not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune import cli, report
from gprune.architectures import Part, blocks_of
from gprune.artifacts import environment, file_hashes, key_of, read_json, write_json
from gprune.config import RunConfig
from gprune.corpora import check_corpus, identity, load_corpus
from gprune.data import CorpusDataModule, Windows, make_windows
from gprune.errors import UserError
from gprune.evaluation.leakage import SEEN_ABOVE, leaked_share_of_windows
from gprune.evaluation.perplexity import PerplexityResult, bootstrap_perplexity, paired_bootstrap_ratio, perplexity
from gprune.loading import fingerprint, load_model
from gprune.losses import next_token_loss
from gprune.preparation import JOIN, prepare_text
from gprune.report import Estimate, FinishedRun, Table, row_name
from gprune.session import TokenMeter
from gprune.stages.base import FrozenLMStage, require_finite
from gprune.trainer import NamedProgressBar, check_trainer, plain_interrupts
from gprune.verbs import Parser, run_verb

RECORDS = Path(__file__).parent / "records" / "finetune"
DENSE = "dense"
DTYPES = ("float32", "bfloat16")
# Largest difference between the perplexity before and the run's record of it, in nats per token. 16 bits: measured in
# another dtype, or with kernels that round otherwise.
ROUNDING = {"float32": 1e-4, "bfloat16": 0.02, "float16": 0.02}
# Calibration draws its windows with seeds from 0 to 2^32 - 1; beyond them lie other samples of the same text.
OTHER_SAMPLE = 2**32
WARMUP = 0.1  # share of the steps in which the learning rate rises; then it falls to 0


@dataclass(frozen=True)
class Settings:
    """What all rows of a table share."""

    corpora: list[str]
    tokens: int  # asked for; whole windows, equally many of each corpus, are read
    seq_len: int
    batch_size: int
    rank: int
    alpha: float
    learning_rate: float
    dtype: str
    seed: int

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(
                f"--dtype: expected {' or '.join(DTYPES)}, whose gradients do not vanish; got {self.dtype}."
            )
        for name in ("seq_len", "batch_size", "rank", "alpha", "learning_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name.replace('_', '-')}: expected more than 0, got {getattr(self, name)}.")
        if not self.windows:
            least = self.seq_len * len(self.corpora)
            raise UserError(
                f"--tokens: expected at least one window per corpus ({least:,} tokens), got {self.tokens:,}."
            )

    @property
    def windows(self) -> int:
        """Of each corpus."""
        return self.tokens // (self.seq_len * len(self.corpora))


@dataclass(frozen=True)
class Row:
    """A model to fine-tune: what a run left, or the dense model it began with."""

    name: str
    run: FinishedRun
    settings: Settings

    @property
    def dense(self) -> bool:
        return self.name == DENSE

    @cached_property
    def config(self) -> RunConfig:
        """Settings of the run."""
        return cli.parse(["--config", str(self.run.path / "config.yaml")])

    @cached_property
    def measured(self) -> dict[str, dict[str, Any]]:
        """The run's own records of this model, by corpus."""
        stage = (DENSE, "none") if self.dense else (self.run.final, self.run.settings["recovery"])
        return {r["corpus"]: r for r in self.run.records if (r["stage"], r["recovery"]) == stage}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What determines the row's numbers, as plain data."""
        weights = self.run.model if self.dense else weight_hashes(self.run.path / "model")
        text = {corpus: r["content_hash"] for corpus, r in self.measured.items()}
        return {"name": self.name, "weights": weights, "evaluated": text, "finetuning": vars(self.settings)}

    @property
    def path(self) -> Path:
        """Named for people, told apart by what determines the numbers."""
        return RECORDS / f"{self.name}-{key_of(**self.identity)[:8]}.json"

    def found(self) -> dict[str, Any] | None:
        """The record of this row, if it was run before."""
        kept = read_json(self.path)
        return kept if kept is not None and kept.get("identity") == self.identity else None


def weight_hashes(folder: Path) -> dict[str, str]:
    """Of an exported folder: what the numbers depend on, without its card and its code."""
    return {**file_hashes(folder, "*.safetensors"), **file_hashes(folder, "config.json")}


class LoraTuning(FrozenLMStage):
    """LoRA adapters (Hu et al. 2021, arXiv 2106.09685) on a frozen model, trained on next-token cross-entropy.

    The adapters are the only registered parameters; the model they are put into stays frozen.
    """

    def __init__(self, model: PreTrainedModel, *, rank: int, alpha: float, learning_rate: float, steps: int):
        super().__init__(model)
        try:
            import peft
        except ImportError as error:
            raise UserError("LoRA needs peft; run `pip install peft`.") from error
        transposed = blocks_of(model)[0].family.transposed
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=linear_layers(model), fan_in_fan_out=transposed
        )
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT's, about transformers
            self.peft = (peft.get_peft_model(model, config),)  # not registered, as the model is not
        self.adapters = nn.ParameterList(p for p in self.lm.parameters() if p.requires_grad)
        self.learning_rate, self.steps = learning_rate, steps
        self.losses: list[float] = []  # of each step, nats per token
        self._read = hashlib.sha256()

    @property
    def read(self) -> str:
        """16 hex digits over every batch in the order it came."""
        return self._read.hexdigest()[:16]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ids = batch["input_ids"]
        self._read.update(f"{tuple(ids.shape)};".encode() + ids.cpu().numpy().astype("<i8").tobytes())
        loss = next_token_loss(self.lm, ids)
        require_finite(float(loss.detach()), "The fine-tuning loss")
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.adapters.parameters(), lr=self.learning_rate, weight_decay=0.0)
        rising = max(1, round(WARMUP * self.steps))

        def factor(step: int) -> float:
            return min((step + 1) / rising, (self.steps - step) / max(1, self.steps - rising), 1.0)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Full names of the linear layers that the family's record names, each once, in every decoder layer."""
    hosts = {id(p.host) for block in blocks_of(model) for p in block.parts.values() if isinstance(p, Part)}
    return [name for name, module in model.named_modules() if id(module) in hosts]


def training_text(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> list[Windows]:
    """The windows every row learns from, one entry per corpus."""
    return [
        make_windows(
            load_corpus(corpus, "train"), tokenizer, corpus=corpus, split="train", num_samples=settings.windows,
            seq_len=settings.seq_len, seed=OTHER_SAMPLE + settings.seed, join=JOIN,
        )
        for corpus in settings.corpora
    ]  # fmt: skip


def tune(model: PreTrainedModel, windows: Sequence[Windows], settings: Settings, *, accelerator: str) -> LoraTuning:
    """Fine-tune in place, one pass; `model` has adapters from then on."""
    data = CorpusDataModule(train=windows, batch_size=settings.batch_size, seed=settings.seed)
    steps = -(-sum(len(w.tokens) for w in windows) // settings.batch_size)
    L.seed_everything(settings.seed, verbose=False)  # of the adapters' first weights
    stage = LoraTuning(
        model, rank=settings.rank, alpha=settings.alpha, learning_rate=settings.learning_rate, steps=steps
    )
    trainer = L.Trainer(
        accelerator=accelerator, devices=1, max_epochs=1, gradient_clip_val=1.0, use_distributed_sampler=False,
        logger=False, enable_checkpointing=False, enable_model_summary=False, callbacks=[NamedProgressBar("LoRA")],
    )  # fmt: skip
    with plain_interrupts():
        trainer.fit(stage, data.train_dataloader())
    return stage


def load(row: Row) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The row's model in the dtype of the fine-tuning, frozen, and its tokenizer.

    Raises:
        UserError: for a model that is not the one the run left, or began with.
    """
    m, folder, dtype = row.config.model, row.run.path / "model", getattr(torch, row.settings.dtype)
    if not row.dense:
        left = (read_json(row.run.path / "manifest.json") or {}).get("model")
        if left is not None and left != file_hashes(folder):
            raise UserError(f"{folder} is not what the run left there; run its command again.")
        return load_model(str(folder), dtype=dtype)
    model, tokenizer = load_model(m.name, dtype=getattr(torch, m.dtype), trust_remote_code=m.trust_remote_code)
    if fingerprint(model) != row.run.model:
        raise UserError(f"--dense: '{m.name}' has other weights than the model that '{row.run.path}' pruned.")
    if model.dtype != dtype:
        # Loaded again, since `.to` would round the frequencies of the rotary embedding as well.
        model, _ = load_model(m.name, dtype=dtype, trust_remote_code=m.trust_remote_code)
    return model, tokenizer


def run(row: Row, *, accelerator: str) -> dict[str, Any]:
    """Evaluate, fine-tune, evaluate again, and keep what came out."""
    (model, tokenizer), cfg = load(row), row.config
    device = check_trainer(accelerator=accelerator, devices=1, num_nodes=1, strategy="auto")
    model = model.to(device)
    text, windows = prepare_text(cfg, tokenizer), training_text(row.settings, tokenizer)
    check_text(row, text.test)
    before = {w.corpus: perplexity(model, w, batch_size=cfg.corpora.batch_size) for w in text.test}
    check_before(row, before)
    parameters = sum(p.numel() for p in model.parameters())
    meter = TokenMeter()  # counted, to be compared with what was meant
    meter.watch(model)
    started, cpu = time.perf_counter(), time.process_time()
    stage = tune(model, windows, row.settings, accelerator=accelerator)
    spent, cpu = time.perf_counter() - started, time.process_time() - cpu
    meter.close()
    model = stage.lm.to(device)
    after = {w.corpus: perplexity(model, w, batch_size=cfg.corpora.batch_size) for w in text.test}
    tuned_on = {identity(corpus) for corpus in row.settings.corpora}
    kept = {
        "name": row.name,
        "identity": row.identity,
        "model": report.model_label(cfg.model.name),
        "stage": DENSE if row.dense else row_name(row.run.final, cfg.recovery),
        "importance": None if row.dense else cfg.importance,
        "sparsity": 0.0 if row.dense else cfg.sparsity.target,
        "scope": cfg.sparsity.scope,
        "parameters": parameters,
        "trainable": sum(p.numel() for p in stage.adapters),
        "tokens": meter.forward_backward,
        "read": stage.read,
        "losses": [round(loss, 4) for loss in stage.losses],
        "calibration_overlap": 0.0 if row.dense else leaked_share_of_windows(windows, text.used, tokenizer),
        "seconds": round(spent, 1),
        "cpu_seconds": round(cpu, 1),
        "environment": environment(),
        "records": [
            record(row, w, before[w.corpus], after[w.corpus], identity(w.corpus) in tuned_on,
                   leaked_share_of_windows([w], windows, tokenizer))
            for w in text.test
        ],
    }  # fmt: skip
    assert kept["tokens"] == sum(w.num_tokens for w in windows)
    write_json(row.path, kept)
    return kept


def record(
    row: Row, w: Windows, before: PerplexityResult, after: PerplexityResult, tuned_on: bool, leaked: float
) -> dict[str, Any]:
    """One corpus of one row, with its protocol."""
    own = row.measured[w.corpus]
    return {
        "corpus": w.corpus,
        "split": w.split,
        "seen": own["seen"] or tuned_on or leaked > SEEN_ABOVE,
        "seen_by_run": own["seen"],
        "leaked_13grams_finetuning": leaked,
        "perplexity_before": before.perplexity,
        "perplexity_after": after.perplexity,
        "perplexity_of_run": own["perplexity"],
        "tokens": before.tokens,
        "window_nll_before": [round(v, 4) for v in before.window_nll],
        "window_nll_after": [round(v, 4) for v in after.window_nll],
        "seq_len": w.tokens.shape[1],
        "stride": w.tokens.shape[1],
        "bos": False,
        "join": JOIN,
        "dtype": row.settings.dtype,
        "content_hash": w.content_hash,
    }


def check_text(row: Row, test: Sequence[Windows]) -> None:
    """Raise UserError unless the evaluated windows are those of the run."""
    for w in test:
        if w.content_hash != row.measured[w.corpus]["content_hash"]:
            raise UserError(
                f"Row '{row.name}': {w.corpus} ({w.split}) is other text here than when '{row.run.path}' was measured; "
                f"run train.py again, and then this."
            )


def check_before(row: Row, before: Mapping[str, PerplexityResult]) -> None:
    """Raise UserError unless the model is as good as its run says, within rounding."""
    for corpus, result in before.items():
        own = row.measured[corpus]
        allowed = max(ROUNDING[own["dtype"]], ROUNDING[row.settings.dtype])
        if not abs(result.nll - own["nll"]) <= allowed:
            raise UserError(
                f"Row '{row.name}': perplexity {result.perplexity:.3f} on {corpus} in {row.settings.dtype}, but the "
                f"run recorded {own['perplexity']:.3f} in {own['dtype']}; expected the same within {allowed} nats."
            )


def rows_of(options: argparse.Namespace) -> list[Row]:
    """The rows that are asked for, refused before any weight is read.

    Raises:
        UserError: for no such run, one that is not finished or exported no model, and runs that cannot be compared.
    """
    runs = report.read_runs(options.runs)
    for finished in runs:
        if not (finished.path / "model" / "config.json").is_file():
            raise UserError(
                f"'{finished.path}' exported no model; run its command again with --export hf, and then this."
            )
        if finished.name == DENSE:
            raise UserError(f"'{finished.path}' is named as the dense model's row is; rename the folder.")
    dtypes = {finished.settings["model"]["dtype"] for finished in runs}
    if options.dtype is None and len(dtypes) > 1:
        raise UserError(f"--dtype: expected one for all rows, since the runs have {' and '.join(sorted(dtypes))}.")
    for corpus in options.corpora:
        check_corpus(corpus)
    alpha = float(2 * options.rank if options.alpha is None else options.alpha)
    settings = Settings(
        corpora=options.corpora, tokens=options.tokens, seq_len=options.seq_len, batch_size=options.batch_size,
        rank=options.rank, alpha=alpha, learning_rate=options.learning_rate,
        dtype=options.dtype or dtypes.pop(), seed=options.seed,
    )  # fmt: skip
    rows = [Row(finished.name.replace("/", "-"), finished, settings) for finished in runs]
    rows = [*([Row(DENSE, runs[0], settings)] if options.dense else []), *rows]
    for row in rows[1:]:
        if differ := [
            c for c, text in row.identity["evaluated"].items() if rows[0].identity["evaluated"].get(c) != text
        ]:
            raise UserError(f"Rows '{rows[0].name}' and '{row.name}' were evaluated on different text of {differ[0]}.")
        if missing := rows[0].measured.keys() - row.measured.keys():
            raise UserError(f"Row '{row.name}' was not evaluated on {min(missing)}, as row '{rows[0].name}' was.")
    return rows


def token_hours(pending: Sequence[Row], *, accelerator: str) -> str:
    """What is to be computed, and how long it takes at the speed of this machine right now."""
    settings, first = pending[0].settings, pending[0]
    backward = settings.windows * settings.seq_len * len(settings.corpora) * len(pending)
    forward = sum(2 * len(r["window_nll"]) * r["seq_len"] for row in pending for r in row.measured.values())
    model, _ = load(first)
    model = model.to(check_trainer(accelerator=accelerator, devices=1, num_nodes=1, strategy="auto"))
    ids = torch.randint(model.config.vocab_size, (settings.batch_size, settings.seq_len), device=model.device)
    stage = LoraTuning(model, rank=settings.rank, alpha=settings.alpha, learning_rate=1.0, steps=1)

    def speed(backward: bool) -> float:
        """Tokens per second."""
        started = time.perf_counter()
        with torch.set_grad_enabled(backward):
            loss = next_token_loss(stage.lm, ids)
        if backward:
            loss.backward()
        return ids.numel() / (time.perf_counter() - started)

    speed(False)  # warm
    forward_speed, backward_speed = speed(False), speed(True)
    hours = (forward / forward_speed + backward / backward_speed) / 3600
    return (
        f"{len(pending)} rows: {forward:,} tokens forward ({forward_speed:.0f}/s here) and {backward:,} forward and "
        f"backward ({backward_speed:.0f}/s): {hours:.2f} hours"
    )


def table_of(kept: Sequence[dict[str, Any]], reference: str | None) -> str:
    """Markdown: unseen geometric means before and after, and ratios to the reference row; then the protocol.

    Raises:
        UserError: for rows that read different text, no such reference, and no text unseen by all rows.
    """
    names = [row["name"] for row in kept]
    plain = [row for row in kept if row["name"] == reference or (reference is None and row["name"] != DENSE)]
    if reference is None or plain:
        base = (plain or kept)[0]
    else:
        raise UserError(f"--reference: expected a row ({', '.join(names)}), got '{reference}'.")
    for row in kept:
        if row["read"] != base["read"] or row["tokens"] != base["tokens"]:
            raise UserError(
                f"Rows '{base['name']}' and '{row['name']}' were fine-tuned on different text; remove the records "
                f"of one in {RECORDS} and run it again."
            )
        if row["identity"]["evaluated"] != base["identity"]["evaluated"]:
            raise UserError(f"Rows '{base['name']}' and '{row['name']}' were evaluated on different text.")
    seen = {r["corpus"] for row in kept for r in row["records"] if r["seen"]}
    unseen = [r["corpus"] for r in base["records"] if r["corpus"] not in seen]
    if not unseen:
        raise UserError(f"Every evaluated corpus ({', '.join(sorted(seen))}) is seen by one row or another.")
    predicted = base["records"][0]["seq_len"] - 1

    def nll(row: dict[str, Any], when: str) -> dict[str, list[float]]:
        return {r["corpus"]: r[f"window_nll_{when}"] for r in row["records"] if r["corpus"] in unseen}

    def to_base(row: dict[str, Any], when: str) -> Estimate | None:
        return None if row is base else Estimate(*paired_bootstrap_ratio(nll(row, when), nll(base, when), predicted))

    rows = []
    for row in kept:
        means = [Estimate(*bootstrap_perplexity(nll(row, when), predicted)) for when in ("before", "after")]
        gained = Estimate(*paired_bootstrap_ratio(nll(row, "after"), nll(row, "before"), predicted))
        rows.append([row["name"], *means, gained, to_base(row, "before"), to_base(row, "after")])
    to = f"/ {base['name']}"
    columns = ["unseen perplexity of", "before", "after", "after / before", f"{to}, before", f"{to}, after"]
    made = Table("finetune", "Before and after LoRA", columns, rows, dict.fromkeys(columns[3:], 3))
    return f"{made.to_markdown()}\n\n{note_of(kept, base, unseen, seen)}"


def note_of(kept: Sequence[dict[str, Any]], base: dict[str, Any], unseen: Sequence[str], seen: set[str]) -> str:
    """What the table's numbers are, in a paragraph."""
    s, first = base["identity"]["finetuning"], base["records"][0]
    sizes = ", ".join(f"{row['trainable']:,} beside {row['parameters']:,} ({row['name']})" for row in kept)
    overlap = max(row["calibration_overlap"] for row in kept)
    return (
        f"{base['model']}. LoRA of rank {s['rank']} (alpha {s['alpha']:g}) on {base['tokens']:,} tokens of "
        f"{', '.join(s['corpora'])} (windows of {s['seq_len']}), one pass, AdamW, learning rate "
        f"{s['learning_rate']:g}, batches of {s['batch_size']}, seed {s['seed']}, {s['dtype']}; learned parameters: "
        f"{sizes}. At most {overlap:.1%} of this text's 13-word n-grams are in what a run had calibrated on. Geometric "
        f"means over {', '.join(unseen)} ({len(first['window_nll_before'])} windows of {first['seq_len']} tokens each, "
        f"{first['split']} text, no BOS), unseen by every row's run and by LoRA; seen: "
        f"{', '.join(sorted(seen)) or 'none'}. In brackets 95 % intervals: bootstrap over windows, paired for ratios."
    )


def tables_of_records(options: argparse.Namespace) -> str:
    """A table for each way of fine-tuning that there are records of, of the named rows or of all."""
    wanted = {Path(path).name for path in options.runs} | ({DENSE} if options.dense else set())
    by_settings: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RECORDS.glob("*.json"), key=lambda p: (not p.name.startswith(DENSE), p.name)):
        kept = read_json(path)
        if kept is not None and (not options.runs or kept["name"] in wanted):
            key = key_of(finetuning=kept["identity"]["finetuning"], evaluated=kept["identity"]["evaluated"])
            by_settings.setdefault(key, []).append(kept)
    if not by_settings:
        raise UserError(f"--table: there are no records of these rows in {RECORDS}; run them first.")
    tables = []
    for found in by_settings.values():
        known = options.reference in [row["name"] for row in found]
        tables.append(table_of(found, options.reference if known or len(by_settings) == 1 else None))
    return "\n\n".join(tables) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m experiments.finetune"
    )
    made.add_argument("runs", nargs="*", metavar="RUN", help="folders of finished runs that exported a model")
    made.add_argument("--dense", action="store_true", help="the dense model of the first run as a row of its own")
    made.add_argument("--reference", metavar="ROW", help="row that others are divided by: a folder's name, or dense")
    made.add_argument("--tokens", type=int, default=100_000, help="for each row, all corpora together")
    made.add_argument(
        "--corpora", nargs="+", default=["wikitext2", "c4", "code_github"], help="whose train text is read"
    )
    made.add_argument("--seq-len", type=int, default=512, help="tokens per window")
    made.add_argument("--batch-size", type=int, default=4, help="windows per step")
    made.add_argument("--rank", type=int, default=8)
    made.add_argument("--alpha", type=float, help="default: twice the rank")
    made.add_argument("--learning-rate", type=float, default=1e-3, help="the highest")
    made.add_argument("--dtype", choices=DTYPES, help="of the frozen weights; default: that of the runs")
    made.add_argument("--seed", type=int, default=0, help="of the text, its order and the adapters")
    made.add_argument("--accelerator", default="auto", help="cpu, gpu, or auto")
    made.add_argument("--table", action="store_true", help="print from the records that are kept; run nothing")
    return made


def work(arguments: Sequence[str] | None = None) -> str:
    """Run what is missing; returns the table."""
    options = parser().parse_args(arguments)
    cli.quiet()
    if options.table:
        return tables_of_records(options)
    if not options.runs:
        raise UserError("expected one run folder or more, such as runs/NAME; see --help.")
    rows = rows_of(options)
    names = [row.name for row in rows]
    if options.reference not in (None, *names):
        raise UserError(f"--reference: expected a row ({', '.join(names)}), got '{options.reference}'.")
    pending = [row for row in rows if row.found() is None]
    if pending:
        sys.stdout.write(token_hours(pending, accelerator=options.accelerator) + "\n")
    for row in pending:
        kept = run(row, accelerator=options.accelerator)
        sys.stdout.write(f"{row.name}: {kept['seconds']:.0f} s, kept\n")
        sys.stdout.flush()
    return "\n" + table_of([row.found() for row in rows], options.reference) + "\n"


def main() -> int:
    """Exit code 2 and one line for what a user can mend."""
    return run_verb("experiments.finetune", work, interrupted="Interrupted. What was finished is kept.")


if __name__ == "__main__":
    sys.exit(main())
