"""Transposed involution with generated kernels, in one to three dimensions."""

import dataclasses

import keras

from involution.layers.generated import GeneratedInvolution
from involution.layers.recording import record, replaced
from involution.ops import calls
from involution.ops.dispatch import select
from involution.ops.transposed import TransposedWindow
from involution.ops.validation import IN_BOUNDS, SAME
from involution.ops.window import Window
from involution.utils.arguments import MISNAMED, names_required

_check_names = names_required(
    "A transposed involution keeps the input's channels: for Conv{rank}DTranspose(64, 3) write "
    "{name}(3).",
    {**MISNAMED, "filters": "the output has the input's channels"},
)


class InvolutionTransposeND(GeneratedInvolution):
    """Transposed involution in ``rank`` dimensions: the base of Involution1DTranspose, 2D and 3D.

    ``window`` is that of the generator: a kernel for each position of the input.
    """

    @_check_names
    def __init__(
        self,
        kernel_size=7,
        *,
        strides=1,
        padding="same",
        output_padding=None,
        dilation_rate=1,
        groups=None,
        group_channels=16,
        reduction_ratio=None,
        kernel_generator=None,
        return_kernel=False,
        group_layout="contiguous",
        data_format=None,
        implementation=None,
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
        transposed = TransposedWindow.of(window, output_padding)
        if kernel_softmax == IN_BOUNDS:
            raise ValueError(
                "`kernel_softmax` must be True or False in a transposed involution. "
                f"Received: kernel_softmax={kernel_softmax!r}"
            )
        super().__init__(
            dataclasses.replace(window, strides=1, padding=SAME),
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
        self.strides, self.padding = window.strides, window.padding
        self.output_padding = output_padding
        # The windows of the output.
        self.transposed = transposed

    def build(self, input_shape):
        super().build(input_shape)
        window = dataclasses.replace(self.transposed.window, groups=self.window.groups)
        self.transposed = dataclasses.replace(self.transposed, window=window)

    def _call(self, inputs, **context):
        kernel = replaced(self, self.generate_kernel(inputs))
        output = calls.transposed_involution(self.transposed, self.implementation, inputs, kernel)
        record(self, self.transposed.window, inputs, kernel, output)
        return (output, kernel) if self.return_kernel else output

    def select_implementation(self, inputs, projection):
        return select(self.transposed.problem_of(inputs), self.implementation)

    def _generator_projection(self, inputs):
        return None

    def _output_sizes(self, input_shape) -> tuple[int | None, ...]:
        return self.transposed.checked_output_sizes(tuple(input_shape))

    def _kernel_sizes(self, input_shape) -> tuple[int | None, ...]:
        return self.window.spatial(input_shape)

    def _window_config(self) -> dict:
        return {
            **super()._window_config(),
            "strides": self.strides,
            "padding": self.padding,
            "output_padding": self.output_padding,
        }

    def get_config(self):
        return {
            **super().get_config(),
            "group_channels": self.group_channels,
            "reduction_ratio": self.reduction_ratio,
        }


_DOC = """Transposed involution {0}: each position adds its channels to a window of the output.

    The kernel of a position is generated from the features there and multiplies what it adds, as in
    transposed convolution; with strides the layer upsamples.

    >>> import numpy as np, involution
    >>> layer = involution.Involution{3}DTranspose(3, strides=2)
    >>> tuple(layer(np.ones({1}, "float32")).shape)
    {2}

    Args:
        kernel_size: Integer, or one for each spatial dimension: the window in the output. The only
            positional argument.
        strides: Integer, or one for each spatial dimension: the upsampling factor.
        padding: Positions cut off the output; see ``involution.ops.transposed_involution``.
        output_padding: Additional positions at the end of the output, as in
            ``keras.layers.Conv{3}DTranspose``; None: as there.
        dilation_rate: Integer, or one for each spatial dimension.
        groups: Number of groups; divides the channels. None: channels // group_channels, or one
            group if there are fewer channels than that.
        group_channels: Channels per group, if ``groups`` is None.
        reduction_ratio: Input channels per hidden channel of a generator given by name, if it has
            hidden channels. None: its default, 4 for ``"bottleneck"`` and ``"contextual"``, 2 for
            ``"large_context"``.
        kernel_generator: As for ``involution.Involution{3}D``, without strides: a kernel map has a
            kernel for each position of the input.
        return_kernel: Whether to return (output, kernel) or only the output.
        group_layout, data_format, implementation: As for ``involution.Involution{3}D``.
        kernel_softmax: Whether to apply softmax to the weights of each position.
        kernel_dropout: Dropout rate on kernel weights.
        **kwargs: ``name``, ``dtype`` and so on, as in ``keras.layers.Layer``.

    Call arguments:
        inputs: Tensor (B, *spatial, C), or (B, C, *spatial) for ``"channels_first"``.
        training: As for ``involution.Involution{3}D``.

    Returns:
        Tensor with the channels of ``inputs`` and the sizes a transposed convolution would give;
        with ``return_kernel`` also the kernels, (B, *spatial, taps, groups) or (B, taps, groups,
        *spatial).

    Raises:
        TypeError: More than one positional argument, or an argument of another library.
        ValueError: An argument is out of its range, the groups do not divide the channels, or the
            generator's map does not fit the input.
    """


@keras.saving.register_keras_serializable(package="involution")
class Involution1DTranspose(InvolutionTransposeND):
    __doc__ = _DOC.format("of sequences", "(1, 9, 32)", "(1, 18, 32)", 1)
    rank = 1


@keras.saving.register_keras_serializable(package="involution")
class Involution2DTranspose(InvolutionTransposeND):
    __doc__ = _DOC.format("of images", "(1, 9, 7, 32)", "(1, 18, 14, 32)", 2)
    rank = 2


@keras.saving.register_keras_serializable(package="involution")
class Involution3DTranspose(InvolutionTransposeND):
    __doc__ = _DOC.format("of volumes", "(1, 3, 4, 5, 32)", "(1, 6, 8, 10, 32)", 3)
    rank = 3
