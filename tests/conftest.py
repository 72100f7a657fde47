import atexit
import gc
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
    # Tests spend most of their time compiling. LLVM optimizes only in `make test-long`, which sets
    # this to 0, and all processes of a run share one compilation cache.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = tempfile.mkdtemp(prefix="involution-tests-jax-")
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    import jax

    # The oracle and finite differences need float64.
    jax.config.update("jax_enable_x64", True)

if os.environ.get("KERAS_BACKEND") == "torch":
    import torch

    # Without a CUDA device, ops/test_triton.py uses Triton's interpreter. It runs Triton's own
    # functions only if the variable is set while Triton is imported, which PyTorch may do later.
    if importlib.util.find_spec("triton") and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        import triton.language  # noqa: F401 - imported for its side effect

        del os.environ["TRITON_INTERPRET"]

import involution  # noqa: F401 - selects the backend before Keras is imported

# isort: split
import keras
from keras.src.backend.common import dtypes

from involution.ops import dispatch
from involution.ops.native import library

# Tests of one framework are not collected on other backends, where every run would skip them.
collect_ignore = [
    f"native/test_{backend}.py"
    for backend in ("jax", "tensorflow", "torch")
    if backend != os.environ["KERAS_BACKEND"]
]
if os.environ["KERAS_BACKEND"] != "jax":
    collect_ignore += ["benchmarking/test_jax_cuda.py", "ops/test_pallas.py"]
if os.environ["KERAS_BACKEND"] != "torch":
    collect_ignore += [
        "benchmarking/test_cuda_stand_in.py",
        "layers/test_torch_training.py",
        "ops/test_cuda.py",
        "ops/test_triton.py",
        "torch",
    ]
# Triton has wheels for Linux only.
elif importlib.util.find_spec("triton") is None:
    collect_ignore += ["ops/test_cuda.py", "ops/test_triton.py"]


LONGEST = (
    "test_examples.py",
    "test_resume.py",
    "test_sweep.py",
    "test_experiment.py",
    "test_triton.py",
    "test_docs.py",
    "test_commands.py",
    "test_export.py",
)


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
    deselected = set()
    if config.getoption("--backend-only"):
        deselected.update(item for item in items if item.get_closest_marker("any_backend"))
    if config.getoption("--quick"):
        seen = set()
        for item in items:
            test = item.nodeid.partition("[")[0]
            if test in seen or item.get_closest_marker("long"):
                deselected.add(item)
            seen.add(test)
    # Processes receive modules in this order: the longest ones first, so that none of them is left
    # for one process at the end.
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if deselected:
        config.hook.pytest_deselected(items=list(deselected))
        items[:] = [item for item in items if item not in deselected]


def pytest_collection_finish():
    # `keras.utils.clear_session` collects garbage each time: over all objects of a long run, that
    # takes longer than the training that it precedes.
    gc.collect()
    gc.freeze()


def seed():
    random.seed(0)  # Keras draws the seeds of its initializers from it
    if os.environ["KERAS_BACKEND"] == "torch":
        torch.manual_seed(0)


# Weights must not depend on the order of tests.
@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup():
    seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    seed()


# For `--hypothesis-profile=long -m slow`; tests with their own `max_examples` ignore it.
settings.register_profile("long", max_examples=5000)


@pytest.fixture
def executed(monkeypatch):
    """Names of the executed implementations, in order."""
    names = []

    def spy_on(name, module):
        def record(function):
            def call(*arguments):
                names.append(name)
                return function(*arguments)

            return call

        queries = ("unsupported_reason", "deprioritize_reason")
        attributes = {n: getattr(module, n) for n in queries if hasattr(module, n)}
        passes = ("apply", "apply_generated", "kernel_grad")
        attributes |= {n: record(getattr(module, n)) for n in passes if hasattr(module, n)}
        return types.SimpleNamespace(**attributes)

    modules = {n: spy_on(n, module) for n, module in dispatch.IMPLEMENTATIONS.items()}
    monkeypatch.setattr(dispatch, "IMPLEMENTATIONS", modules)
    return names


@pytest.fixture
def target(request):
    """Sets the instruction set of the native core."""
    library.set_target(request.param)
    yield request.param
    highest = library.targets()[-1]
    library.set_target(os.environ.get("INVOLUTION_INSTRUCTIONS") or highest)


@pytest.fixture
def policy(request, monkeypatch):
    """The dtype policy of one test."""
    # On JAX and PyTorch Keras computes normalization and means in float32 even for float64, which
    # would hide errors below 1e-6.
    monkeypatch.delitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64")
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(request.param)
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])
