"""Folders of the checkout."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]
TESTS = ROOT / "tests"
FILES = TESTS / "support" / "files"
