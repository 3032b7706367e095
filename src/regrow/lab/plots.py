"""What all plots share: making and writing a figure, its colours, its grid and its legend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can distinguish; line styles distinguish more lines.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
LINES = ("-", "--", ":", "-.")


def check_matplotlib(hint: str = "use --no-plots") -> None:
    """Refuse early if plots can't be drawn.

    Args:
        hint: what to do without plots, for the error.

    Raises:
        ImportError: if matplotlib is not installed (extra ``plot``).
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"plots need matplotlib: run pip install 'regrow[plot]', or {hint}") from error


def check_ending(option: str, file: Path) -> None:
    """Refuse early the name of a plot that can't be written.

    Args:
        option: name of the option with the file.
        file: file of the plot.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if matplotlib can't write files with that ending.
    """
    check_matplotlib(f"leave out {option}")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.lower().removeprefix(".") not in kinds:
        raise ValueError(f"{option}: {file} is not allowed, it must end in .{', .'.join(kinds)}")


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of a size in inches, to which nothing else keeps a reference.

    Raises:
        ImportError: if matplotlib is not installed (extra ``plot``).
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def line_style(index: int) -> dict[str, Any]:
    """Choose the colour and line style of curve ``index``, from 0."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index // len(COLOURS) % len(LINES)],
    }


def add_grid(*axes: Axes) -> None:
    """Draw a light grid behind what the axes show."""
    for axis in axes:
        axis.grid(color="0.9")
        axis.set_axisbelow(True)


def legend_below(figure: Figure, columns: int, handles: Sequence[Any] | None = None) -> None:
    """Put a legend of one row of columns, or more, under the panels.

    Args:
        figure: the figure.
        columns: most entries in a row.
        handles: entries; default: those of the first panel.
    """
    shown = handles or figure.axes[0].get_legend_handles_labels()[0]
    figure.legend(
        handles=shown,
        loc="outside lower center",
        ncols=min(len(shown), columns) or 1,
        frameon=False,
        fontsize=9,
    )


def save(figure: Figure, file: Path, dpi: int = 130) -> None:
    """Write a figure; its folder is made if it does not exist."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=dpi)
