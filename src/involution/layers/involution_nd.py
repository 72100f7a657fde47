"""The paper's layer in one to three dimensions."""

import dataclasses

import keras
from keras import ops

from involution.kernel_generators.base import training_argument, training_scope, uses_full_input
from involution.kernel_generators.convolutional import final_projection
from involution.kernel_generators.pointwise import CausalConv1D
from involution.layers.base import input_channels
from involution.layers.generated import GeneratedInvolution
from involution.ops.calls import apply_generated, apply_kernels
from involution.ops.centers import center_output_sizes, every_center
from involution.ops.dispatch import Selection
from involution.ops.problem import problem_of
from involution.ops.tensor_utils import as_tensors
from involution.ops.validation import CAUSAL, CHANNELS_LAST, VALID, standardize_tuple
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


class InvolutionND(GeneratedInvolution):
    """The paper's layer in ``rank`` dimensions: the base of Involution1D, 2D and 3D."""

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
        reduction_ratio=None,
        kernel_generator=None,
        return_kernel=False,
        group_layout="contiguous",
        data_format=None,
        implementation=None,
        filters=None,
        kernel_softmax=False,
        kernel_dropout=0.0,
        **kwargs,
    ) -> None:
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
        super().__init__(
            window,
            groups=groups,
            group_channels=group_channels,
            reduction_ratio=reduction_ratio,
            kernel_generator=kernel_generator,
            return_kernel=return_kernel,
            implementation=implementation,
            kernel_softmax=kernel_softmax,
            kernel_dropout=kernel_dropout,
            **kwargs,
        )
        self.filters = None if filters is None else standardize_tuple("filters", filters, 1)[0]
        self.supports_masking = True

    def build(self, input_shape):
        super().build(input_shape)
        self._channels = input_channels(input_shape, self.data_format)
        if self.filters is not None:
            self._build_projection(self._channels)

    def _build_projection(self, channels):
        causal = self.window.padding == CAUSAL
        projection = (CausalConv1D if causal else getattr(keras.layers, f"Conv{self.rank}D"))(
            self.filters,
            1,
            padding=CAUSAL if causal else VALID,
            # Which every backend supports on every device.
            data_format=CHANNELS_LAST,
            dtype=self.dtype_policy,
            name="projection",
        )
        projection.build((None,) * (self.rank + 1) + (channels,))
        self.projection = projection

    def _output_sizes(self, input_shape) -> tuple[int | None, ...]:
        """Spatial sizes of the output; ValueError unless all windows and their centers fit."""
        return center_output_sizes(self.window, tuple(input_shape))

    def call(self, inputs, training=None, mask=None):
        if mask is None:
            return self.run_call(training, inputs=inputs)
        return self.run_call(training, inputs=inputs, mask=mask)

    def _call(self, inputs, mask=None, **context):
        self._output_sizes(inputs.shape)
        if mask is None:
            return super()._call(inputs)
        if getattr(self.kernel_generator, "refuses_mask", False):
            raise ValueError(
                "The layer must be called without a mask, because its kernels depend on all "
                f"positions. Received: a mask, kernel_generator={self.kernel_generator.name}"
            )
        # Masked positions contribute nothing, and their outputs are 0.
        outputs = super()._call(self._masked(inputs, mask), mask=mask)
        mask = self.compute_mask(inputs, mask)
        if self.return_kernel:
            return self._masked(outputs[0], mask), outputs[1]
        return self._masked(outputs, mask)

    def _masked(self, tensor, mask):
        mask = ops.expand_dims(ops.cast(mask, "bool"), self.window.channel_axis)
        return ops.where(mask, tensor, ops.zeros_like(tensor))

    def compute_mask(self, inputs, mask=None):
        """The mask at the windows' centers, or ends if they are causal; (B, *out_spatial)."""
        return None if mask is None else mask[(slice(None), *every_center(self.window))]

    def initial_cache(self, batch_size):
        """The cache of ``step`` before the first position of a sequence.

        Args:
            batch_size: Number of sequences.

        Returns:
            The last inputs, (B, n, C), and whether they belong to the sequence, (B, n): zeros and
            False, with n = (kernel_size - 1) * dilation_rate, or more if the generator looks back
            further.
        """
        self._check_steps()
        if not self.built:
            raise ValueError(
                "The layer must be built: call it on an input first. "
                f"Received: {self.name}, not built"
            )
        shape = (batch_size, self._history())
        features = ops.zeros((*shape, self._channels), self.compute_dtype)
        return features, ops.zeros(shape, "bool")

    def step(self, inputs, cache):
        """Continues causal sequences by one or more positions, in inference.

        Steps of any lengths give the outputs of one call on the whole sequence: where the compiled
        kernels run, bit for bit.

        Args:
            inputs: The next positions, (B, n, C).
            cache: The cache after the previous positions, of ``initial_cache`` or of ``step``.

        Returns:
            The outputs at these positions, (B, n, C) or (B, n, filters), and the next cache.

        Example:

        >>> import keras, numpy as np, involution
        >>> layer = involution.Involution1D(3, padding="causal")
        >>> x = np.random.default_rng(0).normal(size=(1, 8, 32)).astype("float32")
        >>> y, cache = layer(x), layer.initial_cache(1)
        >>> first, cache = layer.step(x[:, :5], cache)
        >>> last, cache = layer.step(x[:, 5:6], cache)
        >>> bool(keras.ops.convert_to_numpy(y[:, 5:6] - last).any())
        False
        """
        self._check_steps()
        (inputs,) = as_tensors(inputs=ops.convert_to_tensor(inputs, self.compute_dtype))
        past, known = cache
        count, history = inputs.shape[1], self._history()
        if count == 0:
            raise ValueError(
                f"A step must have at least one position. Received: {tuple(inputs.shape)}"
            )
        whole = ops.concatenate([past, inputs], axis=1)
        valid = ops.concatenate([known, ops.ones(inputs.shape[:2], "bool")], axis=1)
        with training_scope(False):
            outputs = self._step(whole, valid, count)
        # No gradient: the cache would keep the graphs of all steps.
        whole = ops.stop_gradient(whole[:, whole.shape[1] - history :])
        return outputs, (whole, valid[:, valid.shape[1] - history :])

    def _step(self, whole, valid, count):
        window, generator = self.window, self.kernel_generator
        inputs = whole[:, whole.shape[1] - count :]
        context = whole[:, whole.shape[1] - count - getattr(generator, "look_back", 0) :]
        projection = self._generator_projection(inputs)
        # Of the whole sequence, so that steps use the same implementation.
        selection = self.select_implementation(inputs, projection)
        span = window.last_offset[0]
        values = whole[:, whole.shape[1] - count - span :]
        inside = dataclasses.replace(window, padding=VALID)
        hidden_channels = None if projection is None else projection[0].shape[0]
        selection = Selection(selection.name, problem_of(inside, values, hidden_channels))
        if selection.generates and projection is not None:
            hidden = generator.hidden(context)[:, -count:]
            operands = [ops.cast(operand, inputs.dtype) for operand in (hidden, *projection)]
            return self._finish(apply_generated(selection, values, *operands))
        kernel_map = generator(context, **training_argument())[:, -count:]
        kernel = self.kernel_of_map(kernel_map, values, valid[:, -(count + span) :], inside)
        return self._finish(apply_kernels(selection, values, kernel))

    def _history(self) -> int:
        """Positions of the cache."""
        return max(self.window.last_offset[0], getattr(self.kernel_generator, "look_back", 0))

    def _check_steps(self):
        window = self.window
        plain = window.padding == CAUSAL and window.strides == (1,)
        if not plain or window.data_format != CHANNELS_LAST or self.return_kernel:
            raise ValueError(
                "Steps require padding='causal', strides=1, data_format='channels_last' and "
                f"return_kernel=False. Received: padding={window.padding!r}, "
                f"strides={window.strides}, data_format={window.data_format!r}, "
                f"return_kernel={self.return_kernel}"
            )
        if uses_full_input(self.kernel_generator):
            raise ValueError(
                "Steps require a generator of single positions. "
                f"Received: kernel_generator={self.kernel_generator.name}, which uses the whole "
                "input"
            )

    def _finish(self, output):
        return output if self.filters is None else self._project(output)

    def _generator_hidden(self, inputs):
        return self.kernel_generator.hidden(self.features_of(inputs))

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

    def _output_channels(self, channels) -> int:
        return self.filters or channels

    def get_config(self):
        return {
            **super().get_config(),
            "group_channels": self.group_channels,
            "reduction_ratio": self.reduction_ratio,
            "filters": self.filters,
        }


# The three classes differ in rank only and share one signature.
_SHARED_DOC = """

    Args:
        kernel_size: Integer, or one for each spatial dimension: the window. The only positional
            argument.
        strides: Integer, or one for each spatial dimension.
        padding: ``"same"``, ``"valid"``, ``"symmetric"`` (the paper's code), ``"causal"`` (one
            dimension), an integer, or a pair (before, after) for each spatial dimension; see
            ``involution.ops.involution``. Causal windows end at their position, and their kernels
            are generated from the features there, with strides too.
        dilation_rate: Integer, or one for each spatial dimension.
        groups: Number of groups; divides the channels. None: channels // group_channels, or one
            group if there are fewer channels than that.
        group_channels: Channels per group, if ``groups`` is None.
        reduction_ratio: Input channels per hidden channel of a generator given by name, if it has
            hidden channels. None: its default, 4 for ``"bottleneck"`` and ``"contextual"``, 2 for
            ``"large_context"``.
        kernel_generator: A Keras layer from features (B, *spatial, C) to a kernel map
            (B, *out_spatial, taps * groups), channels tap-major; a name (``"bottleneck"``,
            ``"contextual"``, ``"large_context"``, ``"linear"``, ``"low_rank"``,
            ``"pairwise_attention"``, ``"static"``); None: ``"bottleneck"``. A generator with
            weights can belong to only one layer. Unnamed generators, and unnamed layers inside
            them, are named by their class.
        return_kernel: Whether to return (output, kernel) or only the output.
        group_layout: ``"contiguous"`` (the paper) or ``"interleaved"`` (the keras.io example).
        data_format: ``"channels_last"``, ``"channels_first"``, or None for Keras's setting.
        implementation: See ``involution.ops.involution``.
        filters: Channels of the output, by a 1x1 convolution after the involution. None: the
            input's channels, without it.
        kernel_softmax: Whether to apply softmax to the weights of each window; ``"in_bounds"``: to
            those inside the input and not masked, so that their sum is 1 at the borders too.
        kernel_dropout: Dropout rate on kernel weights.
        **kwargs: ``name``, ``dtype`` and so on, as in ``keras.layers.Layer``.

    Call arguments:
        inputs: Tensor (B, *spatial, C), or (B, C, *spatial) for ``"channels_first"``.
        training: Whether normalization uses the batch's statistics and dropout is active. None:
            inherited from the enclosing layer or model, or False if there is none. On PyTorch, the
            module's ``train()`` and ``eval()`` do not change it.
        mask: Boolean tensor (B, *spatial), as of ``keras.layers.Masking`` and ``Embedding``.
            Positions where it is False are zeros in the windows and for the kernel generator,
            for ``"pairwise_attention"`` outside of the input, and outputs centered there are 0.

    Returns:
        A tensor with the channels of ``inputs``, or ``filters``, and the sizes a convolution would
        give; with ``return_kernel`` also the kernels, (B, *out_spatial, taps, groups) or (B, taps,
        groups, *out_spatial).

    Raises:
        TypeError: More than one positional argument, or an argument of another library, such as
            ``stride``; the message says what to write.
        ValueError: An argument is out of its range, the groups do not divide the channels, the
            generator's map does not fit the output, a generator with weights belongs to another
            layer, the input has too few or too many axes, or there is a mask and the generator is
            ``"large_context"``, whose kernels depend on all positions.

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
