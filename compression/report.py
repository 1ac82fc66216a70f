"""What comes out of the compression benchmark: the headline, the targets, the Pareto figures, the tables.

python -m compression.report readme            tables of the committed records into compression/README.md
python -m compression.report readme --check    change nothing; exit status 1 where they are not those in it
"""

import collections
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from course.core import bounds, cli, flags, report

FOLDER = Path(__file__).parent
ORIGINAL = "float"  # the arm that the others are held against
FAILED = "failed: "  # so begins the "why" of an arm that went wrong, as opposed to one that does not fit the model
BUSY = 1.5  # load average of the minute before the timing, our own making included, from which it is doubtful

TARGETED = "cifar10"  # the data set that the targets were set for
# arm, what, figure of its row, bound, points of accuracy that it may lose
TARGETS = (
    ("int8", "times smaller", "times_smaller", 3.8, 0.5),
    ("int8", "times faster, 1 thread", "times_faster_1", 2.0, 0.5),
    ("pruned clustered int8", "times smaller, gzip", "times_smaller_gzip", 10.0, 1.0),
    ("student", "times faster, 1 thread", "times_faster_1", 5.0, 1.5),
)


def headline(rows):
    """The original's figures, and the smallest and the fastest of the files that pass the gate."""
    first = rows[ORIGINAL]
    passed = [row for row in rows.values() if blessed(row)] or [first]
    found = {"accuracy": first["accuracy"], "bytes": first["bytes"], "p50_ms": first["p50_ms_1"]}
    smallest, fastest = min(passed, key=lambda row: row["gzip"]), max(passed, key=lambda row: row["times_faster_1"])
    for what, row in (("smallest", smallest), ("fastest", fastest)):
        found |= {f"{what}_{key}": row[key] for key in ("times_smaller_gzip", "times_faster_1", "difference")}
    return found


def blessed(row):
    """Whether a file passes the Evaluator and, where it was served, the InfraValidator."""
    return row["gate"] == "BLESSED" and row.get("infra", "INFRA_BLESSED") == "INFRA_BLESSED"


def judged(rows, data):
    """The targets, those of arms that were asked for: each with what was measured and whether it is met; none where the
    data set, by name, is another than the one that they were set for.

    rows: arm -> row, those with a "why" too: an arm that could not be made has met nothing, its "value" is None.
    """
    return [_judge(rows[arm], *target) for arm, *target in TARGETS if arm in rows] if data == TARGETED else []


def _judge(row, what, key, bound, allowed):
    found = {"arm": row["arm"], "what": what, "bound": bound, "allowed": -allowed}
    if "why" in row:
        return found | {"value": None, "points": None, "met": False, "why": row["why"]}
    points = 100 * row["difference"]
    return found | {"value": row[key], "points": points, "met": row[key] >= bound and points >= -allowed}


def conclude(rows):
    """End the command with status 1 where an arm failed, naming each that did; one that does not fit the model has not
    failed."""
    failed = [row for row in rows if row.get("why", "").startswith(FAILED)]
    for row in failed:
        print(f"{row['arm']}: {row['why']}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


def draw(run, rows):
    """Accuracy against the size of the packed file, and against the time of one input; what lost more than ten points
    would squeeze the others together, and is left out."""
    from course.core import plots

    least = rows[ORIGINAL]["accuracy"] - 0.1
    kept = [row for row in rows.values() if row["accuracy"] >= least]
    lost = len(rows) - len(kept)
    title = f"{lost} more below {100 * least:.0f} %" if lost else ""
    for name, key, label, scale in (
        ("size", "gzip", "file after gzip -9, kB", 1e-3),
        ("time", "p50_ms_1", "one input on one thread, median, ms", 1.0),
    ):
        points = {row["arm"]: (scale * row[key], 100 * row["accuracy"]) for row in kept}
        figure = plots.pareto(points, xlabel=label, ylabel="test accuracy, %", title=title, numbered=True)
        run.figure(f"pareto_{name}", figure)


def _shared_out(found):
    return f"{found['delegated']}/{sum(found['ops'].values())}" if found else ""


def _left(made):
    """What stays on the built-in kernels, in words -> the arms of which that is so."""
    names = collections.defaultdict(list)
    for row in made:
        if row["xnnpack"] and row["xnnpack"]["left"]:
            counts = row["xnnpack"]["left"].items()
            names[", ".join(f"{count} {op}" if count > 1 else op for op, count in counts)].append(row["arm"])
    return names


def busy(load):
    """A remark on the machine's `load`, {"before", "after"} the timing; "" where it was not busy, or nobody looked."""
    before = load["before"][0] if load else 0.0
    return f"; the machine was busy, its load {before:.1f} beforehand" if before > BUSY else ""


def show(rows, targets, load=None):
    """The tables on the terminal; then what could not be made or was refused, and the targets; `load`: see `busy`."""
    made = [row for row in rows if "why" not in row]
    columns = ("arm", "accuracy %", "less float", "95 % interval", "p", "decides otherwise", "gate")
    lines = [
        (
            row["arm"],
            f"{100 * row['accuracy']:.2f}",
            f"{100 * row['difference']:+.2f}",
            "{:+.2f} to {:+.2f}".format(*(100 * end for end in row["difference_interval"])),
            f"{row['p']:.2g}",
            f"{100 * row['disagreement']:.2f} %",
            "blessed" if blessed(row) else "refused",
        )
        for row in made
    ]
    bounds.table("what the files answer on the test part", columns, lines)
    columns = ("arm", "kB", "gzip", "x smaller", "gzip", "Huffman", "zeros")
    lines = [
        (
            row["arm"],
            f"{row['bytes'] / 1e3:.1f}",
            f"{row['gzip'] / 1e3:.1f}",
            f"{row['times_smaller']:.2f}",
            f"{row['times_smaller_gzip']:.2f}",
            f"{row['times_smaller_huffman']:.2f}" if "huffman" in row else "",
            "" if row["sparsity"] is None else f"{100 * row['sparsity']:.0f} %",
        )
        for row in made
    ]
    bounds.table("size; how much smaller the file is, packed, and the weights alone in Huffman's code", columns, lines)
    columns = ("arm", "p50", "p90", "p99", "x faster", "2 threads", "p99", "x faster", "served")
    lines = [
        (
            row["arm"],
            *(
                f"{row[key]:.3f}" if key.startswith("p") else f"{row[key]:.2f}"
                for threads in (1, 2)
                for key in (*(f"p{q}_ms_{threads}" for q in (50, 90, 99)[::threads]), f"times_faster_{threads}")
            ),
            f"{row['served_p50_ms']:.2f}" if "served_p50_ms" in row else "",
        )
        for row in made
    ]
    bounds.table(f"one input, milliseconds{busy(load)}", columns, lines)
    columns = ("arm", "parity", "equal", "train s", "convert", "MiB", "XNNPACK")
    lines = [
        (
            row["arm"],
            f"{row['parity']:.1g}",
            f"{100 * row['agreement']:.1f} %",
            f"{row['train_seconds']:.0f}",
            f"{row['convert_seconds']:.1f}",
            f"{row['own_mib']:.1f}",
            _shared_out(row["xnnpack"]),
        )
        for row in made
    ]
    title = "agreement with the file's own Keras model, seconds of making, memory, operations that XNNPACK runs"
    bounds.table(title, columns, lines)
    for left, names in _left(made).items():
        print(f"not on XNNPACK: {left} ({', '.join(names)})")
    for row in rows:
        reasons = [row["why"]] if "why" in row else row["reasons"] + row.get("infra_reasons", [])
        if reasons:
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            print(f"{row['arm']}: {'not made' if 'why' in row else 'refused'}: {reasons[0]}{more}")
    if targets:
        lines = [(*_cells(row), "met" if row["met"] else "MISSED") for row in targets]
        bounds.table("targets", ("arm", "what", "measured", "bound", "points", "allowed", ""), lines)


# --- the README -------------------------------------------------------------------------------------------------------

SHOWN = (
    *(ORIGINAL, "float16", "dynamic", "int8", "aware int8", "pruned", "pruned int8", "2:4 int8", "filters int8"),
    *("clustered", "pruned clustered", "pruned clustered int8", "pruned clustered aware int8", "student"),
    *("student int8", "student pruned int8", "student alone", "tfmot combined int8", "weights int8", "weights int4"),
)


def markdown(records):
    """Records of the benchmark as the tables of a README: one a model, of the arms in `SHOWN` that were asked for."""
    return "\n\n".join(map(_section, records)) if records else "Nothing is recorded yet."


def _section(record):
    data, hardware = record["data"], record["hardware"]
    rows = {row["arm"]: row for row in record["tables"]["arms"]}
    listed = [rows[name] for name in SHOWN if name in rows]
    lines = [
        f"### {record['target']['name']}",
        "",
        f"{rows[ORIGINAL]['params']:,} parameters; {data['name']}, {data['test']:,} test inputs;",
        f"{hardware['cpu']}, one of {hardware['cores']} cores{busy(record.get('load'))}. `{record['command']}`",
        "",
        "| arm | accuracy, % | less float (95 %) | kB / gzip | x smaller / gzip | x faster | ms | served, ms | gate |",
        "|---" * 9 + "|",
        *(_line(row) for row in listed if "why" not in row),
    ]
    if failed := [row for row in listed if "why" in row]:
        lines += ["", *(f"Not made: {row['arm']}: {row['why'].rstrip('.')}." for row in failed)]
    if record["targets"]:
        lines += ["", "| target | of what | measured | bound | points | allowed | |", "|---" * 7 + "|"]
        lines += map(_target, record["targets"])
    return "\n".join(lines)


def _line(row):
    low, high = (100 * end for end in row["difference_interval"])
    cells = (
        row["arm"],
        f"{100 * row['accuracy']:.2f}",
        f"{100 * row['difference']:+.2f} ({low:+.2f} to {high:+.2f})",
        f"{row['bytes'] / 1e3:,.1f} / {row['gzip'] / 1e3:,.1f}",
        f"{row['times_smaller']:.2f} / {row['times_smaller_gzip']:.2f}",
        f"{row['times_faster_1']:.2f}",
        f"{row['p50_ms_1']:.3f}",
        f"{row['served_p50_ms']:.2f}" if "served_p50_ms" in row else "",
        "blessed" if blessed(row) else "refused",
    )
    return f"| {' | '.join(cells)} |"


def _target(row):
    return f"| {' | '.join((*_cells(row), 'met' if row['met'] else '**missed**'))} |"


def _cells(row):
    """A target as texts: arm, what, measured, bound, points, allowed."""
    measured = ("not made", "") if row["value"] is None else (f"{row['value']:.2f}", f"{row['points']:+.2f}")
    value, points = measured
    return row["arm"], row["what"], value, f">= {row['bound']:g}", points, f">= {row['allowed']:g}"


def readme_text(text, folder=None):
    """`text` with its tables written anew from the records in `folder`."""
    folder = folder or FOLDER / "results"
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return report.fill(text, "compression/README.md", {"results": lambda: markdown(records)})


@dataclasses.dataclass
class Command:
    """Write the tables of the committed records into compression/README.md."""

    what: Annotated[Literal["readme"], tyro.conf.Positional]
    check: bool = False  # change nothing; exit with status 1 where the README is stale


def main(argv):
    """Write or check the README's tables."""
    command = flags.read(Command(tyro.MISSING), argv, prog="python -m compression.report", description=Command.__doc__)
    report.refresh(FOLDER / "README.md", "compression/README.md", readme_text, "compression.report", command.check)


if __name__ == "__main__":
    cli(main)
