"""The operator goes by the framework of its tensors, without Keras and whatever its backend is."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import involution
from involution.ops import frameworks
from tests.support import oracle
from tests.support.backends import BACKEND, IMPLEMENTATIONS, numpy

# Not PyTorch for TensorFlow, which imports Keras itself: PyTorch, imported after it, crashes.
OTHER = "torch" if BACKEND == "jax" else "jax"

# Outputs and gradients of each implementation, in a process with another backend in KERAS_BACKEND.
# The arguments: the framework, whether Keras is imported, and the implementations.
PROGRAM = """
import json, sys
import numpy as np
framework, with_keras, implementations = sys.argv[1], sys.argv[2] == "keras", sys.argv[3].split()
if framework == "torch":
    import torch
if with_keras:
    import keras
from involution import ops

generator = np.random.default_rng(0)
x, dy = generator.normal(size=(2, 2, 7, 8, 6)).astype("float32")
x, dy = x, dy[:, :4, :4]
kernel = generator.normal(size=(2, 4, 4, 9, 2)).astype("float32")
hidden = generator.normal(size=(2, 4, 4, 3)).astype("float32")
weight, bias = generator.normal(size=(3, 18)).astype("float32"), np.ones(18, "float32")
arguments = dict(kernel_size=3, strides=2, padding="symmetric", groups=2)


def run(function, *arrays):
    if framework == "jax":
        import jax

        y, pullback = jax.vjp(function, *map(jax.numpy.asarray, arrays))
        return y, *pullback(jax.numpy.asarray(dy))
    if framework == "torch":
        tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
        y = function(*tensors)
        return y, *torch.autograd.grad(y, tensors, torch.tensor(dy))
    import tensorflow as tf

    tensors = [tf.constant(a) for a in arrays]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        y = function(*tensors)
    return y, *tape.gradient(y, tensors, tf.constant(dy))


found = {}
for name in implementations:
    def stored(x, kernel):
        return ops.involution(x, kernel, implementation=name, **arguments)

    def fused(x, hidden, weight, bias):
        return ops.fused_involution(x, hidden, weight, bias, implementation=name, **arguments)

    results = run(fused, x, hidden, weight, bias)
    if name != "fused":
        results = (*run(stored, x, kernel), *results)
    found[name] = [[type(r).__module__.split(".")[0], np.array(
        r.detach() if framework == "torch" else r).tolist()] for r in results]
if with_keras:
    assert keras.config.backend() != framework
elif framework != "tensorflow":
    assert "keras" not in sys.modules
print(json.dumps(found))
"""


def run(code, *arguments, backend=OTHER):
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def expected():
    """The results of PROGRAM, by the oracle: for stored kernels, and for generated ones."""
    generator = np.random.default_rng(0)
    x, dy = generator.normal(size=(2, 2, 7, 8, 6)).astype("float32").astype("float64")
    dy = dy[:, :4, :4]
    kernel, hidden, weight = (
        generator.normal(size=shape).astype("float32").astype("float64")
        for shape in ((2, 4, 4, 9, 2), (2, 4, 4, 3), (3, 18))
    )
    arguments = (3, 3), (2, 2), "symmetric", (1, 1)
    stored = (
        oracle.involution(x, kernel, *arguments)[0],
        *oracle.gradients(x, kernel, dy, *arguments),
    )
    generated = (hidden @ weight + 1).reshape(2, 4, 4, 9, 2)
    y, _ = oracle.involution(x, generated, *arguments)
    dx, dkernel = oracle.gradients(x, generated, dy, *arguments)
    rows = dkernel.reshape(-1, 18)
    dweight = hidden.reshape(-1, 3).T @ rows
    return stored, (y, dx, dkernel.reshape(2, 4, 4, 18) @ weight.T, dweight, rows.sum(0))


@pytest.mark.long
@pytest.mark.parametrize("imported", ["", "keras"])
def test_results_depend_on_the_tensors_not_on_the_backend(imported):
    if imported and OTHER not in involution.backend.installed():
        pytest.skip(f"{OTHER} is not installed")
    names = ("fused", *IMPLEMENTATIONS) if "native" in IMPLEMENTATIONS else IMPLEMENTATIONS
    found = json.loads(run(PROGRAM, BACKEND, imported, " ".join(names)))
    stored, generated = expected()
    for name in names:
        wanted = generated if name == "fused" else (*stored, *generated)
        for (module, values), want in zip(found[name], wanted, strict=True):
            assert module.startswith(BACKEND)
            np.testing.assert_allclose(np.array(values), want, rtol=1e-5, atol=2e-5)


@pytest.mark.long
def test_import_of_the_operator_loads_no_framework():
    code = (
        "import sys, involution, involution.ops;"
        "print([m for m in ('keras', 'tensorflow', 'jax', 'torch') if m in sys.modules])"
    )
    assert run(code).strip() == "[]"


@pytest.mark.long
def test_layers_are_registered_in_either_order_of_imports():
    for first, second in (("involution", "keras"), ("keras", "involution")):
        code = (
            f"import {first}, {second}; import keras;"
            "print(keras.saving.get_registered_object('involution>Involution2D').__name__,"
            "keras.saving.get_registered_object('involution>GenerateAndApplyOperation').__name__,"
            "keras.__spec__.loader.__class__.__name__)"
        )
        names = run(code, backend=BACKEND).split()
        assert names[:2] == ["Involution2D", "FusedInvolutionOperation"]
        assert names[2] != "_Loader"


@pytest.mark.long
def test_threads_that_import_keras_and_the_layers_at_once():
    code = (
        "import threading, importlib, involution\n"
        "found = []\n"
        "def load(name):\n"
        "    module = importlib.import_module(name)\n"
        "    found.append(module.__name__)\n"
        "def layer():\n"
        "    found.append(involution.Involution2D.__name__)\n"
        "threads = threading.Thread(target=load, args=('keras',)), threading.Thread(target=layer)\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print(*sorted(found))"
    )
    assert run(code, backend=BACKEND).split() == ["Involution2D", "keras"]


@pytest.mark.long
def test_finders_that_ask_other_finders():
    code = (
        "import involution, sys, importlib.abc, importlib.util\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        others = [f for f in sys.meta_path if f is not self and name == 'keras']\n"
        "        return next(filter(None, (f.find_spec(name, path) for f in others)), None)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import keras\n"
        "print(keras.saving.get_registered_object('involution>Involution2D').__name__)"
    )
    assert run(code, backend=BACKEND).strip() == "Involution2D"


@pytest.mark.long
def test_looking_for_keras_keeps_the_registration():
    code = (
        "import involution, importlib.util; importlib.util.find_spec('keras'); import keras;"
        "print(keras.saving.get_registered_object('involution>Involution2D').__name__)"
    )
    assert run(code, backend=BACKEND).strip() == "Involution2D"


def test_arrays_take_the_framework_of_the_tensors():
    x, kernel = np.ones((1, 4, 4, 2), "float32"), np.ones((1, 4, 4, 9, 1), "float32")
    for arguments in (
        (keras.ops.convert_to_tensor(x), kernel),
        (x, keras.ops.convert_to_tensor(kernel)),
        (x, kernel),
        (keras.Variable(x), kernel),
    ):
        y = involution.ops.involution(*arguments, 3)
        assert frameworks.framework_of(y) == BACKEND
        assert numpy(y)[0, 1, 1, 0] == 9


@pytest.mark.skipif(BACKEND == "jax", reason="JAX is the other framework of this test")
def test_tensors_of_two_frameworks_raise():
    jax = pytest.importorskip("jax")
    x, kernel = jax.numpy.ones((1, 4, 4, 2)), keras.ops.ones((1, 4, 4, 9, 1))
    message = f"must be of one framework. Received: x of jax, kernel of {BACKEND}$"
    with pytest.raises(ValueError, match=message):
        involution.ops.involution(x, kernel, 3)


def test_data_format_without_keras_is_that_of_its_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    code = "from involution.backend import image_data_format as f; print(f())"
    assert run(code).strip() == "channels_last"
    (tmp_path / "keras.json").write_text('{"image_data_format": "channels_first"}')
    assert run(code).strip() == "channels_first"
