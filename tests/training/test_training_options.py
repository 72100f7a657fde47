"""Options of training besides the recipe: fine-tuning, further epochs, early stopping, class
weights, augmentations, schedules, callbacks, event files."""

import importlib
import json

import keras
import numpy as np
import pytest
import yaml

from involution import models
from involution.data import datasets
from involution.data.transforms import to_unit_float
from involution.kernel_generators.attachment import layers_within
from involution.saving import classifier as classifiers
from involution.saving.classifier import Classifier
from involution.training import experiment, fine_tuning, report
from involution.training.augmentation import LAYERS, augment
from involution.training.experiment import Config, compare
from involution.training.optimizers import make_schedule
from involution.training.recipes import RECIPES, Recipe
from involution.training.search_space import SweepConfig
from involution.training.trainer import Trainer
from involution.utils.comparison import relative_error
from involution.utils.errors import InputError
from tests.support.images import write_folder
from tests.training.test_experiment import Recorder


def net(input_shape, classes):
    inputs = keras.Input(input_shape)
    x = keras.layers.Conv2D(4, 3, activation="relu")(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(classes, name="head")(x))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "pets")


@pytest.fixture
def train(folder, monkeypatch):
    """Returns a function that trains ``net``, without the report, and returns (run, lines)."""
    monkeypatch.setattr(report, "write", lambda *_: None)

    def run(output, resume=False, builder=net, progress=None, **options):
        progress = progress or Recorder()
        config = Config(str(folder), models="net", **{"batch_size": 12} | options)
        found = compare(config, output, progress, builders={"net": builder}, resume=resume)
        return found, progress.lines

    return run


def weights(result):
    return [keras.ops.convert_to_numpy(v) for v in result.classifier.model.variables]


@pytest.mark.parametrize("options", [{}, {"ema_momentum": 0.5, "validation_images": 3}])
def test_further_epochs_equal_a_longer_run(options, train, tmp_path):
    train(tmp_path / "a", epochs=1, **options)
    further, lines = train(tmp_path / "a", resume=True, epochs=3, **options)
    whole, _ = train(tmp_path / "b", epochs=3, **options)
    assert "net: training further, to 3 epochs." in lines
    for a, b in zip(weights(further.results[0]), weights(whole.results[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (tmp_path / "a" / "history.csv").read_text() == (
        tmp_path / "b" / "history.csv"
    ).read_text()
    # Neither the same nor fewer epochs train.
    again, lines = train(tmp_path / "a", resume=True, epochs=3, **options)
    assert not any("epoch" in line for line in lines)
    assert len(again.results[0].rows) == 3
    with pytest.raises(InputError, match="`epochs` was 3 and is 2"):
        train(tmp_path / "a", resume=True, epochs=2, **options)


@pytest.mark.any_backend
def test_further_epochs_require_the_final_state(train, tmp_path):
    train(tmp_path, epochs=1)
    for file in (tmp_path / "checkpoints").glob("final-*"):
        file.write_bytes(b"damaged")
    recorder = Recorder()
    with pytest.raises(InputError, match="must contain the intact state of the training"):
        train(tmp_path, progress=recorder, resume=True, epochs=2)
    assert any("The final state of net is corrupt and skipped: " in line for line in recorder.lines)


def test_a_run_killed_before_its_model_was_written_saves_the_averages(train, tmp_path, monkeypatch):
    options = {"epochs": 2, "ema_momentum": 0.5}
    whole, _ = train(tmp_path / "whole", **options)

    def die(*_):
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(experiment.RunState, "_write_model", die)
        with pytest.raises(OSError, match="killed"):
            train(tmp_path / "killed", **options)
    resumed, _ = train(tmp_path / "killed", resume=True, **options)
    for a, b in zip(weights(resumed.results[0]), weights(whole.results[0]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.any_backend
def test_early_stopping_saves_the_best_epoch(train, tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.75, 0.75, 0.25, 0.9])
    epochs = Trainer.epochs

    def with_accuracies(self, on_step):
        for row in epochs(self, on_step):
            yield row | {"test_accuracy": next(accuracies)}

    monkeypatch.setattr(Trainer, "epochs", with_accuracies)
    best = []
    write = experiment.RunState._write_model
    monkeypatch.setattr(
        experiment.RunState,
        "_write_model",
        lambda self, result: (best.append(weights(result)), write(self, result)),
    )
    run, lines = train(tmp_path, epochs=5, early_stopping=2, validation_images=6)
    (result,) = run.results
    assert (len(result.rows), result.best_epoch, len(best)) == (4, 2, 2)
    assert "net: stopped after epoch 4" in lines
    for a, b in zip(weights(result), best[1], strict=True):
        np.testing.assert_array_equal(a, b)
    saved = classifiers.load(tmp_path / "net.keras")
    for a, b in zip(saved.model.variables, best[1], strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(a), b)
    # The test images are those that did not choose the epoch.
    metrics = json.loads((tmp_path / "metrics.json").read_text())["models"]["net"]
    dataset = datasets.load(run.config.dataset)
    scores = saved.predict_proba(to_unit_float(dataset.x_test)).argmax(-1)
    assert metrics["final_test_accuracy"] == np.mean(scores == dataset.y_test)
    assert (metrics["best_epoch"], metrics["epochs"]) == (2, 4)
    # The metrics are those of the saved weights.
    assert metrics["test_accuracy"] == metrics["best_test_accuracy"] == 0.75
    assert metrics["train_loss"] == result.rows[1]["train_loss"]
    # It stays stopped.
    again, _ = train(tmp_path, resume=True, epochs=5, early_stopping=2, validation_images=6)
    assert len(again.results[0].rows) == 4


def test_early_stopping_with_averaged_weights_does_not_change_the_training(train, tmp_path):
    options = {"epochs": 2, "ema_momentum": 0.5, "validation_images": 6}
    stopping, _ = train(tmp_path / "a", early_stopping=5, **options)
    plain, _ = train(tmp_path / "b", **options)
    assert stopping.results[0].rows[-1]["train_loss"] == plain.results[0].rows[-1]["train_loss"]
    assert stopping.results[0].rows[-1]["test_loss"] == plain.results[0].rows[-1]["test_loss"]


@pytest.mark.any_backend
def test_early_stopping_requires_validation_images():
    with pytest.raises(InputError, match=r"requires `validation_images`.*early_stopping=2"):
        Config(early_stopping=2)
    with pytest.raises(InputError, match="`early_stopping` does not apply to a sweep"):
        SweepConfig(Config(models="cnn", early_stopping=2, validation_images=3), ("epochs=1,2",))


@pytest.mark.any_backend
def test_balanced_class_weights(tmp_path):
    write_folder(tmp_path, train=2)
    for name in ("ant", "bee"):
        write_folder(tmp_path, classes=(name,), train=8)
    dataset = datasets.load(str(tmp_path))
    trainer = Trainer(net((16, 16, 3), 3), dataset, Recipe(1e-3, class_weight="balanced"), 1, 0)
    (batch,) = trainer.batches(np.arange(18))
    counts = np.bincount(batch.labels, batch.weights)
    np.testing.assert_allclose(counts, [6, 6, 6], rtol=1e-6)
    smooth = Recipe(1e-3, class_weight="balanced", label_smoothing=0.3)
    (soft,) = Trainer(net((16, 16, 3), 3), dataset, smooth, 1, 0).batches(np.arange(18))
    expected = 0.7 * batch.weights + 0.1 * (2 * 6 / 8 + 6 / 2) / 1
    np.testing.assert_allclose(soft.weights, expected, rtol=1e-5)


def test_class_weights_are_in_the_loss(folder):
    """One step of plain gradient descent moves the bias by the weighted mean of the errors."""
    dataset = datasets.load(str(folder))
    labels = np.array([0] * 9 + [1] * 2 + [2], "int64")
    images = dataset.x_train[: len(labels)]
    dataset = datasets.dataclasses.replace(dataset, x_train=images, y_train=labels)
    moved = {}
    for class_weight in (None, "balanced"):
        model = net((16, 16, 3), 3)
        head = model.get_layer("head")
        for variable in head.variables:
            variable.assign(np.zeros(variable.shape))
        recipe = Recipe(1.0, optimizer="sgd", batch_size=12, class_weight=class_weight)
        Trainer(model, dataset, recipe, 1, 0).train(np.arange(12))
        moved[class_weight] = keras.ops.convert_to_numpy(head.bias) / 1.9
    counts = np.array([9, 2, 1])
    np.testing.assert_allclose(moved[None], (counts - 4) / 12, atol=1e-6)
    np.testing.assert_allclose(moved["balanced"], 0, atol=1e-6)


@pytest.mark.parametrize("names", [(), ("crop",), ("color",), ("mixup",), tuple(LAYERS)])
def test_augmentations_depend_on_their_key_only(names):
    random = np.random.default_rng(0)
    images = random.random((6, 8, 8, 3), "float32")
    labels = np.eye(3, dtype="float32")[[0, 1, 2, 0, 1, 2]]
    first, again, other = (augment(images, labels, names, (1, 2, key)) for key in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert first[0].dtype == np.float32
    assert 0 <= first[0].min() <= first[0].max() <= 1
    changed = np.abs(first[0] - images).max() > 1e-3
    assert changed == bool(names)
    assert bool(np.abs(first[0] - other[0]).max() > 1e-3) == bool(names)
    np.testing.assert_allclose(first[1].sum(axis=1), 1, rtol=1e-6)
    assert (np.abs(first[1] - labels).max() > 1e-3) == ("mixup" in names)


def test_augmented_training_resumes_exactly(train, tmp_path):
    options = {"epochs": 2, "augmentations": "flip,crop,color,mixup"}
    plain, _ = train(tmp_path / "plain", epochs=2)
    whole, _ = train(tmp_path / "whole", **options)
    train(tmp_path / "parts", **options | {"epochs": 1})
    parts, _ = train(tmp_path / "parts", resume=True, **options)
    for a, b in zip(weights(parts.results[0]), weights(whole.results[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = [run.results[0].rows[0] for run in (plain, whole)]
    assert rows[0]["train_loss"] != rows[1]["train_loss"]


@pytest.mark.any_backend
def test_unknown_augmentations_are_rejected():
    with pytest.raises(InputError, match="comma-separated list of flip, crop, color, mixup"):
        Config(augmentations="flip,blur")
    assert RECIPES["one-cycle"].augmentation_names == ("flip",)
    assert Recipe(1e-3, augmentations="flip,crop").augmentation_names == ("flip", "crop")


@pytest.mark.parametrize("warmup", [None, 0.0, 0.2])
@pytest.mark.parametrize("schedule", [None, "constant", "cosine", "linear"])
def test_schedules(schedule, warmup):
    recipe = Recipe(0.5, schedule=schedule, warmup_fraction=warmup, warmup_start_factor=0.1)
    rate = make_schedule(recipe, 100)
    found = [float(rate(step)) if callable(rate) else rate for step in range(100)]
    start = int(100 * (warmup or 0))
    progress = np.arange(100 - start) / (100 - start)
    expected = {
        "constant": np.full(100 - start, 0.5),
        "cosine": 0.25 * (1 + np.cos(np.pi * progress)),
        "linear": 0.5 * (1 - progress),
    }[schedule or ("constant" if warmup is None else "cosine")]
    np.testing.assert_allclose(found[start:], expected, atol=1e-6)
    rise = 0.05 + 0.45 * np.arange(start) / max(start, 1)
    np.testing.assert_allclose(found[:start], rise, atol=1e-6)


@pytest.mark.any_backend
def test_callbacks_of_a_file_and_of_a_module(train, tmp_path, monkeypatch):
    code = """
import keras
events = []
class Own(keras.callbacks.Callback):
    def on_train_begin(self, logs=None): events.append("begin")
    def on_epoch_begin(self, epoch, logs=None): events.append(epoch)
    def on_epoch_end(self, epoch, logs=None):
        events.append(sorted(logs))
        self.model.stop_training = epoch == 1
    def on_train_end(self, logs=None): events.append("end")
def make(label):
    events.append(label)
    return [Own()]
def fail(label):
    class Failing(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None): raise RuntimeError("no disk")
    return [Failing()]
def wrong(label): return [print]
def raising(label): raise RuntimeError("no\\n logger")
def nothing(label): pass
def large(label): raise MemoryError
"""
    (tmp_path / "own_callbacks.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    metrics = ["accuracy", "loss", "seconds", "val_accuracy", "val_loss"]
    expected = ["net", "begin", 0, metrics, 1, metrics, "end"]
    for number, spec in enumerate((f"{tmp_path}/own_callbacks.py:make", "own_callbacks:make")):
        run, lines = train(tmp_path / str(number), epochs=4, callbacks=spec)
        assert len(run.results[0].rows) == 2
        assert "net: stopped after epoch 2" in lines
    assert importlib.import_module("own_callbacks").events == expected
    for name, message in (
        ("own_callbacks:fail", r"must not raise\. Received: on_epoch_end: RuntimeError: no disk"),
        ("own_callbacks:wrong", "`callbacks` must return Keras callbacks"),
        ("own_callbacks:raising", r"must return a list.*raising: RuntimeError: no logger"),
        ("own_callbacks:nothing", r"must return a list.*nothing: TypeError: "),
        ("own_callbacks:none", "must name a function that can be imported"),
        ("make", "must be FILE.py:FUNCTION or MODULE:FUNCTION"),
    ):
        with pytest.raises(InputError, match=message):
            train(tmp_path / name.replace(":", "-"), epochs=1, callbacks=name)
    with pytest.raises(MemoryError):
        train(tmp_path / "large", epochs=1, callbacks="own_callbacks:large")


@pytest.mark.any_backend
def test_a_failing_callback_does_not_hide_an_interruption(train, tmp_path, monkeypatch):
    code = """
import keras
class Own(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None): raise KeyboardInterrupt
    def on_train_end(self, logs=None): raise RuntimeError("no disk")
def make(label): return [Own()]
"""
    (tmp_path / "own_callbacks.py").write_text(code)
    run, _ = train(tmp_path / "run", epochs=2, callbacks=f"{tmp_path}/own_callbacks.py:make")
    assert run.exit_code == 130
    assert len(run.results[0].rows) == 1


class Doubled(keras.layers.Layer):
    """A layer of the user's, not registered."""

    def build(self, input_shape):
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, inputs):
        return 2 * self.scale * inputs


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "layer", [Doubled, lambda: keras.layers.Normalization(mean=0.5, variance=0.1)]
)
def test_models_with_layers_that_predict_refuses_finish_and_resume(layer, train, tmp_path):
    def builder(input_shape, classes):
        model = net(input_shape, classes)
        return keras.Sequential([keras.Input(input_shape), layer(), model])

    options = {"epochs": 2, "early_stopping": 1, "validation_images": 6}
    run, _ = train(tmp_path, builder=builder, **options)
    again, _ = train(tmp_path, resume=True, builder=builder, **options)
    for a, b in zip(weights(run.results[0]), weights(again.results[0]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.any_backend
def test_event_files_have_the_metrics_of_each_epoch(train, tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    run, _ = train(tmp_path, epochs=2, tensorboard=True)
    (file,) = (tmp_path / "tensorboard" / "net").iterdir()
    content, events = file.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    found = {(v.tag, event.step): v.simple_value for event in events for v in event.summary.value}
    for row in run.results[0].rows:
        assert found["val_accuracy", row["epoch"]] == np.float32(row["test_accuracy"])
        assert found["loss", row["epoch"]] == np.float32(row["train_loss"])


@pytest.mark.any_backend
def test_config_yaml_repeats_the_run(train, tmp_path):
    run, _ = train(tmp_path, epochs=1, image_size=(16, 16), augmentations="flip")
    options = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert options == {
        "dataset": run.config.dataset,
        "models": "net",
        "epochs": 1,
        "batch-size": 12,
        "seed": 42,
        "image-size": "16x16",
        "precision": "float32",
        "recipe": "example",
        "augmentations": "flip",
        "backend": keras.config.backend(),
    }


@pytest.mark.any_backend
def test_split_csv_lists_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write", lambda *_: None)
    root = write_folder(tmp_path / "x", test=0) / "train"
    config = Config(str(root), models="net", epochs=1, split=0.25)
    compare(config, tmp_path / "run", builders={"net": net})
    lines = (tmp_path / "run" / "split.csv").read_text().splitlines()
    assert lines[0] == "split,file"
    assert sum(line.startswith("test,") for line in lines) == 6
    assert sum(line.startswith("train,") for line in lines) == 18
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    assert described["split"] == 0.25
    assert described["images_by_class"] == {
        name: {"train": 6, "test": 2} for name in ("ant", "bee", "cat")
    }


@pytest.mark.any_backend
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("classes", [3, 5])
def test_trained_models_start_training_with_a_new_head(classes, softmax, tmp_path):
    model = net((16, 16, 3), 3)
    if softmax:
        model = keras.Model(model.inputs, keras.layers.Softmax()(model.outputs[0]))
    path = tmp_path / "own.keras"
    Classifier(model, ("a", "b", "c"), (16, 16, 3)).save(path)
    builder = fine_tuning.builder(str(path))
    built = builder(input_shape=(16, 16, 3), classes=classes)
    assert built.output_shape == (None, classes)
    assert isinstance(built.layers[-1], keras.layers.Softmax) == softmax
    for layer in model.layers:
        if layer.name != "head" or classes == 3:
            for a, b in zip(layer.variables, built.get_layer(layer.name).variables, strict=True):
                np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (a, b)))
    again = tmp_path / "again.keras"
    Classifier(built, tuple("abcde"[:classes]), (16, 16, 3)).save(again)
    assert classifiers.load(again).model.output_shape == (None, classes)


@pytest.mark.any_backend
def test_trained_models_are_refused_with_a_reason(tmp_path):
    inputs = keras.Input((16, 16, 3))
    outputs = keras.layers.GlobalAveragePooling2D()(inputs)
    path = tmp_path / "own.keras"
    Classifier(keras.Model(inputs, outputs), ("a", "b", "c"), (16, 16, 3)).save(path)
    builder = fine_tuning.builder(str(path))
    with pytest.raises(InputError, match=r"must be Dense, to be replaced.*GlobalAveragePooling2D"):
        builder(input_shape=(16, 16, 3), classes=5)
    assert builder(input_shape=(16, 16, 3), classes=3).output_shape == (None, 3)
    pretrained = fine_tuning.builder("inn-cifar10")
    with pytest.raises(InputError, match=r"the size of the trained model, 32x32.*Received: 16x16"):
        pretrained(input_shape=(16, 16, 3), classes=5)
    assert pretrained(input_shape=(32, 32, 3), classes=5).output_shape == (None, 5)


@pytest.mark.any_backend
def test_size_of_the_images_of_a_trained_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fine_tuning.image_size("inn-cifar10") == (32, 32)
    assert fine_tuning.is_trained("inn-cifar10")
    # A local folder has precedence.
    (tmp_path / "inn-cifar10").mkdir()
    assert fine_tuning.image_size("inn-cifar10") is None
    assert not fine_tuning.is_trained("inn-cifar10")


@pytest.mark.any_backend
@pytest.mark.parametrize("name", models.pretrained.available())
def test_pretrained_models_can_be_fine_tuned(name):
    built = fine_tuning.builder(name)(input_shape=(32, 32, 3), classes=4)
    assert built.output_shape == (None, 4)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("spec", ["file", "inn-cifar10"])
def test_trained_models_get_the_precision_of_the_run(spec, policy, tmp_path):
    if spec == "file":
        spec = str(tmp_path / "other.keras")
        other = {"float32": "mixed_bfloat16", "mixed_bfloat16": "float32"}[policy]
        keras.config.set_dtype_policy(other)
        try:
            model = models.inn(input_shape=(32, 32, 3), classes=10)
        finally:
            keras.config.set_dtype_policy("float32")
        model.save(spec)
    keras.config.set_dtype_policy(policy)
    try:
        found = fine_tuning.builder(spec)(input_shape=(32, 32, 3), classes=10)
    finally:
        keras.config.set_dtype_policy("float32")
    layers = [
        layer for layer in layers_within(found) if not isinstance(layer, keras.layers.InputLayer)
    ]
    assert {layer.dtype_policy.name for layer in layers} == {policy}
    trained = classifiers.load_model(classifiers.resolve(spec))
    for a, b in zip(found.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    x = np.random.default_rng(0).random((2, 32, 32, 3), "float32")
    y, expected = (
        keras.ops.convert_to_numpy(keras.ops.cast(m(x), "float32")) for m in (found, trained)
    )
    assert relative_error(y, expected) < 0.05
