"""The web demo under load; prints its measurements. `make test-long` runs it."""

import collections
import itertools
import threading
import time

import numpy as np
import pytest

from involution.demo import app
from tests.support import hostile_images
from tests.support.demo_client import demo

pytestmark = pytest.mark.slow
CLIENTS, SECONDS, REQUESTS = 16, 60, 2000


def test_concurrent_scores_are_correct_and_memory_does_not_grow(tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(8)]
    for number, file in enumerate(files):
        file.write_bytes(hostile_images.valid(size=(100 + number, 80), seed=number))
    expected = {
        file: {name: c.scores(c.read(file))[0] for name, c in app.load(()).items()}
        for file in files
    }
    counts: collections.Counter = collections.Counter()

    def classify(page, file):
        upload = page.upload(file.name, file.read_bytes())
        counts[upload.status_code] += 1
        if upload.status_code != 200:
            return
        response = page.request(upload.json()[0])
        counts[response.status_code] += 1
        if response.status_code != 200:
            return
        kind, scores = page.result(response)
        assert kind == "complete", scores
        for name, values in expected[file].items():
            np.testing.assert_allclose(list(scores[name].values()), values, rtol=1e-5)
        counts["completed"] += 1

    with demo(tmp_path / "log.txt") as page:
        classify(page, files[0])
        end = time.monotonic() + SECONDS
        failures = []

        def client(number):
            try:
                for file in itertools.cycle(files[number % 8 :] + files[: number % 8]):
                    if time.monotonic() > end:
                        return
                    classify(page, file)
            except Exception as error:  # noqa: BLE001 - asserted below
                failures.append(error)

        threads = [threading.Thread(target=client, args=(n,)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        print(f"{CLIENTS} clients, {SECONDS} s: {dict(counts)}")
        status_counts = {code: count for code, count in counts.items() if isinstance(code, int)}
        assert set(status_counts) <= {200, 429, 503}
        assert counts[200] >= sum(status_counts.values()) / 2
        classify(page, files[0])
        before = page.memory
        for number in range(REQUESTS):
            classify(page, files[number % 8])
        growth = page.memory / before - 1
        print(f"{REQUESTS} requests: memory {before / 2**20:.0f} MB, {growth:+.1%}")
        assert growth <= 0.05
    assert "Traceback" not in (tmp_path / "log.txt").read_text()
