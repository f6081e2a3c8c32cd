"""An open run: its plan, the model, the text, its folder, loggers, token counts, and a Trainer for each stage."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.config import RunConfig
from gprune.corpora.loaders import CorpusDataModule
from gprune.corpora.windows import Windows
from gprune.evaluation.perplexity import Forecast
from gprune.method.inputs import Text, load_dense, prepare_text
from gprune.method.plan import Plan, describe_unpruned, forward_equivalents, make_plan
from gprune.models.families import decoder_layers
from gprune.models.loading import fingerprint, load_tokenizer
from gprune.runs.checkpoints import Checkpoints
from gprune.runs.folder import RunFolder
from gprune.runs.tracking import loggers_of_user, show_over_tokens, tracking
from gprune.runs.trainer import (
    GIVEN,
    PROFILERS,
    RecordStop,
    StageBar,
    StopTogether,
    UserCallbacks,
    arguments_of_user,
    matmul_precision,
    placement,
    plain_interrupts,
    raise_as_user_error,
    validation_interval,
)
from gprune.screen import Screen
from gprune.sparsity.budget import Budget
from gprune.stages.base import curves_of
from gprune.stages.callbacks import StepCurves
from gprune.storage.files import key_of
from gprune.storage.yaml_text import to_yaml
from gprune.user_code import VERSION, code_of

log = logging.getLogger("gprune")


class TokenMeter:
    """Counter of the tokens that pass through the model's decoder, with and without gradients.

    Tokens are counted by a hook, never estimated. With DDP each process counts its own share, and the run folder adds
    the shares (`RunFolder.part`).
    """

    def __init__(self) -> None:
        self.forward = self.forward_backward = 0
        self._earlier: Counter[str] = Counter()  # tokens counted in earlier sessions, up to the checkpoint
        self.hooks = ExitStack()

    def watch(self, model: PreTrainedModel) -> RemovableHandle:
        """Count the tokens of a model's decoder until the returned handle is removed or the run ends."""
        handle = model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)
        self.hooks.callback(handle.remove)
        return handle

    def _count(self, _module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Count the tokens of a call of the decoder: a forward pre-hook with the call's arguments."""
        ids = kwargs["input_ids"] if "input_ids" in kwargs else next(iter(args), None)
        # A multimodal model passes embeddings (B, T, H) to its language model.
        tokens = ids.numel() if ids is not None else kwargs["inputs_embeds"].shape[:2].numel()
        if torch.is_grad_enabled():
            self.add(0, tokens)
        else:
            self.add(tokens)

    def add(self, forward: int, forward_backward: int = 0) -> None:
        """Count tokens: forward, and forward and backward."""
        self.forward += forward
        self.forward_backward += forward_backward

    def work(self) -> float:
        """Work of this session so far, in tokens of a forward pass."""
        return forward_equivalents(self.forward, self.forward_backward)

    def counts(self) -> dict[str, int]:
        """Tokens by kind, in the form of the manifest, including those of the checkpoint that was resumed."""
        of_session = {"forward_tokens": self.forward, "forward_backward_tokens": self.forward_backward}
        return {kind: count + self._earlier[kind] for kind, count in of_session.items()}

    def add_earlier(self, earlier: dict[str, int]) -> None:
        """Add the tokens of an earlier session, which do not count as work of this session."""
        self._earlier.update(earlier)


@dataclass(frozen=True)
class Run:
    """Everything that the steps of the method share: plan, model, text, folder and loggers."""

    plan: Plan
    model: PreTrainedModel  # dense, frozen
    tokenizer: PreTrainedTokenizerBase
    text: Text
    folder: RunFolder
    loggers: list[Logger]
    meter: TokenMeter
    fingerprint: str  # hash of the dense model
    screen: Screen
    callbacks: UserCallbacks
    forecasts: dict[str, list[Forecast]] = field(default_factory=dict)  # hash of windows -> forecasts, if they are kept

    @property
    def cfg(self) -> RunConfig:
        return self.plan.cfg

    @property
    def budget(self) -> Budget:
        return self.plan.budget

    @property
    def layers(self) -> nn.ModuleList:
        """Decoder layers of the dense model."""
        return decoder_layers(self.model)

    def with_budget(self, budget: Budget) -> Run:
        """Return a copy with another budget."""
        return replace(self, plan=replace(self.plan, budget=budget))

    def step(self, number: int, what: str) -> None:
        """Log the beginning of a step of the method, and show it in the progress bar."""
        log.info("%s", self.screen.step(number, what))

    def trainer(
        self, name: str, what: str, stage: L.LightningModule, *, role: str = "", on_text: bool = False,
        callbacks: Sequence[L.Callback] = (), **kwargs: Any,
    ) -> L.Trainer:  # fmt: skip
        """Construct the Trainer of one stage, and log the line `what`.

        `name` and `role` are those of `fit`; `callbacks` follow those of the user. `on_text`: see `arguments_of_user`.
        """
        log.info("%s", what)
        t = self.cfg.trainer
        user_callbacks = self.callbacks.of_stage(stage, role, self.folder / f"checkpoints/{name}")
        record_stop = RecordStop(self.folder, name)
        callbacks = [*user_callbacks, record_stop, *callbacks, StageBar(self.screen, what), StopTogether()]
        given = arguments_of_user(t, on_text=on_text)
        if kwargs.get("gradient_clip_val"):  # the stage has a limit of its own
            given.pop("gradient_clip_val", None)
        if (profiler := given.get("profiler")) in PROFILERS:
            given["profiler"] = PROFILERS[profiler](self.folder / "profiles", name.replace("/", "-"))
        arguments = {
            "enable_model_summary": False, "enable_progress_bar": False, "log_every_n_steps": 1,
            **placement(t), **kwargs, **given,
        }  # fmt: skip
        if t.strategy == "fsdp" and is_overridden("configure_model", stage):  # the stage shards its models
            arguments["strategy"] = ModelParallelStrategy(self.cfg.processes, 1, save_distributed_checkpoint=False)
        return L.Trainer(
            logger=self.loggers, callbacks=callbacks, default_root_dir=self.folder.path,
            # Our samplers shard exactly; Lightning's would repeat windows to fill the last batch.
            use_distributed_sampler=False,
            enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),  # True would add a ModelCheckpoint
            num_sanity_val_steps=0, **arguments,
        )  # fmt: skip

    def fit(
        self, name: str, what: str, stage: L.LightningModule, text: Sequence[Windows], *,
        batch_size: int | None = None, callbacks: Sequence[L.Callback] = (), role: str = "",
        measured_after: float = 1.0, **kwargs: Any,
    ) -> tuple[L.Trainer, CorpusDataModule]:  # fmt: skip
        """Train a stage on text, from its last checkpoint if an earlier session left one.

        The checkpoint is kept until the learned tensors are written to the folder under the stage's name. Development
        perplexity is measured before the first step, by the validation loop, and after the last step.

        Args:
            name: of the stage in the folder.
            what: line for the log and the progress bar.
            stage: a LightningModule.
            text: windows to train on, one entry per corpus.
            batch_size: windows per batch; `--corpora.batch_size` by default.
            callbacks: in addition to those of the user and of the run.
            role: prefix of the stage's metrics, such as `learn`, which callbacks of the user may monitor.
            measured_after: share of an epoch between two measurements of development perplexity.
            kwargs: of the Trainer.
        """
        cfg, t = self.cfg, self.cfg.trainer
        checkpoints = Checkpoints(self.folder, name, stage, self.meter, seconds=60 * cfg.run.checkpoint_minutes)
        validates = is_overridden("validation_step", stage) and bool(self.text.development)
        data = CorpusDataModule(
            train=text, validation=self.text.development if validates else (),
            batch_size=batch_size or cfg.corpora.batch_size, validation_batch_size=cfg.corpora.batch_size,
            seed=cfg.run.seed,
        )  # fmt: skip
        if validates:
            windows = sum(len(of_corpus.tokens) for of_corpus in text)
            accumulate = kwargs.get("accumulate_grad_batches", 1)
            _, interval = validation_interval(t, windows, data.batch_size, measured_after, accumulate=accumulate)
            kwargs["val_check_interval"] = interval
        learned = self.folder.manifest.get("learned_tokens", {})
        stage.tokens_before = sum(tokens for other, tokens in learned.items() if other != name)
        limit = t.limit_train_batches
        curves = StepCurves()
        trainer = self.trainer(
            name, what, stage, role=role, callbacks=[curves, *callbacks, checkpoints], precision=t.precision,
            limit_train_batches=int(limit) if limit and limit >= 1 else limit,  # Lightning reads a float as a share
            inference_mode=False, on_text=True, **kwargs,
        )  # fmt: skip
        checkpoint = checkpoints.usable()
        if checkpoint is not None:
            log.info("Resuming from %s; steps that are repeated are counted once", checkpoint)
        show_over_tokens(self.loggers, curves_of(stage))
        with self.folder.part(name, shared=True):
            if validates and checkpoint is None:
                trainer.validate(stage, data, verbose=False)
            trainer.fit(stage, data, ckpt_path=checkpoint, weights_only=True)
            if validates and getattr(stage, "measured_at", None) != trainer.global_step:
                trainer.validate(stage, data, verbose=False)
        if getattr(stage, "in_float32", False):
            self.folder.update_manifest(fallbacks={name: "32-true, because a loss was not finite in bf16-mixed"})
        self.callbacks.keep_state()
        self.folder.update_manifest(learned_tokens={name: getattr(stage, "tokens", curves.tokens)})
        return trainer, data


@contextmanager
def open_run(
    cfg: RunConfig, callbacks: Sequence[L.Callback] = (), logger: Logger | Sequence[Logger] = ()
) -> Iterator[Run]:
    """Context with an open run: make the plan, load text and model, create or resume the folder, and open the loggers.

    Random generators are seeded, and tokens are counted from here on.
    """
    user_callbacks = UserCallbacks(callbacks, cfg.trainer.callbacks)
    loggers = loggers_of_user(cfg, logger)
    plan = make_plan(cfg, user_callbacks, together=True)
    cfg = plan.cfg
    tokenizer = load_tokenizer(cfg.model.name, trust_remote_code=cfg.model.trust_remote_code)
    if not cfg.searches_quality:
        log.info("Removing %s", plan.describe_removed())
    log.info("Reading %d corpora", len({*cfg.train_corpora, *cfg.corpora.evaluate}))
    # Before weights are loaded, which may take minutes.
    text = prepare_text(cfg, tokenizer, plan.skeleton.get_input_embeddings().num_embeddings)
    model = load_dense(cfg, plan.device, tokenizer)
    inputs = {"model": fingerprint(model), "text": text.hashes(), "gprune": VERSION}
    if cfg.sparsity.currency == "seconds":  # another latency table gives another budget
        inputs["speed"] = key_of(table=plan.pricing.latency_table)
    settings = cfg.settings() | {"inputs": inputs}
    L.seed_everything(cfg.run.seed, verbose=False)
    meter = TokenMeter()
    meter.watch(model)
    code = settings.get("code", {})
    if user_callbacks.given:  # identified by class and Lightning's state key
        names = [f"{type(callback).__module__}.{callback.state_key}" for callback in user_callbacks.given]
        inputs["callbacks"] = names
    for callback in user_callbacks.given:
        code |= code_of(type(callback))
    if code:
        settings["code"] = code
        if unreadable := [module for module, value in code.items() if value is None]:
            log.warning("Cannot read the code of %s, so changes of it are not noticed.", ", ".join(unreadable))
    folder = RunFolder(cfg.folder, meter.counts, key=key_of(settings=settings))
    screen = Screen({step: forward_equivalents(*tokens) for step, tokens in plan.tokens.items()}, meter.work)
    with (
        folder.in_use(settings, to_yaml(cfg.resolved())), plain_interrupts(),
        tracking(folder, cfg, loggers) as all_loggers, screen, meter.hooks,
        matmul_precision(cfg.trainer.float32_matmul_precision, fastest_on=plan.device),
    ):  # fmt: skip
        log.info("Run folder: %s", folder.path)
        if (steps := folder.manifest.get("steps")) and not folder.finished:  # only rank 0 has a manifest
            log.info("Resuming the run, which has finished the steps %s", ", ".join(steps))
        if not folder.finished:
            _record_precision(folder, plan)
        log.info("Precision of training: %s (%s)", cfg.trainer.precision, plan.why_precision)
        if torch.get_float32_matmul_precision() != cfg.trainer.float32_matmul_precision:
            log.info("Float32 products by oneDNN, which is faster on this processor than MKL, in the same precision")
        if unpruned := describe_unpruned(plan):
            log.info("Not pruned: %s", unpruned)
        try:
            yield Run(plan, model, tokenizer, text, folder, all_loggers, meter, inputs["model"], screen, user_callbacks)
        except Exception as error:
            raise_as_user_error(error, user_callbacks)
            raise


def _record_precision(folder: RunFolder, plan: Plan) -> None:
    """Write the reason for the resolved precision `auto`."""
    if plan.why_precision != GIVEN and not folder.manifest.get("precision"):
        folder.update_manifest(precision={"asked": "auto", "because": plan.why_precision})
