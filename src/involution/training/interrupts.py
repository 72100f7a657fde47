"""Graceful shutdown on SIGINT (Ctrl-C) and SIGTERM."""

import contextlib
import os
import signal
import threading


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """128 plus the number of the signal, SIGINT unless the exception has an argument."""
    return interrupt.args[0] if interrupt.args else 128 + signal.SIGINT


@contextlib.contextmanager
def graceful_shutdown(progress):
    """Within the block the first SIGINT or SIGTERM takes effect after the current step.

    An exception during a step could leave a model without its weights. The context manager yields
    a function to call after each step: it advances ``progress`` and, after a signal, raises
    KeyboardInterrupt, see ``exit_code``. A second signal ends the process immediately, which is
    safe because files are written atomically.
    """
    received: list[int] = []

    def after_step():
        progress.advance()
        if received:
            raise KeyboardInterrupt(received[0])

    if threading.current_thread() is not threading.main_thread():
        yield after_step  # Python allows signal handlers only in the main thread
        return

    def on_signal(number, frame):
        if received:
            progress.end()  # a terminal gets its cursor back
            os._exit(128 + number)
        received.append(128 + number)
        progress.log("Stopping after this step; repeat to stop immediately.")

    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield after_step
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
