"""Which backend is taken, in processes of their own: a test cannot change its own."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from involution import backend

HIDE = """
import importlib.util, sys
found = importlib.util.find_spec
hidden = {hidden!r}
importlib.util.find_spec = lambda name, *a: None if name in hidden else found(name, *a)
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
    """Runs ``backend.select`` alone, without importing the package and so Keras."""
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


def test_the_first_installed_is_taken_where_nothing_is_configured(select):
    result = select()
    assert result.stdout.strip() == backend.installed()[0]
    assert result.stderr == ""


def test_the_configured_one_is_taken(select):
    for name in backend.installed():
        result = select(json.dumps({"backend": name}))
        assert (result.stdout.strip(), result.stderr) == (name, "")


def test_a_configured_one_that_is_missing_gives_way_in_one_line(select):
    remaining = backend.installed()[-1]
    hidden = [b for b in backend.BACKENDS if b != remaining]
    result = select(json.dumps({"backend": hidden[0]}), hidden=hidden)
    assert result.stdout.strip() == remaining
    assert result.stderr == (
        f"involution: Keras is configured for {hidden[0]}, which is not installed: "
        f"using {remaining}\n"
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"backend": 3}'])
def test_a_broken_configuration_does_no_harm(select, content):
    result = select(content)
    assert (result.stdout.strip(), result.stderr) == (backend.installed()[0], "")


def test_a_named_one_that_is_missing_is_an_error(select):
    name = next(n for n in backend.BACKENDS if set(backend.installed()) - {n})
    result = select(hidden=[name], KERAS_BACKEND=name)
    last = result.stderr.strip().splitlines()[-1]
    assert f"Received: KERAS_BACKEND={name}" in last
    assert f"involution[{name}]" in last


def test_none_installed_is_an_error_that_says_what_to_install(select):
    result = select(hidden=backend.BACKENDS)
    last = result.stderr.strip().splitlines()[-1]
    assert "No Keras backend is installed" in last
    assert "pip install 'involution[jax]'" in last


def test_a_backend_outside_the_three_is_left_to_keras(select):
    assert select(KERAS_BACKEND="numpy").stdout.strip() == "numpy"


def test_importing_loads_no_plotting_hub_or_page_library(tmp_path):
    # Keras and its backends import some of them themselves, so these come first.
    code = (
        "import sys, keras, numpy; before = set(sys.modules); import involution;"
        "loaded = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(loaded - set(sys.stdlib_module_names)))"
    )
    result = run(code, tmp_path, KERAS_BACKEND=os.environ["KERAS_BACKEND"])
    assert result.stdout.strip() == "['involution']", result.stderr
