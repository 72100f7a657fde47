"""Puts a trained model into the package, with a card of the run's own figures; and measures all
that are there.

    python benchmarks/ship.py RUN/FOLDER LABEL NAME
    python benchmarks/ship.py --check DATASET

RUN/FOLDER is what ``involution compare`` wrote, LABEL the model in it, NAME its name from now on.
"""

import json
import pathlib
import sys

import keras
import numpy as np

from involution import data, files, model_labels, saved_model
from involution.models import shipped, weights

CARD = """# {name}

{model}, {parameters:,} trainable parameters, for images of {width}x{height} pixels in {count}
classes: {classes}.

| trained on | {dataset}: {train} images; measured on its {test} test images |
|---|---|
| test accuracy after the last epoch | {accuracy:.4f} |
| test loss | {loss:.4f} |
| recipe | {recipe} |
| command | `{command}` |
| versions | {versions} |

Pixels go in as float32 from 0 to 1, logits come out. It knows the classes above and no others, in
pictures like those of CIFAR-10: tiny photographs of one thing each. The license is the package's.
"""


def ship(run, label, name):
    run = pathlib.Path(run)
    config, metrics = (json.loads((run / f"{f}.json").read_text()) for f in ("config", "metrics"))
    classifier = saved_model.load(run / model_labels.file_name(label))
    height, width, _ = classifier.image_shape
    figures = metrics["models"][label]
    function, arguments = model_labels.function_and_options(label)
    arguments |= {"input_shape": classifier.image_shape, "classes": len(classifier.class_names)}
    folder = shipped.FOLDERS / name
    extra = classifier.about | {
        "test_accuracy": figures["test_accuracy"],
        "logits_of_a_ramp": classifier.model.predict(ramp(classifier), verbose=0)[0].tolist(),
    }
    weights.save(folder, function, arguments, classifier.model, extra)
    card = CARD.format(
        name=name,
        model=label,
        parameters=figures["trainable_params"],
        width=width,
        height=height,
        count=len(classifier.class_names),
        classes=", ".join(classifier.class_names),
        dataset=metrics["dataset"],
        train=config["images"]["train"],
        test=config["images"]["test"],
        accuracy=figures["test_accuracy"],
        loss=figures["test_loss"],
        recipe=f"{config['recipe']}, {config['epochs']} epochs, "
        + ", ".join(f"{k} {v}" for k, v in config["training"].items()),
        command=config["command"],
        versions=", ".join(f"{k} {v}" for k, v in config["versions"].items()),
    )
    files.write_text(folder / "README.md", card)
    print(f"{folder}: {sum(f.stat().st_size for f in folder.iterdir()):,} bytes")


def ramp(classifier):
    """An image that is easily made again."""
    count = int(np.prod(classifier.image_shape))
    return np.linspace(0, 1, count, dtype="float32").reshape(1, *classifier.image_shape)


def check(dataset):
    images = data.load(dataset)
    for name in shipped.names():
        classifier = saved_model.load(name)
        scores = classifier.scores(data.scale(images.x_test))
        accuracy = float((scores.argmax(-1) == images.y_test).mean())
        card = weights.read_config(shipped.folder(name))["extra"]["test_accuracy"]
        print(f"{keras.config.backend()}, {name}: accuracy {accuracy:.4f}, by its card {card:.4f}")


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        check(sys.argv[2])
    else:
        ship(*sys.argv[1:4])
