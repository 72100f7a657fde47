"""Base class of the involution layers: one forward call."""

import keras
from keras import ops

from involution.kernel_generators.base import training_scope
from involution.layers.recording import record, replaced, stores_kernels
from involution.ops.calls import apply_generated, apply_kernels
from involution.ops.dispatch import Selection, select
from involution.ops.problem import check_generator, check_kernel, problem_of
from involution.ops.tensor_utils import as_tensors
from involution.ops.validation import CHANNELS_LAST
from involution.ops.window import Window

_ON_TORCH = keras.config.backend() == "torch"
if _ON_TORCH:
    from involution.layers.torch_training import warn_at_backward


class BaseInvolution(keras.layers.Layer):
    """One call: select an implementation, generate the kernels, apply them.

    A subclass sets ``window`` in ``__init__`` or ``build``, and implements ``generate_kernel``,
    ``_generator_projection`` and ``_generator_hidden``.
    """

    window: Window
    implementation: str | tuple[str, ...] | None = None
    return_kernel = False

    def generate_kernel(self, inputs, **context):
        """The kernels for ``inputs``, in the layout of ``involution.ops.involution``.

        ``context`` has the other tensors of the call, of layers that take some."""
        raise NotImplementedError  # each layer has its own

    def _generator_projection(self, inputs):
        """Weight and bias that turn ``_generator_hidden`` into kernels, if the kernels may be
        generated where they are applied; None if they must be stored."""
        raise NotImplementedError  # each layer has its own

    def _generator_hidden(self, inputs):
        """Hidden channels of the generator: (B, *out_spatial, hidden channels)."""
        raise NotImplementedError  # each layer has its own

    def chosen_implementation(self, inputs) -> str:
        """Name of the implementation that runs on ``inputs``, a tensor or a ``keras.KerasTensor``,
        after the layer is built; ``"fused"`` or ``"banded"`` if no kernels are stored."""
        if not self.built:
            raise ValueError(
                "The layer must be built: call it on an input first. "
                f"Received: {self.name}, not built"
            )
        return self.select_implementation(inputs, self._generator_projection(inputs)).name

    def select_implementation(self, inputs, projection) -> Selection:
        hidden = None if projection is None else projection[0].shape[0]
        return select(problem_of(self.window, inputs, hidden), self.implementation)

    def call(self, inputs, training=None):
        return self.run_call(training, inputs=inputs)

    def run_call(self, training, **tensors):
        if next(iter(tensors.values())).shape[0] == 0:
            return self._empty_outputs(tensors)
        with training_scope(training):
            # ``stateless_call`` passes arrays unconverted.
            tensors = dict(zip(tensors, as_tensors(**tensors), strict=True))
            outputs = self._call(**tensors)
        if training is None and _ON_TORCH:
            warn_at_backward(self, outputs)
        return outputs

    def _empty_outputs(self, tensors):
        """The outputs of an empty batch: normalization has no statistics of it, and convolutions of
        TensorFlow fail on some processors."""
        sample = {
            name: ops.concatenate((x, ops.zeros((1, *ops.shape(x)[1:]), x.dtype)))
            for name, x in tensors.items()
        }
        return keras.tree.map_structure(lambda y: y[:0], self.run_call(False, **sample))

    def _call(self, inputs, **context):
        projection = None if stores_kernels() else self._generator_projection(inputs)
        selection = self.select_implementation(inputs, projection)
        if selection.generates and projection is not None:
            # The call of the last layer, which is skipped, would cast its input and its weights.
            operands = (self._generator_hidden(inputs), *projection)
            operands = tuple(ops.cast(operand, inputs.dtype) for operand in operands)
            check_generator(selection.problem, *operands)
            return self._finish(apply_generated(selection, inputs, *operands))
        kernel = replaced(self, self.generate_kernel(inputs, **context))
        check_kernel(selection.problem, kernel)
        output = self._finish(apply_kernels(selection, inputs, kernel))
        record(self, self.window, inputs, kernel, output)
        return (output, self._returned(kernel)) if self.return_kernel else output

    def _finish(self, output):
        """The layer's output, from the involution's."""
        return output

    def _returned(self, kernel):
        """The kernels as ``return_kernel`` returns them."""
        return kernel


def input_channels(input_shape, data_format) -> int:
    channels = input_shape[-1 if data_format == CHANNELS_LAST else 1]
    if channels is None:
        raise ValueError(
            "The number of channels must be known when the layer is built. "
            f"Received: input shape {tuple(input_shape)}"
        )
    return channels
