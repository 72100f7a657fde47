"""Example images of the web demo: drawings, so that the package has no photographs of others."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 128


def draw(name) -> Image.Image:
    """The example with a name of ``EXAMPLES``: RGB, 128x128 pixels."""
    top, bottom = BACKGROUNDS[name]
    height = np.linspace(0, 1, SIDE)[:, None, None]
    colors = (1 - height) * np.array(top) + height * np.array(bottom)
    picture = Image.fromarray(np.broadcast_to(colors, (SIDE, SIDE, 3)).round().astype("uint8"))
    EXAMPLES[name](ImageDraw.Draw(picture))
    # Without the hard edges that photographs do not have.
    return picture.filter(ImageFilter.GaussianBlur(1.5))


def _airplane(pen):
    pen.polygon([(58, 62), (30, 100), (42, 100), (80, 66)], fill=(150, 155, 165))
    pen.polygon([(62, 58), (52, 30), (60, 30), (84, 58)], fill=(175, 180, 190))
    pen.ellipse([(12, 54), (118, 72)], fill=(225, 228, 235))
    pen.polygon([(18, 62), (8, 36), (18, 36), (34, 58)], fill=(190, 60, 60))
    for x in range(40, 104, 8):
        pen.ellipse([(x, 59), (x + 3, 62)], fill=(60, 70, 90))


def _ship(pen):
    pen.rectangle([(0, 84), (SIDE, SIDE)], fill=(38, 84, 120))
    pen.polygon([(10, 74), (118, 74), (104, 96), (24, 96)], fill=(150, 40, 40))
    pen.rectangle([(30, 58), (92, 74)], fill=(235, 235, 235))
    pen.rectangle([(40, 46), (70, 58)], fill=(220, 220, 220))
    pen.rectangle([(74, 36), (84, 58)], fill=(200, 90, 40))
    for y in range(98, SIDE, 7):
        pen.line([(0, y), (SIDE, y)], fill=(58, 106, 142))


def _truck(pen):
    pen.rectangle([(0, 96), (SIDE, SIDE)], fill=(92, 92, 96))
    pen.rectangle([(8, 34), (82, 92)], fill=(236, 236, 230))
    pen.polygon([(84, 52), (108, 52), (120, 70), (120, 92), (84, 92)], fill=(190, 40, 40))
    pen.polygon([(92, 56), (106, 56), (114, 69), (92, 69)], fill=(150, 190, 210))
    for x in (24, 46, 100):
        pen.ellipse([(x - 11, 84), (x + 11, 106)], fill=(25, 25, 25))
        pen.ellipse([(x - 4, 91), (x + 4, 99)], fill=(150, 150, 150))


# By class of CIFAR-10. The backgrounds run from a color at the top to one at the bottom.
EXAMPLES = {"airplane": _airplane, "ship": _ship, "truck": _truck}
BACKGROUNDS = {
    "airplane": ((96, 150, 210), (200, 220, 240)),
    "ship": ((150, 190, 225), (225, 232, 238)),
    "truck": ((165, 195, 225), (150, 160, 140)),
}
