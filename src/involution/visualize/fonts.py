"""Fonts for characters that Matplotlib's default font lacks, as those of Korean class names."""

import functools

from matplotlib import font_manager
from matplotlib.font_manager import FontEntry, FontProperties
from matplotlib.text import Text

# In place of a character that no installed font has.
PLACEHOLDER = "?"


def use_installed(figure):
    """Adds to each text of a figure the installed fonts that have the characters its font lacks.

    Characters that no installed font has become ``PLACEHOLDER``: Matplotlib would warn, and draw
    the same box for all of them.
    """
    for text in figure.findobj(Text):
        lacking = _lacking(text.get_text(), text.get_fontproperties())
        families = {character: _family(character) for character in lacking}
        found = dict.fromkeys(family for family in families.values() if family)
        if found:
            text.set_family([*text.get_family(), *found])
        unknown = {ord(c): PLACEHOLDER for c, family in families.items() if not family}
        if unknown:
            text.set_text(text.get_text().translate(unknown))


def warning(names) -> str | None:
    """One line about the characters of these names that no installed font has; None without any."""
    lacking = _lacking("".join(names), FontProperties())
    unknown = [character for character in lacking if _family(character) is None]
    if not unknown:
        return None
    examples = "".join(unknown[:10]) + ("..." if len(unknown) > 10 else "")
    return (
        f"Figures have {PLACEHOLDER!r} in place of characters that no installed font has: "
        f"{examples}. Install one that does, such as Noto Sans CJK for Korean, Chinese and Japanese"
    )


def _lacking(text, properties) -> list[str]:
    """The distinct characters of a text that the first font of these properties lacks."""
    font = font_manager.get_font(font_manager.findfont(properties))
    distinct = (c for c in dict.fromkeys(text) if c.isprintable() and not c.isspace())
    return [c for c in distinct if not font.get_char_index(ord(c))]


@functools.cache
def _family(character) -> str | None:
    """The family of an installed font that has a character."""
    for entry in _installed():
        if font_manager.get_font(entry.fname).get_char_index(ord(character)):
            return _register(entry)
    return None


@functools.cache
def _register(entry) -> str:
    """Adds a font to Matplotlib's list: its cached list may be older than the font."""
    font_manager.fontManager.addfont(entry.fname)
    return entry.name


@functools.cache
def _installed() -> list[FontEntry]:
    """The installed fonts; upright ones of regular weight without serifs first."""
    entries = []
    for path in font_manager.findSystemFonts():
        try:
            entry = font_manager.ttfFontProperty(font_manager.get_font(path))
        except (OSError, RuntimeError, NotImplementedError, ValueError):
            continue  # damaged, or of fixed sizes
        # The last resort's glyphs are boxes.
        if "lastresort" not in entry.name.lower().replace(" ", ""):
            entries.append(entry)

    def preference(entry):
        sans_serif = "Sans" in entry.name or "Gothic" in entry.name
        return entry.style != "normal", abs(int(entry.weight) - 400), not sans_serif, entry.name

    return sorted(entries, key=preference)
