"""Upsampling by kernels that are generated from the features, as plain PyTorch modules."""

import torch
from torch import nn

from involution.ops.centers import check_groups
from involution.ops.dispatch import standardize_implementation
from involution.ops.validation import (
    CONTIGUOUS,
    SAME,
    check_rate,
    standardize_softmax,
    standardize_tuple,
)
from involution.torch.functional import apply_kernel, make_window
from involution.torch.generators import Carafe, carafe_map
from involution.torch.modules import check_axes, check_dtype, check_input, kernels_of
from involution.utils.arguments import names_required

_CHANNELS = "the input and the output have `channels`"

# Arguments of other libraries, and what to write.
MISNAMED = {
    "in_channels": _CHANNELS,
    "out_channels": _CHANNELS,
    "size": "use `scale_factor`",
    "stride": "use `scale_factor`",
    "mode": "the kernels are generated",
    "up_kernel": "use `kernel_size`",
    "up_group": "use `groups`",
    "encoder_kernel": "use kernel_generator=functools.partial(Carafe, encoder_size=...)",
    "compressed_channels": "use kernel_generator=functools.partial(Carafe, hidden_channels=...)",
}
check_names = names_required("Write {name}(64, scale_factor=2, kernel_size=5, groups=1).", MISNAMED)


class InvolutionUpsampleNd(nn.Module):
    """Upsampling in ``rank`` dimensions: the base of InvolutionUpsample1d, 2d and 3d."""

    rank: int
    kernel_generator: nn.Module | None
    # Of CARAFE's generator, the default.
    channel_compressor: nn.Module
    content_encoder: nn.Module
    guide_compressor: nn.Module | None
    guide_encoder: nn.Module | None

    @check_names
    def __init__(
        self,
        channels,
        scale_factor=2,
        kernel_size=5,
        *,
        dilation=1,
        groups=1,
        guide_channels=None,
        kernel_generator=None,
        kernel_softmax=True,
        kernel_dropout=0.0,
        group_layout=CONTIGUOUS,
        return_kernel=False,
        implementation=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        (self.channels,) = standardize_tuple("channels", channels, 1)
        (groups,) = standardize_tuple("groups", groups, 1)
        check_groups("groups", groups, self.channels)
        scale_factor = standardize_tuple("scale_factor", scale_factor, self.rank)
        self.window = make_window(
            kernel_size, 1, SAME, dilation, groups, group_layout, self.rank, scale_factor
        )
        if implementation is not None:
            standardize_implementation(implementation)
        self.implementation = implementation
        self.kernel_softmax = standardize_softmax(kernel_softmax)
        self.return_kernel = bool(return_kernel)
        self.guide_channels = guide_channels
        if guide_channels is not None:
            (self.guide_channels,) = standardize_tuple("guide_channels", guide_channels, 1)
        self._make_generator(kernel_generator, {"device": device, "dtype": dtype})
        check_rate("kernel_dropout", kernel_dropout)
        self.kernel_dropout = nn.Dropout(kernel_dropout) if kernel_dropout else None

    def _make_generator(self, identifier, factory):
        if isinstance(identifier, nn.Module):
            self.kernel_generator = identifier
            return
        # Functions of (channels, window) need no other arguments.
        options = {name: value for name, value in factory.items() if value is not None}
        if self.guide_channels is not None:
            options["guide_channels"] = self.guide_channels
        make = Carafe if identifier is None or identifier == "carafe" else identifier
        generator = make(self.channels, self.window, **options) if callable(make) else None
        if not isinstance(generator, nn.Module):
            raise ValueError(
                "`kernel_generator` must be 'carafe', a module, or a function (channels, window) "
                f"that returns one. Received: kernel_generator={identifier!r}"
            )
        if type(generator) is not Carafe:
            self.kernel_generator = generator
            return
        self.kernel_generator = None
        # Children of the module itself, as in mmcv's CARAFEPack.
        self.guide_compressor = self.guide_encoder = None
        for name, module in generator.named_children():
            setattr(self, name, module)

    def forward(self, x, guide=None):
        dtype = None
        if self.kernel_generator is None:
            dtype = self.channel_compressor.weight.dtype
        check_input(x, self.channels, self.rank, type(self).__name__, dtype)
        _check_guide(guide, x, self.guide_channels, self.window, type(self).__name__, dtype)
        if self.kernel_generator is None:
            kernel_map = carafe_map(self, x, guide, self.window.upsampling)
        else:
            kernel_map = self.kernel_generator(*((x,) if guide is None else (x, guide)))
        kernel = kernels_of(kernel_map, self.window, self.kernel_softmax, x)
        if self.kernel_dropout is not None:
            kernel = self.kernel_dropout(kernel)
        y = apply_kernel(x, kernel, self.window, self.implementation)
        return (y, kernel) if self.return_kernel else y

    def extra_repr(self):
        window = self.window
        text = f"{self.channels}, scale_factor={window.upsampling}"
        text += f", kernel_size={window.kernel_size}"
        if any(d > 1 for d in window.dilation_rate):
            text += f", dilation={window.dilation_rate}"
        text += f", groups={window.groups}"
        if self.guide_channels is not None:
            text += f", guide_channels={self.guide_channels}"
        if window.group_layout != CONTIGUOUS:
            text += f", group_layout={window.group_layout!r}"
        if self.kernel_softmax is not True:
            text += f", kernel_softmax={self.kernel_softmax!r}"
        for name in ("return_kernel", "implementation"):
            value = getattr(self, name)
            text += f", {name}={value!r}" if value else ""
        return text


# Functions that inspect tensors are nodes of the graphs of torch.fx.
@torch.fx.wrap
def _check_guide(guide, x, channels, window, name, dtype):
    if (guide is None) != (channels is None):
        raise ValueError(
            "A guide must be passed where the module has `guide_channels`, and only there. "
            f"Received: guide={None if guide is None else tuple(guide.shape)}, "
            f"guide_channels={channels}"
        )
    if guide is None:
        return
    check_axes(guide, window.rank, f"{name} (guide)")
    expected = (x.shape[0], channels, *window.output_sizes(x.shape[2:]))
    if tuple(guide.shape) != expected:
        raise ValueError(
            f"`guide` must have the shape {expected}: batch, `guide_channels`, and the sizes of "
            f"the output. Received: guide.shape={tuple(guide.shape)}"
        )
    check_dtype(guide, "guide", "`guide` must be of the dtype of the module's parameters", dtype)


torch.fx.wrap("apply_kernel")
torch.fx.wrap("check_input")
torch.fx.wrap("kernels_of")


# The three classes differ in their rank only and share one signature.
_SHARED_DOC = """

    Each position of the output is a weighted sum over a window of the input, around the position
    that it is a part of; its weights are generated from the input, in the default of CARAFE, and
    optionally from a guide: features of the output's sizes, such as an encoder's. The state dict of
    the default generator without a guide has the names and the order of mmcv's ``CARAFEPack``.

    Args:
        channels: Channels of the input and of the output.
        scale_factor: Integer, or one for each spatial dimension.
        kernel_size: Integer, or one for each spatial dimension: the window, in positions of the
            input. All other arguments must be passed by name.
        dilation: Integer, or one for each spatial dimension.
        groups: Number of groups; divides the channels.
        guide_channels: Channels of the guide; None: there is none.
        kernel_generator: None or ``"carafe"`` for ``generators.Carafe``; a module from the input,
            or from the input and the guide, to a kernel map (B, groups * taps, *out_spatial),
            channels group-major; or a function of (channels, window) that returns one, also with
            ``guide_channels``, ``device`` and ``dtype`` if they are given.
        kernel_softmax: Whether to apply softmax to the weights of each window; ``"in_bounds"``: to
            those of the taps inside the input, the others are 0.
        kernel_dropout: Dropout rate on kernel weights.
        group_layout: ``"contiguous"`` (CARAFE) or ``"interleaved"``.
        return_kernel: Whether to return (output, kernel) or only the output.
        implementation: See ``involution.ops.involution``.
        device, dtype: Of the parameters.

    Call arguments:
        x: Tensor (B, channels, *spatial), in any memory format.
        guide: Tensor (B, guide_channels, *out_spatial), where the module has ``guide_channels``.

    Returns:
        A tensor (B, channels, *out_spatial) with sizes n * scale_factor, in the memory format of
        ``x``; with ``return_kernel`` also the kernels, (B, groups, taps, *out_spatial).

    Raises:
        TypeError: An argument after ``kernel_size`` is not passed by name, or is of another
            library, such as ``up_kernel``; the message says what to write.
        ValueError: An argument is out of its range, the groups do not divide the channels, or the
            input, the guide or the generator's map has another shape.

    Source: Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019,
    arXiv:1905.02188.
    """


class InvolutionUpsample1d(InvolutionUpsampleNd):
    __doc__ = (
        """Content-aware upsampling of sequences: inputs (B, channels, length).

    >>> import torch
    >>> from involution.torch import InvolutionUpsample1d
    >>> InvolutionUpsample1d(32, scale_factor=3)(torch.ones(2, 32, 10)).shape
    torch.Size([2, 32, 30])
    """
        + _SHARED_DOC
    )
    rank = 1


class InvolutionUpsample2d(InvolutionUpsampleNd):
    __doc__ = (
        """Content-aware upsampling of images, CARAFE: inputs (B, channels, height, width).

    >>> import torch
    >>> from involution.torch import InvolutionUpsample2d
    >>> InvolutionUpsample2d(64)(torch.ones(2, 64, 9, 10)).shape
    torch.Size([2, 64, 18, 20])
    >>> guided = InvolutionUpsample2d(64, guide_channels=16)
    >>> guided(torch.ones(2, 64, 9, 10), torch.ones(2, 16, 18, 20)).shape
    torch.Size([2, 64, 18, 20])
    """
        + _SHARED_DOC
    )
    rank = 2


class InvolutionUpsample3d(InvolutionUpsampleNd):
    __doc__ = (
        """Content-aware upsampling of volumes: inputs (B, channels, depth, height, width).

    >>> import torch
    >>> from involution.torch import InvolutionUpsample3d
    >>> InvolutionUpsample3d(16, (1, 2, 2), 3)(torch.ones(1, 16, 3, 4, 5)).shape
    torch.Size([1, 16, 3, 8, 10])
    """
        + _SHARED_DOC
    )
    rank = 3
