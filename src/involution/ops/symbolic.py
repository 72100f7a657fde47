"""The operator's functions as nodes of functional Keras models."""

import keras

from involution.ops.api import (
    fused_involution,
    hidden_channels_of,
    involution,
    rank_of,
    window_products,
)
from involution.ops.dispatch import select
from involution.ops.problem import Problem, check_generator, check_kernel, check_output, problem_of
from involution.ops.window import Window


class _Operation(keras.Operation):
    """A node of a functional Keras model, with the keyword arguments of a function."""

    def __init__(self, implementation=None, name=None, **arguments):
        super().__init__(name=name)
        self.implementation = implementation
        self.arguments = arguments

    def _problem(self, x, hidden_channels=None) -> Problem:
        return problem_of(Window(**self.arguments, rank=rank_of(x)), x, hidden_channels)

    def get_config(self):
        return {"name": self.name, "implementation": self.implementation, **self.arguments}


@keras.saving.register_keras_serializable(package="involution")
class InvolutionOperation(_Operation):
    """``involution`` as a node."""

    def call(self, x, kernel):
        return involution(x, kernel, implementation=self.implementation, **self.arguments)

    def compute_output_spec(self, x, kernel):
        problem = self._problem(x)
        check_kernel(problem, kernel)
        select(problem, self.implementation)
        return keras.KerasTensor(problem.output_shape, dtype=problem.dtype)


@keras.saving.register_keras_serializable(package="involution")
class WindowProductsOperation(_Operation):
    """``window_products`` as a node."""

    def call(self, x, y):
        return window_products(x, y, implementation=self.implementation, **self.arguments)

    def compute_output_spec(self, x, y):
        problem = self._problem(x)
        check_output(problem, y)
        select(problem, self.implementation)
        return keras.KerasTensor(problem.kernel_shape, dtype=problem.dtype)


# Model files contain the registered name.
@keras.saving.register_keras_serializable(package="involution", name="GenerateAndApplyOperation")
class FusedInvolutionOperation(_Operation):
    """``fused_involution`` as a node."""

    def call(self, x, hidden, weight, bias):
        arguments = {"implementation": self.implementation, **self.arguments}
        return fused_involution(x, hidden, weight, bias, **arguments)

    def compute_output_spec(self, x, hidden, weight, bias):
        problem = self._problem(x, hidden_channels_of(weight))
        check_generator(problem, hidden, weight, bias)
        select(problem, self.implementation)
        return keras.KerasTensor(problem.output_shape, dtype=problem.dtype)
