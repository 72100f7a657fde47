"""Training: recipes, the loop, checkpoints, runs, searches and reports."""

from involution.training.trainer import (
    RECIPES,
    Batch,
    DivergenceError,
    NesterovSGD,
    Position,
    Recipe,
    Trainer,
    images_of_an_epoch,
    random_state,
    set_random_state,
)

__all__ = [
    "RECIPES",
    "Batch",
    "DivergenceError",
    "NesterovSGD",
    "Position",
    "Recipe",
    "Trainer",
    "images_of_an_epoch",
    "random_state",
    "set_random_state",
]
