"""Reports in Debian's Chromium; `make test-browser` runs it."""

import dataclasses
import shutil

import pytest

from tests.training import test_report

pytestmark = pytest.mark.browser
run = test_report.run
WIDTH = 375


def test_pages_fit_a_phone_and_follow_the_color_scheme(run, tmp_path):
    from playwright import sync_api  # installed by `make test-browser` only

    run.dataset = dataclasses.replace(
        run.dataset, name="n" * 200, class_names=("고" * 60, "x" * 90)
    )
    run.command = f"involution compare --dataset {'d' * 200} --image-size 64"
    run.failure = "f" * 200
    test_report.write(run, tmp_path)
    backgrounds = set()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": WIDTH, "height": 800}, color_scheme=scheme)
            page.goto((tmp_path / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") == WIDTH
            backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        browser.close()
    assert len(backgrounds) == 2
