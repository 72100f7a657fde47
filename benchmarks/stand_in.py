"""A stand-in for ImageNet: CIFAR-10 images upscaled to ImageNet's sizes, with sensor noise for
realistic file sizes.

    python benchmarks/stand_in.py CIFAR10_FOLDER FOLDER --train 2000 --test 200

CIFAR10_FOLDER has train/<class>/ and test/<class>/; FOLDER gets train/<class>/*.JPEG and
val/<class>/*.JPEG. With --tar it gets train.tar and val.tar instead.
"""

import argparse
import concurrent.futures
import os
import pathlib
import tarfile
import tempfile

import numpy as np
from PIL import Image

# (width, height): the most frequent sizes of ImageNet, landscape and portrait.
SIZES = ((500, 375), (375, 500), (500, 333), (400, 400))


def enlarge(job):
    source, destination, seed, scale = job
    random = np.random.default_rng(seed)
    size = [round(n * scale) for n in SIZES[seed % len(SIZES)]]
    image = Image.open(source).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    noise = random.normal(0, 6, (*size[::-1], 3))
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype("uint8")
    Image.fromarray(pixels).save(destination, "JPEG", quality=90)


def jobs(source, destination, counts, scale):
    for (split, name), count in counts.items():
        classes = sorted(f for f in (source / split).iterdir() if f.is_dir())
        for number, folder in enumerate(classes):
            (destination / name / folder.name).mkdir(parents=True)
            files = sorted(folder.iterdir())
            for n in range(count // len(classes)):
                path = destination / name / folder.name / f"{folder.name}_{n:06d}.JPEG"
                yield files[n % len(files)], path, number + n * len(classes), scale


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on ImageNet's sizes")
    parser.add_argument("--tar", action="store_true")
    options = parser.parse_args()
    counts = {("train", "train"): options.train, ("test", "val"): options.test}
    with tempfile.TemporaryDirectory(dir=options.folder.parent) as temporary:
        folder = pathlib.Path(temporary) / options.folder.name
        todo = list(jobs(options.source, folder, counts, options.scale))
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(enlarge, todo, chunksize=32):
                pass
        if options.tar:
            for name in ("train", "val"):
                with tarfile.open(folder / f"{name}.tar", "w") as archive:
                    archive.add(folder / name, name)
                (folder / name).rename(pathlib.Path(temporary) / name)
        folder.rename(options.folder)
    print(f"{options.folder}: {len(todo)} images")


if __name__ == "__main__":
    main()
