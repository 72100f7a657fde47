import re

import keras
import numpy as np
import pytest
from rich.cells import cell_len

from involution.data import datasets
from involution.saving.classifier import Classifier
from involution.training import experiment, report
from involution.training.recipes import RECIPES

pytestmark = pytest.mark.any_backend


def result(label, test_accuracy, seconds):
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(inputs)))
    row = {"epoch": 1, "train_loss": 1.5, "train_accuracy": 0.5, "test_loss": 1.25}
    rows = [{**row, "test_accuracy": test_accuracy, "seconds": seconds}]
    classifier = Classifier(model, ("a", "b"), (8, 8, 3))
    return experiment.Result(label, classifier, rows=rows, seconds=seconds)


@pytest.fixture
def run():
    images = np.zeros((4, 8, 8, 3), "uint8")
    labels = np.array([0, 1, 0, 1])
    # Class names are names of folders, which may be untrusted.
    names = ("<script>alert(1)</script>", r"b & $\no$")
    dataset = datasets.Dataset("<b>pets</b>", "", images, labels, images, labels, names)
    return experiment.Run(
        experiment.Config(),
        dataset,
        RECIPES["example"],
        [result("one", 0.75, 3.0), result("two", 0.5, 2.0)],
        "involution compare",
        "2026-01-01",
        peak_memory_bytes=2**30,
    )


def test_summary_sentence(run):
    assert report.summary_sentence(run) == (
        "On the test images of <b>pets</b>, one is 25.0 points more accurate than two (0.750 "
        "against 0.500), with 1 times its trainable parameters and 1.5 times its time per epoch."
    )
    run.results.reverse()
    assert "two is 25.0 points less accurate than one" in report.summary_sentence(run)


@pytest.mark.long
def test_report_is_self_contained(run, tmp_path):
    report.write(run, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;pets&lt;/b&gt;" in page
    assert "<script" not in page
    sources = re.findall(r"(?:src|href)=\"([^\"]{0,30})", page)
    assert len(sources) == 2
    assert all(s.startswith("data:image/png;base64") for s in sources)
    for part in ("1024 MB", "involution compare", "386", "1.50", "Model: ", keras.__version__):
        assert part in page
    assert {f.name for f in tmp_path.iterdir()} == {"report.html", "curves.png", "samples.png"}


def test_text_table_has_a_row_for_each_metric(run):
    lines = report.text_table(run)
    assert lines[0] == "model                    one      two"
    assert lines[1] == "trainable                386      386"
    assert lines[5] == "size                 1.51 KB  1.51 KB"
    assert lines[10] == "test accuracy         0.7500   0.5000"
    assert len(lines) == len(report.COLUMNS) + 1


def test_text_table_fits_a_terminal(run):
    """Models that do not fit continue below; a Korean character has two columns."""
    labels = [f"inn:kernel_size={size}" for size in (3, 5, 7, 9)] + ["내_모델.py:함수"]
    run.results = [result(label, 0.75, 3.0) for label in labels]
    *lines, note = report.text_table(run)
    assert max(map(cell_len, [*lines, note])) <= 80
    blocks = "\n".join(lines).split("\n\n")
    assert len(blocks) == 2
    assert [block.split()[0] for block in blocks] == ["model", "model"]
    assert " ".join(block.splitlines()[0][5:] for block in blocks).split() == labels
    for block in blocks:
        assert len({cell_len(line) for line in block.splitlines()}) == 1


def test_summary_of_a_single_model(run):
    del run.results[1]
    assert report.summary_sentence(run) == (
        "On the test images of <b>pets</b>, one reaches an accuracy of 0.750 "
        "with 386 trainable parameters."
    )
    assert report.ratio_row(run) is None


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.00 B"), (156924, "153.25 KB"), (3830148, "3.65 MB"), (2**31, "2.00 GB")],
)
def test_format_bytes(count, text):
    assert report.format_bytes(count) == text
