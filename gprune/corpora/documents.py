"""Documents of a corpus: a row with a string `text` or with `messages`, and a split of text that has none.

`CORPORA` has the corpora with a name; `load.py` looks names up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from gprune.errors import UserError
from gprune.registry import Registry

TRAIN_SHARE = 0.7


class Conversation(str):
    """Messages as JSON: a document that `windows.make_windows` renders by the chat template of the model's tokenizer.

    Attributes:
        location: where the messages are, such as `mine.jsonl:12`.
    """

    location: str


Corpus = Callable[[str], list[str]]
CORPORA: Registry[Corpus] = Registry("corpus")


def contiguous_split(documents: Iterable[str], split: str, train_share: float = TRAIN_SHARE) -> list[str]:
    """Return the first part of the distinct documents for "train", by default 70 %, the others for "test".

    The split is contiguous, because neighbouring pieces may come from one source: with every other piece of an article
    in test, train text would leak into test.
    """
    distinct = list(dict.fromkeys(documents))
    cut = round(train_share * len(distinct))
    return distinct[:cut] if split == "train" else distinct[cut:]


def document_of(row: object, location: str) -> str:
    """Return the document in a row with `text` or `messages`. UserError, which begins with `location`, for others."""
    if isinstance(row, dict) and "messages" in row and "text" not in row:
        return _conversation_of(row["messages"], location)
    return text_of(row, location)


def _conversation_of(messages: object, location: str) -> Conversation:
    """Return the messages of a row. UserError, which begins with `location`, if they are not messages."""
    must = "must be a list of objects with the strings 'role' and 'content'"
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{location}: The field 'messages' {must}; got {messages!r:.100}.")
    for number, message in enumerate(messages, start=1):
        values = [message.get(name) for name in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"{location}: The field 'messages' {must}; message {number} is {message!r:.100}.")
    conversation = Conversation(json.dumps(messages, ensure_ascii=False))
    conversation.encode()  # raises ValueError for an unpaired surrogate
    conversation.location = location
    return conversation


def without_text(location: str, got: str) -> UserError:
    """Return the error for a row, or a table, without text."""
    return UserError(
        f"{location}: The row must be an object with a string 'text' or, in a .jsonl file, with 'messages'; got {got}."
    )


def text_of(row: object, location: str) -> str:
    """Return the field `text` of a row. UserError, which begins with `location`, if there is none."""
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        has_other_keys = isinstance(row, dict) and "text" not in row
        raise without_text(location, f"the keys {', '.join(row)}" if has_other_keys and row else f"{row!r:.100}")
    text.encode()  # raises ValueError for an unpaired surrogate
    return text
