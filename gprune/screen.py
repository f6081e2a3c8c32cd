"""Progress in a terminal: the step, a bar, tokens per second, and the time left.

Nothing is shown if stdout is no terminal, and by other processes than the first; the log has the steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

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
        self._number = 0  # of the step that goes on
        console = console or Console(file=sys.stdout)
        self.bars = _Bars(
            TextColumn(
                "{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
            ),
            BarColumn(bar_width=14),
            TextColumn("{task.fields[speed]}", "cyan", "right", table_column=Column(min_width=15, no_wrap=True)),
            TimeRemainingColumn(), console=console, expand=True, transient=True, speed_estimate_period=600,
            disable=not console.is_terminal or console.is_jupyter or process_index() != 0,
        )  # fmt: skip
        planned = sum(self._shares.values())
        self._run = self.bars.add_task("run", total=planned, visible=planned > 0, speed="")
        self._step = self.bars.add_task("", total=None, visible=False, speed="")

    def __enter__(self) -> Screen:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def step(self, number: int, what: str) -> str:
        """A step begins, and the one before has ended; returns its title, such as `step 3/10 Measuring drift`."""
        if number != self._number:  # else another part of the same
            self._number, left = number, sum(work for step, work in self._shares.items() if step >= number)
            # Steps may have taken less than was planned. Not by `update`, which would forget the speed.
            self.bars.tasks[self._run].total = self._worked() + left
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
            self.bars.update(self._step, advance=1, description=described, speed=speed)
            self.bars.update(self._run, completed=self._worked())

        return advance

    def _show(self, what: str, batches: int | None = None, done: int = 0) -> str:
        title = one_line(f"step {self._number}/{max(self._shares, default=0)} {what}" if self._number else what)
        self.bars.reset(self._step, total=batches, completed=done, description=title, visible=True, speed="")
        return title

    def __rich__(self) -> RenderableType:
        """What a terminal shows at this moment."""
        return self.bars.get_renderable()


class _Bars(Progress):
    """Bars, and an empty line for `^C`: behind a full line its echo would take one more, and a bar would never go."""

    def get_renderables(self) -> Iterable[RenderableType]:
        return *super().get_renderables(), ""
