"""Progress reporting: messages, the stage that runs, and the steps of a task with the time left.

On a terminal a thread draws a spinner or a bar, which moves while this thread imports or compiles;
elsewhere stages are lines. Every message is one line: control characters, as in file names, are
escaped.
"""

import contextlib
import math
import sys
import time

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from involution import renamed
from involution.utils.errors import escape_controls

# Seconds between log lines where the stream is not a terminal.
INTERVAL = 15.0


class NullProgress:
    """The progress interface; this implementation reports nothing. See ``RichProgress``."""

    def log(self, text: str) -> None:
        """Reports one line."""

    def stage(self, text: str) -> None:
        """Begins a stage of unknown length, such as an import; ends the stage or task before."""

    def begin(self, label: str, total: int, done: int = 0, first: str = "") -> None:
        """Begins a task of ``total`` steps, ``done`` of which are complete.

        Args:
            label: What the steps do.
            total: Number of steps.
            done: Number of steps that are complete.
            first: What the first step does in addition, such as compiling. The time left is
                estimated from the other steps.
        """

    def advance(self) -> None:
        """Completes one step of the task."""

    def end(self) -> None:
        """Ends the stage or the task."""


class _Console(RichConsole):
    def on_broken_pipe(self):
        # Rich ends the process. Messages are no result: what nobody reads is not written.
        self.quiet = True


class RichProgress(NullProgress):
    """Progress on a text stream, standard error by default."""

    def __init__(self, file=None):
        file = file or sys.stderr
        self._console = _Console(
            file=file,
            # Variables such as FORCE_COLOR must not draw spinners into files.
            force_terminal=file.isatty(),
            highlight=False,
            emoji=False,
            soft_wrap=True,
        )
        self._display: Progress | None = None
        self._label = ""
        self._logged = 0.0

    def log(self, text):
        self._console.print(escape_controls(text), markup=False)

    def stage(self, text):
        # A spinner of ASCII characters, which every terminal has.
        self._show(text, SpinnerColumn("line"), _label(), TimeElapsedColumn(), total=None)
        if not self._console.is_interactive:
            self.log(text)

    def begin(self, label, total, done=0, first=""):
        self._label = label
        text = f"{label}: {first}" if first else label
        bar = BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn()
        left = TextColumn("left:"), TimeRemainingColumn()
        self._show(text, SpinnerColumn("line"), _label(), *bar, *left, total=total, completed=done)
        if first and not self._console.is_interactive:
            self.log(text)

    def _show(self, text, *columns, **task):
        self.end()
        self._logged = time.monotonic()
        self._display = Progress(
            *columns,
            console=self._console,
            transient=True,
            # The speed of the last thousand steps, however long they take. The first step is left
            # out: its end is the first time that the estimate knows.
            speed_estimate_period=math.inf,
            # Frameworks write to standard error, which a command redirects to its log.
            redirect_stderr=False,
            get_time=time.monotonic,
            disable=not self._console.is_interactive,
        )
        self._display.add_task(escape_controls(text), **task)
        self._display.start()

    def advance(self):
        if self._display is None:
            return
        (task,) = self._display.tasks
        self._display.update(task.id, advance=1, description=escape_controls(self._label))
        if self._console.is_interactive:
            return
        now = time.monotonic()
        if now - self._logged >= INTERVAL:
            self._logged = now
            left = task.time_remaining
            estimate = "" if left is None else f", {left:.0f} s left"
            self.log(f"{self._label}: step {task.completed:.0f} of {task.total:.0f}{estimate}")

    def end(self):
        if self._display is not None:
            self._display.stop()
            self._display = None

    @contextlib.contextmanager
    def hidden(self):
        """Within the block nothing is drawn, so that other text can be written to the terminal."""
        display = self._display
        if display is not None:
            display.stop()
        try:
            yield
        finally:
            if display is not None:
                display.start()


def _label():
    return TextColumn("{task.description}", markup=False)


__getattr__ = renamed.attributes(__name__, {"Console": "RichProgress"})
