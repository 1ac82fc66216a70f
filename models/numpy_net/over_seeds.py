"""Experiments over settings and seeds: rows, one a setting and seed, brought into the forms of tables and figures."""

import numpy as np


def ladder(middle, count):
    """`count` settings, a factor of 10^0.5 apart, around `middle`."""
    return [float(middle * 10 ** ((k - (count - 1) / 2) / 2)) for k in range(count)]


def gather(rows, by, what):
    """{setting: array [S, ...] of column `what` over the S seeds}, settings (column `by`) in the order of the rows."""
    return {setting: np.array([row[what] for row in rows if row[by] == setting])
            for setting in dict.fromkeys(row[by] for row in rows)}  # fmt: skip


def table(rows, by):
    """A row a setting: mean and population standard deviation over the seeds (`name`, `name_std`) of each number."""
    columns = [name for name, value in rows[0].items() if name != by and isinstance(value, int | float)]
    found = {name: gather(rows, by, name) for name in columns}
    return [{by: setting} | {column: float(value) for name in columns for column, value in
                             ((name, found[name][setting].mean()), (f"{name}_std", found[name][setting].std()))}
            for setting in dict.fromkeys(row[by] for row in rows)]  # fmt: skip


def line(rows, by, what):
    """Array [S, settings] of column `what`: S seeds' lines over the settings, as `core.plots.curves` takes them."""
    return np.array(list(gather(rows, by, what).values())).T


def lowest(rows, by, what, near):
    """The row of `table` with the least mean `what`; `near`: how many settings come that close to it, itself included;
    `at_edge`: 1 where it is the first or the last of the settings, so that a better one may lie beyond."""
    found = table(rows, by)
    best = min(found, key=lambda row: row[what])
    return best | {"near": sum(row[what] <= best[what] + near for row in found),
                   "at_edge": int(best in (found[0], found[-1]))}  # fmt: skip
