"""Standard output has the results of a command only; messages and progress go to standard error."""

import importlib.util
import os
import pty
import re
import signal
import subprocess
import sys
import termios

import keras
import pytest

from involution.saving import classifier
from involution.training import interrupts
from involution.training.interrupts import graceful_shutdown
from involution.utils.errors import InputError
from involution_cli import commands, session
from tests.support.images import write_image
from tests.support.paths import ROOT

pytestmark = pytest.mark.any_backend

specification = importlib.util.spec_from_file_location(
    "first_output", ROOT / "benchmarks/first_output.py"
)
first_output = importlib.util.module_from_spec(specification)
specification.loader.exec_module(first_output)


@pytest.fixture
def replaced():
    """Returns a function that replaces a file descriptor for the test."""
    saved = []

    def replace(number, new):
        saved.append((number, os.dup(number)))
        os.dup2(new, number)

    yield replace
    for number, descriptor in reversed(saved):
        os.dup2(descriptor, number)
        os.close(descriptor)


def test_results_messages_and_the_output_of_frameworks_are_separate(capfd, tmp_path):
    with session.session("Testing.", None) as current:
        current.folder = tmp_path
        current.result("a result")
        current.progress.log("a message")
        # What libraries and models print is no result.
        print("printed")
        os.write(1, b"written by C++\n")
        os.write(2, b"a warning\n")
    out, err = capfd.readouterr()
    assert out == "a result\n"
    assert err.splitlines()[0] == "involution: Testing."
    assert set(err.splitlines()) >= {"a message", "printed", "written by C++"}
    assert "warning" not in err
    assert (tmp_path / "log.txt").read_text() == "a warning\n"
    # Both streams are as before.
    print("after")
    print("after", file=sys.stderr)
    os.write(1, b"end\n")
    assert capfd.readouterr() == ("after\nend\n", "after\n")


def test_results_are_escaped(capfd):
    with session.session("Testing.", None) as current:
        current.result("cat \x1b[2J\nforged")
    assert capfd.readouterr().out == "cat \\u001b[2J\\u000aforged\n"


def test_a_closed_pipe_ends_a_command_without_a_message(capfd, replaced):
    """As in ``involution predict ... | head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    replaced(1, writer)
    os.close(writer)
    with pytest.raises(SystemExit) as end, session.session("Testing.", None) as current:
        current.result("lost")
    assert end.value.code == session.READER_CLOSED
    assert "error" not in capfd.readouterr().err


def test_a_command_continues_without_a_reader_of_its_messages(capfd, replaced, monkeypatch):
    """As in ``involution train ... 2>&1 >results | head -1``."""
    reader, writer = os.pipe()
    replaced(2, writer)
    os.close(writer)
    monkeypatch.setattr(sys, "stderr", open(2, "w", closefd=False))  # noqa: SIM115 - of capfd
    session.print_message("read")
    assert os.read(reader, 100) == b"involution: read\n"
    os.close(reader)

    def run():
        with session.session("Testing.", None) as current:
            for _ in range(2):
                current.progress.log("lost")
            current.result("kept")
            raise InputError("A rule. Received: a value")

    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 2
    assert capfd.readouterr().out == "kept\n"


@pytest.mark.parametrize(
    ("redirection", "code", "errors"),
    [
        (">&-", 5, ["involution: error: Standard output must be open. Received: closed"]),
        ("2>&-", 0, []),
    ],
)
def test_closed_streams(redirection, code, errors):
    script = f'"$0" -m involution_cli --version {redirection}'
    found = subprocess.run(
        ["/bin/sh", "-c", script, sys.executable], capture_output=True, text=True
    )
    assert (found.returncode, found.stderr.splitlines()) == (code, errors)
    assert bool(found.stdout) == (code == 0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_results_that_cannot_be_written_are_an_error(capfd, replaced):
    full = os.open("/dev/full", os.O_WRONLY)
    replaced(1, full)
    os.close(full)
    with pytest.raises(SystemExit) as end, session.session("Testing.", None) as current:
        current.result("lost")
    assert end.value.code == 5
    assert capfd.readouterr().err.splitlines()[-1] == (
        "involution: error: Could not write standard output: No space left on device"
    )


@pytest.fixture
def terminal(replaced, monkeypatch):
    """Returns a function that makes standard error a terminal, and returns a function that returns
    what was written to it."""
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    settings[1] &= ~termios.OPOST  # newlines as they are written
    termios.tcsetattr(theirs, termios.TCSANOW, settings)

    def read():
        os.write(theirs, b"\0")
        text = b""
        while not text.endswith(b"\0"):
            text += os.read(ours, 2**16)
        return text[:-1].decode()

    def start():
        replaced(2, theirs)
        return read

    yield start
    os.close(ours)
    os.close(theirs)


# Erases the line of a spinner, after showing the cursor again.
ERASED = "\x1b[?25h\r\x1b[1A\x1b[2K"


def test_results_in_a_file_and_progress_on_the_terminal(capfd, replaced, terminal, tmp_path):
    """As in ``involution predict MODEL IMAGE > out.txt``."""
    file = os.open(tmp_path / "out.txt", os.O_WRONLY | os.O_CREAT)
    replaced(1, file)
    os.close(file)
    image, model = tmp_path / "image.png", tmp_path / "m.keras"
    write_image(image)
    layers = [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)]
    classifier.Classifier(keras.Sequential(layers), ("ant", "bee"), (8, 8, 3)).save(model)
    read = terminal()
    commands.predict(model, image)
    (line,) = (tmp_path / "out.txt").read_text().splitlines()
    assert line.startswith(f"{image}: ")
    text = read()
    for stage in ("Importing Keras with ", "Loading the model", "images"):
        assert stage in text
    assert str(image) not in text
    assert text.endswith(ERASED)


def test_a_result_on_the_terminal_of_a_spinner_has_its_own_line(capfd, replaced, terminal):
    read = terminal()
    replaced(1, 2)
    with session.session("Testing.", None) as current:
        current.progress.stage("Working")
        current.result("a result")
        current.result("another")
    text = read()
    assert "\x1b[2Ka result\n" in text
    assert re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text).count("another\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted."),
        (InputError("A rule. Received: 1"), 2, "A rule. Received: 1"),
    ],
    ids=["interrupt", "error"],
)
def test_the_terminal_is_clean_after_an_error(
    error, code, message, capfd, terminal, tmp_path, monkeypatch
):
    def fail(path):
        raise error

    monkeypatch.setattr(classifier, "load", fail)
    read = terminal()
    with pytest.raises(SystemExit) as end:
        commands.predict(tmp_path / "image.png")
    assert end.value.code == code
    # The spinner is erased, and the cursor shown, before the message.
    assert read().endswith(ERASED)
    assert capfd.readouterr().err.splitlines()[-1] == f"involution: error: {message}"


def test_an_error_while_importing_ends_the_spinner(capfd, terminal, monkeypatch):
    def fail(name):
        raise MemoryError("Unable to allocate 5 GiB")

    monkeypatch.setattr(session.importlib, "import_module", fail)
    read = terminal()
    with pytest.raises(SystemExit) as end:
        commands.predict("image.png")
    assert end.value.code == 7
    assert read().endswith(ERASED)


def test_a_second_signal_gives_the_terminal_its_cursor_back(capfd, terminal, monkeypatch):
    """It ends the process at once, without the end of the session."""
    read = terminal()
    ends = []
    monkeypatch.setattr(interrupts.os, "_exit", lambda code: ends.append((code, read())))
    with session.session("Training.", None) as current, graceful_shutdown(current.progress):
        current.progress.begin("inn", 2, first="compiling the first step")
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    ((code, text),) = ends
    assert code == 130
    assert text.endswith(ERASED)


def test_something_moves_while_keras_is_imported(tmp_path):
    (tmp_path / "keras.py").write_text("import time; time.sleep(1); raise ImportError('broken')")
    chunks = first_output.output_times(["doctor"], tmp_path, limit=60)
    line, movement, _, end = first_output.measure(chunks)
    assert line < movement < end
    text = b"".join(written for _, written in chunks).decode()
    assert text.startswith("involution: Checking this installation.\r\n")
    frames = re.findall(r"([-\\|/])\x1b\[0m Importing Keras with ", text)
    assert len(set(frames)) >= 3
    assert text.endswith("\x1b[?25h\r\x1b[1A\x1b[2Kinvolution: error: broken\r\n")
