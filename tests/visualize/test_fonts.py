"""Characters that Matplotlib's default font lacks; warnings about glyphs are errors in tests."""

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

from involution import models
from involution.saving.classifier import Classifier
from involution.visualize import explain, fonts, html

pytestmark = pytest.mark.any_backend

# In Matplotlib's own STIX fonts, but not in its default font.
RARE = "\N{MATHEMATICAL BOLD SCRIPT CAPITAL A}"


@pytest.fixture
def install(monkeypatch):
    """Returns a function that makes these fonts the installed ones."""

    def clear():
        for cached in (fonts._family, fonts._register, fonts._installed):
            cached.cache_clear()

    def install(*paths):
        clear()
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(map(str, paths)))

    before = list(font_manager.fontManager.ttflist)
    yield install
    font_manager.fontManager.ttflist[:] = before
    clear()


def stix():
    (path,) = {
        e.fname for e in font_manager.fontManager.ttflist if e.fname.endswith("STIXGeneral.ttf")
    }
    return path


def figure(title):
    drawn = Figure(layout="constrained")
    drawn.subplots().set_title(title, parse_math=False)
    return drawn


def test_an_installed_font_draws_what_the_default_font_lacks(install):
    install(stix())
    drawn = figure(f"a{RARE}")
    without = html.png(figure("a"))
    assert html.png(drawn) != without
    assert drawn.axes[0].title.get_family() == ["sans-serif", "STIXGeneral"]
    assert drawn.axes[0].get_title() == f"a{RARE}"
    assert fonts.warning(["a", RARE]) is None


def test_without_such_a_font_there_is_a_placeholder_and_one_warning(install, tmp_path):
    damaged = tmp_path / "damaged.ttf"
    damaged.write_bytes(b"no font")
    install(damaged)
    drawn = figure("고양이 cat\n고")
    html.png(drawn)
    assert drawn.axes[0].get_title() == "??? cat\n?"
    warning = fonts.warning(["cat", "고양이", "양"])
    assert ": 고양이. Install" in warning
    assert "\n" not in warning
    assert fonts.warning(["cat", "Ärger"]) is None


def test_the_last_resort_is_no_font(install):
    entries = font_manager.fontManager.ttflist
    install(*(e.fname for e in entries if e.name.startswith("Last Resort")))
    assert fonts._installed() == []


def test_explain_reports_class_names_without_a_font(monkeypatch, tmp_path):
    monkeypatch.setattr(fonts, "_family", lambda character: None)
    classifier = Classifier(models.inn((8, 8, 3), 2), ("고양이", "고양이"), (8, 8, 3))
    images = [("cat.png", np.ones((1, 8, 8, 3), "float32"))]
    lines = explain.write(classifier, images, tmp_path / "x.png")
    assert sum("no installed font has: 고양이. Install" in line for line in lines) == 1
    # The figures of a page have no class names.
    lines = explain.write(classifier, images, tmp_path / "x.html")
    assert not any("font" in line for line in lines)
