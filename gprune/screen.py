"""Progress bar of the whole run in a terminal: the step, its tokens per second, and the remaining time.

Lightning's progress bars show one Trainer each, and a run has several. The bar is disabled if stdout is not a terminal,
in notebooks, and on ranks other than 0; the log lists the steps instead. A log level above INFO turns both off.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from gprune.console import process_index


class Screen(Progress):
    """Progress bar of one run or one evaluation; a context manager.

    `work` is the planned work by number of the step. `work_done` returns the finished work, by default in tokens.
    """

    def __init__(
        self, work: Mapping[int, float], work_done: Callable[[], float] | None = None, *, console: Console | None = None
    ):
        self._work = dict(work)
        self._tokens = 0
        self._work_done = work_done or (lambda: self._tokens)
        self._step_number = 0
        self._title = ""
        self._tokens_before_part = 0
        self._part_start = time.monotonic()
        console = console or Console(file=sys.stdout)
        is_silenced = logging.getLogger("gprune").level > logging.INFO
        title_column = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        super().__init__(
            TextColumn("{task.description}", markup=False, table_column=title_column), BarColumn(bar_width=14),
            TextColumn("{task.fields[rate]}", "cyan", "right", table_column=Column(min_width=15, no_wrap=True)),
            TimeRemainingColumn(), console=console, expand=True, transient=True, speed_estimate_period=600,
            disable=not console.is_terminal or console.is_jupyter or is_silenced or process_index() != 0,
        )  # fmt: skip
        self._bar = self.add_task("", total=sum(self._work.values()), rate="")

    def step(self, number: int, what: str) -> str:
        """Begin a step, or another part of the current step, and return the title: `step 3/10 Measuring drift`."""
        if number != self._step_number:
            self._step_number = number
            planned = sum(work for step, work in self._work.items() if step >= number)
            # Earlier steps may have needed less work than planned. `update(total=)` would reset the estimated speed.
            self.tasks[0].total = self._work_done() + planned
        return self.begin_part(what)

    def begin_part(self, what: str) -> str:
        """Begin a part of the current step: set the bar's title, reset its tokens per second, and return the title."""
        self._title = f"step {self._step_number}/{max(self._work)} {what}" if self._step_number else what
        self._part_start = time.monotonic()
        self._tokens_before_part = self._tokens
        self.update(self._bar, description=self._title, rate="")
        return self._title

    def add_batch(self, tokens: int = 0, note: str = "") -> None:
        """Count the tokens of a finished batch, and show the work done, tokens per second, and a note."""
        self._tokens += tokens
        seconds = max(time.monotonic() - self._part_start, 1e-9)
        per_second = (self._tokens - self._tokens_before_part) / seconds
        rate = f"{per_second:,.0f} tokens/s" if per_second else ""
        description = f"{self._title}, {note}" if note else self._title
        self.update(self._bar, completed=self._work_done(), rate=rate, description=description)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the bar and an empty last line, on which a terminal echoes `^C`.

        On the bar's own line, which is full, the echo would wrap, and the bar could not be erased.
        """
        return *super().get_renderables(), ""
