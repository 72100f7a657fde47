import io
import re
import sys
import time
import types

import pytest

from involution.utils import progress
from involution.utils.progress import RichProgress

pytestmark = pytest.mark.any_backend


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clock by one that the test sets."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize("terminal", [False, True])
def test_time_left_leaves_the_first_step_out(terminal, clock):
    """A first step of 100 s, which compiles, then steps of 2 s."""
    file = Terminal() if terminal else io.StringIO()
    reported = RichProgress(file)
    reported.begin("inn", 30, done=10, first="compiling the first step")
    for clock.now in (100.0, 102.0, 104.0, 106.0, 116.0):
        reported.advance()
    reported.end()
    # Four steps in 16 s, 15 are left.
    if terminal:
        assert re.findall(r"left: \S+", plain(file))[-1] == "left: 0:01:00"
    else:
        assert file.getvalue().splitlines() == [
            "inn: compiling the first step",
            "inn: step 11 of 30",
            "inn: step 15 of 30, 60 s left",
        ]


def plain(file):
    """What was written to a terminal, without control sequences."""
    return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", file.getvalue())


def test_stages_are_lines_in_a_file(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    file = io.StringIO()
    reported = RichProgress(file)
    reported.stage("Importing")
    reported.stage("Reading [red]")
    reported.begin("images", 3)
    reported.advance()
    reported.end()
    assert file.getvalue() == "Importing\nReading [red]\n"


def test_stages_are_lines_on_a_terminal_without_cursor_control(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    reported = RichProgress(file)
    reported.stage("Importing")
    reported.end()
    assert file.getvalue() == "Importing\n"


def test_a_spinner_moves_without_calls_and_is_erased():
    file = Terminal()
    reported = RichProgress(file)
    before = sys.stderr
    reported.stage("Importing")
    # Standard error is a command's log.
    assert sys.stderr is before
    end = time.monotonic() + 60
    while len(set(re.findall(r"([-\\|/]) Importing 0:00", plain(file)))) < 3:
        assert time.monotonic() < end, file.getvalue()
        time.sleep(0.01)
    reported.log("a message")
    reported.end()
    assert "a message\n" in plain(file)
    # The last line is erased, and the cursor shown again.
    assert file.getvalue().rpartition("Importing")[2].endswith("\x1b[?25h\r\x1b[1A\x1b[2K")


def test_the_first_step_is_named_until_it_ends():
    file = Terminal()
    reported = RichProgress(file)
    reported.begin("inn", 2, first="compiling the first step")
    reported.advance()
    reported.end()
    first, *_, last = re.findall(r"inn[^\r\n]* left:", plain(file))
    assert first.startswith("inn: compiling the first step ")
    assert "0/2" in first
    assert re.match("inn +━", last)
    assert "1/2" in last


def test_lines_fit_80_columns():
    file = Terminal()
    reported = RichProgress(file)
    reported.begin("inn:kernel_size=5,group_size=8", 10**5, first="compiling the first step")
    reported.end()
    assert max(map(len, re.split(r"[\r\n]", plain(file)))) <= 80


def test_hidden_erases_what_is_drawn_and_draws_it_again():
    file = Terminal()
    reported = RichProgress(file)
    with reported.hidden():
        pass
    assert file.getvalue() == ""
    reported.stage("Importing")
    with reported.hidden():
        hidden = file.getvalue()
        assert hidden.endswith("\x1b[2K")
    assert "Importing" in file.getvalue()[len(hidden) :]
    reported.end()
    with pytest.raises(ZeroDivisionError), reported.hidden():
        1 / 0  # noqa: B018 - raises
