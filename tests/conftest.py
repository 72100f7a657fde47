import atexit
import importlib.util
import os
import random
import shutil
import tempfile
import types

import pytest
from hypothesis import settings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if os.environ.get("KERAS_BACKEND") == "jax":
    # Compilation is most of the time of the tests. Programs are cached for one run, by all its
    # processes; LLVM's optimizations are for `make test-long`, which sets this to 0.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = tempfile.mkdtemp(prefix="involution-tests-jax-")
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    import jax

    # The oracle is in float64, and so are the finite differences.
    jax.config.update("jax_enable_x64", True)

if os.environ.get("KERAS_BACKEND") == "torch":
    import torch

    # Whether Triton's own functions can be interpreted is settled when it is imported, which
    # PyTorch does at some time. Without a device ops/test_triton.py interprets.
    if importlib.util.find_spec("triton") and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        import triton.language  # noqa: F401 - imported now, as told

        del os.environ["TRITON_INTERPRET"]

import involution  # noqa: F401 - settles the backend before a test imports Keras
from involution.ops import dispatch
from involution.ops.native import library

# What a framework alone has is tested where it runs. Elsewhere there is nothing to skip.
collect_ignore = [
    f"native/test_{backend}.py"
    for backend in ("jax", "tensorflow", "torch")
    if backend != os.environ["KERAS_BACKEND"]
]
if os.environ["KERAS_BACKEND"] != "torch":
    collect_ignore += [
        "benchmarking/test_cuda_stand_in.py",
        "ops/test_cuda.py",
        "ops/test_triton.py",
    ]
# Triton is released for Linux alone.
elif importlib.util.find_spec("triton") is None:
    collect_ignore += ["ops/test_cuda.py", "ops/test_triton.py"]


def pytest_addoption(parser):
    parser.addoption(
        "--backend-only",
        action="store_true",
        help="deselect tests marked any_backend",
    )
    parser.addoption(
        "--quick",
        action="store_true",
        help="select the first case of each test that is not marked long",
    )


def pytest_collection_modifyitems(config, items):
    deselected = []
    if config.getoption("--backend-only"):
        deselected += [item for item in items if item.get_closest_marker("any_backend")]
    if config.getoption("--quick"):
        seen = set()
        for item in items:
            test = item.nodeid.partition("[")[0]
            if test in seen or item.get_closest_marker("long"):
                deselected.append(item)
            seen.add(test)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in set(deselected)]


def seed():
    """Keras draws the seeds of its initializers from Python's generator."""
    random.seed(0)
    if os.environ["KERAS_BACKEND"] == "torch":
        torch.manual_seed(0)


# The weights are the same in every run, whatever the order of the tests is.
@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup():
    seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    seed()


# `--hypothesis-profile=long -m slow`: what has no number of examples of its own gets this one.
settings.register_profile("long", max_examples=5000)


@pytest.fixture
def ran(monkeypatch):
    """The names of the implementations that ran, in order."""
    names = []

    def recorded(name, module):
        def telling(function):
            def call(*arguments):
                names.append(name)
                return function(*arguments)

            return call

        kept = ("unsupported_reason", "deprioritize_reason")
        of = {n: getattr(module, n) for n in kept if hasattr(module, n)}
        run = ("apply", "kernel_grad")
        of |= {n: telling(getattr(module, n)) for n in run if hasattr(module, n)}
        return types.SimpleNamespace(**of)

    modules = {n: recorded(n, module) for n, module in dispatch.IMPLEMENTATIONS.items()}
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", modules)
    return names


@pytest.fixture
def target(request):
    """Runs the native core on this target."""
    library.set_target(request.param)
    yield request.param
    highest = library.targets()[-1]
    library.set_target(os.environ.get("INVOLUTION_INSTRUCTIONS") or highest)
