"""The page as programs and strangers meet it; browsers are in test_browser.py."""

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
import numpy as np
import pytest

from involution.demo import app, render
from involution.models import pretrained
from involution.utils.errors import InputError
from tests.support import hostile_images
from tests.support.demo_client import served

pytestmark = pytest.mark.any_backend

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    log = tmp_path_factory.mktemp("page") / "log.txt"
    with served(log) as page:
        yield page
    assert page.process.returncode == 0
    assert page.first_lines[-1] == "Stopped."
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def classifiers():
    return app.load(())


def folder_of(page):
    """Where the page keeps uploads."""
    return pathlib.Path(page.upload("a.png", hostile_images.good()).json()[0]).parents[1]


def test_it_listens_to_this_machine_alone(page):
    assert page.first_lines[0] == "involution: Starting the demo."
    assert page.address.startswith("http://127.0.0.1:")
    port = int(page.address.rsplit(":", 1)[1])
    # All of 127/8 is this machine; the page is at one of its addresses.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), 1)


@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning", "ignore:Truncated File:UserWarning")
def test_its_answers_are_those_of_the_command(page, classifiers, tmp_path):
    for name, content in {"a.png": hostile_images.good(), **hostile_images.odd()}.items():
        kind, scores = page.classify(name, content)
        assert kind == "complete", (name, scores)
        file = tmp_path / "image"
        file.write_bytes(content)
        for title, classifier in classifiers.items():
            expected = classifier.scores(classifier.read(file))[0]
            assert list(scores[title]) == list(classifier.class_names)
            # Another process: the same machine and code, and on TensorFlow other last bits.
            np.testing.assert_allclose(list(scores[title].values()), expected, rtol=1e-5)


def test_an_equal_image_gets_an_answer_equal_to_the_bit(page):
    image = hostile_images.good("JPEG", (200, 100))
    answers_ = [page.classify("a.jpg", image) for _ in range(3)]
    assert answers_[0] == answers_[1] == answers_[2]


def test_what_is_no_image_is_refused_in_one_line(page):
    page.forget_peak()
    before = page.memory
    for name, content in hostile_images.refused().items():
        kind, said = page.classify(name, content)
        if len(content) > 8 * MEGABYTE:
            assert kind == "413"
            continue
        assert kind == "error", (name, said)
        text = said["error"]
        assert text.startswith("An image must "), (name, said)
        assert "\n" not in text
        assert str(folder_of(page)) not in text
    assert page.peak_memory - before < 200 * MEGABYTE
    assert page.classify("a.png", hostile_images.good())[0] == "complete"


def test_damaged_images_are_images_or_refused(page):
    page.forget_peak()
    before = page.memory
    found = [page.classify(*item) for item in hostile_images.damaged(200).items()]
    for kind, said in found:
        assert kind == "complete" or said["error"].startswith("An image must "), said
    assert {kind for kind, _ in found} == {"complete", "error"}
    assert page.peak_memory - before < 300 * MEGABYTE


def test_the_largest_images_are_bounded_in_memory(page):
    wide = hostile_images.png(4000, 4000, b"\0" + bytes(3 * 4000) * 4000 + bytes(4000))
    page.forget_peak()
    before = page.memory
    assert page.classify("a.png", wide)[0] == "complete"
    assert page.peak_memory - before < 300 * MEGABYTE
    larger = hostile_images.png(4001, 4000)
    kind, said = page.classify("a.png", larger)
    assert kind == "error"
    expected = "An image must have at most 16,000,000 pixels. Received: 4001x4000"
    assert said["error"] == expected


def test_nothing_is_fetched_and_no_other_file_is_read(page, tmp_path):
    asked = []

    def listen(server):
        while True:
            try:
                asked.append(server.accept()[1])
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=listen, args=(server,), daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.png"
        own = tmp_path / "a.png"
        own.write_bytes(hostile_images.good())
        real = page.upload("a.png", hostile_images.good()).json()[0]
        requests = [
            {"path": url},
            {"path": real, "url": url},
            {"path": str(own)},
            {"path": "/etc/passwd"},
            {"path": f"{folder_of(page)}/../../../../etc/passwd"},
            {"path": "", "url": "data:image/png;base64,AAAA"},
            {"path": "file:///etc/passwd"},
        ]
        for request in requests:
            kind, said = page.answer(page.ask(**request))
            # A URL beside an upload counts for nothing.
            assert kind == ("complete" if request["path"] == real else "error"), (request, said)
            assert "Traceback" not in str(said)
    assert asked == []
    for path in ("/etc/passwd", str(own), __file__):
        assert page.client.get(f"/file={path}").status_code in (403, 404)


def test_too_many_at_once_are_told_to_come_later(page):
    path = page.upload("a.png", hostile_images.good()).json()[0]
    with ThreadPoolExecutor(64) as pool:
        codes = [r.status_code for r in pool.map(lambda _: page.ask(path), range(200))]
    assert set(codes) <= {200, 429, 503}
    assert codes.count(200) >= 32
    while (response := page.ask(path)).status_code != 200:
        time.sleep(0.2)
    assert page.answer(response)[0] == "complete"


def test_requests_that_are_no_requests(page):
    for content in (b"", b"{", b"[]", b'{"data": 3}', b'{"data": []}', b'{"data": [1, 2, 3]}'):
        response = page.client.post(
            "/call/classify", content=content, headers={"content-type": "application/json"}
        )
        assert "Traceback" not in response.text
        if response.status_code == 200:
            assert page.answer(response)[0] == "error"
        else:
            assert 400 <= response.status_code < 500 or response.status_code == 503
    assert page.classify("a.png", hostile_images.good())[0] == "complete"


# --- Within this process -------------------------------------------------------------------------


def test_an_explanation_shows_every_involution(classifiers, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(hostile_images.good())
    explanation = render.Explanation(classifiers, file)
    maps, kernels = explanation.maps(), explanation.kernels((0.2, 0.9))
    assert "cnn has no involutions" in maps
    for name in ("inv_1, 32&times;32", "inv_2, 16&times;16", "inv_3, 8&times;8"):
        assert name in maps
    for name in ("inv_1", "inv_2", "inv_3"):
        assert f"{name}, window 3&times;3, mean of 1 group" in kernels
    assert kernels != explanation.kernels((0.7, 0.1))
    assert "http" not in maps + kernels


def test_names_of_strangers_are_escaped(classifiers, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(hostile_images.good())
    bad = "<script>alert(1)</script>"
    text = render.Explanation({bad: classifiers["inn"]}, file).maps()
    text += render.Explanation({bad: classifiers["cnn"]}, file).maps()
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 2


def test_the_cards_say_what_the_models_were_trained_on():
    text = app.cards(())
    for name in pretrained.names():
        assert f"### {name}\n" in text
    assert "50000 images" in text
    assert "license:" not in text
    assert app.cards(("inn-cifar10",)).count("###") == 1


def test_two_models_of_one_name_are_refused():
    with pytest.raises(InputError, match="Received: inn twice"):
        app.load(("inn-cifar10", "inn-cifar10"))


def test_a_port_that_is_taken_is_refused_in_one_line(page):
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


def test_what_a_browser_asks_for(page):
    path = page.upload("a.png", hostile_images.good()).json()[0]
    image = {"path": path, "meta": {"_type": "gradio.FileData"}}

    def ask(index, *data, **more):
        body = {"data": data, "fn_index": index, "session_hash": "me", **more}
        assert page.client.post("/queue/join", json=body).status_code == 200
        text = page.client.get("/queue/data", params={"session_hash": "me"}).text
        events = [json.loads(line[6:]) for line in text.splitlines() if line]
        (done,) = (e for e in events if e["msg"] == "process_completed")
        return done["success"], done["output"]

    change, click, _, slide, _, classify = range(6)
    place = {"event_data": {"row": 0.25, "column": 0.75}}
    # Before there is an image.
    ok, said = ask(click, None, **place)
    assert not ok
    assert said["error"] == "An image must be given, and a place in it."
    assert ask(slide, None, 0.1, 0.2)[1]["data"] == [""]
    assert ask(classify, None)[1]["data"] == [None]
    ok, output = ask(change, image)
    assert ok
    before = output["data"][-3]
    ok, output = ask(click, None, **place)
    assert ok
    assert output["data"][:2] == [0.25, 0.75]
    assert ask(slide, None, 0.25, 0.75)[1]["data"] == [output["data"][2]] != [before]
    assert not ask(click, None, event_data={"row": 7, "column": "a"})[0]
    assert ask(change, None)[0]
    assert ask(slide, None, 0.1, 0.2)[1]["data"] == [""]


def test_what_the_page_shows_of_an_upload(classifiers, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(hostile_images.good())
    *found, maps, kernels, timing, seen = app.explain(classifiers, str(file))
    assert found == list(app.scores(classifiers, file).values())
    assert all(sum(shares.values()) == pytest.approx(1) for shares in found)
    assert "inv_3" in maps
    assert kernels == app.kernels(seen, 0.5, 0.5)
    assert re.match(r"Scores in \d+ ms, kernels in \d+ ms \(Keras on ", timing)
    row, column, there, tabs = app.clicked(seen, types.SimpleNamespace(row=0.25, column=0.7501))
    assert (row, column) == (0.25, 0.75)
    assert there == app.kernels(seen, 0.25, 0.7501)
    assert tabs.selected == 1
    assert app.explain(classifiers, None) == [None] * len(classifiers) + ["", "", "", None]
    assert app.scores(classifiers, None) is None
    assert app.kernels(None, 0.5, 0.5) == ""
    for seen_, row in ((None, 0.5), (seen, 1.1), (seen, float("nan")), (seen, "0.5")):
        with pytest.raises(gradio.Error, match="An image must be given"):
            app.clicked(seen_, types.SimpleNamespace(row=row, column=0.5))
    file.write_bytes(hostile_images.good()[:200])
    with pytest.raises(gradio.Error, match="An image must be a whole PNG"):
        app.explain(classifiers, str(file))


@pytest.fixture
def built(classifiers):
    """The page, not served. Gradio leaves an event loop open."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        page = app.build(classifiers, "a card")
        yield page
        page.close()
        del page
        gc.collect()


def test_an_upload_is_checked_before_it_is_opened(built, tmp_path):
    (image,) = (block for block in built.blocks.values() if isinstance(block, gradio.Image))
    file = tmp_path / "a.png"
    file.write_bytes(hostile_images.good())
    payload = types.SimpleNamespace(path=str(file))
    assert image.preprocess(payload) == str(file)
    assert image.preprocess(None) is None
    for content, said in (
        (bytes(9 * MEGABYTE), "at most 8,388,608 bytes. Received: 9,437,184"),
        (hostile_images.png(4001, 4000), "16,000,000 pixels. Received: 4001x4000"),
        (b"GIF89a", "a PNG, JPEG or WebP file"),
    ):
        file.write_bytes(content)
        with pytest.raises(gradio.Error, match=said):
            image.preprocess(payload)
    fetching = image.async_move_resource_to_block_cache("http://127.0.0.1:9/a.png")
    with pytest.raises(gradio.Error, match="must be uploaded"):
        fetching.send(None)
