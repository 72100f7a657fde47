"""The web demo: classes, heat maps and kernels of an uploaded image.

Safe for untrusted visitors: uploads are limited in size before they are decoded, images are
processed one at a time, the queue is bounded, no URL is fetched, and errors are one line.
"""

import collections
import contextlib
import functools
import html
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import keras
from PIL import Image

from involution.demo import examples
from involution.demo.texts import TEXTS
from involution.models import pretrained
from involution.saving import classifier
from involution.utils.errors import InputError, escape_controls
from involution.visualize.activations import capture_with_outputs

# Gradio reads these when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
try:
    import gradio

    from involution.demo import render
except ImportError as error:
    raise InputError(
        "The web demo requires Gradio: pip install 'involution[demo]'. "
        f"Received: no module {error.name}"
    ) from error

MAX_BYTES = 8 * 2**20
MAX_PIXELS = 16 * 10**6
# Maximum number of queued requests; further requests get status 503.
QUEUE = 32
# Seconds between deletions of uploads, and the minimum age of deleted ones, which browsers may
# still display.
CLEANUP_INTERVAL, UPLOAD_TTL = 60, 60
# Maximum number of sessions whose last explanation is kept in memory for clicks.
MAX_SESSIONS = 64

STYLE = pathlib.Path(__file__).with_name("app.css")
# A click in an image sends its relative coordinates.
ON_LOAD = """element.addEventListener('click', (event) => {
    const image = event.target.closest('.clickable');
    if (image === null) return;
    const box = image.getBoundingClientRect();
    trigger('click', {
        row: (event.clientY - box.top) / box.height,
        column: (event.clientX - box.left) / box.width,
    });
})"""
I18N = gradio.I18n(**TEXTS)
# Maximum number of class names that the page lists for a model.
MAX_NAMES = 100


def _validate_upload(image):
    """Configures a Gradio image component to validate an upload and to pass on its path.

    By default it decodes a file before its size can be checked, accepts other formats, and fetches
    URLs. Not a subclass, for which Gradio would write a file next to this module.
    """
    move_to_cache = image.async_move_resource_to_block_cache

    def preprocess(payload):
        if payload is None:
            return None
        _as_gradio_error(check, pathlib.Path(payload.path))
        return payload.path

    async def move_file_to_cache(url_or_path):
        if "://" in str(url_or_path):
            raise gradio.Error("An image must be uploaded.", print_exception=False)
        return await move_to_cache(url_or_path)

    image.preprocess, image.async_move_resource_to_block_cache = preprocess, move_file_to_cache


def check(path):
    """Checks the size and the header of an uploaded file.

    Raises:
        InputError: It is too large, or not a PNG, JPEG or WebP file.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InputError(f"An image must have at most {MAX_BYTES:,} bytes. Received: {size:,}")
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as opened:
            width, height = opened.size
    except Exception as error:  # Pillow raises many exception types for damaged files
        raise InputError(
            "An image must be a PNG, JPEG or WebP file. Received: another format"
        ) from error
    if width * height > MAX_PIXELS:
        raise InputError(
            f"An image must have at most {MAX_PIXELS:,} pixels. Received: {width}x{height}"
        )


def load(names) -> dict[str, classifier.Classifier]:
    """Loads classifiers by display name, and runs each once because first calls are slow."""
    classifiers = {}
    for name in names or pretrained.available():
        title = pathlib.Path(name).stem
        if title in classifiers:
            raise InputError(f"Model names must be unique. Received: {title} twice")
        classifiers[title] = classifier.load(name)
    for loaded in classifiers.values():
        height, width, channels = loaded.image_shape
        image = keras.ops.convert_to_numpy(keras.ops.zeros((1, height, width, channels)))
        loaded.predict_proba(image)
        capture_with_outputs(loaded.model, image)
    return classifiers


def explain(classifiers, file) -> list:
    """Outputs of the page for an upload: scores of each model, heat maps, the kernels at the
    center, the elapsed time, and the state for later clicks."""
    if file is None:
        return [*(None for _ in classifiers), "", "", "", None]
    explanation = _as_gradio_error(render.Explanation, classifiers, file)
    timing = (
        f"Scores and kernels in {1000 * explanation.seconds:.0f} ms "
        f"(Keras on {keras.config.backend()})."
    )
    scores = [explanation.scores[name] for name in classifiers]
    return [*scores, explanation.heat_maps(), explanation.kernels((0.5, 0.5)), timing, explanation]


def scores(classifiers, file) -> dict | None:
    """Probabilities by model and class."""
    return None if file is None else _as_gradio_error(render.classify, classifiers, file)


def kernels(state, row, column) -> str:
    """Windows and kernels at a point of the session's last image."""
    return "" if state is None else state.kernels((row, column))


def on_click(state, event: gradio.EventData):
    """The point's coordinates for the sliders, its kernels, and the tab that shows them."""
    point = (event.row, event.column)
    if state is None or not all(isinstance(n, (int, float)) and 0 <= n <= 1 for n in point):
        raise gradio.Error("A point of an uploaded image is required.", print_exception=False)
    return *(round(n, 3) for n in point), state.kernels(point), gradio.Tabs(selected=1)


def class_lists(classifiers) -> list[str]:
    """The classes of each model as a paragraph; models with the same ones share it."""
    models = collections.defaultdict(list)
    for name, loaded in classifiers.items():
        models[loaded.class_names].append(name)
    paragraphs = []
    for names, titles in models.items():
        shown = ", ".join(map(_escape, names[:MAX_NAMES]))
        rest = f", and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        of = "" if len(models) == 1 else f"{', '.join(map(_escape, titles))}: "
        paragraphs.append(f"{of}{shown}{rest}.")
    return paragraphs


def _escape(text) -> str:
    """Text of a model as Markdown, whose punctuation may be escaped."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", escape_controls(text))


def build(classifiers, cards=None) -> gradio.Blocks:
    """Builds the page.

    Args:
        classifiers: By display name.
        cards: Model cards as Markdown, by display name, of some of them or of none.
    """
    cards = cards or {}

    # All events share one queue with one worker.
    queued: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
    private: dict[str, Any] = {**queued, "api_visibility": "private", "show_progress": "minimal"}
    with gradio.Blocks(
        title="Involution", analytics_enabled=False, delete_cache=(CLEANUP_INTERVAL, UPLOAD_TTL)
    ) as page:
        gradio.Markdown(I18N("introduction"))
        state = gradio.State(None, time_to_live=1800)
        with gradio.Row():
            with gradio.Column(min_width=280):
                image = gradio.Image(
                    label=I18N("input_image"),
                    type="filepath",
                    format="png",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=300,
                    elem_id="input-image",
                    alt_text="Uploaded image",
                )
                gradio.Markdown(I18N("examples"))
                with gradio.Row():
                    buttons = {
                        name: gradio.Button(I18N(name), size="sm", min_width=80)
                        for name in examples.EXAMPLES
                    }
                timing = gradio.Markdown()
            with gradio.Column(min_width=280):
                labels = []
                with gradio.Row():
                    for name in classifiers:
                        with gradio.Column(min_width=160):
                            labels.append(
                                gradio.Label(label=escape_controls(name), num_top_classes=3)
                            )
                            if name in cards:
                                with gradio.Accordion(I18N("card"), open=False):
                                    gradio.Markdown(cards[name])
                gradio.Markdown(I18N("classes"))
                for paragraph in class_lists(classifiers):
                    gradio.Markdown(paragraph)
            _validate_upload(image)
        with gradio.Tabs() as tabs:
            with gradio.Tab(I18N("heat_maps"), id=0):
                gradio.Markdown(I18N("heat_maps_help"))
                heat_maps = gradio.HTML(elem_classes="explanation", js_on_load=ON_LOAD)
            with gradio.Tab(I18N("kernels"), id=1):
                gradio.Markdown(I18N("kernels_help"))
                with gradio.Row():
                    row = gradio.Slider(0, 1, 0.5, step=0.005, label=I18N("row"))
                    column = gradio.Slider(0, 1, 0.5, step=0.005, label=I18N("column"))
                kernels_at_point = gradio.HTML(elem_classes="explanation", js_on_load=ON_LOAD)
        image.change(
            functools.partial(explain, classifiers),
            image,
            [*labels, heat_maps, kernels_at_point, timing, state],
            **private,
        )
        for explanation in (heat_maps, kernels_at_point):
            explanation.click(on_click, state, [row, column, kernels_at_point, tabs], **private)
        for slider in (row, column):
            slider.input(
                kernels,
                [state, row, column],
                kernels_at_point,
                trigger_mode="always_last",
                **private,
            )
        # The JSON API.
        gradio.Button(visible=False).click(
            functools.partial(scores, classifiers),
            image,
            gradio.JSON(visible=False),
            api_name="classify",
            api_description="Probabilities by model and class for an uploaded image.",
            **queued,
        )
        for name, button in buttons.items():
            # The changed image is then explained, as an upload is.
            button.click(functools.partial(examples.draw, name), None, image, **private)
    return page.queue(max_size=QUEUE)


def model_cards(names) -> dict[str, str]:
    """Model cards of the pretrained models as Markdown, by name."""
    cards = {}
    for name in names or pretrained.available():
        if name in pretrained.available():
            text = (pretrained.path(name) / "README.md").read_text(encoding="utf-8")
            # Without the YAML front matter, and without the title, which is the label's.
            cards[name] = re.sub(r"\A(---\n.*?\n---\n+)?# [^\n]*\n+", "", text, flags=re.DOTALL)
    return cards


@contextlib.contextmanager
def serve(page, host="127.0.0.1", port=7860) -> Iterator[str]:
    """Context manager that serves the page and yields its URL.

    Args:
        page: From ``build``.
        host: The address to bind; 0.0.0.0 binds all interfaces.
        port: The port; 0 selects a free one.

    Raises:
        InputError: The address cannot be bound.
    """
    with tempfile.TemporaryDirectory(prefix="involution-") as folder:
        # Uploads are deleted with the server.
        os.environ["GRADIO_TEMP_DIR"] = folder
        # Examples are written there too, and then accepted as uploads. Gradio reads the variable
        # when a component is created.
        for block in page.blocks.values():
            if isinstance(block, gradio.Image):
                block.GRADIO_CACHE = folder
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
                max_file_size=MAX_BYTES,
                max_threads=4,
                state_session_capacity=MAX_SESSIONS,
                footer_links=["api"],
                theme=gradio.themes.Default(
                    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                ),
                css_paths=STYLE,
                i18n=I18N,
            )
        except OSError as error:
            raise InputError(
                "--host and --port must be a local address and a free port. "
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


def _as_gradio_error(function, *arguments):
    """Calls a function; an ``InputError`` is shown to the visitor, other exceptions are not."""
    try:
        return function(*arguments)
    except InputError as error:
        raise gradio.Error(
            html.escape(escape_controls(error), quote=False), print_exception=False
        ) from None
