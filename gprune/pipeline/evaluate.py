"""Step 10: perplexity of the dense model, the controls and the result, with the evaluation protocol."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from transformers import PreTrainedModel

from gprune.calibration.statistics import CorpusStatistics
from gprune.corpora.load import identity
from gprune.corpora.windows import JOIN, Windows
from gprune.evaluation.distance import perplexity_from_logits
from gprune.evaluation.leakage import SEEN_ABOVE, leaked_share_of_windows
from gprune.evaluation.perplexity import Forecast, PerplexityResult, perplexity, rank_and_world_size
from gprune.models.copies import sharded_copy
from gprune.models.embedded import model_label
from gprune.models.masks import Masks
from gprune.models.offload import device_of, load_parameter
from gprune.pipeline.cost import evaluated_tokens, keeps
from gprune.pipeline.recover import shrink
from gprune.pipeline.run import Run
from gprune.recoveries import recovery_of
from gprune.report.records import result_table
from gprune.runs import schema
from gprune.runs.folder import broadcast
from gprune.runs.numbers import row_name
from gprune.storage.cache import cache_dir
from gprune.storage.files import key_of, read_json, write_json

log = logging.getLogger("gprune")
LEARN = ("learn", "loss", "epochs", "centred", "learner")  # settings of `--sparsity` in records of learned masks


def evaluate(
    run: Run,
    statistics: Mapping[str, CorpusStatistics],
    masks: Mapping[str, Masks],
    pruned: PreTrainedModel | None = None,
) -> list[dict[str, Any]]:
    """Step 10: perplexity of the dense model, the controls and gprune on every evaluated corpus.

    Finished rows are read from `metrics.json`; the dense model's numbers are cached for other runs. Windows are split
    over processes, with the same bits as on one process; with `--model.shard` layers are sharded too.

    Args:
        run: the run.
        statistics: statistics by corpus.
        masks: masks by stage.
        pruned: the recovered model of the main row; other models are constructed here. None to evaluate only rows
            without recovery, whose table is shown before recovery.

    Returns:
        Flat records, one per number, as in `metrics.json`.
    """
    cfg, dense, early = run.cfg, ("dense", "none"), pruned is None
    run.step(9 if early else 10, "Evaluating without recovery" if early else "Evaluating")
    rows = [row for row in [dense, *cfg.stages] if not early or row[1] == "none"]
    records: list[dict[str, Any]] = broadcast(run.folder.metrics.get("records", []))
    done = {(r["stage"], r["recovery"]) for r in records}
    # Without an initialised process group, rank 0 evaluates alone.
    measures = rank_and_world_size()[1] > 1 or rank_zero_only.rank == 0
    leaked = leaks(run) if measures else {}
    with run.folder.step("evaluate_unrecovered" if early else "evaluate"):
        for row in rows:
            # All processes are needed for a recovery that trains.
            if row in done or not (measures or recovery_of(row[1]).learns):
                continue
            model = run.model if row == dense else pruned  # frees the model of the previous row
            if row not in (dense, cfg.own_row):
                with run.folder.part(row_name(*row)):
                    model = shrink(run, masks[row[0]], statistics, row=row)
            if not measures:
                continue
            if row[0] not in ("dense", "model"):
                run.meter.watch(model)
            name = row_name(*row)
            text = run.text.test
            if row[0] == "model":
                measure, text = measure_any_model, run.own_text
            elif row == dense:
                measure = dense_perplexity
            else:
                measure = measure_with_distance if same_head(model, run.model) else measure_perplexity
            model = spread(run, model)
            results = [measure(run, model, w, name) for w in text]
            pairs = zip(results, text, strict=True)
            records += [as_record(run, row, result, w, leaked[w.corpus]) for result, w in pairs]
            write_json(run.folder / "metrics.json", {"records": records}, run=run.folder.key)
    if early and measures and not run.folder.finished:
        log.info("Before recovery:\n\n%s\n", result_table(records).for_stdout())
    return records


def leaks(run: Run) -> dict[str, tuple[bool, float]]:
    """Return (seen, share of leaked 13-grams) for each evaluated corpus."""
    used = {identity(name) for name in run.cfg.train_corpora}
    by_corpus = {}
    for w in run.text.test:
        share, named = leaked_share_of_windows([w], run.text.used, run.tokenizer), identity(w.corpus) in used
        by_corpus[w.corpus] = (named or share > SEEN_ABOVE, share)
        if share > SEEN_ABOVE and not named:
            log.warning("%s shares %.1f%% of its 13-grams with used text, so it counts as seen.", w.corpus, 100 * share)
    return by_corpus


def spread(run: Run, model: PreTrainedModel) -> PreTrainedModel:
    """Return the model, or with `--model.shard` a copy with layers sharded over processes."""
    world = rank_and_world_size()[1]
    return sharded_copy(model, run.plan.device, world) if run.cfg.model.shard and world > 1 else model


def same_head(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Return whether two models have equal output embeddings. A recovery of the user may have changed them."""
    ours, theirs = (load_parameter(m.get_output_embeddings(), "weight") for m in (model, other))
    return torch.equal(ours, theirs.to(ours.device))


def dense_perplexity(
    run: Run, model: PreTrainedModel, windows: Windows, name: str, *,
    measure: Callable[..., PerplexityResult] | None = None,
) -> PerplexityResult:  # fmt: skip
    """Perplexity of the dense model, cached for all runs with the same model and text.

    Args:
        run: the run.
        model: the dense model, or its sharded copy.
        windows: the text.
        name: name of the row in the progress bar.
        measure: measures the model if the cache has no result. Default: `forecast`.
    """
    key = key_of(
        model=run.fingerprint, text=windows.content_hash, dtype=run.cfg.model.dtype,
        device=device_of(model).type, batch_size=run.cfg.corpora.batch_size, **run.cfg.matmul_settings,
    )  # fmt: skip
    path = cache_dir() / "evaluations" / f"{key}.json"
    if (cached := broadcast(read_json(path, check=schema.Measured.problem, sealed=True))) is not None:
        return PerplexityResult(**cached)
    result = (measure or forecast)(run, model, windows, name)
    write_json(path, {name: value for name, value in vars(result).items() if value is not None})
    return result


def forecast(run: Run, model: PreTrainedModel, windows: Windows, name: str) -> PerplexityResult:
    """Measure the dense model and keep its forecasts for KL: of all corpora, or of one corpus if all are too large.

    Forecasts that are kept are counted as one pass of the dense row, even if the perplexity was cached or a later
    session repeats the pass.
    """
    if not (
        all_kept := keeps(
            run.cfg, evaluated_tokens(run.cfg), run.model.config.get_text_config(decoder=True).hidden_size
        )
    ):
        run.forecasts.clear()
    kept = run.forecasts.setdefault(windows.content_hash, [])
    with run.folder.step("evaluate_unrecovered" if all_kept and run.cfg.evaluates_early else "evaluate"):
        return measure_perplexity(run, model, windows, "dense" if all_kept else name, kept)


def measure_with_distance(run: Run, model: PreTrainedModel, windows: Windows, name: str) -> PerplexityResult:
    """Perplexity of a row's model, with KL and agreement with the dense model."""
    if windows.content_hash not in run.forecasts:
        forecast(run, spread(run, run.model), windows, f"dense beside {name}")
    return measure_perplexity(run, model, windows, name, run.forecasts[windows.content_hash])


def measure_perplexity(
    run: Run, model: PreTrainedModel, windows: Windows, name: str, dense: list[Forecast] | None = None
) -> PerplexityResult:
    """Perplexity of a row's model, with a progress bar; batches are split over processes.

    Args:
        run: the run.
        model: the model.
        windows: the text.
        name: name of the row in the progress bar.
        dense: the argument `forecasts` of `perplexity`.
    """
    batch_size, advance = run.cfg.corpora.batch_size, run.screen.advance
    run.screen.begin_part(f"Evaluating {name} on {windows.corpus}")
    with run.folder.part(f"{name} on {windows.corpus}"):
        return perplexity(model, windows, batch_size=batch_size, progress=advance, shared=True, forecasts=dense)


def measure_any_model(run: Run, model: PreTrainedModel, windows: Windows, name: str) -> PerplexityResult:
    """Perplexity of a model of `--model.made_elsewhere`, with KL and agreement unless its tokenizer differs."""

    def advance(tokens: int) -> None:
        run.meter.add(tokens)
        run.screen.advance(tokens)

    run.screen.begin_part(f"Evaluating {name} on {windows.corpus}")
    dense = run.model if any(windows is of_dense for of_dense in run.text.test) else None
    with run.folder.part(f"{name} on {windows.corpus}"):
        return perplexity_from_logits(model, windows, dense, progress=advance)


def as_record(
    run: Run, row: tuple[str, str], result: PerplexityResult, w: Windows, leak: tuple[bool, float]
) -> dict[str, Any]:
    """Return a perplexity as a record of `metrics.json`, with its evaluation protocol.

    Args:
        run: the run.
        row: stage and recovery.
        result: the measurement.
        w: the text.
        leak: whether the corpus counts as seen, and its share of leaked 13-grams.
    """
    (stage, recovery), cfg = row, run.cfg
    gprune = stage == "gprune"
    switch, learned, ours = cfg.reliability, gprune and cfg.learns, stage not in ("dense", "model")
    removed = run.budget.sparsity if ours else 0.0
    return {
        "stage": stage,
        "importance": cfg.importance if ours else None,
        "allocation": None if not ours else cfg.sparsity.allocation if gprune else cfg.base_allocation,
        "partition": cfg.partition.method if gprune else None,
        "switch": switch.switch and len(cfg.corpora.drift) > 1 if gprune else None,
        "switch_to": switch.metric if gprune else None,
        "switch_everywhere": switch.everywhere if gprune else None,
        "learn": {n: v for n, v in cfg.settings()["sparsity"].items() if n in LEARN} if learned else None,
        "learn_samples": cfg.corpora.learn_samples or cfg.corpora.num_samples if learned else None,
        "recovery": recovery,
        "ridge": cfg.ridge if recovery_of(recovery).needs else None,
        **{n: dict(s) if n in recovery.split("+") else None for n, s in cfg.recovery_settings.items()},
        "sparsity": removed,
        "scope": "model" if cfg.final == "model" else cfg.sparsity.scope,
        **({} if cfg.sparsity.currency == "parameters" else {"cost": cfg.sparsity.currency}),
        "model": model_label(cfg.model.name),
        "corpora": cfg.roles,
        "corpus": w.corpus,
        "split": w.split,
        "seen": leak[0],
        "leaked_13grams": leak[1],
        **{name: value for name, value in vars(result).items() if value is not None},
        "seq_len": w.tokens.shape[1],
        "stride": w.tokens.shape[1],
        "bos": w.bos,
        "join": JOIN,
        "seed": cfg.run.seed,
        "dtype": cfg.model.dtype,
        "precision": cfg.trainer.precision,
        "float32_matmul_precision": cfg.trainer.float32_matmul_precision,
        "content_hash": w.content_hash,
    }
