"""The dtype policy of a test."""

import keras
import pytest
from keras.src.backend.common import dtypes


@pytest.fixture
def policy(request, monkeypatch):
    """The dtype policy of one test."""
    # On JAX and PyTorch Keras computes normalization and means in float32 even for float64, which
    # would hide errors below 1e-6.
    monkeypatch.delitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64")
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(request.param)
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])
