"""Options shared by commands, deprecated names, and parsers of option values."""

import dataclasses
import importlib.util
import pathlib
import sys
import tomllib
from collections.abc import Callable
from typing import Annotated, Any, Literal

from cyclopts import CycloptsError, Group, Parameter
from cyclopts.config import Dict
from cyclopts.help import DefaultFormatter


def _wide_names(console, options, entries) -> tuple:
    """Columns of a group with long options, which cyclopts breaks at 28 of 80 characters."""
    from cyclopts.help import specs

    names, *rest = specs.get_default_parameter_columns(console, options, entries)
    renderer = specs.NameRenderer(max_width=WIDEST_NAME)
    return (names.copy(renderer=renderer, max_width=WIDEST_NAME), *rest)


WIDEST_NAME = len("--gradient-accumulation-steps INT")

# Groups of options in a command's help, in its order.
DATA = Group.create_ordered("Data")
MODEL = Group.create_ordered("Model")
SEARCH = Group.create_ordered("Search")
TRAINING = Group.create_ordered(
    "Training", help_formatter=DefaultFormatter(column_specs=_wide_names)
)
MEASUREMENT = Group.create_ordered("Measurement")
OUTPUT = Group.create_ordered("Output")
RESUME = Group.create_ordered("Resume")
BACKEND = Group.create_ordered("Backend")
DISTRIBUTED = Group.create_ordered("Distributed")
SERVER = Group.create_ordered("Server")

# Groups of training settings; others belong to TRAINING.
SETTING_GROUPS = {
    "dataset": DATA,
    "image_size": DATA,
    "download": DATA,
    "split": DATA,
    "validation_images": DATA,
    "tensorboard": OUTPUT,
    "callbacks": OUTPUT,
    "precision": BACKEND,
}

Backend = Annotated[
    Literal["tensorflow", "jax", "torch"] | None,
    Parameter(
        group=BACKEND,
        help="Keras backend (default: KERAS_BACKEND, then Keras's configuration, then the first "
        "installed).",
    ),
]


def _load_recipes() -> Any:
    """``involution.training.recipes``, without its package, whose import loads Keras."""
    package = importlib.util.find_spec("involution")
    assert package is not None
    assert package.origin is not None
    file = pathlib.Path(package.origin).with_name("training") / "recipes.py"
    spec = importlib.util.spec_from_file_location("involution_cli._recipes", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _declared(config) -> Any:
    """A dataclass of command-line options: the settings of a configuration, except the models."""
    # Settings whose type or default on the command line is not the field's.
    changed = {
        "epochs": (int | None, "Training epochs (default: the recipe's; in a sweep 5)"),
        "image_size": (
            str | None,
            "Side, or HEIGHTxWIDTH, to which the images of a folder are resized (default: the "
            "recipe's)",
        ),
    }
    fields = []
    for field in dataclasses.fields(config):
        rule = field.metadata["rule"]
        type_, help, default = field.type, field.metadata["help"], field.default
        if field.name == "models":
            continue
        if field.name in changed:
            (type_, help), default = changed[field.name], None
        elif rule is not None and rule.choices:
            type_ = Literal[rule.choices] if default is not None else Literal[rule.choices] | None
        fields.append(
            (
                field.name,
                Annotated[
                    type_,
                    Parameter(group=SETTING_GROUPS.get(field.name, TRAINING), help=f"{help}."),
                ],
                dataclasses.field(default=default),
            )
        )
    return dataclasses.make_dataclass("Declared", fields, frozen=True, kw_only=True)


_Declared: Any = _declared(_load_recipes().Config)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions(_Declared):
    """Options of ``compare`` and ``train``; see ``involution.training.recipes``."""

    output: Annotated[pathlib.Path | None, Parameter(group=OUTPUT)] = None
    """Output folder: new or empty, or with --resume the run's (default: runs/<dataset>-<time>)."""
    config: Annotated[pathlib.Path | None, Parameter(group=OUTPUT)] = None
    """A .yaml or .toml file with options of this command by name; options of the command line take
    precedence. compare reads the config.yaml that each run writes."""
    backend: Backend = None


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions(TrainingOptions):
    """Options of ``sweep``."""

    output: Annotated[pathlib.Path | None, Parameter(group=OUTPUT)] = None
    """Output folder: new or empty, or that of the sweep to resume (default:
    runs/sweep-<dataset>-<time>)."""


@Parameter(name="*", group=RESUME)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """Checkpoints of ``compare`` and ``train``."""

    resume: bool = False
    """Resume from the last checkpoint in --output, if there is one."""
    checkpoint_every: int | None = None
    """Steps between checkpoints within an epoch, besides the checkpoint after each epoch."""
    allow_config_change: bool = False
    """Resume despite changed options, data or versions."""


@Parameter(name="*", group=DISTRIBUTED)
@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedOptions:
    """Devices and hosts of ``compare`` and ``train``, with the JAX backend."""

    devices: int | None = None
    """Devices per host that split each batch (default: 1; with several hosts all)."""
    coordinator_address: str | None = None
    """HOST:PORT of the first of several hosts, reachable by all."""
    num_processes: int | None = None
    """Number of hosts; each runs this command with its own --process-id and the same --output."""
    process_id: int | None = None
    """Index of this host, from 0."""


# Deprecated options and values, by command, with their replacements.
_TRAINING = {
    "--accumulate": "--gradient-accumulation-steps",
    "--ema": "--ema-momentum",
    "--validation": "--validation-images",
}
_RUN = {
    **_TRAINING,
    "--allow-change": "--allow-config-change",
    "--no-allow-change": "--no-allow-config-change",
    "--coordinator": "--coordinator-address",
    "--num-hosts": "--num-processes",
    "--host-id": "--process-id",
}
DEPRECATED_OPTIONS = {
    "compare": _RUN,
    "train": _RUN,
    "sweep": _TRAINING,
    "explain": {"--show": "--figure", "--place": "--point"},
}
DEPRECATED_VALUES = {
    ("explain", "--figure"): {"maps": "heatmap", "outputs": "activations", "place": "point"},
    ("bench", "--candidates"): {
        "patches": "im2col",
        "per-number": "paper-cuda",
        "two-steps": "unfused",
    },
}


def replace_deprecated(words) -> list[str]:
    """Replaces deprecated names in a command line, each with a warning on standard error."""
    if not words:
        return []
    command, *words = words
    replaced: list[str] = [command]
    option = ""
    for position, word in enumerate(words):
        if word == "--":
            return replaced + words[position:]
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            # Underscores are valid too: --learning_rate.
            option = _current(name.replace("_", "-"), DEPRECATED_OPTIONS.get(command, {}))
            replaced.append(option + equals + _current_values(command, option, value))
        else:
            replaced.append(_current_values(command, option, word))
            option = ""
    return replaced


def _current_values(command, option, text) -> str:
    values = DEPRECATED_VALUES.get((command, option), {})
    return ",".join(_current(value, values) for value in text.split(",")) if values else text


def _current(name, renamed) -> str:
    if name in renamed:
        line = f"involution: warning: {name} is deprecated, use {renamed[name]}"
        print(line, file=sys.stderr, flush=True)
    return renamed.get(name, name)


def _parse_yaml(text) -> Any:
    import yaml  # in the extra `compare`

    return yaml.safe_load(text)


FILE_PARSERS: dict[str, Callable[[str], Any]] = {
    ".toml": tomllib.loads,
    ".yaml": _parse_yaml,
    ".yml": _parse_yaml,
}


def take_config(words) -> tuple[list[str], tuple]:
    """Takes --config out of a command line; returns the other words, and cyclopts's configuration
    of the file's options.

    Raises:
        CycloptsError: The file is missing, or neither YAML nor TOML.
    """
    end = words.index("--") if "--" in words else len(words)
    for position, word in enumerate(words[:end]):
        name, equals, value = word.partition("=")
        if name != "--config":
            continue
        rest = position + (1 if equals else 2)
        value = value if equals else "".join(words[position + 1 : rest])
        file = pathlib.Path(value)
        if file.suffix not in FILE_PARSERS or not file.is_file():
            raise CycloptsError(
                f"--config must be an existing .yaml or .toml file. Received: {value or 'none'}"
            )
        try:
            # Tools of Windows write a byte order mark, which cyclopts's readers do not accept.
            options = FILE_PARSERS[file.suffix](file.read_text(encoding="utf-8-sig")) or {}
        except Exception as error:  # of the parsers
            from involution.utils.errors import one_line

            raise CycloptsError(
                "--config must be a valid YAML or TOML file in UTF-8. "
                f"Received: {value}: {one_line(error)}"
            ) from error
        config = Dict(options, source=str(file.absolute()), use_commands_as_keys=False)
        return words[:position] + words[rest:], (config,)
    return words, ()


def parse_size(text) -> tuple[int, int] | None:
    """(height, width) from a side or HEIGHTxWIDTH."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        from involution.utils.errors import InputError

        raise InputError(f"`image_size` must be a positive side or HEIGHTxWIDTH. Received: {text}")
    return (int(parts[0]), int(parts[-1]))


def parse_point(text) -> tuple[float, ...]:
    """Numbers from ROW,COLUMN; the library checks their count and range."""
    try:
        return tuple(float(coordinate) for coordinate in text.split(","))
    except ValueError:
        from involution.utils.errors import InputError

        raise InputError(f"`point` must be ROW,COLUMN. Received: {text}") from None
