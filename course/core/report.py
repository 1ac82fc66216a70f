"""From runs to what is committed and shown: `publish` a unit's result, write it into the README, `replay` it.

A published record is the mean and sample deviation over seeds of runs that differ in nothing but the seed.  Its
headline, shown in tables, is the first three metrics in the order the unit put them into `record["metrics"]`.
"""

import collections
import dataclasses
import io
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import tyro

from course.core import catalogue, experiment, files, flags
from course.core.errors import InputError, cli

SAME = ("config", "data", "commit", "versions", "hardware", "replicas", "precision")  # in all seeds of a record
FIGURE_WIDTH = 1200  # pixels, of a committed figure at most
FIGURE_BYTES = 150_000  # of a committed figure at most
FILM_BYTES = 400_000  # of a committed film: it cannot be made smaller here

# A replayed metric agrees within three deviations of the recorded seeds, and where these are few or all alike, within
# what other hardware's order of summation may change: 1 % of the value, or 1e-5 for differences that should be zero.
DEVIATIONS, RELATIVE, ABSOLUTE = 3, 0.01, 1e-5
# How long something took is a property of the machine: replay shows these metrics and does not judge them.
TIMING = re.compile(r"(^|_)(seconds|ms|us|minutes|per_second)(_|$)")
BLOCK = re.compile(r"(<!-- (\w+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)  # a generated part of a README


# --- publish ---------------------------------------------------------------------------------------------------------


def publish(unit, preset="cpu", runs="runs", results=catalogue.RESULTS):
    """Aggregate the runs of a `catalogue.Unit` into `<results>/<unit>.json` and its figures; returns the record.

    Other presets already published stay.  Raises `InputError` where there is no run, where the seeds differ in more
    than the seed, or where the preset cannot stand for a result (smoke, or one that was overridden).
    """
    if "+" in preset:
        raise InputError(
            f"{preset} was overridden by flags and is no preset of {unit.name}: publish the bare preset's runs"
        )
    if preset == "smoke":
        raise InputError("smoke only shows that a unit runs: publish cpu or full")
    found = _runs(Path(runs) / unit.name, preset)
    record = aggregate(found)
    for name, metric in record["metrics"].items():
        metric["unit"] = unit.reference[name][1] if name in unit.reference else ""
    results = files.make_folder(results)
    presets = catalogue.recorded(unit.name, results)
    stale = set(presets.get(preset, {}).get("figures", []))
    stem = (
        unit.name if preset == "cpu" else f"{unit.name}.{preset}"
    )  # the default preset's figures have the short names
    pictures = {f"{stem}-{name}": _small(found[0][0] / "figures" / name) for name in record["figures"]}
    record["figures"] = list(pictures)
    content = {"unit": unit.name, "presets": dict(sorted((presets | {preset: record}).items()))}
    for name, picture in pictures.items():
        files.write_atomic(results / name, picture)
    files.write_atomic(results / f"{unit.name}.json", experiment.to_json(content))
    for name in stale - set(record["figures"]):
        (results / name).unlink(missing_ok=True)
    return record


def _runs(folder, preset):
    """`(folder, result)` of every finished run under this preset, by seed."""
    found = []
    for path in folder.glob(f"{preset}-s*/result.json"):
        try:
            result = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}): delete its folder and run that seed again") from error
        found.append((path.parent, result))
    if not found:
        command = f"python -m course.{folder.name} --preset {preset}"
        raise InputError(f"no finished run in {folder}/{preset}-s*: run {command}")
    return sorted(found, key=lambda item: item[1]["seed"])


def aggregate(found):
    """One record of several runs: `found` is a list of (folder, result), the lowest seed first.

    Each metric becomes {"mean", "std", "n", "values": {seed: value}}; std is the sample deviation (n - 1), None for a
    single seed.  Tables and figures are those of the lowest seed.  Raises `InputError` for mixed runs.
    """
    first_folder, first = found[0]
    for folder, result in found[1:]:
        for key in SAME:
            difference = _difference(_without_seed(first.get(key)), _without_seed(result.get(key)), key)
            if difference:
                raise InputError(
                    f"{first_folder} and {folder} differ in {difference}: a record takes runs that differ in nothing "
                    "but the seed, so run the odd ones again"
                )
        if list(result["metrics"]) != list(first["metrics"]):
            raise InputError(f"{first_folder} and {folder} have other metrics: run both with the same code")
    return {
        "metrics": {
            name: summary({str(result["seed"]): result["metrics"][name] for _, result in found}, name)
            for name in first["metrics"]
        },
        "seconds": summary({str(result["seed"]): result["seconds"] for _, result in found}, "seconds"),
        "seeds": [result["seed"] for _, result in found],
        **{key: first.get(key) for key in SAME},
        "command": first["command"],
        "tables": first.get("tables", {}),
        "figures": first["figures"],
    }


def summary(values, name="metric"):
    """{"mean", "std", "n", "values"} of one metric over seeds; a value that was not finite (null) leaves no mean."""
    numbers = list(values.values())
    wrong = [value for value in numbers if isinstance(value, bool) or not isinstance(value, int | float | None)]
    if wrong:
        raise InputError(f"the metric {name} is {wrong[0]!r}: record['metrics'] holds numbers only")
    whole = None not in numbers
    return {
        "mean": statistics.fmean(numbers) if whole else None,
        "std": statistics.stdev(numbers) if whole and len(numbers) > 1 else None,
        "n": len(numbers),
        "values": values,
    }


def _without_seed(value):
    """`value` without the seed, in a configuration, and without the note of a provenance, prose that may tell it."""
    if isinstance(value, list):
        return [_without_seed(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_seed(item) for name, item in value.items() if name not in ("seed", "note")}
    return value


def _difference(a, b, key):
    """Where `a` and `b` first differ, as text, or None."""
    if isinstance(a, dict) and isinstance(b, dict):
        return next(filter(None, (_difference(a.get(name), b.get(name), f"{key}.{name}") for name in {**a, **b})), None)
    return None if a == b else f"{key} ({a!r} against {b!r})"


def _small(path):
    """The bytes of a PNG, made small enough to commit: at most FIGURE_WIDTH pixels wide and FIGURE_BYTES long; those of
    a GIF as they are.  Raises `InputError` where the file is missing, or a film of more than FILM_BYTES."""
    from PIL import Image

    if not path.exists():
        raise InputError(f"{path} is missing, though the run's record lists it: run that seed again")
    if path.suffix == ".gif":
        if path.stat().st_size > FILM_BYTES:
            raise InputError(f"{path} has more than {FILM_BYTES:,} bytes: film less of it")
        return path.read_bytes()
    picture = Image.open(path).convert("RGB")
    if picture.width > FIGURE_WIDTH:
        picture = picture.resize(
            (FIGURE_WIDTH, round(picture.height * FIGURE_WIDTH / picture.width)), Image.Resampling.LANCZOS
        )
    content = _png(picture)
    if len(content) > FIGURE_BYTES:  # figures have few colours; 256 chosen ones are hard to tell from all
        picture = picture.quantize(256)
        content = _png(picture)
    while len(content) > FIGURE_BYTES:  # photographs in it: what is left is fewer pixels
        picture = picture.convert("RGB").reduce(2).quantize(256)
        content = _png(picture)
    return content


def _png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


# --- the README ------------------------------------------------------------------------------------------------------


def readme_text(text, folder=catalogue.COURSE, results=catalogue.RESULTS):
    """`text` with its catalogue written anew from the units in `folder` and their `results`."""
    return fill(text, "README.md", {"catalogue": lambda: _catalogue_block(catalogue.units(folder), results)})


def fill(text, name, makers):
    """`text` with what stands between each `<!-- BLOCK:begin -->` and `<!-- BLOCK:end -->` written anew.

    name: of the file, for what is said.  makers: BLOCK -> function that gives its Markdown.  Raises `InputError` where
    the text has no block, or one that nothing is known to make.
    """
    found = {match[2] for match in BLOCK.finditer(text)}
    if not found:
        raise InputError(f"{name} has no lines <!-- BLOCK:begin --> and <!-- BLOCK:end -->: put them in")
    if unknown := found - set(makers):
        known = ", ".join(sorted(makers))
        raise InputError(f"{name} has a block {min(unknown)}, which nothing makes: the blocks known are {known}")
    return BLOCK.sub(lambda match: f"{match[1]}{makers[match[2]]()}\n{match[3]}", text)


def refresh(path, name, rewrite, module, check=False):
    """Write a README with generated parts anew, where they are not those of now, and say so.

    path: the file, `name` in what is said.  rewrite: its text -> the text of now.  module: the one whose command
    `readme` does this.  check: change nothing; exit with status 1 where the file is stale.  Raises `InputError` where
    there is no file.
    """
    if not path.is_file():
        raise InputError(f"there is no {path}")
    text = path.read_text()
    fresh = rewrite(text)
    if fresh == text:
        return
    if check:
        print(f"{name} is stale: run python -m {module} readme")
        raise SystemExit(1)
    files.write_atomic(path, fresh)
    print(f"{name} written")


def _catalogue_block(units, results):
    """A table of units for each group of the course."""
    groups = collections.defaultdict(list)
    for unit in units:
        groups[unit.group].append(unit)
    lines = []
    for group, members in groups.items():
        lines += [f"\n### {group}\n", "| unit | idea | data | recorded result | reference, same data | time | |"]
        lines += ["|---|---|---|---|---|---|---|"]
        lines += [_readme_row(unit, catalogue.recorded(unit.name, results)) for unit in members]
    return "\n".join(lines).lstrip("\n")


def _readme_row(unit, records):
    cells = [f"[`{unit.name}`](course/{unit.name}.py)", _cell(unit.header["claim"])]
    columns = [[], [], [], []]
    for preset, record in records.items():
        seeds = len(record["seeds"])
        columns[0].append(catalogue.data_line(record))
        columns[1] += [
            f"{name} **{catalogue.measured(record['metrics'][name])}**" for name in catalogue.headline(record)
        ]
        columns[1].append(f"({preset}, {seeds} seed{'s' * (seeds > 1)})")
        columns[2] += [
            f"{name} {value} {measure} ({source})"
            for name, (value, measure, source) in catalogue.comparable(unit, record).items()
        ]
        columns[3].append(catalogue.duration(record))
    if not records:
        columns[1] = ["none recorded"]
    cells += ["<br>".join(_cell(text) for text in column) for column in columns]
    return f"| {' | '.join([*cells, catalogue.colab_badge(unit.name)])} |"


def _cell(text):
    return text.replace("|", "\\|").replace("<", "&lt;")


# --- replay ----------------------------------------------------------------------------------------------------------


def replay(unit, preset="cpu", seeds=(0,), results=catalogue.RESULTS, where=()):
    """Run the command recorded for `unit` again, for each of `seeds`; returns {seed: rows of `compare`}.

    `where`: the fields of the unit's Config that say where it writes and listens; a replay must not push to the user's
    exports, so it is sent to a folder that is thrown away, and to any free port.
    Raises `InputError` where nothing is recorded or the command fails.
    """
    records = catalogue.recorded(unit, results)
    if preset not in records:
        raise InputError(f"nothing is recorded for {unit} under {preset}: there is {', '.join(records) or 'no record'}")
    record, rows = records[preset], {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = seed_command(record["command"], seed) + ["--runs", folder] + elsewhere(where, folder)
            done = subprocess.run([sys.executable, *command[1:]], cwd=catalogue.ROOT)
            if done.returncode:
                raise InputError(f"{shlex.join(command)} ended with status {done.returncode}")
            result = json.loads(next(Path(folder).glob("*/*/result.json")).read_text())
        rows[seed] = compare(record["metrics"], result["metrics"])
    return rows


def elsewhere(where, folder):
    """Flags for those fields of a Config: a place in `folder` for each that is text, 0 (any free port) for a number."""
    places = {field.name: "0" if isinstance(field.default, int) else f"{folder}/{field.name}" for field in where}
    return [word for name, place in places.items() for word in (f"--{name.replace('_', '-')}", place)]


def seed_command(command, seed):
    """The words of a recorded command, `python -m course.<unit> --preset ... --seed ...`, with another seed."""
    words = shlex.split(command)
    words[words.index("--seed") + 1] = str(seed)
    return words


def compare(metrics, replayed):
    """[(name, recorded, replayed, allowed difference, verdict)] for every metric on either side.

    The verdict is "agrees", "differs" or, for what the machine's speed decides, "not judged".
    """
    rows = []
    for name in {**metrics, **replayed}:
        recorded, value = metrics.get(name), replayed.get(name)
        if recorded is None or name not in replayed:
            rows.append((name, recorded, value, None, "differs"))  # one side has not measured it
            continue
        mean, std = recorded["mean"], recorded["std"]
        if mean is None or value is None:
            allowed, agrees = None, mean is value
        else:
            allowed = max(DEVIATIONS * (std or 0), RELATIVE * abs(mean), ABSOLUTE)
            agrees = abs(value - mean) <= allowed
        verdict = "not judged" if TIMING.search(name) else "agrees" if agrees else "differs"
        rows.append((name, recorded, value, allowed, verdict))
    return rows


# --- the command -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Publish:
    """Aggregate a unit's runs over their seeds into course/results."""

    unit: Annotated[str, tyro.conf.Positional]  # as `python -m course` names it
    preset: str = "cpu"  # cpu or full
    runs: str = "runs"  # folder of the runs


@dataclasses.dataclass
class Readme:
    """Write the README's tables anew from what is published."""

    check: bool = False  # change nothing; exit with status 1 where the README is stale


@dataclasses.dataclass
class Replay:
    """Run a recorded command again; exit with status 1 unless every metric falls within the recorded spread."""

    unit: Annotated[str, tyro.conf.Positional]  # as `python -m course` names it
    preset: str = "cpu"  # the record to repeat
    seeds: tuple[int, ...] = (0,)  # the seeds to run


@dataclasses.dataclass
class Command:
    """What to do."""

    do: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[Publish | Readme | Replay]]


def main(argv):
    command = flags.read(Command(tyro.MISSING), argv, prog="python -m course.core.report", description=__doc__).do
    if isinstance(command, Readme):
        refresh(catalogue.ROOT / "README.md", "README.md", readme_text, "course.core.report", command.check)
        return
    unit = catalogue.find(command.unit, catalogue.units())
    if isinstance(command, Publish):
        record = publish(unit, command.preset, command.runs)
        if record["commit"] is None or record["commit"].endswith("+changes"):
            print(f"note: these runs are of uncommitted code (commit {record['commit']})")
        print(f"course/results/{unit.name}.json: {command.preset}, seeds {', '.join(map(str, record['seeds']))}")
    else:
        _main_replay(unit, command)


def _main_replay(unit, command):
    from rich.console import Console
    from rich.table import Table

    differs = 0
    where = [field for field in dataclasses.fields(unit.outline.Config) if field.metadata.get("where")]
    for seed, rows in replay(unit.name, command.preset, command.seeds, catalogue.RESULTS, where).items():
        table = Table(title=f"{unit.name}, {command.preset}, seed {seed}, replayed", title_justify="left")
        for column in ("metric", "recorded", "replayed", "allowed difference", "verdict"):
            table.add_column(column, justify="left" if column in ("metric", "verdict") else "right")
        for name, recorded, value, allowed, verdict in rows:
            texts = ["" if item is None else f"{item:.4g}" for item in (value, allowed)]
            table.add_row(name, catalogue.number(recorded) if recorded else "", *texts, verdict)
            differs += verdict == "differs"
        Console().print(table)
    print(f"{differs} metrics differ" if differs else "every judged metric falls within the recorded spread")
    if differs:
        raise SystemExit(1)


if __name__ == "__main__":
    cli(main)
