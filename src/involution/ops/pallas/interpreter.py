"""Whether Pallas interprets its kernels."""

import os


def is_interpreter() -> bool:
    """Whether Pallas interprets its kernels, on any device: for tests."""
    return os.environ.get("INVOLUTION_PALLAS_INTERPRET") == "1"
