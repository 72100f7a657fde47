"""Predictions of a classifier for labeled images: confusion matrix, accuracy by class, mistakes."""

import dataclasses
import math

import numpy as np

from involution.data import transforms
from involution.utils.progress import NullProgress

# Memory of the images that are decoded and predicted at a time, as float32.
CHUNK_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Predictions for N images of C classes.

    Attributes:
        labels: True classes, int64 (N,).
        predicted: Most probable classes, int64 (N,).
        confidence: Their probabilities, float64 (N,).
        classes: C.
    """

    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    classes: int

    @property
    def accuracy(self) -> float:
        return float((self.labels == self.predicted).mean())

    @property
    def confusion(self) -> np.ndarray:
        """Numbers of images by true (row) and predicted (column) class, int64 (C, C)."""
        from sklearn.metrics import confusion_matrix

        return confusion_matrix(self.labels, self.predicted, labels=np.arange(self.classes))

    @property
    def class_accuracy(self) -> np.ndarray:
        """Fraction of the images of each class that are classified correctly, float64 (C,); NaN for
        a class without images."""
        confusion = self.confusion
        totals = confusion.sum(axis=1)
        correct = confusion.diagonal()
        return np.divide(correct, totals, out=np.full(self.classes, np.nan), where=totals > 0)

    def confident_mistakes(self, count) -> np.ndarray:
        """Indices of the wrongly classified images with the largest probabilities, descending."""
        (wrong,) = np.nonzero(self.labels != self.predicted)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")][:count]

    def frequent_confusions(self, count) -> list[tuple[int, int, int]]:
        """The most frequent confusions, descending: true class, predicted class, images."""
        confusion = self.confusion
        np.fill_diagonal(confusion, 0)
        order = np.argsort(-confusion, axis=None, kind="stable")[:count]
        true, predicted = np.unravel_index(order, confusion.shape)
        images = confusion[true, predicted]
        found = zip(true.tolist(), predicted.tolist(), images.tolist(), strict=True)
        return [confused for confused in found if confused[2]]


def evaluate(classifier, images, labels, progress=None, title="predicting") -> Evaluation | None:
    """Classifies images in chunks of ``CHUNK_BYTES``; decoded images are not kept.

    Args:
        classifier: A ``Classifier``.
        images: uint8 (N, height, width, 3), in memory or decoded on access.
        labels: True classes (N,).
        progress: Receives progress; None: none is reported.
        title: The title of the progress.

    Returns:
        The predictions; None if an output of the model is not finite, as after divergence.
    """
    size = max(1, CHUNK_BYTES // (4 * math.prod(images.shape[1:])))
    starts = range(0, len(images), size)
    if progress is None or len(starts) == 1:  # a single chunk takes seconds
        progress = NullProgress()
    predicted, confidence = [], []
    progress.begin(title, len(starts))
    try:
        for start in starts:
            pixels = transforms.to_unit_float(images[start : start + size])
            with np.errstate(invalid="ignore"):
                scores = classifier.predict_proba(pixels)
            if not np.isfinite(scores).all():
                return None
            predicted.append(scores.argmax(axis=-1))
            confidence.append(scores.max(axis=-1))
            progress.advance()
    finally:
        progress.end()
    return Evaluation(
        np.asarray(labels),
        np.concatenate(predicted),
        np.concatenate(confidence),
        len(classifier.class_names),
    )
