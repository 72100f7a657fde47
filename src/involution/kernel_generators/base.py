"""Base class of the kernel generators, and the ``training`` argument of the layers inside them."""

import contextlib
import math
import threading

import keras
from keras import ops

from involution.ops.validation import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    check_axes,
    standardize_data_format,
    standardize_tuple,
)
from involution.ops.window import STANDARDIZE, ceil_div
from involution.utils.arguments import MISNAMED, names_required

# Attributes that a generator inherits from its involution layer where they are None.
INHERITED_ARGUMENTS = tuple(name for name, _ in STANDARDIZE if name != "group_layout")


_TAPS_GROUPS = "a kernel map has taps * groups channels: use `groups`"

# Decorates the ``__init__`` of every generator.
check_names = names_required(
    "An involution layer sets `kernel_size`, `groups` and `strides` where they are None.",
    {**MISNAMED, "filters": _TAPS_GROUPS, "out_channels": _TAPS_GROUPS},
)


class _Training(threading.local):
    """The ``training`` argument of the call that runs in this thread; None outside of calls."""

    value: bool | None = None


_training = _Training()


@contextlib.contextmanager
def training_scope(training):
    """Sets ``current_training()`` within the block, unless ``training`` is None.

    ``stateless_call``, and wrappers such as ``TimeDistributed``, call ``layer.call`` directly,
    without the context by which Keras passes ``training`` to inner layers. Inner layers therefore
    get ``training_argument()``; a parameter of every method would break subclasses that override
    one.
    """
    before = _training.value
    if training is not None:
        _training.value = training
    try:
        yield
    finally:
        _training.value = before


def current_training() -> bool | None:
    """The ``training`` argument for layers inside an involution layer or a generator."""
    return _training.value


def training_argument() -> dict[str, bool]:
    """The keyword arguments with which a layer inside an involution layer or a generator is called.

    None of them if ``current_training()`` is None: an explicit None would replace the enclosing
    model's ``training``, for the layers that follow too.
    """
    training = current_training()
    return {} if training is None else {"training": training}


def uses_full_input(generator) -> bool:
    """Whether a generator's features are the layer's full input, not the part from the first
    window's center on. ``whole_input`` is the attribute's deprecated name."""
    return bool(
        getattr(generator, "uses_full_input", False) or getattr(generator, "whole_input", False)
    )


class KernelGenerator(keras.layers.Layer):
    """Base class: the shape of the kernel map.

    A subclass implements ``_build_generator(channels)``, which creates its weights, and
    ``_generate``.
    """

    # Whether the features are the layer's full input: see the function of this name.
    uses_full_input = False
    # Whether `call` has an argument ``mask``, (B, *spatial); if not, masked features are zeros.
    uses_mask = False
    # Whether a layer with this generator refuses masks, because all positions affect a kernel.
    refuses_mask = False
    # Whether initializers such as those of ``near_depthwise_init`` apply.
    accepts_initializers = False

    @check_names
    def __init__(self, kernel_size=None, *, groups=None, strides=None, data_format=None, **kwargs):
        super().__init__(**kwargs)
        self.kernel_size = kernel_size
        self.groups = groups
        self.strides = strides
        self.data_format = data_format
        # The arguments: the attributes may be inherited from the layer.
        self._given = {
            "kernel_size": kernel_size,
            "groups": groups,
            "strides": strides,
            "data_format": data_format,
        }

    def build(self, input_shape):
        self.standardize_attributes(input_shape)
        self._build_generator(input_shape[-1 if self.data_format == CHANNELS_LAST else 1])
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape))

    def standardize_attributes(self, input_shape):
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

    def output_sizes(self, sizes) -> tuple:
        """Spatial sizes of the kernel map; None where those of the features are None."""
        return tuple(
            None if n is None else ceil_div(n, s) for n, s in zip(sizes, self.strides, strict=True)
        )

    @property
    def look_back(self) -> int:
        """Earlier positions that a kernel depends on, in causal layers."""
        return 0

    @property
    def kernel_channels(self) -> int:
        """Channels of the kernel map: taps * groups."""
        return math.prod(self.kernel_size) * self.groups

    def call(self, features, training=None):
        return self.run_call(features, training)

    def run_call(self, features, training, **context):
        """The kernel map in the layout of ``data_format``; ``context`` is passed to
        ``_generate``."""
        with training_scope(training):
            if self.data_format == CHANNELS_LAST:
                return self._generate(features, **context)
            features = ops.moveaxis(features, 1, -1)
            return ops.moveaxis(self._generate(features, **context), -1, 1)

    def count_input_multiply_adds(self) -> int:
        """Multiply-adds for each input position, besides those of ``count_multiply_adds`` for each
        output position."""
        return 0

    def compute_output_shape(self, input_shape):
        if not self.built:
            # On a copy: an involution layer may still set this generator's attributes.
            standardized = type(self).from_config(self.get_config())
            standardized.standardize_attributes(input_shape)
            standardized.built = True
            return standardized.compute_output_shape(input_shape)
        check_axes(self, input_shape, len(self.kernel_size))
        first = self.data_format == CHANNELS_FIRST
        sizes = self.output_sizes(tuple(input_shape[2:] if first else input_shape[1:-1]))
        if first:
            return (input_shape[0], self.kernel_channels, *sizes)
        return (input_shape[0], *sizes, self.kernel_channels)

    def get_config(self):
        return {**super().get_config(), **self._given}
