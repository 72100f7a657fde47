"""The images of a folder by class: image files, or members of tar files.

The same rule applies to both: a class is a folder directly in ``train/``, and its images are the
files directly in that folder. ``_group_by_class`` implements it.

Tar files are not unpacked: the offsets of their members are read once, and an image is read at its
offset. In folders, links to classes and to images are followed, and deeper links to folders are
not; a link in a tar file is an error.
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

import numpy as np

from involution.data.image_formats import hint, suffixes, unsupported_suffixes
from involution.utils.errors import InputError, one_line

# Created by file servers and operating systems; ignored.
SYSTEM_FOLDERS = (
    *("@eaDir", "@Recycle", "#recycle", "#snapshot", "$RECYCLE.BIN", "System Volume Information"),
    *("lost+found", "__MACOSX"),
)
# In WebDataset, a file with this suffix and an image's base name contains the image's class.
LABEL_SUFFIX = ".cls"
MAX_LABEL_BYTES = 1000
SPLITS = {"train": ("train",), "test": ("test", "val")}
# Folders of at least this many bytes are not decoded or hashed up front, which would take minutes.
MAX_DECODED_BYTES = 2**32


@dataclasses.dataclass(frozen=True, slots=True)
class FileSource:
    """An image in its own file."""

    path: str

    @property
    def size(self) -> int:
        try:
            return os.stat(self.path).st_size
        except OSError:  # decoding reports it
            return 0

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def open(self) -> io.BufferedIOBase:
        check_regular(self.path)
        return open(self.path, "rb")

    def __str__(self):
        return self.path


@dataclasses.dataclass(frozen=True, slots=True)
class TarMember:
    """An image in a tar file."""

    archive: str
    name: str
    offset: int
    size: int

    def open(self) -> io.BufferedIOBase:
        with open(self.archive, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))

    def __str__(self):
        return f"{self.archive}: {self.name}"


Source = FileSource | TarMember
SourcesByClass = dict[str, list[Source]]
# A relative path: the names of folders, then of the file.
PathParts = tuple[str, ...]
# Reasons for skipping images of readable formats.
NESTED, STRAY = "in subfolders of a class", "outside of any class"


@dataclasses.dataclass(frozen=True)
class ScanResult:
    """The images of a folder.

    Attributes:
        train, test: Images by class.
        skipped: Numbers of skipped images by reason, in one line; empty if none is skipped.
    """

    train: SourcesByClass
    test: SourcesByClass
    skipped: str


class _Skipped(dict[str, list[str]]):
    """Names of skipped images by reason."""

    def add(self, reason, image):
        self.setdefault(reason, []).append(str(image))

    def add_unsupported(self, image) -> bool:
        """Adds an image if its format is not read; returns whether it was added."""
        suffix = _suffix(image.name)
        if suffix not in unsupported_suffixes():
            return False
        needs = hint(image.name)
        self.add(f"in {suffix} format" + (f" ({needs})" if needs else ""), image)
        return True

    def __str__(self):
        return "; ".join(
            f"{len(names)} {reason}, such as {min(names)}" for reason, names in sorted(self.items())
        )


def scan(root, split=None, seed=0) -> ScanResult:
    """The training and test images of a folder, by class.

    A class is a folder directly in ``train/``. Its images are the files directly in that folder
    whose names end in one of ``image_formats.suffixes()``, sorted by name. Classes are sorted by
    name, or as numbers if all names are numbers, on every system. Hidden files and folders (names
    with a leading dot) and ``SYSTEM_FOLDERS`` are ignored. Images of other formats, in subfolders
    of a class, or outside of any class are skipped and counted in ``ScanResult.skipped``.

    Tar files follow the same rule. Their ``train/`` is the folder of this name that contains all
    images, or, without one, the folder that contains all folders of images. An image that has a
    ``.cls`` file of the same base name, as in WebDataset, belongs to the class in that file,
    whatever its folder.

    Args:
        root: A folder with ``train/<class>/`` and ``test/<class>/`` or, as in ImageNet,
            ``val/<class>/``; or with the tar files ``train.tar``, or ``train-000.tar``,
            ``train-001.tar`` and so on, instead.
        split: Fraction of the images of each class that become its test images, at least one, in
            a folder that has only ``train/``, or the classes themselves. None: not split.
        seed: Determines which.

    Raises:
        InputError: A split is missing or damaged, or exists although ``split`` is given; a class
            has no images, or a single one to be split, or its name is not valid UTF-8.
    """
    skipped = _Skipped()
    try:
        found = {part: _scan_split(root, names, skipped) for part, names in SPLITS.items()}
        if split is not None:
            if found["test"]:
                raise InputError(
                    "`split` applies to folders without test/ and val/. "
                    f"Received: {split} for {root}, which has test images"
                )
            classes = found["train"] or _scan_folder(root, skipped)
            train, test = _split_by_class(classes, split, seed)
        else:
            for part, classes in found.items():
                if not classes:
                    raise InputError(
                        "An image folder must contain train/<class>/ and test/<class>/ (or "
                        "val/<class>/), or tar files of them; or <class>/ alone if `split` is "
                        f"given, such as 0.2. Received: {root}, without {part}/<class>/"
                    )
            train, test = found.values()
    except OSError as error:
        raise InputError(
            f"An image folder must be readable. Received: {error.filename}: {error.strerror}"
        ) from error
    return ScanResult(train, test, str(skipped))


def check_regular(path):
    """Raises OSError for a FIFO, a device or a folder: opening a FIFO waits for a writer."""
    if not os.path.isfile(path) and os.path.exists(path):
        raise OSError("not a regular file")


def find_images(folder) -> tuple[list[str], str]:
    """The images in a folder and its subfolders, sorted by path, and the skipped ones as in
    ``ScanResult.skipped``. Hidden files and folders are ignored."""
    skipped = _Skipped()
    found = []
    for _, image in _walk(folder):
        if not skipped.add_unsupported(image):
            found.append(str(image))
    return sorted(found), str(skipped)


def _scan_split(root, names, skipped) -> SourcesByClass:
    """The images of a split in the first of these folders or tar files that has classes."""
    for name in names:
        folder = root / name
        archives = sorted((*root.glob(f"{name}.tar"), *root.glob(f"{name}-*.tar")))
        if folder.is_dir() and (classes := _scan_folder(folder, skipped)):
            return classes
        if archives:
            return _scan_archives(archives, names, skipped)
    return {}


def _split_by_class(classes, fraction, seed) -> tuple[SourcesByClass, SourcesByClass]:
    """Training and test images: of each class this fraction, and at least one, are test images."""
    random = np.random.default_rng([seed, 0, 3])
    train: SourcesByClass = {}
    test: SourcesByClass = {}
    for name, images in classes.items():
        if len(images) < 2:
            raise InputError(
                f"A class must have at least two images to be split. Received: one in {name}"
            )
        count = min(max(round(fraction * len(images)), 1), len(images) - 1)
        chosen = set(random.permutation(len(images))[:count].tolist())
        test[name] = [image for number, image in enumerate(images) if number in chosen]
        train[name] = [image for number, image in enumerate(images) if number not in chosen]
    return train, test


def _scan_folder(folder, skipped) -> SourcesByClass:
    names = [entry.name for entry in _visible(folder) if _is_folder(entry)]
    # A folder without classes, such as ImageNet's test/, is not a split: val/ is tried next.
    return _group_by_class(names, _walk(folder), (), folder, skipped) if names else {}


def _walk(folder, parents: PathParts = ()) -> Iterator[tuple[PathParts, FileSource]]:
    """Pairs (relative path, image) of a folder."""
    for entry in _visible(folder):
        path = (*parents, entry.name)
        # A class may be a link to a folder; deeper links may form a loop.
        if _is_folder(entry, follow_symlinks=not parents):
            yield from _walk(entry.path, path)
        elif _has_image_suffix(entry.name) and not _is_folder(entry):
            yield path, FileSource(entry.path)


def _has_image_suffix(name) -> bool:
    return _suffix(name) in (*suffixes(), *unsupported_suffixes())


def _is_folder(entry, follow_symlinks=True) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow_symlinks)
    except OSError:  # of a link to itself, which is reported where it is read as an image
        return False


def _visible(folder) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not _is_hidden(entry.name)]


def _is_hidden(name) -> bool:
    return (name.startswith(".") and name != "..") or name in SYSTEM_FOLDERS


def _suffix(name) -> str:
    return os.path.splitext(name)[1].lower()


def _group_by_class(
    class_names: Iterable[str],
    by_path: Iterable[tuple[PathParts, Source]],
    labeled: Iterable[tuple[str, Source]],
    where: pathlib.Path,
    skipped: _Skipped,
) -> SourcesByClass:
    """Images by class.

    Args:
        class_names: The folders directly in the folder of the split.
        by_path: Pairs (path relative to the folder of the split, image).
        labeled: Pairs (class, image).
        where: The folder or tar file, for errors.
        skipped: Skipped images are added to it.
    """
    classes: SourcesByClass = {name: [] for name in class_names}
    unused = _Skipped()

    def add(name, image):
        if not unused.add_unsupported(image):
            classes.setdefault(name, []).append(image)

    for path, image in by_path:
        if len(path) == 2:
            add(path[0], image)
        else:
            unused.add(NESTED if len(path) > 2 else STRAY, image)
    for name, image in labeled:
        add(name, image)
    for name, images in sorted(classes.items()):
        escaped = name.encode("utf-8", "backslashreplace").decode()
        if escaped != name:
            raise InputError(
                "A class name must be valid UTF-8, the encoding of models and reports. "
                f"Received: {escaped} in {where}"
            )
        if not images:
            more = f", but {unused}" if unused else ""
            raise InputError(
                f"Every class must have images ({', '.join(suffixes())}). "
                f"Received: none in {where / name}{more}"
            )
    for reason, files in unused.items():
        skipped.setdefault(reason, []).extend(files)
    # Numbers sort as numbers, so that class 10 follows class 9.
    numeric = all(map(str.isdecimal, classes))
    ordered = sorted(classes, key=lambda name: (int(name) if numeric else 0, name))
    return {name: sorted(classes[name], key=str) for name in ordered}


@dataclasses.dataclass(frozen=True)
class _TarContents:
    """The members of a split's tar files.

    Attributes:
        by_path: Pairs (path, image), unsupported formats included.
        labeled: Pairs (class, image), the class from a ``.cls`` file.
        folders: The folders of all members.
        labeled_folders: The folders of ``labeled``.
    """

    by_path: list[tuple[PathParts, TarMember]] = dataclasses.field(default_factory=list)
    labeled: list[tuple[str, TarMember]] = dataclasses.field(default_factory=list)
    folders: set[PathParts] = dataclasses.field(default_factory=set)
    labeled_folders: set[PathParts] = dataclasses.field(default_factory=set)


def _scan_archives(archives, split_names, skipped) -> SourcesByClass:
    contents = _TarContents()
    for archive in archives:
        try:
            _read_archive(archive, split_names, contents)
        except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
            raise InputError(
                f"A tar file of images must be complete and uncompressed. Received: {archive}: "
                f"{one_line(error)}"
            ) from error
    in_folders = [path for path, _ in contents.by_path if len(path) > 1]
    for label, image in contents.labeled:
        if not label:
            raise _unlabeled(image)
    for path, image in contents.by_path:
        if len(path) == 1 and (contents.labeled or not in_folders):
            raise _unlabeled(image)
    if not contents.by_path and not contents.labeled:
        raise InputError(
            f"A tar file must contain images ({', '.join(suffixes())}). "
            f"Received: none in {archives[0]}"
        )
    root = _class_root([path[:-1] for path in in_folders], split_names)
    depth = len(root)

    def classes(folders):
        return {f[depth] for f in folders if len(f) > depth and f[:depth] == root}

    # Folders of labeled images are not classes; if all images are labeled, no folder is one.
    folders = classes(contents.folders) - classes(contents.labeled_folders) if in_folders else set()
    by_path = (
        (path[depth:] if path[:depth] == root else path[-1:], image)
        for path, image in contents.by_path
    )
    return _group_by_class(
        folders | classes(path[:-1] for path in in_folders),
        by_path,
        contents.labeled,
        archives[0],
        skipped,
    )


def _unlabeled(image) -> InputError:
    return InputError(
        f"An image in a tar file must be in a folder named after its class, or have a "
        f"{LABEL_SUFFIX} file of the same base name. Received: {image}"
    )


def _class_root(folders: list[PathParts], split_names) -> PathParts:
    """The folder that contains the classes, from the folders of images."""
    prefix = _common_prefix(folders)
    depths = [depth for depth, name in enumerate(prefix, 1) if name in split_names]
    return prefix[: depths[-1]] if depths else _common_prefix([folder[:-1] for folder in folders])


def _common_prefix(folders: list[PathParts]) -> PathParts:
    """The deepest folder that contains all of these."""
    levels = (set(names) for names in zip(*set(folders), strict=False))
    return tuple(names.pop() for names in itertools.takewhile(lambda n: len(n) == 1, levels))


def _read_archive(archive, split_names, contents):
    """Adds the members of a tar file to ``contents``."""
    labels, images, previous = {}, [], -1
    with tarfile.open(archive, "r:") as opened:
        for member in opened:
            # TarFile would keep all members in memory.
            opened.members = []  # type: ignore[attr-defined]  # not in its stubs
            if member.offset <= previous or member.size < 0:
                raise tarfile.ReadError("its members do not follow each other")
            previous = member.offset
            name = pathlib.PurePosixPath(member.name)
            path = name.parts[bool(name.anchor) :]
            # Hidden folders above the split are allowed.
            begin = next((n for n, part in enumerate(path) if part in split_names), 0)
            if any(map(_is_hidden, path[begin:])):
                continue
            contents.folders.add(path if member.isdir() else path[:-1])
            suffix = "" if member.isdir() else name.suffix.lower()
            if suffix in (LABEL_SUFFIX, *suffixes()) and (not member.isreg() or member.issparse()):
                raise tarfile.ReadError(f"{name} is a link or special file, which is not read")
            if suffix == LABEL_SUFFIX:
                file = opened.extractfile(member)
                content = b"" if file is None else file.read(MAX_LABEL_BYTES + 1)
                if len(content) > MAX_LABEL_BYTES:
                    raise tarfile.ReadError(f"{name} has more than {MAX_LABEL_BYTES} bytes")
                labels[str(name.with_suffix(""))] = content.decode("utf-8").strip()
            elif suffix in (*suffixes(), *unsupported_suffixes()):
                image = TarMember(str(archive), member.name, member.offset_data, member.size)
                images.append((name, path, image))
        # TarFile treats a damaged header as the end of the archive.
        with open(archive, "rb") as raw:
            raw.seek(opened.offset)
            if raw.read(512) != bytes(512):
                raise tarfile.ReadError("its end is missing")
    for name, path, image in images:
        label = labels.get(str(name.with_suffix("")))
        if label is None:
            contents.by_path.append((path, image))
        else:
            contents.labeled.append((label, image))
            contents.labeled_folders.add(path[:-1])


def exceeds_decode_limit(sources: list[Source]) -> bool:
    """Whether the total size of the image files is at least ``MAX_DECODED_BYTES``."""
    total = 0
    for source in sources:
        total += source.size
        if total >= MAX_DECODED_BYTES:
            return True
    return False


def digest(sources: list[Source], metadata_only: bool) -> str:
    """SHA-256 that identifies the images, in hexadecimal: of the contents of their files, or with
    ``metadata_only`` of names and sizes."""

    def digest_of(source) -> bytes:
        if metadata_only:
            return os.fsencode(f"{source.name}\0{source.size}\n")
        with source.open() as file:
            return hashlib.sha256(file.read()).digest()

    combined = hashlib.sha256()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for begin in range(0, len(sources), 1024):
            for part in pool.map(digest_of, sources[begin : begin + 1024]):
                combined.update(part)
    return combined.hexdigest()
