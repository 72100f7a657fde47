"""Habits from other layers: errors that name the right argument."""

import functools
import inspect
import reprlib

from involution.utils.errors import escape_controls

_INPUT_CHANNELS = "the input's channels are known when the layer is built"

# Arguments of other libraries, and what to write in a layer or a kernel generator.
MISNAMED = {
    "stride": "use `strides`",  # PyTorch and the keras.io example
    "group_number": "use `groups`",  # the keras.io example
    "in_channels": _INPUT_CHANNELS,  # PyTorch
    "channels": _INPUT_CHANNELS,  # the paper's code
    "channel": _INPUT_CHANNELS,  # the keras.io example
}


def names_required(advice, misnamed):
    """A decorator for an ``__init__`` with keyword-only arguments: its errors name the right one.

    Args:
        advice: A sentence for calls with too many positional arguments, in which ``{name}`` and
            ``{rank}`` are the name of the class and its attribute ``rank``.
        misnamed: From arguments of other libraries to what to write.

    Raises:
        TypeError: Too many positional arguments, or a keyword of ``misnamed``.
    """

    def decorate(init):
        signature = inspect.signature(init)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        _, *positional = (n for n, p in signature.parameters.items() if p.kind is kind)

        @functools.wraps(init)
        def checked(self, *args, **kwargs):
            if len(args) > len(positional) or not misnamed.keys().isdisjoint(kwargs):
                # The class that was called, unless its own ``__init__`` called this one.
                own = (c for c in type(self).__mro__ if getattr(c, init.__name__) is checked)
                name = next(own).__name__
                if len(args) > len(positional):
                    hint = advice.format(name=name, rank=getattr(self, "rank", None))
                    raise TypeError(
                        f"Only {' and '.join(positional)} of {name}() may be positional. {hint} "
                        f"Received: {name}({', '.join(map(_shown, args))})"
                    )
                wrong = next(n for n in kwargs if n in misnamed)
                raise TypeError(
                    f"{name}() has no argument `{wrong}`: {misnamed[wrong]}. "
                    f"Received: {wrong}={_shown(kwargs[wrong])}"
                )
            init(self, *args, **kwargs)

        # Keras reads the arguments by ``inspect.getfullargspec``, which ignores ``__wrapped__``.
        vars(checked)["__signature__"] = signature
        return checked

    return decorate


def _shown(value) -> str:
    return escape_controls(reprlib.repr(value))
