"""Errors that users cause: each message is one line, the rule and then the value received."""

import contextlib
import re

# The escapes of bold text in messages of Keras.
STYLE = re.compile("\x1b\\[\\d*m")
# C0 and C1 controls, DEL, line and paragraph separators, bidirectional marks and lone surrogates:
# they control the terminal, disguise text as other text, or cannot be encoded.
CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]"
)


def escape_controls(text, keep="") -> str:
    """Replaces control characters by JSON escapes.

    Names in untrusted files must not move a terminal's cursor or begin a new line.

    Args:
        text: The text.
        keep: Control characters that are not escaped.

    Example:

    >>> from involution.utils.errors import escape_controls
    >>> print(escape_controls("cat \\x1b[2J\\n"), escape_controls("고양이"))
    cat \\u001b[2J\\u000a 고양이
    """
    return CONTROL.sub(lambda m: m[0] if m[0] in keep else f"\\u{ord(m[0]):04x}", str(text))


def one_line(error, limit=300) -> str:
    """The message of an error, or its type if it has none, without text styles, in one line of at
    most ``limit`` characters.

    Example:

    >>> from involution.utils.errors import one_line
    >>> one_line(ValueError("first line\\n  second"))
    'first line second'
    """
    text = " ".join(STYLE.sub("", str(error)).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


class InputError(ValueError):
    """An input of the user is invalid."""


class WriteError(OSError):
    """A file could not be written; its previous content, if any, is unchanged."""

    def __str__(self):
        return f"Could not write {self.filename}: {self.strerror}"


# Parts of the out-of-memory messages of TensorFlow, JAX, and PyTorch on CPUs and CUDA devices.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "allocate memory", "out of memory", "OOM when allocating")


def out_of_memory_reason(error) -> str | None:
    """The line of the message that reports an out-of-memory error; None for other errors."""
    lines = (n for n in str(error).splitlines() if any(text in n for text in OUT_OF_MEMORY))
    found = next(lines, None)
    if found is None and isinstance(error, MemoryError):
        found = str(error) or "MemoryError"
    return found and found[:200]


@contextlib.contextmanager
def convert_exceptions(error_type, rule, received, limit=300):
    """Converts the exceptions of users' or third-party code, which may be of any type.

    Out-of-memory errors pass unchanged: the input is not their cause.

    Args:
        error_type: The type of the new error.
        rule: The rule that the input violates: a sentence.
        received: The input, which precedes the exception's type and message.
        limit: Maximum number of characters of the exception's message.

    Example:

    >>> from involution.utils.errors import convert_exceptions
    >>> with convert_exceptions(ValueError, "A file must be complete.", "a.bin"):
    ...     raise EOFError("3 bytes")
    Traceback (most recent call last):
    ValueError: A file must be complete. Received: a.bin: EOFError: 3 bytes
    """
    try:
        yield
    except Exception as error:  # users' and third-party code documents no types
        if out_of_memory_reason(error) is not None:
            raise
        cause = type(error).__name__
        if str(error).strip():
            cause += f": {one_line(error, limit)}"
        raise error_type(f"{rule} Received: {received}: {cause}") from error
