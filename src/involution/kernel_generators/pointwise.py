"""1x1 convolutions and causal ones, computed as matrix products.

On PyTorch, Keras transposes channels-last images before and after a convolution, which doubles the
time of RedNet's 1x1 convolutions. On the other backends it makes no difference.

Only ``affine`` reads weights in order to skip a layer's call.
"""

import contextlib
import threading

import keras

from involution.ops.rowwise import rowwise_matmul
from involution.ops.validation import CAUSAL, CHANNELS_LAST, SAME, check_axes


class _Traced(threading.local):
    """Whether ``as_convolutions`` is active in this thread."""

    as_convolutions = False


_traced = _Traced()


def traces_convolutions() -> bool:
    """Whether ``as_convolutions`` is active."""
    return _traced.as_convolutions


@contextlib.contextmanager
def as_convolutions():
    """Within the block, pointwise convolutions and average pooling call those of the framework,
    which runtimes of exported files fuse with the normalization and the activation that follow, or
    have a kernel for."""
    before, _traced.as_convolutions = _traced.as_convolutions, True
    try:
        yield
    finally:
        _traced.as_convolutions = before


class _Pointwise(keras.layers.Layer):
    """Computes a Keras convolution of kernel size 1, channels last, by ``matmul``: a mix-in."""

    rank: int
    strides: tuple[int, ...]

    def __init__(self, filters, kernel_size=1, *args, data_format=CHANNELS_LAST, **kwargs):
        super().__init__(filters, kernel_size, *args, data_format=data_format, **kwargs)
        one = (1,) * self.rank
        if self.kernel_size != one or self.groups != 1 or self.data_format != CHANNELS_LAST:
            raise ValueError(
                "A pointwise convolution must have `kernel_size` 1, `groups` 1 and `data_format` "
                f"'channels_last'. Received: kernel_size={self.kernel_size}, "
                f"groups={self.groups}, data_format={self.data_format!r}"
            )

    def build(self, input_shape):
        check_axes(self, input_shape, self.rank)
        super().build(input_shape)
        # Keras sets a minimum number of axes only, and a matrix product accepts more.
        axes = {-1: input_shape[-1]}
        self.input_spec = keras.layers.InputSpec(ndim=self.rank + 2, axes=axes)

    def compute_output_shape(self, input_shape):
        check_axes(self, input_shape, self.rank)
        return super().compute_output_shape(input_shape)

    def convolution_op(self, inputs, kernel):
        # JAX's exporter to ONNX supports no convolution in three dimensions.
        if _traced.as_convolutions and self.rank < 3:
            return super().convolution_op(inputs, kernel)
        if any(s > 1 for s in self.strides):
            inputs = inputs[(slice(None), *(slice(None, None, s) for s in self.strides))]
        return _matmul(inputs, kernel[(0,) * self.rank])


@keras.saving.register_keras_serializable(package="involution")
class CausalConv1D(keras.layers.Conv1D):
    """``keras.layers.Conv1D`` with causal padding, channels last, without strides, dilation,
    groups and activation.

    Where the compiled kernels run, the bits of an output do not depend on the length of the
    sequence: those of a framework's matrix products do.
    """

    def call(self, inputs):
        (taps,) = self.kernel_size
        columns = inputs
        if taps > 1:
            length = keras.ops.shape(inputs)[1]
            padded = keras.ops.pad(inputs, [(0, 0), (taps - 1, 0), (0, 0)])
            columns = [padded[:, tap : tap + length] for tap in range(taps)]
            columns = keras.ops.concatenate(columns, axis=-1)
        outputs = rowwise_matmul(columns, keras.ops.reshape(self.kernel, (-1, self.filters)))
        return outputs + self.bias if self.use_bias else outputs


def _matmul(a, b):
    # On PyTorch, keras.ops.matmul computes in float32.
    is_float64 = keras.backend.standardize_dtype(a.dtype) == "float64"
    return a @ b if is_float64 else keras.ops.matmul(a, b)


@keras.saving.register_keras_serializable(package="involution")
class PointwiseConv1D(_Pointwise, keras.layers.Conv1D):
    """``keras.layers.Conv1D`` of kernel size 1, channels last."""


@keras.saving.register_keras_serializable(package="involution")
class PointwiseConv2D(_Pointwise, keras.layers.Conv2D):
    """``keras.layers.Conv2D`` of kernel size 1, channels last."""


@keras.saving.register_keras_serializable(package="involution")
class PointwiseConv3D(_Pointwise, keras.layers.Conv3D):
    """``keras.layers.Conv3D`` of kernel size 1, channels last."""


# Layers whose ``call`` is known. Compared by exact type: a subclass may override ``call``.
AFFINE = (
    CausalConv1D,
    PointwiseConv1D,
    PointwiseConv2D,
    PointwiseConv3D,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
)
# Attributes of an instance that replace its class's methods.
OVERRIDES = frozenset(("call", "forward", "convolution_op"))


def has_plain_call(layer) -> bool:
    """Whether calling a layer runs its class's ``call`` and has no other effect: no regularizer of
    its output, no quantization, no method replaced in the instance, no PyTorch hook."""
    return (
        layer.activity_regularizer is None
        and layer.quantization_mode is None
        and OVERRIDES.isdisjoint(vars(layer))
        and not _hooked(layer)
    )


def _hooked(layer) -> bool:
    """Whether a layer has PyTorch hooks."""
    if keras.config.backend() != "torch":
        return False
    from involution.utils.torch_hooks import is_hooked

    return is_hooked(layer)


def affine(layer):
    """The matrix (channels, filters) and the bias (filters,) of a layer for which

        layer(x) == x @ matrix + bias

    for ``x`` with the channels last and of the layer's compute dtype, with no other effect of the
    call. None for all other layers. The layer's exact type and settings are checked at each call,
    because they can change.

    Regularizers and constraints of the weights do not count: Keras and the optimizer apply them to
    the variables, whether the layer is called or not.
    """
    if type(layer) not in AFFINE or not layer.built or not has_plain_call(layer):
        return None
    one = (1,) * layer.rank
    plain = (
        layer.kernel_size == one
        and layer.strides == one
        and layer.groups == 1
        and layer.data_format == CHANNELS_LAST
        and layer.use_bias
        and layer.activation in (None, keras.activations.linear)
        and layer.autocast
        and not layer.lora_enabled
    )
    return (layer.kernel[(0,) * layer.rank], layer.bias) if plain else None


POINTWISE_CONVS = {1: PointwiseConv1D, 2: PointwiseConv2D, 3: PointwiseConv3D}


def conv_class(rank, kernel_size, padding=SAME):
    """The layer class of a channels-last convolution with this kernel size in each dimension."""
    if padding == CAUSAL:
        return CausalConv1D
    return POINTWISE_CONVS[rank] if kernel_size == 1 else getattr(keras.layers, f"Conv{rank}D")
