import keras
import numpy as np
import pytest

from involution.saving.classifier import Classifier
from involution.training import evaluation
from involution.training.evaluation import Evaluation, evaluate

pytestmark = pytest.mark.any_backend

LABELS = np.array([0, 0, 1, 1, 1, 2])
FOUND = Evaluation(
    labels=LABELS,
    predicted=np.array([0, 1, 1, 0, 0, 2]),
    confidence=np.array([0.9, 0.6, 0.5, 0.8, 0.7, 1.0]),
    classes=4,
)


def test_confusion_matrix_and_class_accuracy():
    expected = np.zeros((4, 4), int)
    for label, predicted in zip(FOUND.labels, FOUND.predicted, strict=True):
        expected[label, predicted] += 1
    np.testing.assert_array_equal(FOUND.confusion, expected)
    # No image is of the last class.
    np.testing.assert_allclose(FOUND.class_accuracy, [1 / 2, 1 / 3, 1, np.nan])
    assert FOUND.accuracy == 3 / 6


def test_mistakes_and_confusions():
    np.testing.assert_array_equal(FOUND.confident_mistakes(10), [3, 4, 1])
    np.testing.assert_array_equal(FOUND.confident_mistakes(1), [3])
    assert FOUND.frequent_confusions(10) == [(1, 0, 2), (0, 1, 1)]
    assert FOUND.frequent_confusions(1) == [(1, 0, 2)]


def mean_classifier():
    """Logits (mean, 1 - mean) of the pixels: the second class for dark images."""
    inputs = keras.Input((4, 4, 3))
    mean = keras.layers.GlobalAveragePooling2D()(inputs)
    outputs = keras.layers.Dense(2)(mean)
    model = keras.Model(inputs, outputs)
    model.layers[-1].set_weights([np.array([[10.0, -10]] * 3) / 3, np.array([0.0, 10])])
    return Classifier(model, ("bright", "dark"), (4, 4, 3))


class Recording:
    """Images that record which of them are accessed together."""

    def __init__(self, images):
        self.images, self.shape, self.sizes = images, images.shape, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.sizes.append(len(self.images[index]))
        return self.images[index]


def test_images_are_predicted_in_chunks(monkeypatch):
    values = np.array([0, 250, 10, 240, 20], "uint8")
    images = Recording(np.broadcast_to(values[:, None, None, None], (5, 4, 4, 3)))
    # Two images of 4 x 4 x 3 floats.
    monkeypatch.setattr(evaluation, "CHUNK_BYTES", 2 * 4 * 48 + 1)
    classifier = mean_classifier()
    found = evaluate(classifier, images, np.array([1, 0, 0, 0, 1]))
    assert images.sizes == [2, 2, 1]
    np.testing.assert_array_equal(found.predicted, [1, 0, 1, 0, 1])
    pixels = np.asarray(images.images, "float32") / 255
    expected = classifier.predict_proba(pixels).max(axis=-1)
    np.testing.assert_allclose(found.confidence, expected, rtol=1e-6)
    assert found.accuracy == 4 / 5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_have_no_evaluation(value):
    classifier = mean_classifier()
    classifier.model.layers[-1].set_weights([np.zeros((3, 2)), np.array([0, value])])
    assert evaluate(classifier, np.zeros((2, 4, 4, 3), "uint8"), np.array([0, 1])) is None
