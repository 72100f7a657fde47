"""Recipes and the trainer: optimizers, augmentation, validation images, exact resumption."""

import dataclasses
import json

import keras
import numpy as np
import pytest

from involution.data import datasets, transforms
from involution.training import experiment, report
from involution.training.optimizers import make_optimizer
from involution.training.recipes import RECIPES, Recipe, stored
from involution.training.trainer import METRICS, Trainer
from involution.utils.errors import InputError
from tests.support.backends import numpy
from tests.support.images import write_folder


def dataset(count=10):
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (count, 4, 5, 3)).astype("uint8")
    return datasets.Dataset(
        "noise", "", x, np.arange(count) % 2, x[:3], np.arange(3) % 2, ("a", "b")
    )


def network():
    layers = keras.layers
    return keras.Sequential(
        [keras.Input((4, 5, 3)), layers.Flatten(), layers.Dense(2), layers.BatchNormalization()]
    )


@pytest.mark.long
def test_one_cycle_learning_rate():
    optimizer = make_optimizer(RECIPES["one-cycle"], 100)
    rates = []
    for step in range(101):
        optimizer.iterations.assign(step)
        rates.append(float(numpy(optimizer.learning_rate)))
    assert rates[0] == pytest.approx(0.018 / 25)
    assert int(np.argmax(rates)) == 25
    assert rates[25] == pytest.approx(0.018)
    assert rates[100] == pytest.approx(0, abs=1e-9)
    assert (np.diff(rates[:26]) > 0).all()
    assert (np.diff(rates[25:]) < 0).all()


def test_imagenet_learning_rate():
    recipe = RECIPES["imagenet"]
    # An epoch of 1,281,167 images has 626 steps.
    optimizer = make_optimizer(recipe, 130 * 626)
    for epoch, rate in ((0, 0.2), (2.5, 0.5), (5, 0.8), (67.5, 0.4), (130, 0)):
        optimizer.iterations.assign(round(epoch * 626))
        assert float(numpy(optimizer.learning_rate)) == pytest.approx(rate, abs=1e-6)
    # With gradient accumulation, `_iterations` counts accumulation steps.
    recipe = dataclasses.replace(recipe, gradient_accumulation_steps=8)
    optimizer = make_optimizer(recipe, 130 * 626)
    optimizer._iterations.assign(round(67.5 * 626) * 8 + 7)
    assert float(numpy(optimizer.learning_rate)) == pytest.approx(0.4, abs=1e-6)


@pytest.mark.long
def test_training_metrics_include_images_before_a_resume():
    """A resumed epoch on more devices may have fewer images than it has already trained on."""

    class InterruptError(Exception):
        pass

    def step():
        if interrupted.state.test_images:
            raise InterruptError

    recipe = dataclasses.replace(RECIPES["example"], batch_size=5)
    interrupted, resumed = (Trainer(network(), dataset(), recipe, 1, 0) for _ in range(2))
    with pytest.raises(InterruptError):
        list(interrupted.epochs(step))
    resumed._images_per_epoch = 8
    resumed.restore(interrupted.arrays(), dataclasses.replace(interrupted.state))
    (row,) = resumed.epochs()
    assert row["train_loss"] == interrupted.state.train_loss / 10
    assert row["train_accuracy"] == interrupted.state.train_accuracy / 10


def test_nesterov_sgd_equals_pytorch():
    """PyTorch adds the decay of all weights, biases included, to the gradient."""
    random = np.random.default_rng(0)
    variable = keras.Variable(random.normal(size=(3, 2)), dtype="float64", name="bias")
    expected, velocity = numpy(variable.value).copy(), 0.0
    optimizer = make_optimizer(dataclasses.replace(RECIPES["imagenet"], warmup_fraction=None), 10)
    for _ in range(4):
        gradient = random.normal(size=(3, 2))
        optimizer.apply([keras.ops.convert_to_tensor(gradient, "float64")], [variable])
        decayed = gradient + 1e-4 * expected
        velocity = 0.9 * velocity + decayed
        expected = expected - 0.8 * (decayed + 0.9 * velocity)
    np.testing.assert_allclose(numpy(variable.value), expected, atol=1e-6)


@pytest.mark.long
def test_labels_are_smoothed_only_in_training():
    images = dataset()
    recipe = Recipe(1e-3, label_smoothing=0.1)
    trainer = Trainer(network(), images, recipe, 1, 0)
    np.testing.assert_allclose(
        trainer._train_batch(np.array([0, 1])).labels, [[0.95, 0.05], [0.05, 0.95]], rtol=1e-6
    )
    np.testing.assert_allclose(trainer._eval_batch(np.array([1, 0])).labels, [[0, 1], [1, 0]])
    (row,) = trainer.epochs()
    logits = trainer.model(transforms.to_unit_float(images.x_test), training=False)
    log_probabilities = keras.ops.log_softmax(logits)
    loss = -np.mean(numpy(log_probabilities)[np.arange(3), images.y_test])
    assert row["test_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_model_that_ends_in_a_softmax_trains_as_without_it(label_smoothing):
    recipe = Recipe(0.05, batch_size=4, label_smoothing=label_smoothing)
    plain, with_softmax = (without_normalization() for _ in range(2))
    with_softmax.add(keras.layers.Softmax())
    rows = []
    for model in (plain, with_softmax):
        rows += Trainer(model, dataset(), recipe, 1, 0).epochs()
    for metric in METRICS:
        assert rows[1][metric] == pytest.approx(rows[0][metric], rel=1e-5)
    for got, want in zip(weights(with_softmax), weights(plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def weights(model):
    return [numpy(v.value).copy() for v in model.variables]


def without_normalization():
    keras.utils.set_random_seed(2)
    layers = keras.layers
    return keras.Sequential([keras.Input((4, 5, 3)), layers.Flatten(), layers.Dense(2)])


@pytest.mark.long
@pytest.mark.any_backend
@pytest.mark.parametrize("name", ["example", "one-cycle", "sgd"])
def test_gradient_accumulation_equals_one_batch(name):
    recipe = RECIPES.get(
        name, Recipe(0.1, 0.01, warmup_fraction=0.5, optimizer="sgd", clip_norm=0.3)
    )
    results = []
    for accumulation in (1, 4):
        accumulating = dataclasses.replace(
            recipe, batch_size=8, gradient_accumulation_steps=accumulation
        )
        trainer = Trainer(without_normalization(), dataset(16), accumulating, 3, 0)
        assert trainer.micro_batch_size == 8 // accumulation
        rows = list(trainer.epochs())
        results.append((rows, weights(trainer.model)))
    (rows, expected), (other_rows, values) = results
    for a, b in zip(expected, values, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    for row, other in zip(rows, other_rows, strict=True):
        assert row["test_loss"] == pytest.approx(other["test_loss"], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("accumulation", [1, 2])
def test_averaged_weights_are_evaluated_and_kept(accumulation):
    images = dataset(12)
    recipe = Recipe(0.05, batch_size=4, ema_momentum=0.8, gradient_accumulation_steps=accumulation)
    trainer = Trainer(without_normalization(), images, recipe, 2, 0)
    steps, average, evaluated = 0, None, []

    def check_average():
        nonlocal steps, average
        values = weights(trainer._trained)
        if trainer.state.images > len(images.x_train):
            evaluated.append(values)
            for actual, expected in zip(values, average, strict=True):
                np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)
            return
        # The first complete batch initializes the average.
        steps += 1
        momentum = 0.8 ** (1 / accumulation) if steps > accumulation else 0.0
        average = [
            momentum * a + (1 - momentum) * v
            for a, v in zip(average or values, values, strict=True)
        ]

    list(trainer.epochs(check_average))
    assert len(evaluated) == 2 * -(-3 // trainer.micro_batch_size)
    for actual, expected in zip(weights(trainer.model), average, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.long
@pytest.mark.any_backend
def test_training_resumes_exactly_from_any_step(tmp_path):
    """Steps include accumulation steps within a batch, and test steps."""
    pets = write_folder(tmp_path / "pets", size=(12, 9), train=4, test=3)
    images = datasets.load(str(pets), (6, 8), crop_fraction=0.875)
    recipe = dataclasses.replace(
        RECIPES["imagenet"],
        learning_rate=0.05,
        batch_size=4,
        gradient_accumulation_steps=2,
        ema_momentum=0.7,
        clip_norm=1.0,
    )

    def make_trainer():
        keras.utils.set_random_seed(2)
        layers = keras.layers
        model = keras.Sequential(
            [
                keras.Input((6, 8, 3)),
                layers.Flatten(),
                layers.Dense(3),
                layers.BatchNormalization(),
                layers.Dropout(0.2),
            ]
        )
        return Trainer(model, images, recipe, 2, 1)

    checkpoints = []
    uninterrupted = make_trainer()

    def save():
        arrays = {name: array.copy() for name, array in uninterrupted.arrays().items()}
        checkpoints.append((dataclasses.replace(uninterrupted.state), arrays))

    def without_time(rows):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    rows = without_time(uninterrupted.epochs(save))
    expected = weights(uninterrupted.model)
    assert len(checkpoints) == uninterrupted.steps == 2 * (6 + 5)
    for state, arrays in checkpoints[::3]:
        resumed = make_trainer()
        resumed.restore(arrays, dataclasses.replace(state))
        assert without_time(resumed.epochs())[-1] == rows[-1]
        for actual, want in zip(weights(resumed.model), expected, strict=True):
            np.testing.assert_array_equal(actual, want)


def test_example_recipe_has_constant_rate_and_no_decay():
    optimizer = make_optimizer(RECIPES["example"], 100)
    assert isinstance(optimizer, keras.optimizers.Adam)
    assert not isinstance(optimizer, keras.optimizers.AdamW)
    assert float(numpy(optimizer.learning_rate)) == pytest.approx(1e-3)
    assert optimizer.weight_decay is None


@pytest.mark.long
def test_only_kernels_decay():
    model = network()
    for variable in model.trainable_variables:
        variable.assign(np.ones(variable.shape))
    optimizer = make_optimizer(Recipe(0.5, weight_decay=0.1), 10)
    gradients = [keras.ops.zeros(v.shape) for v in model.trainable_variables]
    optimizer.apply(gradients, model.trainable_variables)
    values = {v.name: numpy(v.value) for v in model.trainable_variables}
    assert set(values) == {"kernel", "bias", "gamma", "beta"}
    for name, value in values.items():
        np.testing.assert_allclose(value, 1 - 0.5 * 0.1 if name == "kernel" else 1, rtol=1e-6)


def test_images_are_flipped_by_mask():
    images = dataset()
    before = images.x_train.copy()
    trainer = Trainer(network(), images, Recipe(1e-3, batch_size=4), 1, 0)
    batches = []

    class Compiled:
        def train_on_batch(self, x, y, sample_weight, return_dict):
            batches.append(x)
            return {"loss": 0.5, "accuracy": 1.0}

    trainer._compiled = Compiled()
    order, flip_mask = np.random.default_rng(1).permutation(10), np.arange(10) % 3 == 0
    assert trainer.train(order, flip_mask) == (0.5, 1.0)
    expected = before[order] / np.float32(255)
    flipped = flip_mask[order]
    expected[flipped] = expected[flipped][:, :, ::-1]
    np.testing.assert_array_equal(np.concatenate(batches), expected)
    np.testing.assert_array_equal(images.x_train, before)


@pytest.mark.any_backend
def test_flips_depend_on_seed_and_epoch():
    first = transforms.flip_mask(4000, 1, 1)
    np.testing.assert_array_equal(first, transforms.flip_mask(4000, 1, 1))
    assert 0.45 < first.mean() < 0.55
    assert (first != transforms.flip_mask(4000, 1, 2)).any()
    assert (first != transforms.flip_mask(4000, 2, 1)).any()


@pytest.mark.any_backend
def test_validation_split():
    images = dataset()
    split = images.validation_split(3)
    assert len(split.x_train) == 7
    assert len(split.x_test) == 3
    both = np.concatenate([split.x_train, split.x_test])
    assert {x.tobytes() for x in both} == {x.tobytes() for x in images.x_train}
    np.testing.assert_array_equal(split.x_test, dataset().validation_split(3).x_test)
    labels = dict(zip([x.tobytes() for x in images.x_train], images.y_train, strict=True))
    assert [labels[x.tobytes()] for x in split.x_test] == list(split.y_test)
    assert split.name == "noise, 3 of its training images held out"
    for count in (0, 10):
        with pytest.raises(InputError, match=rf"from 1 to 9\. Received: {count}"):
            images.validation_split(count)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({"recipe": "magic"}, "one of example, one-cycle, imagenet. Received: magic"),
        ({"weight_decay": -0.1}, "`weight_decay` must be at least 0 and finite. Received: -0.1"),
        ({"weight_decay": float("nan")}, "at least 0 and finite. Received: nan"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0 and finite. Received: 0.0"),
        ({"validation_images": 0}, "at least 1. Received: 0"),
        ({"gradient_accumulation_steps": 0}, "at least 1. Received: 0"),
        ({"ema_momentum": 1.0}, "above 0 and below 1. Received: 1.0"),
    ],
)
def test_invalid_values_are_rejected(arguments, received):
    with pytest.raises(InputError, match=received):
        experiment.Config(**arguments)


@pytest.mark.any_backend
def test_config_overrides_the_recipe():
    images = dataset()
    config = experiment.Config(recipe="one-cycle", weight_decay=0.0, batch_size=5)
    assert config.recipe_for(images) == dataclasses.replace(
        RECIPES["one-cycle"], weight_decay=0.0, batch_size=5
    )
    # A recipe without a batch size uses that of the data set.
    assert experiment.Config().recipe_for(images) == Recipe(1e-3, batch_size=images.batch_size)


@pytest.mark.long
@pytest.mark.any_backend
def test_config_json_describes_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "write", lambda *_: None)
    pets = write_folder(tmp_path / "pets")
    config = experiment.Config(
        str(pets),
        "inn:head=convolutional",
        2,
        recipe="one-cycle",
        validation_images=4,
        batch_size=8,
    )
    run = experiment.compare(config, tmp_path / "run")
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["training"] == stored(run.recipe)
    assert written["training"]["flip"] is True
    assert written["images"] == {"train": len(run.dataset.x_train), "test": 4}
    assert "4 of its training images held out" in run.metrics["dataset"]
    (metrics,) = run.metrics["models"].values()
    assert metrics["multiply_adds"] > 0
    assert METRICS[0] in metrics
