"""How pages and figures look: every colour and font, and the templates with these filled in."""

import re
from importlib.resources import files
from typing import Any

# Okabe–Ito: told apart with every common colour blindness.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
INK, MUTED, FAINT, GRID, PAPER = "#1a1a1a", "#6b6b6b", "#d9d9d9", "#e5e5e5", "#ffffff"

SERIES = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (SKY, "P"))
"""A colour and a marker for each series of a figure: told apart in print, too."""
TERMS = (SKY, PURPLE, VERMILION, GREEN, BLUE, ORANGE)
"""The colours of the terms of a sum, in their order."""

FONT = "DejaVu Sans"
"""The font of figures: it comes with matplotlib, so every machine draws the same."""
STYLE: dict[str, Any] = {
    "font.family": FONT,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
}
"""matplotlib's settings for every figure."""

_NAMES = ("ink", "quiet", "page", "card", "line", "edge", "accent", "good", "bad")
_LIGHT = ("#1c1d1f", "#5c6066", "#fdfdfc", "#f2f3f1", "#d8dad6", "#8a8e94", "#0072b2", "#00694d", "#b03a00")
_DARK = ("#e6e6e3", "#a2a6ab", "#17181a", "#222427", "#3a3d41", "#7d8288", "#6cc1f5", "#4fd0a4", "#ff9a5c")
_PRINT = ("#000", "#444", "#fff", "#f4f4f4", "#bbb", "#777", "#00507d", "#00523c", "#8a2d00")
_FONTS = 'system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "DejaVu Sans", sans-serif'


_SCRIPT = {
    "INK": INK,
    "PAPER": PAPER,
    "ORANGE": ORANGE,
    "BLUE": BLUE,
    "GREEN": GREEN,
    "SKY": SKY,
    "PURPLE": PURPLE,
}


def template(name: str) -> str:
    """The text of a file in `templates`: `/* include FILE */`, `/* theme */`, `/* palette */` filled in."""

    def read(name: str) -> str:
        return files("alignpro.report").joinpath("templates", name).read_text(encoding="utf-8")

    text = re.sub(r"/\* include (\S+) \*/", lambda found: read(found[1]), read(name))
    light, dark, paper = (
        " ".join(f"--{name}: {colour};" for name, colour in zip(_NAMES, colours, strict=True))
        for colours in (_LIGHT, _DARK, _PRINT)
    )
    css = (
        f":root {{ {light} --paper: {PAPER}; --font: {_FONTS}; }}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f"@media print {{ :root {{ {paper} }} }}\n"
        f".light {{ {light} }}"  # whatever the screen: for figures that are saved
    )
    palette = "const " + ", ".join(f'{name} = "{colour}"' for name, colour in _SCRIPT.items()) + ";"
    return text.replace("/* theme */", css).replace("/* palette */", palette)
