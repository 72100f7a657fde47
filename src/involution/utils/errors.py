"""The errors that are not ours: each is one line, the rule, then the value received."""

import re

# C0 and C1 controls, DEL, line and paragraph separators, marks of direction, and halves of pairs,
# which have no encoding: a terminal would obey them, or lines look like others than they are.
CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]"
)


def shown(text, keep="") -> str:
    """A text as it may be written anywhere: its control characters as escapes, as in JSON.

    Names in files of strangers are data, and must not move a cursor or begin a line.

    Args:
        text: The text.
        keep: Control characters that stay.

    Example:

    >>> from involution.utils.errors import shown
    >>> print(shown("cat \\x1b[2J\\n"), shown("고양이"))
    cat \\u001b[2J\\u000a 고양이
    """
    return CONTROL.sub(lambda m: m[0] if m[0] in keep else f"\\u{ord(m[0]):04x}", str(text))


class InputError(ValueError):
    """What was given cannot be used."""


class WriteError(OSError):
    """A file could not be written; what was in its place before is there as it was."""

    def __str__(self):
        return f"A file must be written whole. Received: {self.filename}: {self.strerror}"


# What frameworks say then: TensorFlow and JAX, PyTorch on CPUs, on CUDA devices.
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "allocate memory", "out of memory", "OOM when allocating")


def out_of_memory(error) -> str | None:
    """The line of an error that tells that memory did not suffice; None: it is another error."""
    lines = (n for n in str(error).splitlines() if any(said in n for said in OUT_OF_MEMORY))
    found = next(lines, None)
    if found is None and isinstance(error, MemoryError):
        found = str(error) or "MemoryError"
    return found and found[:200]
