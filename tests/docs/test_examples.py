"""The example programs run, with ``--quick``."""

import re
import runpy
import sys

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.any_backend

FOLDER = ROOT / "examples"
EXAMPLES = sorted(f.stem for f in FOLDER.glob("*.py") if f.stem != "common")


def test_examples_are_found():
    assert {"denoising", "segmentation", "series"} <= set(EXAMPLES)


@pytest.mark.long
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--output", str(tmp_path / "picture.png")])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d.]+) \|$", capsys.readouterr().out, re.M)
    results = {row[0]: (int(row[1].replace(",", "")), float(row[2])) for row in rows}
    involution, convolution = results["involution"], results["convolution"]
    # Parameter counts of small networks cannot be equal: numbers of channels are integers.
    assert involution[0] == pytest.approx(convolution[0], rel=0.3)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
