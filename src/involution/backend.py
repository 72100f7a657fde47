"""Selects Keras's backend before Keras is imported."""

import importlib.util
import json
import os
import pathlib
import sys

# In order of preference if none is configured. TensorFlow trains a small convolutional network
# fastest on a CPU: an epoch of CIFAR-10 takes 11-22 s, against 37 s with PyTorch and 67 s with JAX,
# whose convolution gradient is slow on CPUs.
BACKENDS = ("tensorflow", "jax", "torch")

# Keras backends for inference only, whose installation is left to Keras to check.
INFERENCE_BACKENDS = ("numpy", "openvino")

# The warning of ``select``, for commands whose standard error goes to a log.
warning: str | None = None

INSTALL = {
    "tensorflow": "pip install 'involution[tensorflow]' (or [tensorflow-cpu])",
    "jax": "pip install 'involution[jax]'",
    "torch": "pip install 'involution[torch]'",
}


def installed() -> tuple[str, ...]:
    """The installed backends, in order of preference."""
    return tuple(b for b in BACKENDS if importlib.util.find_spec(b) is not None)


def _configured(name) -> str | None:
    """A setting of Keras's configuration file; None if it has none."""
    home = os.environ.get("KERAS_HOME") or os.path.expanduser("~/.keras")
    try:
        value = json.loads((pathlib.Path(home) / "keras.json").read_text())[name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, str) else None


def configured() -> str | None:
    """The backend in Keras's configuration file; None if it has none."""
    return _configured("backend")


# Read once: torch.compile cannot trace reading a file.
_data_format = _configured("image_data_format")


def image_data_format() -> str:
    """Keras's setting ``image_data_format``, without importing Keras."""
    if "keras" in sys.modules:
        return sys.modules["keras"].config.image_data_format()
    return "channels_last" if _data_format is None else _data_format


def select() -> str:
    """Sets KERAS_BACKEND if it is unset, so that Keras can be imported; returns the backend.

    A backend in the configuration file that is not installed is replaced by an installed one, with
    a one-line warning on standard error.

    Raises:
        ImportError: No backend is installed, or the one in KERAS_BACKEND is not.
    """
    if "keras" in sys.modules:
        return sys.modules["keras"].config.backend()
    available = installed()
    if not available:
        raise ImportError(f"No Keras backend is installed: {'; '.join(INSTALL.values())}.")
    requested = os.environ.get("KERAS_BACKEND")
    if requested:
        if requested not in (*available, *INFERENCE_BACKENDS):
            how = INSTALL.get(requested, f"one of {', '.join(BACKENDS)}")
            raise ImportError(
                f"The backend in KERAS_BACKEND must be installed: {how}. "
                f"Received: KERAS_BACKEND={requested}"
            )
        return requested
    preferred = configured()
    chosen = preferred if preferred in (*available, *INFERENCE_BACKENDS) else available[0]
    if preferred not in (None, chosen):
        global warning
        warning = f"Keras is configured for {preferred}, which is not installed: using {chosen}"
        print(f"involution: {warning}", file=sys.stderr)
    os.environ["KERAS_BACKEND"] = chosen
    return chosen
