"""The documentation: its code runs, links resolve, and translations match the English pages."""

import hashlib
import re
import runpy

import keras
import matplotlib
import pytest

from tests.support.paths import ROOT

DOCS = ROOT / "docs"
# Packages that the code of a page needs, besides a backend.
PACKAGES = {
    "index": ("torch", "jax"),
    "jax": ("flax", "equinox"),
    "pytorch": ("torch",),
    "other-names": ("torch",),
}
PAGES = sorted([*DOCS.glob("en/**/*.md"), *DOCS.glob("ko/**/*.md")])


def name_of(page):
    return str(page.relative_to(ROOT).with_suffix(""))


def english(page):
    if page.parent == ROOT:
        return ROOT / "README.md"
    return DOCS / "en" / page.relative_to(DOCS / "ko")


def code(page):
    """The Python code of a page; other lines are blank, so that line numbers match the page."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines) + "\n"


def check_printed(text, output):
    """Asserts that the output contains the comment after each ``print`` call as a line."""
    lines = re.sub(r"torch\.Size\(\[(.*?)\]\)", r"(\1)", output).splitlines()
    for expected in re.findall(r"print\(.*\)  # (.+)", text):
        assert expected in lines, (expected, lines)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "page",
    # The tutorial is executed as a notebook; translations have the same code.
    [p for p in PAGES if code(p).strip() and "ko" not in p.parts and p.stem != "tutorial"],
    ids=name_of,
)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    for package in PACKAGES.get(page.stem, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    text = code(page)
    keras.utils.set_random_seed(0)
    exec(compile(text, str(page), "exec"), {"__name__": page.stem})  # noqa: S102 - our own pages
    check_printed(text, capsys.readouterr().out)


@pytest.mark.any_backend
def test_figures_of_the_readme_are_those_on_record():
    figures = runpy.run_path(str(DOCS / "figures" / "readme.py"))
    rows = [line.strip("| ").split(" | ") for line in figures["RECORD"].read_text().splitlines()]
    recorded = {row[0]: row[3] for row in rows if len(row) == 4}
    for each in figures["ALL"]:
        for name, value in zip(each.names, each.written(), strict=True):
            assert recorded[name] == value or name.endswith("time"), name
    assert figures["CIFAR"].written()[:2] == tuple(figures["cifar10"](None, None)[:2])
    assert figures["REDNET_TINY"].written() == tuple(figures["rednet_tiny"]())


@pytest.mark.any_backend
def test_tutorial_defines_involution_in_twenty_lines():
    block = re.search(
        r"class SmallInvolution.*?```", (DOCS / "en" / "tutorial.md").read_text(), re.S
    )
    definition = [line for line in block[0].splitlines()[:-1] if line.strip()]
    assert len(definition) <= 20


@pytest.mark.any_backend
@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.ko.md"], ids=name_of)
def test_local_links_resolve(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).is_file(), target


TRANSLATIONS = [
    page
    for page in (*sorted(DOCS.glob("ko/**/*.md")), ROOT / "README.ko.md")
    if english(page).is_file()
]


@pytest.mark.any_backend
@pytest.mark.parametrize("page", TRANSLATIONS, ids=name_of)
def test_translation_is_up_to_date(page):
    """The first line of a translation contains the hash of the English page."""
    digest = hashlib.sha256(english(page).read_bytes()).hexdigest()[:16]
    first = page.read_text(encoding="utf-8").splitlines()[0]
    assert first in (f"% english: {digest}", f"<!-- english: {digest} -->"), (
        f"translate the changes, then write {digest} in the first line"
    )


@pytest.mark.any_backend
@pytest.mark.parametrize("page", TRANSLATIONS, ids=name_of)
def test_translation_has_the_same_code_and_headings(page):
    assert code(page).split() == code(english(page)).split()
    headings = [
        [line.split()[0] for line in p.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
        for p in (page, english(page))
    ]
    assert headings[0] == headings[1]


@pytest.mark.any_backend
@pytest.mark.parametrize("page", TRANSLATIONS, ids=name_of)
def test_translation_has_the_same_numbers(page):
    numbers = [
        sorted(re.findall(r"\d+[.,]\d+", p.read_text(encoding="utf-8")))
        for p in (page, english(page))
    ]
    assert numbers[0] == numbers[1]
