"""Progress reporting: log lines, and a progress bar on a terminal.

Every message is one line: control characters, as in file names, are escaped.
"""

import sys
import time

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from involution import renamed
from involution.utils.errors import escape_controls

# Seconds between log lines where standard output is not a terminal.
INTERVAL = 15.0


class NullProgress:
    """The progress interface; this implementation reports nothing. See ``RichProgress``."""

    def log(self, text):
        """Reports one line."""

    def begin(self, label, total, done=0):
        """Begins a task of ``total`` steps, ``done`` of which are complete."""

    def advance(self):
        """Completes one step of the task."""

    def end(self):
        """Ends the task."""


class RichProgress(NullProgress):
    """Progress on a text stream, standard output by default."""

    def __init__(self, file=None):
        self._console = RichConsole(
            file=file or sys.stdout, highlight=False, emoji=False, soft_wrap=True
        )
        self._bar: Progress | None = None
        self._label = ""
        self._total = self._done = self._done_before = 0
        self._started = self._logged = 0.0

    def log(self, text):
        self._console.print(escape_controls(text), markup=False)

    def begin(self, label, total, done=0):
        self.end()
        self._label, self._total, self._done, self._done_before = (
            escape_controls(label),
            total,
            done,
            done,
        )
        self._started = self._logged = time.monotonic()
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left:"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.add_task(self._label, total=total, completed=done)
            self._bar.start()

    def advance(self):
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])
            return
        now = time.monotonic()
        if now - self._logged >= INTERVAL:
            self._logged = now
            speed = (self._done - self._done_before) / (now - self._started)
            left = (self._total - self._done) / speed
            self.log(f"{self._label}: step {self._done} of {self._total}, {left:.0f} s left")

    def end(self):
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


__getattr__ = renamed.attributes(__name__, {"Console": "RichProgress"})
