"""Pictures drawn by matplotlib, without a display and without its global state.

It is imported only here, and only when it is needed: nothing else of the package uses it.
"""

from pathlib import Path
from typing import Any

from omnistream_jax.utils.files import written_aside

_DOTS_PER_INCH = 100


def check_plotting() -> None:
    """Raises ValueError, saying how to install it, where matplotlib is missing."""
    new_figure((1, 1))


def new_figure(inches: tuple[float, float]) -> Any:
    """An empty matplotlib figure of a width and height. Raises ValueError as `check_plotting`."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        hint = "pip install -e '.[eval]', or give --config.plots=False"
        raise ValueError(f"plots: matplotlib is missing; {hint}") from error
    figure = Figure(figsize=inches, dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as a PNG, aside, then renamed; the folder exists."""
    with written_aside(path) as aside:
        figure.savefig(aside, format="png")
