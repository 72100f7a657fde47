"""Where the images of a folder are: files in a folder for each class, or records of tar files.

One rule holds for both: a class is a folder directly in ``train/``, and its images are the files
directly in that folder. ``_sorted`` applies it.

A tar file is read in place: where each of its members begins is looked up once, and an image is
read from there when it is wanted. Nothing is unpacked, and links are not followed.
"""

import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
import os
import pathlib
import tarfile
from collections.abc import Iterable, Iterator

from involution.utils.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
# Images that are counted and not read: SECURITY.md limits what is decoded to three formats, and
# some of these hold several images, or none made of pixels.
OTHERS = (
    *(".bmp", ".dib", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".psd", ".svg", ".dng", ".cr2", ".nef"),
)
# Folders that file servers and operating systems create beside those of their users.
SYSTEM = (
    *("@eaDir", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information"),
    *("lost+found", "__MACOSX"),
)
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
# Names of folders, and at the end the name of a file.
Parts = tuple[str, ...]
# Reasons why an image is not used.
FORMAT, NESTED, STRAY = "{} files", "in folders within a class", "outside of the classes"


@dataclasses.dataclass(frozen=True)
class Found:
    """The images of a folder.

    Attributes:
        train, test: By class.
        skipped: Which images are not used, and why, in one line; empty where all are.
    """

    train: Classes
    test: Classes
    skipped: str


class _Skipped(dict[str, list[str]]):
    """Names of images that are not used, by the reason."""

    def add(self, reason, image):
        self.setdefault(reason, []).append(str(image))

    def __str__(self):
        return "; ".join(
            f"{len(names)} {reason}, as {min(names)}" for reason, names in sorted(self.items())
        )


def find(root) -> Found:
    """The images of ``train`` and ``test``, by class.

    A class is a folder directly in ``train/``, and its images are the files directly in that
    folder whose names end in one of ``SUFFIXES``, in the order of their names. Classes are in the
    order of their names, or of numbers if all names are numbers: the same on every system. Hidden
    files and folders (the name begins with a dot) are ignored, and so are those of ``SYSTEM``.
    Images of other formats, in folders within a class, or outside of the classes are not used:
    ``Found.skipped`` counts them.

    Tar files follow the same rule. Their ``train/`` is the folder with that name which holds all
    images; if there is none, the folder which holds all folders of images. An image with a ``.cls``
    file beside it, as in WebDataset, belongs to the class named there, in whatever folder it is.

    Args:
        root: A folder with ``train/<class>/`` and ``test/<class>/``, or ``val/<class>/`` as
            ImageNet has it; or with tar files instead, as ``train.tar``, or ``train-000.tar``,
            ``train-001.tar`` and so on.

    Raises:
        InputError: It is none, a class has no images, or its name is not valid UTF-8.
    """
    skipped = _Skipped()
    try:
        train, test = (_part(root, part, names, skipped) for part, names in PARTS.items())
    except OSError as error:
        raise InputError(
            f"A folder of images must be readable. Received: {error.filename}: {error.strerror}"
        ) from error
    return Found(train, test, str(skipped))


def _part(root, part, names, skipped) -> Classes:
    for name in names:
        folder = root / name
        archives = sorted((*root.glob(f"{name}.tar"), *root.glob(f"{name}-*.tar")))
        if folder.is_dir() and (classes := _of_folder(folder, skipped)):
            return classes
        if archives:
            return _of_archives(archives, names, skipped)
    raise InputError(
        "A folder of images must hold train/<class>/ and test/<class>/ (or val/<class>/), or tar "
        f"files of them. Received: {root}, without {part}/<class>/"
    )


def _of_folder(folder, skipped) -> Classes:
    names = [entry.name for entry in _visible(folder) if entry.is_dir()]
    # ImageNet's test images have no classes: where there is val/ they are not looked at.
    return _sorted(names, _walk(folder), (), folder, skipped) if names else {}


def _walk(folder, above: Parts = ()) -> Iterator[tuple[Parts, File]]:
    """Images in a folder, with their places in it."""
    for entry in _visible(folder):
        place = (*above, entry.name)
        # A class may be a link to a folder; deeper ones are not followed, as they may form a loop.
        if entry.is_dir(follow_symlinks=not above):
            yield from _walk(entry.path, place)
        elif _suffix(entry.name) in (*SUFFIXES, *OTHERS) and not entry.is_dir():
            yield place, File(entry.path)


def _visible(folder) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not _is_hidden(entry.name)]


def _is_hidden(name) -> bool:
    return (name.startswith(".") and name != "..") or name in SYSTEM


def _suffix(name) -> str:
    return os.path.splitext(name)[1].lower()


def _sorted(
    names: Iterable[str],
    placed: Iterable[tuple[Parts, File | Record]],
    named: Iterable[tuple[str, File | Record]],
    where: pathlib.Path,
    skipped: _Skipped,
) -> Classes:
    """Images by class.

    Args:
        names: The folders directly in the part's.
        placed: Images with their places in the part's folder.
        named: Images with the names of their classes.
        where: The folder or tar file, for errors.
        skipped: Gets the images that are not used.
    """
    classes: Classes = {name: [] for name in names}
    unused = _Skipped()

    def add(name, image):
        suffix = _suffix(image.name)
        if suffix in OTHERS:
            unused.add(FORMAT.format(suffix), image)
        else:
            classes.setdefault(name, []).append(image)

    for place, image in placed:
        if len(place) == 2:
            add(place[0], image)
        else:
            unused.add(NESTED if len(place) > 2 else STRAY, image)
    for name, image in named:
        add(name, image)
    for name, images in sorted(classes.items()):
        shown = name.encode("utf-8", "backslashreplace").decode()
        if shown != name:
            raise InputError(
                "The name of a class must be valid UTF-8, the encoding of models and reports. "
                f"Received: {shown} in {where}"
            )
        if not images:
            more = f", but {unused}" if unused else ""
            raise InputError(
                f"Every class must have images ({', '.join(SUFFIXES)}). "
                f"Received: none in {where / name}{more}"
            )
    for reason, files in unused.items():
        skipped.setdefault(reason, []).extend(files)
    # Numbers are compared as such: with class 10 after 9 a model's output has the class's index.
    numbers = all(map(str.isdecimal, classes))
    order = sorted(classes, key=lambda name: (int(name) if numbers else 0, name))
    return {name: sorted(classes[name], key=str) for name in order}


@dataclasses.dataclass(frozen=True)
class _Members:
    """What tar files hold.

    Attributes:
        placed: Images with their places in the tar file, those of other formats too.
        named: Images with the names of their classes, from ``.cls`` files.
        folders: The folders of all members.
        named_folders: Those of ``named``.
    """

    placed: list[tuple[Parts, Record]] = dataclasses.field(default_factory=list)
    named: list[tuple[str, Record]] = dataclasses.field(default_factory=list)
    folders: set[Parts] = dataclasses.field(default_factory=set)
    named_folders: set[Parts] = dataclasses.field(default_factory=set)


def _of_archives(archives, names, skipped) -> Classes:
    members = _Members()
    for archive in archives:
        try:
            _read(archive, names, members)
        except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
            raise InputError(
                f"A tar file of images must be whole, and not compressed. Received: {archive}: "
                f"{' '.join(str(error).split())}"
            ) from error
    within = [place for place, _ in members.placed if len(place) > 1]
    for name, record in members.named:
        if not name:
            raise _without_class(record)
    for place, record in members.placed:
        if len(place) == 1 and (members.named or not within):
            raise _without_class(record)
    if not members.placed and not members.named:
        raise InputError(
            f"Tar files must hold images ({', '.join(SUFFIXES)}). Received: none in {archives[0]}"
        )
    top = _top([place[:-1] for place in within], names)
    depth = len(top)

    def classes(folders):
        return {f[depth] for f in folders if len(f) > depth and f[:depth] == top}

    # A folder of images that have .cls files is no class, nor is any if all images have one.
    folders = classes(members.folders) - classes(members.named_folders) if within else set()
    placed = (
        (place[depth:] if place[:depth] == top else place[-1:], record)
        for place, record in members.placed
    )
    return _sorted(
        folders | classes(place[:-1] for place in within),
        placed,
        members.named,
        archives[0],
        skipped,
    )


def _without_class(record) -> InputError:
    return InputError(
        f"An image in a tar file must be in a folder named by its class, or have a {CLASS} "
        f"file beside it. Received: {record}"
    )


def _top(folders: list[Parts], names) -> Parts:
    """The folder of the classes, from the folders of images."""
    shared = _shared(folders)
    depths = [depth for depth, name in enumerate(shared, 1) if name in names]
    return shared[: depths[-1]] if depths else _shared([folder[:-1] for folder in folders])


def _shared(folders: list[Parts]) -> Parts:
    """The folder that holds all of these."""
    levels = (set(names) for names in zip(*set(folders), strict=False))
    return tuple(names.pop() for names in itertools.takewhile(lambda n: len(n) == 1, levels))


def _read(archive, names, members):
    """Adds what a tar file holds."""
    told, records, before = {}, [], -1
    with tarfile.open(archive, "r:") as opened:
        for member in opened:
            # Otherwise it keeps all of them.
            opened.members = []  # type: ignore[attr-defined]  # not in its stubs
            if member.offset <= before or member.size < 0:
                raise tarfile.ReadError("its members do not follow each other")
            before = member.offset
            path = pathlib.PurePosixPath(member.name)
            place = path.parts[bool(path.anchor) :]
            # The folder that was packed may be in a hidden one.
            begin = next((n for n, name in enumerate(place) if name in names), 0)
            if any(map(_is_hidden, place[begin:])):
                continue
            members.folders.add(place if member.isdir() else place[:-1])
            kind = "" if member.isdir() else path.suffix.lower()
            if kind in (CLASS, *SUFFIXES) and (not member.isreg() or member.issparse()):
                raise tarfile.ReadError(f"{path} is a link, or of another kind that is not read")
            if kind == CLASS:
                content = opened.extractfile(member)
                text = b"" if content is None else content.read(MOST_CLASS + 1)
                if len(text) > MOST_CLASS:
                    raise tarfile.ReadError(f"{path} has more than {MOST_CLASS} bytes")
                told[str(path.with_suffix(""))] = text.decode("utf-8").strip()
            elif kind in (*SUFFIXES, *OTHERS):
                record = Record(str(archive), member.name, member.offset_data, member.size)
                records.append((path, place, record))
        # Where a header is damaged the reader ends as if all were read.
        with open(archive, "rb") as file:
            file.seek(opened.offset)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError("its end is missing")
    for path, place, record in records:
        name = told.get(str(path.with_suffix("")))
        if name is None:
            members.placed.append((place, record))
        else:
            members.named.append((name, record))
            members.named_folders.add(place[:-1])


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
