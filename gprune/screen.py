"""Progress bar of the whole run in a terminal: the step, its tokens per second, and the remaining time.

Lightning's progress bars show one Trainer each, and a run has several. The bar is disabled if stdout is not a terminal,
and on ranks other than 0; the log lists the steps in every case.
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


class Screen:
    """Progress bar of one run or one evaluation; a context manager.

    Args:
        work: planned work by number of the step, in any unit.
        worked: returns the work done so far, in that unit. Default: the tokens passed to `advance`.
        console: where the bar is drawn. Default: stdout.
    """

    def __init__(
        self, work: Mapping[int, float], worked: Callable[[], float] | None = None, *, console: Console | None = None
    ):
        self._work, self._tokens, self._before = dict(work), 0, 0
        self._worked = worked or (lambda: self._tokens)
        self._number, self._title, self._began = 0, "", time.monotonic()
        console = console or Console(file=sys.stdout)
        title = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self.bar = _Bar(
            TextColumn("{task.description}", markup=False, table_column=title), BarColumn(bar_width=14),
            TextColumn("{task.fields[speed]}", "cyan", "right", table_column=Column(min_width=15, no_wrap=True)),
            TimeRemainingColumn(), console=console, expand=True, transient=True, speed_estimate_period=600,
            disable=not console.is_terminal or console.is_jupyter or process_index() != 0,
        )  # fmt: skip
        self.bar.add_task("", total=sum(self._work.values()), speed="")

    def __enter__(self) -> Screen:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, number: int, what: str) -> str:
        """Begin a step and return its title, such as `step 3/10 Measuring drift`."""
        if number != self._number:  # otherwise this is another part of the same step
            self._number, left = number, sum(work for step, work in self._work.items() if step >= number)
            # Earlier steps may have needed less work than planned. `update(total=)` would reset the estimated speed.
            self.bar.tasks[0].total = self._worked() + left
        return self.begin(what)

    def begin(self, what: str) -> str:
        """Begin a part of the step, restart the speed that is displayed, and return the title."""
        self._title = one_line(f"step {self._number}/{max(self._work)} {what}" if self._number else what)
        self._began, self._before = time.monotonic(), self._tokens
        self.bar.update(self.bar.tasks[0].id, description=self._title, speed="")
        return self._title

    def advance(self, tokens: int = 0, note: str = "") -> None:
        """Advance by a finished batch: its tokens over all ranks, and a note such as the loss."""
        self._tokens += tokens
        rate = (self._tokens - self._before) / max(time.monotonic() - self._began, 1e-9)
        self.bar.update(
            self.bar.tasks[0].id, completed=self._worked(), speed=f"{rate:,.0f} tokens/s" if rate else "",
            description=f"{self._title}, {note}" if note else self._title,
        )  # fmt: skip

    def __rich__(self) -> RenderableType:
        """The bar as it is drawn now."""
        return self.bar.get_renderable()


class _Bar(Progress):
    """Progress with an empty last line. A terminal echoes `^C` there; on the bar's full line the echo would wrap, and
    the bar could not be erased."""

    def get_renderables(self) -> Iterable[RenderableType]:
        return *super().get_renderables(), ""
