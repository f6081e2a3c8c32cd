"""Text by name: `load_corpus(name, split)`, windows of tokens, and the batches that a Trainer sees."""

from gprune.corpora.embedded import EMBEDDED_CORPORA, EXLLAMAV2
from gprune.corpora.hub import HUB_CORPORA
from gprune.corpora.load import CORPORA, identity, load_corpus, source_of
from gprune.storage.wheels import cached_wheels

__all__ = ["CORPORA", "identity", "lies_here", "load_corpus", "source_of"]


def lies_here(name: str) -> bool:
    """Whether the text of a corpus is on this machine, so that nothing is fetched to read it."""
    on_hub = name in [record.name for record in HUB_CORPORA]
    return identity(name) != name or not (on_hub or (name in EMBEDDED_CORPORA and not cached_wheels(EXLLAMAV2)))
