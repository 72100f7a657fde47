import numpy as np
import pytest

from involution.utils.comparison import relative_error

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([1, 2.5], [1, 2], 0.25),
        ([1, -2], [1, -2], 0),
        ([0, 0], [0, 0], 0),
        ([0, 1e-9], [0, 0], np.inf),
        ([], [], 0),
        ([1], [1, 1], np.inf),
        ([np.nan], [1], np.inf),
        ([1], [np.inf], np.inf),
        ([np.inf], [np.inf], np.inf),
    ],
)
def test_relative_error(actual, expected, error):
    assert relative_error(actual, expected) == error


def test_half_precision_does_not_overflow():
    large = np.full(2, 6e4, "float16")
    assert relative_error(-large, large) == 2
