"""Time from Enter to the first line and to the first movement of commands, in a pseudo-terminal.

    python benchmarks/first_output.py [COMMAND...] [--limit 60]

Commands are those of ``COMMANDS``, by default all. Prints a row for each, in seconds: until the
first complete line; until something on the screen changes after it; the longest pause between two
changes; and until the end. The demo, and a command that exceeds the limit, are interrupted, as by
Ctrl-C.
"""

import argparse
import errno
import itertools
import math
import os
import pathlib
import pty
import select
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

COMMANDS = {
    "compare": ["compare", "--dataset", "digits", "--epochs", "1", "--output", "run"],
    "predict": ["predict", "image.png"],
    "demo": ["demo", "--port", "0"],
    "doctor": ["doctor"],
}


def output_times(words, folder, limit):
    """[(seconds, bytes), ...]: what a command wrote, and when."""
    terminal, its_end = pty.openpty()
    command = [sys.executable, "-m", "involution_cli", *words]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    start = time.monotonic()
    process = subprocess.Popen(  # noqa: S603 - fixed program
        command, cwd=folder, env=environment, stdin=its_end, stdout=its_end, stderr=its_end
    )
    os.close(its_end)
    chunks = []
    try:
        while True:
            seconds = time.monotonic() - start
            if process.poll() is None and seconds > limit:
                process.send_signal(signal.SIGINT)
                limit = seconds + 10
            if not select.select([terminal], [], [], 0.1)[0]:
                continue
            try:
                written = os.read(terminal, 2**16)
            except OSError as error:  # Linux's form of the end of file
                if error.errno != errno.EIO:
                    raise
                break
            if not written:
                break
            chunks.append((time.monotonic() - start, written))
            if b"Ctrl-C to stop" in written:
                limit = 0
    finally:
        process.wait()
        os.close(terminal)
    return chunks


def measure(chunks):
    """Seconds until the first line, the first movement and the end, and the longest pause."""
    times = [seconds for seconds, _ in chunks]
    line = next(position for position, (_, written) in enumerate(chunks) if b"\n" in written)
    pauses = [after - before for before, after in itertools.pairwise([0.0, *times])]
    movement = times[line + 1] if line + 1 < len(times) else math.nan
    return times[line], movement, max(pauses), times[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commands", nargs="*", choices=[[], *COMMANDS], metavar="COMMAND")
    parser.add_argument("--limit", type=float, default=60, help="seconds until an interruption")
    arguments = parser.parse_args()
    print(f"{'command':10}{'first line':>12}{'movement':>10}{'longest pause':>15}{'end':>8}")
    for name in arguments.commands or COMMANDS:
        with tempfile.TemporaryDirectory() as folder:
            pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), "uint8")
            Image.fromarray(pixels).save(pathlib.Path(folder) / "image.png")
            line, movement, pause, end = measure(
                output_times(COMMANDS[name], folder, arguments.limit)
            )
        print(f"{name:10}{line:>12.2f}{movement:>10.2f}{pause:>15.2f}{end:>8.1f}", flush=True)


if __name__ == "__main__":
    main()
