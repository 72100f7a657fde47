"""The paper's layer in one to three dimensions."""

import dataclasses

import keras
from keras import ops

from involution.kernel_generators import attachment, registry
from involution.kernel_generators.base import training_argument, uses_full_input
from involution.kernel_generators.convolutional import final_projection
from involution.layers.base import BaseInvolution, input_channels
from involution.ops.centers import (
    center_output_sizes,
    center_slices,
    check_padding,
    number_of_groups,
)
from involution.ops.dispatch import standardize_implementation
from involution.ops.frameworks import namespace
from involution.ops.tensor_utils import spatial_shape, to_accumulation_dtype
from involution.ops.validation import (
    CHANNELS_LAST,
    check_axes,
    check_rate,
    standardize_tuple,
)
from involution.ops.window import Window
from involution.utils.arguments import MISNAMED, names_required

_NO_BIAS = "an involution has none; normalization after it, or `filters`, adds a bias"
_OF_GENERATOR = (
    "it is an argument of kernel generators: kernel_generator=Bottleneck({0}=...), from "
    "involution.kernel_generators"
)

_check_names = names_required(
    "An involution keeps the input's channels: for Conv{rank}D(64, 3) write {name}(3), or "
    "{name}(3, filters=64) with a 1x1 convolution.",
    {
        **MISNAMED,
        "dilation": "use `dilation_rate`",
        "out_channels": "use `filters`, for a 1x1 convolution after the involution",
        "bias": _NO_BIAS,
        "use_bias": _NO_BIAS,
        "activation": "apply it to the output, as in keras.activations.relu(layer(x))",
        "kernel_initializer": _OF_GENERATOR.format("kernel_initializer"),
        "kernel_regularizer": _OF_GENERATOR.format("kernel_regularizer"),
    },
)


class _KernelDropout(keras.layers.Dropout):
    """Dropout that creates its state when built, in the scope of its layer.

    Keras's layer creates it in ``__init__``, with a name that depends on a process-wide count.
    """

    def __init__(self, rate, **kwargs):
        check_rate("kernel_dropout", rate)
        super().__init__(0.0, **kwargs)  # creates no state
        self.rate = rate

    def build(self, input_shape):
        self.seed_generator = keras.random.SeedGenerator(name="seed_generator")


class InvolutionND(BaseInvolution):
    """The paper's layer in ``rank`` dimensions: the base of Involution1D, 2D and 3D."""

    rank: int

    @_check_names
    def __init__(
        self,
        kernel_size=7,
        *,
        strides=1,
        padding="same",
        dilation_rate=1,
        groups=None,
        group_channels=16,
        reduction_ratio=4,
        kernel_generator=None,
        return_kernel=False,
        group_layout="contiguous",
        data_format=None,
        implementation=None,
        filters=None,
        kernel_softmax=False,
        kernel_dropout=0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        window = Window(
            kernel_size,
            strides,
            padding,
            dilation_rate,
            1 if groups is None else groups,
            group_layout,
            data_format,
            self.rank,
        )
        for name, value in window.arguments().items():
            setattr(self, name, value)
        self.window = window
        # The argument: ``build`` sets ``groups`` from the input's channels.
        self._groups = self.groups = None if groups is None else window.groups
        self.group_channels = standardize_tuple("group_channels", group_channels, 1)[0]
        self.reduction_ratio = standardize_tuple("reduction_ratio", reduction_ratio, 1)[0]
        self.return_kernel = bool(return_kernel)
        if implementation is not None:
            standardize_implementation(implementation)
        self.implementation = implementation
        self.filters = None if filters is None else standardize_tuple("filters", filters, 1)[0]
        self.kernel_softmax = bool(kernel_softmax)
        self.kernel_dropout = (
            _KernelDropout(kernel_dropout, dtype=self.dtype_policy, name="kernel_dropout")
            if kernel_dropout
            else None
        )
        self._named = not isinstance(kernel_generator, (dict, keras.layers.Layer))
        self._generator_name = kernel_generator if self._named else None
        self.kernel_generator = registry.get(
            kernel_generator, self.reduction_ratio, self.dtype_policy
        )
        attachment.name_by_class(self.kernel_generator)
        self.input_spec = keras.layers.InputSpec(ndim=self.rank + 2)
        check_padding(window)

    def build(self, input_shape):
        check_axes(self, input_shape, self.rank)
        channels = input_channels(input_shape, self.data_format)
        self.groups = number_of_groups(channels, self._groups, self.group_channels)
        self.window = dataclasses.replace(self.window, groups=self.groups)
        self._output_sizes(input_shape)
        generator = self.kernel_generator
        attachment.check_unshared(generator, self)
        attachment.inherit_arguments(generator, self)
        # It may be built already: by the user, or in files of earlier releases.
        attachment.build(generator, self, self.generator_input_shape(input_shape))
        if self.kernel_dropout is not None:
            self.kernel_dropout.build(None)
        if self.filters is not None:
            self._build_projection(channels)

    def _build_projection(self, channels):
        # Channels last, which every backend supports on every device.
        projection = getattr(keras.layers, f"Conv{self.rank}D")(
            self.filters, 1, data_format=CHANNELS_LAST, dtype=self.dtype_policy, name="projection"
        )
        projection.build((None,) * (self.rank + 1) + (channels,))
        self.projection = projection

    def _output_sizes(self, input_shape) -> tuple[int | None, ...]:
        """Spatial sizes of the output; ValueError unless all windows and their centers fit."""
        return center_output_sizes(self.window, tuple(input_shape))

    def generator_input_shape(self, input_shape):
        """Shape of the generator's input, for a layer input of this shape."""
        full = uses_full_input(self.kernel_generator)
        return input_shape if full else self._features_shape(input_shape)

    def _features_shape(self, input_shape):
        window = self.window
        sizes = window.spatial(input_shape)
        cropped = tuple(
            None if n is None else min(n - center, out * s)
            for n, out, center, s in zip(
                sizes, window.output_sizes(sizes), window.first_center, self.strides, strict=True
            )
        )
        return window.shape(input_shape[0], cropped, input_shape[window.channel_axis])

    def _features(self, inputs):
        """The generator's input: starts at the first window's center."""
        window = self.window
        parts = center_slices(window, spatial_shape(inputs, window))
        return inputs[(slice(None),) * window.spatial_axis + parts] if parts else inputs

    def generate_kernel(self, inputs):
        """The kernels for ``inputs``, in the layout of ``involution.ops.involution``:
        (B, *out_spatial, taps, groups) or (B, taps, groups, *out_spatial)."""
        full = uses_full_input(self.kernel_generator)
        features = inputs if full else self._features(inputs)
        kernel = self.kernel_generator(features, **training_argument())
        window = self.window
        shape = ops.shape(kernel)
        if (
            len(shape) != self.rank + 2
            or kernel.shape[window.channel_axis] != window.taps * window.groups
        ):
            raise ValueError(
                "`kernel_generator` must return a kernel map with taps * groups = "
                f"{window.taps} * {window.groups} channels at every output position. "
                f"Received: a map of shape {tuple(kernel.shape)} from {self.kernel_generator.name}"
            )
        kernel = ops.reshape(
            kernel, window.shape(shape[0], window.spatial(shape), window.taps, window.groups)
        )
        if self.kernel_softmax:
            kernel = namespace(kernel).softmax(to_accumulation_dtype(kernel), window.tap_axis)
        if self.kernel_dropout is not None:
            kernel = self.kernel_dropout(kernel, **training_argument())
        return ops.cast(kernel, inputs.dtype)

    def _call(self, inputs):
        self._output_sizes(inputs.shape)
        return super()._call(inputs)

    def _finish(self, output):
        return output if self.filters is None else self._project(output)

    def _generator_hidden(self, inputs):
        return self.kernel_generator.hidden(self._features(inputs))

    def _generator_projection(self, inputs):
        # Kernels that are returned or modified must be stored.
        stored = self.return_kernel or self.kernel_softmax or self.kernel_dropout is not None
        # A subclass may override the generation.
        overridden = (
            getattr(self.generate_kernel, "__func__", None) is not InvolutionND.generate_kernel
        )
        if stored or overridden:
            return None
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        return final_projection(self.kernel_generator, dtype)

    def _project(self, output):
        if self.data_format == CHANNELS_LAST:
            return self.projection(output)
        return ops.moveaxis(self.projection(ops.moveaxis(output, 1, -1)), -1, 1)

    def compute_output_shape(self, input_shape):
        check_axes(self, input_shape, self.rank)
        window = self.window
        channels = input_channels(input_shape, self.data_format)
        sizes = self._output_sizes(input_shape)
        output = window.shape(input_shape[0], sizes, self.filters or channels)
        if not self.return_kernel:
            return output
        return output, window.shape(
            input_shape[0],
            sizes,
            window.taps,
            number_of_groups(channels, self._groups, self.group_channels),
        )

    def get_config(self):
        return {
            **super().get_config(),
            **self.window.arguments(),
            "groups": self._groups,
            "group_channels": self.group_channels,
            "reduction_ratio": self.reduction_ratio,
            "kernel_generator": self._generator_config(),
            "return_kernel": self.return_kernel,
            "implementation": self.implementation,
            "filters": self.filters,
            "kernel_softmax": self.kernel_softmax,
            "kernel_dropout": self.kernel_dropout.rate if self.kernel_dropout else 0.0,
        }

    def _generator_config(self):
        """The argument ``kernel_generator``: the name if the generator still equals what ``get``
        returns for it, so that a changed ``reduction_ratio`` or ``dtype`` takes effect."""
        stored = attachment.serialized(self.kernel_generator)
        if self._named:
            fresh = registry.get(self._generator_name, self.reduction_ratio, self.dtype_policy)
            if stored == attachment.serialized(fresh):
                return self._generator_name
        return stored


# The three classes differ in rank only and share one signature.
_SHARED_DOC = """

    Args:
        kernel_size: Integer, or one for each spatial dimension: the window. The only positional
            argument.
        strides: Integer, or one for each spatial dimension.
        padding: ``"same"``, ``"valid"``, ``"symmetric"`` (the paper's code), an integer, or a pair
            (before, after) for each spatial dimension; see ``involution.ops.involution``.
        dilation_rate: Integer, or one for each spatial dimension.
        groups: Number of groups; divides the channels. None: channels // group_channels, or one
            group if there are fewer channels than that.
        group_channels: Channels per group, if ``groups`` is None.
        reduction_ratio: Input channels per hidden channel of a generator given by name.
        kernel_generator: A Keras layer from features (B, *spatial, C) to a kernel map
            (B, *out_spatial, taps * groups), channels tap-major; a name (``"bottleneck"``,
            ``"contextual"``, ``"linear"``, ``"pairwise_attention"``, ``"static"``); None:
            ``kernel_generators.Bottleneck(reduction_ratio)``. A generator with weights can
            belong to only one layer. Unnamed generators, and unnamed layers inside them, are named
            by their class.
        return_kernel: Whether to return (output, kernel) or only the output.
        group_layout: ``"contiguous"`` (the paper) or ``"interleaved"`` (the keras.io example).
        data_format: ``"channels_last"``, ``"channels_first"``, or None for Keras's setting.
        implementation: See ``involution.ops.involution``.
        filters: Channels of the output, by a 1x1 convolution after the involution. None: the
            input's channels, without it.
        kernel_softmax: Whether to apply softmax to the weights of each window.
        kernel_dropout: Dropout rate on kernel weights.
        **kwargs: ``name``, ``dtype`` and so on, as in ``keras.layers.Layer``.

    Call arguments:
        inputs: Tensor (B, *spatial, C), or (B, C, *spatial) for ``"channels_first"``.
        training: Whether normalization uses the batch's statistics and dropout is active. None:
            inherited from the enclosing layer or model, or False if there is none. On PyTorch, the
            module's ``train()`` and ``eval()`` do not change it.

    Returns:
        A tensor with the channels of ``inputs``, or ``filters``, and the sizes a convolution would
        give; with ``return_kernel`` also the kernels, (B, *out_spatial, taps, groups) or (B, taps,
        groups, *out_spatial).

    Raises:
        TypeError: More than one positional argument, or an argument of another library, such as
            ``stride``; the message says what to write.
        ValueError: An argument is out of its range, the groups do not divide the channels, the
            generator's map does not fit the output, a generator with weights belongs to another
            layer, or the input has too few or too many axes.

    Source: Li et al., arXiv:2103.06255.
    """


@keras.saving.register_keras_serializable(package="involution")
class Involution1D(InvolutionND):
    __doc__ = (
        """The paper's involution layer for sequences: inputs (B, length, C).

    >>> import numpy as np, involution
    >>> tuple(involution.Involution1D(kernel_size=9)(np.ones((2, 100, 32), "float32")).shape)
    (2, 100, 32)
    """
        + _SHARED_DOC
    )
    rank = 1


@keras.saving.register_keras_serializable(package="involution")
class Involution2D(InvolutionND):
    __doc__ = (
        """The paper's involution layer for images: inputs (B, height, width, C).

    >>> import numpy as np, involution
    >>> tuple(involution.Involution2D(strides=2)(np.ones((2, 33, 20, 64), "float32")).shape)
    (2, 17, 10, 64)
    """
        + _SHARED_DOC
    )
    rank = 2


@keras.saving.register_keras_serializable(package="involution")
class Involution3D(InvolutionND):
    __doc__ = (
        """The paper's involution layer for volumes: inputs (B, depth, height, width, C).

    >>> import numpy as np, involution
    >>> tuple(involution.Involution3D(kernel_size=3)(np.ones((1, 5, 6, 7, 16), "float32")).shape)
    (1, 5, 6, 7, 16)
    """
        + _SHARED_DOC
    )
    rank = 3
