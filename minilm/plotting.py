"""One style for every figure: readable on white, on black, on a phone, by a screen reader."""

import base64
import io
from typing import TYPE_CHECKING

from minilm.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLORS", "INK", "show", "use_style"]

# Okabe & Ito 2008, the colour-blind-safe set, without black and yellow (each is lost on one page).
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
INK = "#7f7f7f"  # contrast 4.0 on white and 4.2 on the dark page
DPI = 200


def use_style() -> None:
    """Set matplotlib up for the book's figures. Call it once, in a notebook's set-up cell."""
    import matplotlib as mpl
    from cycler import cycler

    mpl.rcParams.update(
        {
            "axes.edgecolor": INK,
            "axes.grid": True,
            "axes.labelcolor": INK,
            "axes.labelsize": 11,
            "axes.prop_cycle": cycler(color=COLORS),
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlecolor": INK,
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "figure.autolayout": False,
            "figure.constrained_layout.use": True,
            "figure.figsize": (6.4, 3.6),
            "font.size": 11,
            "grid.alpha": 0.3,
            "grid.color": INK,
            "legend.fontsize": 10,
            "legend.frameon": False,
            "legend.labelcolor": INK,
            "lines.linewidth": 2,
            "savefig.transparent": True,
            "text.color": INK,
            "xtick.color": INK,
            "xtick.labelsize": 10,
            "ytick.color": INK,
            "ytick.labelsize": 10,
        }
    )


def show(figure: "Figure", alt: str) -> None:
    """Display a figure with its alternative text, then close it.

    The picture is a transparent PNG. The text goes with it as the output's metadata and as its
    plain-text form, so that it is there in every front end.

    Args:
        figure: A matplotlib figure.
        alt: One sentence that says what the figure shows.

    Raises:
        ConfigError: If `alt` says nothing.
    """
    import matplotlib.pyplot as plt
    from IPython.display import display

    alt = " ".join(alt.split())
    if len(alt) < 20:
        raise ConfigError(f"alt={alt!r} is too short; say in a sentence what the figure shows")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    plt.close(figure)
    width = round(figure.get_size_inches()[0] * DPI / 2)  # twice the pixels that are shown
    display(
        {
            "image/png": base64.b64encode(buffer.getvalue()).decode(),
            "text/plain": f"Figure: {alt}",
        },
        metadata={"image/png": {"alt": alt, "width": width}},
        raw=True,
    )
