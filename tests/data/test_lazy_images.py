"""Images decoded on access, for folders larger than memory."""

import dataclasses
import math
import pathlib

import keras
import numpy as np
import pytest

from involution.data import datasets, decode, image_folder
from involution.data.lazy_images import LazyImages
from involution.models import cnn
from involution.training.recipes import RECIPES
from involution.training.trainer import Trainer
from involution.utils import memory
from involution.utils.errors import InputError
from tests.support.images import write_folder, write_image

pytestmark = pytest.mark.any_backend


@pytest.fixture
def pets(tmp_path):
    return write_folder(tmp_path / "pets")


@pytest.fixture
def pair(pets, monkeypatch):
    """Two data sets of one folder: in memory and lazy."""
    loaded = datasets.load(str(pets))
    assert isinstance(loaded.x_train, np.ndarray)
    # Images are lazy if they take more than a quarter of the memory limit.
    size = 3 * (loaded.x_train.nbytes + loaded.x_test.nbytes)
    monkeypatch.setattr(memory, "memory_limit", lambda: size)
    lazy = datasets.load(str(pets))
    assert isinstance(lazy.x_train, LazyImages)
    assert isinstance(lazy.x_test, LazyImages)
    return loaded, lazy


def test_indexing_matches_an_array(pair):
    for name in ("x_train", "x_test"):
        array, images = (getattr(dataset, name) for dataset in pair)
        assert (images.shape, images.dtype, len(images)) == (array.shape, array.dtype, len(array))
        for index in (0, -1, slice(1, 7, 2), slice(0), [3, 0, 3], np.arange(len(array))[::-1]):
            assert images[index].dtype == array.dtype
            np.testing.assert_array_equal(images[index], array[index])
            if not isinstance(index, int):
                np.testing.assert_array_equal(images.subset(index)[:], array[index])


def test_lazy_fingerprints_match_arrays(pair, monkeypatch):
    monkeypatch.setattr(datasets, "CHUNK_SIZE", 5)
    loaded, lazy = pair
    assert lazy.fingerprint() == loaded.fingerprint()
    held_out = [dataset.validation_split(7) for dataset in pair]
    assert isinstance(held_out[1].x_test, LazyImages)
    assert held_out[1].fingerprint() == held_out[0].fingerprint() != loaded.fingerprint()


@pytest.mark.long
def test_training_on_lazy_images_matches_arrays(pair):
    def rows(dataset):
        recipe = dataclasses.replace(RECIPES["one-cycle"], batch_size=10)
        keras.utils.set_random_seed(1)
        network = cnn(input_shape=dataset.image_shape, classes=len(dataset.class_names))
        trainer = Trainer(network, dataset, recipe, 2, seed=1)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in trainer.epochs()]

    assert rows(pair[1]) == rows(pair[0])


def test_files_changed_after_loading_raise(pair):
    images = pair[1].x_train
    first, third = (pathlib.Path(images.sources[n].path) for n in (0, 2))
    third.write_bytes(b"hello")
    with pytest.raises(InputError, match=rf"valid PNG.*Received: {third}"):
        images[:4]
    third.unlink()
    with pytest.raises(InputError, match="No such file"):
        images[2]
    third.write_bytes(first.read_bytes())
    smaller = LazyImages(images.sources, (1, 1, 3))
    with pytest.raises(InputError, match=r"one size, here 1x1, unless `image_size`"):
        smaller[[0]]


def test_random_crops_depend_on_seed_epoch_and_image(tmp_path):
    pets = write_folder(tmp_path / "pets", size=(20, 14))
    images = datasets.load(str(pets), (6, 8), crop_fraction=0.875).x_train
    index = np.array([3, 0, 3])
    crops = images.random_crops(index, 1, 1)
    assert (crops.shape, crops.dtype) == ((3, 6, 8, 3), np.uint8)
    np.testing.assert_array_equal(crops[0], crops[2])
    np.testing.assert_array_equal(images.random_crops(np.arange(5), 1, 1)[[3, 0, 3]], crops)
    for seed, epoch in ((1, 2), (2, 1)):
        assert (images.random_crops(index, seed, epoch) != crops).any()
    assert (images[index] != crops).any()
    with images.sources[3].open() as file:
        expected = decode.read_image(file, (6, 8), rng=np.random.default_rng([1, 1, 2, 3]))
    np.testing.assert_array_equal(crops[0], expected)


def test_cropped_folders_are_lazy(tmp_path):
    pets = write_folder(tmp_path / "pets")
    # Crops have one size, so the images may have different sizes.
    write_image(pets / "train" / "ant" / "0.png", size=(31, 17))
    loaded = datasets.load(str(pets), (8, 8), crop_fraction=0.5)
    assert isinstance(loaded.x_test, LazyImages)
    assert loaded.x_train.shape == (24, 8, 8, 3)
    assert loaded.fingerprint() != datasets.load(str(pets), (8, 8)).fingerprint()
    with pytest.raises(InputError, match=r"requires `image_size`\. Received: None"):
        datasets.load(str(pets), crop_fraction=0.5)
    with pytest.raises(InputError, match=r"needs an image folder\. Received: digits"):
        datasets.load("digits", crop_fraction=0.5)
    (pets / "test" / "cat" / "1.png").write_bytes(b"hello")
    with pytest.raises(InputError, match=r"1\.png \(1 of 36 files cannot be read\)"):
        datasets.load(str(pets), (8, 8), crop_fraction=0.5)


def test_folders_above_the_decode_limit_are_not_decoded(tmp_path, monkeypatch):
    pets = write_folder(tmp_path / "pets")
    content_fingerprint = datasets.load(str(pets)).fingerprint()
    monkeypatch.setattr(image_folder, "MAX_DECODED_BYTES", 1000)
    broken = pets / "train" / "bee" / "3.png"
    monkeypatch.setattr(LazyImages, "_decode", lambda *_: pytest.fail("decoded"))
    loaded = datasets.load(str(pets))
    assert loaded.image_shape == (16, 16, 3)
    assert datasets.load(str(pets), (9, 7)).image_shape == (9, 7, 3)
    before = loaded.fingerprint()
    assert before != content_fingerprint
    content = broken.read_bytes()
    broken.write_bytes(content[:-1] + b"x")
    assert datasets.load(str(pets)).fingerprint() == before
    broken.write_bytes(content + b"x")
    assert datasets.load(str(pets)).fingerprint() != before
    monkeypatch.undo()
    monkeypatch.setattr(image_folder, "MAX_DECODED_BYTES", 1000)
    broken.write_bytes(b"hello")
    with pytest.raises(InputError, match=rf"format is not recognized. Received: {broken}"):
        datasets.load(str(pets)).x_train[:]
    first = pets / "train" / "ant" / "0.png"
    first.write_bytes(b"hello")
    with pytest.raises(InputError, match=rf"valid PNG.*Received: {first}"):
        datasets.load(str(pets))


def test_memory_limit_respects_rlimits(monkeypatch):
    resource = pytest.importorskip("resource")
    before = memory.memory_limit()
    assert 0 < before < math.inf
    limits = {resource.RLIMIT_AS: 10**6, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], 10**9))
    assert memory.memory_limit() == 10**6
