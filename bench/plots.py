"""The style of all plots: PNG on white, and SVG that follows the page's light or dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Light and dark. What is drawn has the light colours; a page's style sheet gives the names their dark ones.
COLOURS = {
    "ink": ("#1d2128", "#e6e8ec"),
    "faint": ("#c9ced6", "#3d444f"),
    "sequential": ("#6a7280", "#9aa3b1"),
    "conservative": ("#2463c7", "#6ea8ff"),
    "aggressive": ("#d1480e", "#ff9364"),
    "srds": ("#18803c", "#5fd086"),
    "adaptive": ("#8a3bd6", "#c592ff"),
    "speculative": ("#0b7f8f", "#5cc6d6"),
    "auto": ("#9a6a00", "#e8b84a"),
    "model": ("#8fa3bf", "#55657d"),
    "combine": ("#2462c8", "#6ea9ff"),
    "copy": ("#17803d", "#5fd087"),
    "wait": ("#d1490f", "#ff9365"),
    "python": ("#8a3cd7", "#c593ff"),
}
_STYLE: dict[Any, str] = {
    "text.color": "ink", "axes.labelcolor": "ink", "axes.edgecolor": "ink", "xtick.color": "ink", "ytick.color": "ink",
    "grid.color": "faint",
}  # fmt: skip
_LOOKS: dict[Any, Any] = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.6,
    "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 8.5, "lines.linewidth": 1.8,
    "lines.markersize": 5.5, "svg.fonttype": "none", "svg.hashsalt": "bench", "font.family": "sans-serif",
}  # fmt: skip


def colour(name: str) -> str:
    """The light colour of a sampler or a part of a round; grey for any other."""
    return COLOURS.get(name, COLOURS["sequential"])[0]


@contextmanager
def drawing(width: float, height: float, **grid: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure in inches with its axes, in the project's style."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_LOOKS | {key: colour(name) for key, name in _STYLE.items()}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, figure.subplots(**grid)


def png(figure: Figure, path: Path) -> None:
    """Writes an image on white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def svg(figure: Figure) -> str:
    """An element for a page, whose colours are the page's variables."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_LOOKS):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for name, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{name})")
    return text.replace("<svg", '<svg role="img"', 1)


def style_sheet() -> str:
    """The variables, light and dark."""
    light, dark = (" ".join(f"--{name}: {pair[n]};" for name, pair in COLOURS.items()) for n in (0, 1))
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
