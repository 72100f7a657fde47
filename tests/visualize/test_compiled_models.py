"""Involutions inside compiled functions, on the backends that compile."""

import keras
import pytest

from involution.visualize.activations import capture
from tests.support.backends import in_graph
from tests.visualize.test_activations import Block, images

pytestmark = pytest.mark.skipif(
    keras.config.backend() == "torch", reason="in_graph does not compile on PyTorch"
)


class Compiled(Block):
    def call(self, x):
        return in_graph(self.deep)(x)


def test_involutions_in_compiled_functions_raise():
    with pytest.raises(ValueError, match=r"must run eagerly .* Received: deep in a compiled"):
        capture(Compiled(), images)
