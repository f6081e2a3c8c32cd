"""Names of models that are checked without PyTorch are those that are embedded."""

from __future__ import annotations

from gprune.models import embedded, names


def test_the_names_are_those_of_the_embedded_models():
    assert tuple(embedded.EMBEDDED_MODELS) == names.EMBEDDED
