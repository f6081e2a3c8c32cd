"""Steps 9 and 10: from keep masks to a smaller model that reloads, and to numbers with their protocol."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune import report, tracking
from gprune.architectures import Block, blocks_of
from gprune.artifacts import file_hashes, key_of, read_json, replacing, write_json
from gprune.assets import cache_dir
from gprune.config import RunConfig
from gprune.corpora import identity
from gprune.data import Windows
from gprune.errors import UserError
from gprune.evaluation.leakage import SEEN_ABOVE, leaked_share_of_windows
from gprune.evaluation.perplexity import PerplexityResult, generalisation_gap, geometric_mean, perplexity
from gprune.export import export as write_as
from gprune.export.hf import check_reload, save_pruned, stock_skeleton
from gprune.gates import masked
from gprune.loading import load_weights
from gprune.masks import Masks, UnitCosts
from gprune.offload import device_of, is_offloaded, keep_until_gone, scratch_folder
from gprune.preparation import JOIN, Text, check_tokens
from gprune.recovery import SEQUENTIAL, recover_projection
from gprune.results import Modules
from gprune.sequential import PrunedPrefix
from gprune.session import Run
from gprune.statistics import KINDS, CorpusStatistics, pooled
from gprune.surgery import count_parameters, prune, prune_to_files, removed_parameters, widths
from gprune.walk import Walk

log = logging.getLogger("gprune")
# Masked against sliced logits, in standard deviations: sums of the same terms in another order. float32: the largest
# difference. 16-bit types, which round at every step of every block: the root mean square. bfloat16 was seen at 0.02 to
# 0.2 (most where pruning has spoiled the model; the same masks in float32: 1.5e-5); a wrong slice is off by 1 or so.
LOGIT_LIMIT = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.5}


@torch.no_grad()
def shrink(
    cfg: RunConfig,
    run: Run,
    model: PreTrainedModel,
    text: Text,
    masks: Masks,
    statistics: Mapping[str, CorpusStatistics],
    *,
    recovery: str,
) -> PreTrainedModel:
    """Step 9: a copy of the model with smaller weights, its output projections recovered as asked.

    That of an offloaded model is written block by block below the cache, and loaded as the model was. Under ddp every
    process computes all of it, to the same bits.
    """
    if recovery in SEQUENTIAL:
        batches = [ids for c in cfg.corpora.recover for ids in text.train[c].tokens.split(cfg.corpora.batch_size)]
        prefix = PrunedPrefix(model, masks, batches, ridge=cfg.ridge)
        small = _shrink(cfg, model, masks, prefix.recover)
        run.meter.add(prefix.tokens // len(masks.ffn))
        return small
    return _shrink(cfg, model, masks, None if recovery == "none" else by_projection(cfg, masks, statistics, recovery))


def by_projection(
    cfg: RunConfig, masks: Masks, statistics: Mapping[str, CorpusStatistics], recovery: str
) -> Callable[[Block, Block], None]:
    """What recovers a sliced block, given the dense one and it, by each projection's statistics."""
    pool = pooled(statistics[c] for c in cfg.corpora.recover)

    def recover(dense: Block, block: Block) -> None:
        keeps = masks.channels(dense)
        for kind, part in KINDS:
            if not bool(keeps[kind].all()):
                moments = getattr(pool, kind)[dense.index].total
                block.parts[part].set(*recover_projection(
                    dense.parts[part].weight.cpu(), keeps[kind], moments,
                    experts=dense.experts if kind == "ffn" else 1, method=recovery, ridge=cfg.ridge,
                ))  # fmt: skip

    return recover


def _shrink(
    cfg: RunConfig, model: PreTrainedModel, masks: Masks, recover: Callable[[Block, Block], None] | None
) -> PreTrainedModel:
    if is_offloaded(model):
        return _shrink_offloaded(cfg, model, masks, recover)
    small = prune(model, masks)
    if recover is not None:
        stay = [dense for dense, kept in zip(blocks_of(model), masks.blocks, strict=True) if kept]
        for dense, block in zip(stay, blocks_of(small), strict=True):
            recover(dense, block)
    return small


def _shrink_offloaded(
    cfg: RunConfig, model: PreTrainedModel, masks: Masks, recover: Callable[[Block, Block], None] | None
) -> PreTrainedModel:
    folder, removal = scratch_folder()
    with removal:
        save_pruned(prune_to_files(model, masks, folder / "blocks", recover), None, folder / "model")
        shutil.rmtree(folder / "blocks")
        small = load_weights(folder / "model", dtype=getattr(torch, cfg.model.dtype), **placement(cfg))
        keep_until_gone(small, removal.pop_all())
    return small


def placement(cfg: RunConfig) -> dict[str, Any]:
    """Where weights go, for what loads a model; nothing where the trainer's device says it all."""
    m = cfg.model
    return {} if m.device_map is None else {"device_map": m.device_map, "max_memory": m.max_memory}


def masked_logits(model: PreTrainedModel, masks: Masks, input_ids: Tensor) -> Tensor:
    """(B, T, V) float32 logits of the model as if pruned."""
    with masked(model, masks):
        if not is_offloaded(model):
            return model(input_ids=input_ids, use_cache=False).logits.float()
        walk = Walk(model)  # masks on experts need the weights there
        walk.add(input_ids)
        return next(walk.logits()).float()


@tracking.on_process_zero
@torch.no_grad()
def save_and_check(
    cfg: RunConfig,
    run: Run,
    model: PreTrainedModel,
    pruned: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    candidates: Mapping[str, Masks],
    final: str,
    text: Text,
) -> None:
    """Write masks and `model/`, and compare masked, sliced and reloaded logits before anything is called finished.

    Raises:
        UserError: if they differ by more than float rounding; the model folder is then removed.
    """
    for name, masks in candidates.items():
        path = run.folder / f"masks/{name}.safetensors"
        if (found := run.folder.read(f"masks/{name}")) is None:
            run.folder.write(f"masks/{name}", masks.tensors())
        elif Masks.from_tensors(found) != masks:
            raise UserError(
                f"{path} holds other masks than these settings give now: another machine, thread count or version "
                f"wrote it. Choose another --run.name, or remove the folder."
            )
    export = cfg.export != "none"
    manifest = run.folder.manifest
    if "logits" in manifest and (not export or manifest.get("model") == file_hashes(run.folder / "model")):
        also_gguf(cfg, run)
        return
    log.info("Saving the pruned model and checking that it reloads" if export else "Checking the pruned model")
    with run.folder.step("save_and_check"):
        ids = text.test[0].tokens[:1, : check_tokens(cfg)]
        device = device_of(model)
        # Recovery changes weights on purpose: what a mask and its slice must agree on comes before it.
        plain = pruned
        if cfg.recovery != "none":
            plain = shrink(cfg, run, model, text, candidates[final], {}, recovery="none")
        sliced = plain(input_ids=ids.to(device), use_cache=False).logits.float().to(device)
        reference = masked_logits(model, candidates[final], ids.to(device)).to(device)
        checks = {
            "tokens": ids.numel(),
            "std": float(reference.std()),
            "masked_minus_sliced": float((reference - sliced).abs().max()),
            "masked_minus_sliced_rms": float((reference - sliced).square().mean().sqrt()),
        }
        limit = LOGIT_LIMIT[cfg.model.dtype] * checks["std"]
        found = checks["masked_minus_sliced" if cfg.model.dtype == "float32" else "masked_minus_sliced_rms"]
        if not found <= limit:
            raise UserError(
                f"The sliced model's logits differ from the masked model's by {found:.2e}; "
                f"expected at most {limit:.2e}, which is rounding. Please report this model."
            )
        if export:
            card = report.model_card(cfg, stock=stock_skeleton(pruned) is not None)
            folder = save_pruned(pruned, tokenizer, run.folder / "model", model_card=card, overwrite=True)
            checks["sliced_minus_reloaded"] = check_reload(pruned, folder, ids, **placement(cfg))
            run.folder.update_manifest(model=file_hashes(folder))
        run.folder.update_manifest(logits=checks)
    also_gguf(cfg, run)


def also_gguf(cfg: RunConfig, run: Run) -> None:
    """The file of `--export gguf`, from the folder that has been checked; one that is there already stays."""
    path = run.folder / "model-f16.gguf"
    if cfg.export == "gguf" and not path.exists():
        log.info("Writing %s and checking that llama.cpp computes the same", path)
        with run.folder.step("export_gguf"):
            write_as(run.folder / "model", to="gguf", output=path)


def evaluate(
    cfg: RunConfig,
    run: Run,
    model: PreTrainedModel,
    candidates: Mapping[str, Masks],
    statistics: Mapping[str, CorpusStatistics],
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ready: Mapping[tuple[str, str], PreTrainedModel],
) -> list[dict[str, Any]]:
    """Step 10: perplexity of the dense model, the controls and gprune on every evaluated corpus.

    Finished stages are taken from `metrics.json`; the dense model's numbers are shared between runs.

    Args:
        ready: pruned models there are already, by (stage, recovery).

    Returns:
        Flat records, one per number, as in `metrics.json`.
    """
    path = run.folder / "metrics.json"
    content = read_json(path, run=run.folder.key) or {}
    records: list[dict[str, Any]] = content.get("records", [])
    done = {(r["stage"], r["recovery"]) for r in records}
    seen = leaks(cfg, text, tokenizer)
    with run.folder.step("evaluate"):
        if ("dense", "none") not in done:
            results = [dense_perplexity(cfg, run, model, w) for w in text.test]
            records += [record(cfg, "dense", "none", r, w, seen) for r, w in zip(results, text.test, strict=True)]
        for stage, recovery in cfg.stages:
            if (stage, recovery) in done:
                continue
            name = report.row_name(stage, recovery)
            log.info("Evaluating %s", name)
            small = ready.get((stage, recovery))
            if small is None:
                small = shrink(cfg, run, model, text, candidates[stage], statistics, recovery=recovery)
            run.meter.watch(small)
            for w in text.test:
                r = perplexity(small, w, batch_size=cfg.corpora.batch_size, progress=f"Evaluating {name} on {w.corpus}")
                records.append(record(cfg, stage, recovery, r, w, seen))
            write_json(path, {"records": records}, run=run.folder.key)
    return records


def leaks(cfg: RunConfig, text: Text, tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[bool, float]]:
    """(seen, share of leaked 13-grams) by evaluated corpus."""
    used = {identity(name) for name in cfg.used}
    found = {}
    for w in text.test:
        share, named = leaked_share_of_windows([w], text.used, tokenizer), identity(w.corpus) in used
        found[w.corpus] = (named or share > SEEN_ABOVE, share)
        if share > SEEN_ABOVE and not named:
            log.warning("%s shares %.1f%% of its 13-grams with used text: counted as seen.", w.corpus, 100 * share)
    return found


def dense_perplexity(cfg: RunConfig, run: Run, model: PreTrainedModel, windows: Windows) -> PerplexityResult:
    """The dense model's perplexity, shared between runs of the same model and text."""
    key = key_of(
        model=run.fingerprint, text=windows.content_hash, dtype=cfg.model.dtype,
        device=device_of(model).type, batch_size=cfg.corpora.batch_size,
    )  # fmt: skip
    path = cache_dir() / "evaluations" / f"{key}.json"
    try:
        return PerplexityResult(**read_json(path))
    except TypeError:  # missing, not whole, or foreign
        result = perplexity(
            model,
            windows,
            batch_size=cfg.corpora.batch_size,
            progress=f"Evaluating dense on {windows.corpus}",
        )
        write_json(path, vars(result))
        return result


def record(
    cfg: RunConfig,
    stage: str,
    recovery: str,
    result: PerplexityResult,
    w: Windows,
    seen: Mapping[str, tuple[bool, float]],
) -> dict[str, Any]:
    """One number with everything needed to repeat it."""
    dense, learned = stage == "dense", (stage == "gprune" and cfg.learns) or None
    return {
        "stage": stage,
        "importance": None if dense else cfg.importance,
        "allocation": None if dense else cfg.sparsity.allocation if stage == "gprune" else cfg.base_allocation,
        "partition": cfg.partition.method if stage == "gprune" else None,
        "switch": cfg.reliability.switch and len(cfg.corpora.drift) > 1 if stage == "gprune" else None,
        "switch_to": cfg.reliability.metric if stage == "gprune" else None,
        "switch_everywhere": cfg.reliability.everywhere if stage == "gprune" else None,
        "learn": learned and {n: getattr(cfg.sparsity, n) for n in ("learn", "loss", "objective", "through", "epochs")},
        "learn_samples": learned and (cfg.corpora.learn_samples or cfg.corpora.num_samples),
        "recovery": recovery,
        "ridge": None if recovery == "none" else cfg.ridge,
        "sparsity": 0.0 if dense else cfg.sparsity.target,
        "scope": cfg.sparsity.scope,
        "model": report.model_label(cfg.model.name),
        "corpora": cfg.roles,
        "corpus": w.corpus,
        "split": w.split,
        "seen": seen[w.corpus][0],
        "leaked_13grams": seen[w.corpus][1],
        "perplexity": result.perplexity,
        "nll": result.nll,
        "tokens": result.tokens,
        "window_nll": result.window_nll,
        "seq_len": w.tokens.shape[1],
        "stride": w.tokens.shape[1],
        "bos": False,
        "join": JOIN,
        "seed": cfg.run.seed,
        "dtype": cfg.model.dtype,
        "content_hash": w.content_hash,
    }


def summarise(
    cfg: RunConfig,
    run: Run,
    records: Sequence[dict[str, Any]],
    candidates: Mapping[str, Masks],
    costs: UnitCosts,
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    modules: Modules | None,
) -> dict[str, Any]:
    """The run's headline: sparsities reached, means, gaps and ratios; into manifest, metrics.json, W&B and figures."""
    final = "gprune" if cfg.gprune else "base"
    before, after = count_parameters(dense, "all"), count_parameters(pruned, "all")
    table = report.by_stage(records)
    dense_ppl, seen = table[("dense", "none")], {r["corpus"]: r["seen"] for r in records}
    rows = {}
    for (stage, recovery), values in table.items():
        rows[report.row_name(stage, recovery)] = {
            "seen": _number(geometric_mean(v for c, v in values.items() if seen[c])),
            "unseen": _number(geometric_mean(v for c, v in values.items() if not seen[c])),
            "gap": None if stage == "dense" else _number(generalisation_gap(values, dense_ppl, seen)),
        }
    summary = {
        "sparsity_of_scope": removed_parameters(dense, candidates[final]) / costs.total,
        "sparsity_of_model": 1 - after / before,
        "parameters_before": before,
        "parameters_after": after,
        "geometric_means": rows,
        "unseen_over_base": report.unseen_ratios(records),
        **run.folder.total_tokens(),
    }
    run.folder.update_manifest(summary=summary, widths=widths(pruned))
    write_json(run.folder / "metrics.json", {"summary": summary, "records": list(records)}, run=run.folder.key)
    if cfg.export != "none":  # the card, now that there is something to say
        card = report.model_card(cfg, stock=stock_skeleton(pruned) is not None, records=records)
        with replacing(run.folder / "model" / "README.md") as new:
            new.write_text(card, encoding="utf-8")
        run.folder.update_manifest(model=file_hashes(run.folder / "model", "README.md"))
    draw = tracking.on_process_zero(report.write_figures)
    figures = draw(run.folder / "figures", records, modules, candidates[final])
    tracking.log_images(run.loggers, figures)
    columns = ["stage", "recovery", "corpus", "seen", "perplexity", "nll", "tokens"]
    tracking.log_table(run.loggers, "perplexity", [{c: r[c] for c in columns} for r in records])
    flat = {f"summary/{row}/{name}": v for row, values in rows.items() for name, v in values.items() if v is not None}
    flat |= {f"summary/{row}/unseen_over_base": v["ratio"] for row, v in summary["unseen_over_base"].items()}
    tracking.log_scalars(run.loggers, flat, step=0)
    return summary


def _number(value: float) -> float | None:
    """JSON has no NaN: what is undefined is null."""
    return value if math.isfinite(value) else None
