"""The web demo in Debian's Chromium; `make test-browser` runs it."""

import pathlib
import re
import shutil
import time

import pytest

from tests.support import hostile_images
from tests.support.demo_client import demo

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    log = tmp_path_factory.mktemp("page") / "log.txt"
    start = time.perf_counter()
    with demo(log) as page:
        print(f"startup: {time.perf_counter() - start:.1f} s")
        yield page
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def browser():
    from playwright import sync_api  # installed by `make test-browser` only

    assert CHROMIUM, "apt install chromium"
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_tab(browser, page):
    """Returns a function that opens the page in a new tab. Teardown asserts that no external URL
    was requested and that the console has no errors."""
    urls, errors, contexts = [], [], []

    def new_tab(**options):
        contexts.append(browser.new_context(**options))
        tab = contexts[-1].new_page()
        tab.on("request", lambda request: urls.append(request.url))
        tab.on("console", lambda message: message.type == "error" and errors.append(message.text))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        start = time.perf_counter()
        tab.goto(page.address)
        tab.wait_for_selector("input[type=file]", state="attached")
        print(f"page load: {time.perf_counter() - start:.1f} s")
        return tab

    new_tab.errors = errors
    yield new_tab
    for context in contexts:
        context.close()
    assert [url for url in urls if not url.startswith((page.address, "data:", "blob:"))] == []
    assert errors == []


@pytest.fixture
def image(tmp_path):
    file = tmp_path / "image.png"
    file.write_bytes(hostile_images.valid(size=(64, 48)))
    return file


def upload(tab, file):
    start = time.perf_counter()
    tab.set_input_files("input[type=file]", str(file))
    tab.wait_for_selector(".explanation figure img")
    tab.wait_for_selector("text=/Scores and kernels in \\d+ ms/")
    print(f"explanation: {time.perf_counter() - start:.1f} s")


def test_upload_shows_scores_and_a_click_selects_a_point(open_tab, image):
    tab = open_tab()
    upload(tab, image)
    for name in ("cnn-cifar10", "inn-cifar10"):
        assert tab.get_by_text(name, exact=True).count() >= 1
    assert tab.locator(".explanation figcaption", has_text="inv_1, 32").count() == 1
    row, column = (tab.get_by_role("slider", name=re.compile(n)) for n in ("Row", "Column"))
    heat_map = tab.get_by_role("img", name="heat map of inv_2", exact=True)
    heat_map.click(position={"x": 64, "y": 32})
    row.wait_for(state="visible")
    assert float(row.input_value()) == pytest.approx(0.25, abs=0.02)
    assert float(column.input_value()) == pytest.approx(0.5, abs=0.02)
    # The first click selected the tab of kernels; a click in a window moves the point.
    tab.get_by_role("img", name="window of inv_3").click(position={"x": 115, "y": 115})
    tab.wait_for_function(
        "row => Math.abs(row.value - 0.9) < 0.02", arg=row.element_handle(), timeout=10_000
    )


def test_page_is_korean_in_a_korean_browser(open_tab):
    tab = open_tab(locale="ko-KR")
    tab.get_by_role("tab", name="히트맵").wait_for()
    assert tab.get_by_role("button", name="비행기").count() == 1
    assert tab.get_by_text("컨볼루션은 이미지의").count() == 1
    assert tab.get_by_text("Heat maps").count() == 0
    assert tab.get_by_text("[object Object]").count() == 0
    tab.get_by_role("tab", name="한 점의 커널").click()
    tab.get_by_role("slider", name=re.compile("행")).wait_for(state="visible")


def test_an_example_is_classified(open_tab):
    tab = open_tab()
    tab.get_by_role("button", name="Truck").click()
    tab.wait_for_selector("text=/Scores and kernels in \\d+ ms/")
    assert tab.locator(".explanation figcaption", has_text="inv_1, 32").count() == 1


def test_page_is_usable_by_keyboard(open_tab, image):
    tab = open_tab()
    upload(tab, image)
    tab.get_by_role("tab", name="Heat maps").focus()
    tab.keyboard.press("Tab")
    tab.keyboard.press("Enter")
    row = tab.get_by_role("slider", name=re.compile("Row"))
    row.wait_for(state="visible")
    before = tab.locator(".explanation").last.inner_html()
    row.focus()
    for _ in range(40):
        tab.keyboard.press("ArrowRight")
    tab.wait_for_function(
        "before => [...document.querySelectorAll('.explanation')].at(-1).innerHTML !== before",
        arg=before,
    )
    assert float(row.input_value()) == pytest.approx(0.7)


def test_every_image_and_control_has_an_accessible_name(open_tab, image):
    tab = open_tab()
    upload(tab, image)
    assert tab.locator("img:not([alt])").count() == 0
    unnamed = tab.evaluate(
        """() => [...document.querySelectorAll('button, input:not([type=file]), [role=tab]')]
        .filter(e => e.offsetParent && !(e.getAttribute('aria-label') || e.innerText.trim()
            || e.title || e.labels?.length || e.getAttribute('aria-labelledby')))
        .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert unnamed == []
    assert tab.title() == "Involution"


def test_invalid_and_too_large_files_show_an_error(open_tab, tmp_path):
    tab = open_tab()
    file = tmp_path / "text.png"
    file.write_bytes(b"hello")
    tab.set_input_files("input[type=file]", str(file))
    tab.wait_for_selector("text=An image must be a PNG, JPEG or WebP file")
    tab.reload()
    tab.wait_for_selector("input[type=file]", state="attached")
    file.write_bytes(hostile_images.valid() + bytes(9 * 2**20))
    tab.set_input_files("input[type=file]", str(file))
    tab.wait_for_selector("text=/exceed the maximum allowed size of 8.0 Mb/")
    # Gradio's client logs rejected uploads to the console.
    assert len(open_tab.errors) <= 2
    open_tab.errors.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1200])
def test_page_follows_the_color_scheme_and_fits_the_width(open_tab, image, tmp_path, scheme, width):
    tab = open_tab(viewport={"width": width, "height": 800}, color_scheme=scheme)
    upload(tab, image)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    color = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", color)[:3])) > 380
    assert light == (scheme == "light")
    folder = pathlib.Path(tmp_path)
    tab.screenshot(path=folder / "page.png", full_page=True)
    print(folder / "page.png")
