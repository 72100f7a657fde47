"""Which part of a photograph a model sees: its middle, or in training another part each time."""

import math

import numpy as np

Box = tuple[float, float, float, float]

# Of the largest rectangle of the model's proportions, when a model is tested and used.
MIDDLE = 0.875
# Of the area, and of the proportions, in training.
LEAST_AREA, MOST_STRETCH = 0.08, 4 / 3


def middle(width, height, proportions, share=MIDDLE) -> Box:
    """(left, top, right, bottom) of the middle of an image.

    Args:
        width, height: Of the image, in pixels.
        proportions: Width by height of what is seen.
        share: Of the largest rectangle of these proportions.
    """
    seen_width = share * min(width, height * proportions)
    return _box(width, height, seen_width, seen_width / proportions, 0.5, 0.5)


def at_random(width, height, proportions, random: np.random.Generator) -> Box:
    """The same of some part, as Inception was trained (Szegedy et al., CVPR 2015, section 6)."""
    for _ in range(10):
        area = width * height * random.uniform(LEAST_AREA, 1)
        stretch = MOST_STRETCH ** random.uniform(-1, 1)
        seen_width = math.sqrt(area * proportions * stretch)
        seen_height = area / seen_width
        if seen_width <= width and seen_height <= height:
            return _box(width, height, seen_width, seen_height, *random.random(2))
    return middle(width, height, proportions, share=1)


def _box(width, height, seen_width, seen_height, across, down) -> Box:
    left, top = across * (width - seen_width), down * (height - seen_height)
    # Rounding must not lead out of the image.
    left, top = max(left, 0), max(top, 0)
    return left, top, min(left + seen_width, width), min(top + seen_height, height)
