"""`gprune.measure`: perplexity, KL divergence and agreement of a model that gprune did not make."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.checks import require
from gprune.config import RunConfig
from gprune.config.elsewhere import without_pruning
from gprune.console import show_progress
from gprune.corpora.load import identity
from gprune.corpora.windows import Windows
from gprune.errors import UserError
from gprune.evaluation.perplexity import PerplexityResult, perplexity, perplexity_from_logits
from gprune.method.evaluate import as_record, cached_perplexity
from gprune.method.inputs import Text, load_dense, window_cutter
from gprune.method.plan import Plan, device_memory, make_plan
from gprune.models.loading import SUBJECT, check_elsewhere, fingerprint, load_elsewhere, load_tokenizer
from gprune.runs.numbers import Record, run_frame
from gprune.runs.trainer import matmul_precision
from gprune.storage.environment import peak_memory, reset_peak_memory

log = logging.getLogger("gprune")
GIB = 2**30


def measure(
    model: str | os.PathLike | PreTrainedModel, dense: str | os.PathLike, cfg: RunConfig | None = None
) -> pd.DataFrame:
    """Measure a causal language model that gprune did not make, and compare it with a dense model.

    The model may be dense or pruned, and of a type that gprune cannot prune. Perplexity in exp(nats per token) is
    measured on `--corpora.evaluate` for both models, and KL(dense || model) in nats per token and the agreement, the
    share of tokens with the same most likely token, for `model`. Both are computed from logits, so the model may have
    another head. If its tokenizer differs, it is measured on windows of its own tokens, without KL and agreement.

        cfg = gprune.config.parse(["--config", "protocol"])
        gprune.measure("peers/osscar", "smollm2-135m", cfg)

    Args:
        model: folder or hub id, which must load exactly as it was saved; or a loaded model, which is measured as it is
            and assumed to have the tokenizer of `dense`.
        dense: embedded name, folder or hub id of the dense model, whose structure must be known to gprune.
        cfg: the protocol: settings of `corpora`, `evaluation` and `trainer`, and `model.dtype`. A corpus counts as seen
            if `corpora.score`, `drift` or `recover` names it. Settings of pruning are ignored. Default: `RunConfig()`.

    Returns:
        All numbers with 95 % intervals over windows, one per line, as `PruningResult.to_frame`. The stages are `dense`
        and `measured`.

    Raises:
        UserError: if weights are missing, unexpected, of other shapes or quantised; if the model needs code of its own
            that `model.trust_remote_code` does not allow; if both models do not fit in memory; or if a setting, a
            corpus or a file is invalid.
    """
    cfg = RunConfig() if cfg is None else cfg
    require(cfg, RunConfig, "The configuration must be a RunConfig, such as gprune.RunConfig()")
    require(dense, (str, os.PathLike), "The dense model must be an embedded name, a folder or a hub id")
    if not isinstance(model, PreTrainedModel):
        require(model, (str, os.PathLike), "A model must be a folder, a hub id or a loaded PreTrainedModel")
        model = os.fspath(model)
    show_progress()
    cfg = without_pruning(cfg)
    cfg.model.name = os.fspath(dense)
    measured = measure_records(model, cfg)
    name = os.path.basename(os.path.normpath(model)) if isinstance(model, str) else type(model).__name__
    return run_frame(name, measured.records, measured.summary, measured.steps)


@dataclass(frozen=True)
class Measured:
    """Results of a measurement, as entries of the record of a list's row."""

    inputs: dict[str, Any]  # fingerprints of both models, and hashes of the text
    steps: dict[str, dict[str, float]]  # seconds, tokens and memory
    summary: dict[str, Any]
    records: list[Record]


class MeasurementPlan(Plan):
    """The plan of a measurement."""

    @cached_property
    def tokens(self) -> dict[int, tuple[int, int]]:
        """Largest numbers of tokens: of the dense model, of the model, and of the dense model again for KL."""
        return {10: (3 * self.cfg.evaluated_tokens, 0)}


def check_models(name: str, cfg: RunConfig) -> MeasurementPlan:
    """Check settings and both models, and return the plan, before weights are loaded.

    Raise UserError as `plan.make_plan`, and if the model is incomplete, too large for memory, or has too few positions.
    """
    plan = make_plan(cfg)
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
    return MeasurementPlan(plan.pricing, plan.budget, plan.why_precision)


def measure_records(model: str | PreTrainedModel, cfg: RunConfig) -> Measured:
    """Measure a model beside the dense model `cfg.model.name`; `cfg` is the result of `without_pruning`."""
    plan = make_plan(cfg) if isinstance(model, PreTrainedModel) else check_models(model, cfg)
    cfg, start, tokens = plan.cfg, time.monotonic(), Counter()
    reset_peak_memory()
    tokenizer = load_tokenizer(cfg.model.name, trust_remote_code=cfg.model.trust_remote_code)
    dense = load_dense(cfg, plan.device, tokenizer)
    if isinstance(model, PreTrainedModel):
        name, other, other_tokenizer = type(model).__name__, model, tokenizer
    else:
        options = {"dtype": getattr(torch, cfg.model.dtype), "trust_remote_code": cfg.model.trust_remote_code}
        name, (other, other_tokenizer) = model, load_elsewhere(model, **options)
        other = other.to(plan.device)
    cut = window_cutter(cfg, tokenizer, dense.get_input_embeddings().num_embeddings)
    test = [*cut(cfg.corpora.evaluate, "test")]
    test_of_model = _tokenized_for((name, other, other_tokenizer), tokenizer, cfg, test)
    inputs = {"model": fingerprint(dense), "made_elsewhere": fingerprint(other)}
    inputs["text"] = Text(train={}, learn=[], fresh=[], development=[], test=test).hashes()

    def count(number: int) -> None:
        tokens["forward_tokens"] += number

    def of_dense(windows: Windows) -> PerplexityResult:
        return perplexity(dense, windows, batch_size=cfg.corpora.batch_size, progress=count)

    def of_model(windows: Windows, same_text: bool) -> PerplexityResult:
        log.info("Evaluating %s on %s", name, windows.corpus)
        beside = dense if same_text else None
        count(windows.tokens.numel() if same_text else 0)
        return perplexity_from_logits(other, windows, beside, progress=count)

    precision = matmul_precision(cfg.trainer.float32_matmul_precision, fastest_on=plan.device)
    with precision, torch.no_grad(), _in_eval_mode(other):
        results = [cached_perplexity(cfg, inputs["model"], dense, windows, of_dense) for windows in test]
        results_of_model = [of_model(windows, test_of_model is test) for windows in test_of_model]
    records = _records(cfg, "dense", test, results) + _records(cfg, "measured", test_of_model, results_of_model)
    tokens["forward_backward_tokens"] = 0
    step = {"seconds": round(time.monotonic() - start, 2), **tokens, **peak_memory()}
    before, after = dense.num_parameters(), other.num_parameters()
    summary = {
        "sparsity_of_model": 1 - after / before, "parameters_before": before, "parameters_after": after, **tokens,
    }  # fmt: skip
    return Measured(inputs, {"evaluate": step}, summary, records)


def _tokenized_for(
    model: tuple[str, PreTrainedModel, PreTrainedTokenizerBase], tokenizer: PreTrainedTokenizerBase, cfg: RunConfig,
    test: list[Windows],
) -> list[Windows]:  # fmt: skip
    """Return the evaluated text in the tokens of a model; `test` itself if the tokenizer is that of the dense model.

    Two tokenizers are the same if they have the same vocabulary and give the same windows of the evaluated text.
    """
    name, loaded, own_tokenizer = model
    cut = window_cutter(cfg, own_tokenizer, loaded.get_input_embeddings().num_embeddings)
    own_text = [*cut(cfg.corpora.evaluate, "test")]
    same_vocabulary = own_tokenizer.get_vocab() == tokenizer.get_vocab()
    if same_vocabulary and [w.content_hash for w in own_text] == [w.content_hash for w in test]:
        return test
    log.warning(
        "The tokenizers of '%s' and '%s' differ, so there is no KL, agreement, gap or ratio: perplexity is per token.",
        name, cfg.model.name,
    )  # fmt: skip
    return own_text


@contextmanager
def _in_eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Context in which a model of the user is in eval mode, in which modules such as dropout do nothing."""
    training = model.training
    try:
        yield model.eval()
    finally:
        model.train(training)


def _records(cfg: RunConfig, stage: str, text: Sequence[Windows], results: Sequence[PerplexityResult]) -> list[Record]:
    """Return the records of a stage. The other tool is assumed to have used the calibration text of the settings."""
    corpora = cfg.corpora
    used = {identity(name) for name in (*cfg.train_corpora, *corpora.scored, *corpora.drift, *corpora.recover)}
    records = []
    for windows, result in zip(text, results, strict=True):
        leak = identity(windows.corpus) in used, 0.0
        records.append(as_record(cfg, stage, result, windows, leak, sparsity=0.0) | {"scope": "model"})
    return records
