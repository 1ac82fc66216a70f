"""What a benchmark promises: ratios of two figures of one run, each with the bound that it must keep."""

import math
import sys
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass
class Ratio:
    """Two figures of one run, and the bound that their ratio must keep."""

    what: str
    over: str  # "naive / fast": which two
    first: float
    second: float
    bound: float
    at_least: bool  # else: at most

    @property
    def value(self):
        """The first over the second; not a number where the second is 0."""
        return self.first / self.second if self.second else math.nan

    @property
    def met(self):
        """Whether the bound is kept; one that could not be measured (not a number) is not."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self):
        return f"{self.what}, {self.over}: {self.value:.3g}, bound {_bound(self)}"


def console():
    """A terminal as wide as it is; 120 columns where the output goes to a file."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def table(title, columns, rows):
    """A table on the terminal: names of `columns` and `rows` of texts; columns of numbers are set to the right."""
    shown = Table(box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        numbers = any(row[i] for row in rows) and all(row[i][:1].isdigit() or not row[i] for row in rows)
        shown.add_column(column, justify="right" if numbers else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    if title:
        console().print(f"{title}:")
    console().print(shown)


def show(found, unit="ms"):
    """The ratios as a table on the terminal; `unit`: of the two figures."""
    rows = [
        (ratio.what, ratio.over, f"{ratio.first:.4g}", f"{ratio.second:.4g}", f"{ratio.value:.3g}", _bound(ratio),
         "[green]met[/]" if ratio.met else "[bold red]MISSED[/]")
        for ratio in found
    ]  # fmt: skip
    table("", ("what", "ratio of", unit, unit, "ratio", "bound", ""), rows)


def conclude(found):
    """End the command with status 1 where a bound is missed, naming each that is."""
    missed = [ratio for ratio in found if not ratio.met]
    for ratio in missed:
        print(f"missed: {ratio}", file=sys.stderr)
    if missed:
        raise SystemExit(1)


def _bound(ratio):
    return f"{'>=' if ratio.at_least else '<='} {ratio.bound:g}"
