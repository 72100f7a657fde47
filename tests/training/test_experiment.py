import csv
import json
import pathlib
import shlex
import shutil
import signal
import sys
import types

import keras
import numpy as np
import pytest

from involution import Involution2D, models
from involution.data import datasets, transforms
from involution.models import specs
from involution.saving import classifier as classifiers
from involution.training import checkpoint, experiment, fine_tuning, report
from involution.training.experiment import Config, compare
from involution.training.run_folder import check_folder, is_resumable
from involution.utils.errors import InputError
from involution.utils.progress import NullProgress
from tests.support.backends import numpy
from tests.support.images import write_folder, write_image

pytestmark = pytest.mark.any_backend

FILES = {
    ".lock",
    "config.json",
    "config.yaml",
    "history.csv",
    "metrics.json",
    "report.html",
    "curves.png",
    "samples.png",
    "words.png",
    "heatmaps-inn.png",
    "cnn.keras",
    "inn.keras",
    "checkpoints",
}


class Recorder(NullProgress):
    def __init__(self):
        self.lines, self.steps, self.totals = [], 0, []

    def log(self, text):
        self.lines.append(text)

    def begin(self, label, total, done=0, first=""):
        self.totals.append((label, total))

    def advance(self):
        self.steps += 1


@pytest.fixture
def skip_reports(monkeypatch):
    """A report takes longer than these runs; test_report.py tests it."""
    monkeypatch.setattr(report, "write", lambda *_: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "pets")


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """(run, folder, progress) of a short run of both models."""
    output = tmp_path_factory.mktemp("run") / "new" / "folder"
    console = Recorder()
    config = Config(str(folder), epochs=2, batch_size=10)
    return compare(config, output, console, command="involution compare"), output, console


@pytest.mark.long
def test_run_writes_its_files(run):
    _, output, _ = run
    assert {f.name for f in output.iterdir()} == FILES


def test_metrics_json(run):
    _, output, _ = run
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["dataset"] == "pets"
    assert metrics["backend"] == keras.config.backend()
    inn = metrics["models"]["inn"]
    assert set(inn) >= {
        "trainable_params",
        "non_trainable_params",
        "optimizer_params",
        "total_params",
        "bytes",
        "train_accuracy",
        "train_loss",
        "test_accuracy",
        "test_loss",
        "best_test_accuracy",
        "seconds_per_epoch",
        "seconds",
    }
    assert inn["non_trainable_params"] == 6
    assert inn["optimizer_params"] == 2 * inn["trainable_params"] + 2
    assert inn["total_params"] == 6 + 3 * inn["trainable_params"] + 2
    # The optimizer's step counter has 4 or 8 bytes.
    assert inn["bytes"] - 4 * inn["total_params"] in (0, 4)
    assert inn["seconds"] >= inn["seconds_per_epoch"] > 0


def test_history_has_every_epoch(run):
    result, output, _ = run
    rows = list(csv.DictReader((output / "history.csv").read_text().splitlines()))
    assert [(r["model"], r["epoch"]) for r in rows] == [
        ("cnn", "1"),
        ("cnn", "2"),
        ("inn", "1"),
        ("inn", "2"),
    ]
    assert float(rows[-1]["test_loss"]) == result.metrics["models"]["inn"]["test_loss"]


def test_progress_advances_every_step(run):
    _, _, console = run
    # 24 training and 12 test images in batches of 10, two epochs; 36 files are read first.
    assert console.totals == [("reading images", 36), ("cnn", 10), ("inn", 10)]
    assert console.steps == 36 + 20
    assert sum("epoch 2/2" in line for line in console.lines) == 2


def test_metrics_are_means_over_all_images(run, folder):
    """Recomputes the last row's test metrics from the saved model with NumPy."""
    result, output, _ = run
    loaded = classifiers.load(output / "cnn.keras")
    dataset = datasets.load(str(folder))
    scores = loaded.predict_proba(transforms.to_unit_float(dataset.x_test))
    label_scores = scores[np.arange(12), dataset.y_test]
    metrics = result.metrics["models"]["cnn"]
    assert metrics["test_loss"] == pytest.approx(-np.log(label_scores).mean(), rel=1e-4)
    assert metrics["test_accuracy"] == pytest.approx(
        (scores.argmax(-1) == dataset.y_test).mean(), abs=1e-6
    )


@pytest.mark.long
def test_bfloat16_computes_with_float32_weights(folder, tmp_path):
    config = Config(str(folder), epochs=1, batch_size=10, precision="bfloat16")
    result = compare(config, tmp_path / "run")
    assert keras.config.dtype_policy().name == "float32"
    for trained in result.results:
        model = trained.classifier.model
        assert {layer.compute_dtype for layer in model.layers if layer.weights} == {"bfloat16"}
        assert {v.dtype for v in model.variables if "seed" not in v.path} == {"float32"}
        assert all(np.isfinite(row["test_loss"]) for row in trained.rows)
    assert {f.name for f in (tmp_path / "run").iterdir()} == FILES
    assert json.loads((tmp_path / "run" / "config.json").read_text())["precision"] == "bfloat16"
    loaded = classifiers.load(tmp_path / "run" / "inn.keras")
    scores = loaded.predict_proba(transforms.to_unit_float(datasets.load(str(folder)).x_test))
    np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-5)


def test_unknown_precision_is_rejected():
    with pytest.raises(InputError, match=r"one of float32, bfloat16\. Received: float16"):
        Config(precision="float16")


@pytest.mark.long
def test_equal_seeds_give_equal_history(run, folder, tmp_path, skip_reports):
    _, output, _ = run
    again = compare(Config(str(folder), epochs=2, batch_size=10), tmp_path / "again")
    assert (tmp_path / "again" / "history.csv").read_bytes() == (
        output / "history.csv"
    ).read_bytes()
    other = compare(Config(str(folder), "cnn", 2, 10, seed=1), tmp_path / "other")
    assert other.results[0].rows[0]["train_loss"] != again.results[0].rows[0]["train_loss"]


@pytest.mark.long
def test_training_is_independent_of_earlier_models(run, folder, tmp_path, skip_reports):
    result, _, _ = run
    single = compare(Config(str(folder), "inn", 2, 10), tmp_path / "single")
    expected = {k: v for k, v in result.results[1].rows[-1].items() if k != "seconds"}
    assert {k: v for k, v in single.results[0].rows[-1].items() if k != "seconds"} == expected


@pytest.mark.long
def test_classifier_preprocessing_equals_training(run, folder):
    _, output, _ = run
    classifier = classifiers.load(output / "inn.keras")
    assert classifier.class_names == ("ant", "bee", "cat")
    dataset = datasets.load(str(folder))
    read = classifier.read(folder / "test" / "bee" / "2.png")
    np.testing.assert_array_equal(read, transforms.to_unit_float(dataset.x_test[6:7]))


def test_saved_model_has_no_optimizer(run):
    _, output, _ = run
    model = keras.saving.load_model(output / "inn.keras")
    assert getattr(model, "optimizer", None) is None
    assert [layer.name for layer in model.layers if "inv" in layer.name] == [
        "inv_1",
        "inv_2",
        "inv_3",
    ]


@pytest.mark.long
def test_interrupted_run_writes_the_report(folder, tmp_path):
    class Interrupting(Recorder):
        def advance(self):
            super().advance()
            if self.steps == 36 + 10 + 7:  # in the second epoch of the second model
                raise KeyboardInterrupt

    output = tmp_path / "run"
    result = compare(Config(str(folder), "cnn,inn", 2, 10), output, Interrupting())
    assert result.interrupted
    assert {f.name for f in output.iterdir()} == FILES
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["interrupted"] is True
    assert [m["epochs"] for m in metrics["models"].values()] == [2, 1]
    assert "was interrupted" in (output / "report.html").read_text()


@pytest.mark.long
def test_ctrl_c_takes_effect_after_the_current_step(folder, tmp_path):
    class SendSigint(Recorder):
        def advance(self):
            super().advance()
            if self.steps == 40:
                signal.raise_signal(signal.SIGINT)
                self.after = self.steps

    console = SendSigint()
    before = signal.getsignal(signal.SIGINT)
    result = compare(Config(str(folder), epochs=2, batch_size=10), tmp_path / "run", console)
    assert result.interrupted
    assert console.steps == console.after == 40
    assert any("repeat to stop immediately" in line for line in console.lines)
    assert (tmp_path / "run" / "report.html").is_file()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.long
def test_divergence_stops_the_run_and_is_reported(folder, tmp_path):
    def broken(input_shape, classes):
        model = models.inn(input_shape, classes)
        model.set_weights([np.full_like(w, np.nan) for w in model.get_weights()])
        return model

    config = Config(str(folder), epochs=1, batch_size=12)
    builders = {"cnn": models.cnn, "inn": broken, "never": models.cnn}
    result = compare(config, tmp_path / "run", builders=builders)
    assert "Received: nan at step 1, in epoch 1; weights: " in result.failure
    assert result.failure.endswith("; the last checkpoint is number 3")
    assert " not finite" in result.failure
    assert [len(trained.rows) for trained in result.results] == [1, 0]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["failure"] == result.failure
    assert metrics["models"]["inn"]["train_loss"] is None
    assert "This run was stopped." in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.long
def test_run_with_non_square_windows(folder, tmp_path):
    def oblong(input_shape, classes):
        inputs = keras.Input(input_shape)
        x = Involution2D((3, 5), reduction_ratio=1)(inputs)
        x = keras.layers.Conv2D(4, 3)(x)
        x = keras.layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, keras.layers.Dense(classes)(x))

    config = Config(str(folder), epochs=1, batch_size=12)
    compare(config, tmp_path / "run", builders={"oblong": oblong})
    assert (tmp_path / "run" / "words.png").is_file()


@pytest.mark.long
def test_interruption_before_the_first_epoch(folder, tmp_path):
    class InterruptFirstStep(Recorder):
        def advance(self):
            super().advance()
            if self.steps == 37:
                raise KeyboardInterrupt

    result = compare(Config(str(folder), "inn", 2, 10), tmp_path / "run", InterruptFirstStep())
    assert result.interrupted
    page = (tmp_path / "run" / "report.html").read_text()
    assert "no epoch completed" in page
    assert "0 of 1 models completed an epoch" in page


def custom_model(input_shape, classes, width=4):
    inputs = keras.Input(input_shape)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(width, 3)(inputs))
    return keras.Model(inputs, keras.layers.Dense(classes)(x))


class Subclassed(keras.Model):
    def __init__(self, classes):
        super().__init__()
        self.flatten, self.dense = keras.layers.Flatten(), keras.layers.Dense(classes)

    def call(self, inputs):
        return self.dense(self.flatten(inputs))


@pytest.mark.long
def test_custom_models_from_builders_and_files(folder, tmp_path, monkeypatch):
    config = Config(str(folder), epochs=1, batch_size=12)
    result = compare(config, tmp_path / "object", builders={"mine": custom_model})
    file = tmp_path / "own.py"
    file.write_text(
        "import keras\n"
        "def small(input_shape, classes, width=2):\n"
        "    return keras.Sequential([keras.Input(input_shape), keras.layers.Flatten(),\n"
        "        keras.layers.Dense(width), keras.layers.Dense(classes)])\n"
    )
    label = f"{file}:small:width=3"
    with monkeypatch.context() as patch:
        patch.setattr(report, "write", lambda *_: None)
        from_file = compare(Config(str(folder), f"cnn,{label}", 1, 12), tmp_path / "file")
    assert result.metrics["models"]["mine"]["trainable_params"] == 4 * 28 + 3 * 5
    expected = 16 * 16 * 3 * 3 + 3 + 3 * 3 + 3
    assert from_file.metrics["models"][label]["trainable_params"] == expected
    assert (tmp_path / "file" / from_file.results[1].file).is_file()
    assert (
        "None of these models has an involution layer"
        in (tmp_path / "object" / "report.html").read_text()
    )


def test_model_spec_options():
    builders = specs.parse("cnn, inn:kernel_size=5:kernel_generator=linear")
    model = builders["inn:kernel_size=5:kernel_generator=linear"]((8, 8, 3), 10)
    assert model.get_layer("inv_1").kernel_size == (5, 5)
    assert type(model.get_layer("inv_1").kernel_generator).__name__ == "Linear"


def test_path_of_a_trained_model_may_contain_commas(tmp_path):
    file = tmp_path / "a,b" / "net.keras"
    file.parent.mkdir()
    custom_model((8, 8, 3), 2).save(file)
    (built,) = specs.parse(str(file), fine_tuning.builder).values()
    assert built((8, 8, 3), 2).output_shape == (None, 2)
    # Longer than a path may be.
    many = [f"inn:head=convolutional:kernel_size={2 * n + 1}" for n in range(20)]
    assert list(specs.parse(",".join(many), fine_tuning.builder)) == many


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("resnet", r"one of cnn, inn, .* or a Python file. Received: resnet"),
        ("", "Received: none"),
        ("cnn,cnn", "must be unique"),
        ("inn:a=1", r"must be one of kernel_size, .*Received: a=1"),
        ("inn:kernel_size", "Received: kernel_size"),
        ("missing.py:f", "must exist. Received: missing.py"),
    ],
)
def test_invalid_model_spec_is_rejected(text, match):
    with pytest.raises(InputError, match=match):
        specs.parse(text)


def test_model_specs_whose_files_could_not_be_written_are_rejected(tmp_path):
    own = "def tiny(input_shape, classes): pass\ndef Tiny(input_shape, classes): pass\n"
    (tmp_path / "own.py").write_text(own)
    with pytest.raises(InputError, match="unique file names, whatever their case"):
        specs.parse(f"{tmp_path}/own.py:tiny,{tmp_path}/own.py:Tiny")
    folder = tmp_path / ("가" * 60)
    folder.mkdir()
    (folder / "own.py").write_text(own)
    with pytest.raises(InputError, match=r"must have at most 194 bytes\. Received: .*own\.py:tiny"):
        specs.parse(f"{folder}/own.py:tiny")


def test_model_file_without_builder_is_rejected(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("x = 1\n")
    with pytest.raises(InputError, match="must define build"):
        specs.parse(str(file))
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(InputError, match="nothing_of_that_name"):
        specs.parse(f"{file}:f")


def test_model_file_with_dataclass_and_colon_in_name(tmp_path):
    file = tmp_path / "a:b.py"
    file.write_text(
        "from __future__ import annotations\nimport dataclasses\n"
        "@dataclasses.dataclass\nclass Sizes:\n    width: int = 3\n"
        "def f(input_shape, classes, width=1):\n    return (Sizes().width, classes, width)\n"
    )
    (builder,) = specs.parse(f"{file}:f:width=2").values()
    assert builder(None, 7) == (3, 7, 2)


def test_model_files_import_sibling_modules(tmp_path, monkeypatch):
    """Each file imports modules from its own folder, at import and when it builds a model."""
    for folder in ("a", "b"):
        (tmp_path / folder / "parts").mkdir(parents=True)
        (tmp_path / folder / "blocks.py").write_text(f"WHERE = {folder!r}\n")
        (tmp_path / folder / "late.py").write_text("import blocks\nWHERE = blocks.WHERE\n")
        (tmp_path / folder / "parts" / "deep.py").write_text("import blocks\nW = blocks.WHERE\n")
        (tmp_path / folder / "own.py").write_text(
            "import blocks, parts.deep\n"
            "def build(input_shape, classes, width=1):\n"
            "    import late, blocks as again\n"
            "    return blocks is again, blocks.WHERE, late.WHERE, parts.deep.W, width\n"
        )
    # Packages in a virtual environment inside the folder are imported once.
    installed = tmp_path / "a" / ".venv" / "installed_once.py"
    installed.parent.mkdir()
    installed.write_text("")
    monkeypatch.syspath_prepend(str(installed.parent))
    with open(tmp_path / "a" / "own.py", "a") as file:
        file.write("import installed_once\n")
    before = list(sys.path)
    monkeypatch.chdir(tmp_path / "b")
    builders = specs.parse(f"{tmp_path}/a/own.py,own.py:build:width=3")
    for _ in range(2):
        found = [build(None, 2) for build in builders.values()]
        assert found == [(True, "a", "a", "a", 1), (True, "b", "b", "b", 3)]
    assert sys.path == before
    assert sys.modules["installed_once"].__file__ == str(installed)
    assert "installed_once" not in specs._imported[f"{tmp_path}/a"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("import sys\nsys.exit(7)", ", which exits with 7"),
        ("raise ValueError('two\\nlines')", ": ValueError: two lines"),
        ("raise KeyError", ": KeyError"),
        (
            "import sys\nsys.path.clear()\nimport blocks_of_none",
            ": ModuleNotFoundError: No module named 'blocks_of_none'",
        ),
    ],
)
def test_model_file_that_raises_is_rejected(content, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own.py").write_text(content)
    with pytest.raises(InputError) as caught:
        specs.parse(str(tmp_path / "own.py"))
    assert str(caught.value) == f"A Python file must run. Received: {tmp_path}/own.py{reason}"


def test_out_of_memory_in_a_model_file_is_not_an_invalid_input(tmp_path):
    (tmp_path / "own.py").write_text("raise MemoryError")
    with pytest.raises(MemoryError):
        specs.parse(str(tmp_path / "own.py"))


def test_model_spec_that_is_not_utf8_is_rejected():
    with pytest.raises(InputError) as caught:
        specs.parse("cnn,caf\udce9.py")
    assert str(caught.value) == (
        "A model spec must be valid UTF-8, the encoding of reports. Received: cnn,caf\\udce9.py"
    )


def test_command_line_is_quoted_for_the_shell(monkeypatch):
    words = ("involution", pathlib.Path("a b/$x's.keras"), pathlib.Path("-x"), "-y", "z")
    line = specs.command_line(*words)
    assert shlex.split(line) == ["involution", "a b/$x's.keras", "./-x", "-y", "z"]
    assert specs.command_line("a", pathlib.Path("b/c.keras")) == "a b/c.keras"
    monkeypatch.setattr(specs, "os", types.SimpleNamespace(name="nt", sep="\\"))
    assert specs.command_line(*words) == ("""involution "a b/$x's.keras" .\\-x -y z""")


def test_floatx_other_than_float32_is_rejected(run, folder, tmp_path):
    """Inputs would have that dtype, while config.json records float32."""
    classifier = run[0].results[0].classifier
    try:
        for floatx in ("float16", "bfloat16", "float64"):
            keras.config.set_floatx(floatx)
            with pytest.raises(InputError, match=rf"be float32; .*Received: floatx={floatx}$"):
                compare(Config(str(folder)), tmp_path / "run")
            with pytest.raises(InputError, match=f"Received: floatx={floatx}$"):
                classifier.predict_proba(np.zeros((1, 16, 16, 3), "float32"))
    finally:
        keras.config.set_floatx("float32")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_keras_settings_are_recorded_and_checked_on_resume(run, folder, tmp_path, skip_reports):
    _, output, _ = run
    config = Config(str(folder), epochs=2, batch_size=10)
    expected = {"floatx": "float32", "epsilon": 1e-7, "image_data_format": "channels_last"}
    assert json.loads((output / "config.json").read_text())["keras"] == expected
    shutil.copytree(output, tmp_path / "run")
    try:
        keras.config.set_epsilon(1e-5)
        with pytest.raises(InputError, match=r"Received: Keras's epsilon was 1e-07 and is 1e-05$"):
            compare(config, tmp_path / "run", resume=True)
        # Checkpoints of early releases lack these settings.
        store = checkpoint.CheckpointManager(tmp_path / "run")
        saved = store.latest(print)
        identity = saved.state["identity"]
        for name in expected:
            del identity[f"Keras's {name}"]
        store.save(saved.arrays, saved.state)
        again = compare(config, tmp_path / "run", resume=True)
    finally:
        keras.config.set_epsilon(1e-7)
    assert [len(result.rows) for result in again.results] == [2, 2]


def test_skipped_images_are_reported(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "pets")
    (tmp_path / "pets" / "train" / "ant" / "x.ppm").write_bytes(b"")
    console = Recorder()
    description = experiment.load(Config(str(tmp_path / "pets")), console).description
    assert description.endswith(f": 1 in .ppm format, such as {tmp_path}/pets/train/ant/x.ppm.")
    counts = "ant 8 + 4, bee 8 + 4, cat 8 + 4"
    assert console.lines == [description, f"Images by class, train + test: {counts}."]


@pytest.mark.long
@pytest.mark.parametrize(
    ("builder", "match"),
    [
        (lambda input_shape, classes: 3, "int, not a Keras model"),
        (lambda input_shape, classes: custom_model(input_shape, 7), r"shape \(None, 7\)"),
        (lambda input_shape, classes: 1 / 0, "division by zero"),
        (lambda input_shape, classes: Subclassed(classes), "neither functional nor Sequential"),
    ],
)
def test_unsuitable_model_is_rejected_before_writing(folder, tmp_path, builder, match):
    with pytest.raises(InputError, match=match):
        compare(Config(str(folder)), tmp_path / "run", builders={"mine": builder})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("epochs", 0), ("batch_size", -1), ("seed", -1), ("seed", 2**32), ("learning_rate", 0.0)],
)
def test_option_out_of_range_is_rejected(option, value):
    with pytest.raises(InputError, match=f"`{option}` must be .*Received: {value}"):
        Config(**{option: value})


def test_config_takes_what_it_omits_from_its_recipe():
    config = Config(recipe="imagenet")
    assert (config.epochs, config.image_size) == (130, (224, 224))
    config = Config(recipe="imagenet", epochs=2, image_size=(8, 9))
    assert (config.epochs, config.image_size) == (2, (8, 9))
    assert (Config().epochs, Config().image_size) == (20, None)


def test_unusable_output_folder_is_rejected(folder, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("kept")
    for output, match in (
        (tmp_path / "file" / "x", "writable"),
        (tmp_path / "file", "new or empty"),
        (tmp_path / "used", "new or empty"),
    ):
        with pytest.raises(InputError, match=match):
            compare(Config(str(folder)), output)
    assert (tmp_path / "used" / "x").read_text() == "kept"
    # A file of the desktop does not make a folder a run's.
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".DS_Store").write_text("")
    check_folder(tmp_path / "new")
    assert not is_resumable(tmp_path / "new")


def test_invalid_classifier_file_is_rejected(tmp_path):
    (tmp_path / "x.keras").write_bytes(b"no zip")
    plain = custom_model((8, 8, 3), 2)
    plain.save(tmp_path / "plain.keras")
    for name, match in (
        ("missing.keras", "missing.keras, which does not exist"),
        ("x.keras", "written by `involution compare` or `train`"),
        ("plain.keras", "written by `involution compare` or `train`"),
    ):
        with pytest.raises(InputError, match=match):
            classifiers.load(tmp_path / name)


def test_predict_proba_is_the_softmax_of_logits(tmp_path):
    classifier = classifiers.Classifier(custom_model((8, 8, 3), 3), ("a", "b", "c"), (8, 8, 3))
    write_image(tmp_path / "x.png", size=(20, 30))
    image = classifier.read(tmp_path / "x.png")
    scores = classifier.predict_proba(image)
    logits = numpy(classifier.model(image)).astype("float64")
    np.testing.assert_allclose(scores, np.exp(logits) / np.exp(logits).sum(), rtol=1e-5)


@pytest.mark.long
def test_a_run_records_whether_its_models_return_probabilities(folder, tmp_path, skip_reports):
    def with_softmax(input_shape, classes):
        model = custom_model(input_shape, classes)
        return keras.Model(model.input, keras.layers.Softmax()(model.outputs[0]))

    builders = {"plain": custom_model, "softmax": with_softmax}
    compare(Config(str(folder), epochs=1, batch_size=12), tmp_path / "run", builders=builders)
    write_image(tmp_path / "x.png", size=(20, 30))
    loaded = {name: classifiers.load(tmp_path / "run" / f"{name}.keras") for name in builders}
    assert {name: each.outputs for name, each in loaded.items()} == {
        "plain": "logits",
        "softmax": "probabilities",
    }
    image = loaded["softmax"].read(tmp_path / "x.png")
    np.testing.assert_allclose(
        loaded["softmax"].predict_proba(image), numpy(loaded["softmax"].model(image)), rtol=1e-6
    )
    # Both models have the same weights and the same loss.
    np.testing.assert_allclose(
        loaded["softmax"].predict_proba(image), loaded["plain"].predict_proba(image), rtol=1e-4
    )
