"""Control characters of untrusted names are escaped in all output."""

import io
import json

import keras
import pytest
from matplotlib.figure import Figure

from involution.demo import render
from involution.saving import classifier
from involution.utils import atomic_files, errors
from involution.utils.errors import escape_controls
from involution.utils.progress import RichProgress
from involution.visualize import html
from involution_cli import commands, session
from tests.support.images import write_image

pytestmark = pytest.mark.any_backend

HOSTILE = "\x1b[2J\x9b1m\x7f\r\u202e\u2066\u2028[red]"
ESCAPED = r"\u001b[2J\u009b1m\u007f\u000d\u202e\u2066\u2028[red]"
READABLE = "한국어 é 👩\u200d💻 \u3000 $x$ [b] \\"


def has_no_controls(text):
    return not errors.CONTROL.search(text.replace("\n", ""))


def test_only_control_characters_are_escaped():
    assert escape_controls(HOSTILE) == ESCAPED
    assert escape_controls(READABLE) == READABLE
    assert escape_controls("a\nb\tc", "\n") == "a\nb\\u0009c"
    assert escape_controls("\udcff") == "\\udcff"
    assert escape_controls(ValueError("\x07")) == "\\u0007"
    # C0 and C1, DEL, line separators and directional marks.
    for code in (*range(32), *range(127, 160), 0x200E, 0x200F, *range(0x2028, 0x202F)):
        assert escape_controls(chr(code)) == f"\\u{code:04x}"


def test_command_line_and_package_escape_the_same_characters():
    assert session.CONTROL.pattern == errors.CONTROL.pattern
    assert session.escape_controls(HOSTILE + READABLE) == ESCAPED + READABLE


@pytest.mark.parametrize("terminal", [False, True])
def test_log_lines_and_progress_bars_are_escaped(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = io.StringIO()
    file.isatty = lambda: terminal
    progress = RichProgress(file)
    progress.log(f"{HOSTILE} one\nimage.png: cat 1.000")
    assert file.getvalue() == f"{ESCAPED} one\\u000aimage.png: cat 1.000\n"
    progress.begin(HOSTILE, 3)
    progress._logged = -100.0
    progress.advance()
    progress.end()
    assert ESCAPED in file.getvalue().replace("\n", "")
    assert HOSTILE not in file.getvalue()


def test_error_lines_are_escaped(capsys):
    assert session.fail(f"a\nb {HOSTILE}") == 2
    error = capsys.readouterr().err
    assert has_no_controls(error)
    assert error.startswith("involution: error: a b \\u001b[2J")


def test_class_names_cannot_forge_output_lines(tmp_path, capfd):
    layers = [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)]
    names = (HOSTILE, "x\nimage.png: cat 1.000")
    path = tmp_path / "m.keras"
    classifier.Classifier(keras.Sequential(layers), names, (8, 8, 3)).save(path)
    write_image(tmp_path / "i.png")
    commands.predict(path, tmp_path / "i.png")
    (line,) = capfd.readouterr().out.splitlines()
    assert ESCAPED in line
    assert r"x\u000aimage.png" in line
    scores = render.classify({"m": classifier.load(path)}, tmp_path / "i.png")
    assert set(scores["m"]) == {ESCAPED, r"x\u000aimage.png: cat 1.000"}


def test_written_files_are_escaped(tmp_path):
    (tmp_path / "x.html.j2").write_text("{{ name }}|{{ pair[0] }}|{{ many }}|{{ 3 }}")
    template = tmp_path / "x.html.j2"
    html.write(tmp_path / "x.html", template, name=HOSTILE, pair=["<b>"], many="a\n\tb")
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert text == f"{ESCAPED}|&lt;b&gt;|a\n\tb|3"
    atomic_files.write_json(tmp_path / "x.json", {HOSTILE: [READABLE, HOSTILE]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert has_no_controls(text)
    assert json.loads(text) == {HOSTILE: [READABLE, HOSTILE]}
    assert atomic_files.csv_text(["a", "b"], [{"a": HOSTILE, "b": 1.5}]) == f"a,b\n{ESCAPED},1.5\n"


def test_figure_titles_are_escaped():
    figure = Figure()
    figure.subplots().set_title("a\x1b\nbé", parse_math=False)
    svg = html.image(figure, "svg")
    assert b"\x1b" not in svg
    assert figure.axes[0].get_title() == "a\\u001b\nbé"


def test_layer_names_are_escaped_as_html():
    assert render._escape(f"<img src=x>{HOSTILE}") == f"&lt;img src=x&gt;{ESCAPED}"
