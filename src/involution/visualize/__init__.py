"""Figures: curves, samples, and the kernels of involutions as heat maps.

Every function returns a ``matplotlib.figure.Figure`` of its own; nothing is shown and no global
state of Matplotlib is touched. The colours (cividis, Okabe and Ito's) keep their order in print and
for the colour-blind.
"""

from typing import Any

from involution.visualize.activations import Look, has_involutions, kernel_maps, looks

__all__ = [
    "Look",
    "across_classes",
    "costs",
    "curves",
    "group_maps",
    "has_involutions",
    "heat_maps",
    "kernel_maps",
    "looks",
    "place_kernels",
    "samples",
    "words",
]


# Figures need Matplotlib, and activations do not: it is imported when a figure is asked for.
def __getattr__(name) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from involution.visualize import figures

    return getattr(figures, name)
