"""Data sets (digits, image folders, CIFAR-10 archives) and image decoding."""

import hashlib
import io
import os
import pickle
import re
import struct
import tarfile

import keras
import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from involution import data
from involution.data import datasets, decode, image_folder, image_formats, transforms
from involution.data.image_formats import NAMES
from involution.utils.errors import InputError
from tests.support import hostile_images
from tests.support.images import write_folder, write_image

pytestmark = pytest.mark.any_backend


def test_digits_are_upsampled_and_split_without_overlap():
    digits = datasets.load("digits")
    assert digits.x_train.shape == (1437, 32, 32, 3)
    assert digits.x_test.shape == (360, 32, 32, 3)
    assert digits.x_train.dtype == np.uint8
    assert sorted(set(digits.y_test)) == list(range(10))
    assert "not CIFAR-10" in digits.description
    train = {image.tobytes() for image in digits.x_train}
    assert sum(image.tobytes() in train for image in digits.x_test) <= 1


def test_epoch_permutation_depends_on_seed_and_epoch():
    first = datasets.epoch_permutation(100, 42, 1)
    np.testing.assert_array_equal(first, datasets.epoch_permutation(100, 42, 1))
    assert sorted(first) == list(range(100))
    for other in (datasets.epoch_permutation(100, 42, 2), datasets.epoch_permutation(100, 43, 1)):
        assert (first != other).any()


def test_folder_without_image_size_keeps_the_image_size(tmp_path):
    loaded = datasets.load(str(write_folder(tmp_path / "pets", size=(12, 20))))
    assert loaded.name == "pets"
    assert loaded.class_names == ("ant", "bee", "cat")
    assert loaded.x_train.shape == (24, 12, 20, 3)
    assert loaded.x_test.shape == (12, 12, 20, 3)
    np.testing.assert_array_equal(np.bincount(loaded.y_train), [8, 8, 8])


def test_folder_decodes_png_jpeg_and_webp_upright_and_resizes(tmp_path):
    write_folder(tmp_path, train=1, test=1)
    for suffix, size in ((".jpg", (40, 10)), (".webp", (9, 9)), (".JPEG", (8, 8))):
        write_image(tmp_path / "train" / "ant" / f"more{suffix}", size=size)
    calls = []
    loaded = datasets.load(str(tmp_path), (24, 18), progress=lambda done, total: calls.append(done))
    assert loaded.x_train.shape == (6, 24, 18, 3)
    assert calls == list(range(1, 10))
    rotated = Image.new("RGB", (10, 20))
    rotated.putpixel((0, 0), (255, 255, 255))
    exif = rotated.getexif()
    exif[274] = 6  # rotated by 90 degrees
    rotated.save(tmp_path / "rotated.png", exif=exif)
    pixels = decode.read_image(tmp_path / "rotated.png")
    assert pixels.shape == (10, 20, 3)
    assert pixels[0, 19].tolist() == [255, 255, 255]


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG", "MPO"])
def test_damaged_exif_tag_does_not_affect_the_orientation(format, tmp_path):
    """The resolution is stored as text, which makes Pillow fail to write the tags back."""
    image, file = Image.new("RGB", (21, 16)), io.BytesIO()
    if format == "PNG":
        chunk = hostile_images.png_chunk(b"eXIf", hostile_images.TEXT_RESOLUTION[6:])
        rows = bytes((1 + 3 * 21) * 16)
        file.write(hostile_images.png(21, 16, rows, more=chunk))
    else:
        options = {"save_all": True, "append_images": [image]} if format == "MPO" else {}
        image.save(file, format, exif=hostile_images.TEXT_RESOLUTION, **options)
    path = tmp_path / "photo"
    path.write_bytes(file.getvalue())
    assert decode.read_image(path).shape == (21, 16, 3)
    assert decode.read_image(path, (8, 4)).shape == (8, 4, 3)
    for part, name in (("train", "a"), ("train", "b"), ("test", "a")):
        folder = tmp_path / "photos" / part / name
        folder.mkdir(parents=True)
        (folder / "photo.jpg").write_bytes(file.getvalue())
    assert datasets.load(str(tmp_path / "photos")).x_train.shape == (2, 21, 16, 3)


def test_orientations_match_pillow(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), "uint8"))
    for value in range(11):
        exif = image.getexif()
        exif[274] = value
        image.save(tmp_path / "x.png", exif=exif)
        with Image.open(tmp_path / "x.png") as opened:
            expected = np.asarray(ImageOps.exif_transpose(opened))
        np.testing.assert_array_equal(decode.read_image(tmp_path / "x.png"), expected)


@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning", "ignore:Truncated File:UserWarning")
@pytest.mark.parametrize(
    "exif",
    [
        hostile_images.exif([(0x0112, 2, 2, ord("6"))]),
        hostile_images.exif([(0x0112, 12, 1, 2**20)]),
        b"Exif\0\0II",
        b"Exif\0\0neither endian",
        hostile_images.TEXT_RESOLUTION[:19],
    ],
)
def test_invalid_orientation_is_ignored(exif, tmp_path):
    Image.new("RGB", (21, 16)).save(tmp_path / "x.jpg", exif=exif)
    assert decode.read_image(tmp_path / "x.jpg").shape == (16, 21, 3)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (struct.error("unpack requires\na buffer"), "unpack requires a buffer"),
        (TypeError("bad operand"), "bad operand"),
        (AttributeError("no such"), "no such"),
        (EOFError(), "EOFError"),
        (RecursionError("too deep"), "too deep"),
        (PermissionError(13, "Permission denied", "x"), "Permission denied"),
    ],
)
@pytest.mark.parametrize("step", ["load", "convert"])
def test_decoding_errors_name_the_file(error, reason, step, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    write_image(tmp_path / "x.png")
    cls = ImageFile.ImageFile if step == "load" else Image.Image
    monkeypatch.setattr(cls, step, fail)
    expected = f"An image must be a valid {NAMES} file: {reason}"
    for name in (tmp_path / "x.png", str(tmp_path / "x.png"), os.fsencode(tmp_path / "x.png")):
        with pytest.raises(InputError) as caught:
            decode.read_image(name)
        assert str(caught.value) == f"{expected}. Received: {tmp_path}/x.png"
    with open(tmp_path / "x.png", "rb") as opened, pytest.raises(InputError) as caught:
        decode.read_image(opened)
    assert str(caught.value) == expected


def test_memory_error_is_not_an_input_error(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    write_image(tmp_path / "x.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(MemoryError):
        decode.read_image(tmp_path / "x.png")


def test_skipped_images_are_in_the_description(tmp_path):
    root = write_folder(tmp_path / "pets")
    assert datasets.load(str(root)).description == ""
    Image.new("RGB", (16, 16)).save(root / "train" / "ant" / "x.ppm")
    Image.new("RGB", (16, 16)).save(root / "train" / "ant" / "x.jfif", "JPEG")
    loaded = datasets.load(str(root))
    assert len(loaded.x_train) == 25
    assert (
        loaded.description
        == loaded.validation_split(3).description
        == (
            f"Skipped images (only {NAMES} files directly in a class folder are used): "
            f"1 in .ppm format, such as {root}/train/ant/x.ppm."
        )
    )


def test_different_image_sizes_are_rejected(tmp_path):
    write_folder(tmp_path)
    write_image(tmp_path / "train" / "cat" / "zz.png", size=(5, 7))
    with pytest.raises(InputError, match=r"--image-size.*16x16 in .*0\.png, 7x5 in .*zz\.png"):
        datasets.load(str(tmp_path))


def test_truncated_images_are_named_and_counted(tmp_path):
    write_folder(tmp_path)
    for number in (1, 2):
        broken = tmp_path / "train" / "bee" / f"broken{number}.jpg"
        write_image(broken, size=(64, 64))
        broken.write_bytes(broken.read_bytes()[:700])
    with pytest.raises(InputError, match=r"broken1\.jpg \(2 of 38 files cannot be read\)"):
        datasets.load(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_invalid_image_is_rejected(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(InputError, match="valid PNG"):
        decode.read_image(tmp_path / "x.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [1000, 3000])
def test_decompression_bomb_is_rejected(tmp_path, monkeypatch, limit):
    write_image(tmp_path / "x.png", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(InputError, match=r"exceed.* limit"):
        decode.read_image(tmp_path / "x.png")


def test_16_bit_images_are_scaled_not_clipped(tmp_path):
    ramp = np.arange(0, 65536, 256, "uint16").reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "x.png")
    pixels = decode.read_image(tmp_path / "x.png")
    np.testing.assert_array_equal(pixels[..., 0], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("format", image_formats.FORMATS | image_formats.HEIF)
def test_every_format_is_read(format, tmp_path):
    pixels = np.zeros((8, 12, 3), "uint8")
    pixels[:, :5] = (200, 100, 50)
    lossy = format in ("JPEG", "HEIF")
    options = {"lossless": True} if format == "WEBP" else {}
    suffixes = image_formats.formats()[format]
    for suffix in suffixes:
        Image.fromarray(pixels).save(tmp_path / f"x{suffix}", format, **options)
        found = decode.read_image(tmp_path / f"x{suffix}")
        np.testing.assert_allclose(found, pixels, atol=60 if lossy else 0)
    assert image_folder.find_images(tmp_path) == (
        sorted(f"{tmp_path}/x{suffix}" for suffix in suffixes),
        "",
    )


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP"])
def test_the_first_of_several_images_is_read(format, tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "x", format, save_all=True, append_images=frames[1:])
    assert (decode.read_image(tmp_path / "x")[0, 0] == (255, 0, 0)).mean() > 0.5


def test_heic_without_its_extra_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(image_formats, "formats", lambda: image_formats.FORMATS)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.HEIC").write_bytes(b"heic")
    extra = "pip install 'involution[heic]'"
    with pytest.raises(InputError, match=re.escape(f"file: {extra}. Received: {tmp_path}")):
        decode.read_image(tmp_path / "a" / "x.HEIC")
    assert image_folder.find_images(tmp_path) == (
        [],
        f"1 in .heic format ({extra}), such as {tmp_path}/a/x.HEIC",
    )


def test_16_bit_tiff_of_both_byte_orders(tmp_path):
    ramp = np.arange(0, 65536, 256).reshape(16, 16)
    for dtype, mode in (("<u2", "I;16"), (">u2", "I;16B")):
        image = Image.frombytes(mode, ramp.shape, ramp.astype(dtype).tobytes())
        image.save(tmp_path / "x.tif")
        pixels = decode.read_image(tmp_path / "x.tif")
        np.testing.assert_array_equal(pixels[..., 0], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_32_bit_images_are_rejected(dtype, tmp_path):
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match="32 bits per pixel have no known range"):
        decode.read_image(tmp_path / "x.tif")


def test_format_is_detected_by_content_and_hidden_files_are_ignored(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.ppm")
    (tmp_path / "x.ppm").rename(tmp_path / "x.png")
    with pytest.raises(InputError, match="its format is not recognized"):
        decode.read_image(tmp_path / "x.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "x.gif")
    (tmp_path / "x.gif").rename(tmp_path / "x.png")
    assert decode.read_image(tmp_path / "x.png").shape == (4, 4, 3)
    root = write_folder(tmp_path / "pets")
    (root / "train" / "ant" / "._0.png").write_bytes(b"metadata of macOS")
    (root / "train" / ".cache").mkdir()
    assert len(datasets.load(str(root)).x_train) == 24


def test_incomplete_folders_are_rejected(tmp_path):
    def assert_rejected(root, match):
        with pytest.raises(InputError, match=match):
            datasets.load(str(root))

    assert_rejected(tmp_path, "without train/<class>/")
    (tmp_path / "train").mkdir()
    assert_rejected(tmp_path, "without train/<class>/")
    write_image(tmp_path / "train" / "ant" / "0.png")
    assert_rejected(tmp_path, "without test/")
    write_image(tmp_path / "test" / "ant" / "0.png")
    assert_rejected(tmp_path, "at least two classes.*only ant")
    write_image(tmp_path / "test" / "yak" / "0.png")
    assert_rejected(tmp_path, "must have training images.*yak")
    (tmp_path / "train" / "yak").mkdir()
    assert_rejected(tmp_path, "Every class must have images.*yak")


def test_unknown_data_sets_and_inapplicable_options_are_rejected(tmp_path):
    with pytest.raises(InputError, match="Received: mnist"):
        datasets.load("mnist")
    with pytest.raises(InputError, match=r"image folders only.*8x8 for digits"):
        datasets.load("digits", (8, 8))
    (tmp_path / "some.tar.gz").write_bytes(b"some")
    with pytest.raises(InputError, match="with a different hash"):
        datasets.load(str(tmp_path / "some.tar.gz"))


def batches():
    random = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        yield name, random.integers(0, 256, (3, 3072), "uint8"), random.integers(0, 10, 3)


def write_archive(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(f"cifar/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def check_cifar10(loaded):
    expected = list(batches())
    assert loaded.x_train.shape == (15, 32, 32, 3)
    assert loaded.class_names[0] == "airplane"
    assert loaded.class_names[9] == "truck"
    for i, (_, rows, labels) in enumerate(expected[:-1]):
        np.testing.assert_array_equal(loaded.y_train[3 * i : 3 * i + 3], labels)
        # A row of the archive is 1,024 red, then green, then blue values, in row-major order.
        assert loaded.x_train[3 * i, 2, 5, 1] == rows[0, 1024 + 2 * 32 + 5]
    np.testing.assert_array_equal(loaded.y_test, expected[-1][2])


def test_cifar10_binary_archive_is_loaded(tmp_path, monkeypatch):
    members = [
        (f"{name}.bin", np.c_[labels.astype("uint8"), rows].tobytes())
        for name, rows, labels in batches()
    ]
    path = write_archive(tmp_path / "cifar-10-binary.tar.gz", members)
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setattr(datasets, "CIFAR10_BINARY_MD5", digest)
    check_cifar10(datasets.load(str(path)))


def keras_archive(home, monkeypatch, content):
    path = home / "datasets" / datasets.CIFAR10_KERAS
    path.parent.mkdir(parents=True)
    write_archive(path, [(name, content(rows, labels)) for name, rows, labels in batches()])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(datasets, "CIFAR10_KERAS_SHA256", digest)
    monkeypatch.setenv("KERAS_HOME", str(home))
    return path


def test_cifar10_is_loaded_from_the_keras_cache(tmp_path, monkeypatch):
    path = keras_archive(
        tmp_path,
        monkeypatch,
        lambda rows, labels: pickle.dumps({b"data": rows, b"labels": labels.tolist()}, protocol=3),
    )
    check_cifar10(datasets.load("cifar10"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="with a different hash"):
        datasets.load("cifar10")


def test_pickled_batch_with_code_is_rejected(tmp_path, monkeypatch):
    class Exploit:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    keras_archive(tmp_path / "home", monkeypatch, lambda *_: pickle.dumps({b"data": Exploit()}))
    with pytest.raises(InputError, match=r"must contain only arrays. Received: .*open"):
        datasets.load("cifar10")
    assert not (tmp_path / "marker").exists()


def test_cifar10_is_downloaded_only_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    requests = []

    def get_file(**arguments):
        requests.append(arguments)
        raise Exception("no route")  # noqa: TRY002 - as Keras does

    monkeypatch.setattr(keras.utils, "get_file", get_file)
    with pytest.raises(InputError, match=r"--download \(163 MB\)"):
        datasets.load("cifar10")
    assert not requests
    with pytest.raises(InputError, match=r"CIFAR-10 must be downloadable.*gz: no route"):
        datasets.load("cifar10", download=True)
    assert requests[0]["file_hash"] == datasets.CIFAR10_KERAS_SHA256


def test_to_unit_float_divides_by_255():
    scaled = transforms.to_unit_float(np.array([[0, 51, 255]], "uint8"))
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled, np.array([[0, 0.2, 1]], "float32"))


def test_batch_pickled_by_python_2_is_read():
    def text(content):
        return b"U" + bytes([len(content)]) + content

    rows = bytes(range(256)) * 12
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + len(rows).to_bytes(4, "little") + rows + b"tb"
    )
    batch = b"\x80\x02}(" + text(b"data") + array + text(b"labels") + b"]K\x07au."
    images, labels = datasets._pickled_batch(batch)
    assert images[0, 0, :3, 0].tolist() == [0, 1, 2]
    assert labels.tolist() == [7]


@pytest.mark.parametrize(
    ("old", "new"),
    [("order", "epoch_permutation"), ("mirrored", "flip_mask"), ("scale", "to_unit_float")],
)
def test_deprecated_names_warn(old, new):
    with pytest.warns(DeprecationWarning, match=rf"involution\.data\.{old} is now .*{new}"):
        assert getattr(data, old) is getattr(data, new)
