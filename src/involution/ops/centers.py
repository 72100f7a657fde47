"""Windows whose kernels are generated from the features at their centers."""

from involution.ops.problem import cached, output_sizes
from involution.ops.validation import CAUSAL, SAME, SYMMETRIC


def number_of_groups(channels, groups, group_channels) -> int:
    """The number of groups for the arguments of a layer; ValueError unless they divide evenly."""
    if groups is not None:
        check_groups("groups", groups, channels)
        return groups
    if channels < group_channels:
        return 1
    check_groups("group_channels", group_channels, channels)
    return channels // group_channels


def check_groups(name, value, channels):
    """ValueError unless ``value`` divides the input's channels."""
    if channels % value:
        # Bounded, because a file may declare any number of channels.
        divisors = (str(d) for d in range(1, min(channels, 2**16) + 1) if channels % d == 0)
        raise ValueError(
            f"`{name}` must divide the input's channels: for {channels} channels one of "
            f"{', '.join(divisors)}. Received: {name}={value}"
        )


def check_padding(window):
    """ValueError unless the first window's center lies inside the input."""
    if min(window.first_center) < 0:
        raise ValueError(
            "`padding` must leave the center of every window inside the input: at most "
            f"{tuple(last // 2 for last in window.last_offset)} before it. "
            f"Received: padding={window.padding!r}, kernel_size={window.kernel_size}"
        )


@cached
def center_output_sizes(window, input_shape) -> tuple[int | None, ...]:
    """Spatial sizes of the output; ValueError unless all windows and their centers fit."""
    sizes = output_sizes(window, input_shape)
    if isinstance(window.padding, str):
        return sizes  # every mode centers its windows inside
    counts = window.window_counts(window.spatial(input_shape))
    for n, out, center, stride in zip(
        window.spatial(input_shape), counts, window.first_center, window.strides, strict=True
    ):
        if n is not None and out is not None and center + (out - 1) * stride >= n:
            raise ValueError(
                "`padding` must leave the center of every window inside the input. "
                f"Received: padding={window.padding!r}, kernel_size={window.kernel_size}, "
                f"input sizes {window.spatial(input_shape)}"
            )
    return sizes


def center_slices(window, sizes) -> tuple[slice, ...]:
    """For an input of these spatial sizes, the part that starts at the first window's center; empty
    if that is all of it."""
    is_odd = not any(last % 2 for last in window.last_offset)
    if window.padding in (SAME, CAUSAL) or (window.padding == SYMMETRIC and is_odd):
        # No slice: PyTorch's exporter specializes on whether a slice reaches the end.
        return ()
    return tuple(
        slice(center, center + out * s)
        for center, out, s in zip(
            window.first_center, window.window_counts(sizes), window.strides, strict=True
        )
    )


def every_center(window) -> tuple[slice, ...]:
    """The centers of all windows, in an input of any size for which ``center_output_sizes`` holds.

    The ends are relative to that of the input: PyTorch's exporters specialize on others.
    """
    ends: list[int | None] = [None] * window.rank
    if window.padding not in (SAME, CAUSAL):
        # Except for "same", the padding does not depend on the input's size.
        pads = window.pads((1,) * window.rank)
        rest = (o - o // 2 - after for o, (_, after) in zip(window.last_offset, pads, strict=True))
        ends = [-n if n > 0 else None for n in rest]
    return tuple(map(slice, window.first_center, ends, window.strides))
