"""Save masks and the model of step 9, and check that masked, sliced and reloaded logits agree."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gprune.errors import UserError
from gprune.export.convert import FORMATS, export, format_named
from gprune.export.hf import check_reload, save_pruned
from gprune.method.recover import loading_arguments, prune_and_recover
from gprune.method.run import Run
from gprune.models.agreement import LOGIT_LIMIT, compare, compared_windows, has_routers, random_masks
from gprune.models.families import record_of
from gprune.models.losses import iter_logits
from gprune.models.masks import Masks, masked
from gprune.models.offload import device_of, free_memory, is_offloaded
from gprune.models.surgery import slice_model
from gprune.runs.folder import changed_settings
from gprune.runs.trainer import matmul_precision
from gprune.storage.environment import environment

log = logging.getLogger("gprune")


def masked_logits(model: PreTrainedModel, masks: Masks, input_ids: Tensor) -> Tensor:
    """Return logits of the masked model, (B, T, V) float32, for token ids (B, T)."""
    with masked(model, masks):
        return model(input_ids=input_ids, use_cache=False).logits.float()


@torch.no_grad()
def save(run: Run, pruned: PreTrainedModel, masks: Masks) -> None:
    """Write masks and `model/`, and check that masked, sliced and reloaded logits agree."""
    save_masks(run, masks)
    cfg = run.cfg
    exports = cfg.export.format != "none"
    if "logits" not in run.folder.manifest or (exports and not is_exported(run)):
        run.step(9, "Checking the pruned model")
        # The model is reloaded in a new process, which has this precision of matrix products.
        with run.folder.step("save_and_check"), matmul_precision("highest"):
            checks = check_slices(run, pruned, masks)
            if exports:
                checks["sliced_minus_reloaded"] = export_and_reload(run, pruned)
        run.folder.update_manifest(logits=checks)
    if cfg.export.format in FORMATS:
        target = format_named(cfg.export.format)
        type = cfg.export.type if cfg.export.format == "gguf" else ""
        path = Path(target.path_beside(run.folder / "model", type))
        if not path.exists():
            log.info("Writing %s", path)
            with run.folder.step("export"):
                export(run.folder / "model", path, format=cfg.export.format, type=type)


def is_exported(run: Run) -> bool:
    """Return whether `model/` is that of an earlier session, in the requested dtype."""
    written_dtype = run.folder.manifest.get("exported_dtype")  # written after the model was checked
    if written_dtype is None or not (run.folder / "model").is_dir():
        return False
    return run.cfg.export.dtype in (None, written_dtype)  # without the flag a finished export keeps its dtype


def export_and_reload(run: Run, pruned: PreTrainedModel) -> float:
    """Write `model/` with the tokenizer. Return the largest difference of reloaded logits.

    It is 0.0, because `check_reload` raises UserError otherwise.
    """
    folder, dtype = run.folder / "model", run.plan.pricing.exported_dtype
    save_pruned(pruned, run.tokenizer, folder, overwrite=True, dtype=getattr(torch, dtype))
    options = {"dtype": getattr(torch, dtype), **loading_arguments(run)}
    difference = check_reload(pruned, folder, checked_tokens(run), **options)
    run.folder.update_manifest(exported_dtype=dtype)
    return difference


def save_masks(run: Run, masks: Masks) -> None:
    """Write `masks.safetensors`. Raise UserError if an earlier session has written other masks."""
    earlier = run.folder.read("masks")
    if earlier is None:
        run.folder.write("masks", dict(masks))
    elif Masks.from_tensors(earlier) != masks:
        differences = changed_settings(run.folder.manifest.get("environment") or {}, environment())
        unseen = "no version or machine differs, so a file or a variable that your code reads may have changed"
        raise UserError(
            f"Cannot resume with {run.folder / 'masks.safetensors'}: it has other masks "
            f"({'; '.join(differences) or unseen}). Choose another --run.name, or remove the folder."
        )


def check_slices(run: Run, pruned: PreTrainedModel, masks: Masks) -> dict[str, float]:
    """Compare logits of the sliced model and of the masked dense model on the first evaluated window.

    Return their differences, or raise UserError if they are too large.
    """
    cfg, device, ids = run.cfg, device_of(run.model), checked_tokens(run)
    # Recovery changes weights, so the comparison uses the model before recovery.
    unrecovered = pruned if cfg.recovery == "none" else prune_and_recover(run, masks, {}, recovery="none")
    sliced_logits = unrecovered(input_ids=ids.to(device), use_cache=False).logits.float().to(device)
    of_windows = [logits for logits, _, _ in iter_logits(unrecovered, ids.to(device))]
    perplexity_logits = torch.cat(of_windows).float().to(device)
    del of_windows
    del unrecovered  # frees the memory of a third model
    free_memory(run.plan.device)
    reference = masked_logits(run.model, masks, ids.to(device)).to(device)
    dtype = getattr(torch, cfg.model.dtype)
    difference = compare(reference, sliced_logits)
    limit = LOGIT_LIMIT[dtype] * difference.std
    perplexity_difference = compare(sliced_logits[:, :-1], perplexity_logits).rms
    if not perplexity_difference <= limit:  # also for NaN
        subject = f"Logits of model_type '{run.model.config.model_type}' computed for perplexity"
        raise UserError(
            f"{subject} must differ by {limit:.2e} or less; got {perplexity_difference:.2e}. Please report this model."
        )
    is_exact = dtype == torch.float32 and not has_routers(run.budget.units)
    measured = difference.largest if is_exact else difference.size(run.budget.units)
    if not measured <= limit:
        subject = "Logits of the sliced and the masked model"
        raise UserError(f"{subject} must differ by {limit:.2e} or less; got {measured:.2e}. Please report this model.")
    return {
        "tokens": ids.numel(),
        "std": difference.std,
        "masked_minus_sliced": difference.largest,
        "masked_minus_sliced_rms": difference.rms,
    }


@torch.no_grad()
def check_discovered_structure(run: Run) -> None:
    """Compare the masked with the sliced model before step 1, with a random half of the units, if they were discovered.

    The structure was found and checked on a tiny copy. The loaded model has the same class, but other settings. Nothing
    is compared if the structure is that of a written record, or if the model is offloaded.
    """
    if not record_of(run.model).found or is_offloaded(run.model):
        return
    masks = random_masks(run.model, share=0.5, scope=run.cfg.sparsity.scope)
    ids = checked_tokens(run).to(device_of(run.model))
    sliced_logits = slice_model(run.model, masks)(input_ids=ids, use_cache=False).logits.float()
    free_memory(run.plan.device)
    reference = masked_logits(run.model, masks, ids).to(sliced_logits.device)
    difference = compare(reference, sliced_logits)
    limit = LOGIT_LIMIT[getattr(torch, run.cfg.model.dtype)] * difference.std
    measured = difference.size(run.budget.units)
    if not measured <= limit:
        raise UserError(
            f"Model type '{run.model.config.model_type}' cannot be pruned: its structure, found on a tiny copy, does "
            "not fit this model. With half of the units removed, logits of the masked and the sliced model must differ "
            f"by {limit:.2e} or less; got {measured:.2e}. Write a function that returns its units "
            "in a file that --import names (docs/extend.md, 'A model type')."
        )


def checked_tokens(run: Run) -> Tensor:
    """Return the token ids for comparing logits, (windows, tokens)."""
    return compared_windows(run.text.test[0].tokens[:1, : run.cfg.evaluation.compared_tokens], run.budget.units)
