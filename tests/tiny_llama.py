"""Names of `world` for tests that still import them from here."""

from tests.world import collect, hooks_of, make_tiny_llama  # noqa: F401
