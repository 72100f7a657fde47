"""The output of ``predict``: text, JSON or CSV."""

import json


def ranked(scores, class_names, top) -> list[dict]:
    """The classes with the highest probabilities, in descending order."""
    best = scores.argsort()[::-1][:top]
    return [{"class": class_names[i], "probability": round(float(scores[i]), 6)} for i in best]


def as_text(file, predictions) -> str:
    """One line for each file."""
    return f"{file}: " + ", ".join(f"{p['class']} {p['probability']:.3f}" for p in predictions)


def as_json(results) -> str:
    """An array of objects: a file and its predictions."""
    found = [{"file": str(file), "predictions": predictions} for file, predictions in results]
    # ASCII, because the encoding of standard output may lack characters of the names.
    return json.dumps(found, indent=2)


def as_csv(results) -> str:
    """One row for each file and class."""
    from involution.utils.atomic_files import csv_text

    rows = (
        {"file": str(file), "rank": rank, **prediction}
        for file, predictions in results
        for rank, prediction in enumerate(predictions, 1)
    )
    return csv_text(("file", "rank", "class", "probability"), rows).rstrip("\n")
