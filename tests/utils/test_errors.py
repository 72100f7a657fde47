"""Errors: one line, the rule and then the value received."""

import pytest

from involution.utils.errors import InputError, convert_exceptions, one_line

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("a\n\x1b[1mb\x1b[0m  c"), "a b c"),
        (KeyError(), "KeyError"),
        (ValueError(" "), "ValueError"),
        (ValueError("ab" * 6), "abababa..."),
    ],
)
def test_message_is_one_line_of_limited_length(error, text):
    assert one_line(error, limit=10) == text


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError("too\nlong"), "OSError: too ..."),
        (KeyError(), "KeyError"),
        (InputError("a"), "InputError: a"),
    ],
)
def test_exceptions_are_converted(error, cause):
    with (
        pytest.raises(InputError) as caught,
        convert_exceptions(InputError, "A file must be short.", "a.txt", limit=7),
    ):
        raise error
    assert str(caught.value) == f"A file must be short. Received: a.txt: {cause}"
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("first line\nRESOURCE_EXHAUSTED: out of memory"),
        KeyboardInterrupt(),
        SystemExit(3),
    ],
)
def test_out_of_memory_and_interruptions_pass(error):
    with pytest.raises(type(error)) as caught, convert_exceptions(InputError, "Rule.", "value"):
        raise error
    assert caught.value is error
