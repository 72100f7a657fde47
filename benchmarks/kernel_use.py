"""Use of the kernels of trained models: accuracy with kernels replaced by averages.

    python benchmarks/kernel_use.py cifar10-jpeg MODEL... [--images 2000] [--output STEM]

Models are files written by ``involution train``, or names of pretrained ones. Evaluates on test
images of the data set, as many of each class, and prints a table for each model; writes
STEM-MODEL.png.
"""

import argparse
import pathlib

from involution.data import datasets, transforms
from involution.saving import classifier
from involution.utils.atomic_files import atomic_write
from involution.utils.progress import RichProgress
from involution.visualize import figures, html, kernel_use, stratified_sample


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--images", type=int, default=2000, help="number of test images")
    parser.add_argument("--output", help="prefix of the figures")
    arguments = parser.parse_args()
    dataset = datasets.load(arguments.dataset)
    chosen = stratified_sample(dataset.y_test, arguments.images, seed=0)
    images, labels = transforms.to_unit_float(dataset.x_test[chosen]), dataset.y_test[chosen]
    for path in arguments.models:
        loaded = classifier.load(path)
        use = kernel_use(loaded.model, images, labels, batch_size=100, progress=RichProgress())
        print(f"\n{path}: accuracy {use.score:.4f}")
        print(*use.table(), sep="\n", flush=True)
        if arguments.output:
            name = pathlib.Path(path).stem
            with atomic_write(pathlib.Path(f"{arguments.output}-{name}.png")) as temporary:
                temporary.write_bytes(html.png(figures.use_chart(use)))


if __name__ == "__main__":
    main()
