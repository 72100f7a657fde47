"""Pickles, read without running anything in them.

A pickle is a program for a stack machine, and Python's own machine imports and calls what the
program names. This one knows the instructions that data needs, never looks a name up, and calls
nothing but the functions that its caller gives for a name.

What it holds in memory is bounded by the file: every text and every array of bytes stands in the
file as it is, and the number of instructions is limited. Keys of dictionaries are texts and
integers, because the hash of a deeply nested or often repeated tuple would take for ever.
"""

import dataclasses
import pickletools
from collections.abc import Callable, Mapping

from involution.models.checkpoint_readers.errors import CheckpointError

# RedNet-152 takes some 60,000, with the state of an optimizer three times as many.
STEPS = 1_000_000

LITERALS = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINSTRING",
    "SHORT_BINSTRING",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclasses.dataclass(frozen=True)
class Name:
    """A name that the pickle wants imported: the text alone."""

    text: str


def read(file, functions: Mapping[str, Callable | None], persistent=None):
    """The value of one pickle.

    Args:
        file: An object with ``read``, ``readline`` and ``tell``; it stands behind the pickle then.
        functions: What names mean: a function for one that may be called, None for one that may
            stand for itself. All others are refused. Functions are given checked arguments by
            nobody: they check.
        persistent: A function for the identifiers of objects outside of the pickle.

    Returns:
        Dictionaries, lists, tuples, texts, bytes, numbers, ``Name`` and what the functions return.
        An object with a method ``build`` gets the state that the pickle has for it.

    Raises:
        CheckpointError: The pickle wants something else.
        ValueError, IndexError, KeyError, TypeError, AttributeError: It is not well-formed.
    """
    stack: list = []
    outer: list[list] = []
    memo: dict = {}

    def tail():
        """What stands above the last mark, which it takes away."""
        nonlocal stack
        values, stack = stack, outer.pop()
        return values

    # It ends with STOP; where there is none it raises ValueError.
    for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if step >= STEPS:
            raise CheckpointError(
                f"A pickle must need at most {STEPS:,} instructions. Received: a longer one"
            )
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "MARK":
            outer.append(stack)
            stack = []
        elif name == "TUPLE":
            values = tail()
            stack.append(tuple(values))
        elif name in TUPLES:
            values = [stack.pop() for _ in range(TUPLES[name])]
            stack.append(tuple(reversed(values)))
        elif name == "APPEND":
            value = stack.pop()
            _of_type(stack[-1], list).append(value)
        elif name == "APPENDS":
            values = tail()
            _of_type(stack[-1], list).extend(values)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set_items(stack[-1], [key, value])
        elif name == "SETITEMS":
            values = tail()
            _set_items(stack[-1], values)
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_known(str(argument).replace(" ", "."), functions))
        elif name == "STACK_GLOBAL":
            attribute, module = _of_type(stack.pop(), str), _of_type(stack.pop(), str)
            stack.append(_known(f"{module}.{attribute}", functions))
        elif name == "REDUCE":
            arguments, function = _of_type(stack.pop(), tuple), _of_type(stack.pop(), Name)
            call = functions[function.text]
            if call is None:
                raise CheckpointError(
                    "A checkpoint must be made of arrays alone. "
                    f"Received: a call of {_shown(function.text)}"
                )
            stack.append(call(*arguments))
        elif name == "BUILD":
            state, target = stack.pop(), stack[-1]
            # Attributes of a dictionary, of which PyTorch has some, mean nothing here.
            if not isinstance(target, dict):
                target.build(state)
        elif name == "BINPERSID" and persistent is not None:
            stack.append(persistent(stack.pop()))
        elif name == "STOP":
            (value,) = stack
            return value
        elif name not in ("PROTO", "FRAME"):
            raise CheckpointError(
                "A checkpoint must be made of arrays alone. "
                f"Received: the pickle instruction {name}"
            )


def empty_dictionary():
    """What ``collections.OrderedDict`` means: its items come after."""
    return {}


def _known(name, functions):
    if name not in functions:
        raise CheckpointError(
            "A checkpoint must be made of arrays alone; no code of a file is run. "
            f"Received: a pickle that asks for {_shown(name)}"
        )
    return Name(name)


def _of_type(value, kind):
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} in the place of {kind.__name__}")
    return value


def _set_items(target, items):
    _of_type(target, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, (str, int)):
            raise TypeError(f"{type(key).__name__} as a key")
        target[key] = value


def _shown(name) -> str:
    return ascii(name[:200])[1:-1]
