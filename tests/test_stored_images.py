"""Folders that are larger than memory: their images stay in their files."""

import dataclasses
import math

import keras
import numpy as np
import pytest
from images import write_folder

from involution import data, memory, training
from involution.errors import InputError
from involution.models import cnn
from involution.stored_images import StoredImages


@pytest.fixture
def pets(tmp_path):
    return write_folder(tmp_path / "pets")


@pytest.fixture
def pair(pets, monkeypatch):
    """The same folder, in memory and in its files."""
    loaded = data.load(str(pets))
    assert isinstance(loaded.x_train, np.ndarray)
    # A quarter of it is less than they take.
    size = 3 * (loaded.x_train.nbytes + loaded.x_test.nbytes)
    monkeypatch.setattr(memory, "allowed", lambda: size)
    stored = data.load(str(pets))
    assert isinstance(stored.x_train, StoredImages)
    assert isinstance(stored.x_test, StoredImages)
    return loaded, stored


def test_they_are_read_as_an_array_is(pair):
    for name in ("x_train", "x_test"):
        array, images = (getattr(dataset, name) for dataset in pair)
        assert (images.shape, images.dtype, len(images)) == (array.shape, array.dtype, len(array))
        for index in (0, -1, slice(1, 7, 2), slice(0), [3, 0, 3], np.arange(len(array))[::-1]):
            assert images[index].dtype == array.dtype
            np.testing.assert_array_equal(images[index], array[index])
            if not isinstance(index, int):
                np.testing.assert_array_equal(images.part(index)[:], array[index])


def test_it_is_the_same_data_set(pair, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 5)
    loaded, stored = pair
    assert stored.fingerprint() == loaded.fingerprint()
    held_out = [dataset.validation(7) for dataset in pair]
    assert isinstance(held_out[1].x_test, StoredImages)
    assert held_out[1].fingerprint() == held_out[0].fingerprint() != loaded.fingerprint()


def test_training_does_not_see_where_they_are(pair):
    def rows(dataset):
        recipe = dataclasses.replace(training.RECIPES["one-cycle"], batch_size=10)
        keras.utils.set_random_seed(1)
        network = cnn(input_shape=dataset.image_shape, classes=len(dataset.class_names))
        trainer = training.Trainer(network, dataset, recipe, 2, seed=1)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in trainer.epochs()]

    assert rows(pair[1]) == rows(pair[0])


def test_a_file_that_is_another_meanwhile(pair):
    images = pair[1].x_train
    images.files[2].write_bytes(b"hello")
    with pytest.raises(InputError, match=r"whole PNG.*Received: \S+, which was another before"):
        images[:4]
    images.files[2].unlink()
    with pytest.raises(InputError, match="No such file"):
        images[2]
    images.files[2].write_bytes(images.files[0].read_bytes())
    smaller = StoredImages(images.files, (1, 1, 3), images.read)
    with pytest.raises(InputError, match=r"must keep its size \(1, 1, 3\)"):
        smaller[[0]]


def test_how_much_memory_there_is(monkeypatch):
    resource = pytest.importorskip("resource")
    before = memory.allowed()
    assert 0 < before < math.inf
    limits = {resource.RLIMIT_AS: 10**6, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], 10**9))
    assert memory.allowed() == 10**6
