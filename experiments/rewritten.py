"""Write a model that computes what another one does, from weights of other sizes, as a Hugging Face folder.

python -m experiments.rewritten smollm2-135m FOLDER

`up` times c and `down` over c, `value` times c and `output` over c, c a power of two between 1/8 and 8, another one in
each block: the same bits come out of each block. A recipe that depends on sizes treats the two models unlike.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from gprune.models.blocks import blocks_of
from gprune.models.loading import load_model

INVERSE = {"up": "down", "value": "output"}


@torch.no_grad()
def rewrite(model: torch.nn.Module, seed: int = 0) -> None:
    """Scale the parts of each block, in place."""
    generator = torch.Generator().manual_seed(seed)
    for block in blocks_of(model):
        for part, other in INVERSE.items():
            c = 2.0 ** int(torch.randint(-3, 4, (), generator=generator))
            block.parts[part].host.weight.mul_(c)
            block.parts[other].host.weight.div_(c)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model, dtype="float32")
    rewrite(model)
    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
