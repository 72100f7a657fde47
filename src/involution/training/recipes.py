"""Training configuration: hyperparameters, named recipes, and the settings of a run.

Each setting is declared once, with its help text and its valid range. The command line derives its
options from this file, which it executes by path because importing ``involution.training`` loads
Keras: at module level only the standard library may be imported.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

AUGMENTATIONS = ("flip", "crop", "color", "mixup")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Valid values of a setting.

    Attributes:
        text: The rule in words, for messages.
        is_valid: Whether a value satisfies the rule.
        choices: All valid values, if there are finitely many.
    """

    text: str
    is_valid: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def one_of(choices) -> Rule:
    choices = tuple(choices)
    return Rule(f"one of {', '.join(choices)}", choices.__contains__, choices)


POSITIVE_INTEGER = Rule("at least 1", lambda value: value >= 1)
POSITIVE = Rule("above 0 and finite", lambda value: 0 < value < math.inf)
NONNEGATIVE = Rule("at least 0 and finite", lambda value: 0 <= value < math.inf)
FRACTION = Rule("from 0 to 1", lambda value: 0 <= value <= 1)
INNER_FRACTION = Rule("above 0 and below 1", lambda value: 0 < value < 1)
SEED = Rule("from 0 to 2**32 - 1", lambda value: 0 <= value < 2**32)


def some_of(choices) -> Rule:
    """Comma-separated names."""
    return Rule(
        f"a comma-separated list of {', '.join(choices)}",
        lambda text: all(name in choices for name in text.split(",")),
    )


def setting(help, rule=None, default: Any = dataclasses.MISSING, stored=None, omitted=False) -> Any:
    """A dataclass field with its help text and valid values.

    Args:
        help: One line, for docstrings and for the command line.
        rule: Valid values; None, which means unset, is always valid.
        default: The default; without one the field is required.
        stored: The name in run folders, checkpoints and studies, if not the field's name.
        omitted: Whether these omit the default, as those of releases without the setting do.
    """
    metadata = {"help": help, "rule": rule, "stored": stored, "omitted": omitted}
    return dataclasses.field(default=default, metadata=metadata)


def validate(settings):
    """Raises InputError unless all settings of a dataclass are valid."""
    for field in dataclasses.fields(settings):
        value, rule = getattr(settings, field.name), field.metadata["rule"]
        if value is not None and rule is not None and not rule.is_valid(value):
            from involution.utils.errors import InputError

            raise InputError(f"`{field.name}` must be {rule.text}. Received: {value}")


def stored(settings) -> dict[str, Any]:
    """The settings by their names in files, which stay the same across releases."""
    values = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.metadata["omitted"] and value == field.default:
            continue
        if field.name == "optimizer":
            value = value == "sgd"
        values[field.metadata["stored"] or field.name] = value
    return values


def current_name(name) -> str:
    """The name of the setting that files store under ``name``."""
    for field in (*dataclasses.fields(Recipe), *dataclasses.fields(Config)):
        if field.metadata["stored"] == name:
            return field.name
    return name


def _documented(cls):
    """Appends the help texts to the docstring of a dataclass."""
    lines = (f"    {field.name}: {field.metadata['help']}." for field in dataclasses.fields(cls))
    cls.__doc__ = "\n".join((cls.__doc__, "\n    Attributes:", *(f"    {line}" for line in lines)))
    return cls


@_documented
@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters of a training run."""

    learning_rate: float = setting("Learning rate; with warmup the peak", POSITIVE)
    weight_decay: float = setting(
        "Weight decay: decoupled with Adam (AdamW), except biases and normalization parameters; "
        "with SGD added to all gradients",
        NONNEGATIVE,
        0.0,
    )
    warmup_fraction: float | None = setting(
        "Fraction of the steps with a rising learning rate; None: no warmup",
        FRACTION,
        None,
        stored="warm_up",
    )
    schedule: str | None = setting(
        "Learning rate after the warmup: constant, or a cosine or linear decay to 0; None: cosine "
        "with warmup, else constant",
        one_of(("constant", "cosine", "linear")),
        None,
        omitted=True,
    )
    warmup_start_factor: float = setting(
        "Initial learning rate as a fraction of the peak", FRACTION, 0.0, stored="start"
    )
    random_flip: bool = setting(
        "Flip each training image horizontally with probability 1/2 in each epoch",
        default=False,
        stored="flip",
    )
    random_crop: bool = setting(
        "Train on random resized crops, 8 % of the area or more, and test on the center crop",
        default=False,
        stored="crop",
    )
    augmentations: str | None = setting(
        "Random changes of the training images, comma-separated, besides the recipe's: flip "
        "(horizontal), crop (a shift by up to an eighth), color (brightness, contrast, saturation "
        "and hue), mixup (blended pairs of images and of labels); None: no more",
        some_of(AUGMENTATIONS),
        None,
        omitted=True,
    )
    class_weight: str | None = setting(
        "Weights of the classes in the training loss: balanced, inversely proportional to their "
        "numbers of images; None: equal",
        one_of(("balanced",)),
        None,
        omitted=True,
    )
    batch_size: int | None = setting(
        "Images per optimizer step; None: 256, for the digits 32", POSITIVE_INTEGER, None
    )
    clip_norm: float | None = setting(
        "Maximum global norm of the gradients; None: no clipping", POSITIVE, None
    )
    optimizer: str = setting(
        "adam, or sgd with a Nesterov momentum of 0.9",
        one_of(("adam", "sgd")),
        "adam",
        stored="sgd",
    )
    label_smoothing: float = setting(
        "Fraction of each training label spread over all classes", FRACTION, 0.0
    )
    gradient_accumulation_steps: int = setting(
        "Parts that each batch is split into; batch normalization uses the statistics of each part",
        POSITIVE_INTEGER,
        1,
        stored="accumulate",
    )
    ema_momentum: float | None = setting(
        "Momentum of an exponential moving average of the weights, which replaces the weights in "
        "evaluation and in the saved model; None: no average",
        INNER_FRACTION,
        None,
        stored="ema",
    )
    epochs: int = setting("Training epochs", POSITIVE_INTEGER, 20)
    image_size: tuple[int, int] | None = setting(
        "(height, width) to which the images of a folder are resized; None: not resized",
        default=None,
    )

    def __post_init__(self):
        validate(self)

    @property
    def augmentation_names(self) -> tuple[str, ...]:
        """The random changes of training images, except the crops of ``random_crop``."""
        names = () if self.augmentations is None else tuple(self.augmentations.split(","))
        return (*names, "flip") if self.random_flip and "flip" not in names else names


# ``example``: the keras.io example. ``imagenet``: the published configuration of RedNet's authors.
RECIPES = {
    "example": Recipe(1e-3),
    "one-cycle": Recipe(
        0.018,
        weight_decay=0.02,
        warmup_fraction=0.25,
        warmup_start_factor=1 / 25,
        random_flip=True,
        batch_size=128,
    ),
    "imagenet": Recipe(
        0.8,
        weight_decay=1e-4,
        warmup_fraction=5 / 130,
        warmup_start_factor=0.25,
        random_flip=True,
        random_crop=True,
        batch_size=2048,
        optimizer="sgd",
        label_smoothing=0.1,
        epochs=130,
        image_size=(224, 224),
    ),
}

# Keras dtype policies by compute dtype.
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


def _override(name, omitted=False) -> Any:
    """A setting of ``Recipe`` that a run may change; None: the recipe's value."""
    metadata = Recipe.__dataclass_fields__[name].metadata
    help = metadata["help"].split("; None")[0]
    return setting(
        f"{help} (default: the recipe's)",
        metadata["rule"],
        None,
        metadata["stored"],
        omitted or metadata["omitted"],
    )


@_documented
@dataclasses.dataclass(frozen=True)
class Config:
    """A run: data, models, and the recipe with its changes."""

    dataset: str = setting(
        "digits, cifar10, a CIFAR-10 archive, or a folder of images: train/<class>/ and "
        "test/<class>/ or val/<class>/, or tar files of these; with a split <class>/ alone",
        default="digits",
    )
    models: str = setting(
        "Model specs, comma-separated: names with options, such as cnn,inn:kernel_size=5, or "
        "my_file.py:my_function",
        default="cnn,inn",
    )
    epochs: int = _override("epochs")
    batch_size: int | None = _override("batch_size")
    seed: int = setting(
        "Random seed of initial weights, image order and the examples in figures", SEED, 42
    )
    learning_rate: float | None = _override("learning_rate")
    weight_decay: float | None = _override("weight_decay")
    image_size: tuple[int, int] | None = _override("image_size")
    download: bool = setting(
        "Download CIFAR-10 (163 MB) if it is not in Keras's cache", default=False
    )
    precision: str = setting(
        "Compute dtype; weights are always float32", one_of(PRECISIONS), "float32"
    )
    recipe: str = setting(
        "Named hyperparameters: example (the keras.io example), one-cycle (AdamW, one-cycle "
        "learning rate, random flips), or imagenet (the RedNet paper: SGD, batches of 2048, random "
        "crops of 224x224)",
        one_of(RECIPES),
        "example",
    )
    validation_images: int | None = setting(
        "Number of training images held out and evaluated instead of the test images (default: "
        "none; in a sweep a tenth)",
        POSITIVE_INTEGER,
        None,
        stored="validation",
    )
    split: float | None = setting(
        "Fraction of the images of a folder without test images that become test images, by class "
        "and seed; the run folder's split.csv lists them",
        INNER_FRACTION,
        None,
        omitted=True,
    )
    early_stopping: int | None = setting(
        "Epochs without a higher accuracy on the held-out images after which training ends; the "
        "model of the best epoch is saved, and its accuracy on the test images reported",
        POSITIVE_INTEGER,
        None,
        omitted=True,
    )
    callbacks: str | None = setting(
        "FILE.py:FUNCTION or MODULE:FUNCTION that returns a list of Keras callbacks for a model's "
        "label; they are called at the start and end of training and of each epoch",
        None,
        None,
        omitted=True,
    )
    tensorboard: bool = setting(
        "Write TensorBoard event files to the folder tensorboard of the run",
        default=False,
        omitted=True,
    )
    schedule: str | None = _override("schedule")
    warmup_fraction: float | None = _override("warmup_fraction", omitted=True)
    augmentations: str | None = _override("augmentations")
    class_weight: str | None = _override("class_weight")
    label_smoothing: float | None = _override("label_smoothing", omitted=True)
    clip_norm: float | None = _override("clip_norm")
    gradient_accumulation_steps: int | None = _override("gradient_accumulation_steps")
    ema_momentum: float | None = _override("ema_momentum")

    def __post_init__(self):
        validate(self)
        for name in ("epochs", "image_size"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(RECIPES[self.recipe], name))
        if self.early_stopping is not None and self.validation_images is None:
            from involution.utils.errors import InputError

            raise InputError(
                "`early_stopping` requires `validation_images`, because the test images must not "
                f"choose the epoch. Received: early_stopping={self.early_stopping}"
            )

    def recipe_for(self, dataset) -> Recipe:
        """The recipe with the changes of this run, and the batch size of the data set if neither
        sets one."""
        recipe = RECIPES[self.recipe]
        changes = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(Recipe)
            if getattr(self, field.name, None) is not None
        }
        changes.setdefault("batch_size", recipe.batch_size or dataset.batch_size)
        return dataclasses.replace(recipe, **changes)
