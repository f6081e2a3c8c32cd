"""Steps 9 and 10: perplexity of the dense, the pruned and the recovered model, with the evaluation protocol."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.config import RunConfig
from gprune.corpora.load import identity
from gprune.corpora.windows import JOIN, Windows
from gprune.evaluation.perplexity import Forecast, PerplexityResult, perplexity, rank_and_world_size
from gprune.method.run import Run
from gprune.method.says import continue_prompts
from gprune.models.embedded import model_label
from gprune.models.losses import same_head
from gprune.models.offload import device_of
from gprune.recoveries import recovery_needs
from gprune.report.tables import result_table
from gprune.runs.folder import broadcast
from gprune.runs.numbers import STAGES, run_frame
from gprune.storage.environment import model_versions
from gprune.storage.files import Cache, key_of, write_json

log = logging.getLogger("gprune")
LEARNING_SETTINGS = ("learn", "loss", "epochs", "centred")  # of `--sparsity`, in records of learned masks
SEEN_ABOVE = 0.01  # leaked share above which a corpus counts as seen


def evaluate(run: Run, stage: str, model: Callable[[], PreTrainedModel]) -> list[dict[str, Any]]:
    """Steps 9 and 10: perplexity of the dense model, and of a stage of the pruned model, on every evaluated corpus.

    `model()` returns the model of the stage, and is called unless `metrics.json` has its records. The dense model's
    numbers are cached for other runs. Windows are split over processes, with the same bits as on one process. Returns
    the records of all stages so far.
    """
    cfg = run.cfg
    is_final = stage == cfg.final_stage
    if is_final:
        run.step(10, "Evaluating")
    else:
        run.step(9, "Evaluating before recovery")
    records: list[dict[str, Any]] = broadcast(run.folder.metrics.get("records", []))
    finished_stages = {r["stage"] for r in records}
    # Without an initialised process group, rank 0 evaluates alone.
    if rank_and_world_size()[1] == 1 and rank_zero_only.rank != 0:
        return records
    leaked = leaks(run, records)
    with run.folder.step("evaluate" if is_final else "evaluate_pruned"):
        for name, model_of_stage in (("dense", lambda: run.model), (stage, model)):
            if name in finished_stages:
                continue
            evaluated = model_of_stage()
            measure = measurement_of(run, name, evaluated)
            results = [measure(run, evaluated, windows, name) for windows in run.text.test]
            continue_prompts(run, name, evaluated)
            add_stage(run, records, name, results, run.text.test, leaked)
    if not (is_final or run.folder.finished):
        log.info("Before recovery:\n\n%s\n", result_table(run_frame("", records)).for_stdout())
    return records


def add_stage(
    run: Run, records: list[dict[str, Any]], stage: str, results: Sequence[PerplexityResult],
    text: Sequence[Windows], leaked: Mapping[str, tuple[bool, float]],
) -> None:  # fmt: skip
    """Add the records of a stage to `records` and `metrics.json`, in the order of `STAGES`."""
    for windows, result in zip(text, results, strict=True):
        leak = leaked[windows.corpus]
        records.append(as_record(run.cfg, stage, result, windows, leak, sparsity=run.budget.sparsity))
    records.sort(key=lambda r: STAGES.index(r["stage"]))
    write_json(run.folder / "metrics.json", {"records": records})


def measurement_of(run: Run, stage: str, model: PreTrainedModel) -> Callable[..., PerplexityResult]:
    """Return the function that measures the model of a stage, and count a pruned model's tokens from now on."""
    if stage == "dense":  # counted since the run was opened
        return partial(dense_perplexity, keep_forecasts=True)
    run.meter.watch(model)
    # A recovery of the user may have changed the head.
    return measure_with_distance if same_head(model, run.model) else measure_perplexity


def leaks(run: Run, records: Sequence[Mapping[str, Any]] = ()) -> dict[str, tuple[bool, float]]:
    """Return for each evaluated corpus whether it counts as seen, and the share of its 13-grams in used text.

    A corpus counts as seen if the run uses its train split, or if the share is above `SEEN_ABOVE`. If the share is the
    only reason, a warning is logged. Corpora of `records` are not measured again.
    """
    used_corpora = {identity(name) for name in run.cfg.train_corpora}
    by_corpus = {r["corpus"]: (r["seen"], r["leaked_13grams"]) for r in records}
    for windows in run.text.test:
        if windows.corpus in by_corpus:
            continue
        corpus, is_used = windows.corpus, identity(windows.corpus) in used_corpora
        share = leaked_share_of_windows([windows], run.text.used, run.tokenizer)
        by_corpus[corpus] = (is_used or share > SEEN_ABOVE, share)
        if share > SEEN_ABOVE and not is_used:
            log.warning("%s shares %.1f%% of its 13-grams with used text, so it counts as seen.", corpus, 100 * share)
    return by_corpus


def dense_perplexity(
    run: Run, model: PreTrainedModel, windows: Windows, name: str, *, keep_forecasts: bool = False
) -> PerplexityResult:
    """Perplexity of the dense model, cached for all runs with the same model and text."""
    measure = measure_and_keep_forecasts if keep_forecasts else measure_perplexity
    return cached_perplexity(run.cfg, run.fingerprint, model, windows, lambda w: measure(run, model, w, name))


def cached_perplexity(
    cfg: RunConfig, fingerprint: str, model: PreTrainedModel, windows: Windows,
    measure: Callable[[Windows], PerplexityResult],
) -> PerplexityResult:  # fmt: skip
    """Return `measure(windows)` of a dense model from the cache, by its fingerprint and the settings of its bits."""
    key = key_of(
        model=fingerprint, text=windows.content_hash, dtype=cfg.model.dtype, device=device_of(model).type,
        batch_size=cfg.corpora.batch_size, **cfg.matmul_settings, versions=model_versions(),
    )  # fmt: skip

    def compute() -> dict[str, Any]:
        return {name: value for name, value in vars(measure(windows)).items() if value is not None}

    return PerplexityResult(**Cache("evaluations").get(key, compute, share=broadcast))


def measure_and_keep_forecasts(run: Run, model: PreTrainedModel, windows: Windows, name: str) -> PerplexityResult:
    """Measure the dense model, and keep its forecasts in `run.forecasts` for the KL divergence of other stages.

    A `Forecast` has the dense model's numbers per token that KL and agreement need: (T - 1, H) of each window. If the
    forecasts of all corpora are too large, only those of the last measured corpus are kept.

    If all forecasts are kept, their tokens are counted as the one pass of the dense model, even if its perplexity was
    cached or a later session repeats the pass.
    """
    keeps_all = run.plan.keeps_forecasts
    if not keeps_all:
        run.forecasts.clear()
    forecasts = run.forecasts.setdefault(windows.content_hash, [])  # filled by `perplexity`
    step = "evaluate_pruned" if keeps_all and run.cfg.measures_pruned else "evaluate"
    with run.folder.step(step):
        return measure_perplexity(run, model, windows, "dense" if keeps_all else name, forecasts)


def measure_with_distance(run: Run, model: PreTrainedModel, windows: Windows, name: str) -> PerplexityResult:
    """Perplexity of a model, with KL and agreement with the dense model."""
    if windows.content_hash not in run.forecasts:
        measure_and_keep_forecasts(run, run.model, windows, f"dense beside {name}")
    return measure_perplexity(run, model, windows, name, run.forecasts[windows.content_hash])


def measure_perplexity(
    run: Run, model: PreTrainedModel, windows: Windows, name: str, forecasts: list[Forecast] | None = None
) -> PerplexityResult:
    """Perplexity of a model, with a progress bar; batches are split over processes."""
    batch_size, advance = run.cfg.corpora.batch_size, run.screen.add_batch
    run.screen.begin_part(f"Evaluating {name} on {windows.corpus}")
    with run.folder.part(f"{name} on {windows.corpus}", shared=True):
        return perplexity(model, windows, batch_size=batch_size, progress=advance, shared=True, forecasts=forecasts)


def as_record(
    cfg: RunConfig, stage: str, result: PerplexityResult, windows: Windows, leak: tuple[bool, float], *,
    sparsity: float,
) -> dict[str, Any]:  # fmt: skip
    """Return a perplexity as a record of `metrics.json`, with its evaluation protocol and its entry of `leaks`.

    `sparsity` is that of the budget.
    """
    is_pruned = stage in ("pruned", "recovered")
    recovery = cfg.recovery if stage == "recovered" else "none"
    chain = recovery.split("+")
    recovery_settings = {
        name: dict(options) if name in chain else None for name, options in cfg.recovery_settings.items()
    }
    return {
        "stage": stage,
        **_pruning_settings(cfg, is_pruned=is_pruned),
        "recovery": recovery,
        # Errors of blocks, by which `reconstruction` allocates, assume least squares with this penalty.
        "ridge": cfg.ridge if recovery_needs(recovery) or (is_pruned and cfg.measures_errors) else None,
        **recovery_settings,
        "sparsity": sparsity if is_pruned else 0.0,
        "scope": cfg.sparsity.scope,
        **({} if cfg.sparsity.currency == "parameters" else {"cost": cfg.sparsity.currency}),
        "model": model_label(cfg.model.name),
        "corpora": cfg.roles,
        "corpus": windows.corpus,
        "split": windows.split,
        "seen": leak[0],
        "leaked_13grams": leak[1],
        **{name: value for name, value in vars(result).items() if value is not None},
        "seq_len": windows.tokens.shape[1],
        "stride": windows.tokens.shape[1],
        "bos": windows.bos,
        "join": JOIN,
        "seed": cfg.run.seed,
        "dtype": cfg.model.dtype,
        "precision": cfg.trainer.precision,
        "float32_matmul_precision": cfg.trainer.float32_matmul_precision,
        "content_hash": windows.content_hash,
    }


def _pruning_settings(cfg: RunConfig, *, is_pruned: bool) -> dict[str, Any]:
    """Return the settings by which the masks were made. Settings that a model does not use are None."""
    settings = {"importance": None, "allocation": None, "partition": None, "switch": None, "switch_to": None}
    settings |= {"switch_everywhere": None, "learn": None, "learn_samples": None}
    if not is_pruned:
        return settings
    settings |= {"importance": cfg.metrics, "allocation": cfg.base_allocation}
    if not cfg.gprune:
        return settings
    settings["allocation"] = cfg.sparsity.allocation
    settings["partition"] = cfg.partition.method
    settings["switch"] = cfg.reliability.switch and len(cfg.corpora.drift) > 1
    settings["switch_to"] = cfg.reliability.metric
    settings["switch_everywhere"] = cfg.reliability.everywhere
    if cfg.learns:
        sparsity_settings = cfg.settings()["sparsity"]
        settings["learn"] = {name: value for name, value in sparsity_settings.items() if name in LEARNING_SETTINGS}
        settings["learn_samples"] = cfg.corpora.learn_samples or cfg.corpora.num_samples
    if cfg.stages:
        settings["stages"] = cfg.stages
    return settings


def leaked_share(evaluated: Sequence[str], used: Sequence[str], n: int = 13) -> float:
    """Return the share of the n-grams in `evaluated` (each occurrence counts) that occur anywhere in `used`, in [0, 1].

    Words are lower-cased runs of letters and digits of any script; n-grams of `n` words do not cross documents. Scripts
    without spaces have few "words", so the check is weak for them. Without any n-gram the share is 0.
    """
    counts = Counter(gram for text in evaluated for gram in _ngrams(text, n))
    total = counts.total()
    # Only n-grams of the evaluated text, which is smaller, stay in memory; the used text is streamed.
    # An n-gram is removed when it is found, so that its occurrences are added once.
    leaked = sum(counts.pop(gram, 0) for text in used for gram in _ngrams(text, n))
    return leaked / total if total else 0.0


def leaked_share_of_windows(
    evaluated: Sequence[Windows], used: Sequence[Windows], tokenizer: PreTrainedTokenizerBase
) -> float:
    """Compute `leaked_share` of decoded windows. Their n-grams may cross documents."""

    def decode(corpora: Sequence[Windows]) -> list[str]:
        """Return the text of each window, without a BOS token."""
        texts = []
        for windows in corpora:
            first_token = 1 if windows.bos else 0
            texts += tokenizer.batch_decode(windows.tokens[:, first_token:].tolist())
        return texts

    return leaked_share(decode(evaluated), decode(used))


def _ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    """Yield the n-grams of words in a text. Words are lower-cased runs of letters and digits of any script."""
    words = re.findall(r"[^\W_]+", text.lower())
    return zip(*(words[i:] for i in range(n)), strict=False)
