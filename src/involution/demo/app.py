"""The page: an image in; classes, heat maps and the kernels of any place out.

Made to be open to strangers: an upload's size is checked before it is decoded, one image is worked
on at a time, few wait, nothing is fetched from elsewhere, and an error says one line.
"""

import contextlib
import functools
import html
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import keras
from PIL import Image

from involution.models import pretrained
from involution.saving import classifier as saved_model
from involution.utils.errors import InputError, escape_controls

# Before Gradio is imported: it asks then, and would send what it counts.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
try:
    import gradio

    from involution.demo import render
except ImportError as error:
    raise InputError(
        f"The page needs Gradio: pip install 'involution[demo]'. Received: no module {error.name}"
    ) from error

MOST_BYTES = 8 * 2**20
MOST_PIXELS = 16 * 10**6
# Requests that wait; the others are told to come later, by status 503.
QUEUE = 32
# Seconds between looks at uploads, and that one is kept at least: until the browser has shown it.
SWEEP, KEPT = 60, 60
# Visitors whose last image, as small as the models see it, is remembered for clicks on it.
VISITORS = 64

STYLE = pathlib.Path(__file__).with_name("app.css")
# A click in any picture of the answers tells where, as shares of the picture's sizes.
ON_LOAD = """element.addEventListener('click', (event) => {
    const picture = event.target.closest('.picture');
    if (picture === null) return;
    const box = picture.getBoundingClientRect();
    trigger('click', {
        row: (event.clientY - box.top) / box.height,
        column: (event.clientX - box.left) / box.width,
    });
})"""
INTRODUCTION = """# Involution

A convolution has one kernel for all places of an image; an involution makes one for every place,
from what is there. Give an image: these networks name it, and show the kernels that they made."""


def _guard(image):
    """Has Gradio's image hand over the path of an upload, if it is a small enough image.

    By itself it decodes a file before anyone could look at its size, takes other formats too, and
    fetches a URL that a request names. (A subclass would have Gradio write a file beside this one.)
    """
    keep = image.async_move_resource_to_block_cache

    def path(payload):
        if payload is None:
            return None
        _told(check, pathlib.Path(payload.path))
        return payload.path

    async def cached(url_or_path):
        if "://" in str(url_or_path):
            raise gradio.Error("An image must be uploaded.", print_exception=False)
        return await keep(url_or_path)

    image.preprocess, image.async_move_resource_to_block_cache = path, cached


def check(path):
    """InputError unless a file is one that the page takes, by its size and its header."""
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise InputError(f"An image must have at most {MOST_BYTES:,} bytes. Received: {size:,}")
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as opened:
            width, height = opened.size
    except Exception as error:  # Pillow raises many kinds for what is not an image
        raise InputError("An image must be a PNG, JPEG or WebP file. Received: another") from error
    if width * height > MOST_PIXELS:
        raise InputError(
            f"An image must have at most {MOST_PIXELS:,} pixels. Received: {width}x{height}"
        )


def load(names) -> dict[str, saved_model.Classifier]:
    """Classifiers by the names that the page shows, and an answer of each, so that the first
    visitor waits no longer than the others."""
    classifiers = {}
    for name in names or pretrained.available():
        title = pathlib.Path(name).stem.removesuffix("-cifar10")
        if title in classifiers:
            raise InputError(f"Every model must have a name of its own. Received: {title} twice")
        classifiers[title] = saved_model.load(name)
    for classifier in classifiers.values():
        height, width, channels = classifier.image_shape
        classifier.predict_proba(
            keras.ops.convert_to_numpy(keras.ops.zeros((1, height, width, channels)))
        )
    return classifiers


def explain(classifiers, file) -> list:
    """What the page shows of an upload: scores by model, heat maps, the middle's kernels, timing,
    and what a click on it will be answered from."""
    if file is None:
        return [*(None for _ in classifiers), "", "", "", None]
    start = time.perf_counter()
    found = _told(render.scores, classifiers, file)
    scored = time.perf_counter() - start
    explanation = _told(render.Explanation, classifiers, file)
    timing = (
        f"Scores in {1000 * scored:.0f} ms, kernels in {1000 * explanation.seconds:.0f} ms "
        f"(Keras on {keras.config.backend()})."
    )
    shown = [found[name] for name in classifiers]
    return [*shown, explanation.maps(), explanation.kernels((0.5, 0.5)), timing, explanation]


def scores(classifiers, file) -> dict | None:
    """Probabilities by model and class."""
    return None if file is None else _told(render.scores, classifiers, file)


def kernels(seen, row, column) -> str:
    """What a place of the last image looks at."""
    return "" if seen is None else seen.kernels((row, column))


def clicked(seen, event: gradio.EventData):
    """The place of a click for the sliders, what it looks at, and the tab that shows this."""
    place = (event.row, event.column)
    if seen is None or not all(isinstance(n, (int, float)) and 0 <= n <= 1 for n in place):
        raise gradio.Error("An image must be given, and a place in it.", print_exception=False)
    return *(round(share, 3) for share in place), seen.kernels(place), gradio.Tabs(selected=1)


def build(classifiers, cards="") -> gradio.Blocks:
    """The page of some classifiers.

    Args:
        classifiers: By the names that the page shows.
        cards: Markdown about what they were trained on.
    """

    # The queue's: one image at a time, whatever is asked about it.
    alone: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
    private: dict[str, Any] = {**alone, "api_visibility": "private", "show_progress": "minimal"}
    with gradio.Blocks(
        title="Involution", analytics_enabled=False, delete_cache=(SWEEP, KEPT)
    ) as page:
        gradio.Markdown(INTRODUCTION)
        seen = gradio.State(None, time_to_live=1800)
        with gradio.Row():
            with gradio.Column(min_width=280):
                image = gradio.Image(
                    label="An image: drop, paste or choose one",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=300,
                    elem_id="given",
                    alt_text="Your image.",
                )
                timing = gradio.Markdown()
            with gradio.Column(min_width=280), gradio.Row():
                labels = [
                    gradio.Label(label=escape_controls(name), num_top_classes=3, min_width=160)
                    for name in classifiers
                ]
            _guard(image)
        with gradio.Tabs() as tabs:
            with gradio.Tab("Heat maps", id=0):
                gradio.Markdown("Click on a place in any of these to see the kernels made there.")
                maps = gradio.HTML(elem_classes="answers", js_on_load=ON_LOAD)
            with gradio.Tab("Kernels at a place", id=1):
                gradio.Markdown(
                    "Click on a place in any image, or set it here: every involution's window "
                    "around it, and the kernel that was made for it."
                )
                with gradio.Row():
                    row = gradio.Slider(0, 1, 0.5, step=0.005, label="Row, from the top")
                    column = gradio.Slider(0, 1, 0.5, step=0.005, label="Column, from the left")
                at_place = gradio.HTML(elem_classes="answers", js_on_load=ON_LOAD)
        with gradio.Accordion("What these models were trained on", open=False):
            gradio.Markdown(cards)
        image.change(
            functools.partial(explain, classifiers),
            image,
            [*labels, maps, at_place, timing, seen],
            **private,
        )
        for answer in (maps, at_place):
            answer.click(clicked, seen, [row, column, at_place, tabs], **private)
        for slider in (row, column):
            slider.input(
                kernels, [seen, row, column], at_place, trigger_mode="always_last", **private
            )
        # For programs: the same numbers, as JSON.
        gradio.Button(visible=False).click(
            functools.partial(scores, classifiers),
            image,
            gradio.JSON(visible=False),
            api_name="classify",
            api_description="Probabilities by model and class for an uploaded image.",
            **alone,
        )
    return page.queue(max_size=QUEUE)


def cards(names) -> str:
    """The cards of shipped models as one text."""
    texts = [
        (pretrained.path(name) / "README.md").read_text(encoding="utf-8")
        for name in names or pretrained.available()
        if name in pretrained.available()
    ]
    # Without what a hub reads, between two lines of dashes.
    bodies = (re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL) for text in texts)
    return "\n\n".join(body.strip().replace("# ", "### ", 1) for body in bodies)


@contextlib.contextmanager
def served(page, host="127.0.0.1", port=7860) -> Iterator[str]:
    """Within the block the page is there; yields its address.

    Args:
        page: As ``build`` makes it.
        host: The address to listen at; 0.0.0.0 is all of this machine's.
        port: 0 takes a free one.

    Raises:
        InputError: The port is taken, or the host is not this machine's.
    """
    with tempfile.TemporaryDirectory(prefix="involution-") as folder:
        # Of uploads nothing is left when the page is gone.
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port or _free_port(),
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                share=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                run_history=False,
                max_file_size=MOST_BYTES,
                max_threads=4,
                state_session_capacity=VISITORS,
                footer_links=["api"],
                theme=gradio.themes.Default(
                    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                ),
                css_paths=STYLE,
            )
        except OSError as error:
            raise InputError(
                "--host and --port must be an address of this machine, and a free port. "
                f"Received: {host}, {port}"
            ) from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _told(function, *arguments):
    """What a function gives; what it says of bad input is for the visitor."""
    try:
        return function(*arguments)
    except InputError as error:
        raise gradio.Error(
            html.escape(escape_controls(error), quote=False), print_exception=False
        ) from None
