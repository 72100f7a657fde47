"""The tutorial as notebooks: `make notebooks` executes them and stores their outputs.

A notebook is its page with three additions: the first cell installs the package, figures are
displayed, and two environment variables set the data and the number of epochs.
"""

import asyncio
import pathlib
import re
import sys
import tempfile
import time

import jupytext
import nbclient
import nbformat

from involution.utils import atomic_files

ROOT = pathlib.Path(__file__).parents[1]
# By page, the notebook and its introduction.
NOTEBOOKS = {
    "docs/en/tutorial.md": (
        "notebooks/involution.ipynb",
        "*The outputs below are from 20 epochs on CIFAR-10 as JPEG files, on TensorFlow; the "
        "environment variable `INVOLUTION_DATASET` was set to their folder. By default the "
        "notebook uses scikit-learn's handwritten digits: a minute, and no download.*",
    ),
    "docs/ko/tutorial.md": (
        "notebooks/involution.ko.ipynb",
        "*아래 출력은 JPEG 파일로 된 CIFAR-10으로 TensorFlow에서 20 에포크를 학습한 결과이며, "
        "환경 변수 `INVOLUTION_DATASET`에 그 폴더를 지정했습니다. 기본값은 scikit-learn의 손글씨 "
        "숫자이며, 1분쯤 걸리고 내려받는 파일이 없습니다.*",
    ),
}
SETTINGS = {
    "import keras\n": "import os\n\nimport keras\n",
    'source = "digits"': 'source = os.environ.get("INVOLUTION_DATASET", "digits")',
    "epochs = 20": 'epochs = int(os.environ.get("INVOLUTION_EPOCHS", "20"))',
}
SHELL = "%%sh\n"


def notebook(page):
    """Converts a page to a notebook, which is not executed."""
    about = NOTEBOOKS[page][1]
    nb = jupytext.reads((ROOT / page).read_text(encoding="utf-8"), fmt="md")
    nb.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    commands = 0
    for number, cell in enumerate(nb.cells):
        if cell.source.startswith(SHELL):
            command = cell.source.removeprefix(SHELL)
            if commands:
                cell = nbformat.v4.new_markdown_cell(f"```sh\n{command}\n```")
            else:
                package = re.match(r"pip install (\S+)", command)[1]
                # From a wheel in this folder or from `make wheels`; nothing if it is installed.
                wheels = "--find-links . --find-links ../dist"
                cell.source = f"%pip install --quiet {wheels} {package}\n%matplotlib inline"
            commands += 1
        elif cell.cell_type == "code":
            if "source = " in cell.source:
                for old, new in SETTINGS.items():
                    if old not in cell.source:
                        raise ValueError(f"{page} must contain the line {old!r}")
                    cell.source = cell.source.replace(old, new)
            if "figure = " in cell.source:
                cell.source += "\nfigure"
        else:
            # The notebook displays the figures; the first line of a translation is for the tests.
            text = re.sub(r"^(!\[.*\]\(.*\)|% english: .*)\n*", "", cell.source, flags=re.M).strip()
            folder = pathlib.PurePosixPath("..") / pathlib.PurePosixPath(page).parent
            cell.source = re.sub(r"\]\((?!http)", f"]({folder}/", text)
        nb.cells[number] = cell
    nb.cells.insert(1, nbformat.v4.new_markdown_cell(about))
    nb.cells = [cell for cell in nb.cells if cell.source]
    for number, cell in enumerate(nb.cells):
        cell.id = f"cell-{number}"
    return nb


def execute(nb, folder):
    """Runs all cells in a separate process with the working directory ``folder``; raises the error
    of a cell."""
    client = nbclient.NotebookClient(
        nb,
        timeout=None,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.create_kernel_manager()
    with tempfile.TemporaryDirectory() as sockets:
        # Unix sockets instead of ports, to which other users of the machine could connect.
        client.km.transport, client.km.ip = "ipc", f"{sockets}/kernel"
        # Not asyncio.run, which resets the current event loop of the caller.
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(client.async_execute())
        finally:
            loop.close()
    for cell in nb.cells:
        cell.metadata.pop("execution", None)  # timestamps
    return nb


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def main():
    start = time.perf_counter()
    executed = execute(notebook(next(iter(NOTEBOOKS))), ROOT / "notebooks")
    print(f"executed in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    for page, (target, _) in NOTEBOOKS.items():
        nb = notebook(page)
        # The code is the same in all languages, and so are the outputs.
        for cell, done in zip(code_cells(nb), code_cells(executed), strict=True):
            if cell.source != done.source:
                raise ValueError(f"All pages must have the same code. {page}: {cell.source!r}")
            cell.outputs, cell.execution_count = done.outputs, done.execution_count
        atomic_files.write_text(ROOT / target, nbformat.writes(nb) + "\n")


if __name__ == "__main__":
    main()
