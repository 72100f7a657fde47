"""The formula as nested loops in float64 NumPy. It shares no code with the package."""

import dataclasses
import itertools

import numpy as np


def pads(n, kernel, stride, dilation, padding, axis=0):
    """(before, after) for one spatial dimension."""
    span = (kernel - 1) * dilation
    if padding == "valid":
        return 0, 0
    if padding == "symmetric":
        return span // 2, span // 2
    if padding == "causal":
        return span, 0
    if padding == "same":
        out = -(-n // stride)
        total = max(0, (out - 1) * stride + span + 1 - n)
        return total // 2, total - total // 2
    return padding[axis]


def output_size(n, kernel, stride, dilation, padding, axis=0):
    before, after = pads(n, kernel, stride, dilation, padding, axis)
    return (n + before + after - (kernel - 1) * dilation - 1) // stride + 1


# NaN from infinities is expected: no warnings.
ieee = np.errstate(invalid="ignore")


@ieee
def involution(
    x,
    kernel,
    kernel_size,
    strides,
    padding,
    dilation_rate,
    group_layout="contiguous",
    upsampling=None,
):
    """channels_last: x (B, *spatial, C), kernel (B, *out, taps, G); arguments are tuples, with a
    value for each spatial dimension.

    Returns (y, magnitude): the output, and the sum of |kernel * x|, which bounds rounding errors.
    """
    x, kernel = np.asarray(x, "float64"), np.asarray(kernel, "float64")
    out, pairs = tap_pairs(x.shape[1:-1], kernel_size, strides, padding, dilation_rate, upsampling)
    assert kernel.shape[1:-2] == out
    group_of = groups_of(x.shape[-1], kernel.shape[-1], group_layout)
    y = np.zeros((x.shape[0], *out, x.shape[-1]))
    magnitude = np.zeros_like(y)
    for p, tap, q in pairs:
        term = kernel[(slice(None), *p, tap)][:, group_of] * x[(slice(None), *q)]
        y[(slice(None), *p)] += term
        magnitude[(slice(None), *p)] += np.abs(term)
    # Taps in the padding contribute kernel * 0, which is NaN if the kernel is not finite.
    outside = ~in_bounds(out, kernel.shape[-2], pairs)[..., None]
    y += np.where(outside, kernel * 0, 0).sum(-2)[..., group_of]
    return y, magnitude


@ieee
def gradients(
    x,
    kernel,
    dy,
    kernel_size,
    strides,
    padding,
    dilation_rate,
    group_layout="contiguous",
    upsampling=None,
):
    """(dx, dkernel) of sum(y * dy), by the same loops."""
    x, kernel, dy = (np.asarray(a, "float64") for a in (x, kernel, dy))
    out, pairs = tap_pairs(x.shape[1:-1], kernel_size, strides, padding, dilation_rate, upsampling)
    group_of = groups_of(x.shape[-1], kernel.shape[-1], group_layout)
    in_group = np.eye(kernel.shape[-1])[group_of]
    dx, dkernel = np.zeros_like(x), np.zeros_like(kernel)
    for p, tap, q in pairs:
        at_p, at_q, here = (slice(None), *p), (slice(None), *q), (slice(None), *p, tap)
        dx[at_q] += kernel[here][:, group_of] * dy[at_p]
        dkernel[here] += group_sums(x[at_q] * dy[at_p], in_group)
    outside = ~in_bounds(out, kernel.shape[-2], pairs)[..., None]
    dkernel += np.where(outside, group_sums(dy * 0, in_group)[..., None, :], 0)
    return dx, dkernel


def group_sums(terms, in_group):
    """Sums over the channels of each group."""
    if np.isfinite(terms).all():
        return terms @ in_group
    # The matrix product would add 0 * inf = NaN of other groups' channels.
    return np.stack([terms[..., column == 1].sum(-1) for column in in_group.T], -1)


def in_bounds(out, taps, pairs):
    """For every output position and tap, whether the tap is inside the input."""
    inside = np.zeros((*out, taps), bool)
    for p, tap, _ in pairs:
        inside[(*p, tap)] = True
    return inside


def tap_pairs(sizes, kernel_size, strides, padding, dilation_rate, upsampling=None):
    """(output sizes, list of (output position, tap, input position) for taps inside the input)."""
    up = upsampling or (1,) * len(sizes)
    dimensions = list(zip(sizes, kernel_size, strides, dilation_rate, strict=True))
    before = [pads(*d, padding, i)[0] for i, d in enumerate(dimensions)]
    out = tuple(output_size(*d, padding, i) * up[i] for i, d in enumerate(dimensions))
    pairs = []
    for p in np.ndindex(*out):
        for tap, k in enumerate(np.ndindex(*kernel_size)):
            q = tuple(
                p[i] // up[i] * strides[i] - before[i] + k[i] * dilation_rate[i]
                for i in range(len(sizes))
            )
            if all(0 <= q[i] < sizes[i] for i in range(len(sizes))):
                pairs.append((p, tap, q))
    return out, pairs


def groups_of(channels, groups, group_layout):
    """The group of every channel."""
    if group_layout == "contiguous":
        return [c // (channels // groups) for c in range(channels)]
    return [c % groups for c in range(channels)]


def relative(value, expected):
    """The largest error, relative to the largest entry."""
    return np.abs(value - expected).max() / max(np.abs(expected).max(), 1e-300)


# Digits of the significand, and the exponent of the smallest positive number.
TYPES = {"float64": (53, -1074), "float32": (24, -149), "bfloat16": (8, -133), "float16": (11, -24)}


def error_bound(expected, magnitude, terms, dtype):
    """Half an ulp of the dtype, plus the rounding error of a sum of ``terms`` products in float32,
    or in float64 for float64."""
    digits, smallest = TYPES[dtype]
    unit = 2.0 ** -max(digits, 24)
    sum_error = terms * unit / (1 - terms * unit) * magnitude
    largest = np.abs(expected) + sum_error
    exponent = np.where(largest > 0, np.frexp(largest)[1] - digits, smallest)
    return np.ldexp(0.5, np.maximum(exponent, smallest)) + sum_error


@dataclasses.dataclass(frozen=True)
class Call:
    """Sizes and arguments of one call of the operator; arguments per dimension are tuples."""

    batch: int
    sizes: tuple
    channels: int
    kernel_size: tuple
    strides: tuple
    padding: str | tuple
    dilation_rate: tuple
    groups: int = 1
    group_layout: str = "contiguous"
    data_format: str = "channels_last"
    upsampling: tuple | None = None  # 1 in each dimension

    @property
    def arguments(self):
        names = ("kernel_size", "strides", "padding", "dilation_rate")
        names += ("groups", "group_layout", "data_format")
        arguments = {name: getattr(self, name) for name in names}
        return (
            arguments if self.upsampling is None else {**arguments, "upsampling": self.upsampling}
        )

    @property
    def output_sizes(self):
        dimensions = zip(
            self.sizes, self.kernel_size, self.strides, self.dilation_rate, strict=True
        )
        up = self.upsampling or (1,) * len(self.sizes)
        return tuple(output_size(*d, self.padding, i) * up[i] for i, d in enumerate(dimensions))

    @property
    def taps(self):
        return int(np.prod(self.kernel_size))

    def _shape(self, sizes, *channels):
        if self.data_format == "channels_last":
            return (self.batch, *sizes, *channels)
        return (self.batch, *channels, *sizes)

    @property
    def x_shape(self):
        return self._shape(self.sizes, self.channels)

    @property
    def kernel_shape(self):
        return self._shape(self.output_sizes, self.taps, self.groups)

    @property
    def output_shape(self):
        return self._shape(self.output_sizes, self.channels)

    def arrays(self, seed=0):
        """Random x, kernel and dy."""
        rng = np.random.default_rng(seed)
        shapes = self.x_shape, self.kernel_shape, self.output_shape
        return [rng.standard_normal(shape) for shape in shapes]

    def involution(self, x, kernel):
        """(y, magnitude) of ``involution`` above, in this call's data format and for any batch."""
        arguments = self.arguments
        groups, first = arguments.pop("groups"), arguments.pop("data_format") == "channels_first"
        if first:
            x, kernel = np.moveaxis(x, 1, -1), np.moveaxis(kernel, (1, 2), (-2, -1))
        assert kernel.shape[-1] == groups
        results = involution(x, kernel, **arguments)
        return [np.moveaxis(r, -1, 1) for r in results] if first else results

    def gradients(self, x, kernel, dy):
        """(dx, dkernel) of ``gradients`` above, in this call's data format."""
        arguments = self.arguments
        arguments.pop("groups")
        if arguments.pop("data_format") == "channels_last":
            return gradients(x, kernel, dy, **arguments)
        x, dy = (np.moveaxis(a, 1, -1) for a in (x, dy))
        dx, dkernel = gradients(x, np.moveaxis(kernel, (1, 2), (-2, -1)), dy, **arguments)
        return np.moveaxis(dx, -1, 1), np.moveaxis(dkernel, (-2, -1), (1, 2))

    def central_differences(self, x, kernel, dy):
        """Gradients of sum(y * dy) for x and kernel, by central differences of ``involution``.

        Only rounding errors remain, since y is linear in both. Samples are independent, so all
        varied copies are samples of one call.
        """
        entries, x_entries = x[0].size + kernel[0].size, x[0].size
        steps = np.concatenate([np.eye(entries), -np.eye(entries)])[:, None]

        def varied(a, steps):
            return (a.reshape(1, len(a), -1) + steps).reshape(-1, *a.shape[1:])

        x_steps, kernel_steps = steps[..., :x_entries], steps[..., x_entries:]
        y, _ = self.involution(varied(x, x_steps), varied(kernel, kernel_steps))
        sums = (y.reshape(-1, *dy.shape) * dy).reshape(2, entries, len(x), -1).sum(-1)
        slopes = (sums[0] - sums[1]).T / 2
        return slopes[:, :x_entries].reshape(x.shape), slopes[:, x_entries:].reshape(kernel.shape)


def with_non_finite(arrays, seed=0, count=1):
    """Copies of the arrays, each with ``count`` infinite or NaN values."""
    rng = np.random.default_rng(seed)
    copies = [np.array(a) for a in arrays]
    for a in copies:
        positions = rng.choice(a.size, min(count, a.size), replace=False)
        a.reshape(-1)[positions] = rng.choice([np.inf, -np.inf, np.nan], len(positions))
    return copies


def _random_call(rng, rank, padding, group_layout, data_format):
    def integers(*values, count=rank):
        return tuple(int(n) for n in rng.choice(values, count))

    if padding == "explicit":
        padding = tuple(integers(0, 1, 2, 3, count=2) for _ in range(rank))
    (groups,) = integers(1, 2, 3, count=1)
    call = Call(
        batch=integers(1, 2, count=1)[0],
        sizes=integers(1, 3, 5, 7),
        channels=groups * integers(1, 2, 5, 17, count=1)[0],
        kernel_size=integers(1, 2, 3, 4),
        strides=integers(1, 1, 2, 3),
        padding=padding,
        dilation_rate=integers(1, 1, 2),
        groups=groups,
        group_layout=group_layout,
        data_format=data_format,
    )
    if integers(0, 1, 2, count=1) != (0,):
        return call
    return dataclasses.replace(call, strides=(1,) * rank, upsampling=integers(1, 2, 3))


def _is_small(call):
    entries = np.prod(call.x_shape) + np.prod(call.kernel_shape)
    return min(call.output_sizes) >= 1 and call.taps <= 18 and entries <= 2000


def random_calls(count, seed):
    """``count`` distinct small calls, which cycle through all combinations of rank, padding, group
    layout and data format; a third has upsampling in place of strides."""
    rng = np.random.default_rng(seed)
    paddings = [
        *itertools.product((1, 2, 3), ("same", "valid", "symmetric", "explicit")),
        (1, "causal"),
    ]
    kinds = itertools.cycle(
        (*pair, *layout)
        for pair, layout in itertools.product(
            paddings,
            itertools.product(("contiguous", "interleaved"), ("channels_last", "channels_first")),
        )
    )
    calls = []
    for kind in itertools.islice(kinds, count):
        draws = (_random_call(rng, *kind) for _ in itertools.count())
        calls.append(next(call for call in draws if _is_small(call) and call not in calls))
    return calls
