"""Uploads of strangers: files that are not what they say, or would harm who decodes them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

MEGABYTE = 2**20


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows=b"", depth=8, colour=2, more=b""):
    """A PNG file of these sizes, with what is compressed as its rows, whatever it is."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"".join(
        (b"\x89PNG\r\n\x1a\n", png_chunk(b"IHDR", header), more, data, png_chunk(b"IEND", b""))
    )


def good(format="PNG", size=(40, 30), seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), "uint8")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def exif(entries):
    """An Exif block with (tag, type, count, value) as they are given."""
    body = struct.pack("<H", len(entries))
    for entry in entries:
        body += struct.pack("<HHII", *entry)
    return b"Exif\0\0II*\0\x08\0\0\0" + body + b"\0" * 4


def refused() -> dict[str, bytes]:
    """Files that no image comes of, by what is wrong with them."""
    files: dict[str, bytes] = {
        "empty.png": b"",
        "text.png": b"hello, I am a picture",
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1:1/"/></svg>',
        "vector.svg": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
        "page.jpg": b"<!doctype html><script>alert(1)</script>",
        "gif.png": good("GIF"),
        "bmp.png": good("BMP"),
        "tiff.png": good("TIFF"),
        "pdf.png": b"%PDF-1.4\n%%EOF",
        "zip.png": b"PK\x03\x04" + bytes(60),
        "pickle.png": b"\x80\x04cposix\nsystem\n.",
        "ghostscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(id) run\n",
        "nine megabytes.png": good() + bytes(9 * MEGABYTE),
        "claims 100000 by 100000.png": png(100_000, 100_000),
        "claims 2**31 - 1 wide.png": png(2**31 - 1, 1),
        "no width.png": png(0, 10),
        "bomb of 64 million black pixels.png": png(8000, 8000, bytes(MEGABYTE)),
        "no data.png": png(32, 32),
        "an odd depth.png": png(32, 32, bytes(9999), depth=7),
        "an odd colour.png": png(32, 32, bytes(9999), colour=5),
        "a bomb of text.png": png(
            32, 32, bytes(97 * 32), more=png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8)))
        ),
    }
    for format, end in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")):
        whole = good(format, seed=1)
        for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
            files[f"{share:.0%} of a {format}.{end}"] = whole[: int(len(whole) * share)]
    return files


def odd() -> dict[str, bytes]:
    """Files that are unusual, and images all the same."""
    grey16 = io.BytesIO()
    Image.fromarray(np.arange(900, dtype="uint16").reshape(30, 30) * 70).save(grey16, "PNG")
    palette = io.BytesIO()
    Image.fromarray(np.arange(900, dtype="uint8").reshape(30, 30) % 7, "L").convert("P").save(
        palette, "PNG", transparency=0
    )
    cmyk = io.BytesIO()
    Image.new("CMYK", (30, 20), (10, 20, 30, 40)).save(cmyk, "JPEG")
    moving = io.BytesIO()
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    frames[0].save(moving, "WEBP", save_all=True, append_images=frames[1:])
    return {
        "grey16.png": grey16.getvalue(),
        "palette.png": palette.getvalue(),
        "cmyk.jpg": cmyk.getvalue(),
        "moving.webp": moving.getvalue(),
        "one row of many.png": png(32, 32, bytes(97)),
        "one pixel.png": good(size=(1, 1)),
        "a line.png": good(size=(5000, 1)),
        "no name": good(),
        "../../etc/passwd.png": good(),
        "x" * 180 + ".png": good(),
        "말.png": good(),
        "turned.jpg": good("JPEG", exif=exif([(0x0112, 3, 1, 6)])),
        "an odd turn.jpg": good("JPEG", exif=exif([(0x0112, 3, 1, 77)])),
        "exif that points outside.jpg": good("JPEG", exif=exif([(0x8769, 4, 1, 2**31 - 1)])),
        "exif that points to itself.jpg": good("JPEG", exif=exif([(0x8769, 4, 1, 8)])),
        "exif of 4 billion.jpg": good("JPEG", exif=exif([(0x010E, 2, 2**32 - 1, 8)])),
    }
