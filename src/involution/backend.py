"""Which of Keras's backends runs, decided before Keras is imported."""

import importlib.util
import json
import os
import pathlib
import sys

# In order of preference where nothing is configured. TensorFlow first: of the three it trains a
# small convolutional network fastest on a CPU (an epoch of CIFAR-10 in 11-22 s; PyTorch 37 s, JAX
# 67 s, whose gradient of a convolution is slow there).
BACKENDS = ("tensorflow", "jax", "torch")

# Keras's backends that infer but do not train: ours to leave alone.
OTHERS = ("numpy", "openvino")

# What ``select`` had to say, for a command whose standard error goes to a log.
notice: str | None = None

INSTALL = {
    "tensorflow": "pip install 'involution[tensorflow]' (or [tensorflow-cpu])",
    "jax": "pip install 'involution[jax]'",
    "torch": "pip install 'involution[torch]'",
}


def installed() -> tuple[str, ...]:
    """The backends that can be imported, in order of preference."""
    return tuple(b for b in BACKENDS if importlib.util.find_spec(b) is not None)


def configured() -> str | None:
    """The backend that Keras's configuration file names; None where it names none."""
    home = os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras")
    try:
        backend = json.loads((pathlib.Path(home) / "keras.json").read_text())["backend"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return backend if isinstance(backend, str) else None


def select() -> str:
    """Sets KERAS_BACKEND where it is unset, so that Keras imports; returns the backend.

    A backend named by KERAS_BACKEND is taken or refused. One from the configuration file that is
    not installed gives way to an installed one, and one line on standard error says so.

    Raises:
        ImportError: No backend is installed, or not the one that KERAS_BACKEND names.
    """
    if "keras" in sys.modules:
        return sys.modules["keras"].config.backend()
    available = installed()
    if not available:
        raise ImportError(f"No Keras backend is installed: {'; '.join(INSTALL.values())}.")
    named = os.environ.get("KERAS_BACKEND")
    if named:
        if named not in (*available, *OTHERS):
            how = INSTALL.get(named, f"one of {', '.join(BACKENDS)}")
            raise ImportError(
                f"The Keras backend that KERAS_BACKEND names must be installed: {how}. "
                f"Received: KERAS_BACKEND={named}"
            )
        return named
    wanted = configured()
    chosen = wanted if wanted in (*available, *OTHERS) else available[0]
    if wanted not in (None, chosen):
        global notice
        notice = f"Keras is configured for {wanted}, which is not installed: using {chosen}"
        print(f"involution: {notice}", file=sys.stderr)
    os.environ["KERAS_BACKEND"] = chosen
    return chosen
