"""`python -m course`: the units, what each shows and what was recorded; `python -m course day21`: all about one.

`python -m course a1_knn --blank > my_knn.py` writes a unit with its exercises to do.
"""

import dataclasses
import sys
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from course.core import InputError, catalogue, cli, flags

PIPED = 120  # columns, where no terminal says how wide it is
STYLE = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD}


@dataclasses.dataclass
class Catalogue:
    """What to show."""

    unit: Annotated[str, tyro.conf.Positional] = ""  # a unit's name or the beginning of it; none: the whole course
    blank: bool = False  # print the unit's source with its exercises to do


def main(argv):
    options = flags.read(Catalogue(), argv, prog="python -m course", description=__doc__)
    sys.stdout.reconfigure(errors="replace")  # a terminal that has no ± shows a question mark
    console = Console(width=None if sys.stdout.isatty() else PIPED, highlight=False)
    known = catalogue.units()
    if options.blank:
        print_blank(options.unit, known)
    elif options.unit:
        show_unit(console, catalogue.find(options.unit, known))
    else:
        show_course(console, known)


def print_blank(name, known):
    """The source of the unit `name` without its exercises' answers; `InputError` where it has none."""
    if not name:
        raise InputError("--blank needs a unit: python -m course a1_knn --blank > my_knn.py")
    unit = catalogue.find(name, known)
    if "exercises" not in unit.offers:
        raise InputError(f"{unit.name} marks no exercises: `python -m course` shows which units do")
    print(catalogue.blank(unit.source), end="")


def show_course(console, known, results=catalogue.RESULTS):
    """The table of the course, group by group; a narrow terminal does without the last column."""
    wide = console.width >= 100
    for group in catalogue.GROUPS:
        members = [unit for unit in known if unit.group == group]
        if not members:
            continue
        table = Table(title=group, expand=True, **STYLE)
        for column, ratio in {"unit and idea": 6, "data": 2, "recorded result": 5, "offers": 2}.items():
            if wide or column != "offers":
                table.add_column(column, ratio=ratio, overflow="fold")
        for unit in members:
            records = catalogue.recorded(unit.name, results)
            preset = "cpu" if "cpu" in records else next(iter(records), None)  # the default, if it was published
            name = f"[bold cyan]{unit.name}[/]\n{escape(unit.header['claim'])}"
            cells = [name, *_result(preset, records.get(preset)), ", ".join(unit.offers)]
            table.add_row(*cells[: len(table.columns)])
        console.print(table)
    console.print("python -m course UNIT: all about one    python -m course.UNIT: run it", markup=False)


def _result(preset, record):
    if record is None:
        return "", "[dim]none recorded[/]"
    lines = [f"{name} {catalogue.measured(record['metrics'][name])}" for name in catalogue.headline(record)]
    seeds = len(record["seeds"])
    lines.append(f"{preset}, {seeds} seed{'s' * (seeds > 1)}, {catalogue.duration(record)} each")
    return escape(catalogue.data_line(record)), escape("\n".join(lines))


def show_unit(console, unit, results=catalogue.RESULTS):
    """Header, presets, results and addresses of one unit."""
    console.print(f"[bold]{escape(unit.header['title'])}[/]\n{escape(unit.header['claim'])}\n")
    header = Table(box=None, show_header=False, pad_edge=False)
    header.add_column(style="bold", no_wrap=True)
    header.add_column(overflow="fold")
    for field in catalogue.FIELDS:
        header.add_row(field, escape(unit.header[field.lower()]))
    console.print(header)

    presets = Table(title="presets", **STYLE)
    presets.add_column("preset", style="bold", no_wrap=True)
    presets.add_column("settings that differ from the defaults", overflow="fold")
    for name, changed in unit.presets.items():
        presets.add_row(name, escape(", ".join(f"{key}={value}" for key, value in changed.items()) or "none"))
    console.print(presets)

    records = catalogue.recorded(unit.name, results)
    for preset, record in records.items():
        console.print(_metrics(unit, preset, record))
        hardware = record["hardware"]
        where = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
        console.print(
            f"data: {catalogue.data_line(record)}\n{catalogue.duration(record)} a seed on {where}, "
            f"commit {record['commit']}\n{record['command']}\n",
            markup=False,
        )
        for title, rows in record["tables"].items():
            console.print(_rows(title, rows))
        for figure in record["figures"]:
            console.print(f"figure    course/results/{figure}", markup=False)

    console.print(f"run       python -m course.{unit.name}", markup=False)
    if records:
        console.print(f"verify    python -m course.core.report replay {unit.name}", markup=False)
    if "notebook" in unit.offers:
        console.print(f"notebook  {catalogue.notebook_path(unit.name)}", markup=False)
    if "demo" in unit.offers:
        console.print(f"demo      python -m serving.demos {unit.name}", markup=False)


def _rows(title, rows, most=20):
    """A table of a record, its first `most` rows."""
    more = f", {most} of {len(rows)} rows" if len(rows) > most else ""
    table = Table(title=f"{title}{more}", **STYLE)
    for column in rows[0]:
        table.add_column(str(column), overflow="fold")
    for row in rows[:most]:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        table.add_row(*map(escape, cells))
    return table


def _metrics(unit, preset, record):
    """Table of a record's metrics, with the reference beside those measured on the same data set."""
    references = catalogue.comparable(unit, record)
    seeds = ", ".join(map(str, record["seeds"]))
    table = Table(title=f"recorded: {preset}, seeds {seeds}", **STYLE)
    table.add_column("metric")
    table.add_column("ours", justify="right")
    if references:
        table.add_column("reference", justify="right")
        table.add_column("of", overflow="fold")
    for name in record["metrics"]:
        value, measure, source = references.get(name, ("", "", ""))
        beside = [f"{value} {measure}".strip(), escape(source)] if references else []
        table.add_row(name, catalogue.measured(record["metrics"][name]), *beside)
    return table


if __name__ == "__main__":
    cli(main)
