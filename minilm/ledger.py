"""The book's one table: what each model needs to predict the test plays, and what it costs.

A chapter calls `record`; the row is shown, and travels whole in the output's metadata.
`python tools/ledger.py --write` collects the rows of all chapters into `minilm/assets/ledger.json`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from itertools import cycle
from typing import TYPE_CHECKING, Any

from minilm.errors import ConfigError
from minilm.plotting import COLORS, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["METADATA_KEY", "Row", "figure", "record", "rows", "table"]

METADATA_KEY = "minilm_ledger"
MARK = "*"  # after the name of a model that may have read the test plays


@dataclass(frozen=True)
class Row:
    """One model in the ledger. None: the quantity does not apply.

    Attributes:
        model: Its name in the table.
        chapter: The chapter that makes it.
        bits_per_byte: On the three test plays.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        parameters: Numbers that training sets; for a count table, the counts it stores.
        bytes_on_disk: Of the saved model.
        train_flops: Floating-point operations of training.
        train_seconds: Wall-clock seconds of training on 2 cores.
        watts: Assumed draw of these 2 cores, from which the energy is estimated.
        tokens_per_second: Of generating one text.
        note: A remark.
        saw_test: Whether the model may have read the test plays, as one trained on the web has: its
            figure then stands apart from the others.
    """

    model: str
    chapter: int
    bits_per_byte: float | int
    low: float | int | None = None
    high: float | int | None = None
    parameters: int | None = None
    bytes_on_disk: int | None = None
    train_flops: float | int | None = None
    train_seconds: float | int | None = None
    watts: float | int = 20.0
    tokens_per_second: float | int | None = None
    note: str = ""
    saw_test: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.bits_per_byte <= 8:
            raise ConfigError(
                f"bits_per_byte={self.bits_per_byte} for {self.model!r}; "
                "a byte costs more than 0 bits and a uniform guess costs 8"
            )
        if (self.low is None) != (self.high is None):
            raise ConfigError(f"{self.model!r}: give both ends of the interval, or neither")
        low, high = self.low or 0, self.high or 8
        if not low <= self.bits_per_byte <= high:
            raise ConfigError(
                f"{self.model!r}: {self.bits_per_byte} lies outside its interval [{low}, {high}]"
            )
        if self.watts <= 0:
            raise ConfigError(f"watts={self.watts}; give the assumed draw in watts, above 0")

    @property
    def energy_wh(self) -> float | None:
        """Estimated energy of training, in watt-hours."""
        return None if self.train_seconds is None else self.train_seconds * self.watts / 3600

    def __str__(self) -> str:
        """What stays the same from run to run: no time and no rate."""
        parts = [f"{self.model}: {self.bits_per_byte:.3f} bits per byte"]
        if self.low is not None and self.high is not None:
            parts[0] += f" [{self.low:.3f}, {self.high:.3f}]"
        if self.saw_test:
            parts.append("may have read the test plays")
        if self.parameters is not None:
            parts.append(f"{self.parameters:,} parameters")
        if self.bytes_on_disk is not None:
            parts.append(f"{_scaled(self.bytes_on_disk, 'B')} on disk")
        if self.train_flops is not None:
            parts.append(f"{_scaled(self.train_flops, 'FLOPs')} of training")
        return "; ".join(parts)


def _scaled(value: int | float | None, unit: str = "", digits: int = 3) -> str:
    """1234567 -> '1.23 M'. None -> '-'."""
    if value is None:
        return "-"
    for power, prefix in zip((1e21, 1e18, 1e15, 1e12, 1e9, 1e6, 1e3), "ZEPTGMk", strict=True):
        if abs(value) >= power:
            return f"{value / power:.{digits}g} {prefix}{unit}".rstrip()
    return f"{value:.{digits}g} {unit}".rstrip()


def record(row: Row) -> None:
    """Show a row in a notebook; the whole row goes with the output as metadata."""
    from IPython.display import display

    display({"text/plain": str(row)}, metadata={METADATA_KEY: asdict(row)}, raw=True)


def rows() -> tuple[Row, ...]:
    """The rows of the committed ledger, in the order of the chapters."""
    text = (files("minilm.assets") / "ledger.json").read_text(encoding="utf-8")
    return tuple(from_dict(one) for one in json.loads(text))


def from_dict(record: dict[str, Any]) -> Row:
    """Make a row from its JSON form.

    Raises:
        ConfigError: If a field is unknown.
    """
    unknown = set(record) - {field.name for field in fields(Row)}
    if unknown:
        raise ConfigError(f"a ledger row has no field {', '.join(sorted(unknown))}")
    return Row(**record)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, best model last."""
    head = (
        "| model | chapter | bits per byte | 95% interval | parameters | on disk "
        "| training FLOPs | training | energy | tokens/s |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    lines = [head]
    for row in sorted(rows, key=lambda one: -one.bits_per_byte):
        between = "-" if row.low is None else f"{row.low:.3f} to {row.high:.3f}"
        cells = [
            row.model + MARK * row.saw_test,
            str(row.chapter),
            f"{row.bits_per_byte:.3f}",
            between,
            _scaled(row.parameters),
            _scaled(row.bytes_on_disk, "B"),
            _scaled(row.train_flops),
            _scaled(row.train_seconds, "s"),
            _scaled(row.energy_wh, "Wh"),
            _scaled(row.tokens_per_second),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(rows: Sequence[Row]) -> "Figure":
    """Bits per byte of each row with its interval, worst on top; one colour a chapter.

    A model that may have read the test plays has a hollow dot and a star, and is never the best.

    Raises:
        ConfigError: If there are no rows.
    """
    if not rows:
        raise ConfigError("no rows to draw; record one, or pass minilm.ledger.rows()")
    import matplotlib.pyplot as plt

    ordered = sorted(rows, key=lambda one: one.bits_per_byte)
    chapters = sorted({row.chapter for row in rows})
    fig, ax = plt.subplots(figsize=(6.4, 0.8 + 0.28 * len(ordered)))
    for place, row in enumerate(ordered):
        color = COLORS[chapters.index(row.chapter) % len(COLORS)]
        if row.low is not None and row.high is not None:
            ax.plot([row.low, row.high], [place, place], color=color, linewidth=2, alpha=0.5)
        inside = "none" if row.saw_test else color
        ax.plot(row.bits_per_byte, place, "o", color=color, markerfacecolor=inside)
        ax.annotate(
            f"{row.bits_per_byte:.2f}",
            (row.bits_per_byte, place),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=9,
        )
    ax.set_yticks(range(len(ordered)), [row.model + MARK * row.saw_test for row in ordered])
    ax.set_xlim(0, None)
    ax.set_xlabel("bits per byte on the test plays (less is better)")
    best = next((row for row in ordered if not row.saw_test), ordered[0])
    ax.set_title(f"Best so far: {best.model}, {best.bits_per_byte:.2f} bits per byte")
    ax.grid(axis="y", visible=False)
    if len(chapters) > 1:
        for chapter, color in zip(chapters, cycle(COLORS), strict=False):
            ax.plot([], [], "o", color=color, label=f"chapter {chapter}")
        ax.legend(loc="upper left")
    return fig
