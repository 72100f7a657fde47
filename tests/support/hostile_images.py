"""Hostile, unusual and damaged image files."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

MEGABYTE = 2**20


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows=b"", depth=8, color=2, more=b""):
    """A PNG file that declares this size, with any compressed data as its rows."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
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
    """An EXIF block of entries (tag, type, count, value)."""
    body = struct.pack("<H", len(entries))
    for entry in entries:
        body += struct.pack("<HHII", *entry)
    return b"Exif\0\0II*\0\x08\0\0\0" + body + b"\0" * 4


# A rotated photo as some cameras write it: the resolution is the text "72", not a number.
TEXT_RESOLUTION = exif([(0x0112, 3, 1, 6), (0x011A, 2, 3, int.from_bytes(b"72", "little"))])


def invalid() -> dict[str, bytes]:
    """Files that are not valid images, by their fault."""
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
        "an odd color.png": png(32, 32, bytes(9999), color=5),
        "a bomb of text.png": png(
            32, 32, bytes(97 * 32), more=png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8)))
        ),
    }
    canvas = bytearray(unusual()["moving.webp"])
    height = canvas.index(b"VP8X") + 15
    canvas[height : height + 3] = b"\xff\xff\x3f"
    files["claims 20 by 4 million.webp"] = bytes(canvas)
    for format, end in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")):
        whole = good(format, seed=1)
        for fraction in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
            files[f"{fraction:.0%} of a {format}.{end}"] = whole[: int(len(whole) * fraction)]
    return files


def unusual() -> dict[str, bytes]:
    """Unusual but valid images."""
    gray16 = io.BytesIO()
    Image.fromarray(np.arange(900, dtype="uint16").reshape(30, 30) * 70).save(gray16, "PNG")
    palette = io.BytesIO()
    Image.fromarray(np.arange(900, dtype="uint8").reshape(30, 30) % 7, "L").convert("P").save(
        palette, "PNG", transparency=0
    )
    cmyk = io.BytesIO()
    Image.new("CMYK", (30, 20), (10, 20, 30, 40)).save(cmyk, "JPEG")
    moving = io.BytesIO()
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    frames[0].save(moving, "WEBP", save_all=True, append_images=frames[1:])
    return {
        "gray16.png": gray16.getvalue(),
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
        "rotated.jpg": good("JPEG", exif=exif([(0x0112, 3, 1, 6)])),
        "an unknown orientation.jpg": good("JPEG", exif=exif([(0x0112, 3, 1, 77)])),
        "exif that points outside.jpg": good("JPEG", exif=exif([(0x8769, 4, 1, 2**31 - 1)])),
        "exif that points to itself.jpg": good("JPEG", exif=exif([(0x8769, 4, 1, 8)])),
        "a resolution as text.jpg": good("JPEG", exif=TEXT_RESOLUTION),
        "a resolution as text.webp": good("WEBP", exif=TEXT_RESOLUTION),
        "an orientation as text.jpg": good("JPEG", exif=exif([(0x0112, 2, 2, ord("6"))])),
        "exif cut off.jpg": good("JPEG", exif=TEXT_RESOLUTION[:-9]),
        "exif of nothing.jpg": good("JPEG", exif=b"Exif\0\0II"),
        "exif of 4 billion.jpg": good("JPEG", exif=exif([(0x010E, 2, 2**32 - 1, 8)])),
    }


def damaged(count, seed=0) -> dict[str, bytes]:
    """Files with bytes removed, changed, repeated or replaced; some are still images."""
    rng = np.random.default_rng(seed)
    rotated = exif([(0x0112, 3, 1, 6), (0x8769, 4, 1, 26), (0x010E, 2, 40, 8)])
    whole = [
        ("png", good()),
        ("png", good(pnginfo=_text())),
        ("jpg", good("JPEG", exif=rotated)),
        ("jpg", good("JPEG", progressive=True)),
        ("webp", good("WEBP", exif=rotated)),
        ("webp", good("WEBP", lossless=True)),
        *((name.rpartition(".")[2], content) for name, content in unusual().items()),
    ]
    files = {}
    for number in range(count):
        end, content = whole[rng.integers(len(whole))]
        bytes_ = bytearray(content)
        # Most headers are at the beginning.
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
    """Text chunks of a PNG file."""
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 50)
    text.add_itxt("c", "d" * 50, zip=True)
    return text
