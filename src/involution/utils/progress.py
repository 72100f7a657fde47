"""What a person sees while a command works: lines, and on a terminal a moving bar.

Whatever is said is one line: control characters, of names in files too, are shown as escapes.
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

from involution.utils.errors import escape_controls

# Where there is no terminal, a line this often, in seconds.
INTERVAL = 15.0


class Console:
    """Progress on standard output; see ``experiment.Silent`` for what each method is told."""

    def __init__(self, file=None):
        self._console = RichConsole(
            file=file or sys.stdout, highlight=False, emoji=False, soft_wrap=True
        )
        self._progress: Progress | None = None
        self._label = ""
        self._total = self._done = self._before = 0
        self._started = self._last = 0.0

    def say(self, text):
        self._console.print(escape_controls(text), markup=False)

    def start(self, label, total, done=0):
        self.stop()
        self._label, self._total, self._done, self._before = (
            escape_controls(label),
            total,
            done,
            done,
        )
        self._started = self._last = time.monotonic()
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left:"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.add_task(self._label, total=total, completed=done)
            self._progress.start()

    def step(self):
        self._done += 1
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0])
            return
        now = time.monotonic()
        if now - self._last >= INTERVAL:
            self._last = now
            speed = (self._done - self._before) / (now - self._started)
            left = (self._total - self._done) / speed
            self.say(f"{self._label}: step {self._done} of {self._total}, {left:.0f} s left")

    def stop(self):
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
