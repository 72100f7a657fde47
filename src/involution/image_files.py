"""Where the images of a folder are: files in a folder for each class, or records of tar files.

A tar file is read in place: where each of its members begins is looked up once, and an image is
read from there when it is wanted. Nothing is unpacked, and links are not followed.
"""

import concurrent.futures
import dataclasses
import hashlib
import io
import os
import pathlib
import tarfile
from collections.abc import Iterable, Iterator

from involution.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
# What a class is named by in a tar file of the WebDataset kind, instead of by its folder.
CLASS = ".cls"
MOST_CLASS = 1000  # bytes
PARTS = {"train": ("train",), "test": ("test", "val")}
# Bytes.
LARGE = 2**32


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """An image in a file of its own."""

    path: str

    @property
    def size(self) -> int:
        try:
            return os.stat(self.path).st_size
        except OSError:  # it is named when it is read
            return 0

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def open(self) -> io.BufferedIOBase:
        return open(self.path, "rb")

    def __str__(self):
        return self.path


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """An image within a tar file."""

    archive: str
    name: str
    begin: int
    size: int

    def open(self) -> io.BufferedIOBase:
        with open(self.archive, "rb") as file:
            file.seek(self.begin)
            return io.BytesIO(file.read(self.size))

    def __str__(self):
        return f"{self.archive}: {self.name}"


Classes = dict[str, list[File | Record]]


def find(root) -> dict[str, Classes]:
    """The images of ``train`` and ``test``, by class; in the order of their names, which is the
    same everywhere.

    Args:
        root: A folder with ``train/<class>/`` and ``test/<class>/``, or ``val/<class>/`` as
            ImageNet has it; or with tar files instead, as ``train.tar``, or ``train-000.tar``,
            ``train-001.tar`` and so on.

    Raises:
        InputError: It is none, or a class has no images.
    """
    try:
        return {part: _part(root, part, names) for part, names in PARTS.items()}
    except OSError as error:
        raise InputError(
            f"A folder of images must be readable. Received: {error.filename}: {error.strerror}"
        ) from error


def _part(root, part, names) -> Classes:
    for name in names:
        folder = root / name
        archives = sorted((*root.glob(f"{name}.tar"), *root.glob(f"{name}-*.tar")))
        if folder.is_dir() and (classes := _of_folder(folder)):
            return classes
        if archives:
            return _of_archives(archives)
    raise InputError(
        "A folder of images must hold train/<class>/ and test/<class>/ (or val/<class>/), or tar "
        f"files of them. Received: {root}, without {part}/<class>/"
    )


def _of_folder(folder) -> Classes:
    classes: Classes = {
        entry.name: [
            File(file.path)
            for file in _visible(os.scandir(entry))
            if os.path.splitext(file.name)[1].lower() in SUFFIXES and not file.is_dir()
        ]
        for entry in _visible(os.scandir(folder))
        if entry.is_dir()
    }
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise InputError(
            f"Every class must have images ({', '.join(SUFFIXES)}). "
            f"Received: none in {folder / empty[0]}"
        )
    return classes


def _visible(entries: Iterable[os.DirEntry]) -> list[os.DirEntry]:
    return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)


def _of_archives(archives) -> Classes:
    found: Classes = {}
    for archive in archives:
        try:
            for name, record in _records(archive):
                found.setdefault(name, []).append(record)
        except InputError:
            raise
        except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
            raise InputError(
                f"A tar file of images must be whole, and not compressed. Received: {archive}: "
                f"{' '.join(str(error).split())}"
            ) from error
    if not found:
        raise InputError(
            f"Tar files must hold images ({', '.join(SUFFIXES)}). Received: none in {archives[0]}"
        )
    # Numbers as numbers.
    key = (lambda name: (len(name), name)) if all(map(str.isdecimal, found)) else None
    return {name: sorted(found[name], key=str) for name in sorted(found, key=key)}


def _records(archive) -> Iterator[tuple[str, Record]]:
    """Each image with the name of its class."""
    told, records, before = {}, [], -1
    with tarfile.open(archive, "r:") as opened:
        for member in opened:
            # Otherwise it keeps all of them.
            opened.members = []  # type: ignore[attr-defined]  # not in its stubs
            if member.offset <= before or member.size < 0:
                raise tarfile.ReadError("its members do not follow each other")
            before = member.offset
            path = pathlib.PurePosixPath(member.name)
            if path.name.startswith(".") or member.isdir():
                continue
            kind = path.suffix.lower()
            if kind in (CLASS, *SUFFIXES) and (not member.isreg() or member.issparse()):
                raise tarfile.ReadError(f"{path} is a link, or of another kind that is not read")
            if kind == CLASS:
                content = opened.extractfile(member)
                text = b"" if content is None else content.read(MOST_CLASS + 1)
                if len(text) > MOST_CLASS:
                    raise tarfile.ReadError(f"{path} has more than {MOST_CLASS} bytes")
                told[str(path.with_suffix(""))] = text.decode("utf-8").strip()
            elif kind in SUFFIXES:
                record = Record(str(archive), member.name, member.offset_data, member.size)
                records.append((path, record))
        # Where a header is damaged the reader ends as if all were read.
        with open(archive, "rb") as file:
            file.seek(opened.offset)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("its end is missing")
    for path, record in records:
        name = told.get(str(path.with_suffix("")), path.parent.name)
        if not name:
            raise InputError(
                f"An image in a tar file must be in a folder named by its class, or have a {CLASS} "
                f"file beside it. Received: {record}"
            )
        yield name, record


def are_large(sources: list[File | Record]) -> bool:
    """Whether it would take minutes to read all of them."""
    total = 0
    for source in sources:
        total += source.size
        if total >= LARGE:
            return True
    return False


def digest(sources: list[File | Record], large: bool) -> str:
    """SHA-256 that tells images from others, in hexadecimal: of the content of the files, or of
    large ones of their names and sizes."""

    def of_one(source) -> bytes:
        if large:
            return os.fsencode(f"{source.name}\0{source.size}\n")
        with source.open() as file:
            return hashlib.sha256(file.read()).digest()

    whole = hashlib.sha256()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for begin in range(0, len(sources), 1024):
            for one in pool.map(of_one, sources[begin : begin + 1024]):
                whole.update(one)
    return whole.hexdigest()
