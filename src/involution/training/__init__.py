"""Training: recipes, the training loop, checkpoints, runs, sweeps and reports."""

from involution import renamed
from involution.training.trainer import (
    RECIPES,
    Batch,
    DivergenceError,
    NesterovSGD,
    Recipe,
    Trainer,
    TrainerState,
    images_per_epoch,
    random_state,
    set_random_state,
)

__all__ = [
    "RECIPES",
    "Batch",
    "DivergenceError",
    "NesterovSGD",
    "Recipe",
    "Trainer",
    "TrainerState",
    "images_per_epoch",
    "random_state",
    "set_random_state",
]

__getattr__ = renamed.attributes(
    __name__, {"Position": "TrainerState", "images_of_an_epoch": "images_per_epoch"}
)
