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
    """A PNG file whose header declares this size; ``rows``, compressed, is its image data."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"".join(
        (b"\x89PNG\r\n\x1a\n", png_chunk(b"IHDR", header), more, data, png_chunk(b"IEND", b""))
    )


def valid(format="PNG", size=(40, 30), seed=0, **options):
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


# A rotated photo. Some cameras write the resolution as the text "72", not as a number.
TEXT_RESOLUTION = exif([(0x0112, 3, 1, 6), (0x011A, 2, 3, int.from_bytes(b"72", "little"))])


def invalid() -> dict[str, bytes]:
    """Invalid images: the contents by file name, which describes the defect."""
    files: dict[str, bytes] = {
        "empty.png": b"",
        "text.png": b"hello, I am a picture",
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg">'
        b'<image href="http://127.0.0.1:1/"/></svg>',
        "vector.svg": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
        "page.jpg": b"<!doctype html><script>alert(1)</script>",
        "gif.png": valid("GIF"),
        "bmp.png": valid("BMP"),
        "tiff.png": valid("TIFF"),
        "pdf.png": b"%PDF-1.4\n%%EOF",
        "zip.png": b"PK\x03\x04" + bytes(60),
        "pickle.png": b"\x80\x04cposix\nsystem\n.",
        "ghostscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(id) run\n",
        "nine megabytes.png": valid() + bytes(9 * MEGABYTE),
        "claims 100000 by 100000.png": png(100_000, 100_000),
        "claims 2**31 - 1 wide.png": png(2**31 - 1, 1),
        "zero width.png": png(0, 10),
        "bomb of 64 million black pixels.png": png(8000, 8000, bytes(MEGABYTE)),
        "no data.png": png(32, 32),
        "invalid bit depth.png": png(32, 32, bytes(9999), depth=7),
        "invalid color type.png": png(32, 32, bytes(9999), color=5),
        "text bomb.png": png(
            32, 32, bytes(97 * 32), more=png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8)))
        ),
    }
    canvas = bytearray(unusual()["animated.webp"])
    height = canvas.index(b"VP8X") + 15
    canvas[height : height + 3] = b"\xff\xff\x3f"
    files["claims 20 by 4 million.webp"] = bytes(canvas)
    for format, end in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")):
        content = valid(format, seed=1)
        for fraction in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9):
            files[f"{fraction:.0%} of a {format}.{end}"] = content[: int(len(content) * fraction)]
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
    animated = io.BytesIO()
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "green", "blue")]
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    return {
        "gray16.png": gray16.getvalue(),
        "palette.png": palette.getvalue(),
        "cmyk.jpg": cmyk.getvalue(),
        "animated.webp": animated.getvalue(),
        "one of 32 rows.png": png(32, 32, bytes(97)),
        "one pixel.png": valid(size=(1, 1)),
        "a line.png": valid(size=(5000, 1)),
        "no name": valid(),
        "../../etc/passwd.png": valid(),
        "x" * 180 + ".png": valid(),
        "말.png": valid(),
        "rotated.jpg": valid("JPEG", exif=exif([(0x0112, 3, 1, 6)])),
        "unknown orientation.jpg": valid("JPEG", exif=exif([(0x0112, 3, 1, 77)])),
        "exif offset outside the file.jpg": valid("JPEG", exif=exif([(0x8769, 4, 1, 2**31 - 1)])),
        "exif offset to itself.jpg": valid("JPEG", exif=exif([(0x8769, 4, 1, 8)])),
        "resolution as text.jpg": valid("JPEG", exif=TEXT_RESOLUTION),
        "resolution as text.webp": valid("WEBP", exif=TEXT_RESOLUTION),
        "orientation as text.jpg": valid("JPEG", exif=exif([(0x0112, 2, 2, ord("6"))])),
        "truncated exif.jpg": valid("JPEG", exif=TEXT_RESOLUTION[:-9]),
        "empty exif.jpg": valid("JPEG", exif=b"Exif\0\0II"),
        "exif with 4 billion characters.jpg": valid("JPEG", exif=exif([(0x010E, 2, 2**32 - 1, 8)])),
    }


def damaged(count, seed=0) -> dict[str, bytes]:
    """Files with bytes removed, changed, repeated or replaced; some are still valid images."""
    rng = np.random.default_rng(seed)
    rotated = exif([(0x0112, 3, 1, 6), (0x8769, 4, 1, 26), (0x010E, 2, 40, 8)])
    originals = [
        ("png", valid()),
        ("png", valid(pnginfo=_text())),
        ("jpg", valid("JPEG", exif=rotated)),
        ("jpg", valid("JPEG", progressive=True)),
        ("webp", valid("WEBP", exif=rotated)),
        ("webp", valid("WEBP", lossless=True)),
        *((name.rpartition(".")[2], content) for name, content in unusual().items()),
    ]
    files = {}
    for number in range(count):
        end, content = originals[rng.integers(len(originals))]
        bytes_ = bytearray(content)
        # Most changes are in the headers, at the beginning.
        limit = len(bytes_) if rng.random() < 0.3 else min(len(bytes_), 120)
        at, length = int(rng.integers(limit)), int(rng.integers(1, 40))
        match rng.integers(5):
            case 0:
                for position in rng.integers(limit, size=rng.integers(1, 8)):
                    bytes_[position] = rng.integers(256)
            case 1:
                del bytes_[at : at + length]
            case 2:
                bytes_[at:at] = bytes_[at : at + length] * int(rng.integers(1, 50))
            case 3:
                bytes_[at : at + 4] = rng.choice(
                    [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"]
                )
            case 4:
                other = originals[rng.integers(len(originals))][1]
                bytes_[at:] = other[at:]
        files[f"damaged {number}.{end}"] = bytes(bytes_)
    return files


def _text():
    """Text chunks of a PNG file."""
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 50)
    text.add_itxt("c", "d" * 50, zip=True)
    return text
