"""The session of a command: backend, log file, and errors as one line with an exit code."""

import contextlib
import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import traceback

# Equal to CONTROL in involution.utils.errors, which a test checks.
CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]"
)

# Exit codes; 2 is for invalid input.
INTERNAL_ERROR = 3
DIVERGED = 4
WRITE_FAILED = 5
HOST_LOST = 6
OUT_OF_MEMORY = 7
# That of a process ended by SIGPIPE: the reader of a pipe, such as `head`, has closed it.
READER_CLOSED = 141


class Session:
    """A running command.

    Attributes:
        progress: Receives progress and messages, for standard error.
        folder: Folder in which the log is saved; None: it is not saved.
    """

    def __init__(self, results, messages):
        from involution.utils.progress import RichProgress

        self._results = results
        self.progress = RichProgress(messages)
        self.folder: pathlib.Path | None = None

    def import_keras(self):
        """Selects the backend and imports Keras with it, which takes seconds."""
        from involution import backend

        name = backend.select()
        if backend.warning is not None:
            self.progress.log(f"involution: {backend.warning}")
        self.progress.stage(f"Importing Keras with {name}")
        importlib.import_module("keras")

    def result(self, text):
        """Prints one line of results on standard output."""
        # What is drawn on standard error would be mixed with the line if both are one terminal.
        hidden = self.progress.hidden() if self._results.isatty() else contextlib.nullcontext()
        with hidden:
            try:
                print(escape_controls(text), file=self._results, flush=True)
            except BrokenPipeError:
                raise SystemExit(READER_CLOSED) from None
            except OSError as error:
                from involution.utils.errors import WriteError

                raise WriteError(error.errno, error.strerror, "standard output") from error


@contextlib.contextmanager
def session(first_line, backend, options=()):
    """Runs the block of a command. Standard output is for its results only, see ``Session.result``;
    messages go to standard error, and what frameworks write there to a log file.

    Args:
        first_line: Printed before Keras is imported, which takes seconds.
        backend: The Keras backend; None: the configured one.
        options: Names of the command's options, for error messages.
    """
    print_message(first_line)
    if backend is not None:
        os.environ["KERAS_BACKEND"] = backend
    try:
        log = pathlib.Path(tempfile.mkdtemp(prefix="involution-")) / "log.txt"
    except OSError as error:
        reason = f"The temporary folder must be writable. Received: {error}"
        raise SystemExit(fail(reason, WRITE_FAILED)) from error
    current = failure = None
    try:
        with _redirected(log) as (results, messages):
            try:
                current = Session(results, messages)
                current.import_keras()
                yield current
            except KeyboardInterrupt:
                failure = ("interrupted.", 130)
            except Exception as error:  # noqa: BLE001 - users get no traceback
                message, code = explain_error(error, log)
                failure = (with_options(message, options), code)
            finally:
                if current is not None:
                    current.progress.end()
    finally:
        if current is not None and current.folder is not None:
            _save_log(log, current.folder)
        # The message of an internal error refers to the log.
        if failure is None or failure[1] != INTERNAL_ERROR:
            shutil.rmtree(log.parent, ignore_errors=True)
    if failure is not None:
        raise SystemExit(fail(*failure))


def with_options(message, options) -> str:
    """Replaces `parameter` in a message of the library by --parameter if that is an option."""

    def replace(match):
        option = f"--{match[1].replace('_', '-')}"
        return option if option in options else match[0]

    return re.sub(r"`(\w+)`", replace, message)


def _save_log(log, folder):
    from involution.utils import atomic_files

    # A full disk has been reported already.
    with contextlib.suppress(OSError):
        text = log.read_text(encoding="utf-8", errors="backslashreplace")
        atomic_files.write_text(
            folder / "log.txt", "\n".join(map(escape_controls, text.split("\n")))
        )


def explain_error(error, log) -> tuple[str, int]:
    """The message for an error, and the exit code."""
    # Absent if their import failed.
    errors = sys.modules.get("involution.utils.errors")
    distributed = sys.modules.get("involution.training.distributed")
    if distributed and isinstance(error, distributed.LostHostError):
        return str(error), HOST_LOST
    if isinstance(error, ImportError) or (errors and isinstance(error, errors.InputError)):
        return str(error), 2
    if errors and isinstance(error, errors.WriteError):
        return str(error), WRITE_FAILED
    if isinstance(error, PermissionError):
        received = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return f"Files and folders must be accessible to this user. Received: {received}", 2
    reason = errors.out_of_memory_reason(error) if errors else None
    if reason is not None:
        return (
            "Out of memory; for training reduce `batch_size` or `image_size`, or increase "
            f"`gradient_accumulation_steps`. Received: {reason}",
            OUT_OF_MEMORY,
        )
    with open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
        for line in "".join(traceback.format_exception(error)).split("\n"):
            print(escape_controls(line), file=file)
    message = f"Internal error ({type(error).__name__}); traceback in {log}; please report it"
    return message, INTERNAL_ERROR


@contextlib.contextmanager
def _redirected(log):
    """Within the block, file descriptor 2 is the log and 1 standard error, for Python and C++ code.

    Yields text streams of the original standard output and standard error.
    """
    streams = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        for stream in streams:
            stream.flush()
        results, messages = (
            stack.enter_context(_duplicate(number, stream.encoding))
            for number, stream in enumerate(streams, start=1)
        )
        file = stack.enter_context(open(log, "ab", buffering=0))
        os.dup2(messages.fileno(), 1)
        os.dup2(file.fileno(), 2)
        stack.enter_context(contextlib.redirect_stdout(messages))
        try:
            yield results, messages
        finally:
            for stream in streams:
                stream.flush()
            os.dup2(results.fileno(), 1)
            os.dup2(messages.fileno(), 2)


@contextlib.contextmanager
def _duplicate(number, encoding):
    """A text stream of a copy of a file descriptor."""
    stream = open(os.dup(number), "w", encoding=encoding, errors="backslashreplace", buffering=1)  # noqa: SIM115 - closed below
    try:
        yield stream
    finally:
        # What could not be written has been reported.
        with contextlib.suppress(OSError):
            stream.close()


def fail(message, code=2) -> int:
    """Prints an error as one line on standard error; returns the exit code."""
    print_message(f"error: {' '.join(message.split())}")
    return code


def print_message(text):
    """Prints a line on standard error, unless its reader has closed it."""
    try:
        print(f"involution: {escape_controls(text)}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        discard_messages()  # the line is still in the buffer


def discard_messages():
    """Opens the null device as standard error."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    if descriptor != 2:
        os.dup2(descriptor, 2)
        os.close(descriptor)


def escape_controls(text) -> str:
    """As ``involution.utils.errors.escape_controls``, whose import is slow."""
    return CONTROL.sub(lambda m: f"\\u{ord(m[0]):04x}", text)


@contextlib.contextmanager
def watchdog(text):
    """Prints ``text`` on standard error if this process dies within the block."""
    program = "import sys; sys.stdin.read() or print(sys.argv[1], file=sys.stderr, flush=True)"
    command = [sys.executable, "-S", "-E", "-c", program, text]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603 - fixed program
    try:
        yield
    finally:
        process.communicate(b"alive")
