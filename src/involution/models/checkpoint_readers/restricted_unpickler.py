"""An unpickler that executes no code from the file.

A pickle is a program for a stack machine. Python's machine imports and calls the globals that the
program names. This one supports only the instructions that data needs, imports nothing, and calls
only the functions that its caller maps to names.

Its memory is bounded by the file: strings and bytes are in the file literally, and the number of
instructions is limited. Dictionary keys must be strings or integers, because hashing deeply nested
or repeated tuples may take exponential time.
"""

import dataclasses
import pickletools
from collections.abc import Callable, Mapping

from involution.models.checkpoint_readers.errors import CheckpointError

# RedNet-152 needs some 60,000, and three times as many with an optimizer's state.
MAX_INSTRUCTIONS = 1_000_000

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
class GlobalRef:
    """The qualified name of a global in a pickle, not imported."""

    text: str


def read(file, functions: Mapping[str, Callable | None], persistent=None):
    """Reads one pickle.

    Args:
        file: An object with ``read``, ``readline`` and ``tell``, left at the end of the pickle.
        functions: The accepted globals by name: a function to call, or None for a global that may
            only be referenced. The functions must validate their arguments.
        persistent: A function of the identifiers of objects outside the pickle (persistent IDs).

    Returns:
        Dictionaries, lists, tuples, strings, bytes, numbers, ``GlobalRef`` and results of the
        functions. If a result has a method ``build``, it is called with the result's state.

    Raises:
        CheckpointError: The pickle has another global or instruction, or is too long.
        ValueError, IndexError, KeyError, TypeError, AttributeError: The pickle is malformed.
    """
    stack: list = []
    outer: list[list] = []
    memo: dict = {}

    def pop_to_mark():
        """Pops the values above the last mark, and the mark."""
        nonlocal stack
        values, stack = stack, outer.pop()
        return values

    # genops raises ValueError if STOP is missing.
    for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if step >= MAX_INSTRUCTIONS:
            raise CheckpointError(
                f"A pickle must have at most {MAX_INSTRUCTIONS:,} instructions. Received: more"
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
            values = pop_to_mark()
            stack.append(tuple(values))
        elif name in TUPLES:
            values = [stack.pop() for _ in range(TUPLES[name])]
            stack.append(tuple(reversed(values)))
        elif name == "APPEND":
            value = stack.pop()
            _of_type(stack[-1], list).append(value)
        elif name == "APPENDS":
            values = pop_to_mark()
            _of_type(stack[-1], list).extend(values)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set_items(stack[-1], [key, value])
        elif name == "SETITEMS":
            values = pop_to_mark()
            _set_items(stack[-1], values)
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_global_ref(str(argument).replace(" ", "."), functions))
        elif name == "STACK_GLOBAL":
            attribute, module = _of_type(stack.pop(), str), _of_type(stack.pop(), str)
            stack.append(_global_ref(f"{module}.{attribute}", functions))
        elif name == "REDUCE":
            arguments, function = _of_type(stack.pop(), tuple), _of_type(stack.pop(), GlobalRef)
            call = functions[function.text]
            if call is None:
                raise CheckpointError(
                    "A checkpoint must contain arrays only. "
                    f"Received: a call of {_escape(function.text)}"
                )
            stack.append(call(*arguments))
        elif name == "BUILD":
            state, target = stack.pop(), stack[-1]
            # Attributes of a dictionary, which PyTorch sets, are ignored.
            if not isinstance(target, dict):
                target.build(state)
        elif name == "BINPERSID" and persistent is not None:
            stack.append(persistent(stack.pop()))
        elif name == "STOP":
            (value,) = stack
            return value
        elif name not in ("PROTO", "FRAME"):
            raise CheckpointError(
                f"A checkpoint must contain arrays only. Received: the pickle instruction {name}"
            )


def empty_dict():
    """Stands for ``collections.OrderedDict``, whose items follow in the pickle."""
    return {}


def _global_ref(name, functions):
    if name not in functions:
        raise CheckpointError(
            "A checkpoint must contain arrays only, no code. "
            f"Received: a pickle with the global {_escape(name)}"
        )
    return GlobalRef(name)


def _of_type(value, kind):
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} instead of {kind.__name__}")
    return value


def _set_items(target, items):
    _of_type(target, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, (str, int)):
            raise TypeError(f"{type(key).__name__} as a key")
        target[key] = value


def _escape(name) -> str:
    return ascii(name[:200])[1:-1]
