"""Names of `world` for tests that still import them from here."""

from tests.world import SIZES, TYPES, WITH_EXPERTS, make_tiny, some_masks, tiny_of  # noqa: F401
