"""Involution layers: the keras.io example's as a drop-in, and the paper's in one to three
dimensions."""

import contextlib
import threading
from typing import NamedTuple

import keras
from keras import ops

from involution.kernel_generators import generators
from involution.kernel_generators.generators import current_training, layers_within, training_scope
from involution.kernel_generators.pointwise import only_calls
from involution.ops.api import chosen, generate_and_apply, implementation_names, involution
from involution.ops.geometry import (
    CHANNELS_LAST,
    CONTIGUOUS,
    INTERLEAVED,
    SAME,
    SYMMETRIC,
    Geometry,
)
from involution.ops.problem import (
    check_axes,
    integers,
    one_of,
    output_sizes,
    standardize_data_format,
    standardize_padding,
)
from involution.ops.tensor_utils import sizes as view_sizes
from involution.ops.tensor_utils import softmax, wide


class Call(NamedTuple):
    """What one involution was given, generated and gave, as ``recording`` tells it.

    Attributes:
        layer: The layer.
        geometry: Where its windows lie.
        inputs: Its input.
        kernel: The kernels, as ``involution.ops.involution`` takes them.
        outputs: Its output, without the kernels.
    """

    layer: keras.layers.Layer
    geometry: Geometry
    inputs: object
    kernel: object
    outputs: object


class _Record(threading.local):
    """The calls of this thread, while they are recorded."""

    calls: list[Call] | None = None


_record = _Record()


@contextlib.contextmanager
def recording():
    """Within the block every involution that runs in this thread, in whatever model, adds a
    ``Call`` to the list yielded: with values where a model is called, with symbols where it is
    traced."""
    before, _record.calls = _record.calls, []
    try:
        yield _record.calls
    finally:
        _record.calls = before


@keras.saving.register_keras_serializable(package="involution")
class Involution(keras.layers.Layer):
    """The layer of the keras.io example "Involutional neural networks", as a drop-in.

    Same arguments in the same order, same weights in the same order, same numbers; ``.keras`` and
    ``.weights.h5`` files of the example load into it. It also works where the original does not:
    unknown and changing sizes, odd sizes with strides, every backend, saving and loading.

    It differs from the paper's layer (``Involution2D``) in what the example differs: channel c
    belongs to group c % group_number, padding is ``"same"``, so is the strided average pooling,
    the first convolution has a bias, and batch normalization has Keras's defaults.

    Args:
        channel: Sets the hidden width of the kernel generator, channel // reduction_ratio. It does
            not change the output, which always has the input's channels. None: the input's.
        group_number: Number of groups; divides the input's channels.
        kernel_size: Side of the square window.
        stride: Distance of windows, in both directions.
        reduction_ratio: See ``channel``.
        name: Name of the layer.
        return_kernel: Whether the layer returns (output, kernel), as the example's does, or the
            output alone, which fits a ``keras.Sequential``.
        **kwargs: ``dtype``, ``trainable`` and so on, as in ``keras.layers.Layer``.

    Call arguments:
        inputs: Tensor (B, H, W, C).
        training: Whether batch normalization takes the batch's statistics. None: as the layer or
            model around it, and otherwise False.

    Returns:
        ``(output, kernel)`` with shapes (B, H', W', C) and (B, H', W', kernel_size**2, 1,
        group_number), where H' = ceil(H / stride); or ``output`` alone.

    Raises:
        ValueError: An argument is out of its range, the hidden width is 0, ``group_number`` does
            not divide the input's channels, or the input has not four axes.

    Example:

    >>> import numpy as np, involution
    >>> output, kernel = involution.Involution(3, 1, 5, 2, 1, "inv")(np.ones((2, 33, 32, 3)))
    >>> tuple(output.shape), tuple(kernel.shape)
    ((2, 17, 16, 3), (2, 17, 16, 25, 1, 1))
    """

    def __init__(
        self,
        channel=None,
        group_number=1,
        kernel_size=3,
        stride=1,
        reduction_ratio=1,
        name=None,
        return_kernel=True,
        **kwargs,
    ):
        super().__init__(name=name, **kwargs)
        self.channel = None if channel is None else integers("channel", channel, 1)[0]
        self.group_number = integers("group_number", group_number, 1)[0]
        self.kernel_size = integers("kernel_size", kernel_size, 1)[0]
        self.stride = integers("stride", stride, 1)[0]
        self.reduction_ratio = integers("reduction_ratio", reduction_ratio, 1)[0]
        self.return_kernel = bool(return_kernel)
        self.input_spec = keras.layers.InputSpec(ndim=4)
        self._geometry = Geometry(
            (self.kernel_size,) * 2,
            (self.stride,) * 2,
            SAME,
            (1, 1),
            self.group_number,
            INTERLEAVED,
            CHANNELS_LAST,
        )

    def build(self, input_shape):
        check_axes(self, input_shape, 2)
        channels = _channels(input_shape, CHANNELS_LAST)
        if channels % self.group_number:
            raise ValueError(
                "`group_number` must divide the input's channels: "
                f"for {channels} channels one of {_divisors(channels)}. "
                f"Received: group_number={self.group_number}"
            )
        width = channels if self.channel is None else self.channel
        hidden = width // self.reduction_ratio
        if hidden == 0:
            raise ValueError(
                "`channel` // `reduction_ratio` must be at least 1. "
                f"Received: channel={width}, reduction_ratio={self.reduction_ratio}"
            )
        layers = keras.layers
        common = {"data_format": CHANNELS_LAST, "dtype": self.dtype_policy}
        # Named as Keras names the first of their classes: the names that it makes for the next ones
        # would give two equal models weights of different paths.
        self.kernel_gen = keras.Sequential(
            [
                layers.Conv2D(hidden, 1, name="conv2d", **common),
                layers.BatchNormalization(dtype=self.dtype_policy, name="batch_normalization"),
                layers.ReLU(dtype=self.dtype_policy, name="re_lu"),
                layers.Conv2D(
                    self._geometry.taps * self.group_number, 1, name="conv2d_1", **common
                ),
            ],
            name="sequential",
        )
        # A Sequential casts its input to its own policy's type.
        self.kernel_gen.dtype_policy = self.dtype_policy
        self.kernel_gen.build((None, None, None, channels))

    def generate_kernel(self, inputs):
        """The kernels for ``inputs``: (B, H', W', kernel_size**2, group_number)."""
        pooled = self._pooled(inputs)
        if pooled.shape[0] == 0:
            # To a convolution of nothing TensorFlow gives a wrong shape on some processors.
            one = ops.zeros((1, *ops.shape(pooled)[1:]), pooled.dtype)
            kernel = self.kernel_gen(one, training=False)[:0]
        else:
            kernel = self.kernel_gen(pooled, training=current_training())
        batch, height, width, _ = ops.shape(kernel)
        shape = (batch, height, width, self._geometry.taps, self.group_number)
        return ops.cast(ops.reshape(kernel, shape), inputs.dtype)

    def chosen_implementation(self, inputs) -> str:
        """The name of the implementation that runs on ``inputs``, a tensor or a
        ``keras.KerasTensor``, once the layer was called; ``"fused"`` where no kernels are
        stored."""
        return _chosen_when_built(self, inputs)

    def _expansion(self, inputs):
        """As ``InvolutionND`` has it."""
        own = getattr(self.generate_kernel, "__func__", None) is not Involution.generate_kernel
        generator = self.kernel_gen
        # A subclass may have any layer there.
        if self.return_kernel or own or type(generator) is not keras.Sequential:
            return None
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        if inputs.shape[0] == 0 or generator.compute_dtype != dtype or not only_calls(generator):
            return None
        layers = generator.layers
        channels = self._geometry.taps * self.group_number
        return generators.last_step(layers[-1], dtype, channels) if layers else None

    def _hidden(self, inputs):
        hidden = self._pooled(inputs)
        for layer in self.kernel_gen.layers[:-1]:
            hidden = layer(hidden, training=current_training())
        return hidden

    def generator_input_shape(self, input_shape):
        """The shape of what the generator gets for an input of this shape."""
        batch, *sizes, channels = input_shape
        return (batch, *self._geometry.output_sizes(sizes), channels)

    def _pooled(self, inputs):
        # Keras's own "same" pooling gives other means on PyTorch than on TensorFlow and JAX.
        return generators.average_pool(inputs, (self.stride,) * 2, centred=True)

    def _arguments(self) -> dict:
        return {
            "kernel_size": self.kernel_size,
            "strides": self.stride,
            "groups": self.group_number,
            "group_layout": INTERLEAVED,
            "data_format": CHANNELS_LAST,
        }

    def call(self, inputs, training=None):
        with training_scope(training):
            return self._call(inputs)

    def _call(self, inputs):
        output = _fused(self, inputs)
        if output is not None:
            return output
        kernel = self.generate_kernel(inputs)
        output = involution(inputs, kernel, **self._arguments())
        if _record.calls is not None:
            _record.calls.append(Call(self, self._geometry, inputs, kernel, output))
        return (output, ops.expand_dims(kernel, -2)) if self.return_kernel else output

    def compute_output_shape(self, input_shape):
        check_axes(self, input_shape, 2)
        batch, height, width, channels = input_shape
        height, width = self._geometry.output_sizes((height, width))
        output = (batch, height, width, channels)
        if not self.return_kernel:
            return output
        return output, (batch, height, width, self._geometry.taps, 1, self.group_number)

    def get_config(self):
        return {
            **super().get_config(),
            "channel": self.channel,
            "group_number": self.group_number,
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "reduction_ratio": self.reduction_ratio,
            "return_kernel": self.return_kernel,
        }


def _chosen(layer, inputs, expansion) -> str:
    """What a layer takes for its inputs, given its ``_expansion``."""
    hidden = None if expansion is None else expansion[0].shape[0]
    return chosen(inputs, hidden, **layer._arguments())


def _chosen_when_built(layer, inputs) -> str:
    if not layer.built:
        raise ValueError(f"A layer must be built, as by a call. Received: {layer.name}, not built")
    return _chosen(layer, inputs, layer._expansion(inputs))


def _fused(layer, inputs):
    """The output of a layer with an ``_expansion``, with no kernels stored; None where they are:
    somebody records them, or another implementation is chosen."""
    expansion = layer._expansion(inputs) if _record.calls is None else None
    if expansion is None or _chosen(layer, inputs, expansion) != "fused":
        return None
    # The last layer would cast what it is given, and Keras its weights.
    given = (ops.cast(t, inputs.dtype) for t in (layer._hidden(inputs), *expansion))
    return generate_and_apply(inputs, *given, **layer._arguments())


class _KernelDropout(keras.layers.Dropout):
    """Dropout whose state is made when it is built, in the scope of its layer.

    Keras's makes it at once, with a name that counts such states in the process.
    """

    def __init__(self, rate, **kwargs):
        if not 0 <= rate <= 1:
            raise ValueError(
                f"`kernel_dropout` must be a number from 0 to 1. Received: kernel_dropout={rate}"
            )
        super().__init__(0.0, **kwargs)  # of which there is no state
        self.rate = rate

    def build(self, input_shape):
        self.seed_generator = keras.random.SeedGenerator(name="seed_generator")


class InvolutionND(keras.layers.Layer):
    """The paper's layer in ``rank`` dimensions: everything about Involution1D, 2D and 3D."""

    rank: int

    def __init__(
        self,
        kernel_size=7,
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
        rank = self.rank
        self.kernel_size = integers("kernel_size", kernel_size, rank)
        self.strides = integers("strides", strides, rank)
        self.padding = standardize_padding(padding, rank)
        self.dilation_rate = integers("dilation_rate", dilation_rate, rank)
        self.groups = None if groups is None else integers("groups", groups, 1)[0]
        self.group_channels = integers("group_channels", group_channels, 1)[0]
        self.reduction_ratio = integers("reduction_ratio", reduction_ratio, 1)[0]
        self.return_kernel = bool(return_kernel)
        self.group_layout = one_of("group_layout", group_layout, (CONTIGUOUS, INTERLEAVED))
        self.data_format = standardize_data_format(data_format)
        if implementation is not None:
            implementation_names(implementation)
        self.implementation = implementation
        self.filters = None if filters is None else integers("filters", filters, 1)[0]
        self.kernel_softmax = bool(kernel_softmax)
        self.kernel_dropout = (
            _KernelDropout(kernel_dropout, dtype=self.dtype_policy, name="kernel_dropout")
            if kernel_dropout
            else None
        )
        self._groups = self.groups
        self._named = not isinstance(kernel_generator, (dict, keras.layers.Layer))
        self._generator_name = kernel_generator if self._named else None
        self.kernel_generator = generators.get(
            kernel_generator, self.reduction_ratio, self.dtype_policy
        )
        generators.name_by_class(self.kernel_generator)
        self.input_spec = keras.layers.InputSpec(ndim=rank + 2)
        self._check_centre()

    def build(self, input_shape):
        check_axes(self, input_shape, self.rank)
        channels = _channels(input_shape, self.data_format)
        self.groups = self._number_of_groups(channels)
        self._output_sizes(input_shape)
        generator = self.kernel_generator
        generators.check_unshared(generator, self)
        generators.fill_in(generator, self)
        # Files of earlier releases bring one that is built, and so may users.
        generators.build(generator, self, self.generator_input_shape(input_shape))
        if self.kernel_dropout is not None:
            self.kernel_dropout.build(None)
        if self.filters is not None:
            self._build_projection(channels)

    def _build_projection(self, channels):
        # The channels last, which every backend has on every device.
        projection = getattr(keras.layers, f"Conv{self.rank}D")(
            self.filters, 1, data_format=CHANNELS_LAST, dtype=self.dtype_policy, name="projection"
        )
        projection.build((None,) * (self.rank + 1) + (channels,))
        self.projection = projection

    def _geometry(self) -> Geometry:
        return Geometry(
            self.kernel_size,
            self.strides,
            self.padding,
            self.dilation_rate,
            self.groups or 1,
            self.group_layout,
            self.data_format,
        )

    def _number_of_groups(self, channels) -> int:
        # As given: ``groups`` is that of the channels with which the layer was built.
        given = self._groups
        if given is None and channels < self.group_channels:
            return 1
        name, value = (
            ("group_channels", self.group_channels) if given is None else ("groups", given)
        )
        if channels % value:
            raise ValueError(
                f"`{name}` must divide the input's channels: for {channels} channels one of "
                f"{_divisors(channels)}. Received: {name}={value}"
            )
        return channels // value if given is None else value

    def _check_centre(self):
        """ValueError unless the first window's centre lies inside the input."""
        if min(self._geometry().first_centre) < 0:
            raise ValueError(
                "`padding` must leave the centre of every window inside the input: at most "
                "floor((kernel_size - 1) * dilation_rate / 2) before it. "
                f"Received: padding={self.padding!r}, kernel_size={self.kernel_size}, "
                f"dilation_rate={self.dilation_rate}"
            )

    def _output_sizes(self, input_shape) -> tuple[int | None, ...]:
        """Spatial sizes of the output, if every window and its centre fit; ValueError if not."""
        g = self._geometry()
        sizes = output_sizes(g, input_shape)
        for n, out, centre, s in zip(
            g.spatial(input_shape), sizes, g.first_centre, self.strides, strict=True
        ):
            if n is not None and out is not None and centre + (out - 1) * s >= n:
                raise ValueError(
                    "`padding` must leave the centre of every window inside the input. "
                    f"Received: padding={self.padding!r}, kernel_size={self.kernel_size}, "
                    f"dilation_rate={self.dilation_rate}, input shape {tuple(input_shape)}"
                )
        return sizes

    def generator_input_shape(self, input_shape):
        """The shape of what the generator gets for an input of this shape."""
        whole = getattr(self.kernel_generator, "whole_input", False)
        return input_shape if whole else self._features_shape(input_shape)

    def _features_shape(self, input_shape):
        g = self._geometry()
        sizes = g.spatial(input_shape)
        cropped = tuple(
            None if n is None else min(n - centre, out * s)
            for n, out, centre, s in zip(
                sizes, g.output_sizes(sizes), g.first_centre, self.strides, strict=True
            )
        )
        return g.shape(input_shape[0], cropped, input_shape[g.channel_axis])

    def _features(self, inputs):
        """What the kernels are generated from: the windows' centres and what follows each."""
        g = self._geometry()
        odd = not any(last % 2 for last in g.last_offset)
        if self.padding == SAME or (self.padding == SYMMETRIC and odd):
            # All positions. Slices of that length would do, but for PyTorch's exporter: it takes it
            # from its example whether they reach the end.
            return inputs
        parts = tuple(
            slice(centre, centre + out * s)
            for centre, out, s in zip(
                g.first_centre,
                g.output_sizes(view_sizes(inputs, g)),
                self.strides,
                strict=True,
            )
        )
        return inputs[(slice(None),) * g.spatial_axis + parts]

    def generate_kernel(self, inputs):
        """The kernels for ``inputs``, as ``involution.ops.involution`` takes them:
        (B, *out_spatial, taps, groups) or (B, taps, groups, *out_spatial)."""
        whole = getattr(self.kernel_generator, "whole_input", False)
        features = inputs if whole else self._features(inputs)
        kernel = self.kernel_generator(features, training=current_training())
        g = self._geometry()
        shape = ops.shape(kernel)
        if len(shape) != self.rank + 2 or kernel.shape[g.channel_axis] != g.taps * g.groups:
            raise ValueError(
                "`kernel_generator` must return a kernel map with taps * groups = "
                f"{g.taps} * {g.groups} channels at every output position. "
                f"Received: a map of shape {tuple(kernel.shape)} from {self.kernel_generator.name}"
            )
        kernel = ops.reshape(kernel, g.shape(shape[0], g.spatial(shape), g.taps, g.groups))
        if self.kernel_softmax:
            kernel = softmax(wide(kernel), g.tap_axis)
        if self.kernel_dropout is not None:
            kernel = self.kernel_dropout(kernel, training=current_training())
        return ops.cast(kernel, inputs.dtype)

    def chosen_implementation(self, inputs) -> str:
        """The name of the implementation that runs on ``inputs``, a tensor or a
        ``keras.KerasTensor``, once the layer was called; ``"fused"`` where no kernels are
        stored."""
        return _chosen_when_built(self, inputs)

    def call(self, inputs, training=None):
        with training_scope(training):
            return self._call(inputs)

    def _call(self, inputs):
        self._output_sizes(inputs.shape)
        output = _fused(self, inputs)
        if output is not None:
            return output if self.filters is None else self._project(output)
        kernel = self.generate_kernel(inputs)
        output = involution(inputs, kernel, **self._arguments())
        if self.filters is not None:
            output = self._project(output)
        if _record.calls is not None:
            _record.calls.append(Call(self, self._geometry(), inputs, kernel, output))
        return (output, kernel) if self.return_kernel else output

    def _arguments(self) -> dict:
        """Those of ``involution``."""
        return {
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
            "groups": self.groups,
            "group_layout": self.group_layout,
            "data_format": self.data_format,
            "implementation": self.implementation,
        }

    def _hidden(self, inputs):
        return self.kernel_generator.hidden(self._features(inputs))

    def _expansion(self, inputs):
        """The weight and bias that make kernels of the generator's hidden channels, if these may
        be generated where they are used: nobody else sees them then. None where they may not."""
        seen = self.return_kernel or self.kernel_softmax or self.kernel_dropout is not None
        # A subclass may have a function of its own for them.
        own = getattr(self.generate_kernel, "__func__", None) is not InvolutionND.generate_kernel
        if seen or own:
            return None
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        return generators.expansion(self.kernel_generator, dtype)

    def _project(self, output):
        if self.data_format == CHANNELS_LAST:
            return self.projection(output)
        return ops.moveaxis(self.projection(ops.moveaxis(output, 1, -1)), -1, 1)

    def compute_output_shape(self, input_shape):
        check_axes(self, input_shape, self.rank)
        g = self._geometry()
        channels = _channels(input_shape, self.data_format)
        sizes = self._output_sizes(input_shape)
        output = g.shape(input_shape[0], sizes, self.filters or channels)
        if not self.return_kernel:
            return output
        return output, g.shape(input_shape[0], sizes, g.taps, self._number_of_groups(channels))

    def get_config(self):
        return {
            **super().get_config(),
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
            "groups": self._groups,
            "group_channels": self.group_channels,
            "reduction_ratio": self.reduction_ratio,
            "kernel_generator": self._generator_config(),
            "return_kernel": self.return_kernel,
            "group_layout": self.group_layout,
            "data_format": self.data_format,
            "implementation": self.implementation,
            "filters": self.filters,
            "kernel_softmax": self.kernel_softmax,
            "kernel_dropout": self.kernel_dropout.rate if self.kernel_dropout else 0.0,
        }

    def _generator_config(self):
        """What was given as ``kernel_generator``: the name of one that is still as ``get`` makes
        it, so that another ``reduction_ratio`` or ``dtype`` in the configuration counts."""
        stored = generators.serialized(self.kernel_generator)
        if self._named:
            fresh = generators.get(self._generator_name, self.reduction_ratio, self.dtype_policy)
            if stored == generators.serialized(fresh):
                return self._generator_name
        return stored


# The three differ in the rank alone, so they share one signature and one text.
ARGUMENTS = """

    Args:
        kernel_size: Integer, or one for each spatial dimension: the window.
        strides: Integer, or one for each spatial dimension.
        padding: ``"same"``, ``"valid"``, ``"symmetric"`` (the paper's code), an integer, or a pair
            (before, after) for each spatial dimension; see ``involution.ops.involution``.
        dilation_rate: Integer, or one for each spatial dimension.
        groups: Number of groups; divides the channels. None: channels // group_channels, and one
            group where there are fewer channels than that.
        group_channels: Channels of a group, where ``groups`` is None.
        reduction_ratio: Channels for each hidden channel of the default generator.
        kernel_generator: A Keras layer from features (B, *spatial, C) to a kernel map
            (B, *out_spatial, taps * groups), channels tap-major; a name (``"bottleneck"``,
            ``"contextual"``, ``"linear"``, ``"pairwise_attention"``, ``"static"``); None:
            ``kernel_generators.Bottleneck(reduction_ratio)``. A generator with weights serves one
            layer; where it has no name it is named by its class, as are the layers inside it.
        return_kernel: Whether to return (output, kernel) or the output alone.
        group_layout: ``"contiguous"`` (the paper) or ``"interleaved"`` (the keras.io example).
        data_format: ``"channels_last"``, ``"channels_first"``, or None for Keras's setting.
        implementation: See ``involution.ops.involution``.
        filters: Channels of the output, by a 1x1 convolution after the involution. None: the
            input's channels, without it.
        kernel_softmax: Whether the numbers of every window are positive and sum to 1.
        kernel_dropout: Fraction of the kernels' numbers that training sets to 0.
        **kwargs: ``name``, ``dtype`` and so on, as in ``keras.layers.Layer``.

    Call arguments:
        inputs: Tensor (B, *spatial, C), or (B, C, *spatial) for ``"channels_first"``.
        training: Whether normalization takes the batch's statistics and dropout acts. None: as the
            layer or model around it, and otherwise False.

    Returns:
        A tensor with the channels of ``inputs``, or ``filters``, and the sizes a convolution would
        give; with ``return_kernel`` also the kernels, (B, *out_spatial, taps, groups) or (B, taps,
        groups, *out_spatial).

    Raises:
        ValueError: An argument is out of its range, the channels do not divide, the generator's
            map does not fit the output, a generator with weights serves another layer, or the input
            has too few or too many axes.

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
        + ARGUMENTS
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
        + ARGUMENTS
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
        + ARGUMENTS
    )
    rank = 3


def involutions(layer) -> list[keras.layers.Layer]:
    """The involutions in a layer or model: itself, those of models within it, and those that other
    layers hold in attributes, as wrappers do. Each appears once."""
    return [held for held in layers_within(layer) if isinstance(held, (Involution, InvolutionND))]


def _channels(input_shape, data_format) -> int:
    channels = input_shape[-1 if data_format == CHANNELS_LAST else 1]
    if channels is None:
        raise ValueError(
            "The number of channels must be known when the layer is built. "
            f"Received: input shape {tuple(input_shape)}"
        )
    return channels


def _divisors(n) -> str:
    # A layer has no more groups; a file may say that an input has any number of channels.
    return ", ".join(str(d) for d in range(1, min(n, 2**16) + 1) if n % d == 0)
