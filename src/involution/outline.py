"""A model with shapes and without values: what a file asks for, known before memory is taken."""

import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

import keras

Built = TypeVar("Built")


def outline(build: Callable[[], Built]) -> Built:
    """What a function builds, its variables without values.

    The function runs in a thread of its own: Keras keeps by thread which variables still wait for
    values, so that nothing of them is left when the thread ends.

    Args:
        build: A function without arguments.

    Returns:
        What it returns. Of its variables only names, types and shapes can be asked.

    Raises:
        Exception: Whatever the function raises.

    Example:

    >>> import involution
    >>> from involution.outline import outline
    >>> outline(lambda: involution.models.cnn(classes=10**12)).count_params()
    65000000318528
    """

    def within():
        with keras.StatelessScope(initialize_variables=False):
            return build()

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(within).result()
