"""Differences of probabilities: an exported classifier with preprocessing in onnxruntime, against
``predict``, on parts of scikit-learn's photographs; and the time of an image.

    python benchmarks/preprocessing.py
"""

import dataclasses
import pathlib
import tempfile
import time

import numpy as np
import onnxruntime
import sklearn.datasets
from PIL import Image

from involution.export import export
from involution.saving import classifier

PARTS = 40  # of each photograph


def differences(model, folder):
    path = export(model, folder / "model.onnx", preprocess=True).path
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rng, file = np.random.default_rng(0), folder / "part.png"
    for name in ("china.jpg", "flower.jpg"):
        photo = sklearn.datasets.load_sample_image(name)
        for _ in range(PARTS):
            height, width = rng.integers(20, 420, 2)
            top = rng.integers(0, photo.shape[0] - height)
            left = rng.integers(0, photo.shape[1] - width)
            pixels = photo[top : top + height, left : left + width]
            Image.fromarray(pixels).save(file)
            (outputs,) = session.run(None, {"input": pixels[None]})
            expected = model.predict_proba(model.read(file))
            yield np.abs(model.probabilities(outputs) - expected).max()


def seconds(session, height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), "uint8")
    times = []
    for _ in range(4):
        start = time.perf_counter()
        session.run(None, {"input": pixels})
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    model = classifier.load("rednet_tiny-cifar10")
    for fraction in (None, 0.875):
        cropping = dataclasses.replace(model, crop_fraction=fraction)
        with tempfile.TemporaryDirectory() as folder:
            found = [*differences(cropping, pathlib.Path(folder))]
            session = onnxruntime.InferenceSession(
                f"{folder}/model.onnx", providers=["CPUExecutionProvider"]
            )
        print(
            f"crop {fraction}: {len(found)} images, maximum difference {max(found):.1e}; "
            f"640x480 pixels {seconds(session, 480, 640):.3f} s, "
            f"4000x3000 pixels {seconds(session, 3000, 4000):.2f} s"
        )


if __name__ == "__main__":
    main()
