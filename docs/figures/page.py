"""Screenshots of the web demo, by Debian's chromium and Playwright.

    python docs/figures/page.py IMAGE

serves the demo, uploads the image, clicks in a heat map, and writes
docs/figures/page-{light,dark}.png: a desktop and a phone viewport.
"""

import pathlib
import re
import shutil
import sys

from PIL import Image
from playwright import sync_api

from involution.demo import app

FOLDER = pathlib.Path(__file__).parent
SHOTS = {
    "light": {"viewport": {"width": 1000, "height": 800}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 375, "height": 800}, "color_scheme": "dark"},
}
# Vertical offset of each screenshot.
TOPS = {"light": 0, "dark": 1500}


def shoot(browser, address, image, name):
    page = browser.new_page(**SHOTS[name])
    page.goto(address)
    page.wait_for_selector("input[type=file]", state="attached")
    page.set_input_files("input[type=file]", image)
    page.wait_for_selector("text=/Scores and kernels in \\d+ ms/")
    if name == "dark":
        page.get_by_role("img", name="heat map of inv_1", exact=True).click()
        page.get_by_role("slider", name=re.compile("Row")).wait_for(state="visible")
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # until animations have ended
    file = FOLDER / f"page-{name}.png"
    width, top = SHOTS[name]["viewport"]["width"], TOPS[name]
    page.screenshot(
        path=file, full_page=True, clip={"x": 0, "y": top, "width": width, "height": 1300}
    )
    with Image.open(file) as shot:
        small = shot.convert("RGB").quantize(128)
    small.save(file, optimize=True)


def main(image):
    page = app.build(app.load(()), app.model_cards(()))
    with app.serve(page, port=0) as address, sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name in SHOTS:
            shoot(browser, address, image, name)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
