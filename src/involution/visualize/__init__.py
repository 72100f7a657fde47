"""Figures: learning curves, sample images, heat maps and use of involution kernels.

Every function returns a new ``matplotlib.figure.Figure``; nothing is shown, and Matplotlib's global
state is not modified. Color scales keep their order in grayscale and for color-blind readers.
"""

from typing import Any

from involution import renamed
from involution.visualize.ablation import KernelUse, LayerUse, kernel_use
from involution.visualize.activations import (
    InvolutionRecord,
    capture,
    has_involutions,
    kernel_maps,
)

__all__ = [
    "InvolutionRecord",
    "KernelUse",
    "LayerUse",
    "accuracy_vs_cost",
    "capture",
    "compare_kernels",
    "curves",
    "group_maps",
    "has_involutions",
    "heat_maps",
    "image_grid",
    "kernel_maps",
    "kernel_use",
    "kernels_at",
    "most_different",
    "stratified_sample",
    "use_chart",
]

_renamed = renamed.attributes(
    __name__,
    {
        "Look": "InvolutionRecord",
        "across_classes": "stratified_sample",
        "costs": "accuracy_vs_cost",
        "looks": "capture",
        "place_kernels": "kernels_at",
        "samples": "image_grid",
        "words": "compare_kernels",
    },
)


# Only figures require Matplotlib, which is imported on first use.
def __getattr__(name) -> Any:
    if name not in __all__:
        return _renamed(name)
    from involution.visualize import figures

    return getattr(figures, name)
