"""How records lie in their files: what is equal in several numbers stands once, masks are bits."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from gprune.models.masks import Masks
from gprune.runs.results import Record


def folded(records: Sequence[Record]) -> dict[str, Any]:
    """Records as {"all": what is the same in all, "stages": [{"all": ..., "each": [what is left], ...}, ...]}.

    A stage is what follows each other with one `stage` and `recovery`.
    """
    shared, rest = _shared(records)
    stages = []
    for _, places in itertools.groupby(range(len(rest)), lambda i: (records[i]["stage"], records[i]["recovery"])):
        own, each = _shared([rest[i] for i in places])
        stages.append({"all": own, "each": each})
    return {"all": shared, "stages": stages}


def unfolded(content: Any) -> Any:
    """A record of a row whose numbers are records again; whatever is not folded as it is."""
    try:
        shared, stages = content["records"]["all"], content["records"]["stages"]
        return content | {"records": [shared | stage["all"] | own for stage in stages for own in stage["each"]]}
    except (KeyError, TypeError):
        return content


def _shared(records: Sequence[Record]) -> tuple[Record, list[Record]]:
    """What is the same in all, and what is left of each."""
    same = {k: v for k, v in records[0].items() if all(k in r and r[k] == v for r in records)} if records else {}
    return same, [{k: v for k, v in r.items() if k not in same} for r in records]


def packed(masks: Masks) -> dict[str, dict[str, Any]]:
    """Masks as base64 of their bits: 8 kB for 46,080 neurons."""
    return {
        kind: {
            "sizes": [len(m) for m in masks_of_kind],
            "bits": base64.b64encode(np.packbits(torch.cat(masks_of_kind).numpy())).decode(),
        }
        for kind, masks_of_kind in (("ffn", masks.ffn), ("attention", masks.attention))
    }


def unpacked(content: dict[str, dict[str, Any]]) -> Masks:
    """What `packed` was given."""
    parts = {}
    for kind, value in content.items():
        bits = np.frombuffer(base64.b64decode(value["bits"]), dtype=np.uint8)
        bits = np.unpackbits(bits, count=sum(value["sizes"])).astype(bool)
        parts[kind] = list(torch.from_numpy(bits).split(value["sizes"]))
    return Masks(**parts)
