"""Uploads of strangers: files that are not what they say, or would harm who decodes them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

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


# A photo to be turned, as some cameras write it: the resolution is text, "72", and no number.
LETTERS = exif([(0x0112, 3, 1, 6), (0x011A, 2, 3, int.from_bytes(b"72", "little"))])


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
    canvas = bytearray(odd()["moving.webp"])
    height = canvas.index(b"VP8X") + 15
    canvas[height : height + 3] = b"\xff\xff\x3f"
    files["claims 20 by 4 million.webp"] = bytes(canvas)
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
        "a resolution in letters.jpg": good("JPEG", exif=LETTERS),
        "a resolution in letters.webp": good("WEBP", exif=LETTERS),
        "a turn in letters.jpg": good("JPEG", exif=exif([(0x0112, 2, 2, ord("6"))])),
        "exif cut off.jpg": good("JPEG", exif=LETTERS[:-9]),
        "exif of nothing.jpg": good("JPEG", exif=b"Exif\0\0II"),
        "exif of 4 billion.jpg": good("JPEG", exif=exif([(0x010E, 2, 2**32 - 1, 8)])),
    }


def damaged(count, seed=0) -> dict[str, bytes]:
    """Files with something lost, changed, repeated or put elsewhere: some are still images."""
    rng = np.random.default_rng(seed)
    turned = exif([(0x0112, 3, 1, 6), (0x8769, 4, 1, 26), (0x010E, 2, 40, 8)])
    whole = [
        ("png", good()),
        ("png", good(pnginfo=_text())),
        ("jpg", good("JPEG", exif=turned)),
        ("jpg", good("JPEG", progressive=True)),
        ("webp", good("WEBP", exif=turned)),
        ("webp", good("WEBP", lossless=True)),
        *((name.rpartition(".")[2], content) for name, content in odd().items()),
    ]
    files = {}
    for number in range(count):
        end, content = whole[rng.integers(len(whole))]
        bytes_ = bytearray(content)
        # Most of what a decoder believes stands at the beginning.
        reach = len(bytes_) if rng.random() < 0.3 else min(len(bytes_), 120)
        at, length = int(rng.integers(reach)), int(rng.integers(1, 40))
        match rng.integers(5):
            case 0:
                for place in rng.integers(reach, size=rng.integers(1, 8)):
                    bytes_[place] = rng.integers(256)
            case 1:
                del bytes_[at : at + length]
            case 2:
                bytes_[at:at] = bytes_[at : at + length] * int(rng.integers(1, 50))
            case 3:
                bytes_[at : at + 4] = rng.choice(
                    [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"]
                )
            case 4:
                other = whole[rng.integers(len(whole))][1]
                bytes_[at:] = other[at:]
        files[f"damaged {number}.{end}"] = bytes(bytes_)
    return files


def _text():
    """What a PNG file may say of itself."""
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 50)
    text.add_itxt("c", "d" * 50, zip=True)
    return text
