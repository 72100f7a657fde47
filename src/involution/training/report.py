"""The report of a run: a self-contained HTML file, and its figures as files."""

import math
import pathlib

import keras
import numpy as np
from rich.cells import cell_len, set_cell_size

from involution.data import transforms
from involution.kernel_generators.attachment import layers_within
from involution.training.evaluation import evaluate
from involution.utils.atomic_files import atomic_write
from involution.utils.progress import NullProgress
from involution.visualize import activations, fonts, html
from involution.visualize import figures as visualize

TEMPLATE = pathlib.Path(__file__).with_name("report.html.j2")

HEAT_MAP_IMAGES = 10
HEAT_MAP_LAYERS = 6
MISTAKES = 8
# Above this number of classes, the report has the most frequent confusions instead of the confusion
# matrix, and the classes with the lowest accuracy instead of all.
MAX_CLASSES = 20


def write(run, output, progress: NullProgress | None = None):
    """Writes the figures (PNG) and report.html of a run to its folder.

    Args:
        run: The run.
        output: The folder.
        progress: Receives the progress of the predictions, and a line about characters that no
            installed font has; None: nothing is reported.
    """
    progress = progress or NullProgress()
    font_warning = fonts.warning(run.dataset.class_names)
    if font_warning is not None:
        progress.log(font_warning)
    evaluations = {
        result.label: evaluate(
            result.classifier,
            run.dataset.x_test,
            run.dataset.y_test,
            progress,
            f"{result.label}: predicting {run.dataset.evaluated_images}",
        )
        for result in run.results
    }
    figures = {}
    for name, (figure, caption) in _figures(run, evaluations).items():
        image = html.png(figure)
        with atomic_write(output / f"{name}.png") as temporary:
            temporary.write_bytes(image)
        figures[name] = {"source": html.data_url(image), "caption": caption}
    html.write(
        output / "report.html",
        TEMPLATE,
        run=run,
        metrics=run.metrics["models"],
        description=run.description,
        summary_sentence=summary_sentence(run),
        rows=table(run),
        columns=columns(run),
        stops=stops_early(run),
        ratio=ratio_row(run),
        font_warning=font_warning,
        lags=[text for result in run.results if (text := normalization_lag(run, result))],
        class_accuracy=_class_accuracy(run, evaluations),
        predictions={label: _predictions(run, found) for label, found in evaluations.items()},
        max_classes=MAX_CLASSES,
        layers={r.label: layer_table(r.classifier.model) for r in run.results},
        figures=figures,
    )


# Columns of the table: title, and key in metrics.json.
COLUMNS = (
    ("model", None),
    ("trainable", "trainable_params"),
    ("non-trainable", "non_trainable_params"),
    ("optimizer", "optimizer_params"),
    ("total", "total_params"),
    ("size", "bytes"),
    ("multiply-adds", "multiply_adds"),
    ("train loss", "train_loss"),
    ("train accuracy", "train_accuracy"),
    ("test loss", "test_loss"),
    ("test accuracy", "test_accuracy"),
    ("best test accuracy*", "best_test_accuracy"),
    ("seconds per epoch", "seconds_per_epoch"),
    ("seconds", "seconds"),
)

# Columns of runs with held-out images; the first two only with early stopping.
HELD_OUT_COLUMNS = (
    ("epochs", "epochs"),
    ("epoch of the saved weights", "best_epoch"),
    ("accuracy on the test images", "final_test_accuracy"),
)

# Columns for which a ratio of two models means something.
RATIOS = (
    "trainable_params",
    "total_params",
    "bytes",
    "multiply_adds",
    "seconds_per_epoch",
    "seconds",
)


def stops_early(run) -> bool:
    """Whether models have the weights of their best epoch, by early stopping."""
    return any(result.best_epoch is not None for result in run.results)


def columns(run) -> list[tuple[str, str | None]]:
    """The columns of a run's table, as ``COLUMNS``."""
    found = list(COLUMNS)
    if run.dataset.held_out_from is not None:
        found = [(title.replace("test", "held-out"), key) for title, key in found]
        found[-2:-2] = HELD_OUT_COLUMNS if stops_early(run) else HELD_OUT_COLUMNS[-1:]
    return found


def table(run) -> list[list[str]]:
    """The table of a run as text, one row for each model."""
    return [
        [label, *(_text(key, metrics[key]) for _, key in columns(run)[1:])]
        for label, metrics in run.metrics["models"].items()
    ]


def ratio_row(run) -> list[str] | None:
    """The ratios of the first model's costs to the second's; None for a single model."""
    models = list(run.metrics["models"].values())
    if len(models) < 2:
        return None
    labels = list(run.metrics["models"])
    row = [f"{labels[0]} / {labels[1]}"]
    for _, key in columns(run)[1:]:
        a, b = models[0][key], models[1][key]
        row.append(f"{a / b:.3g}" if key in RATIOS and a is not None and b else "")
    return row


def text_table(run, width=80) -> list[str]:
    """The table of a run for a terminal: a row for each metric, and a column for each model.

    Args:
        run: The run.
        width: Columns of the terminal; models that exceed them continue below, a block of models
            after the other.
    """
    titles, *models = [[title for title, _ in columns(run)], *table(run)]
    first = max(map(cell_len, titles))
    blocks: list[list[tuple[list[str], int]]] = []
    left = 0
    for cells in models:
        # Two spaces between columns.
        size = 2 + max(map(cell_len, cells))
        if size > left:
            blocks.append([])
            left = width - first
        blocks[-1].append((cells, size))
        left -= size
    lines: list[str] = []
    for block in blocks:
        if lines:
            lines.append("")
        for row, title in enumerate(titles):
            values = (" " * (size - cell_len(cells[row])) + cells[row] for cells, size in block)
            lines.append(set_cell_size(title, first) + "".join(values))
    note = f"* of the epoch that is best on the {run.dataset.evaluated_images}"
    return [*lines, f"{note}: optimistically biased"]


def summary_sentence(run) -> str:
    """The accuracy of a single model, or a comparison of the first two, with their epochs; and
    whether these were too few for a model's test accuracy to mean something.

    Accuracies are those on the test images, also of models that were evaluated on held-out ones
    during training; on these, if not all trained models have been tested.
    """
    models = list(run.metrics["models"].items())
    trained = [(label, m) for label, m in models if m["test_accuracy"] is not None]
    tested = all(m["final_test_accuracy"] is not None for _, m in trained)
    accuracy = "final_test_accuracy" if tested else "test_accuracy"
    kind = "test images" if tested else run.dataset.evaluated_images
    images = f"{kind} of {run.dataset.held_out_from or run.dataset.name}"
    late = "".join(
        f" The test accuracy of {result.label} says little yet: its batch normalization needs more "
        "epochs."
        for result in run.results
        if result.rows and result.rows[-1]["epoch"] in _lagging_epochs(run, result)
    )
    if len(models) == len(trained) == 1:
        label, only = trained[0]
        return (
            f"After {_epochs(_saved_epoch(only))}, {label} reaches an accuracy of "
            f"{only[accuracy]:.3f} on the {images}, "
            f"with {only['trainable_params']:,} trainable parameters.{late}"
        )
    if len(trained) < 2:
        return f"{len(trained)} of {len(models)} models completed an epoch: no comparison yet."
    (a, first), (b, second) = trained[:2]
    difference = 100 * (first[accuracy] - second[accuracy])
    parameters = ""
    if second["trainable_params"]:
        ratio = first["trainable_params"] / second["trainable_params"]
        parameters = f"{ratio:.3g} times its trainable parameters and "
    seconds = first["seconds_per_epoch"] / second["seconds_per_epoch"]
    epochs = _epochs(*dict.fromkeys((_saved_epoch(first), _saved_epoch(second))))
    return (
        f"After {epochs}, {a} is {abs(difference):.1f} points "
        f"{'more' if difference >= 0 else 'less'} accurate than {b} on the {images} "
        f"({first[accuracy]:.3f} against {second[accuracy]:.3f}), "
        f"with {parameters}{seconds:.3g} times its time per epoch.{late}"
    )


def _saved_epoch(metrics) -> int:
    return metrics["best_epoch"] or metrics["epochs"]


def _epochs(*counts) -> str:
    return f"{' and '.join(map(str, counts))} epoch{'' if counts == (1,) else 's'}"


def curves_caption(run) -> str:
    """What the learning curves show; it explains only what these curves have."""
    early = [
        result.label
        for result in run.results
        if result.rows and result.rows[0]["train_accuracy"] < result.rows[0]["test_accuracy"]
    ]
    images = run.dataset.evaluated_images
    text = f"Loss and accuracy by epoch on the training and the {images}"
    text += "." if images == "test images" else ", labeled test."
    if early:
        text += (
            " Training metrics are means over an epoch, during which the weights improve; test "
            "metrics are of the weights at its end. This is one reason why the training accuracy "
            f"of {', '.join(early)} begins below the test accuracy."
        )
    return text


# Moving statistics lag as long as they hold this fraction of their initial values.
MIN_INITIAL_WEIGHT = 0.01
# A lag is visible where the training accuracy is this much above chance, and the test accuracy has
# gained less than a quarter of that.
MIN_GAIN = 0.15


def _chance(run) -> float:
    """Accuracy of always predicting the most frequent test class."""
    return float(np.bincount(run.dataset.y_test).max() / len(run.dataset.y_test))


def _initial_weight(run, result) -> float:
    """Weight of the initial values in the moving statistics of batch normalization after an epoch,
    of the layer that forgets them last; 0 without batch normalization."""
    momenta = [
        layer.momentum
        for layer in layers_within(result.classifier.model)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    batch = run.recipe.batch_size or run.dataset.batch_size
    steps = -(-len(run.dataset.x_train) // (batch // run.recipe.gradient_accumulation_steps))
    return max(momenta, default=0.0) ** steps


def _lagging_epochs(run, result) -> list[int]:
    """Epochs whose test accuracy is near chance while the training accuracy is not, although the
    moving statistics of batch normalization may explain it."""
    if run.recipe.ema_momentum is not None:
        return []  # the averaged weights that are tested lag too
    weight, chance = _initial_weight(run, result), _chance(run)
    return [
        row["epoch"]
        for row in result.rows
        if weight ** row["epoch"] >= MIN_INITIAL_WEIGHT
        and row["train_accuracy"] - chance >= MIN_GAIN
        and row["test_accuracy"] - chance < (row["train_accuracy"] - chance) / 4
    ]


def normalization_lag(run, result) -> str | None:
    """Explains a test accuracy that stays near chance in the first epochs, because the moving
    statistics of batch normalization lag; None if there is no such epoch."""
    epochs = _lagging_epochs(run, result)
    if not epochs:
        return None
    last = epochs[-1]
    rows = {row["epoch"]: row for row in result.rows}
    text = (
        f"{_epoch_range(epochs)} the test accuracy of {result.label} is near chance "
        f"({_chance(run):.2f}), although its training accuracy reaches "
        f"{max(rows[epoch]['train_accuracy'] for epoch in epochs):.2f}. Batch normalization "
        "uses the statistics of the batch in training, and their moving averages in tests; after "
        f"epoch {last}, {_initial_weight(run, result) ** last:.0%} of these averages are still "
        "their initial values."
    )
    if last + 1 in rows:
        reached = rows[last + 1]["test_accuracy"]
        return f"{text} In epoch {last + 1} the test accuracy is {reached:.2f}."
    return f"{text} More epochs show what {result.label} has learned."


def _epoch_range(epochs) -> str:
    if len(epochs) == 1:
        return f"In epoch {epochs[0]}"
    if epochs == list(range(epochs[0], epochs[-1] + 1)):
        return f"In epochs {epochs[0]} to {epochs[-1]}"
    return f"In epochs {', '.join(map(str, epochs))}"


def layer_table(model) -> dict:
    """The layers of a model as in Keras's summary, whose text depends on the terminal's width.

    Returns:
        ``rows``: name, type, output shape and number of parameters, as text; ``totals``: the
        numbers of trainable and other parameters, as text.
    """
    rows = []
    # Includes operations that are no layers, such as a sum of tensors.
    for layer in getattr(model, "operations", model.layers):
        shapes = [str(tuple(x.shape)) for x in keras.tree.flatten(layer.output)]
        count = layer.count_params() if isinstance(layer, keras.layers.Layer) else 0
        rows.append((layer.name, type(layer).__name__, ", ".join(shapes), f"{count:,}"))
    totals = {
        kind: f"{sum(math.prod(v.shape) for v in variables):,}"
        for kind, variables in (
            ("trainable", model.trainable_variables),
            ("non-trainable", model.non_trainable_variables),
        )
    }
    return {"name": model.name, "rows": rows, "totals": totals}


def format_bytes(count) -> str:
    """A number of bytes with its unit, as in Keras's summaries."""
    for unit in ("B", "KB", "MB"):
        if count < 1024:
            return f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} GB"


def _text(key, value) -> str:
    if value is None:
        absent = {"multiply_adds": "not counted", "final_test_accuracy": "not tested"}
        return absent.get(key, "no epoch completed")
    if key == "multiply_adds":
        return f"{value / 1e6:.2f} M"
    if key == "bytes":
        return format_bytes(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.1f}" if key.startswith("seconds") else f"{value:.4f}"


def _class_accuracy(run, evaluations) -> list[tuple]:
    """Rows of the table: class, its number of images, accuracy of each evaluated model."""
    found = [evaluation for evaluation in evaluations.values() if evaluation is not None]
    if not found:
        return []
    accuracies = np.stack([evaluation.class_accuracy for evaluation in found])
    counts = np.bincount(run.dataset.y_test, minlength=len(run.dataset.class_names))
    (order,) = np.nonzero(counts)
    if len(order) > MAX_CLASSES:
        order = order[np.argsort(accuracies[:, order].mean(axis=0), kind="stable")][:MAX_CLASSES]
    return [
        (run.dataset.class_names[k], int(counts[k]), [f"{a:.3f}" for a in accuracies[:, k]])
        for k in order
    ]


def _predictions(run, evaluation) -> dict | None:
    """The values of the template's section about the predictions of one model."""
    if evaluation is None:
        return None
    names = run.dataset.class_names
    few = len(names) <= MAX_CLASSES
    mistakes = evaluation.confident_mistakes(MISTAKES)
    return {
        "accuracy": evaluation.accuracy,
        "wrong": int((evaluation.labels != evaluation.predicted).sum()),
        "confusion": evaluation.confusion.tolist() if few else None,
        "confusions": [
            (names[true], names[predicted], count)
            for true, predicted, count in evaluation.frequent_confusions(MAX_CLASSES)
        ],
        "mistakes": [
            {
                "source": html.thumbnail(image),
                "predicted": names[evaluation.predicted[i]],
                "actual": names[evaluation.labels[i]],
                "confidence": f"{evaluation.confidence[i]:.2f}",
            }
            for i, image in zip(mistakes, run.dataset.x_test[mistakes], strict=True)
        ],
    }


def _figures(run, evaluations) -> dict:
    """Figures and their captions, by name."""
    dataset, seed = run.dataset, run.config.seed
    rows = {r.label: r.rows for r in run.results if r.rows}
    figures = {}
    if rows:
        figures["curves"] = visualize.curves(rows), curves_caption(run)
    if len(rows) > 2:
        figures["costs"] = (
            visualize.accuracy_vs_cost(run.metrics["models"]),
            f"Accuracy on the {dataset.evaluated_images} after the "
            f"{'best' if stops_early(run) else 'last'} "
            "epoch, by parameters and multiply-adds.",
        )
    figures["samples"] = (
        visualize.image_grid(dataset.x_train, dataset.y_train, dataset.class_names, seed),
        "A random sample of the training images, stratified by class.",
    )
    chosen = visualize.stratified_sample(dataset.y_test, HEAT_MAP_IMAGES, seed)
    images = dataset.x_test[chosen]
    inputs, filters = transforms.to_unit_float(images), _first_filters(run)
    for result in run.results:
        records = activations.two_dimensional(activations.capture(result.classifier.model, inputs))
        if not records:
            continue
        # The first, the last, and others at equal distances.
        spread = np.linspace(0, len(records) - 1, min(len(records), HEAT_MAP_LAYERS)).round()
        names = [list(records)[int(i)] for i in spread]
        figures[f"heatmaps-{result.file.removesuffix('.keras')}"] = (
            visualize.heat_maps(
                images,
                {name: records[name].heat_map for name in names},
                _titles(dataset, chosen, evaluations[result.label]),
            ),
            _heat_map_caption(
                result.label,
                len(records),
                [records[name] for name in names],
                dataset.evaluated_images,
            ),
        )
        if filters is not None and "words" not in figures:
            figures["words"] = (
                _kernel_figure(next(iter(records.values())), filters),
                "Kernels that the first involution generated at four positions of one of the "
                f"{dataset.evaluated_images}, chosen to be as different as possible, and kernels "
                "of the first convolution, by channel.",
            )
    return figures


def _titles(dataset, chosen, evaluation) -> list[str]:
    """Titles of evaluated images: the predicted and the true class, a line each."""
    names = dataset.class_names
    true = [f"true {names[k]}" for k in dataset.y_test[chosen]]
    if evaluation is None:
        return true
    predicted = [names[k] for k in evaluation.predicted[chosen]]
    return [f"predicted {p}\n{t}" for p, t in zip(predicted, true, strict=True)]


def _heat_map_caption(label, involutions, records, images="test images") -> str:
    shown = (
        "each involution"
        if len(records) == involutions
        else f"{len(records)} of its {involutions} involutions"
    )
    text = (
        f"{label}, {shown}: at each position, the sum of the generated kernel over its window and "
        f"the groups, for {images}. Each map has its own color scale, from the "
        "1st to the 99th percentile of its values."
    )
    if any(record.is_attention for record in records):
        text += f" {activations.ATTENTION_CAPTION}"
    return text


def _kernel_figure(record, filters):
    kernel = record.kernels[0, ..., 0]
    kernel = kernel.reshape(*kernel.shape[:2], *record.window.kernel_size)
    return visualize.compare_kernels(kernel, filters, visualize.most_different(kernel, 4))


def _first_filters(run) -> np.ndarray | None:
    """Three filters of the models' first convolution larger than 1x1, (K, K, 3)."""
    for result in run.results:
        for layer in result.classifier.model.layers:
            if isinstance(layer, keras.layers.Conv2D) and layer.kernel.shape[0] > 1:
                return keras.ops.convert_to_numpy(layer.kernel)[:, :, 0, :3]
    return None
