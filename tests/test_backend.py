"""Selection of the backend, in subprocesses: it cannot change after Keras is imported."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from involution import backend

HIDE = """
import importlib.util, sys
find_spec = importlib.util.find_spec
hidden = {hidden!r}
importlib.util.find_spec = lambda name, *a: None if name in hidden else find_spec(name, *a)
"""


def run(code, home, hidden=(), **environment):
    env = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden=list(hidden)) + code],
        env={**env, "KERAS_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


SELECT = "from involution_select import select; print(select())"


@pytest.fixture
def select(tmp_path, monkeypatch):
    """Runs a copy of ``backend.select``, alone."""
    source = tmp_path / "code"
    source.mkdir()
    shutil.copy(backend.__file__, source / "involution_select.py")

    def run_select(configured=None, **arguments):
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        if configured is not None:
            (home / "keras.json").write_text(configured)
        return run(SELECT, home, PYTHONPATH=str(source), **arguments)

    return run_select


def test_default_is_the_first_installed_backend(select):
    result = select()
    assert result.stdout.strip() == backend.installed()[0]
    assert result.stderr == ""


def test_configured_backend_is_selected(select):
    for name in backend.installed():
        result = select(json.dumps({"backend": name}))
        assert (result.stdout.strip(), result.stderr) == (name, "")


def test_missing_configured_backend_is_replaced_with_a_warning(select):
    remaining = backend.installed()[-1]
    hidden = [b for b in backend.BACKENDS if b != remaining]
    result = select(json.dumps({"backend": hidden[0]}), hidden=hidden)
    assert result.stdout.strip() == remaining
    assert result.stderr == (
        f"involution: Keras is configured for {hidden[0]}, which is not installed: "
        f"using {remaining}\n"
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"backend": 3}'])
def test_invalid_configuration_is_ignored(select, content):
    result = select(content)
    assert (result.stdout.strip(), result.stderr) == (backend.installed()[0], "")


def test_missing_requested_backend_is_an_error(select):
    name = next(n for n in backend.BACKENDS if set(backend.installed()) - {n})
    result = select(hidden=[name], KERAS_BACKEND=name)
    last = result.stderr.strip().splitlines()[-1]
    assert f"Received: KERAS_BACKEND={name}" in last
    assert f"involution[{name}]" in last


def test_no_installed_backend_is_an_error(select):
    result = select(hidden=backend.BACKENDS)
    last = result.stderr.strip().splitlines()[-1]
    assert "No Keras backend is installed" in last
    assert "pip install 'involution[jax]'" in last


def test_requested_inference_only_backend_is_kept(select):
    assert select(KERAS_BACKEND="numpy").stdout.strip() == "numpy"


@pytest.mark.long
@pytest.mark.any_backend
def test_import_loads_no_optional_dependency(tmp_path):
    # Keras and its backend may import other modules.
    code = (
        "import sys, keras, numpy; before = set(sys.modules); import involution;"
        "loaded = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(loaded - set(sys.stdlib_module_names)))"
    )
    result = run(code, tmp_path, KERAS_BACKEND=os.environ["KERAS_BACKEND"])
    assert result.stdout.strip() == "['involution']", result.stderr
