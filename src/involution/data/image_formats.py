"""Image formats: the decoders that Pillow may use, and the suffixes of their files."""

import functools

# Suffixes by Pillow's name of the format. Other formats are not decoded: some of them contain
# vector graphics or run external programs.
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
HEIF = {"HEIF": (".heic", ".heif")}
# Counted as skipped images, so that a folder of them is not called empty.
UNSUPPORTED_SUFFIXES = (
    *(".avif", ".jxl", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".psd"),
    *(".svg", ".dng", ".cr2", ".nef"),
)
NAMES = "PNG, JPEG, WebP, BMP, GIF or TIFF"


@functools.cache
def formats() -> dict[str, tuple[str, ...]]:
    """Suffixes of readable files by format; HEIC only with the extra ``heic``."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return FORMATS | HEIF


def suffixes() -> tuple[str, ...]:
    """Suffixes of readable files, in lower case, with the dot."""
    return tuple(suffix for of_format in formats().values() for suffix in of_format)


def unsupported_suffixes() -> tuple[str, ...]:
    """Suffixes of images that are not read, in lower case, with the dot."""
    return UNSUPPORTED_SUFFIXES if "HEIF" in formats() else UNSUPPORTED_SUFFIXES + HEIF["HEIF"]


def hint(name) -> str:
    """What would make a file of this name readable; empty if nothing is known."""
    if str(name).lower().endswith(HEIF["HEIF"]) and "HEIF" not in formats():
        return "pip install 'involution[heic]'"
    return ""
