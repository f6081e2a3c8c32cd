"""A model as one ONNX graph, for onnxruntime: PyTorch writes it, onnxruntime proves it.

The graph takes `input_ids` and `attention_mask`, both (batch, sequence) int64 with both sizes free and the mask 1 for
tokens and 0 for padding, and gives `logits` (batch, sequence, vocabulary). It has no key/value cache, so it serves to
score text; for generation take llama.cpp or vLLM.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.errors import UserError, first_line

log = logging.getLogger("gprune")

LIMIT = 1e-3  # max |difference of logits| over their standard deviation, float32; 1e-5 was seen
TRACED, CHECKED = (2, 16), (3, 29)  # batch, sequence


class Scorer(nn.Module):
    """The model with tensors for arguments and one tensor for a result, as a graph has them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def inputs_of(model: PreTrainedModel, batch: int, length: int, *, padded: bool = False) -> dict[str, Tensor]:
    """Random tokens; if `padded`, the last row ends after a third of the length."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, length // 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def write_onnx(model: PreTrainedModel, path: Path) -> None:
    """Write the file, and beside it `PATH.data` with the weights.

    Args:
        model: in float32, in eval mode.
        path: file to write.

    Raises:
        UserError: for a model that PyTorch cannot write, or whose computation depends on how long a text is.
    """
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if by_length := sorted(kinds & {"longrope", "dynamic"}):
        raise UserError(
            f"Export: a graph has one set of rotary frequencies, and this model's (rope_type {by_length[0]}) depend on "
            f"how long a text is; expected another model. Nothing was written."
        )
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    given = inputs_of(model, *TRACED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own code, about itself
        try:
            program = torch.onnx.export(
                Scorer(model).eval(), kwargs=given, dynamo=True, verbose=False,
                input_names=list(given), output_names=["logits"], dynamic_shapes=dict.fromkeys(given, sizes),
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            raise UserError(
                f"Export: PyTorch cannot write model_type '{model.config.model_type}' as an ONNX graph "
                f"({first_line(error)}); expected a model without experts, or another format. Nothing was written."
            ) from error
        program.model.metadata_props["made by"] = "gprune"  # the mark by which `--overwrite` knows a former export
        program.save(path, external_data=True)


def run_onnx(path: Path, inputs: dict[str, Tensor]) -> np.ndarray:
    """(batch, sequence, vocabulary) float32 logits from onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    return logits


@torch.no_grad()
def check_onnx(model: PreTrainedModel, path: Path) -> float:
    """Compare what onnxruntime makes of the file with the model, at another shape than was traced, with padding.

    Returns:
        max |difference of logits| where there are tokens.

    Raises:
        UserError: where it exceeds `LIMIT` standard deviations of the logits, or is not finite.
    """
    inputs = inputs_of(model, *CHECKED, padded=True)
    tokens = inputs["attention_mask"].bool()
    expected = Scorer(model)(**inputs)[tokens]
    found = torch.from_numpy(run_onnx(path, inputs))[tokens]
    largest = float((expected - found).abs().max())
    relative = largest / float(expected.std())
    if not relative <= LIMIT:  # also true of NaN
        raise UserError(
            f"Export: onnxruntime computes something else than the model, and the file was removed: largest difference "
            f"of logits {largest:.3g}, {relative:.3g} of their standard deviation; expected at most {LIMIT}."
        )
    log.info("Checked with onnxruntime on %d x %d tokens: max |difference of logits| %.2e", *CHECKED, largest)
    return largest
