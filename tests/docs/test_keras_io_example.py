"""The code of the keras.io example, with this package's layer in place of the example's.

    INVOLUTION_EXAMPLE=involution.md pytest -m example tests/docs/test_keras_io_example.py

INVOLUTION_EXAMPLE is the path of the example's Markdown file, which includes the expected output.
"""

import os
import pathlib
import re

import keras
import numpy as np
import pytest

import involution
from tests.support import keras_io_formula as formula
from tests.support.backends import BACKEND

pytestmark = [
    pytest.mark.example,
    pytest.mark.skipif(BACKEND != "tensorflow", reason="the example runs on TensorFlow only"),
    # Keras warns about the example's use of its API, and Matplotlib that Agg shows no figures.
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def digits():
    """Scikit-learn's digits in CIFAR-10's format: uint8 (n, 32, 32, 3), labels (n, 1)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.kron(data.images * 255 / 16, np.ones((1, 4, 4))).astype("uint8")
    images, labels = np.repeat(images[..., None], 3, axis=-1), data.target[:, None]
    return (images[:512], labels[:512]), (images[512:576], labels[512:576])


def table(text):
    """Rows of the model summaries in a text: lists of three cells without spaces or markup."""
    rows = []
    for line in re.sub("<[^>]*>|\x1b[^m]*m", "", text).splitlines():
        if line.startswith("│"):
            cells = [cell.replace(" ", "") for cell in line.strip("│").split("│")]
            if cells[0]:
                rows.append(cells)
            else:
                rows[-1] = [above + cell for above, cell in zip(rows[-1], cells, strict=True)]
    return rows


def unnumbered(rows):
    """Rows without the numbers in names: Keras counts the example's layers in the process, and this
    package's layers name theirs without that count."""
    return [[re.sub(r"_\d+", "", str(row[0])), *map(str, row[1:])] for row in rows]


def totals(text):
    return re.findall(r"params: (\S+ \(.*?\))", re.sub("<[^>]*>|\x1b[^m]*m", "", text))


@pytest.fixture(scope="module")
def text():
    path = os.environ.get("INVOLUTION_EXAMPLE")
    if not path:
        pytest.fail("INVOLUTION_EXAMPLE must be the path of the keras.io example in Markdown")
    return pathlib.Path(path).read_text(encoding="utf-8")


def test_code_blocks_run_unchanged(text, monkeypatch, capsys):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(keras.datasets.cifar10, "load_data", digits)
    keras.utils.clear_session()
    plt.close("all")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fenced if language == "python"]
    other_blocks = [b for b in blocks if not re.search(r"^class Involution\b", b, re.M)]
    assert len(other_blocks) == len(blocks) - 1
    names = {"Involution": involution.Involution}
    for block in other_blocks:
        exec(compile(block, "example", "exec"), names)  # noqa: S102 - the example
    printed = capsys.readouterr().out

    outputs = [block for language, block in fenced if not language]
    lines = [line for block in outputs for line in block.splitlines() if line.strip()]
    # Lines of the progress bar have times.
    lines = [line for line in lines if "/step" not in line]
    assert len(lines) >= 50
    assert [line for line in lines if line not in printed.splitlines()] == []

    assert unnumbered(formula.rows(names["conv_model"])) == unnumbered(formula.CNN)
    assert unnumbered(formula.rows(names["inv_model"])) == unnumbered(formula.INN)
    assert totals(printed) == totals(text) == formula.CNN_TOTALS + formula.INN_TOTALS
    assert unnumbered(table(printed)) == unnumbered(table(text))
    assert len(table(text)) == len(formula.CNN) + len(formula.INN)

    kernels = [tuple(t.shape) for t in names["vis_model"].outputs]
    assert kernels == [(None, n, n, 9, 1, 1) for n in (32, 16, 8)]
    for i, n in enumerate((32, 16, 8), start=1):
        heat = names[f"inv{i}_kernel"].numpy()
        assert heat.shape == (1, n, n)
        assert np.isfinite(heat).all()
    assert names["axes"].shape == (10, 4)
    drawn = [[axis.images[0].get_array().shape[:2] for axis in row] for row in names["axes"]]
    assert drawn == [[(32, 32), (32, 32), (16, 16), (8, 8)]] * 10
    for name in "conv_hist", "inv_hist":
        assert [len(values) for values in names[name].history.values()] == [20] * 4
    plt.close("all")
