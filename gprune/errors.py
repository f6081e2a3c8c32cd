"""Errors for people: one line that says what was expected, what came and what to do."""


class UserError(ValueError):
    """Something the caller can put right: a flag, a corpus, a model, a budget, a file.

    The command line prints the message as a single line on stderr and exits with code 2, so the message
    carries everything: what was expected, what came, what to do. Invariants of our own are `assert`s.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, as much of it as fits one of ours; its name if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
