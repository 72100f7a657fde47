"""Recipes: what the rate, the decay and the mirror do, and what is held out."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from frameworks import numpy
from images import write_folder

from involution import data, experiment, training
from involution.errors import InputError
from involution.training import RECIPES, Recipe, Trainer


def dataset(count=10):
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (count, 4, 5, 3)).astype("uint8")
    return data.Dataset("noise", "", x, np.arange(count) % 2, x[:3], np.arange(3) % 2, ("a", "b"))


def network():
    layers = keras.layers
    return keras.Sequential(
        [keras.Input((4, 5, 3)), layers.Flatten(), layers.Dense(2), layers.BatchNormalization()]
    )


def test_one_cycle_rises_from_a_25th_and_falls_to_nothing():
    optimizer = RECIPES["one-cycle"].optimizer(100)
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


def test_the_example_has_one_rate_and_no_decay():
    optimizer = RECIPES["example"].optimizer(100)
    assert isinstance(optimizer, keras.optimizers.Adam)
    assert not isinstance(optimizer, keras.optimizers.AdamW)
    assert float(numpy(optimizer.learning_rate)) == pytest.approx(1e-3)
    assert optimizer.weight_decay is None


def test_biases_and_normalizations_do_not_decay():
    model = network()
    for variable in model.trainable_variables:
        variable.assign(np.ones(variable.shape))
    optimizer = Recipe(0.5, weight_decay=0.1).optimizer(10)
    gradients = [keras.ops.zeros(v.shape) for v in model.trainable_variables]
    optimizer.apply(gradients, model.trainable_variables)
    values = {v.name: numpy(v.value) for v in model.trainable_variables}
    assert set(values) == {"kernel", "bias", "gamma", "beta"}
    for name, value in values.items():
        np.testing.assert_allclose(value, 1 - 0.5 * 0.1 if name == "kernel" else 1, rtol=1e-6)


def test_some_images_are_seen_in_a_mirror():
    images = dataset()
    before = images.x_train.copy()
    trainer = Trainer(network(), images, Recipe(1e-3, batch_size=4), 1, 0)
    seen = []

    class Compiled:
        def train_on_batch(self, x, y, return_dict):
            seen.append(x)
            return {"loss": 0.5, "accuracy": 1.0}

    trainer._compiled = Compiled()
    order, mirrored = np.random.default_rng(1).permutation(10), np.arange(10) % 3 == 0
    assert trainer.train(order, mirrored) == (0.5, 1.0)
    expected = before[order] / np.float32(255)
    turned = mirrored[order]
    expected[turned] = expected[turned][:, :, ::-1]
    np.testing.assert_array_equal(np.concatenate(seen), expected)
    np.testing.assert_array_equal(images.x_train, before)


def test_the_mirror_is_a_function_of_seed_and_epoch():
    first = data.mirrored(4000, 1, 1)
    np.testing.assert_array_equal(first, data.mirrored(4000, 1, 1))
    assert 0.45 < first.mean() < 0.55
    assert (first != data.mirrored(4000, 1, 2)).any()
    assert (first != data.mirrored(4000, 2, 1)).any()


def test_what_is_held_out():
    images = dataset()
    held = images.validation(3)
    assert len(held.x_train) == 7
    assert len(held.x_test) == 3
    both = np.concatenate([held.x_train, held.x_test])
    assert {x.tobytes() for x in both} == {x.tobytes() for x in images.x_train}
    np.testing.assert_array_equal(held.x_test, dataset().validation(3).x_test)
    labels = dict(zip([x.tobytes() for x in images.x_train], images.y_train, strict=True))
    assert [labels[x.tobytes()] for x in held.x_test] == list(held.y_test)
    assert held.name == "noise, 3 of its training images held out"
    for count in (0, 10):
        with pytest.raises(InputError, match=rf"from 1 to 9\. Received: {count}"):
            images.validation(count)


@pytest.mark.parametrize(
    ("arguments", "received"),
    [
        ({"recipe": "magic"}, "one of example, one-cycle. Received: magic"),
        ({"weight_decay": -0.1}, "at least 0. Received: weight_decay=-0.1"),
        ({"weight_decay": float("nan")}, "at least 0. Received: weight_decay=nan"),
        ({"learning_rate": 0.0}, "above 0. Received: learning_rate=0.0"),
        ({"validation": 0}, "at least 1. Received: validation=0"),
    ],
)
def test_bad_values_are_refused(arguments, received):
    with pytest.raises(InputError, match=received):
        experiment.Config(**arguments)


def test_a_recipe_and_what_else_is_asked_for():
    images = dataset()
    asked = experiment.Config(recipe="one-cycle", weight_decay=0.0, batch_size=5)
    assert asked.recipe_for(images) == dataclasses.replace(
        RECIPES["one-cycle"], weight_decay=0.0, batch_size=5
    )
    # The data set's batch where the recipe has none.
    assert experiment.Config().recipe_for(images) == Recipe(1e-3, batch_size=images.batch_size)


def test_a_run_says_how_it_was_trained(tmp_path):
    pets = write_folder(tmp_path / "pets")
    config = experiment.Config(
        str(pets), "inn:head=convolutional", 2, recipe="one-cycle", validation=4, batch_size=8
    )
    run = experiment.compare(config, tmp_path / "run")
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    assert told["training"] == dataclasses.asdict(run.recipe)
    assert told["training"]["flip"] is True
    assert told["images"] == {"train": len(run.dataset.x_train), "test": 4}
    assert "4 of its training images held out" in run.metrics["dataset"]
    (metrics,) = run.metrics["models"].values()
    assert metrics["multiply_adds"] > 0
    assert training.MEASURES[0] in metrics
