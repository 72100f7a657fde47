import dataclasses
import re
import types

import keras
import numpy as np
import pytest
from rich.cells import cell_len

from involution.data import datasets
from involution.saving.classifier import Classifier
from involution.training import experiment, report
from involution.training.evaluation import Evaluation, evaluate
from involution.training.recipes import RECIPES
from involution.visualize import fonts

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


def write(run, folder, progress=None) -> str:
    report.write(run, folder, progress)
    return (folder / "report.html").read_text(encoding="utf-8")


def text_of(page) -> str:
    """The words of a page, without its tags."""
    return " ".join(re.sub("<[^>]*>", " ", page.split("<body>")[1]).split())


def test_summary_sentence(run):
    assert report.summary_sentence(run) == (
        "After 1 epoch, one is 25.0 points more accurate than two on the test images of "
        "<b>pets</b> (0.750 against 0.500), with 1 times its trainable parameters and 1.5 times "
        "its time per epoch."
    )
    frozen = run.results[1].classifier.model
    frozen.trainable = False
    del run.results[1].parameters
    assert "(0.750 against 0.500), with 1.5 times its time" in report.summary_sentence(run)
    frozen.trainable = True
    del run.results[1].parameters
    run.results.reverse()
    assert "two is 25.0 points less accurate than one" in report.summary_sentence(run)
    run.results[0].rows *= 3
    assert report.summary_sentence(run).startswith("After 3 and 1 epochs, two is")


@pytest.mark.long
def test_report_is_self_contained(run, tmp_path):
    page = write(run, tmp_path)
    assert "&lt;b&gt;pets&lt;/b&gt;" in page
    assert "<script" not in page
    sources = re.findall(r"(?:src|href)=\"([^\"]{0,30})", page)
    # Two figures, and two images that each model classifies wrongly.
    assert len(sources) == 2 + 4
    assert all(s.startswith("data:image/png;base64") for s in sources)
    for part in ("1024 MB", "involution compare", "386", keras.__version__):
        assert part in text_of(page)
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


def test_model_tables_do_not_depend_on_the_terminal(run, monkeypatch):
    def table():
        return report.layer_table(run.results[0].classifier.model)

    before = table()
    monkeypatch.setenv("COLUMNS", "20")
    assert table() == before
    assert before["totals"] == {"trainable": "386", "non-trainable": "0"}
    assert [(row[1], *row[2:]) for row in before["rows"]] == [
        ("InputLayer", "(None, 8, 8, 3)", "0"),
        ("Flatten", "(None, 192)", "0"),
        ("Dense", "(None, 2)", "386"),
    ]


def test_model_tables_of_operations_nested_models_and_shared_layers():
    shared = keras.layers.Dense(4, name="shared")
    nested = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)], name="nested")
    inputs = keras.Input((4,))
    outputs = nested(shared(shared(inputs)) + inputs)
    rows = {row[0]: row for row in report.layer_table(keras.Model(inputs, outputs))["rows"]}
    assert rows["shared"][3] == "20"
    assert rows["nested"] == ("nested", "Sequential", "(None, 3)", "15")
    # A sum of tensors is an operation, not a layer.
    assert next(row for row in rows.values() if row[1] == "Add")[2:] == ("(None, 4)", "0")


def test_predictions_by_model(run, tmp_path):
    dense = run.results[1].classifier.model.layers[-1]
    dense.set_weights([np.zeros((192, 2)), np.array([0.0, 3.0])])  # always the second class
    page = text_of(write(run, tmp_path))
    section = page.split("Predictions on the test images")[1].split("Kernels as heat maps")[0]
    of_two = section.split(" two ")[-1]
    assert "2 of 4 images are classified wrongly: accuracy 0.500." in of_two
    first, second = "&lt;script&gt;alert(1)&lt;/script&gt;", r"b &amp; $\no$"
    assert f"{first} 2 {second} 2 Numbers of images" in of_two
    assert of_two.count(f"predicted {second} (0.95) true {first}") == 2
    by_class = section.split("images one two ")[1].split(" one ")[0]
    assert re.search(re.escape(first) + r" 2 \d\.\d+ 0\.000", by_class)
    assert re.search(re.escape(second) + r" 2 \d\.\d+ 1\.000", by_class)


def test_predictions_of_many_classes_are_the_most_frequent_confusions(run):
    count = report.MAX_CLASSES + 5
    labels = np.arange(count).repeat(2)
    names = tuple(f"class {k}" for k in range(count))
    images = np.zeros((len(labels), 8, 8, 3), "uint8")
    run.dataset = dataclasses.replace(run.dataset, x_test=images, y_test=labels, class_names=names)
    predicted = labels.copy()
    predicted[6:8] = 0
    predicted[8] = 1
    found = Evaluation(labels, predicted, np.ones(len(labels)), count)
    values = report._predictions(run, found)
    assert values["confusion"] is None
    assert values["confusions"] == [("class 3", "class 0", 2), ("class 4", "class 1", 1)]
    rows = report._class_accuracy(run, {"one": found, "two": None})
    assert rows[:2] == [("class 3", 2, ["0.000"]), ("class 4", 2, ["0.500"])]
    assert len(rows) == report.MAX_CLASSES


def test_outputs_that_are_not_finite_are_reported(run, tmp_path):
    dense = run.results[0].classifier.model.layers[-1]
    dense.set_weights([np.zeros((192, 2)), np.array([0.0, np.nan])])
    run.failure = "The loss must be finite."
    page = text_of(write(run, tmp_path))
    assert "one Some outputs are not finite: there are no predictions." in page
    assert "not those of the metrics" in page


def test_all_images_classified_correctly(run, tmp_path):
    run.dataset.y_test[:] = 1
    del run.results[1]
    dense = run.results[0].classifier.model.layers[-1]
    dense.set_weights([np.zeros((192, 2)), np.array([0.0, 3.0])])
    assert "All 4 images are classified correctly." in text_of(write(run, tmp_path))


def test_characters_without_a_font_are_reported_once(run, tmp_path, monkeypatch):
    monkeypatch.setattr(fonts, "_family", lambda character: None)
    run.dataset = dataclasses.replace(run.dataset, class_names=("고양이", "개"))
    lines = []

    class Progress(experiment.NullProgress):
        def log(self, text):
            lines.append(text)

    page = text_of(write(run, tmp_path, Progress()))
    (line,) = lines
    assert "no installed font has: 고양이개. Install" in line
    assert page.count("no installed font has: 고양이개. Install") == 1
    assert "true 개" in page


def test_titles_of_heat_maps_are_the_predicted_and_the_true_class(run):
    found = evaluate(run.results[0].classifier, run.dataset.x_test, run.dataset.y_test)
    found.predicted[:] = [1, 1, 0, 0]
    first, second = run.dataset.class_names
    assert report._titles(run.dataset, np.array([0, 2]), found) == [
        f"predicted {second}\ntrue {first}",
        f"predicted {first}\ntrue {first}",
    ]
    assert report._titles(run.dataset, np.array([1]), None) == [f"true {second}"]


def test_captions_of_heat_maps():
    sums = types.SimpleNamespace(is_attention=False)
    attention = types.SimpleNamespace(is_attention=True)
    caption = report._heat_map_caption("net", 2, [sums, sums])
    assert caption.startswith("net, each involution: at each position, the sum")
    assert "attention" not in caption
    caption = report._heat_map_caption("net", 16, [sums, attention])
    assert caption.startswith("net, 2 of its 16 involutions: ")
    assert caption.endswith("the maps show how much of it each position receives.")


def with_rows(run, label, accuracies, normalized=True, momentum=0.99):
    """A result with these (train, test) accuracies by epoch."""
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()])
    if normalized:
        model.add(keras.layers.BatchNormalization(momentum=momentum))
    model.add(keras.layers.Dense(2))
    found = result(label, 0, 1)
    row = found.rows[0]
    found.rows = [
        {**row, "epoch": epoch, "train_accuracy": train, "test_accuracy": test}
        for epoch, (train, test) in enumerate(accuracies, 1)
    ]
    found.classifier = dataclasses.replace(found.classifier, model=model)
    run.results[1] = found
    return found


LAGGING = [(0.7, 0.5), (0.9, 0.52), (0.95, 0.9)]


def test_the_lag_of_batch_normalization_is_explained(run, tmp_path):
    found = with_rows(run, "norm", LAGGING)
    text = report.normalization_lag(run, found)
    # The chance of two classes of equal size; one step in each epoch.
    assert text.startswith(
        "In epochs 1 to 2 the test accuracy of norm is near chance (0.50), although its training "
        "accuracy reaches 0.90. Batch normalization"
    )
    assert "after epoch 2, 98% of these averages" in text
    assert text.endswith("In epoch 3 the test accuracy is 0.90.")
    assert text in text_of(write(run, tmp_path))
    assert "says little yet" not in report.summary_sentence(run)


def test_only_the_epochs_that_lag_are_named(run):
    found = with_rows(run, "norm", [LAGGING[0], LAGGING[2], LAGGING[1]])
    assert report.normalization_lag(run, found).startswith("In epochs 1, 3 the test accuracy")
    found = with_rows(run, "norm", LAGGING[1:])
    assert report.normalization_lag(run, found).startswith("In epoch 1 the test accuracy")


def test_a_verdict_on_epochs_that_lag_says_so(run):
    found = with_rows(run, "norm", LAGGING[:2])
    assert report.normalization_lag(run, found).endswith("More epochs show what norm has learned.")
    assert report.summary_sentence(run).endswith(
        " The test accuracy of norm says little yet: its batch normalization needs more epochs."
    )


@pytest.mark.parametrize(
    ("accuracies", "settings"),
    [
        (LAGGING, {"normalized": False}),
        (LAGGING, {"momentum": 0.005}),  # moving averages forget their initial values in one step
        ([(0.6, 0.5), (0.7, 0.65)], {}),
        ([(0.9, 0.7)], {}),  # overfits
    ],
)
def test_other_gaps_are_not_explained_by_batch_normalization(run, accuracies, settings):
    found = with_rows(run, "other", accuracies, **settings)
    assert report.normalization_lag(run, found) is None
    assert "says little yet" not in report.summary_sentence(run)


def test_the_lag_of_averaged_weights_is_not_that_of_batch_normalization(run):
    found = with_rows(run, "norm", LAGGING)
    run.recipe = dataclasses.replace(run.recipe, ema_momentum=0.99)
    assert report.normalization_lag(run, found) is None


def test_the_caption_of_curves_says_only_what_they_show(run):
    explained = "the training accuracy of one begins below the test accuracy"
    assert explained in report.curves_caption(run)
    run.results[0].rows[0]["train_accuracy"] = 0.8
    assert report.curves_caption(run) == (
        "Loss and accuracy by epoch on the training and the test images."
    )


def test_ratios_are_of_costs(run):
    titles = [title for title, _ in report.COLUMNS]
    ratios = dict(zip(titles, report.ratio_row(run), strict=True))
    assert ratios.pop("model") == "one / two"
    assert {title for title, ratio in ratios.items() if ratio} == {
        "trainable",
        "total",
        "size",
        "multiply-adds",
        "seconds per epoch",
        "seconds",
    }
    assert ratios["seconds"] == "1.5"


def test_summary_of_a_single_model(run):
    del run.results[1]
    assert report.summary_sentence(run) == (
        "After 1 epoch, one reaches an accuracy of 0.750 on the test images of <b>pets</b>, "
        "with 386 trainable parameters."
    )
    assert report.ratio_row(run) is None


@pytest.mark.long
def test_a_run_with_early_stopping_reports_the_saved_weights(run, tmp_path):
    run.dataset = run.dataset.validation_split(2)
    for found, accuracy in zip(run.results, (0.25, 0.75), strict=True):
        found.rows = [found.rows[0], found.rows[0] | {"epoch": 2, "test_accuracy": 0.125}]
        found.best_epoch, found.final_test_accuracy = 1, accuracy
    assert report.summary_sentence(run).startswith(
        "After 1 epoch, one is 50.0 points less accurate than two on the test images of "
        "<b>pets</b> (0.250 against 0.750)"
    )
    lines = [line.split("  ") for line in report.text_table(run)]
    table = {line[0]: [cell.strip() for cell in line if cell.strip()][1:] for line in lines}
    assert table["held-out accuracy"] == ["0.7500", "0.5000"]
    assert table["epochs"] == ["2", "2"]
    assert table["epoch of the saved weights"] == ["1", "1"]
    assert table["accuracy on the test images"] == ["0.2500", "0.7500"]
    assert not any("test loss" in line for line in table)
    assert [*table][-1] == (
        "* of the epoch that is best on the held-out training images: optimistically biased"
    )
    page = text_of(write(run, tmp_path))
    assert "2 training and 2 held-out training images of" in page
    assert "Predictions on the held-out training images" in page
    assert "the training and the held-out training images, labeled test." in page
    assert "biased; that on the test images is not." in page
    run.exit_code = 143
    assert "Metrics and saved models are of the best epoch so far." in text_of(write(run, tmp_path))
    # Before the test images are evaluated.
    run.results[1].final_test_accuracy = None
    assert "on the held-out training images of <b>pets</b> (0.750 against 0.500)" in (
        report.summary_sentence(run)
    )
    assert (
        dict(zip([c[0] for c in report.columns(run)], report.table(run)[1], strict=True))[
            "accuracy on the test images"
        ]
        == "not tested"
    )


def test_held_out_images_without_early_stopping(run):
    run.dataset = run.dataset.validation_split(1)
    titles = [title for title, _ in report.columns(run)]
    assert "accuracy on the test images" in titles
    assert "epoch of the saved weights" not in titles


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.00 B"), (156924, "153.25 KB"), (3830148, "3.65 MB"), (2**31, "2.00 GB")],
)
def test_format_bytes(count, text):
    assert report.format_bytes(count) == text
