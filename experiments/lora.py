"""One row of `experiments.finetune`: a model evaluated, fine-tuned with LoRA, evaluated again, and its record."""

from __future__ import annotations

import hashlib
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

from gprune.benchmarks.subjects import load_dense
from gprune.config import RunConfig
from gprune.corpora.load import identity
from gprune.corpora.loaders import CorpusDataModule
from gprune.corpora.windows import JOIN, Sample, Windows, load_windows
from gprune.errors import UserError
from gprune.evaluation.leakage import SEEN_ABOVE, leaked_share_of_windows
from gprune.evaluation.perplexity import PerplexityResult, perplexity
from gprune.models.blocks import Part, blocks_of
from gprune.models.embedded import model_label
from gprune.models.loading import load_model
from gprune.models.losses import next_token_loss
from gprune.pipeline.inputs import prepare_text
from gprune.pipeline.run import TokenMeter
from gprune.report.records import row_name
from gprune.runs.folder import exported_model
from gprune.runs.results import FinishedRun, config_of
from gprune.runs.trainer import NamedProgressBar, check_trainer, plain_interrupts
from gprune.stages.base import FrozenLMStage, require_finite
from gprune.storage.environment import environment
from gprune.storage.files import file_hashes, key_of, read_json, write_json

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
        if self.seq_len < 2:
            raise UserError(f"--seq-len: expected 2 or more, a token and the next, got {self.seq_len}.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed: expected 0 or more and less than 2^32, got {self.seed}.")
        if self.windows < 1:
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
        return config_of(self.run)

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


def row_of(run: str) -> str:
    """What a row is called whose run has this name in reports."""
    return run.replace("/", "-")


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
        self.losses.append(float(loss.detach()))
        require_finite(self.losses[-1], "The fine-tuning loss")
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
    sample = Sample(settings.windows, settings.seq_len, OTHER_SAMPLE + settings.seed, flags=("--tokens", "--seq-len"))
    return [load_windows(corpus, "train", tokenizer, sample) for corpus in settings.corpora]


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
    dtype = getattr(torch, row.settings.dtype)
    if row.dense:
        return load_dense(row.run.path, row.run.settings, dtype)
    return load_model(str(exported_model(row.run.path)), dtype=dtype)


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
    wait_for(device)
    spent, cpu = time.perf_counter() - started, time.process_time() - cpu
    meter.close()
    meant = sum(w.num_tokens for w in windows)
    assert meter.forward_backward == meant, (meter.forward_backward, meant)
    model = stage.lm.to(device)
    after = {w.corpus: perplexity(model, w, batch_size=cfg.corpora.batch_size) for w in text.test}
    tuned_on = {identity(corpus) for corpus in row.settings.corpora}
    kept = {
        "name": row.name,
        "identity": row.identity,
        "model": model_label(cfg.model.name),
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


def speeds(row: Row, *, accelerator: str) -> tuple[float, float]:
    """Tokens per second of this machine right now, forward alone and with backward, on the row's model."""
    (model, _), s = load(row), row.settings
    model = model.to(check_trainer(accelerator=accelerator, devices=1, num_nodes=1, strategy="auto"))
    ids = torch.randint(model.config.vocab_size, (s.batch_size, s.seq_len), device=model.device)
    stage = LoraTuning(model, rank=s.rank, alpha=s.alpha, learning_rate=1.0, steps=1)

    def speed(backward: bool) -> float:
        wait_for(model.device)
        started = time.perf_counter()
        with torch.set_grad_enabled(backward):
            loss = next_token_loss(stage.lm, ids)
        if backward:
            loss.backward()
        wait_for(model.device)
        return ids.numel() / (time.perf_counter() - started)

    for backward in (False, True):
        speed(backward)  # warm
    return speed(False), speed(True)


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given: a GPU runs behind, and a clock read meanwhile is wrong."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
