"""A model folder as one ONNX file, for onnxruntime: a recipe, since PyTorch does all of it.

    pip install -e '.[onnx]'
    python -m gprune.export.onnx runs/NAME/model model.onnx

The graph takes `input_ids` and `attention_mask`, both (batch, sequence) int64 with both sizes free and the mask 1 for
tokens and 0 for padding, and gives `logits` (batch, sequence, vocabulary). It has no key/value cache, so it serves to
score text; for generation take llama.cpp or vLLM. After writing, onnxruntime computes another batch at another length
than the one that was traced, with padding, and the largest difference from the model is printed. Where it exceeds
`LIMIT` the file is removed and the exit code is 2.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gprune.errors import UserError
from gprune.export.job import load_folder

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
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
    """
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    given = inputs_of(model, *TRACED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's own code, about itself
        torch.onnx.export(
            Scorer(model).eval(), kwargs=given, f=path, dynamo=True, external_data=True, verbose=False,
            input_names=list(given), output_names=["logits"], dynamic_shapes=dict.fromkeys(given, sizes),
        )  # fmt: skip


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
def difference(model: PreTrainedModel, path: Path) -> tuple[float, float]:
    """max |difference of logits| where there are tokens, at another shape than was traced; the same over their std."""
    inputs = inputs_of(model, *CHECKED, padded=True)
    tokens = inputs["attention_mask"].bool()
    expected = Scorer(model)(**inputs)[tokens]
    found = torch.from_numpy(run_onnx(path, inputs))[tokens]
    largest = float((expected - found).abs().max())
    return largest, largest / float(expected.std())


def convert(folder: Path, output: Path) -> float:
    """Write and check; returns max |difference of logits|.

    Raises:
        UserError: for a missing package, a taken output, a folder that does not load, or a graph that is off.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"expected onnx, onnxscript and onnxruntime, but {', '.join(missing)} is missing; "
                        "`pip install onnx onnxscript onnxruntime`.")  # fmt: skip
    data = output.with_name(f"{output.name}.data")
    if taken := next((path for path in (output, data) if path.exists()), None):
        raise UserError(f"'{taken}' exists already; choose another output.")
    if not output.parent.is_dir():
        raise UserError(f"expected an output in a folder that exists, got '{output}'.")
    if not (folder / "config.json").is_file():
        raise UserError(f"expected a model folder, but there is no '{folder / 'config.json'}'.")
    model, _ = load_folder(folder, upcast=True)
    try:
        write_onnx(model, output)
        largest, relative = difference(model, output)
        if not relative <= LIMIT:  # also true of NaN
            raise UserError(
                f"onnxruntime computes something else than the model, and the file was removed: largest difference "
                f"{largest:.3g}, {relative:.3g} standard deviations of the logits; expected at most {LIMIT}."
            )
    except BaseException:
        output.unlink(missing_ok=True)
        data.unlink(missing_ok=True)
        raise
    return largest


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="a model folder")
    parser.add_argument("output", type=Path, help="the ONNX file to write")
    args = parser.parse_args(arguments)
    try:
        largest = convert(args.folder, args.output)
    except UserError as error:
        print(f"gprune.export.onnx: {error}", file=sys.stderr)
        return 2
    batch, length = CHECKED
    print(f"Wrote {args.output}; max |dlogit| {largest:.2e} in onnxruntime, batch {batch}, {length} tokens, padded.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
