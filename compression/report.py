"""What comes out of the compression benchmark: the headline, the targets, the Pareto figures, the tables."""

from course.core import bounds

ORIGINAL = "float"  # the arm that the others are held against

# arm, what, figure of its row, bound, points of accuracy that it may lose; for the CIFAR-10 convnet
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


def judged(rows):
    """The targets, those of arms that were run: each with what was measured and whether it is met."""
    return [
        {"arm": arm, "what": what, "value": rows[arm][key], "bound": bound,
         "points": 100 * rows[arm]["difference"], "allowed": -allowed,
         "met": rows[arm][key] >= bound and 100 * rows[arm]["difference"] >= -allowed}
        for arm, what, key, bound, allowed in TARGETS if arm in rows
    ]  # fmt: skip


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


def show(rows, targets):
    """The tables on the terminal; then what could not be made or was refused, and the targets."""
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
    columns = ("arm", "kB", "gzip", "x smaller", "gzip", "zeros", "parity", "equal", "train s", "convert")
    lines = [
        (
            row["arm"],
            f"{row['bytes'] / 1e3:.1f}",
            f"{row['gzip'] / 1e3:.1f}",
            f"{row['times_smaller']:.2f}",
            f"{row['times_smaller_gzip']:.2f}",
            "" if row["sparsity"] is None else f"{100 * row['sparsity']:.0f} %",
            f"{row['parity']:.1g}",
            f"{100 * row['agreement']:.1f} %",
            f"{row['train_seconds']:.0f}",
            f"{row['convert_seconds']:.1f}",
        )
        for row in made
    ]
    bounds.table("size, agreement with the file's own Keras model, seconds of making", columns, lines)
    columns = ("arm", "p50", "p90", "p99", "x faster", "2 threads", "p99", "x faster", "served", "MiB")
    lines = [
        (
            row["arm"],
            *(
                f"{row[key]:.3f}" if key.startswith("p") else f"{row[key]:.2f}"
                for threads in (1, 2)
                for key in (*(f"p{q}_ms_{threads}" for q in (50, 90, 99)[::threads]), f"times_faster_{threads}")
            ),
            f"{row['served_p50_ms']:.2f}" if "served_p50_ms" in row else "",
            f"{row['own_mib']:.1f}",
        )
        for row in made
    ]
    bounds.table("one input: milliseconds; peak memory above the runtime's", columns, lines)
    for row in rows:
        reasons = [row["why"]] if "why" in row else row["reasons"] + row.get("infra_reasons", [])
        if reasons:
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            print(f"{row['arm']}: {'not made' if 'why' in row else 'refused'}: {reasons[0]}{more}")
    if targets:
        lines = [
            (row["arm"], row["what"], f"{row['value']:.2f}", f">= {row['bound']:g}", f"{row['points']:+.2f}",
             f">= {row['allowed']:g}", "met" if row["met"] else "MISSED") for row in targets
        ]  # fmt: skip
        bounds.table("targets", ("arm", "what", "measured", "bound", "points", "allowed", ""), lines)
