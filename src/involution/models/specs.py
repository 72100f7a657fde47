"""Model specs of the command line: "cnn", "inn:kernel_size=5", "my_file.py:my_function", or a
trained model: "inn-cifar10", "runs/pets/inn.keras"."""

import contextlib
import functools
import importlib.util
import inspect
import os
import pathlib
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable

import keras

from involution.models import MODELS
from involution.utils.errors import InputError, convert_exceptions

Builder = Callable[..., keras.Model]
# Bytes of the name of a model's file: systems allow 255, and other names are up to 40 longer.
MAX_FILE_NAME = 200


def parse(text, other=lambda spec: None) -> dict[str, Builder]:
    """Parses "cnn,inn,inn:kernel_size=5:group_number=3,my_file.py:my_function".

    A spec is the name of a model in ``involution.models``, or a Python file with a function in it
    (default: ``build``), then options. The function is called with input_shape, classes and the
    options. The file may import modules in its folder.

    Args:
        text: The specs, comma-separated.
        other: Function of a spec that returns its builder if it is of another kind, or None.

    Returns:
        A dictionary from specs to builders, functions of (input_shape, classes).

    Raises:
        InputError: A model or option is unknown, a spec is repeated or not valid UTF-8, or a file
            cannot be run.
    """
    if text != (escaped := text.encode("utf-8", "backslashreplace").decode()):
        raise InputError(
            f"A model spec must be valid UTF-8, the encoding of reports. Received: {escaped}"
        )
    # The path of a trained model may contain commas.
    is_one = "," in text and os.path.exists(text) and other(text) is not None
    model_specs = [text] if is_one else [part.strip() for part in text.split(",")]
    builders = {}
    for spec in model_specs:
        if spec in builders:
            raise InputError(f"Model specs must be unique. Received: {text}")
        builders[spec] = other(spec) or _parse_model(spec)
    files = [file_name(spec) for spec in model_specs]
    # Some file systems ignore case.
    if len({file.casefold() for file in files}) < len(files):
        raise InputError(
            f"Model specs must give unique file names, whatever their case. Received: {text}"
        )
    for spec, file in zip(model_specs, files, strict=True):
        if len(file.encode()) > MAX_FILE_NAME:
            raise InputError(
                f"A model spec, from which the names of its files are made, must have at most "
                f"{MAX_FILE_NAME - len('.keras')} bytes. Received: {spec}, of {len(spec.encode())}"
            )
    return builders


def _parse_model(spec) -> Builder:
    name, arguments = split_spec(spec)
    builder = MODELS[name] if name in MODELS else function_from(*name.rsplit(":", 1))
    parameters = inspect.signature(builder).parameters
    known = list(parameters)[2:]
    any_option = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in arguments:
        if key not in known and not any_option:
            raise InputError(
                f"An option of {name} must be one of {', '.join(known)}. "
                f"Received: {key}={arguments[key]}"
            )
    return lambda input_shape, classes: builder(
        input_shape=input_shape, classes=classes, **arguments
    )


def split_spec(spec) -> tuple[str, dict]:
    """(name, options) of a spec; the name is a model of ``involution.models`` or
    FILE.py:FUNCTION."""
    # Paths contain colons on Windows.
    file = re.match(r".*?\.py(?=:|$)", spec)
    name = file[0] if file else spec.split(":")[0]
    options = spec[len(name) + 1 :].split(":") if len(spec) > len(name) else []
    if file:
        name += ":" + (options.pop(0) if options and "=" not in options[0] else "build")
    elif name not in MODELS:
        raise InputError(
            f"A model must be one of {', '.join(MODELS)} or a Python file. "
            f"Received: {name or 'none'}"
        )
    pairs = [option.partition("=") for option in options]
    for key, equals, value in pairs:
        if not equals or not key:
            raise InputError(f"An option of {name} must be name=value. Received: {key}{value}")
    return name, {key: parse_value(value) for key, _, value in pairs}


def parse_value(text):
    """The value of an option: a number, a tuple (16-32-64), True, False, None, or the string."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    if re.fullmatch(r"\d+(-\d+)+", text):
        return tuple(map(int, text.split("-")))
    return {"None": None, "True": True, "False": False}.get(text, text)


def function_from(file, function) -> Callable:
    """A function of a Python file, which may import modules in its folder.

    Raises:
        InputError: The file cannot be run, or lacks the function.
    """
    if not pathlib.Path(file).is_file():
        raise InputError(f"A Python file must exist. Received: {file}")
    module_spec = importlib.util.spec_from_file_location(
        f"involution_user_{pathlib.Path(file).stem}", file
    )
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"A Python file must be importable. Received: {file}")
    module = importlib.util.module_from_spec(module_spec)
    # Classes in the file, such as dataclasses, look up their module in sys.modules.
    sys.modules[module_spec.name] = module
    folder = str(pathlib.Path(file).absolute().parent)
    try:
        with (
            importing_from(folder),
            convert_exceptions(InputError, "A Python file must run.", file),
        ):
            module_spec.loader.exec_module(module)
    except SystemExit as error:
        raise InputError(
            f"A Python file must run. Received: {file}, which exits with {error.code}"
        ) from error
    builder = getattr(module, function, None)
    if not callable(builder):
        raise InputError(f"A Python file must define {function}. Received: {file}, without it")

    @functools.wraps(builder)
    def build(*args, **kwargs):
        with importing_from(folder):
            return builder(*args, **kwargs)

    return build


# Modules that model files imported from their own folders, by folder and name.
_imported: dict[str, dict[str, types.ModuleType]] = {}


@contextlib.contextmanager
def importing_from(folder):
    """Makes modules in a folder importable in the block, as for a script there. Modules imported
    from the folders of other model files are hidden, because they may have the same names."""
    own = _imported.setdefault(folder, {})
    for others in _imported.values():
        for name, module in others.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
    sys.modules.update(own)
    before = set(sys.modules)
    sys.path.insert(0, folder)
    # Importers cache the listing of the folder.
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the file may have removed it
            sys.path.remove(folder)
        own |= {
            name: sys.modules[name]
            for name in set(sys.modules) - before
            if _is_in(folder, name, sys.modules[name])
        }


def _is_in(folder, name, module) -> bool:
    """Whether a module is directly in a folder, not in a package installed below it."""
    attributes = getattr(module, "__dict__", {})
    for path in (attributes.get("__file__"), *attributes.get("__path__", ())):
        if path is not None and pathlib.Path(path).is_relative_to(folder):
            first = pathlib.Path(path).relative_to(folder).parts[0]
            return first.split(".")[0] == name.split(".")[0]
    return False


def file_name(spec) -> str:
    """The file name of a model in a run folder."""
    return "".join(c if c.isalnum() or c in "-_=." else "-" for c in spec) + ".keras"


def command_line(*words) -> str:
    """A command, or its end, quoted for the system's shell.

    Args:
        words: Strings, and ``pathlib.Path``, which get ``./`` if they look like options.
    """
    quotable = [
        f".{os.sep}{word}" if isinstance(word, pathlib.Path) and str(word)[0] == "-" else str(word)
        for word in words
    ]
    return subprocess.list2cmdline(quotable) if os.name == "nt" else shlex.join(quotable)
