"""Selects a backend before Keras is imported, and registers the layers with Keras after it.

So ``import involution`` does not import Keras, and saved models load without ``custom_objects``.
"""

import importlib
import importlib.abc
import importlib.util
import sys
import threading

from involution import backend

# Modules that register classes with Keras.
REGISTERED = ("involution.layers", "involution.ops.symbolic")


def install():
    """Registers the layers with Keras, now or when Keras is imported."""
    if "keras" in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register():
    for name in REGISTERED:
        try:
            importlib.import_module(name)
        except RuntimeError as error:
            # Another thread is importing it, and waits for Keras.
            if type(error).__name__ != "_DeadlockError":
                raise


class _Finder(importlib.abc.MetaPathFinder, threading.local):
    # Whether this thread asks the other finders, of which one may ask this one.
    searching = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "keras" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Keras's own loader, after the selection of a backend and before the registration."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def create_module(self, spec):
        backend.select()
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Finder)]
        _register()
