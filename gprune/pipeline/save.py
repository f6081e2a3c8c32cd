"""Save masks and the model of step 9, after checking that masked, sliced and reloaded logits agree."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gprune.calibration.layerwise import Walk
from gprune.errors import UserError
from gprune.export.convert import export
from gprune.export.hf import check_reload, save_pruned
from gprune.models.losses import iter_logits
from gprune.models.masks import Masks
from gprune.models.offload import device_of, free_memory, is_offloaded
from gprune.pipeline.cost import compared_tokens
from gprune.pipeline.recover import placement, shrink
from gprune.pipeline.run import Run
from gprune.runs.trainer import multiplying
from gprune.sparsity.gates import masked
from gprune.storage.files import file_hashes

log = logging.getLogger("gprune")
# Limits for differences between masked and sliced logits, in standard deviations. Sums have the same terms in another
# order. float32: largest difference. 16-bit types, which round at every step of every block: root mean square. In
# bfloat16 we measured 0.02 to 0.2 (most in models that pruning has damaged; 1.5e-5 with the same masks in float32). A
# wrong slice gives about 1.
LOGIT_LIMIT = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.5}


def masked_logits(model: PreTrainedModel, masks: Masks, input_ids: Tensor) -> Tensor:
    """Logits of the masked model, (B, T, V) float32."""
    with masked(model, masks):
        if not is_offloaded(model):
            return model(input_ids=input_ids, use_cache=False).logits.float()
        walk = Walk(model)  # masks of experts need loaded weights
        walk.add(input_ids)
        return next(walk.logits()).float()


@torch.no_grad()
def save(run: Run, pruned: PreTrainedModel, masks: Mapping[str, Masks]) -> None:
    """Write masks and `model/`, and check that masked, sliced and reloaded logits agree.

    Args:
        run: the run.
        pruned: the model of the main row, after recovery.
        masks: masks by stage.
    """
    if run.cfg.own_row == ("model", "none"):  # the user has this model already
        return
    if run.cfg.final != "model":
        save_masks(run, masks)
    cfg, folder, manifest = run.cfg, run.folder / "model", run.folder.manifest
    exports, written = cfg.export.format != "none", manifest.get("exported_dtype", cfg.model.dtype)
    changed = cfg.export.dtype not in (None, written)  # without the flag a finished export keeps its dtype
    if "logits" not in manifest or (exports and (changed or manifest.get("model") != file_hashes(folder))):
        run.step(9, "Checking the pruned model")
        with run.folder.step("save_and_check"), multiplying("highest"):  # the precision of the process that reloads it
            checks = {} if cfg.final == "model" else check_slices(run, pruned, masks[cfg.final])
            if exports:
                dtype = run.plan.pricing.exported_dtype
                save_pruned(pruned, run.tokenizer, folder, overwrite=True, dtype=getattr(torch, dtype))
                checks["sliced_minus_reloaded"] = check_reload(
                    pruned, folder, checked_tokens(run), dtype=getattr(torch, dtype), **placement(run)
                )
                run.folder.update_manifest(model=file_hashes(folder), replace=True, exported_dtype=dtype)
        run.folder.update_manifest(logits=checks)
    gguf = run.folder / f"model-{cfg.export.type}.gguf"
    if cfg.export.format == "gguf" and not gguf.exists():
        log.info("Writing %s and comparing it with llama.cpp", gguf)
        with run.folder.step("export_gguf"):
            export(folder, gguf, type=cfg.export.type)


def save_masks(run: Run, masks: Mapping[str, Masks]) -> None:
    """Write the masks of every stage. Masks of an earlier session must be equal."""
    for name, of_stage in masks.items():
        if (before := run.folder.read(f"masks/{name}")) is None:
            run.folder.write(f"masks/{name}", of_stage.tensors())
        elif Masks.from_tensors(before) != of_stage:
            reason = "it has other masks, from another machine, number of threads or version"
            file = run.folder / f"masks/{name}.safetensors"
            raise UserError(f"Cannot resume with {file}: {reason}. Choose another --run.name, or remove the folder.")


def check_slices(run: Run, pruned: PreTrainedModel, masks: Masks) -> dict[str, float]:
    """Compare logits of the sliced model and of the masked dense model on the first evaluated window."""
    cfg, ids = run.cfg, checked_tokens(run)
    device = device_of(run.model)
    # Recovery changes weights, so the comparison uses the model before recovery.
    plain = pruned if cfg.recovery == "none" else shrink(run, masks, {}, row=(cfg.final, "none"))
    sliced = plain(input_ids=ids.to(device), use_cache=False).logits.float().to(device)
    ours = next(iter_logits(plain, ids.to(device)))[0].float().to(device)
    del plain  # frees the memory of a third model
    free_memory(run.plan.device)
    reference = masked_logits(run.model, masks, ids.to(device)).to(device)

    def rms(difference: Tensor) -> float:
        return float(difference.square().mean().sqrt())

    off, limit = reference - sliced, LOGIT_LIMIT[cfg.model.dtype] * float(reference.std())
    largest, mean = float(off.abs().max()), rms(off)
    if not (apart := rms(ours - sliced[:, :-1])) <= limit:
        subject = f"Logits of model_type '{run.model.config.model_type}' computed for perplexity"
        raise UserError(f"{subject} must differ by {limit:.2e} or less; got {apart:.2e}. Please report this model.")
    difference = largest if cfg.model.dtype == "float32" else mean
    if not difference <= limit:
        subject = "Logits of the sliced and the masked model"
        raise UserError(
            f"{subject} must differ by {limit:.2e} or less; got {difference:.2e}. Please report this model."
        )
    std = float(reference.std())
    return {"tokens": ids.numel(), "std": std, "masked_minus_sliced": largest, "masked_minus_sliced_rms": mean}


def checked_tokens(run: Run) -> Tensor:
    """Token ids for comparing logits, (1, T)."""
    return run.text.test[0].tokens[:1, : compared_tokens(run.cfg)]
