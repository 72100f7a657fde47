"""Kernel generators: Keras layers from features to involution kernels.

A generator is any layer that turns features (B, *spatial, C) into a kernel map
(B, *out_spatial, taps * groups), or both with the channels on axis 1 for ``"channels_first"``. The
channels of the map are tap-major: ``tap * groups + group``. Where an attribute ``kernel_size``,
``groups``, ``strides``, ``padding``, ``dilation_rate`` or ``data_format`` is None, the involution
layer fills it in when built, and again when a layer of the same configuration is built; the
configuration has None. Features begin at the first window's center; a generator with a true
attribute ``uses_full_input`` gets the layer's input as it is.

The last convolution of ``Linear`` and its subclasses may be applied without being called, so that
no kernels are stored: see ``expansion``.
"""

import contextlib
import dataclasses
import gc
import math
import threading
import weakref

import keras
from keras import ops

from involution.kernel_generators.pointwise import affine, conv_class, only_calls
from involution.ops.api import apply_window_products
from involution.ops.dispatch import select
from involution.ops.problem import problem_of
from involution.ops.tensor_utils import pad, softmax, strided_slice, to_accumulation_dtype
from involution.ops.validation import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    SAME,
    check_axes,
    standardize_data_format,
    standardize_padding,
    standardize_tuple,
)
from involution.ops.window import STANDARDIZE, Window, ceil_div
from involution.utils.layer_names import base_name, has_automatic_name


def _normal(scale):
    return {
        "class_name": "VarianceScaling",
        "config": {"scale": scale, "mode": "fan_out", "distribution": "untruncated_normal"},
    }


# The paper's code: Kaiming's normal distribution over the outputs of a layer.
KAIMING = _normal(2.0)
# What an involution layer sets in a generator that leaves it None.
INHERITED_ARGUMENTS = tuple(name for name, _ in STANDARDIZE if name != "group_layout")
# Score of a masked position: zero after softmax; finite, so fully masked windows give no NaN.
MASK_VALUE = -1e9


class _Training(threading.local):
    """The ``training`` of the call that runs in this thread, None where there is none."""

    value: bool | None = None


_training = _Training()


@contextlib.contextmanager
def training_scope(training):
    """Within the block ``current_training()`` is this, if it is not None.

    ``stateless_call``, and wrappers such as ``TimeDistributed``, call ``layer.call`` itself,
    without the context by which Keras passes ``training`` to inner layers, so they get it by name.
    A parameter of every method would break subclasses that override one.
    """
    before = _training.value
    if training is not None:
        _training.value = training
    try:
        yield
    finally:
        _training.value = before


def current_training() -> bool | None:
    """What a layer inside an involution layer or a generator is to be called with."""
    return _training.value


def uses_full_input(generator) -> bool:
    """Whether a generator reads the layer's input from its first position, not from the first
    window's center. ``whole_input`` is the attribute's deprecated name."""
    return bool(
        getattr(generator, "uses_full_input", False) or getattr(generator, "whole_input", False)
    )


class KernelGenerator(keras.layers.Layer):
    """Base class: the shape of the kernel map.

    A subclass has ``_build_generator(channels)``, which makes its weights, and ``_generate``.
    """

    # Whether it reads the layer's input from its first position, not from the first center.
    uses_full_input = False
    # Whether other initial values, such as those of ``near_depthwise_init``, are meaningful.
    accepts_initializers = False

    def __init__(self, kernel_size=None, groups=None, strides=None, data_format=None, **kwargs):
        super().__init__(**kwargs)
        self.kernel_size = kernel_size
        self.groups = groups
        self.strides = strides
        self.data_format = data_format
        # As given: the attributes also hold values inherited from the layer.
        self._given = {
            "kernel_size": kernel_size,
            "groups": groups,
            "strides": strides,
            "data_format": data_format,
        }

    def build(self, input_shape):
        self._settle(input_shape)
        self._build_generator(input_shape[-1 if self.data_format == CHANNELS_LAST else 1])
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape))

    def _settle(self, input_shape):
        """Standardizes the attributes for inputs of this shape."""
        rank = len(input_shape) - 2
        size = self.kernel_size
        if rank not in (1, 2, 3) or (isinstance(size, (tuple, list)) and len(size) != rank):
            expected = len(size) + 2 if isinstance(size, (tuple, list)) else "3, 4 or 5"
            raise ValueError(
                f"Input of {type(self).__name__} must have a batch axis, as many spatial axes as "
                f"`kernel_size` has numbers, and one of channels: expected ndim={expected}, found "
                f"ndim={len(input_shape)}. Received: kernel_size={size}, "
                f"input_shape={tuple(input_shape)}, layer={self.name}"
            )
        self.kernel_size = standardize_tuple("kernel_size", size, rank)
        self.groups = standardize_tuple("groups", self.groups, 1)[0]
        self.strides = standardize_tuple(
            "strides", 1 if self.strides is None else self.strides, rank
        )
        self.data_format = standardize_data_format("data_format", self.data_format)

    def _build_generator(self, channels):
        """Creates the weights for features with this number of channels."""
        raise NotImplementedError  # each generator has its own

    def _generate(self, features):
        """The kernel map of features (B, *spatial, C): (B, *out_spatial, taps * groups)."""
        raise NotImplementedError  # each generator has its own

    def _output_sizes(self, sizes) -> tuple:
        return tuple(
            None if n is None else ceil_div(n, s) for n, s in zip(sizes, self.strides, strict=True)
        )

    @property
    def _kernel_channels(self) -> int:
        return math.prod(self.kernel_size) * self.groups

    def call(self, features, training=None):
        with training_scope(training):
            if self.data_format == CHANNELS_LAST:
                return self._generate(features)
            return ops.moveaxis(self._generate(ops.moveaxis(features, 1, -1)), -1, 1)

    def compute_output_shape(self, input_shape):
        if not self.built:
            # An involution layer may still set this one's attributes.
            settled = type(self).from_config(self.get_config())
            settled._settle(input_shape)
            settled.built = True
            return settled.compute_output_shape(input_shape)
        check_axes(self, input_shape, len(self.kernel_size))
        first = self.data_format == CHANNELS_FIRST
        sizes = self._output_sizes(tuple(input_shape[2:] if first else input_shape[1:-1]))
        if first:
            return (input_shape[0], self._kernel_channels, *sizes)
        return (input_shape[0], *sizes, self._kernel_channels)

    def get_config(self):
        return {**super().get_config(), **self._given}


@keras.saving.register_keras_serializable(package="involution")
class Linear(KernelGenerator):
    """The simplest generator: average pooling by the strides, then one 1x1 convolution.

    Args:
        kernel_size: Window sizes, one for each spatial dimension; None: the involution layer's.
        groups: Number of kernels at each position; None: the involution layer's.
        strides: Size and distance of the pooled windows; None: the involution layer's.
        data_format: ``"channels_last"`` or ``"channels_first"``; None: the involution layer's.
        kernel_initializer, bias_initializer, kernel_regularizer, bias_regularizer: As in
            ``keras.layers.Conv2D``. The initial values are those of the paper's code.
        **kwargs: ``name``, ``dtype`` and so on, as in ``keras.layers.Layer``.

    Call arguments:
        features: Tensor (B, *spatial, C), or (B, C, *spatial) for ``"channels_first"``.
        training: As for any Keras layer; here for ``Bottleneck``, which normalizes.

    Returns:
        Tensor (B, *out_spatial, taps * groups), or (B, taps * groups, *out_spatial), with
        ceil(n / stride) positions for n of the features.

    Example:

    >>> import numpy as np, involution
    >>> layer = involution.Involution2D(3, kernel_generator=involution.kernel_generators.Linear())
    >>> tuple(layer(np.ones((1, 8, 8, 32), "float32")).shape)
    (1, 8, 8, 32)
    """

    accepts_initializers = True

    def __init__(
        self,
        kernel_size=None,
        groups=None,
        strides=None,
        data_format=None,
        kernel_initializer=KAIMING,
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        **kwargs,
    ):
        super().__init__(kernel_size, groups, strides, data_format, **kwargs)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)

    def _build_generator(self, channels):
        self.expand = self._convolution("expand", self._kernel_channels, channels)

    def _generate(self, features):
        return self.expand(self.hidden(features))

    def hidden(self, features):
        """Input of the last convolution, ``expand``: (B, *out_spatial, hidden channels), from
        features (B, *spatial, C)."""
        return average_pool(features, self.strides)

    def count_multiply_adds(self) -> int:
        """Multiply-adds of the convolutions, for each output position."""
        return math.prod(self.expand.kernel.shape)

    def _convolution(self, name, filters, channels, use_bias=True, kernel_size=1):
        """A channels-last convolution, which every backend supports on every device."""
        rank = len(self.kernel_size)
        layer = conv_class(rank, kernel_size)(
            filters,
            kernel_size,
            padding="same",
            data_format=CHANNELS_LAST,
            use_bias=use_bias,
            kernel_initializer=clone_initializer(self.kernel_initializer),
            bias_initializer=clone_initializer(self.bias_initializer),
            kernel_regularizer=self.kernel_regularizer,
            bias_regularizer=self.bias_regularizer,
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None,) * (rank + 1) + (channels,))
        return layer

    def get_config(self):
        return {
            **super().get_config(),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
        }


@keras.saving.register_keras_serializable(package="involution")
class Bottleneck(Linear):
    """The paper's generator: average pooling by the strides, a 1x1 convolution to
    C // reduction_ratio channels, batch normalization, ReLU, a 1x1 convolution to taps * groups.

    The first convolution has no bias; batch normalization has momentum 0.9 and epsilon 1e-5, as in
    the paper's code (0.99, 1e-3 and a bias in the keras.io example).

    Args:
        reduction_ratio: Channels of the features for each hidden channel.
        **kwargs: As for ``Linear``.

    Raises:
        ValueError: ``reduction_ratio`` leaves no hidden channel.

    Source: Li et al., arXiv:2103.06255, section 3 and algorithm 1.

    Example:

    >>> import numpy as np, involution
    >>> generator = involution.kernel_generators.Bottleneck(8, kernel_size=3, groups=2)
    >>> tuple(generator(np.ones((1, 8, 8, 32), "float32")).shape)
    (1, 8, 8, 18)
    """

    # Kernel size of the first convolution.
    _context_size = 1

    def __init__(self, reduction_ratio=4, **kwargs):
        super().__init__(**kwargs)
        self.reduction_ratio = standardize_tuple("reduction_ratio", reduction_ratio, 1)[0]

    def _build_generator(self, channels):
        hidden = channels // self.reduction_ratio
        if hidden == 0:
            raise ValueError(
                "`reduction_ratio` must leave at least one hidden channel. "
                f"Received: reduction_ratio={self.reduction_ratio}, channels={channels}"
            )
        self.reduce = self._convolution(
            "reduce", hidden, channels, use_bias=False, kernel_size=self._context_size
        )
        self.normalization = keras.layers.BatchNormalization(
            momentum=0.9, epsilon=1e-5, dtype=self.dtype_policy, name="normalization"
        )
        self.normalization.build((None,) * (len(self.kernel_size) + 1) + (hidden,))
        self.expand = self._convolution("expand", self._kernel_channels, hidden)

    def hidden(self, features):
        pooled = average_pool(features, self.strides)
        reduced = self.reduce(pooled)
        return ops.relu(self.normalization(reduced, training=current_training()))

    def count_multiply_adds(self) -> int:
        return super().count_multiply_adds() + math.prod(self.reduce.kernel.shape)

    def get_config(self):
        return {**super().get_config(), "reduction_ratio": self.reduction_ratio}


@keras.saving.register_keras_serializable(package="involution")
class Contextual(Bottleneck):
    """A bottleneck that looks at a neighbourhood: its first convolution has a larger window.

    Args:
        reduction_ratio: Channels of the features for each hidden channel.
        context_size: Side of the window that a kernel is generated from, in output positions.
        **kwargs: As for ``Linear``.

    Raises:
        ValueError: ``reduction_ratio`` leaves no hidden channel.

    Example:

    >>> import numpy as np, involution
    >>> generator = involution.kernel_generators.Contextual(4, context_size=5)
    >>> layer = involution.Involution2D(3, strides=2, kernel_generator=generator)
    >>> tuple(layer(np.ones((1, 9, 8, 32), "float32")).shape)
    (1, 5, 4, 32)
    """

    def __init__(self, reduction_ratio=4, context_size=3, **kwargs):
        super().__init__(reduction_ratio, **kwargs)
        self.context_size = self._context_size = standardize_tuple("context_size", context_size, 1)[
            0
        ]

    def get_config(self):
        return {**super().get_config(), "context_size": self.context_size}


@keras.saving.register_keras_serializable(package="involution")
class PairwiseAttention(Linear):
    """Local self-attention: dot products of each center with its window, softmax over the window.

    The groups are the heads. A query is made of the features at each window's center and a key of
    the features at every position, both by 1x1 convolutions; a kernel is

        softmax over taps k of query[p] . key[position k of the window of p] / sqrt(key_channels)

    where positions outside the input get no weight. The involution then sums values that are the
    input itself. With a window that covers the map this is ``keras.layers.MultiHeadAttention``
    whose value and output projections are identities.

    Args:
        key_channels: Channels of a head's queries and keys; None: those of a group.
        padding, dilation_rate: Where the windows lie; None: the involution layer's.
        **kwargs: As for ``Linear``.

    Call arguments:
        features: The involution's whole input, (B, *spatial, C) or (B, C, *spatial).

    Source: Li et al., arXiv:2103.06255, section 3.3, relates the two.

    Example:

    >>> import numpy as np, involution
    >>> attention = involution.kernel_generators.PairwiseAttention()
    >>> layer = involution.Involution2D(5, kernel_generator=attention, return_kernel=True)
    >>> y, kernel = layer(np.ones((1, 8, 8, 32), "float32"))
    >>> tuple(kernel.shape)
    (1, 8, 8, 25, 2)
    """

    uses_full_input = True
    accepts_initializers = False  # its convolutions make queries and keys, no kernels

    def __init__(self, key_channels=None, padding=None, dilation_rate=None, **kwargs):
        super().__init__(**kwargs)
        self.key_channels = (
            None if key_channels is None else standardize_tuple("key_channels", key_channels, 1)[0]
        )
        self.padding = padding
        self.dilation_rate = dilation_rate
        self._given = {
            **self._given,
            "key_channels": self.key_channels,
            "padding": padding,
            "dilation_rate": dilation_rate,
        }

    def _settle(self, input_shape):
        super()._settle(input_shape)
        rank = len(self.kernel_size)
        self.padding = standardize_padding("padding", self.padding or SAME, rank)
        self.dilation_rate = standardize_tuple("dilation_rate", self.dilation_rate or 1, rank)
        inherited = {name: getattr(self, name) for name in INHERITED_ARGUMENTS}
        # Queries and keys have the channels last.
        self.window = Window(**{**inherited, "data_format": CHANNELS_LAST})

    def _build_generator(self, channels):
        if self.key_channels is None:
            self.key_channels = max(channels // self.groups, 1)
        width = self.groups * self.key_channels
        self.query = self._convolution("query", width, channels)
        self.key = self._convolution("key", width, channels)

    def _output_sizes(self, sizes):
        return self.window.output_sizes(sizes)

    def _generate(self, features):
        g = self.window
        shape = ops.shape(features)
        sizes = g.output_sizes(g.spatial(shape))
        centers = strided_slice(features, g.first_center, self.strides, sizes, g, first=1)
        query = self.query(centers) / math.sqrt(self.query.filters // self.groups)
        scores = to_accumulation_dtype(self._products(self.key(features), query, self.groups))
        inside = self._products(
            ops.ones((1, *g.spatial(shape), 1), "float32"), ops.ones((1, *sizes, 1), "float32"), 1
        )
        scores = ops.where(inside > 0.5, scores, MASK_VALUE)
        kernel = ops.cast(softmax(scores, -2), self.compute_dtype)
        return ops.reshape(kernel, (shape[0], *sizes, self._kernel_channels))

    def _products(self, x, y, groups):
        window = dataclasses.replace(self.window, groups=groups)
        return apply_window_products(select(problem_of(window, x)), x, y)

    def count_multiply_adds(self) -> int:
        """Multiply-adds for each position, if every input position is a center."""
        queries = sum(math.prod(layer.kernel.shape) for layer in (self.query, self.key))
        return queries + math.prod(self.kernel_size) * self.query.filters


@keras.saving.register_keras_serializable(package="involution")
class Static(KernelGenerator):
    """One kernel for all positions: depthwise convolution, expressed as involution.

    With as many groups as channels, the layer is ``keras.layers.DepthwiseConv2D`` without a bias;
    with fewer, channels share their kernels.

    Args:
        kernel_size, groups, strides, data_format: As for ``Linear``.
        kernel_initializer, kernel_regularizer: Of the weight (*kernel_size, groups).
        **kwargs: ``name``, ``dtype`` and so on, as in ``keras.layers.Layer``.

    Example:

    >>> import keras, numpy as np, involution
    >>> static = involution.kernel_generators.Static(kernel_initializer="ones")
    >>> layer = involution.Involution2D(3, groups=4, kernel_generator=static)
    >>> y = layer(np.ones((1, 5, 5, 4), "float32"))
    >>> float(keras.ops.convert_to_numpy(y)[0, 0, 0, 0])
    4.0
    """

    def __init__(
        self,
        kernel_size=None,
        groups=None,
        strides=None,
        data_format=None,
        kernel_initializer="glorot_uniform",
        kernel_regularizer=None,
        **kwargs,
    ):
        super().__init__(kernel_size, groups, strides, data_format, **kwargs)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)

    def _build_generator(self, channels):
        self.kernel = self.add_weight(
            shape=(*self.kernel_size, self.groups),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            name="kernel",
        )

    def _generate(self, features):
        batch, *sizes, _ = ops.shape(features)
        kernel = ops.reshape(self.kernel, (self._kernel_channels,))
        return ops.broadcast_to(
            ops.cast(kernel, self.compute_dtype),
            (batch, *self._output_sizes(sizes), self._kernel_channels),
        )

    def count_multiply_adds(self) -> int:
        """Multiply-adds for each position: none, nothing is generated."""
        return 0

    def get_config(self):
        return {
            **super().get_config(),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }


# Methods of ``Linear`` that make the kernels ``expand(hidden(features))``.
_LINEAR = ("__call__", "call", "_generate")


def final_projection(generator, dtype):
    """Weight (hidden channels, taps * groups) and bias that turn a generator's ``hidden`` features
    into kernels of ``dtype``; None unless applying them is equivalent to calling the generator."""
    if not isinstance(generator, Linear) or not only_calls(generator):
        return None
    kind = type(generator)
    if any(getattr(kind, name) is not getattr(Linear, name) for name in _LINEAR):
        return None
    # A subclass may have replaced the last layer.
    if "_generate" in vars(generator) or generator.compute_dtype != dtype:
        return None
    return projection_of(generator.expand, dtype, generator._kernel_channels)


def projection_of(layer, dtype, channels):
    """``affine`` of a generator's last layer; None unless it computes in ``dtype`` and has
    ``channels`` output channels."""
    found = affine(layer)
    if found is None or layer.compute_dtype != dtype or layer.filters != channels:
        return None
    return found


def average_pool(x, strides, centered=False):
    """Means over windows that tile ``x`` (B, *spatial, C): (B, *ceil(n / stride), C).

    The windows start at position 0, so that the last may be partial; with ``centered`` they start
    as for "same" padding, so that the first may be partial too. The mean of a partial window is
    that of its positions inside the input.
    """
    if all(s == 1 for s in strides):
        return x
    shape = ops.shape(x)
    counts = [ceil_div(n, s) for n, s in zip(shape[1:-1], strides, strict=True)]
    missing = [c * s - n for c, s, n in zip(counts, strides, shape[1:-1], strict=True)]
    before = [m // 2 if centered else 0 for m in missing]
    known = all(isinstance(m, int) for m in missing)

    def sums(values):
        if known:
            padding = [(b, m - b) for b, m in zip(before, missing, strict=True)]
            padded = pad(to_accumulation_dtype(values), [(0, 0), *padding, (0, 0)])
        else:
            # PyTorch's exporter specializes on whether padding is zero and whether a slice ends
            # where its tensor does: the padding exceeds the need, and a slice removes the rest.
            max_pad = [s - 1 if centered else 0 for s in strides]
            padding = [(a, s) for a, s in zip(max_pad, strides, strict=True)]
            padded = pad(to_accumulation_dtype(values), [(0, 0), *padding, (0, 0)])
            parts = (
                slice(a - b, a - b + c * s)
                for a, b, c, s in zip(max_pad, before, counts, strides, strict=True)
            )
            padded = padded[(slice(None), *parts)]
        # One dimension at a time: TensorFlow takes five times as long for all at once.
        for axis, (count, stride) in enumerate(zip(counts, strides, strict=True), start=1):
            lead, behind = ops.shape(padded)[:axis], ops.shape(padded)[axis + 1 :]
            padded = ops.sum(ops.reshape(padded, (*lead, count, stride, *behind)), axis=axis + 1)
        return padded

    if known and not any(missing):
        return ops.cast(sums(x) / math.prod(strides), x.dtype)
    return ops.cast(sums(x) / sums(ops.ones_like(x[:1, ..., :1])), x.dtype)


def clone_initializer(initializer):
    """A copy for each weight: two weights from one seeded initializer would be equal."""
    return initializer.clone() if hasattr(initializer, "clone") else initializer


GENERATORS: dict[str, type[KernelGenerator]] = {
    "bottleneck": Bottleneck,
    "contextual": Contextual,
    "linear": Linear,
    "pairwise_attention": PairwiseAttention,
    "static": Static,
}


def near_depthwise_init(taps):
    """Initializers that start a generator close to a depthwise convolution.

    The kernels are dominated by the biases, which differ between groups and are equal at all
    positions, with the distribution of He's initializer for depthwise kernels. The features'
    contribution is small. The paper's initialization gives kernels without a shared part.

    Args:
        taps: Positions of a window: 9 for 3x3.

    Returns:
        Dictionary of the arguments ``kernel_initializer`` and ``bias_initializer`` for ``Linear``,
        ``Bottleneck`` and ``Contextual``.

    Example:

    >>> import keras
    >>> from involution.kernel_generators import Bottleneck, near_depthwise_init
    >>> generator = Bottleneck(kernel_size=3, groups=8, **near_depthwise_init(9))
    >>> features = keras.random.normal((1, 32, 32, 32))
    >>> kernels = keras.ops.convert_to_numpy(generator(features))
    >>> bool(kernels.std(axis=(1, 2)).mean() < kernels.mean(axis=(1, 2)).std() / 3)
    True
    """
    (taps,) = standardize_tuple("taps", taps, 1)
    return {
        # A tenth of the paper's; in the first convolution normalization takes the scale away.
        "kernel_initializer": _normal(0.02),
        "bias_initializer": {
            "class_name": "RandomNormal",
            "config": {"stddev": math.sqrt(2 / taps)},
        },
    }


def get(identifier, reduction_ratio=4, dtype=None, initial=None):
    """A generator from its name, its configuration or itself; None is ``"bottleneck"``.

    ``reduction_ratio``, ``dtype`` and the initial values, as of ``near_depthwise_init``, are for a
    generator that is named, if it is of a kind that has them.
    """
    if isinstance(identifier, dict):
        return keras.saving.deserialize_keras_object(identifier)
    if isinstance(identifier, keras.layers.Layer):
        return identifier
    name = "bottleneck" if identifier is None else str(identifier).lower()
    if name not in GENERATORS:
        raise ValueError(
            f"`kernel_generator` must be a Keras layer or one of {', '.join(GENERATORS)}. "
            f"Received: kernel_generator={identifier!r}"
        )
    make = GENERATORS[name]
    options = dict(initial or {}) if make.accepts_initializers else {}
    if issubclass(make, Bottleneck):
        options["reduction_ratio"] = reduction_ratio
    return make(dtype=dtype, name=name, **options)


def clone(identifier):
    """An identifier for ``get`` to use in one of several layers: a layer is copied."""
    if isinstance(identifier, keras.layers.Layer):
        config = identifier.get_config()
        _leave_open(identifier, config)
        return type(identifier).from_config(config)
    return identifier


# By generator, the names of the attributes that an involution layer has set.
_filled: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
# Generators built by an involution layer.
_built: weakref.WeakSet = weakref.WeakSet()
# By generator and by each layer inside it, a weak reference to its involution layer.
_served: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def layers_within(layer) -> list[keras.layers.Layer]:
    """A layer and the layers in its attributes, at any depth, each once and in order.

    Keras has a public list of sublayers for models only.
    """
    found: list[keras.layers.Layer] = []
    seen: dict[int, object] = {}  # holds the objects, so that identities stay unique

    def visit(value):
        if id(value) in seen:
            return
        seen[id(value)] = value
        if isinstance(value, keras.layers.Layer):
            found.append(value)
            held = vars(value)
            # A model's own order first; PyTorch keeps modules before everything else.
            parts = [getattr(value, "layers", None), *(held[name] for name in sorted(held))]
        elif isinstance(value, dict):
            parts = list(value.values())
        elif isinstance(value, (list, tuple, set)):
            parts = list(value)
        else:
            return
        for part in parts:
            visit(part)

    visit(layer)
    return found


def fill_in(generator, layer):
    """Sets the attributes of ``FILLED_IN`` that a generator leaves None to those of its layer.

    Raises:
        ValueError: It is built with those of another layer, which are different.
    """
    filled = _filled.setdefault(generator, set())
    for name in INHERITED_ARGUMENTS:
        value = getattr(layer, name)
        # A layer keeps its own value: a Conv2D has strides of its own.
        if name not in filled and getattr(generator, name, generator) is not None:
            continue
        if not generator.built:
            setattr(generator, name, value)
            filled.add(name)
        elif getattr(generator, name) not in (None, value):
            raise ValueError(
                f"A kernel generator must serve layers of one `{name}`: it was built for another. "
                f"Received: kernel_generator={generator.name}, built with "
                f"{name}={getattr(generator, name)}, in layer {layer.name} with {name}={value}"
            )


def serialized(generator) -> dict:
    """The configuration of a generator, without attributes set by its involution layer."""
    stored = keras.saving.serialize_keras_object(generator)
    # Keras would build it before its layer sets its attributes.
    stored.pop("build_config", None)
    _leave_open(generator, stored["config"])
    return stored


def _leave_open(generator, config):
    """Removes attributes set by an involution layer from a configuration."""
    for name in _filled.get(generator, ()):
        if name in config:
            config[name] = None
    if generator in _built and isinstance(generator, keras.Sequential):
        # Keras stores the shape it was built with, and would build it before its layer.
        config.pop("build_input_shape", None)
        own = [part for part in config["layers"] if part["class_name"] != "InputLayer"]
        config["layers"] = [
            {key: value for key, value in part.items() if key != "build_config"} for part in own
        ]


def check_unshared(generator, layer):
    """ValueError if a generator with weights, or a layer of it with weights, serves another layer.

    Training would work, but a file stores shared weights once and cannot be loaded.
    """
    for part in layers_within(generator):
        if _other(part, layer) is None or not part.weights:
            continue
        # Keras's layers are in reference cycles: an unused one may still exist.
        gc.collect()
        other = _other(part, layer)
        if other is not None:
            raise ValueError(
                "A kernel generator with weights must serve one layer. Received: "
                f"kernel_generator={generator.name} in layer {layer.name}, with {part.name}, which "
                f"serves layer {other.name}"
            )


def build(generator, layer, input_shape):
    """Builds a generator, unless it is built, and records its layer."""
    if not generator.built:
        generator.build(input_shape)
        _built.add(generator)
    for part in layers_within(generator):
        _served[part] = weakref.ref(layer)


def _other(part, layer):
    served = _served.get(part)
    found = None if served is None else served()
    return None if found is layer else found


def name_by_class(generator):
    """Renames automatically named layers of a generator by their classes.

    Keras numbers automatic names by a process-wide count, which would give equal models different
    weight paths. Here the numbers are local to the generator. Built layers keep their names, which
    are in the paths of their weights.
    """
    layers = layers_within(generator)
    named = [layer for layer in layers if not layer.built and has_automatic_name(layer)]
    taken = {layer.name for layer in layers if layer not in named}
    for layer in named:
        base = base_name(layer.name)
        names = (base if i == 0 else f"{base}_{i}" for i in range(len(layers) + 1))
        layer.name = next(name for name in names if name not in taken)
        taken.add(layer.name)
