"""What a hyperparameter search varies: the domains of its values, and the configuration."""

import dataclasses
import math

import keras

from involution.models import specs
from involution.training.recipes import Config
from involution.utils.errors import InputError

# Names in a search space that are settings of the training; all others are options of the model.
TRAINING = ("learning_rate", "weight_decay", "batch_size")


@dataclasses.dataclass(frozen=True)
class Categorical:
    """A choice of values, stored as text because Optuna's storages accept no tuples."""

    values: tuple[str, ...]

    @property
    def bounds(self):
        return self.values

    def suggest(self, trial, name):
        return trial.suggest_categorical(name, self.values)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value between two bounds: uniform for integers, log-uniform otherwise."""

    low: float
    high: float

    @property
    def bounds(self):
        return self.low, self.high

    def suggest(self, trial, name):
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(name, self.low, self.high)
        return trial.suggest_float(name, self.low, self.high, log=True)


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """The configuration of a sweep.

    Attributes:
        config: The model, without the options that vary, and its training. Trials are evaluated on
            ``config.validation_images`` held-out training images, by default a tenth.
        search: Texts "name=a,b,c" or "name=low..high", where a name is an option of the model or
            one of ``TRAINING``.
        trials: Number of trials of the study.
        max_parameters: Maximum number of trainable parameters; larger models are rejected. None: no
            maximum.
    """

    config: Config
    search: tuple[str, ...]
    trials: int = 40
    max_parameters: int | None = None

    def __post_init__(self):
        for name in ("trials", "max_parameters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"`{name}` must be at least 1. Received: {value}")
        for name in ("early_stopping", "callbacks", "tensorboard"):
            if getattr(self.config, name):
                raise InputError(
                    f"`{name}` does not apply to a sweep, which prunes trials. "
                    f"Received: {getattr(self.config, name)}"
                )
        if not self.search:
            raise InputError("A search must vary at least one value. Received: none")
        if len(specs.parse(self.config.models)) != 1:
            raise InputError(f"A sweep must have one model. Received: {self.config.models}")
        # Checks the options of the model without a trial.
        specs.parse(self.spec(dict.fromkeys(self.space, "0")))
        for name, domain in self.space.items():
            for value in domain.bounds if name in TRAINING else ():
                self._check(name, _number(value))

    def _check(self, name, value):
        integral = name == "batch_size"
        if not isinstance(value, int if integral else (int, float)) or isinstance(value, bool):
            kind = "integers" if integral else "numbers"
            raise InputError(f"Values of `{name}` must be {kind}. Received: {value}")
        self.configured({name: value})

    @property
    def space(self) -> dict[str, Categorical | Interval]:
        """The search space: domains by name."""
        space = dict(map(_dimension, self.search))
        if len(space) < len(self.search):
            raise InputError(
                f"A search must contain each name once. Received: {', '.join(self.search)}"
            )
        return space

    def spec(self, values) -> str:
        """The model spec with these values."""
        options = (f"{k}={v}" for k, v in values.items() if k not in TRAINING)
        return ":".join((self.config.models, *options))

    def configured(self, values) -> Config:
        """The configuration of one trial."""
        training = {k: _number(v) for k, v in values.items() if k in TRAINING}
        return dataclasses.replace(self.config, models=self.spec(values), **training)

    def command(self, values) -> str:
        """The command that trains this model on all training images."""
        words = ["involution", "train"]
        settings = dataclasses.asdict(self.configured(values)) | {"model": self.spec(values)}
        del settings["models"], settings["validation_images"]
        defaults = dataclasses.asdict(Config(recipe=self.config.recipe)) | {"recipe": Config.recipe}
        for name, value in settings.items():
            if value != defaults.get(name):
                option = "--" + name.replace("_", "-")
                text = "x".join(map(str, value)) if name == "image_size" else str(value)
                words += [option] if value is True else [option, text]
        return specs.command_line(*words, "--backend", keras.config.backend())


def _dimension(text) -> tuple[str, Categorical | Interval]:
    name, equals, values = (part.strip() for part in text.partition("="))
    rule = (
        "A search must be name=a,b,c or name=low..high, with integers or 0 < low, and low < high. "
        f"Received: {text}"
    )
    if not equals or not name.isidentifier() or not values:
        raise InputError(rule)
    if ".." in values:
        low, high = (specs.parse_value(bound) for bound in values.split("..", 1))
        integral = isinstance(low, int) and isinstance(high, int)
        numeric = all(
            isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n)
            for n in (low, high)
        )
        if not numeric or not low < high or (low <= 0 and not integral):
            raise InputError(rule)
        return name, Interval(low, high)
    return name, Categorical(tuple(part.strip() for part in values.split(",")))


def _number(value):
    return specs.parse_value(value) if isinstance(value, str) else value
