"""Deprecated names: module paths and attributes of earlier versions."""

import functools
import importlib
import importlib.abc
import importlib.util
import sys
import warnings

RENAMED = {
    "errors": "utils.errors",
    "files": "utils.atomic_files",
    "memory": "utils.memory",
    "outline": "utils.abstract_build",
    "console": "utils.progress",
    "ahead": "data.prefetch",
    "crops": "data.transforms",
    "image_files": "data.image_folder",
    "stored_images": "data.lazy_images",
    "keras_files": "saving.keras_archive",
    "saved_model": "saving.classifier",
    "ops.native_call": "ops.native.params",
    "ops.native_library": "ops.native.library",
    "ops.native_jax": "ops.native.jax",
    "ops.native_tensorflow": "ops.native.tensorflow",
    "ops.native_torch": "ops.native.torch",
    "ops.triton_torch": "ops.triton.launch",
    "ops.triton_kernels": "ops.triton.kernels",
    "ops.gradients": "ops.autodiff",
    "ops.fused_gradients": "ops.autodiff.fused",
    "ops.fused_autodiff": "ops.autodiff.fused",
    "ops.torch_operations": "ops.torch_custom_ops",
    "ops.views": "ops.tensor_utils",
    "ops.geometry": "ops.window",
    "pointwise": "kernel_generators.pointwise",
    "models.table": "models.registry",
    "models.twins": "models.conv_counterpart",
    "models.shipped": "models.pretrained",
    "models.formulas": "models.numpy_reference",
    "model_labels": "models.specs",
    "models.checkpoints": "models.checkpoint_readers",
    "models.checkpoints.errors": "models.checkpoint_readers.errors",
    "models.checkpoints.arrays": "models.checkpoint_readers.arrays",
    "models.checkpoints.pickles": "models.checkpoint_readers.restricted_unpickler",
    "models.checkpoints.pytorch": "models.checkpoint_readers.pytorch",
    "models.checkpoints.paddle": "models.checkpoint_readers.paddle",
    "models.checkpoints.tensorflow": "models.checkpoint_readers.tensorflow",
    "checkpoint": "training.checkpoint",
    "cluster": "training.distributed",
    "sweep": "training.sweep",
    "report": "training.report",
    "experiment": "training.experiment",
    "looking": "visualize.activations",
    "explaining": "visualize.explain",
    "pages": "visualize.html",
    "app": "demo.app",
    "answers": "demo.render",
    "benchmark": "benchmarking.runner",
    "devices": "benchmarking.devices",
    "programs": "benchmarking.timed_program",
    "yardsticks": "benchmarking.baselines",
    "per_number": "benchmarking.paper_cuda",
    "diagnosis": "benchmarking.doctor",
}


def _warn(old, new, stacklevel):
    message = f"{old} is now {new}; the old name will be removed in version 1.0"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel + 1)


def attributes(module: str, names: dict[str, str]):
    """A ``__getattr__`` for ``module`` that resolves renamed attributes: ``{old: new}``."""

    def __getattr__(name):  # noqa: N807 - the module's own
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", f"{module}.{names[name]}", 2)
        return getattr(sys.modules[module], names[name])

    return __getattr__


def members(names: dict[str, str]):
    """A ``__getattr__`` for a class that resolves renamed attributes: ``{old: new}``."""

    def __getattr__(self, name):  # noqa: N807 - the class's own
        kind = type(self).__name__
        if name not in names:
            raise AttributeError(f"{kind!r} object has no attribute {name!r}")
        _warn(f"{kind}.{name}", f"{kind}.{names[name]}", 2)
        return getattr(self, names[name])

    return __getattr__


def arguments(**names: str):
    """A decorator for a function with renamed keyword arguments, ``old="new"``: accepts both."""

    def decorate(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            for old in names.keys() & kwargs.keys():
                new, name = names[old], function.__qualname__
                if new in kwargs:
                    raise TypeError(f"{name}() received both `{new}` and its old name `{old}`")
                _warn(f"Argument `{old}` of {name}()", f"`{new}`", 2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        name = fullname.removeprefix("involution.")
        if name == fullname or name not in RENAMED:
            return None
        return importlib.util.spec_from_loader(fullname, self, origin=RENAMED[name])

    def create_module(self, spec):
        new = f"involution.{spec.origin}"
        _warn(spec.name, new, 2)
        module = importlib.import_module(new)
        # The import system replaces the module's spec by that of the deprecated name.
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = module.__spec__.loader_state


def install():
    """Makes the deprecated module paths importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
