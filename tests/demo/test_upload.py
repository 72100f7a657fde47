"""Validation and decoding of an upload."""

import io
import pathlib
import types

import gradio
import numpy as np
import pytest
from PIL import Image

from involution.data import decode, transforms
from involution.data.image_formats import NAMES
from involution.demo import app, render
from involution.utils.errors import InputError
from tests.support import hostile_images

pytestmark = pytest.mark.any_backend

INVALID = f"An image must be a valid {NAMES} file: "


@pytest.fixture
def file(tmp_path):
    """Returns a function that writes a file and returns its path."""

    def write(content):
        (tmp_path / "image").write_bytes(content)
        return tmp_path / "image"

    return write


def message(function, *arguments):
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# --- Validation ----------------------------------------------------------------------------------


def test_sizes_up_to_the_limits_are_accepted(file, monkeypatch):
    path = file(hostile_images.valid(size=(40, 30)))
    size = path.stat().st_size
    monkeypatch.setattr(app, "MAX_BYTES", size)
    monkeypatch.setattr(app, "MAX_PIXELS", 1200)
    app.check(path)
    monkeypatch.setattr(app, "MAX_PIXELS", 1199)
    assert message(app.check, path) == ("An image must have at most 1,199 pixels. Received: 40x30")
    monkeypatch.setattr(app, "MAX_BYTES", size - 1)
    assert message(app.check, path) == (
        f"An image must have at most {size - 1:,} bytes. Received: {size:,}"
    )


def test_default_limits_of_bytes_and_pixels():
    assert (app.MAX_BYTES, app.MAX_PIXELS) == (8_388_608, 16_000_000)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_only_png_jpeg_and_webp_are_accepted(format, file):
    app.check(file(hostile_images.valid(format)))
    for content in (b"", b"hello", *(hostile_images.valid(other) for other in ("GIF", "BMP"))):
        expected = "An image must be a PNG, JPEG or WebP file. Received: another format"
        assert message(app.check, file(content)) == expected


def test_gradio_receives_the_path_of_a_valid_upload(file):
    def gradio_error(function, argument):
        with pytest.raises(gradio.Error) as caught:
            function(argument)
        # Nothing about an upload is logged.
        assert caught.value.print_exception is False
        return caught.value.message

    cached = []

    async def cache(path):
        cached.append(path)
        return "cached"

    image = types.SimpleNamespace(preprocess=None, async_move_resource_to_block_cache=cache)
    app._validate_upload(image)
    path = str(file(hostile_images.valid()))
    assert image.preprocess(None) is None
    assert image.preprocess(types.SimpleNamespace(path=path)) == path
    payload = types.SimpleNamespace(path=str(file(b"GIF89a")))
    assert gradio_error(image.preprocess, payload).startswith("An image must be a PNG, JPEG")
    fetch = image.async_move_resource_to_block_cache
    for url in ("http://127.0.0.1:9/a.png", "file:///etc/passwd"):
        assert gradio_error(lambda url: fetch(url).send(None), url) == "An image must be uploaded."
    assert cached == []
    with pytest.raises(StopIteration) as returned:
        fetch(pathlib.Path(path)).send(None)
    assert (returned.value.value, cached) == ("cached", [pathlib.Path(path)])


def test_only_input_errors_are_shown_to_visitors():
    def fail(error):
        raise error

    with pytest.raises(gradio.Error, match=r"^'one line'$"):
        app._as_gradio_error(fail, InputError("one line"))
    with pytest.raises(KeyError):
        app._as_gradio_error(fail, KeyError("a secret"))
    assert app._as_gradio_error(divmod, 7, 2) == (3, 1)


# --- Decoding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_lossless_pixels_are_decoded_exactly(format, file):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), "uint8")
    path = file(encoded(Image.fromarray(pixels), format, lossless=True))
    decoded = decode.read_image(path)
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)
    resized = Image.fromarray(pixels).resize((3, 4), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decode.read_image(str(path), (4, 3)), np.asarray(resized))


def test_every_pixel_format_is_converted_to_rgb(file):
    ramp = np.arange(0, 65536, 256, "uint16").reshape(16, 16)
    np.testing.assert_array_equal(
        decode.read_image(file(encoded(Image.fromarray(ramp + 255)))),
        np.repeat(np.arange(256, dtype="uint8").reshape(16, 16, 1), 3, -1),
    )
    for mode, color, expected in (
        ("L", 7, [7, 7, 7]),
        ("1", 1, [255, 255, 255]),
        ("LA", (9, 0), [9, 9, 9]),
        ("RGBA", (1, 2, 3, 0), [1, 2, 3]),
        ("P", 0, [0, 0, 0]),
    ):
        decoded = decode.read_image(file(encoded(Image.new(mode, (2, 1), color))))
        assert decoded.tolist() == [[expected] * 2]


def test_exif_orientation_is_applied(file):
    image = Image.new("RGB", (3, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = 6
    decoded = decode.read_image(file(encoded(image, exif=exif)))
    assert decoded.shape == (3, 2, 3)
    assert decoded[..., 0].tolist() == [[0, 255], [0, 0], [0, 0]]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pixels_up_to_the_limit_are_decoded(file, monkeypatch):
    path = file(hostile_images.valid(size=(40, 30)))
    for limit in (1200, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert decode.read_image(path).shape == (30, 40, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    expected = f"{INVALID}its 40x30 pixels exceed the limit. Received: {path}"
    assert message(decode.read_image, path) == expected
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert message(decode.read_image, path).startswith(f"{INVALID}Image size (1200 pixels) exceeds")


def test_decompression_bomb_warning_is_an_error(file, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    error = message(decode.read_image, file(hostile_images.valid(size=(40, 30))))
    assert error.startswith(f"{INVALID}Image size (1200 pixels) exceeds")


def test_invalid_images_are_rejected(file, tmp_path):
    for name, content in hostile_images.invalid().items():
        # The page rejects these by their format or size, before they are decoded.
        if not any(word in name for word in ("gif", "bmp", "tiff", "mega", "million")):
            assert message(decode.read_image, file(content)).startswith(INVALID), name
    text = file(b"hello")
    assert message(decode.read_image, text) == (
        f"{INVALID}its format is not recognized. Received: {text}"
    )
    missing = tmp_path / "missing.png"
    assert message(decode.read_image, missing) == (
        f"{INVALID}No such file or directory. Received: {missing}"
    )


def test_errors_do_not_contain_the_path_of_an_upload(file, tmp_path):
    reader = types.SimpleNamespace(
        read=decode.read_image, image_shape=(30, 40, 3), crop_fraction=None
    )
    classifiers = {"reader": reader}
    assert (
        message(render._read, classifiers, file(b"hello"))
        == f"{INVALID}its format is not recognized"
    )
    assert message(render._read, classifiers, tmp_path / "gone.png") == (
        "The uploaded image must exist; upload it again. Received: No such file or directory"
    )
    pixels = render._read(classifiers, file(hostile_images.valid(size=(40, 30))))["reader"]
    assert pixels.shape == (30, 40, 3)


def test_to_unit_float_is_exact_for_every_byte():
    scaled = transforms.to_unit_float(np.arange(256, dtype="uint8"))
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled, np.arange(256, dtype="float32") / np.float32(255))
