"""Corpora by name (`load_corpus`), windows of tokens, and the batches of a Trainer."""

from gprune.corpora.documents import CORPORA
from gprune.corpora.embedded import EMBEDDED_CORPORA, EXLLAMAV2
from gprune.corpora.hub import HUB_CORPORA
from gprune.corpora.load import HUB_NAME, identity, load_corpus, source_of
from gprune.storage.wheels import cached_wheels

__all__ = ["CORPORA", "identity", "is_local", "load_corpus", "source_of"]


def is_local(name: str) -> bool:
    """Return whether a corpus can be read without a download."""
    if identity(name) != name:  # a path or a mirror
        return True
    if HUB_NAME.fullmatch(name):
        return False
    on_hub = name in [corpus.name for corpus in HUB_CORPORA]
    in_missing_wheel = name in EMBEDDED_CORPORA and not cached_wheels(EXLLAMAV2)
    return not (on_hub or in_missing_wheel)
