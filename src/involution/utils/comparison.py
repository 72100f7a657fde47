"""Comparison of an array with its expected value."""

import numpy as np


def relative_error(actual, expected) -> float:
    """The largest difference, relative to the largest absolute value that is expected.

    Infinite for another shape and for values that are not finite; 0 for arrays without elements.

    Example:

    >>> from involution.utils.comparison import relative_error
    >>> relative_error([1.0, 2.5], [1.0, 2.0])
    0.25
    """
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    if actual.shape != expected.shape:
        return np.inf
    if not expected.size:
        return 0.0
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):
        return np.inf
    difference, magnitude = np.abs(actual - expected).max(), np.abs(expected).max()
    return float(difference / magnitude) if magnitude else np.inf if difference else 0.0
