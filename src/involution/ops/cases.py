"""Named problem sizes for tests, benchmarks and ``involution doctor``."""

import dataclasses

from involution.ops.validation import CHANNELS_LAST
from involution.ops.window import Window


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the operator, channels last: the sizes of its tensors, and its window."""

    name: str
    batch: int
    sizes: tuple[int, ...]
    channels: int
    window: Window

    @classmethod
    def of(cls, name, batch, sizes, channels, groups, kernel_size, **options) -> "Case":
        """A case from the arguments of its window; ``options`` are arguments with defaults."""
        options = {"groups": groups, "data_format": CHANNELS_LAST, "rank": len(sizes), **options}
        return cls(name, batch, sizes, channels, Window(kernel_size, **options))

    @property
    def arguments(self) -> dict:
        """The keyword arguments of ``involution``."""
        return self.window.arguments()

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.batch, *self.sizes, self.channels)

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        sizes = self.window.output_sizes(self.sizes)
        return (self.batch, *sizes, self.window.taps, self.window.groups)

    @property
    def y_shape(self) -> tuple[int, ...]:
        return (self.batch, *self.window.output_sizes(self.sizes), self.channels)

    @property
    def generator_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the hidden features (a quarter of the channels), the weight and the bias."""
        batch, *out, taps, groups = self.kernel_shape
        hidden = max(self.channels // 4, 1)
        return (batch, *out, hidden), (hidden, taps * groups), (taps * groups,)

    def small(self) -> "Case":
        """The same case with one sample, no larger than the window needs."""
        sizes = tuple(
            min(n, 2 * k + 1) for n, k in zip(self.sizes, self.window.kernel_size, strict=True)
        )
        return dataclasses.replace(self, batch=1, sizes=sizes)


CASES = (
    # The first layer of the keras.io example.
    Case.of("tut", 256, (32, 32), 3, 1, 3, group_layout="interleaved"),
    # RedNet's four stages at 224 x 224.
    Case.of("red1", 8, (56, 56), 64, 4, 7, padding="symmetric"),
    Case.of("red2", 8, (28, 28), 128, 8, 7, padding="symmetric"),
    Case.of("red3", 8, (14, 14), 256, 16, 7, padding="symmetric"),
    Case.of("red4", 8, (7, 7), 512, 32, 7, padding="symmetric"),
    # Such a layer on the feature maps of an image of 512 x 1024.
    Case.of("photo", 1, (128, 256), 256, 16, 7, padding="symmetric"),
    # A strided layer whose input sizes the stride does not divide.
    Case.of("odd", 8, (33, 47), 48, 3, 5, strides=2),
    Case.of("line", 8, (1000,), 64, 4, 9, dilation_rate=2),
    Case.of("cube", 2, (17, 18, 19), 32, 2, 3),
)
