"""`gprune.evaluate` and `gprune.recover`: measure or distil a model that gprune did not make."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.loggers import Logger
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from gprune.checks import require
from gprune.config import RunConfig
from gprune.config.elsewhere import default_run_name, with_made_elsewhere, without_pruning
from gprune.console import show_progress
from gprune.corpora.windows import Windows
from gprune.discovery import check_structure, family_of
from gprune.errors import UserError, quoting
from gprune.evaluation.perplexity import PerplexityResult, perplexity_from_logits
from gprune.export.hf import to_portable
from gprune.method.evaluate import add_row, dense_perplexity, leaks
from gprune.method.inputs import Text, load_dense, window_cutter
from gprune.method.plan import Plan, device_memory, make_plan
from gprune.method.recover import fit_once, tune
from gprune.method.run import Run, in_folder
from gprune.method.save import export_and_reload, is_exported
from gprune.method.summary import summarise
from gprune.models.loading import SUBJECT, check_elsewhere, fingerprint, load_elsewhere, locate_model
from gprune.models.losses import same_head, why_not_measurable
from gprune.models.masks import Masks
from gprune.recoveries import Material, recoveries_of
from gprune.report.tables import result_table
from gprune.runs.numbers import DENSE, row_name
from gprune.runs.results import PruningResult
from gprune.runs.tracking import loggers_of_user
from gprune.runs.trainer import UserCallbacks, matmul_precision
from gprune.storage.files import Cache

log = logging.getLogger("gprune")
GIB = 2**30
Model = str | os.PathLike | PreTrainedModel


def evaluate(
    model: Model, dense: Model, cfg: RunConfig | None = None, *, logger: Logger | Sequence[Logger] = ()
) -> PruningResult:
    """Measure a causal language model that gprune did not make, and compare it with a dense model.

    The model may be dense or pruned, and of a type that gprune cannot prune. Perplexity in exp(nats per token) is
    measured on `--corpora.evaluate` for both models, and KL(dense || model) in nats per token and the agreement, the
    share of tokens with the same most likely token, for `model`. Both are computed from logits, so the model may have
    another head. If its tokenizer differs, it is measured on windows of its own tokens, without KL and agreement.

        cfg = gprune.config.parse(["--config", "protocol"])
        result = gprune.evaluate("peers/osscar", "smollm2-135m", cfg)
        result.table()

    Args:
        model: folder or hub id, or a loaded model. It must load exactly as it was saved. A loaded model is saved to
            the cache with the tokenizer of `dense`, and loaded from there in `model.dtype`; the object is not changed.
        dense: embedded name, folder or hub id of the dense model, whose structure must be known to gprune, or a loaded
            model. The tokenizer of a loaded one is read from where the model was loaded (`config.name_or_path`).
        cfg: the protocol: settings of `corpora`, `evaluation`, `trainer`, `run` and `logging`, and `model.dtype`. A
            corpus counts as seen if `corpora.score`, `drift` or `recover` names it. Settings of pruning and recovery
            are ignored. By default `RunConfig()`.
        logger: Lightning loggers, in addition to CSV and W&B.

    Returns:
        Records with the stages `dense` and `model`, the summary with the numbers of parameters, and the folder of the
        run, which `gprune report` and `load_run` read. Masks, modules, thresholds, `model` and `tokenizer` are None.

    Raises:
        UserError: if weights are missing, unexpected, of other shapes or quantised; if the model needs code of its own
            that `model.trust_remote_code` does not allow; if both models do not fit in memory; or if a setting, a
            corpus or a file is invalid.
    """
    return _measure(model, dense, cfg, "none", (), logger)


def recover(
    model: Model, dense: Model, cfg: RunConfig | None = None, *, callbacks: Sequence[Callback] = (),
    logger: Logger | Sequence[Logger] = (),
) -> PruningResult:  # fmt: skip
    """Distil a model that gprune did not make from its dense model, then measure it like `evaluate`.

    A `DistillationStage` trains the model with the settings `--distill.*` on text of `--corpora.recover`. Perplexity on
    development text is logged during training. The recovered model is exported to `model/` in the run folder, unless
    `export.format` is `none`. The same call resumes an interrupted run.

        cfg = gprune.config.parse(["--config", "protocol", "--distill.tokens", "49152"])
        result = gprune.recover("peers/osscar", "smollm2-135m", cfg)
        result.model.save_pretrained("osscar-distilled")

    Args:
        model: as for `evaluate`. The model needs the tokenizer, the output embedding and the vocabulary of `dense`, and
            a structure that gprune can find.
        dense: as for `evaluate`.
        cfg: as for `evaluate`, with the settings of `distill` and `export`.
        callbacks: Lightning callbacks of the Trainer, as for `prune`.
        logger: Lightning loggers, in addition to CSV and W&B.

    Returns:
        As `evaluate`, with the recovered model and its tokenizer. Records of the stage `model` have the recovery
        `distill`, and `none` too if `evaluation.controls` has `unrecovered`.

    Raises:
        UserError: as `evaluate`, and if the tokenizers or the output embeddings differ.
    """
    return _measure(model, dense, cfg, "distill", callbacks, logger)


class MeasurementPlan(Plan):
    """The plan of a run that measures a model without pruning it."""

    @cached_property
    def tokens(self) -> dict[int, tuple[int, int]]:
        """Largest numbers of tokens (forward, forward and backward) by step: 9 recovers, 10 evaluates."""
        cfg = self.cfg
        forward, trained = self.recovery_tokens(cfg.recovery, counts_teacher=True)
        passes = 1 + 2 * len(cfg.rows)  # of the dense model, then of each row's model and again the dense model for KL
        return {9: (forward + cfg.evaluation.compared_tokens, trained), 10: (passes * cfg.evaluated_tokens, 0)}


def check_models(name: str, cfg: RunConfig, callbacks: UserCallbacks | None = None) -> MeasurementPlan:
    """Check settings and both models, and return the plan, before weights are loaded.

    Raise UserError as `plan.make_plan`, and if the model is incomplete, too large for memory, has too few positions, or
    is to be distilled and cannot be.
    """
    plan = make_plan(cfg, callbacks)
    other = check_elsewhere(name, trust_remote_code=cfg.model.trust_remote_code)
    bytes_per_parameter = getattr(torch, cfg.model.dtype).itemsize
    needed = bytes_per_parameter * (other.num_parameters() + plan.skeleton.num_parameters())
    memory = device_memory(plan.device)
    if needed > memory:
        reason = f"it and the dense model need {needed / GIB:,.2f} GiB in {cfg.model.dtype}, of {memory / GIB:,.2f}"
        raise UserError(f"{SUBJECT}: Cannot load '{name}' into memory: {reason}. Try --model.dtype bfloat16.")
    positions = getattr(other.config.get_text_config(decoder=True), "max_position_embeddings", None) or math.inf
    if cfg.evaluation.seq_len > positions:
        must = f"must be at most {positions}, the number of positions of '{name}'"
        raise UserError(f"--evaluation.seq_len {must}; got {cfg.evaluation.seq_len}.")
    if cfg.recovery == "distill":
        check_structure(other)
        if (why := why_not_measurable(other)) is not None:
            raise UserError(f"{SUBJECT}: Cannot distil '{name}': {why}.")
    return MeasurementPlan(plan.pricing, plan.budget, plan.why_precision)


def _as_folder(model: Model, tokenizer: str | None = None) -> str:
    """Return the folder or hub id of a model. A loaded model is saved to the cache.

    The tokenizer beside it is that of the model `tokenizer`, by default of the folder from which it was loaded.
    """
    if not isinstance(model, PreTrainedModel):
        require(model, (str, os.PathLike), "A model must be a folder, a hub id or a loaded PreTrainedModel")
        return os.fspath(model)
    source = tokenizer or model.config.name_or_path
    name = os.path.basename(os.path.normpath(model.config.name_or_path or model.config.model_type))

    def save(folder: Path) -> None:
        with quoting(f"Cannot load the tokenizer of a loaded model from '{source}': ", ". Give the model's folder."):
            loaded_tokenizer = AutoTokenizer.from_pretrained(locate_model(source), trust_remote_code=False)
        model.save_pretrained(folder)
        loaded_tokenizer.save_pretrained(folder)

    return str(Cache("loaded").folder(f"{name}-{fingerprint(model)}", save))


def _measure(
    model: Model, dense: Model, cfg: RunConfig | None, recovery: str, callbacks: Sequence[Callback],
    logger: Logger | Sequence[Logger],
) -> PruningResult:  # fmt: skip
    """Measure a model after the recovery `none` or `distill`; arguments as for `recover`."""
    cfg = RunConfig() if cfg is None else cfg
    require(cfg, RunConfig, "The configuration must be a RunConfig, such as gprune.RunConfig()")
    show_progress()
    cfg = without_pruning(cfg, recovery)
    cfg.model.name = _as_folder(dense)
    name = _as_folder(model, tokenizer=cfg.model.name)
    user_callbacks = UserCallbacks(callbacks, cfg.trainer.callbacks)
    plan = check_models(name, cfg, user_callbacks)
    cfg = plan.cfg
    dense_model, tokenizer = load_dense(cfg, plan.device)
    dtype, trust = getattr(torch, cfg.model.dtype), cfg.model.trust_remote_code
    other, other_tokenizer = load_elsewhere(name, dtype=dtype, trust_remote_code=trust)
    other = other.to(plan.device)
    if recovery == "distill":
        family_of(other)
        if not same_head(other, dense_model):
            reason = f"its output embedding differs from that of '{cfg.model.name}'"
            raise UserError(f"{SUBJECT}: Cannot distil '{name}': {reason}.")
    text = _text(cfg, dense_model, tokenizer)
    test = _tokenized_for(name, other, other_tokenizer, tokenizer, cfg, text.test)
    settings = with_made_elsewhere(cfg.settings(), name)
    fingerprints = {"model": fingerprint(dense_model), "made_elsewhere": fingerprint(other)}
    settings["inputs"] = fingerprints | {"text": text.hashes()}
    if cfg.run.name is None:
        cfg.run.name = default_run_name(settings)
    loggers = loggers_of_user(cfg, logger)
    with in_folder(plan, dense_model, tokenizer, text, settings, user_callbacks, loggers) as run:
        records = list(run.folder.metrics.get("records", []))
        if cfg.evaluates_early:
            run.step(9, "Evaluating without recovery")
            with run.folder.step("evaluate_unrecovered"):
                _evaluate(run, records, other, "none", test)
            log.info("Before recovery:\n\n%s\n", result_table(records).for_stdout())
        if recovery == "distill":
            run.step(9, "Recovering")
            with run.folder.step("recover"):
                other = _recovered(run, other)
            _export(run, other)
        run.step(10, "Evaluating")
        with run.folder.step("evaluate"):
            _evaluate(run, records, other, recovery, test)
        summary = summarise(run, records, None, other, None)
        recovered = recovery == "distill"
        return PruningResult(
            path=run.folder.path, config=cfg, masks=None, modules=None, thresholds=None, statistics={},
            records=records, summary=summary, model=to_portable(other) if recovered else None,
            tokenizer=tokenizer if recovered else None,
        )  # fmt: skip


def _text(cfg: RunConfig, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Read the text of distillation, if there is one, and of evaluation."""
    windows = window_cutter(cfg, tokenizer, dense.get_input_embeddings().num_embeddings)
    recover = cfg.roles["recover"]  # empty without distillation
    log.info("Reading %d corpora", len({*recover, *cfg.corpora.evaluate}))
    return Text(
        train={w.corpus: w for w in windows(recover, "train")},
        learn=[],
        fresh=[*windows(recover, "fresh")],
        development=[*windows(cfg.development_corpora, "development")],
        test=[*windows(cfg.corpora.evaluate, "test")],
    )


def _tokenized_for(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dense_tokenizer: PreTrainedTokenizerBase,
    cfg: RunConfig, test: list[Windows],
) -> list[Windows]:  # fmt: skip
    """Return the evaluated text in the tokens of a model; `test` itself if the tokenizer is that of the dense model.

    Two tokenizers are the same if they have the same vocabulary and give the same windows of the evaluated text. Raise
    UserError if they differ and the model is to be distilled.
    """
    windows = window_cutter(cfg, tokenizer, model.get_input_embeddings().num_embeddings)
    model_text = [*windows(cfg.corpora.evaluate, "test")]
    same_vocabulary = tokenizer.get_vocab() == dense_tokenizer.get_vocab()
    if same_vocabulary and [w.content_hash for w in model_text] == [w.content_hash for w in test]:
        return test
    if cfg.recovery == "distill":
        raise UserError(f"{SUBJECT}: Cannot distil '{name}': its tokenizer differs from that of '{cfg.model.name}'.")
    log.warning(
        "The tokenizers of '%s' and '%s' differ, so there is no KL, agreement, gap or ratio: perplexity is per token.",
        name, cfg.model.name,
    )  # fmt: skip
    return model_text


def _evaluate(
    run: Run, records: list[dict[str, Any]], model: PreTrainedModel, recovery: str, test: list[Windows]
) -> None:
    """Add the records of the dense model and of a model, on text in its tokens, unless they are in `records`."""
    finished_rows = {(r["stage"], r["recovery"]) for r in records}
    corpora = run.cfg.corpora
    # The other tool is assumed to have used the calibration text of these settings.
    leaked = leaks(run, also_used=[*corpora.scored, *corpora.drift, *corpora.recover])
    if DENSE not in finished_rows:
        results = [dense_perplexity(run, run.model, windows, "dense") for windows in run.text.test]
        add_row(run, records, DENSE, results, run.text.test, leaked, scope="model")
    row = ("model", recovery)
    if row not in finished_rows:
        results = [_perplexity_and_distance(run, model, windows, row_name(*row)) for windows in test]
        add_row(run, records, row, results, test, leaked, scope="model")


def _perplexity_and_distance(run: Run, model: PreTrainedModel, windows: Windows, name: str) -> PerplexityResult:
    """Perplexity of a model, with KL and agreement if the windows are those of the dense model."""

    def advance(tokens: int) -> None:
        """Count tokens of the model, which has no hook of the meter, and show them in the progress bar."""
        run.meter.add(tokens)
        run.screen.add_batch(tokens)

    run.screen.begin_part(f"Evaluating {name} on {windows.corpus}")
    # `_tokenized_for` returns the dense model's windows themselves if both models have the same tokenizer.
    same_tokenizer = any(windows is dense_windows for dense_windows in run.text.test)
    with run.folder.part(f"{name} on {windows.corpus}"):
        return perplexity_from_logits(model, windows, run.model if same_tokenizer else None, progress=advance)


def _recovered(run: Run, model: PreTrainedModel) -> PreTrainedModel:
    """Return a model after distillation from the dense model; the model is changed in place."""
    cfg = run.cfg
    material = Material(run.model, Masks([], []), fit=fit_once(run, "recovery/distill", "model"))
    recoveries = recoveries_of("distill", cfg.recovery_settings)
    return tune(recoveries, material, model, meter=run.meter, seed=cfg.run.seed)


def _export(run: Run, model: PreTrainedModel) -> None:
    """Write a recovered model to `model/` in the run folder, and compare the logits of the reloaded model."""
    if run.cfg.export.format == "none" or is_exported(run):
        return
    run.step(9, "Checking the recovered model")
    # The model is reloaded in a new process, which has this precision of matrix products.
    with run.folder.step("save_and_check"), matmul_precision("highest"), torch.no_grad():
        difference = export_and_reload(run, model)
    run.folder.update_manifest(logits={"sliced_minus_reloaded": difference})
