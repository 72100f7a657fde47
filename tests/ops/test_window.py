"""Window positions, without tensors: against the oracle, and cases the oracle does not cover."""

import dataclasses
import itertools

import pytest

from involution.ops.window import Window, ceil_div
from tests.support import oracle

pytestmark = pytest.mark.any_backend

# Every argument differs between the two dimensions.
WIDE = Window((3, 4), (2, 1), "valid", (2, 5), 3, "contiguous", "channels_last")
FIRST = dataclasses.replace(WIDE, data_format="channels_first", group_layout="interleaved")


def line(kernel, stride, dilation, padding):
    return Window((kernel,), (stride,), padding, (dilation,), 1, "contiguous", "channels_last")


@pytest.mark.parametrize("padding", ["same", "valid", "symmetric", ((2, 1),)])
def test_pads_and_output_sizes_equal_the_oracle(padding):
    for n, k, s, d in itertools.product(range(1, 9), range(1, 5), range(1, 7), range(1, 4)):
        g = line(k, s, d, padding)
        assert g.pads((n,)) == (oracle.pads(n, k, s, d, padding),), (g, n)
        assert g.output_sizes((n,)) == (oracle.output_size(n, k, s, d, padding),), (g, n)


def test_dimensions_are_independent():
    assert (WIDE.rank, WIDE.taps) == (2, 12)
    assert WIDE.tap_offsets == list(itertools.product((0, 2, 4), (0, 5, 10, 15)))
    assert WIDE.output_sizes((9, 20)) == (3, 5)
    same = dataclasses.replace(WIDE, padding="same")
    assert same.pads((9, 20)) == ((2, 2), (7, 8))
    assert same.output_sizes((9, None)) == (5, None)
    with pytest.raises(ValueError, match="longer"):
        same.pads((9,))


def test_axes_and_shapes():
    assert (WIDE.spatial_axis, WIDE.channel_axis, WIDE.tap_axis) == (1, 3, 3)
    assert (FIRST.spatial_axis, FIRST.channel_axis, FIRST.tap_axis) == (2, 1, 1)
    assert WIDE.spatial((2, 5, 6, 7)) == (5, 6)
    assert FIRST.spatial([2, 7, 5, 6]) == (5, 6)
    assert WIDE.shape(2, (5, 6), 7, 8) == (2, 5, 6, 7, 8)
    assert FIRST.shape(2, (5, 6), 7, 8) == (2, 7, 8, 5, 6)


def test_split_channels():
    assert WIDE.split_channels(12) == (3, 4)
    assert FIRST.split_channels(12) == (4, 3)
    assert all(isinstance(n, int) for n in WIDE.split_channels(12))
    # In (B, *spatial, groups, group channels) and (B, group channels, groups, *spatial).
    assert (WIDE.group_channel_axis, FIRST.group_channel_axis) == (4, 1)


def test_first_center():
    for padding, center in (
        ("same", (0, 0)),
        ("valid", (2, 7)),
        ("symmetric", (0, 0)),
        (((1, 0), (9, 0)), (1, -2)),
    ):
        assert dataclasses.replace(WIDE, padding=padding).first_center == center


def test_pads_of_unknown_sizes():
    assert line(4, 1, 3, "same").pads((None,)) == ((4, 5),)
    rule = "'same' padding with strides above 1 depends on the input's size"
    with pytest.raises(ValueError, match=f"^{rule}$"):
        line(4, 2, 3, "same").pads((None,))
    # Tensors standing for unknown sizes need their own maximum.
    calls = []
    line(1, 3, 1, "same").pads((1,), lambda a, b: calls.append((a, b)) or 7)
    assert calls == [(0, 0)]
    assert line(1, 3, 1, "same").pads((4,), lambda a, b: 7) == ((3, 4),)
    assert line(3, 3, 1, "same").pads((4,), None) == ((1, 1),)


@pytest.mark.parametrize(
    ("g", "n", "stride", "rate"),
    [
        # From either end of the input, a longer step goes beyond the other end.
        (line(2, 1, 99, "same"), 5, 1, 13),
        (line(2, 1, 98, "symmetric"), 5, 1, 12),
        (line(2, 1, 13, "same"), 5, 1, 13),
        (line(2, 1, 11, "same"), 5, 1, 11),
        # A single window.
        (line(1, 99, 1, "same"), 5, 5, 1),
        (line(1, 99, 1, "valid"), 5, 5, 1),
        (line(1, 99, 1, ((1, 2),)), 5, 8, 1),
        (line(1, 4, 1, "same"), 4, 4, 1),
        # Two windows.
        (line(1, 4, 1, "same"), 5, 4, 1),
        # Unchanged: another padding, and an unknown size.
        (line(2, 1, 99, "valid"), 100, 1, 99),
        (line(2, 99, 99, "same"), None, 99, 99),
    ],
)
def test_clamp_steps_shortens_steps_beyond_the_input(g, n, stride, rate):
    clamped = dataclasses.replace(g, strides=(stride,), dilation_rate=(rate,))
    assert g.clamp_steps((n,)) == clamped
    # After a dimension of unknown size.
    two = {"kernel_size": g.kernel_size * 2, "strides": g.strides * 2, "rank": 2, "upsampling": 1}
    pads = g.padding * 2 if isinstance(g.padding, tuple) else g.padding
    g = dataclasses.replace(g, **two, padding=pads, dilation_rate=g.dilation_rate * 2)
    clamped = dataclasses.replace(
        g, strides=(g.strides[0], stride), dilation_rate=(g.dilation_rate[0], rate)
    )
    assert g.clamp_steps((None, n)) == clamped


def test_ceil_div_counts_strides_that_cover_a_size():
    assert [ceil_div(n, 3) for n in range(8)] == [0, 1, 1, 1, 2, 2, 2, 3]
