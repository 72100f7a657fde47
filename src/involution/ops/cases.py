"""Named sizes worth caring about, shared by tests, benchmarks and ``involution doctor``."""

import dataclasses

from involution.ops.window import Window


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the operator: its sizes, for channels_last, and its arguments."""

    name: str
    batch: int
    sizes: tuple[int, ...]
    channels: int
    groups: int
    kernel_size: int
    strides: int = 1
    padding: str = "same"
    dilation_rate: int = 1
    group_layout: str = "contiguous"

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.batch, *self.sizes, self.channels)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        out = (-(-n // self.strides) for n in self.sizes)
        return (self.batch, *out, self.kernel_size ** len(self.sizes), self.groups)

    @property
    def generator_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of hidden features, a quarter of the channels, of the weight and of the bias."""
        batch, *out, taps, groups = self.kernel_shape
        hidden = max(self.channels // 4, 1)
        return (batch, *out, hidden), (hidden, taps * groups), (taps * groups,)

    @property
    def arguments(self) -> dict:
        return {
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
            "groups": self.groups,
            "group_layout": self.group_layout,
            "data_format": "channels_last",
        }

    @property
    def window(self) -> Window:
        return Window(**self.arguments, rank=len(self.sizes))

    def small(self) -> "Case":
        """The same case with one image, no larger than the window needs."""
        sizes = tuple(min(n, 2 * self.kernel_size + 1) for n in self.sizes)
        return dataclasses.replace(self, batch=1, sizes=sizes)


CASES = (
    # The first layer of the keras.io example.
    Case("tut", 256, (32, 32), 3, 1, 3, group_layout="interleaved"),
    # RedNet's four stages at 224 x 224.
    Case("red1", 8, (56, 56), 64, 4, 7, padding="symmetric"),
    Case("red2", 8, (28, 28), 128, 8, 7, padding="symmetric"),
    Case("red3", 8, (14, 14), 256, 16, 7, padding="symmetric"),
    Case("red4", 8, (7, 7), 512, 32, 7, padding="symmetric"),
    # Such a layer on maps of a photograph of 512 x 1024.
    Case("photo", 1, (128, 256), 256, 16, 7, padding="symmetric"),
    # A strided layer on a size that the stride does not divide.
    Case("odd", 8, (33, 47), 48, 3, 5, strides=2),
    Case("line", 8, (1000,), 64, 4, 9, dilation_rate=2),
    Case("cube", 2, (17, 18, 19), 32, 2, 3),
)
