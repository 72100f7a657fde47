"""Heat maps of the pretrained inn and rednet_tiny, as in the keras.io example.

    python docs/figures/maps.py DATA

DATA is the folder of CIFAR-10 as JPEG files; writes docs/figures/heatmaps.png.
"""

import io
import pathlib
import sys

from PIL import Image

from involution import data, models, visualize


def main(folder):
    images = data.load(folder)
    chosen = visualize.stratified_sample(images.y_test, 5, seed=42)
    pixels = images.x_test[chosen]
    maps = {}
    for name in ("inn", "rednet_tiny"):
        found = visualize.kernel_maps(models.load(f"{name}-cifar10"), data.to_unit_float(pixels))
        for layer, values in found.items():
            maps[f"{name}: {layer.removesuffix('_2_involution')}"] = values
    titles = [images.class_names[label] for label in images.y_test[chosen]]
    drawn = io.BytesIO()
    visualize.heat_maps(pixels, maps, titles).savefig(drawn, format="png", dpi=90)
    with Image.open(drawn) as shot:
        small = shot.convert("RGB").quantize(256)
    small.save(pathlib.Path(__file__).with_name("heatmaps.png"), optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
