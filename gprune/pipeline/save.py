"""Step 9, checked: masked, sliced and reloaded logits agree before anything is called finished."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gprune.calibration.layerwise import Walk
from gprune.config import RunConfig
from gprune.errors import UserError
from gprune.export.hf import check_reload, save_pruned, stock_skeleton
from gprune.export.job import export as write_as
from gprune.models.masks import Masks
from gprune.models.offload import device_of, is_offloaded
from gprune.pipeline.inputs import Text
from gprune.pipeline.plan import check_tokens
from gprune.pipeline.recover import placement, shrink
from gprune.pipeline.run import Run
from gprune.report import report
from gprune.runs import tracking
from gprune.sparsity.gates import masked
from gprune.storage.files import file_hashes

log = logging.getLogger("gprune")
# Masked against sliced logits, in standard deviations: sums of the same terms in another order. float32: the largest
# difference. 16-bit types, which round at every step of every block: the root mean square. bfloat16 was seen at 0.02 to
# 0.2 (most where pruning has spoiled the model; the same masks in float32: 1.5e-5); a wrong slice is off by 1 or so.
LOGIT_LIMIT = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.5}


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
