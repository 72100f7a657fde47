"""Draws the figures of mathematics.md: convolution, involution, self-attention.

    python docs/figures/draw.py

writes docs/figures/NAME.LANGUAGE.svg. Color palettes: Okabe-Ito, and PuOr for weights.
"""

import pathlib

CELL = 26
A, B, INK = "#0072B2", "#D55E00", "#555"
# Replaces colors in pages with a dark color scheme; the attributes are those for all other readers.
DARK = (
    "@media(prefers-color-scheme:dark){"
    '[fill="#fff"]{fill:#131416}[fill="#222"]{fill:#cfd0d0}[stroke="#555"]{stroke:#9a9ca0}'
    '[fill="#0072B2"]{fill:#56b4e9}[stroke="#0072B2"]{stroke:#56b4e9}}'
)
WEIGHTS = ("#e66101", "#fdb863", "#f7f7f7", "#b2abd2", "#5e3c99")
# Indices into WEIGHTS of the nine weights of a kernel.
ONE = (4, 2, 0, 3, 4, 1, 2, 3, 0)
OTHER = (0, 3, 1, 4, 2, 3, 1, 0, 4)
THIRD = (2, 0, 4, 1, 3, 0, 4, 2, 1)
ATTENTION = (2, 3, 2, 3, 4, 3, 2, 3, 2)

TEXTS = {
    "en": {
        "convolution": (
            "one kernel for all positions",
            "another for each channel",
            "Convolution",
        ),
        "involution": (
            "a kernel for each position,",
            "generated from the features there",
            "Involution",
        ),
        "attention": (
            "a kernel for each position: similarity",
            "of the center's query and each key",
            "Self-attention within a window",
        ),
        "channels": "channels",
        "all": "the same for all channels of a group",
    },
    "ko": {
        "convolution": ("모든 위치에서 같은 커널", "채널마다 다른 커널", "합성곱"),
        "involution": ("위치마다 다른 커널을", "그 위치의 특징에서 생성", "인볼루션"),
        "attention": (
            "위치마다 다른 커널:",
            "중심의 쿼리와 각 키의 유사도",
            "윈도우 안의 셀프 어텐션",
        ),
        "channels": "채널",
        "all": "한 그룹의 모든 채널에 같은 커널",
    },
}


def grid(x, y, rows, columns, fill=lambda row, column: "#fff"):
    return "".join(
        f'<rect x="{x + CELL * c}" y="{y + CELL * r}" width="{CELL}" height="{CELL}" '
        f'fill="{fill(r, c)}" stroke="{INK}" stroke-width="1"/>'
        for r in range(rows)
        for c in range(columns)
    )


def kernel(x, y, pattern, color):
    weights = grid(x, y, 3, 3, lambda r, c: WEIGHTS[pattern[3 * r + c]])
    side = 3 * CELL
    return weights + outline(x, y, side, color)


def outline(x, y, side, color):
    return (
        f'<rect x="{x}" y="{y}" width="{side}" height="{side}" fill="none" stroke="{color}" '
        'stroke-width="4"/>'
    )


def text(x, y, words, anchor="start", size=15):
    style = f'text-anchor="{anchor}" font-size="{size}" fill="#222"'
    return f'<text x="{x}" y="{y}" {style}>{words}</text>'


def arrow(x1, y1, x2, y2, color):
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{color}" stroke-width="2.5" '
        f'marker-end="url(#{color[1:]})"/>'
    )


def image(x, y):
    """Three channels of a feature map, and two windows."""
    back = "".join(grid(x + 10 * i, y - 10 * i, 7, 7) for i in (2, 1))
    front = grid(x, y, 7, 7, lambda r, c: "#fff")
    one, other = (x + CELL, y), (x + 3 * CELL, y + 4 * CELL)
    centers = "".join(
        f'<rect x="{px + CELL}" y="{py + CELL}" width="{CELL}" height="{CELL}" fill="{color}" '
        'opacity="0.55"/>'
        for (px, py), color in ((one, A), (other, B))
    )
    return back + front + centers + outline(*one, 3 * CELL, A) + outline(*other, 3 * CELL, B)


def figure(name, language):
    first, second, title = TEXTS[language][name]
    parts = [text(20, 30, title, size=20), image(30, 100)]
    right = 360
    if name == "convolution":
        for i, pattern in ((2, THIRD), (1, OTHER), (0, ONE)):
            parts.append(kernel(right + 26 * i, 150 - 26 * i, pattern, INK))
        parts += [
            arrow(30 + 4 * CELL, 100 + 1.5 * CELL, right - 8, 175, A),
            arrow(30 + 6 * CELL, 100 + 5.5 * CELL, right - 8, 205, B),
            text(right + 140, 150, TEXTS[language]["channels"], size=13),
        ]
    else:
        patterns = (ATTENTION, OTHER) if name == "attention" else (ONE, OTHER)
        if name == "attention":
            patterns = (ATTENTION, (3, 2, 2, 4, 4, 2, 3, 2, 2))
        for (y, color), pattern in zip(((80, A), (200, B)), patterns, strict=True):
            parts.append(kernel(right, y, pattern, color))
        parts += [
            arrow(30 + 2.9 * CELL, 100 + 1.5 * CELL, right - 8, 118, A),
            arrow(30 + 4.9 * CELL, 100 + 5.5 * CELL, right - 8, 240, B),
            text(right, 312, TEXTS[language]["all"], size=13),
        ]
    parts += [text(30, 345, first), text(30, 367, second)]
    ends = "".join(
        f'<marker id="{color[1:]}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" '
        f'markerHeight="6" orient="auto"><path d="M0,0L8,4L0,8z" fill="{color}"/></marker>'
        for color in (A, B)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 385" role="img" '
        f'font-family="system-ui, sans-serif"><title>{title}: {first} {second}</title>'
        f"<style>{DARK}</style><defs>{ends}</defs>"
        f'<rect width="640" height="385" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    for language in TEXTS:
        for name in ("convolution", "involution", "attention"):
            path = pathlib.Path(__file__).with_name(f"{name}.{language}.svg")
            path.write_text(figure(name, language), encoding="utf-8")
