"""Units: what can be removed from a model, one set of equal units at a time."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("layer", "experts", "kv_groups", "neurons")  # from coarse to fine


@dataclass(frozen=True)
class Units:
    """Equal units of one kind in one place of the model, such as the neurons of an FFN, or a layer as a single unit."""

    key: str
    kind: str
    layer: int
    count: int  # that can be removed (of one expert, if experts are side by side)
    rows: int = 1  # experts side by side, which lose equally many neurons, each its own
    inside: str = ""  # key of the coarser units that contain these
    least: int = 1  # that stay: 1 neuron or KV group, the experts that a router needs, 0 layers
    step: int = 1  # removed together; for experts the number of groups of the router
    stays: str = ""  # why none may be removed: protected, or the router's reason
