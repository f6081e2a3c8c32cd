"""Names of embedded models, which can be validated without importing PyTorch."""

from __future__ import annotations

from gprune.models import embedded, names


def test_the_list_of_names_equals_the_embedded_models():
    assert tuple(embedded.EMBEDDED_MODELS) == names.EMBEDDED
