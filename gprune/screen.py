"""Progress in a terminal: the step, a bar, tokens per second, and the time left.

Nothing is shown if stdout is no terminal, and by other processes than the first; the log has the steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from gprune.console import process_index
from gprune.errors import one_line

Advance = Callable[..., None]  # after a batch: its tokens over all processes, and a note


class Screen:
    """Bars of one run, or of one evaluation; a context.

    Args:
        work: planned work by number of the step, in any unit; None if there are no steps.
        worked: work so far, in that unit.
        console: where to show it, for tests; by default stdout, if that is a terminal.
    """

    def __init__(
        self,
        work: Mapping[int, float] | None = None,
        worked: Callable[[], float] = lambda: 0.0,
        *,
        console: Console | None = None,
    ):
        self._shares, self._worked = dict(work or {}), worked
        self._last = max(self._shares, default=0)
        self._left = self._total = sum(self._shares.values())  # of the steps that have not ended
        self._number = 0  # of the step that goes on
        self._began = 0.0  # worked when it began
        self._first = worked()
        self._started = time.monotonic()
        console = console or Console(file=sys.stdout)
        self._progress = _Bars(
            TextColumn(
                "{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
            ),
            BarColumn(bar_width=14),
            TextColumn("{task.fields[speed]}", "cyan", "right", table_column=Column(min_width=15, no_wrap=True)),
            _Left(table_column=Column(min_width=12, no_wrap=True)), console=console, expand=True, transient=True,
            disable=not console.is_terminal or console.is_jupyter or process_index() != 0,
        )  # fmt: skip
        self._progress.add_task("run", total=self._total or 1, visible=bool(self._total), speed="", whole=self)
        self._step = self._progress.add_task("", total=None, visible=False, speed="")

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, number: int, what: str) -> str:
        """A step begins, and the one before has ended; returns its title, such as `step 3/10 Measuring drift`."""
        if number != self._number:  # else another part of the same
            self._left -= self._shares.get(self._number, 0.0)
            self._number, self._began = number, self._worked()
        return self._show(what)

    def bar(self, what: str, batches: int, *, done: int = 0) -> Advance:
        """A bar of so many batches in the place of the step's own, until the next one.

        Returns:
            What is to be called after each batch with its tokens, and a note for people, such as the loss.
        """
        title, tokens, started = self._show(what, batches, done), 0, time.monotonic()

        def advance(more: int = 0, note: str = "") -> None:
            nonlocal tokens
            tokens += more
            speed = f"{tokens / max(time.monotonic() - started, 1e-9):,.0f} tokens/s" if tokens else ""
            described = f"{title}, {note}" if note else title
            self._progress.update(self._step, advance=1, description=described, speed=speed)

        return advance

    def _show(self, what: str, batches: int | None = None, done: int = 0) -> str:
        title = one_line(f"step {self._number}/{self._last} {what}" if self._number else what)
        self._progress.reset(self._step, total=batches, completed=done, description=title, visible=True, speed="")
        return title

    def __rich__(self) -> RenderableType:
        """What a terminal shows at this moment."""
        return self._progress.get_renderable()

    def share_done(self) -> float:
        """Of all planned work, in [0, 1]; what an earlier sitting or the cache had counts as done."""
        return 1 - self._remaining() / self._total if self._total else 0.0

    def seconds_left(self) -> float | None:
        """At the speed so far; None before anything is known."""
        worked, seconds = self._worked() - self._first, time.monotonic() - self._started
        return self._remaining() * seconds / worked if worked > 0 else None

    def _remaining(self) -> float:
        return max(self._left - min(self._worked() - self._began, self._shares.get(self._number, 0.0)), 0.0)


class _Bars(Progress):
    """Bars, and an empty line for `^C`: behind a full line its echo would take one more, and a bar would never go."""

    def get_renderables(self) -> Iterable[RenderableType]:
        return *super().get_renderables(), ""


class _Left(ProgressColumn):
    """Time left; of the run's task, which it also moves."""

    def render(self, task: Task) -> Text:
        seconds = task.time_remaining
        if (screen := task.fields.get("whole")) is not None:
            seconds = screen.seconds_left()
            task.completed = screen.share_done() * (task.total or 1)
        left = "" if seconds is None else f"{timedelta(seconds=round(seconds))} left"
        return Text(left, justify="right", no_wrap=True)
