"""The notebooks match their pages, have outputs, and run without a checkout."""

import importlib.util
import re
import shlex
import tomllib

import keras
import nbformat
import pytest

from tests.docs.test_docs import DOCS, check_printed

pytestmark = pytest.mark.any_backend

specification = importlib.util.spec_from_file_location("notebooks", DOCS / "notebooks.py")
notebooks = importlib.util.module_from_spec(specification)
specification.loader.exec_module(notebooks)

PAGES = list(notebooks.NOTEBOOKS)


def committed(page):
    return nbformat.read(notebooks.ROOT / notebooks.NOTEBOOKS[page][0], as_version=4)


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.parametrize("page", PAGES)
def test_notebook_matches_its_page(page):
    expected = [(cell.cell_type, cell.source) for cell in notebooks.notebook(page).cells]
    assert [(cell.cell_type, cell.source) for cell in committed(page).cells] == expected, (
        "run `make notebooks` after changing the tutorial"
    )
    nbformat.validate(committed(page))


@pytest.mark.parametrize("page", PAGES)
def test_committed_outputs_are_from_cifar10(page):
    code = notebooks.code_cells(committed(page))
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    lines = [line for cell in code for line in printed(cell).splitlines()]
    assert "(50000, 32, 32, 3) (10000, 32, 32, 3) 10" in lines
    assert sum(line.startswith("Epoch 20/20") for line in lines) == 2
    figures = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(figures) == sum("figure = " in cell.source for cell in code) > 0


def test_all_notebooks_have_the_same_code():
    first, *others = (
        [cell.source for cell in notebooks.code_cells(notebooks.notebook(page))] for page in PAGES
    )
    assert others == [first] * len(others)


def test_first_cell_installs_from_a_wheel_of_the_repository():
    command, *_ = notebooks.code_cells(notebooks.notebook(PAGES[0]))[0].source.splitlines()
    *options, requirement = shlex.split(command)
    folders = [options[i + 1] for i, option in enumerate(options) if option == "--find-links"]
    # The notebook's own, and that of `make wheels`.
    own = notebooks.ROOT / "notebooks"
    assert [(own / folder).resolve() for folder in folders] == [own, notebooks.ROOT / "dist"]
    project = tomllib.loads((notebooks.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    name, extras = re.fullmatch(r"(\w+)\[(.*)\]", requirement).groups()
    assert name == project["project"]["name"]
    assert set(extras.split(",")) <= set(project["project"]["optional-dependencies"])


# The notebooks have the same code: JAX runs the second, the other backends the first.
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES[keras.backend.backend() == "jax" :][:1])
def test_notebook_runs_outside_the_checkout(page, tmp_path, monkeypatch):
    monkeypatch.setenv("INVOLUTION_EPOCHS", "1")
    notebook = notebooks.notebook(page)
    install = notebooks.code_cells(notebook)[0]
    assert install.source.startswith("%pip install")
    if keras.backend.backend() != "tensorflow":  # TensorFlow need not be installed
        install.source = install.source.replace("tensorflow-cpu", keras.backend.backend())
    notebooks.execute(notebook, tmp_path)
    for cell in notebooks.code_cells(notebook):
        check_printed(cell.source, printed(cell))
    assert not list(tmp_path.iterdir())
