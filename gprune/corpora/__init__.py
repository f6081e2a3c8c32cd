"""Text by name: `load_corpus(name, split)`, windows of tokens, and the batches that a Trainer sees."""

from gprune.corpora import embedded, hub  # noqa: F401 - they register their corpora
from gprune.corpora.load import CORPORA, check_corpus, identity, load_corpus
from gprune.corpora.windows import Sample, Windows, load_windows, make_windows

__all__ = ["CORPORA", "Sample", "Windows", "check_corpus", "identity", "load_corpus", "load_windows", "make_windows"]
