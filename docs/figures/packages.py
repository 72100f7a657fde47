"""Draws the packages and their imports, as read from the source.

    python docs/figures/packages.py

writes docs/figures/packages.svg. Each package is in the row above the highest package it imports.
Arrows implied by others are omitted.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "involution"
FILE = pathlib.Path(__file__).with_name("packages.svg")
# Modules that are not drawn, because they import no package.
OMITTED = ("backend", "renamed", "")

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 132, 30, 22, 42, 12
INK, FILL = "#555", "#e8f1f8"
# Replaces colors in pages with a dark color scheme; the attributes are those for all other readers.
DARK = (
    "@media(prefers-color-scheme:dark){"
    '[fill="#fff"]{fill:#131416}[fill="#e8f1f8"]{fill:#22303c}text{fill:#cfd0d0}'
    '[stroke="#555"]{stroke:#9a9ca0}marker path{fill:#9a9ca0}}'
)


def package_of(module: str) -> str:
    """Package or top-level module of a dotted name within ``involution``."""
    return module.split(".")[0]


def modules() -> dict[str, pathlib.Path]:
    """Dotted names within ``involution``, with their files."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(file: pathlib.Path):
    """Names within ``involution`` that a file imports, at any depth of its code."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "involution":
            inner = node.module.removeprefix("involution").removeprefix(".")
            yield from ([inner] if inner else (alias.name for alias in node.names))


def imports() -> dict[str, set[str]]:
    """For each package, the packages it imports; ``involution_cli`` is one of them."""
    packages = {package_of(name) for name in modules()}
    files = [(package_of(name), file) for name, file in modules().items()]
    command = SOURCE / "involution_cli"
    files += [("involution_cli", file) for file in command.rglob("*.py")]
    graph: dict[str, set[str]] = {name: set() for name, _ in files if name not in OMITTED}
    for name, file in files:
        if name in graph:
            others = {package_of(other) for other in imported(file)} & packages
            graph[name] |= {other for other in others - {name} if other not in OMITTED}
    return graph


def ranks(graph) -> dict[str, int]:
    """The row of each package, 0 at the bottom: one above the highest that it imports."""
    found: dict[str, int] = {}

    def rank(name, importers=()):
        if name in importers:
            raise ValueError(
                f"Package imports must have no cycle. Received: {' -> '.join((*importers, name))}"
            )
        if name not in found:
            found[name] = 1 + max(
                (rank(other, (*importers, name)) for other in graph[name]), default=-1
            )
        return found[name]

    for name in graph:
        rank(name)
    return found


def transitive_reduction(graph) -> dict[str, set[str]]:
    """The graph without arrows implied by others."""

    def reach(name):
        return graph[name].union(*map(reach, graph[name]))

    return {
        name: others - set().union(*(reach(other) for other in others))
        for name, others in graph.items()
    }


def draw(graph) -> str:
    rows = ranks(graph)
    levels = [sorted(n for n in rows if rows[n] == i) for i in range(max(rows.values()) + 1)]
    arrows = transitive_reduction(graph)
    order = {name: float(i) for level in levels for i, name in enumerate(level)}
    # Barycenter heuristic: packages move towards those they import or are imported by.
    for _ in range(8):
        for level in levels:
            for name in level:
                near = [*arrows[name], *(n for n in arrows if name in arrows[n])]
                if near:
                    order[name] = sum(order[n] for n in near) / len(near)
            level.sort(key=lambda n: (order[n], n))
            middle = (len(level) - 1) / 2
            order |= {name: i - middle for i, name in enumerate(level)}
    columns = max(map(len, levels))
    width = columns * (WIDTH + GAP_X) - GAP_X + 2 * MARGIN
    height = len(levels) * (HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
    x = {n: width / 2 + order[n] * (WIDTH + GAP_X) for level in levels for n in level}
    y = {n: MARGIN + (len(levels) - 1 - rows[n]) * (HEIGHT + GAP_Y) for n in rows}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="13">',
        "<title>Packages of involution: each imports only those below it</title>",
        f"<style>{DARK}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>',
    ]
    for name in sorted(arrows):
        for other in sorted(arrows[name]):
            top = y[name] + HEIGHT
            bend = (y[other] - top) / 2
            parts.append(
                f'<path d="M{x[name]:.0f} {top}C{x[name]:.0f} {top + bend:.0f} {x[other]:.0f} '
                f'{y[other] - bend:.0f} {x[other]:.0f} {y[other]}" fill="none" stroke="{INK}" '
                'marker-end="url(#head)"/>'
            )
    for name in sorted(x):
        parts.append(
            f'<rect x="{x[name] - WIDTH / 2:.0f}" y="{y[name]}" width="{WIDTH}" '
            f'height="{HEIGHT}" rx="4" fill="{FILL}" stroke="{INK}"/>'
            f'<text x="{x[name]:.0f}" y="{y[name] + 20}" text-anchor="middle">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    FILE.write_text(draw(imports()), encoding="utf-8")
