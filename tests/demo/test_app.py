"""The web demo over HTTP, and its functions in this process; test_browser.py drives a browser."""

import collections
import dataclasses
import gc
import json
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import gradio
import keras
import numpy as np
import pytest

from involution.demo import app, examples, render
from involution.demo.texts import TEXTS
from involution.models import pretrained
from involution.saving.classifier import Classifier
from involution.utils.errors import InputError
from tests.support import hostile_images
from tests.support.demo_client import demo

pytestmark = pytest.mark.any_backend

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    log = tmp_path_factory.mktemp("page") / "log.txt"
    with demo(log) as page:
        yield page
    assert page.process.returncode == 0
    # Results on standard output, messages on standard error.
    assert page.lines == [f"Demo: {page.address}/ (Ctrl-C to stop)"]
    messages = log.read_text().splitlines()
    assert messages[0] == "involution: Starting the demo."
    assert messages[-1] == "Stopped."
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def classifiers():
    return app.load(())


def upload_folder(page):
    return pathlib.Path(page.upload("a.png", hostile_images.valid()).json()[0]).parents[1]


@pytest.mark.long
def test_demo_binds_only_127_0_0_1(page):
    assert page.address.startswith("http://127.0.0.1:")
    port = int(page.address.rsplit(":", 1)[1])
    # 127.0.0.0/8 is the loopback network; the demo binds one of its addresses.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), 1)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning", "ignore:Truncated File:UserWarning")
def test_scores_equal_predict_proba(page, classifiers, tmp_path):
    for name, content in {"a.png": hostile_images.valid(), **hostile_images.unusual()}.items():
        kind, scores = page.classify(name, content)
        assert kind == "complete", (name, scores)
        file = tmp_path / "image"
        file.write_bytes(content)
        for title, classifier in classifiers.items():
            expected = classifier.predict_proba(classifier.read(file))[0]
            assert list(scores[title]) == list(classifier.class_names)
            # TensorFlow's rounding differs between processes.
            np.testing.assert_allclose(list(scores[title].values()), expected, rtol=1e-5)


def test_scores_are_deterministic(page):
    image = hostile_images.valid("JPEG", (200, 100))
    results = [page.classify("a.jpg", image) for _ in range(3)]
    assert results[0] == results[1] == results[2]


@pytest.mark.long
def test_invalid_files_get_a_one_line_error(page):
    page.reset_peak()
    before = page.memory
    for name, content in hostile_images.invalid().items():
        kind, output = page.classify(name, content)
        if len(content) > 8 * MEGABYTE:
            assert kind == "413"
            continue
        assert kind == "error", (name, output)
        text = output["error"]
        assert text.startswith("An image must "), (name, output)
        assert "\n" not in text
        assert str(upload_folder(page)) not in text
    assert page.peak_memory - before < 200 * MEGABYTE
    assert page.classify("a.png", hostile_images.valid())[0] == "complete"


@pytest.mark.long
def test_damaged_images_are_decoded_or_get_an_error(page):
    page.reset_peak()
    before = page.memory
    results = [page.classify(*item) for item in hostile_images.damaged(200).items()]
    for kind, output in results:
        assert kind == "complete" or output["error"].startswith("An image must "), output
    assert {kind for kind, _ in results} == {"complete", "error"}
    assert page.peak_memory - before < 300 * MEGABYTE


def test_memory_of_the_largest_images_is_bounded(page):
    largest = hostile_images.png(4000, 4000, b"\0" + bytes(3 * 4000) * 4000 + bytes(4000))
    page.reset_peak()
    before = page.memory
    assert page.classify("a.png", largest)[0] == "complete"
    assert page.peak_memory - before < 300 * MEGABYTE
    too_large = hostile_images.png(4001, 4000)
    kind, output = page.classify("a.png", too_large)
    assert kind == "error"
    expected = "An image must have at most 16,000,000 pixels. Received: 4001x4000"
    assert output["error"] == expected


def test_no_url_is_fetched_and_no_other_file_is_read(page, tmp_path):
    connections = []

    def listen(server):
        while True:
            try:
                connections.append(server.accept()[1])
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=listen, args=(server,), daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.png"
        local_file = tmp_path / "a.png"
        local_file.write_bytes(hostile_images.valid())
        valid = page.upload("a.png", hostile_images.valid()).json()[0]
        requests = [
            {"path": url},
            {"path": valid, "url": url},
            {"path": str(local_file)},
            {"path": "/etc/passwd"},
            {"path": f"{upload_folder(page)}/../../../../etc/passwd"},
            {"path": "", "url": "data:image/png;base64,AAAA"},
            {"path": "file:///etc/passwd"},
        ]
        for request in requests:
            kind, output = page.result(page.request(**request))
            # A URL next to an upload's path is ignored.
            assert kind == ("complete" if request["path"] == valid else "error"), (request, output)
            assert "Traceback" not in str(output)
    assert connections == []
    for path in ("/etc/passwd", str(local_file), __file__):
        assert page.client.get(f"/file={path}").status_code in (403, 404)


@pytest.mark.long
def test_full_queue_rejects_requests(page):
    path = page.upload("a.png", hostile_images.valid()).json()[0]
    with ThreadPoolExecutor(64) as pool:
        codes = [r.status_code for r in pool.map(lambda _: page.request(path), range(200))]
    assert set(codes) <= {200, 429, 503}
    assert {429, 503} & set(codes)
    assert codes.count(200) >= 32
    while (response := page.request(path)).status_code != 200:
        time.sleep(0.2)
    assert page.result(response)[0] == "complete"


def test_malformed_requests_get_an_error(page):
    for content in (b"", b"{", b"[]", b'{"data": 3}', b'{"data": []}', b'{"data": [1, 2, 3]}'):
        response = page.client.post(
            "/call/classify", content=content, headers={"content-type": "application/json"}
        )
        assert "Traceback" not in response.text
        if response.status_code == 200:
            assert page.result(response)[0] == "error"
        else:
            assert 400 <= response.status_code < 500 or response.status_code == 503
    assert page.classify("a.png", hostile_images.valid())[0] == "complete"


# --- In this process -----------------------------------------------------------------------------


def test_explanation_shows_every_involution(classifiers, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(hostile_images.valid())
    explanation = render.Explanation(classifiers, file)
    maps, kernels = explanation.heat_maps(), explanation.kernels((0.2, 0.9))
    assert "cnn-cifar10 has no involutions" in maps
    for name in ("inv_1, 32&times;32", "inv_2, 16&times;16", "inv_3, 8&times;8"):
        assert name in maps
    for name in ("inv_1", "inv_2", "inv_3"):
        assert f"{name}, window 3&times;3, mean of 1 group" in kernels
    assert kernels != explanation.kernels((0.7, 0.1))
    assert "http" not in maps + kernels


def test_images_are_decoded_once_per_preprocessing_and_models_run_once(
    classifiers, tmp_path, monkeypatch
):
    decodes, calls = [], collections.Counter()
    names = {id(c.model): name for name, c in classifiers.items()}
    read, call = Classifier.read, keras.layers.Layer.__call__

    def counted_read(self, file):
        decodes.append((self.image_shape, self.crop_fraction))
        return read(self, file)

    def counted_call(self, *args, **kwargs):
        if id(self) in names:
            calls[names[id(self)]] += 1
        return call(self, *args, **kwargs)

    monkeypatch.setattr(Classifier, "read", counted_read)
    monkeypatch.setattr(keras.layers.Layer, "__call__", counted_call)
    file = tmp_path / "a.png"
    file.write_bytes(hostile_images.valid())
    *_, state = app.explain(classifiers, str(file))
    assert len(classifiers) >= 3
    assert decodes == [((32, 32, 3), None)]
    assert calls == dict.fromkeys(classifiers, 1)
    app.kernels(state, 0.2, 0.9)
    assert (len(decodes), calls.total()) == (1, len(classifiers))
    # Another crop fraction requires another decode.
    cropped = dataclasses.replace(classifiers["inn-cifar10"], crop_fraction=0.5)
    decodes.clear()
    images = render._read({**classifiers, "cropped": cropped}, file)
    assert decodes == [((32, 32, 3), None), ((32, 32, 3), 0.5)]
    assert images["inn-cifar10"] is images["cnn-cifar10"] is not images["cropped"]


def test_scores_of_a_model_of_probabilities_are_its_outputs(classifiers, tmp_path):
    logits = classifiers["inn-cifar10"]
    softmax = keras.Model(logits.model.input, keras.ops.softmax(logits.model.outputs[0]))
    probabilities = dataclasses.replace(logits, model=softmax, outputs="probabilities")
    file = tmp_path / "a.png"
    file.write_bytes(hostile_images.valid())
    of_logits, of_probabilities = (
        render.Explanation({"inn": classifier}, file).scores["inn"]
        for classifier in (logits, probabilities)
    )
    assert of_probabilities == pytest.approx(of_logits, rel=1e-4)


def test_model_names_are_escaped(classifiers, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(hostile_images.valid())
    name = "<script>alert(1)</script>"
    text = render.Explanation({name: classifiers["inn-cifar10"]}, file).heat_maps()
    text += render.Explanation({name: classifiers["cnn-cifar10"]}, file).heat_maps()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 2


def test_model_cards_contain_the_training_data():
    cards = app.model_cards(())
    assert list(cards) == pretrained.available() == list(app.load(()))
    for text in cards.values():
        assert "50000 images" in text
        assert "license:" not in text
        assert "#" not in text
    assert list(app.model_cards(("inn-cifar10", "my.keras"))) == ["inn-cifar10"]


def test_classes_are_listed_once_for_models_that_share_them(classifiers):
    (paragraph,) = app.class_lists(classifiers)
    assert paragraph.startswith("airplane, automobile, bird, ")
    assert paragraph.endswith(", ship, truck.")
    own = dataclasses.replace(classifiers["inn-cifar10"], class_names=("*a*", "<b>"))
    many = dataclasses.replace(own, class_names=tuple(map(str, range(102))))
    _, of_own, of_many = app.class_lists({**classifiers, "my_own": own, "many": many})
    assert of_own == r"my\_own: \*a\*, \<b\>."
    assert of_many.endswith(", 98, 99, and 2 more.")


def test_examples_are_images_of_known_classes(classifiers, tmp_path):
    for name in examples.EXAMPLES:
        examples.draw(name).save(tmp_path / "a.png")
        (scores,) = render.classify(
            {"tiny": classifiers["rednet_tiny-cifar10"]}, tmp_path / "a.png"
        ).values()
        assert max(scores, key=scores.get) == name


def test_every_text_has_a_translation():
    english, korean = (TEXTS[language] for language in ("en", "ko"))
    assert english.keys() == korean.keys() >= examples.EXAMPLES.keys()
    source = pathlib.Path(app.__file__).read_text(encoding="utf-8")
    used = set(re.findall(r'I18N\("(\w+)"\)', source)) | examples.EXAMPLES.keys()
    assert used == english.keys()
    for text in korean.values():
        assert re.search("[가-힣]", text)


def test_duplicate_model_names_raise():
    with pytest.raises(InputError, match="Received: inn-cifar10 twice"):
        app.load(("inn-cifar10", "inn-cifar10"))


@pytest.mark.slow
def test_port_in_use_gives_a_one_line_error(page):
    port = page.address.rsplit(":", 1)[1]
    result = subprocess.run(
        [sys.executable, "-m", "involution_cli", "demo", "--port", port],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith(f"Received: 127.0.0.1, {port}")
    assert "Traceback" not in result.stderr


def test_page_events_update_the_outputs(page):
    path = page.upload("a.png", hostile_images.valid()).json()[0]
    image = {"path": path, "meta": {"_type": "gradio.FileData"}}

    def submit(index, *data, **more):
        body = {"data": data, "fn_index": index, "session_hash": "me", **more}
        assert page.client.post("/queue/join", json=body).status_code == 200
        text = page.client.get("/queue/data", params={"session_hash": "me"}).text
        events = [json.loads(line[6:]) for line in text.splitlines() if line]
        (done,) = (e for e in events if e["msg"] == "process_completed")
        return done["success"], done["output"]

    change, click, _, slide, _, classify, example = range(7)
    point = {"event_data": {"row": 0.25, "column": 0.75}}
    # Before an upload.
    ok, output = submit(click, None, **point)
    assert not ok
    assert output["error"] == "A point of an uploaded image is required."
    assert submit(slide, None, 0.1, 0.2)[1]["data"] == [""]
    assert submit(classify, None)[1]["data"] == [None]
    ok, output = submit(example)
    assert ok
    drawn = {"path": output["data"][0]["path"], "meta": {"_type": "gradio.FileData"}}
    assert submit(classify, drawn)[1]["data"][0]["cnn-cifar10"]["airplane"] > 0.5
    ok, output = submit(change, image)
    assert ok
    before = output["data"][-3]
    ok, output = submit(click, None, **point)
    assert ok
    assert output["data"][:2] == [0.25, 0.75]
    assert submit(slide, None, 0.25, 0.75)[1]["data"] == [output["data"][2]] != [before]
    assert not submit(click, None, event_data={"row": 7, "column": "a"})[0]
    assert submit(change, None)[0]
    assert submit(slide, None, 0.1, 0.2)[1]["data"] == [""]


def test_page_outputs_for_an_upload_match_the_api(classifiers, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(hostile_images.valid())
    *scores, maps, kernels, timing, state = app.explain(classifiers, str(file))
    # The API computes its scores without recording kernels.
    for page_scores, api_scores in zip(scores, app.scores(classifiers, file).values(), strict=True):
        assert page_scores == pytest.approx(api_scores, rel=1e-4)
        assert sum(page_scores.values()) == pytest.approx(1)
    assert "inv_3" in maps
    assert kernels == app.kernels(state, 0.5, 0.5)
    assert re.match(r"Scores and kernels in \d+ ms \(Keras on ", timing)
    row, column, at_point, tabs = app.on_click(
        state, types.SimpleNamespace(row=0.25, column=0.7501)
    )
    assert (row, column) == (0.25, 0.75)
    assert at_point == app.kernels(state, 0.25, 0.7501)
    assert tabs.selected == 1
    assert app.explain(classifiers, None) == [None] * len(classifiers) + ["", "", "", None]
    assert app.scores(classifiers, None) is None
    assert app.kernels(None, 0.5, 0.5) == ""
    for state_, row in ((None, 0.5), (state, 1.1), (state, float("nan")), (state, "0.5")):
        with pytest.raises(gradio.Error, match="A point of an uploaded image"):
            app.on_click(state_, types.SimpleNamespace(row=row, column=0.5))
    file.write_bytes(hostile_images.valid()[:200])
    with pytest.raises(gradio.Error, match="An image must be a valid PNG"):
        app.explain(classifiers, str(file))


@pytest.fixture
def built_page(classifiers):
    """The page without a server. Gradio leaves an event loop open, hence the warning filter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        page = app.build(classifiers, {"inn-cifar10": "a card"})
        yield page
        page.close()
        del page
        gc.collect()


@pytest.mark.long
def test_upload_is_validated_before_decoding(built_page, tmp_path):
    (image,) = (block for block in built_page.blocks.values() if isinstance(block, gradio.Image))
    file = tmp_path / "a.png"
    file.write_bytes(hostile_images.valid())
    payload = types.SimpleNamespace(path=str(file))
    assert image.preprocess(payload) == str(file)
    assert image.preprocess(None) is None
    for content, message in (
        (bytes(9 * MEGABYTE), "at most 8,388,608 bytes. Received: 9,437,184"),
        (hostile_images.png(4001, 4000), "16,000,000 pixels. Received: 4001x4000"),
        (b"GIF89a", "a PNG, JPEG or WebP file"),
    ):
        file.write_bytes(content)
        with pytest.raises(gradio.Error, match=message):
            image.preprocess(payload)
    fetch = image.async_move_resource_to_block_cache("http://127.0.0.1:9/a.png")
    with pytest.raises(gradio.Error, match="must be uploaded"):
        fetch.send(None)
