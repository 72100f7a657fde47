"""Transposed involution as plain PyTorch modules: upsampling by strides."""

import torch

from involution.ops.validation import (
    CONTIGUOUS,
    IN_BOUNDS,
    SAME,
    SYMMETRIC,
    standardize_tuple,
)
from involution.torch.functional import apply_transposed, make_transposed, make_window
from involution.torch.modules import InvolutionNd, check_input, check_names, kernels_of


class InvolutionTransposeNd(InvolutionNd):
    """A transposed involution in ``rank`` dimensions: the base of InvolutionTranspose1d, 2d, 3d."""

    @check_names
    def __init__(
        self,
        channels,
        kernel_size=7,
        *,
        stride=1,
        padding=SYMMETRIC,
        output_padding=0,
        dilation=1,
        groups=None,
        group_channels=16,
        reduction_ratio=None,
        kernel_generator=None,
        out_channels=None,
        kernel_softmax=False,
        kernel_dropout=0.0,
        group_layout=CONTIGUOUS,
        return_kernel=False,
        implementation=None,
        device=None,
        dtype=None,
    ):
        if kernel_softmax == IN_BOUNDS:
            raise ValueError(
                "`kernel_softmax` of a transposed involution must be False or True: a kernel's "
                f"targets outside the output are cut off. Received: {kernel_softmax=}"
            )
        # Kernels are generated for the positions of the input.
        super().__init__(
            channels,
            kernel_size,
            padding=SAME,
            dilation=dilation,
            groups=groups,
            group_channels=group_channels,
            reduction_ratio=reduction_ratio,
            kernel_generator=kernel_generator,
            out_channels=out_channels,
            kernel_softmax=kernel_softmax,
            kernel_dropout=kernel_dropout,
            group_layout=group_layout,
            return_kernel=return_kernel,
            implementation=implementation,
            device=device,
            dtype=dtype,
        )
        window = make_window(
            kernel_size, stride, padding, dilation, self.window.groups, group_layout, self.rank
        )
        self.padding = window.padding
        self.output_padding = standardize_tuple("output_padding", output_padding, self.rank, 0)
        self.transposed = make_transposed(window, output_padding)

    def forward(self, x):
        check_input(x, self.channels, self.rank, type(self).__name__, self.parameter_dtype())
        kernel = kernels_of(self.make_kernel_map(x), self.window, self.kernel_softmax, x)
        if self.kernel_dropout is not None:
            kernel = self.kernel_dropout(kernel)
        y = apply_transposed(x, kernel, self.transposed, self.implementation)
        if self.projection is not None:
            y = self.projection(y)
        return (y, kernel) if self.return_kernel else y

    def extra_repr(self):
        window = self.transposed.window
        text = f"{self.channels}, kernel_size={window.kernel_size}, stride={window.strides}"
        if self.padding != SYMMETRIC:
            text += f", padding={self.padding!r}"
        if any(self.output_padding):
            text += f", output_padding={self.output_padding}"
        if any(d > 1 for d in window.dilation_rate):
            text += f", dilation={window.dilation_rate}"
        text += f", groups={window.groups}"
        if window.group_layout != CONTIGUOUS:
            text += f", group_layout={window.group_layout!r}"
        for name in ("kernel_softmax", "return_kernel", "implementation"):
            value = getattr(self, name)
            text += f", {name}={value!r}" if value else ""
        return text


torch.fx.wrap("apply_transposed")
torch.fx.wrap("check_input")
torch.fx.wrap("kernels_of")


# The three classes differ in their rank only and share one signature.
_SHARED_DOC = """

    Each position of the input adds its channels, times its own kernel, to a window of the output:
    with one kernel for all positions and one channel for each group (``"static"``), a transposed
    depthwise convolution. The kernels are generated at the positions of the input; the parameters
    have the names of ``Involution2d``.

    Args:
        channels: Channels of the input, and of the output without ``out_channels``.
        kernel_size: Integer, or one for each spatial dimension: the window, in positions of the
            output. All other arguments must be passed by name.
        stride: Integer, or one for each spatial dimension: positions of the output for each of the
            input.
        padding: Positions cut off the output at both ends: ``"symmetric"`` (floor((kernel_size - 1)
            * dilation / 2)), ``"valid"`` (none), ``"same"`` (as many as leave n * stride positions,
            as in Keras), an integer, an integer for each spatial dimension, or a pair (before,
            after) for each.
        output_padding: Integer, or one for each spatial dimension: additional positions at the end
            of the output, fewer than ``stride``.
        dilation, groups, group_channels, reduction_ratio, out_channels: As for ``Involution2d``.
        kernel_generator: As for ``Involution2d``; the map has the sizes of the input.
        kernel_softmax: Whether to apply softmax to the weights of each kernel.
        kernel_dropout, group_layout, return_kernel, implementation, device, dtype: As for
            ``Involution2d``.

    Call arguments:
        x: Tensor (B, channels, *spatial), in any memory format.

    Returns:
        A tensor in the memory format of ``x`` with the sizes of PyTorch's transposed convolutions,
        except for ``"same"``: (n - 1) * stride + (kernel_size - 1) * dilation + 1 - padding before
        and after + output_padding. With ``return_kernel`` also the kernels, (B, groups, taps,
        *spatial).

    Raises:
        TypeError, ValueError: As for ``Involution2d``.
    """


class InvolutionTranspose1d(InvolutionTransposeNd):
    __doc__ = (
        """Transposed involution for sequences: inputs (B, channels, length).

    >>> import torch
    >>> from involution.torch import InvolutionTranspose1d
    >>> InvolutionTranspose1d(32, 4, stride=2, padding=1)(torch.ones(2, 32, 10)).shape
    torch.Size([2, 32, 20])
    """
        + _SHARED_DOC
    )
    rank = 1


class InvolutionTranspose2d(InvolutionTransposeNd):
    __doc__ = (
        """Transposed involution for images: inputs (B, channels, height, width).

    >>> import torch
    >>> from involution.torch import InvolutionTranspose2d
    >>> layer = InvolutionTranspose2d(32, 3, stride=2, output_padding=1)
    >>> layer(torch.ones(2, 32, 9, 10)).shape
    torch.Size([2, 32, 18, 20])
    """
        + _SHARED_DOC
    )
    rank = 2


class InvolutionTranspose3d(InvolutionTransposeNd):
    __doc__ = (
        """Transposed involution for volumes: inputs (B, channels, depth, height, width).

    >>> import torch
    >>> from involution.torch import InvolutionTranspose3d
    >>> InvolutionTranspose3d(16, 2, stride=2)(torch.ones(1, 16, 3, 4, 5)).shape
    torch.Size([1, 16, 6, 8, 10])
    """
        + _SHARED_DOC
    )
    rank = 3
