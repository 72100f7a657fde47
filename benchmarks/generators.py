"""Kernel generators compared at equal cost: networks of rednet_tiny's form.

Each function is a model, trained with the seeds 42 to 46:

    involution train --model benchmarks/generators.py:NAME --dataset cifar10-jpeg \
        --recipe one-cycle --seed SEED

All have groups of 8 channels; stems and widths differ so that parameters and multiply-adds are
within 5 % of rednet_tiny's, or, of the ``full_resolution`` pair, within 1 % of each other's.

Expectation, written before the first run: ``static`` and ``bottleneck`` tie, as in earlier runs;
``contextual`` is between them and ``large_context``, which leads ``static`` by 0.5 to 1 point, less
than on ImageNet (1.9 points), because these images are small; ``large_context_3x3`` is behind
``large_context``, because a 3x3 window lost 1.5 points to a 5x5 one when kernels were static.

Expectation for the ``full_resolution`` pair, written after seed 42 of the first (0.8262), and of
the same network with static kernels and 13 % fewer parameters (0.7838): large contexts lead by 2 to
4 points. With four involutions, static windows see too little of the image; a generator sees more.
"""

from involution import kernel_generators
from involution.models import rednet_tiny


def static(input_shape, classes):
    """5x5 kernels that do not depend on the image."""
    return rednet_tiny(input_shape, classes, kernel_generator="static", stem_width=26)


def bottleneck(input_shape, classes):
    """5x5 kernels from the paper's generator: rednet_tiny itself."""
    return rednet_tiny(input_shape, classes)


def contextual(input_shape, classes):
    """5x5 kernels from 3x3 windows of the features."""
    return rednet_tiny(
        input_shape, classes, kernel_generator="contextual", widths=(24, 32), stem_width=30
    )


def large_context(input_shape, classes):
    """5x5 kernels from 7x7 windows of the features, normalized over taps and places."""
    generator = kernel_generators.LargeContext(4)
    return rednet_tiny(
        input_shape, classes, kernel_generator=generator, widths=(24, 32), stem_width=30
    )


def large_context_3x3(input_shape, classes):
    """3x3 kernels from 7x7 windows of the features, as in LSNet."""
    generator = kernel_generators.LargeContext(2)
    return rednet_tiny(
        input_shape, classes, kernel_generator=generator, kernel_size=3, widths=(32, 24)
    )


def full_resolution_large_context(input_shape, classes):
    """Three stages, the first of the image's resolution: the best trial of a search."""
    return _full_resolution(input_shape, classes, "large_context", (16, 24, 48), 32)


def full_resolution_static(input_shape, classes):
    """As ``full_resolution_large_context``, with kernels that do not depend on the image."""
    return _full_resolution(input_shape, classes, "static", (16, 24, 56), 36)


def _full_resolution(input_shape, classes, kernel_generator, widths, stem_width):
    return rednet_tiny(
        input_shape,
        classes,
        kernel_generator=kernel_generator,
        widths=widths,
        blocks=(1, 2, 1),
        stem_width=stem_width,
        stem_pool=False,
    )
