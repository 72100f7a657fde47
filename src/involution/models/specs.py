"""Models as commands name them: "cnn", "inn:kernel_size=5", "my_file.py:my_function"."""

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
from involution.utils.errors import InputError

Builder = Callable[..., keras.Model]


def parse(text) -> dict[str, Builder]:
    """Models by label, from "cnn,inn,inn:kernel_size=5:group_number=3,my_file.py:my_function".

    A name of ``involution.models``, or a Python file with the name of a function in it (``build``
    unless given), called with (input_shape, classes) and the options that follow. The file may
    import modules in its own folder.

    Raises:
        InputError: A name is of no model, is given twice or is not valid UTF-8, an option is
            unknown, or a file does not run.
    """
    if text != (shown := text.encode("utf-8", "backslashreplace").decode()):
        raise InputError(
            f"The name of a model must be valid UTF-8, the encoding of reports. Received: {shown}"
        )
    labels = [part.strip() for part in text.split(",")]
    builders = {}
    for label in labels:
        if label in builders:
            raise InputError(f"Every model must be named once. Received: {text}")
        builders[label] = _parse_model(label)
    files = [file_name(label) for label in labels]
    if len(set(files)) < len(files):
        raise InputError(f"Every model must have a name of its own. Received: {text}")
    return builders


def _parse_model(label) -> Builder:
    name, arguments = function_and_options(label)
    builder = MODELS[name] if name in MODELS else _function_from(*name.rsplit(":", 1))
    parameters = inspect.signature(builder).parameters
    known = list(parameters)[2:]
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key in arguments:
        if key not in known and not anything:
            raise InputError(
                f"An option of {name} must be name=value with a name of {', '.join(known)}. "
                f"Received: {key}={arguments[key]}"
            )
    return lambda input_shape, classes: builder(
        input_shape=input_shape, classes=classes, **arguments
    )


def function_and_options(label) -> tuple[str, dict]:
    """What a label names: a model of ``involution.models`` or FILE.py:FUNCTION, and the options."""
    # A file's name may hold colons of its own, as paths do on Windows.
    file = re.match(r".*?\.py(?=:|$)", label)
    name = file[0] if file else label.split(":")[0]
    options = label[len(name) + 1 :].split(":") if len(label) > len(name) else []
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
    return name, {key: value_of(value) for key, _, value in pairs}


def value_of(text):
    """The value of an option: a number, several whole ones as 16-32-64, True, False, None, or the
    text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    if re.fullmatch(r"\d+(-\d+)+", text):
        return tuple(map(int, text.split("-")))
    return {"None": None, "True": True, "False": False}.get(text, text)


def _function_from(file, function) -> Builder:
    if not pathlib.Path(file).is_file():
        raise InputError(f"A model's Python file must exist. Received: {file}")
    spec = importlib.util.spec_from_file_location(
        f"involution_user_{pathlib.Path(file).stem}", file
    )
    if spec is None or spec.loader is None:
        raise InputError(f"A model's file must be a Python file. Received: {file}")
    module = importlib.util.module_from_spec(spec)
    # Where classes in it look for their own module.
    sys.modules[spec.name] = module
    folder = str(pathlib.Path(file).absolute().parent)
    try:
        with _importing_from(folder):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's own file may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"A model's file must run. Received: {file}: {reason}") from error
    builder = getattr(module, function, None)
    if not callable(builder):
        raise InputError(
            f"A model's file must define the function {function}. Received: {file}, which does not"
        )

    @functools.wraps(builder)
    def build(*arguments, **options):
        with _importing_from(folder):
            return builder(*arguments, **options)

    return build


# Modules that models' files imported from their own folders, by folder and name.
_imported: dict[str, dict[str, types.ModuleType]] = {}


@contextlib.contextmanager
def _importing_from(folder):
    """Within the block modules in this folder can be imported, as by a program there. Those that
    were imported from the folder of another model's file are set aside: they may have the same
    names."""
    own = _imported.setdefault(folder, {})
    for others in _imported.values():
        for name, module in others.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
    sys.modules.update(own)
    before = set(sys.modules)
    sys.path.insert(0, folder)
    # The folder may have been listed before a file in it was written.
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # what was run may have removed it
            sys.path.remove(folder)
        own |= {
            name: sys.modules[name]
            for name in set(sys.modules) - before
            if _is_in(folder, name, sys.modules[name])
        }


def _is_in(folder, name, module) -> bool:
    """Whether a module was found in this folder itself, not among packages installed below it."""
    held = getattr(module, "__dict__", {})
    for path in (held.get("__file__"), *held.get("__path__", ())):
        if path is not None and pathlib.Path(path).is_relative_to(folder):
            first = pathlib.Path(path).relative_to(folder).parts[0]
            return first.split(".")[0] == name.split(".")[0]
    return False


def file_name(label) -> str:
    """The label of a model as the name of its file."""
    return "".join(c if c.isalnum() or c in "-_=." else "-" for c in label) + ".keras"


def command_line(*words) -> str:
    """A command, or the end of one, as it can be pasted into the system's shell.

    Args:
        words: Texts, and paths, which are never taken for options.
    """
    texts = [
        f".{os.sep}{word}" if isinstance(word, pathlib.Path) and str(word)[0] == "-" else str(word)
        for word in words
    ]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)
