"""Check that the structure of a model fits its tensors. The model may have no weights."""

from __future__ import annotations

from transformers import PreTrainedModel

from gprune.errors import UserError
from gprune.models.families import decoder_layers
from gprune.models.paths import attribute_at
from gprune.models.units import units_of


def check_fit(model: PreTrainedModel) -> None:
    """Raise UserError unless the record of a model fits all its layers. The model may have no weights."""
    units = units_of(model)  # raises for tensors of other sizes
    check_untied(model)
    if not any(u.kind == "neurons" and u.count for u in units):
        name = model.config.model_type
        raise UserError(f"Model type '{name}' cannot be pruned: no layer has the FFN that was found on a tiny copy.")


def check_untied(model: PreTrainedModel) -> None:
    """Raise UserError if two layers share a tensor that units are sliced from."""
    owners: dict[int, str] = {}  # id of a parameter -> the first place where it is used
    layers = decoder_layers(model)
    for u in units_of(model):
        for s in u.slices:
            place = f"'{s.path}' of layer {u.layer}"
            first_place = owners.setdefault(id(attribute_at(layers[u.layer], s.path)), place)
            if first_place != place:
                raise UserError(
                    f"Model type '{model.config.model_type}' cannot be pruned: {place} and {first_place} are one "
                    "tensor, so removing a unit of one layer would remove weights of the other."
                )
