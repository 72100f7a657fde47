"""The operator's functions as nodes of functional Keras models."""

import keras

from involution.ops import calls
from involution.ops.calls import hidden_channels_of, rank_of
from involution.ops.dispatch import select
from involution.ops.problem import Problem, check_generator, check_kernel, check_output, problem_of
from involution.ops.transposed import TransposedWindow
from involution.ops.window import Window


class _Operation(keras.Operation):
    """A node of a functional Keras model, with the keyword arguments of a function."""

    def __init__(self, implementation=None, name=None, **arguments):
        super().__init__(name=name)
        self.implementation = implementation
        self.arguments = arguments

    def _window(self, x) -> Window:
        return Window(**self.arguments, rank=rank_of(x))

    def _problem(self, x, hidden_channels=None) -> Problem:
        return problem_of(self._window(x), x, hidden_channels)

    def get_config(self):
        return {"name": self.name, "implementation": self.implementation, **self.arguments}


@keras.saving.register_keras_serializable(package="involution")
class InvolutionOperation(_Operation):
    """``involution`` as a node."""

    def call(self, x, kernel):
        return calls.involution(self._window(x), self.implementation, x, kernel)

    def compute_output_spec(self, x, kernel):
        problem = self._problem(x)
        check_kernel(problem, kernel)
        select(problem, self.implementation)
        return keras.KerasTensor(problem.output_shape, dtype=problem.dtype)


@keras.saving.register_keras_serializable(package="involution")
class WindowProductsOperation(_Operation):
    """``window_products`` as a node."""

    def call(self, x, y):
        return calls.window_products(self._window(x), self.implementation, x, y)

    def compute_output_spec(self, x, y):
        problem = self._problem(x)
        check_output(problem, y)
        select(problem, self.implementation)
        return keras.KerasTensor(problem.kernel_shape, dtype=problem.dtype)


@keras.saving.register_keras_serializable(package="involution")
class TransposedInvolutionOperation(_Operation):
    """``transposed_involution`` as a node."""

    def __init__(self, implementation=None, name=None, output_padding=None, **arguments):
        super().__init__(implementation, name, **arguments)
        self.output_padding = output_padding

    def _transposed(self, x) -> TransposedWindow:
        return TransposedWindow.of(self._window(x), self.output_padding)

    def call(self, x, kernel):
        return calls.transposed_involution(self._transposed(x), self.implementation, x, kernel)

    def compute_output_spec(self, x, kernel):
        problem = self._transposed(x).problem_of(x)
        check_kernel(problem, kernel)
        select(problem, self.implementation)
        return keras.KerasTensor(problem.x_shape, dtype=problem.dtype)

    def get_config(self):
        return {**super().get_config(), "output_padding": self.output_padding}


# Model files contain the registered name.
@keras.saving.register_keras_serializable(package="involution", name="GenerateAndApplyOperation")
class FusedInvolutionOperation(_Operation):
    """``fused_involution`` as a node."""

    def call(self, x, hidden, weight, bias):
        return calls.fused_involution(self._window(x), self.implementation, x, hidden, weight, bias)

    def compute_output_spec(self, x, hidden, weight, bias):
        problem = self._problem(x, hidden_channels_of(weight))
        check_generator(problem, hidden, weight, bias)
        select(problem, self.implementation)
        return keras.KerasTensor(problem.output_shape, dtype=problem.dtype)
