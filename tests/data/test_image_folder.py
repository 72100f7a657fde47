"""Where images are found: folders of classes, tar files of them."""

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

from involution.data import datasets, image_folder
from involution.data.image_folder import Record
from involution.data.lazy_images import StoredImages
from involution.utils import memory
from involution.utils.errors import InputError
from tests.support.images import write_folder, write_image

pytestmark = pytest.mark.any_backend


@pytest.fixture
def pets(tmp_path):
    return write_folder(tmp_path / "pets")


def packed(pets, folder, parts=("train", "test"), mode="w", prefix=""):
    """The folder as tar files, one for each part."""
    folder.mkdir()
    for part in parts:
        with tarfile.open(folder / f"{part}.tar", mode) as archive:
            archive.add(pets / part, f"{prefix}{part}")
    return folder


def member(archive, name, content=b"", **more):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in more.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(content))


def test_tar_files_hold_the_same_data_set(pets, tmp_path):
    folder, archives = datasets.load(str(pets)), datasets.load(str(packed(pets, tmp_path / "tar")))
    assert archives.class_names == folder.class_names
    for name in ("x_train", "y_train", "x_test", "y_test"):
        np.testing.assert_array_equal(getattr(archives, name), getattr(folder, name))
    assert archives.fingerprint() == folder.fingerprint()


def test_tar_files_are_read_in_place(pets, tmp_path, monkeypatch):
    packed(pets, tmp_path / "tar", prefix="./some/")
    monkeypatch.setattr(memory, "allowed", lambda: 0)
    stored = datasets.load(str(tmp_path / "tar"))
    assert isinstance(stored.x_train, StoredImages)
    np.testing.assert_array_equal(stored.x_train[:], datasets.load(str(pets)).x_train[:])
    assert str(stored.x_train.files[0]) == f"{tmp_path}/tar/train.tar: ./some/train/ant/0.png"
    # What is not an image any more is told by its name.
    path = tmp_path / "tar" / "train.tar"
    begin = stored.x_train.files[1].begin
    content = path.read_bytes()
    path.write_bytes(content[:begin] + b"x" * 20 + content[begin + 20 :])
    with pytest.raises(InputError, match=r"Received: \S+train\.tar: \./some/train/ant/1\.png"):
        stored.x_train[:3]
    path.write_bytes(content[: begin + 20])
    with pytest.raises(InputError, match=r"train/ant/1\.png"):
        stored.x_train[:3]


def test_shards_and_classes_beside_the_images(pets, tmp_path):
    """As WebDataset has them: a number in a file of the same name."""
    expected = datasets.load(str(pets))
    (tmp_path / "tar").mkdir()
    classes = {"ant": "2", "bee": "10", "cat": "9"}
    for part, shards in (("train", 3), ("test", 1)):
        with contextlib.ExitStack() as stack:
            opened = [
                stack.enter_context(tarfile.open(tmp_path / "tar" / f"{part}-{n:03d}.tar", "w"))
                for n in range(shards)
            ]
            for count, file in enumerate(sorted((pets / part).rglob("*.png"))):
                archive = opened[count % shards]
                member(archive, f"{count:06d}.png", file.read_bytes())
                member(archive, f"{count:06d}.cls", classes[file.parent.name].encode())
                member(archive, f"{count:06d}.json", b"{}")
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


def test_imagenet_calls_it_val(pets):
    before = datasets.load(str(pets)).fingerprint()
    (pets / "test").rename(pets / "val")
    assert datasets.load(str(pets)).fingerprint() == before
    # Its test images have no labels.
    write_image(pets / "test" / "some.png")
    assert datasets.load(str(pets)).fingerprint() == before


def test_what_is_not_an_image_of_a_class_is_passed_over(pets, tmp_path):
    folder = packed(pets, tmp_path / "tar")
    with tarfile.open(folder / "train.tar", "a") as archive:
        member(archive, "train/ant/._0.png", b"of another system")
        member(archive, "train/ant/notes.txt", b"notes")
        member(archive, "train/ant/link.txt", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    (pets / "train" / "ant" / "folder.png").mkdir()
    assert datasets.load(str(folder)).fingerprint() == datasets.load(str(pets)).fingerprint()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: b"hello", "be whole, and not compressed. Received: .*train.tar"),
        (lambda whole: b"", "be whole, and not compressed. Received: .*train.tar"),
        (lambda whole: whole[: len(whole) // 2 + 700], "be whole, and not compressed"),
    ],
)
def test_tar_files_that_are_none(pets, tmp_path, content, message):
    folder = packed(pets, tmp_path / "tar")
    path = folder / "train.tar"
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(InputError, match=message):
        datasets.load(str(folder))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_images_that_are_not_in_a_tar_file_are_missed(pets, tmp_path, kind):
    folder = packed(pets, tmp_path / "tar")
    with tarfile.open(folder / "train.tar", "a") as archive:
        member(archive, "train/ant/link.png", type=kind, linkname="train/ant/0.png")
    with pytest.raises(InputError, match=r"train/ant/link\.png is a link, or of another kind"):
        datasets.load(str(folder))


def test_links_that_lead_nowhere_are_named(pets):
    (pets / "train" / "ant" / "gone.png").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"No such file.*gone\.png"):
        datasets.load(str(pets))


@pytest.mark.parametrize("place", ["header", "boundary"])
def test_a_damaged_header_is_not_the_end(pets, tmp_path, place):
    folder = packed(pets, tmp_path / "tar")
    path = folder / "train.tar"
    with tarfile.open(path) as archive:
        header = archive.getmembers()[5].offset
    content = bytearray(path.read_bytes())
    if place == "header":
        content[header + 3] ^= 1
    else:
        del content[header:]
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"be whole, .*train\.tar: its end is missing"):
        datasets.load(str(folder))


def test_records_are_in_the_order_of_their_names(pets, tmp_path):
    (tmp_path / "tar").mkdir()
    for part in ("train", "test"):
        with tarfile.open(tmp_path / "tar" / f"{part}.tar", "w") as archive:
            for file in sorted((pets / part).rglob("*.png"), reverse=True):
                archive.add(file, file.relative_to(pets))
    (tmp_path / "tar" / "training.tar").write_bytes(b"another")
    assert (
        datasets.load(str(tmp_path / "tar")).fingerprint() == datasets.load(str(pets)).fingerprint()
    )


def test_members_that_go_backwards_end_it(pets, tmp_path, monkeypatch):
    """As those of CVE-2025-8194, by which Python's reader never ends."""
    folder = str(packed(pets, tmp_path / "tar"))
    from_buffer, from_file = tarfile.TarInfo.frombuf, tarfile.TarInfo.fromtarfile.__func__
    reason = r"train\.tar: its members do not follow each other$"

    def negative(*arguments):
        info = from_buffer(*arguments)
        info.size = -512 if info.name.endswith("1.png") else info.size
        return info

    before = []

    def again(*arguments):
        info = from_file(*arguments)
        if info.name.endswith("1.png"):
            info.offset = before[-1]
        before.append(info.offset)
        return info

    with monkeypatch.context() as changed:
        changed.setattr(tarfile.TarInfo, "frombuf", negative)
        with pytest.raises(InputError, match=reason):
            datasets.load(folder)
    monkeypatch.setattr(tarfile.TarInfo, "fromtarfile", classmethod(again))
    with pytest.raises(InputError, match=reason):
        datasets.load(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\xff\xfe", "'utf-8' codec"), (b"x" * 1001, r"train/ant/0\.cls has more than 1000 bytes")],
)
def test_a_class_that_is_no_name(content, reason, pets, tmp_path):
    folder = packed(pets, tmp_path / "tar")
    with tarfile.open(folder / "train.tar", "a") as archive:
        member(archive, "train/ant/0.cls", content)
    with pytest.raises(InputError, match=rf"be whole, .*Received: .*train\.tar: {reason}"):
        datasets.load(str(folder))


def test_a_class_with_a_long_name(pets, tmp_path):
    folder = packed(pets, tmp_path / "tar")
    with tarfile.open(folder / "train.tar", "a") as archive:
        member(archive, "x.png", (pets / "train" / "ant" / "0.png").read_bytes())
        member(archive, "x.cls", b"x" * 1000)
    assert datasets.load(str(folder)).class_names == ("ant", "bee", "cat", "x" * 1000)


def test_names_are_in_the_order_of_their_letters(pets, tmp_path):
    for part in ("train", "test"):
        (pets / part / "ant").rename(pets / part / "10")
    assert datasets.load(str(packed(pets, tmp_path / "tar"))).class_names == ("10", "bee", "cat")
    for part in ("train", "test"):
        (pets / part / "bee").rename(pets / part / "9")
    assert datasets.load(str(packed(pets, tmp_path / "other"))).class_names == ("10", "9", "cat")


def test_what_is_hidden_is_passed_over(pets):
    before = datasets.load(str(pets)).fingerprint()
    write_image(pets / "train" / ".thumbnails" / "0.png")
    write_image(pets / "train" / "ant" / ".0.png")
    assert datasets.load(str(pets)).fingerprint() == before


def test_a_folder_without_a_part_or_images(pets):
    for image in (pets / "test" / "bee").iterdir():
        image.unlink()
    with pytest.raises(InputError) as caught:
        image_folder.find(pets)
    assert str(caught.value) == (
        "Every class must have images (.png, .jpg, .jpeg, .jpe, .jfif, .webp). "
        f"Received: none in {pets}/test/bee"
    )
    shutil.rmtree(pets / "test")
    with pytest.raises(InputError) as caught:
        image_folder.find(pets)
    assert str(caught.value) == (
        "A folder of images must hold train/<class>/ and test/<class>/ (or val/<class>/), or tar "
        f"files of them. Received: {pets}, without test/<class>/"
    )


def write_tree(root, *names):
    """Empty files, and folders where a name ends in a slash: nothing is decoded here."""
    for name in names:
        path = root / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return root


def outcome(root):
    """What is found, or the error, without where it is."""
    try:
        found = image_folder.find(root)
    except InputError as error:
        return re.sub(r"\S+?/(train|test)(\.tar)?(: (\S*?/)?\1)?/", r"\1/", str(error))
    skipped = re.sub(r"as [^;]*/([^/;]+)", r"as \1", found.skipped)
    classes = [
        {name: [os.path.basename(file.name) for file in files] for name, files in part.items()}
        for part in (found.train, found.test)
    ]
    return classes, [list(part) for part in classes], skipped


TREES = {
    "hidden": (
        ["train/cat/.ipynb_checkpoints/a.png", "train/.trash/x.png", "train/cat/.b.png"],
        ([["cat", "dog"], ["cat", "dog"]], ""),
    ),
    "of file servers": (
        [
            *("train/@eaDir/a.png", "train/cat/@eaDir/a.png/small.jpg", "train/lost+found/"),
            *("train/__MACOSX/cat/._a.png", "train/#recycle/cat/a.png"),
        ],
        ([["cat", "dog"], ["cat", "dog"]], ""),
    ),
    "within classes": (
        ["train/cat/1/a.png", "train/cat/2/b.jpg", "train/dog/1/deep/c.gif"],
        ([["cat", "dog"], ["cat", "dog"]], "3 in folders within a class, as a.png"),
    ),
    "outside": (
        ["train/cover.png", "test/cover.bmp", "train/README.txt"],
        ([["cat", "dog"], ["cat", "dog"]], "2 outside of the classes, as cover.bmp"),
    ),
    "other formats": (
        [
            *("train/cat/b.BMP", "train/cat/a.bmp", "train/dog/a.gif", "test/dog/a.tiff"),
            *("train/dog/b.jfif", "train/dog/Thumbs.db", "train/dog/b.gif/"),
        ],
        (
            [["cat", "dog"], ["cat", "dog"]],
            "2 .bmp files, as a.bmp; 1 .gif files, as a.gif; 1 .tiff files, as a.tiff",
        ),
    ),
    "an empty class": (
        ["train/yak/"],
        "Every class must have images (.png, .jpg, .jpeg, .jpe, .jfif, .webp). "
        "Received: none in train/yak",
    ),
    "a class of notes": (
        ["train/yak/notes.txt"],
        "Every class must have images (.png, .jpg, .jpeg, .jpe, .jfif, .webp). "
        "Received: none in train/yak",
    ),
    "a class of others": (
        ["train/yak/1.bmp", "train/yak/2.bmp", "train/yak/1/1.png"],
        "Every class must have images (.png, .jpg, .jpeg, .jpe, .jfif, .webp). Received: none in "
        "train/yak, but 2 .bmp files, as train/yak/1.bmp; "
        "1 in folders within a class, as train/yak/1/1.png",
    ),
    "a class named as its part": (
        ["train/train/a.png", "train/cat/train/a.png"],
        ([["cat", "dog", "train"], ["cat", "dog"]], "1 in folders within a class, as a.png"),
    ),
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("prefix", ["", "./", "some/", ".cache/x/", "../", "/"])
def test_one_rule_for_folders_and_tar_files(tree, prefix, tmp_path):
    more, expected = TREES[tree]
    usual = [f"{part}/{name}/a.png" for part in ("train", "test") for name in ("cat", "dog")]
    root = write_tree(tmp_path / "folder", *usual, *more)
    found = outcome(root)
    assert (found if isinstance(found, str) else found[1:]) == expected
    (tmp_path / "tar").mkdir()
    for part in ("train", "test"):
        with tarfile.open(tmp_path / "tar" / f"{part}.tar", "w") as archive:
            for path in sorted((root / part).rglob("*"), reverse=True):
                info = archive.gettarinfo(path, "x")
                info.name = f"{prefix}{path.relative_to(root)}"
                archive.addfile(info)
    assert outcome(tmp_path / "tar") == found


def test_a_tar_file_of_what_is_in_the_folder(tmp_path):
    """Without train/, as ``tar -C train`` packs it; also below another folder."""
    usual = ["cat/a.png", "dog/b.png", "dog/1/c.png", "cat/.x/d.png"]
    for prefix in ("", "./", "pets/", "a/b/"):
        root = tmp_path / f"tar{len(prefix)}"
        root.mkdir()
        for part, names in (("train", usual), ("test", ["cat/a.png", "cat/1/a.png"])):
            # Hidden folders above are some of another part.
            with tarfile.open(root / f"{part}.tar", "w") as archive:
                for name in [*names, *(["cover.png"] if part == "train" else [])]:
                    member(archive, name if name == "cover.png" else prefix + name)
        found = image_folder.find(root)
        assert list(found.train) == ["cat", "dog"]
        assert [file.name for file in found.train["cat"]] == [f"{prefix}cat/a.png"]
        assert list(found.test) == ["cat"]
        assert found.skipped == (
            f"2 in folders within a class, as {root}/test.tar: {prefix}cat/1/a.png; "
            f"1 outside of the classes, as {root}/train.tar: cover.png"
        )


def test_shards_share_one_folder_of_classes(tmp_path):
    (tmp_path / "tar").mkdir()
    for shard, name in enumerate(("cat", "dog")):
        with tarfile.open(tmp_path / "tar" / f"train-{shard}.tar", "w") as archive:
            member(archive, f"pets/{name}/a.png")
    with tarfile.open(tmp_path / "tar" / "val.tar", "w") as archive:
        member(archive, "val/cat/a.png")
    found = image_folder.find(tmp_path / "tar")
    assert (list(found.train), list(found.test)) == (["cat", "dog"], ["cat"])


def test_classes_beside_images_count_wherever_they_are(tmp_path):
    def found(*members):
        for part in ("train", "test"):
            with tarfile.open(tmp_path / f"{part}.tar", "w") as archive:
                for name, content in members:
                    member(archive, name, content)
        return image_folder.find(tmp_path)

    told = [("s/1/0.png", b""), ("s/1/0.cls", b"10"), ("s/1/0.json", b""), ("s/x/y", b"")]
    assert list(found(*told).train) == ["10"]
    # Of folders beside those the ones are classes that hold no such images.
    both = found(*told[:3], ("s/cat/a.png", b""), ("0.bmp", b""), ("0.cls", b"2"), ("s/1", b""))
    assert list(both.train) == ["10", "cat"]
    assert both.skipped == f"2 .bmp files, as {tmp_path}/test.tar: 0.bmp"
    for name, content in (("1.png", b""), ("0.cls", b" ")):
        with pytest.raises(
            InputError, match=r"named by its class, or have a .cls .*Received: .*png"
        ):
            found(*told, ("0.png", b""), (name, content))


def test_numbered_classes_are_in_the_order_of_numbers(tmp_path):
    names = ["2", "10", "009", "1"]
    root = write_tree(tmp_path, *(f"{p}/{n}/a.png" for p in ("train", "test") for n in names))
    assert list(image_folder.find(root).train) == ["1", "2", "009", "10"]
    write_tree(root, "train/x/a.png")
    assert list(image_folder.find(root).train) == ["009", "1", "10", "2", "x"]


def test_links_to_folders_end(tmp_path):
    """A class may be one; within a class they may lead in circles."""
    root = write_tree(tmp_path, "train/cat/a.png", "test/cat/a.png", "else/b.png")
    (root / "train" / "dog").symlink_to(root / "else")
    (root / "train" / "cat" / "round").symlink_to(root / "train")
    (root / "train" / "cat" / "c.png").symlink_to(root / "else")
    found = image_folder.find(root)
    assert {name: len(files) for name, files in found.train.items()} == {"cat": 1, "dog": 1}
    assert found.skipped == ""


@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_names_that_are_no_text(pets, tmp_path):
    """A class's would be in the model and the report; a file's is in errors alone."""
    image = (pets / "train" / "ant" / "0.png").read_bytes()
    (pets / "train" / "ant" / os.fsdecode(b"caf\xe9.png")).write_bytes(image)
    tar = packed(pets, tmp_path / "tar")
    loaded = [datasets.load(str(root)) for root in (pets, tar)]
    assert len(loaded[0].x_train) == 25
    assert loaded[0].fingerprint() == loaded[1].fingerprint()
    (pets / "train" / "ant").rename(pets / "train" / os.fsdecode(b"caf\xe9"))
    (pets / "test" / "ant").rename(pets / "test" / os.fsdecode(b"caf\xe9"))
    for root, where in ((pets, "train"), (packed(pets, tmp_path / "tar2"), "train.tar")):
        with pytest.raises(InputError) as caught:
            image_folder.find(root)
        assert str(caught.value) == (
            "The name of a class must be valid UTF-8, the encoding of models and reports. "
            f"Received: caf\\udce9 in {root / where}"
        )


def test_what_is_large(monkeypatch):
    monkeypatch.setattr(image_folder, "LARGE", 100)
    for sizes, large in (((60, 40), True), ((60, 39), False), ((100,), True), ((), False)):
        assert image_folder.are_large([Record("a", "b", 0, size) for size in sizes]) is large


def test_a_digest_is_of_contents_or_of_names_and_sizes(tmp_path):
    content = np.random.default_rng(0).bytes(2 * 2100)
    (tmp_path / "x.tar").write_bytes(content)
    records = [Record(str(tmp_path / "x.tar"), f"{n}.png", 2 * n, 2) for n in range(2100)]
    parts = [hashlib.sha256(content[2 * n : 2 * n + 2]).digest() for n in range(2100)]
    assert image_folder.digest(records, False) == hashlib.sha256(b"".join(parts)).hexdigest()
    names = "".join(f"{n}.png\0{2}\n" for n in range(2100)).encode()
    assert image_folder.digest(records, True) == hashlib.sha256(names).hexdigest()


def test_a_folder_that_cannot_be_read(pets, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(InputError, match=rf"must be readable. Received: {pets}/train: Permission"):
        datasets.load(str(pets))


def test_tar_files_that_are_compressed(pets, tmp_path):
    with pytest.raises(
        InputError, match=r"not compressed. Received: .*train\.tar: invalid header$"
    ):
        datasets.load(str(packed(pets, tmp_path / "tar", mode="w:gz")))


def test_tar_files_without_images_or_classes(pets, tmp_path):
    folder = packed(pets, tmp_path / "tar")
    with tarfile.open(folder / "train.tar", "w") as archive:
        member(archive, "train/ant/notes.txt", b"notes")
    with pytest.raises(
        InputError, match=r"images \(\.png, \.jpg, \.jpeg, \.jpe, \.jfif, \.webp\)\. .*train\.tar"
    ):
        datasets.load(str(folder))
    with tarfile.open(folder / "train.tar", "w") as archive:
        member(archive, "0.png", (pets / "train" / "ant" / "0.png").read_bytes())
    with pytest.raises(InputError, match=r"a folder named by its class, or have a .cls .*: 0\.png"):
        datasets.load(str(folder))
