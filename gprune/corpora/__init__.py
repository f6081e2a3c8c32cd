"""Text by name: `load_corpus(name, split)`, windows of tokens, and the batches that a Trainer sees."""

from gprune.corpora import embedded, hub  # noqa: F401 - they register their corpora
from gprune.corpora.load import CORPORA, check_corpus, identity, load_corpus

__all__ = ["CORPORA", "check_corpus", "identity", "load_corpus"]
