"""Image folders and tar files."""

import contextlib
import hashlib
import io
import os
import re
import shutil
import sys
import tarfile

import numpy as np
import pytest

from involution.data import datasets, decode, image_folder, image_formats
from involution.data.image_folder import TarMember
from involution.data.lazy_images import LazyImages
from involution.utils import memory
from involution.utils.errors import InputError
from tests.support.images import write_folder, write_image

pytestmark = pytest.mark.any_backend

SUFFIXES = ", ".join(image_formats.suffixes())


@pytest.fixture
def pets(tmp_path):
    return write_folder(tmp_path / "pets")


def pack(pets, folder, splits=("train", "test"), mode="w", prefix=""):
    """Writes the folder as tar files, one for each split."""
    folder.mkdir()
    for split in splits:
        with tarfile.open(folder / f"{split}.tar", mode) as archive:
            archive.add(pets / split, f"{prefix}{split}")
    return folder


def add_member(archive, name, content=b"", **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(content))


def test_tar_files_give_the_same_data_set(pets, tmp_path):
    folder, archives = datasets.load(str(pets)), datasets.load(str(pack(pets, tmp_path / "tar")))
    assert archives.class_names == folder.class_names
    for name in ("x_train", "y_train", "x_test", "y_test"):
        np.testing.assert_array_equal(getattr(archives, name), getattr(folder, name))
    assert archives.fingerprint() == folder.fingerprint()


def test_tar_files_are_read_in_place(pets, tmp_path, monkeypatch):
    pack(pets, tmp_path / "tar", prefix="./some/")
    monkeypatch.setattr(memory, "memory_limit", lambda: 0)
    loaded = datasets.load(str(tmp_path / "tar"))
    assert isinstance(loaded.x_train, LazyImages)
    np.testing.assert_array_equal(loaded.x_train[:], datasets.load(str(pets)).x_train[:])
    assert str(loaded.x_train.sources[0]) == f"{tmp_path}/tar/train.tar: ./some/train/ant/0.png"
    # Errors name the member.
    path = tmp_path / "tar" / "train.tar"
    offset = loaded.x_train.sources[1].offset
    content = path.read_bytes()
    path.write_bytes(content[:offset] + b"x" * 20 + content[offset + 20 :])
    with pytest.raises(InputError, match=r"Received: \S+train\.tar: \./some/train/ant/1\.png"):
        loaded.x_train[:3]
    path.write_bytes(content[: offset + 20])
    with pytest.raises(InputError, match=r"train/ant/1\.png"):
        loaded.x_train[:3]


def test_webdataset_shards_are_read(pets, tmp_path):
    """The label is a number in a .cls file with the name of the image."""
    expected = datasets.load(str(pets))
    (tmp_path / "tar").mkdir()
    classes = {"ant": "2", "bee": "10", "cat": "9"}
    for split, shards in (("train", 3), ("test", 1)):
        with contextlib.ExitStack() as stack:
            opened = [
                stack.enter_context(tarfile.open(tmp_path / "tar" / f"{split}-{n:03d}.tar", "w"))
                for n in range(shards)
            ]
            for count, file in enumerate(sorted((pets / split).rglob("*.png"))):
                archive = opened[count % shards]
                add_member(archive, f"{count:06d}.png", file.read_bytes())
                add_member(archive, f"{count:06d}.cls", classes[file.parent.name].encode())
                add_member(archive, f"{count:06d}.json", b"{}")
    found = datasets.load(str(tmp_path / "tar"))
    assert found.class_names == ("2", "9", "10")
    assert sorted(x.tobytes() for x in found.x_train) == sorted(
        x.tobytes() for x in expected.x_train
    )
    names = {
        x.tobytes(): expected.class_names[y]
        for x, y in zip(expected.x_train, expected.y_train, strict=True)
    }
    for x, y in zip(found.x_train, found.y_train, strict=True):
        assert found.class_names[y] == classes[names[x.tobytes()]]


def test_val_is_accepted_as_the_test_split(pets):
    before = datasets.load(str(pets)).fingerprint()
    (pets / "test").rename(pets / "val")
    assert datasets.load(str(pets)).fingerprint() == before
    # ImageNet's test images have no labels.
    write_image(pets / "test" / "some.png")
    assert datasets.load(str(pets)).fingerprint() == before


def test_other_files_are_ignored(pets, tmp_path):
    folder = pack(pets, tmp_path / "tar")
    with tarfile.open(folder / "train.tar", "a") as archive:
        add_member(archive, "train/ant/._0.png", b"of another system")
        add_member(archive, "train/ant/notes.txt", b"notes")
        add_member(archive, "train/ant/link.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    (pets / "train" / "ant" / "folder.png").mkdir()
    assert datasets.load(str(folder)).fingerprint() == datasets.load(str(pets)).fingerprint()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda valid: b"hello", "be complete and uncompressed. Received: .*train.tar"),
        (lambda valid: b"", "be complete and uncompressed. Received: .*train.tar"),
        (lambda valid: valid[: len(valid) // 2 + 700], "be complete and uncompressed"),
    ],
)
def test_invalid_tar_files_are_rejected(pets, tmp_path, content, message):
    folder = pack(pets, tmp_path / "tar")
    path = folder / "train.tar"
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        datasets.load(str(folder))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_in_tar_files_are_rejected(pets, tmp_path, kind):
    folder = pack(pets, tmp_path / "tar")
    with tarfile.open(folder / "train.tar", "a") as archive:
        add_member(archive, "train/ant/link.png", type=kind, linkname="train/ant/0.png")
    with pytest.raises(InputError, match=r"train/ant/link\.png is a link or special file"):
        datasets.load(str(folder))


def test_dangling_links_are_named(pets):
    (pets / "train" / "ant" / "gone.png").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"No such file.*gone\.png"):
        datasets.load(str(pets))


@pytest.mark.parametrize("damage", ["header", "boundary"])
def test_damaged_header_is_not_the_end_of_the_archive(pets, tmp_path, damage):
    folder = pack(pets, tmp_path / "tar")
    path = folder / "train.tar"
    with tarfile.open(path) as archive:
        header = archive.getmembers()[5].offset
    content = bytearray(path.read_bytes())
    if damage == "header":
        content[header + 3] ^= 1
    else:
        del content[header:]
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"be complete .*train\.tar: its end is missing"):
        datasets.load(str(folder))


def test_tar_members_are_sorted_by_name(pets, tmp_path):
    (tmp_path / "tar").mkdir()
    for split in ("train", "test"):
        with tarfile.open(tmp_path / "tar" / f"{split}.tar", "w") as archive:
            for file in sorted((pets / split).rglob("*.png"), reverse=True):
                archive.add(file, file.relative_to(pets))
    (tmp_path / "tar" / "training.tar").write_bytes(b"another")
    assert (
        datasets.load(str(tmp_path / "tar")).fingerprint() == datasets.load(str(pets)).fingerprint()
    )


def test_members_with_decreasing_offsets_are_rejected(pets, tmp_path, monkeypatch):
    """As in CVE-2025-8194: Python's reader looped forever."""
    folder = str(pack(pets, tmp_path / "tar"))
    from_buffer, from_file = tarfile.TarInfo.frombuf, tarfile.TarInfo.fromtarfile.__func__
    reason = r"train\.tar: its members do not follow each other$"

    def negative_size(*arguments):
        info = from_buffer(*arguments)
        info.size = -512 if info.name.endswith("1.png") else info.size
        return info

    offsets = []

    def repeated_offset(*arguments):
        info = from_file(*arguments)
        if info.name.endswith("1.png"):
            info.offset = offsets[-1]
        offsets.append(info.offset)
        return info

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarInfo, "frombuf", negative_size)
        with pytest.raises(InputError, match=reason):
            datasets.load(folder)
    monkeypatch.setattr(tarfile.TarInfo, "fromtarfile", classmethod(repeated_offset))
    with pytest.raises(InputError, match=reason):
        datasets.load(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\xff\xfe", "'utf-8' codec"), (b"x" * 1001, r"train/ant/0\.cls has more than 1000 bytes")],
)
def test_invalid_labels_are_rejected(content, reason, pets, tmp_path):
    folder = pack(pets, tmp_path / "tar")
    with tarfile.open(folder / "train.tar", "a") as archive:
        add_member(archive, "train/ant/0.cls", content)
    with pytest.raises(InputError, match=rf"be complete .*Received: .*train\.tar: {reason}"):
        datasets.load(str(folder))


def test_label_of_maximum_length_is_accepted(pets, tmp_path):
    folder = pack(pets, tmp_path / "tar")
    with tarfile.open(folder / "train.tar", "a") as archive:
        add_member(archive, "x.png", (pets / "train" / "ant" / "0.png").read_bytes())
        add_member(archive, "x.cls", b"x" * 1000)
    assert datasets.load(str(folder)).class_names == ("ant", "bee", "cat", "x" * 1000)


def test_classes_are_sorted_by_name(pets, tmp_path):
    for split in ("train", "test"):
        (pets / split / "ant").rename(pets / split / "10")
    assert datasets.load(str(pack(pets, tmp_path / "tar"))).class_names == ("10", "bee", "cat")
    for split in ("train", "test"):
        (pets / split / "bee").rename(pets / split / "9")
    assert datasets.load(str(pack(pets, tmp_path / "other"))).class_names == ("10", "9", "cat")


def test_hidden_files_are_ignored(pets):
    before = datasets.load(str(pets)).fingerprint()
    write_image(pets / "train" / ".thumbnails" / "0.png")
    write_image(pets / "train" / "ant" / ".0.png")
    assert datasets.load(str(pets)).fingerprint() == before


def test_missing_splits_and_images_are_rejected(pets):
    for image in (pets / "test" / "bee").iterdir():
        image.unlink()
    with pytest.raises(InputError) as caught:
        image_folder.scan(pets)
    assert str(caught.value) == (
        f"Every class must have images ({SUFFIXES}). Received: none in {pets}/test/bee"
    )
    shutil.rmtree(pets / "test")
    with pytest.raises(InputError) as caught:
        image_folder.scan(pets)
    assert str(caught.value) == (
        "An image folder must contain train/<class>/ and test/<class>/ (or val/<class>/), or tar "
        "files of them; or <class>/ alone if `split` is given, such as 0.2. "
        f"Received: {pets}, without test/<class>/"
    )


def write_tree(root, *names):
    """Empty files, or folders for names that end in a slash."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return root


def outcome(root):
    """The result of a scan or its error message, without the path of the root."""
    try:
        found = image_folder.scan(root)
    except InputError as error:
        return re.sub(r"\S+?/(train|test)(\.tar)?(: (\S*?/)?\1)?/", r"\1/", str(error))
    skipped = re.sub(r"such as [^;]*/([^/;]+)", r"such as \1", found.skipped)
    classes = [
        {name: [os.path.basename(file.name) for file in files] for name, files in split.items()}
        for split in (found.train, found.test)
    ]
    return classes, [list(split) for split in classes], skipped


TREES = {
    "hidden": (
        ["train/cat/.ipynb_checkpoints/a.png", "train/.trash/x.png", "train/cat/.b.png"],
        ([["cat", "dog"], ["cat", "dog"]], ""),
    ),
    "system folders": (
        [
            *("train/@eaDir/a.png", "train/cat/@eaDir/a.png/small.jpg", "train/lost+found/"),
            *("train/__MACOSX/cat/._a.png", "train/#recycle/cat/a.png"),
        ],
        ([["cat", "dog"], ["cat", "dog"]], ""),
    ),
    "inside classes": (
        ["train/cat/1/a.png", "train/cat/2/b.jpg", "train/dog/1/deep/c.ppm"],
        ([["cat", "dog"], ["cat", "dog"]], "3 in subfolders of a class, such as a.png"),
    ),
    "outside": (
        ["train/cover.png", "test/cover.ppm", "train/README.txt"],
        ([["cat", "dog"], ["cat", "dog"]], "2 outside of any class, such as cover.ppm"),
    ),
    "unsupported formats": (
        [
            *("train/cat/b.PPM", "train/cat/a.ppm", "train/dog/a.tga", "test/dog/a.svg"),
            *("train/dog/b.jfif", "train/dog/Thumbs.db", "train/dog/b.tga/"),
        ],
        (
            [["cat", "dog"], ["cat", "dog"]],
            "2 in .ppm format, such as a.ppm; 1 in .svg format, such as a.svg; "
            "1 in .tga format, such as a.tga",
        ),
    ),
    "an empty class": (
        ["train/yak/"],
        f"Every class must have images ({SUFFIXES}). Received: none in train/yak",
    ),
    "a class without images": (
        ["train/yak/notes.txt"],
        f"Every class must have images ({SUFFIXES}). Received: none in train/yak",
    ),
    "a class of unsupported formats": (
        ["train/yak/1.ppm", "train/yak/2.ppm", "train/yak/1/1.png"],
        f"Every class must have images ({SUFFIXES}). Received: none in "
        "train/yak, but 2 in .ppm format, such as train/yak/1.ppm; "
        "1 in subfolders of a class, such as train/yak/1/1.png",
    ),
    "a class named as its split": (
        ["train/train/a.png", "train/cat/train/a.png"],
        ([["cat", "dog", "train"], ["cat", "dog"]], "1 in subfolders of a class, such as a.png"),
    ),
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("prefix", ["", "./", "some/", ".cache/x/", "../", "/"])
def test_scans_of_folders_and_tar_files_agree(tree, prefix, tmp_path):
    extra, expected = TREES[tree]
    base = [f"{split}/{name}/a.png" for split in ("train", "test") for name in ("cat", "dog")]
    root = write_tree(tmp_path / "folder", *base, *extra)
    found = outcome(root)
    assert (found if isinstance(found, str) else found[1:]) == expected
    (tmp_path / "tar").mkdir()
    for split in ("train", "test"):
        with tarfile.open(tmp_path / "tar" / f"{split}.tar", "w") as archive:
            for path in sorted((root / split).rglob("*"), reverse=True):
                info = archive.gettarinfo(path, "x")
                info.name = f"{prefix}{path.relative_to(root)}"
                archive.addfile(info)
    assert outcome(tmp_path / "tar") == found


def test_tar_files_need_no_split_folder(tmp_path):
    """Members may omit train/, as with ``tar -C train``, or be in another folder; .x/ is hidden."""
    members = ["cat/a.png", "dog/b.png", "dog/1/c.png", "cat/.x/d.png"]
    for prefix in ("", "./", "pets/", "a/b/"):
        root = tmp_path / f"tar{len(prefix)}"
        root.mkdir()
        for split, names in (("train", members), ("test", ["cat/a.png", "cat/1/a.png"])):
            with tarfile.open(root / f"{split}.tar", "w") as archive:
                for name in [*names, *(["cover.png"] if split == "train" else [])]:
                    add_member(archive, name if name == "cover.png" else prefix + name)
        found = image_folder.scan(root)
        assert list(found.train) == ["cat", "dog"]
        assert [file.name for file in found.train["cat"]] == [f"{prefix}cat/a.png"]
        assert list(found.test) == ["cat"]
        assert found.skipped == (
            f"2 in subfolders of a class, such as {root}/test.tar: {prefix}cat/1/a.png; "
            f"1 outside of any class, such as {root}/train.tar: cover.png"
        )


def test_shards_share_one_class_root(tmp_path):
    (tmp_path / "tar").mkdir()
    for shard, name in enumerate(("cat", "dog")):
        with tarfile.open(tmp_path / "tar" / f"train-{shard}.tar", "w") as archive:
            add_member(archive, f"pets/{name}/a.png")
    with tarfile.open(tmp_path / "tar" / "val.tar", "w") as archive:
        add_member(archive, "val/cat/a.png")
    found = image_folder.scan(tmp_path / "tar")
    assert (list(found.train), list(found.test)) == (["cat", "dog"], ["cat"])


def test_labels_take_precedence_over_folders(tmp_path):
    def scan(*members):
        for split in ("train", "test"):
            with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
                for name, content in members:
                    add_member(archive, name, content)
        return image_folder.scan(tmp_path)

    labeled = [("s/1/0.png", b""), ("s/1/0.cls", b"10"), ("s/1/0.json", b""), ("s/x/y", b"")]
    assert list(scan(*labeled).train) == ["10"]
    # Folders without labeled images are classes.
    mixed = scan(*labeled[:3], ("s/cat/a.png", b""), ("0.ppm", b""), ("0.cls", b"2"), ("s/1", b""))
    assert list(mixed.train) == ["10", "cat"]
    assert mixed.skipped == f"2 in .ppm format, such as {tmp_path}/test.tar: 0.ppm"
    for name, content in (("1.png", b""), ("0.cls", b" ")):
        with pytest.raises(
            InputError, match=r"named after its class, or have a .cls .*Received: .*png"
        ):
            scan(*labeled, ("0.png", b""), (name, content))


def test_numeric_classes_are_sorted_as_numbers(tmp_path):
    names = ["2", "10", "009", "1"]
    root = write_tree(tmp_path, *(f"{p}/{n}/a.png" for p in ("train", "test") for n in names))
    assert list(image_folder.scan(root).train) == ["1", "2", "009", "10"]
    write_tree(root, "train/x/a.png")
    assert list(image_folder.scan(root).train) == ["009", "1", "10", "2", "x"]


def test_link_loops_are_not_followed(tmp_path):
    """A class may be a link; links inside a class may form loops."""
    root = write_tree(tmp_path, "train/cat/a.png", "test/cat/a.png", "else/b.png")
    (root / "train" / "dog").symlink_to(root / "else")
    (root / "train" / "cat" / "round").symlink_to(root / "train")
    (root / "train" / "cat" / "c.png").symlink_to(root / "else")
    found = image_folder.scan(root)
    assert {name: len(files) for name, files in found.train.items()} == {"cat": 1, "dog": 1}
    assert found.skipped == ""
    # A link to itself is reported where it is read.
    for place in (root / "train" / "cat", root / "train"):
        (place / "loop.png").symlink_to("loop.png")
    assert {name: len(files) for name, files in image_folder.scan(root).train.items()} == {
        "cat": 2,
        "dog": 1,
    }
    assert str(root / "train" / "cat" / "loop.png") in image_folder.find_images(root)[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on Windows")
def test_a_fifo_is_no_image(tmp_path):
    """Opening it would wait for a writer."""
    root = write_tree(tmp_path, "train/cat/a.png", "test/cat/a.png")
    os.mkfifo(root / "train" / "cat" / "b.png")
    _, fifo = image_folder.scan(root).train["cat"]
    with pytest.raises(OSError, match="not a regular file"):
        fifo.open()
    with pytest.raises(InputError, match=r"not a regular file. Received: .*b\.png"):
        decode.read_image(fifo.path)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux only")
def test_only_class_names_must_be_utf_8(pets, tmp_path):
    """Class names are stored in models and reports; file names appear in errors only."""
    image = (pets / "train" / "ant" / "0.png").read_bytes()
    (pets / "train" / "ant" / os.fsdecode(b"caf\xe9.png")).write_bytes(image)
    tar = pack(pets, tmp_path / "tar")
    loaded = [datasets.load(str(root)) for root in (pets, tar)]
    assert len(loaded[0].x_train) == 25
    assert loaded[0].fingerprint() == loaded[1].fingerprint()
    (pets / "train" / "ant").rename(pets / "train" / os.fsdecode(b"caf\xe9"))
    (pets / "test" / "ant").rename(pets / "test" / os.fsdecode(b"caf\xe9"))
    for root, location in ((pets, "train"), (pack(pets, tmp_path / "tar2"), "train.tar")):
        with pytest.raises(InputError) as caught:
            image_folder.scan(root)
        assert str(caught.value) == (
            "A class name must be valid UTF-8, the encoding of models and reports. "
            f"Received: caf\\udce9 in {root / location}"
        )


def test_exceeds_decode_limit(monkeypatch):
    monkeypatch.setattr(image_folder, "MAX_DECODED_BYTES", 100)
    for sizes, expected in (((60, 40), True), ((60, 39), False), ((100,), True), ((), False)):
        assert (
            image_folder.exceeds_decode_limit([TarMember("a", "b", 0, size) for size in sizes])
            is expected
        )


def test_digest_covers_contents_or_names_and_sizes(tmp_path):
    content = np.random.default_rng(0).bytes(2 * 2100)
    (tmp_path / "x.tar").write_bytes(content)
    records = [TarMember(str(tmp_path / "x.tar"), f"{n}.png", 2 * n, 2) for n in range(2100)]
    digests = [hashlib.sha256(content[2 * n : 2 * n + 2]).digest() for n in range(2100)]
    assert image_folder.digest(records, False) == hashlib.sha256(b"".join(digests)).hexdigest()
    names = "".join(f"{n}.png\0{2}\n" for n in range(2100)).encode()
    assert image_folder.digest(records, True) == hashlib.sha256(names).hexdigest()


def test_unreadable_folder_is_rejected(pets, monkeypatch):
    def fail(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", fail)
    with pytest.raises(InputError, match=rf"must be readable. Received: {pets}/train: Permission"):
        datasets.load(str(pets))


def test_compressed_tar_files_are_rejected(pets, tmp_path):
    with pytest.raises(InputError, match=r"uncompressed. Received: .*train\.tar: invalid header$"):
        datasets.load(str(pack(pets, tmp_path / "tar", mode="w:gz")))


def test_tar_files_without_images_or_classes_are_rejected(pets, tmp_path):
    folder = pack(pets, tmp_path / "tar")
    with tarfile.open(folder / "train.tar", "w") as archive:
        add_member(archive, "train/ant/notes.txt", b"notes")
    with pytest.raises(InputError, match=rf"images \({re.escape(SUFFIXES)}\)\. .*train\.tar"):
        datasets.load(str(folder))
    with tarfile.open(folder / "train.tar", "w") as archive:
        add_member(archive, "0.png", (pets / "train" / "ant" / "0.png").read_bytes())
    with pytest.raises(
        InputError, match=r"a folder named after its class, or have a .cls .*: 0\.png"
    ):
        datasets.load(str(folder))


def names(classes):
    return {
        name: [os.path.basename(file.name) for file in files] for name, files in classes.items()
    }


@pytest.mark.parametrize("layout", ["classes", "train", "tar"])
def test_folders_without_test_images_are_split(layout, tmp_path):
    images = [f"cat/{n:02d}.png" for n in range(10)] + ["dog/0.png", "dog/1.png"]
    root = tmp_path / layout
    write_tree(root / ("" if layout == "classes" else "train"), *images)
    if layout == "tar":
        pack(root, tmp_path / "packed", ["train"])
        root = tmp_path / "packed"
    found = image_folder.scan(root, 0.25, seed=3)
    train, test = names(found.train), names(found.test)
    assert {name: len(files) for name, files in test.items()} == {"cat": 2, "dog": 1}
    for name, count in (("cat", 10), ("dog", 2)):
        assert len({*train[name], *test[name]}) == len(train[name]) + len(test[name]) == count
        assert sorted(train[name]) == train[name]
    again = image_folder.scan(root, 0.25, seed=3)
    assert (names(again.train), names(again.test)) == (train, test)
    others = [names(image_folder.scan(root, 0.25, seed=seed).test)["cat"] for seed in range(5)]
    assert len(set(map(tuple, others))) > 1
    # At least one image of each class on both sides.
    largest = image_folder.scan(root, 0.99, seed=3)
    assert {name: len(files) for name, files in largest.train.items()} == {"cat": 1, "dog": 1}


def test_split_requires_two_images_of_each_class_and_no_test_images(pets, tmp_path):
    root = write_tree(tmp_path / "x", "cat/0.png", "cat/1.png", "dog/0.png")
    with pytest.raises(InputError, match=r"at least two images to be split\. Received: one in dog"):
        image_folder.scan(root, 0.5)
    with pytest.raises(InputError, match="`split` applies to folders without test/ and val/"):
        image_folder.scan(pets, 0.5)
    with pytest.raises(InputError, match="`split` applies to image folders only"):
        datasets.load("digits", split=0.5)


def test_split_files_are_those_of_the_images(tmp_path):
    write_folder(tmp_path, test=0)
    for name in ("ant", "bee", "cat"):
        (tmp_path / "train" / name).rename(tmp_path / name)
    (tmp_path / "train").rmdir()
    loaded = datasets.load(str(tmp_path), split=0.25, seed=1)
    assert loaded.class_counts() == {n: {"train": 6, "test": 2} for n in ("ant", "bee", "cat")}
    for part, images in (("train", loaded.x_train), ("test", loaded.x_test)):
        for file, image in zip(loaded.split_files[part], images, strict=True):
            np.testing.assert_array_equal(decode.read_image(file), image)
