"""The report of a run: a self-contained HTML file, and its figures as files."""

import pathlib

import keras
import numpy as np
from rich.cells import cell_len, set_cell_size

from involution.data import transforms
from involution.utils.atomic_files import atomic_write
from involution.visualize import activations, html
from involution.visualize import figures as visualize

TEMPLATE = pathlib.Path(__file__).with_name("report.html.j2")

HEAT_MAP_IMAGES = 10


def write(run, output):
    """Writes the figures (PNG) and report.html of a run to its folder."""
    figures = {}
    for name, figure in _figures(run).items():
        image = html.png(figure)
        with atomic_write(output / f"{name}.png") as temporary:
            temporary.write_bytes(image)
        figures[name] = html.data_url(image)
    html.write(
        output / "report.html",
        TEMPLATE,
        run=run,
        metrics=run.metrics["models"],
        description=run.description,
        summary_sentence=summary_sentence(run),
        rows=table(run),
        columns=COLUMNS,
        ratio=ratio_row(run),
        summaries={r.label: summary(r.classifier.model) for r in run.results},
        figures=figures,
        captions=CAPTIONS,
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

CAPTIONS = {
    "curves": "Loss and accuracy by epoch on the training and the test images. Training metrics "
    "are means over an epoch, during which the weights change, so early training accuracies are "
    "below those on the test images.",
    "costs": "Accuracy on the test images after the last epoch, by parameters and multiply-adds.",
    "samples": "A random sample of the training images, stratified by class.",
    "words": "Kernels that the first involution generated at four positions of one test image, "
    "and kernels of the first convolution, by channel.",
}


def table(run) -> list[list[str]]:
    """The table of a run as text, one row for each model."""
    return [
        [label, *(_text(key, metrics[key]) for _, key in COLUMNS[1:])]
        for label, metrics in run.metrics["models"].items()
    ]


def ratio_row(run) -> list[str] | None:
    """The ratios of the first model's values to the second's; None for a single model."""
    models = list(run.metrics["models"].values())
    if len(models) < 2:
        return None
    labels = list(run.metrics["models"])
    row = [f"{labels[0]} / {labels[1]}"]
    for _, key in COLUMNS[1:]:
        a, b = models[0][key], models[1][key]
        row.append(f"{a / b:.2f}" if a is not None and b else "")
    return row


def text_table(run, width=80) -> list[str]:
    """The table of a run for a terminal: a row for each metric, and a column for each model.

    Args:
        run: The run.
        width: Columns of the terminal; models that exceed them continue below, a block of models
            after the other.
    """
    titles, *models = [[title for title, _ in COLUMNS], *table(run)]
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
    return [*lines, "* of the epoch that is best on the test images: optimistically biased"]


def summary_sentence(run) -> str:
    """One sentence: a comparison of the first two models, or the accuracy of a single one."""
    models = list(run.metrics["models"].items())
    trained = [(label, m) for label, m in models if m["test_accuracy"] is not None]
    if len(models) == len(trained) == 1:
        label, only = trained[0]
        return (
            f"On the test images of {run.dataset.name}, {label} reaches an accuracy of "
            f"{only['test_accuracy']:.3f} with {only['trainable_params']:,} trainable parameters."
        )
    if len(trained) < 2:
        return f"{len(trained)} of {len(models)} models completed an epoch: no comparison yet."
    (a, first), (b, second) = trained[:2]
    difference = 100 * (first["test_accuracy"] - second["test_accuracy"])
    parameters = first["trainable_params"] / second["trainable_params"]
    seconds = first["seconds_per_epoch"] / second["seconds_per_epoch"]
    return (
        f"On the test images of {run.dataset.name}, {a} is {abs(difference):.1f} points "
        f"{'more' if difference >= 0 else 'less'} accurate than {b} "
        f"({first['test_accuracy']:.3f} against {second['test_accuracy']:.3f}), "
        f"with {parameters:.3g} times its trainable parameters "
        f"and {seconds:.3g} times its time per epoch."
    )


def summary(model) -> str:
    """Keras's model summary as text."""
    lines: list[str] = []
    model.summary(print_fn=lambda text, **_: lines.append(text), line_length=90)
    return "\n".join(lines)


def format_bytes(count) -> str:
    """A number of bytes with its unit, as in Keras's summaries."""
    for unit in ("B", "KB", "MB"):
        if count < 1024:
            return f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} GB"


def _text(key, value) -> str:
    if value is None:
        return "not counted" if key == "multiply_adds" else "no epoch completed"
    if key == "multiply_adds":
        return f"{value / 1e6:.2f} M"
    if key == "bytes":
        return format_bytes(value)
    if key.endswith("_params"):
        return f"{value:,}"
    return f"{value:.1f}" if key.startswith("seconds") else f"{value:.4f}"


def _figures(run) -> dict:
    dataset, seed = run.dataset, run.config.seed
    rows = {r.label: r.rows for r in run.results if r.rows}
    figures = {}
    if rows:
        figures["curves"] = visualize.curves(rows)
    if len(rows) > 2:
        figures["costs"] = visualize.accuracy_vs_cost(run.metrics["models"])
    figures["samples"] = visualize.image_grid(
        dataset.x_train, dataset.y_train, dataset.class_names, seed
    )
    chosen = visualize.stratified_sample(dataset.y_test, HEAT_MAP_IMAGES, seed)
    images = dataset.x_test[chosen]
    titles = [dataset.class_names[label] for label in dataset.y_test[chosen]]
    inputs, filters = transforms.to_unit_float(images), _first_filters(run)
    for result in run.results:
        model = result.classifier.model
        records = activations.capture(model, inputs)
        records = {k: v for k, v in records.items() if len(v.sizes) == 2}
        if not records:
            continue
        figures[f"heatmaps-{result.file.removesuffix('.keras')}"] = visualize.heat_maps(
            images, {name: record.heat_map for name, record in records.items()}, titles
        )
        if filters is not None and "words" not in figures:
            figures["words"] = _kernel_figure(next(iter(records.values())), filters)
    return figures


def _kernel_figure(record, filters):
    kernel = record.kernels[0, ..., 0]
    height, width, _ = kernel.shape
    positions = [
        (y, x) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)
    ]
    return visualize.compare_kernels(
        kernel.reshape(height, width, *record.window.kernel_size), filters, positions
    )


def _first_filters(run) -> np.ndarray | None:
    """Three filters of the models' first convolution larger than 1x1, (K, K, 3)."""
    for result in run.results:
        for layer in result.classifier.model.layers:
            if isinstance(layer, keras.layers.Conv2D) and layer.kernel.shape[0] > 1:
                return keras.ops.convert_to_numpy(layer.kernel)[:, :, 0, :3]
    return None
