"""What holds for every unit, found by discovery: a new module in course/ is tested without a line being added here."""

import dataclasses
import json
import re

import pytest

from course.core import catalogue, report
from tests import support

UNITS = [pytest.param(unit, id=unit.name) for unit in catalogue.units()]
SOURCE_LINES = range(120, 351)

every_unit = pytest.mark.parametrize("unit", UNITS)


def test_the_first_three_units_are_there():
    names = {unit.name for unit in catalogue.units()}
    assert names >= {"day01_neural_network_from_scratch", "day21_capsnet", "day25_vision_pipeline"}


@every_unit
def test_header(unit):
    header = unit.header  # reading it has checked that all fields are there, once
    assert header["claim"].endswith("."), "the claim is a sentence"
    if unit.name.startswith("day"):
        assert header["title"].startswith(f"Day {unit.name[3:5]} - ")
    assert header["run"].startswith(f"python -m course.{unit.name}")


@every_unit
def test_reference_entries_say_value_unit_and_source(unit):
    for metric, entry in unit.reference.items():
        value, measure, source = entry
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric)
        assert isinstance(value, int | float)
        assert isinstance(measure, str)
        assert len(source) > 10, f"{metric}: author, place in the source, data set"
        assert "[M]" not in source, f"{metric}: look the figure up first"


@every_unit
def test_presets_change_only_what_config_has(unit):
    config = unit.outline.Config
    fields = {field.name: field for field in dataclasses.fields(config)}
    assert set(unit.presets) >= {"smoke", "cpu", "full"}
    assert unit.presets["full"] == {}, "the defaults of Config are the paper's setting"
    assert isinstance(config().seed, int)
    for preset, changed in unit.presets.items():
        assert set(changed) <= set(fields), preset
        for name, value in changed.items():
            assert type(value) is type(getattr(config(), name)), f"{preset}: {name}"
    for field in fields.values():
        assert re.search(rf"^    {field.name}: .*= ", unit.source, re.MULTILINE), f"{field.name}: one field a line"


@every_unit
def test_cells(unit):
    assert re.search(r"^# %% \[markdown\]$", unit.source, re.MULTILINE), "prose"
    assert re.search(r"^# %%$", unit.source, re.MULTILINE), "code"
    odd = re.findall(r"^#+ ?%%(?! \[markdown\]$|$).*", unit.source, re.MULTILINE)
    assert odd == [], "a cell begins with '# %%' or '# %% [markdown]'"


@every_unit
def test_length(unit):
    lines = len(unit.source.splitlines())
    assert lines in SOURCE_LINES, f"{lines} lines: a unit is read in one sitting"


@every_unit
def test_exercise_regions_are_closed_and_not_nested(unit):
    marks = re.findall(r"^ *# (exercise: \S.*|end exercise)$", unit.source, re.MULTILINE)
    mentions = re.findall(r"# *(?:end +)?exercise\b", unit.source)
    assert len(marks) == len(mentions), "'# exercise: <what to write>' and '# end exercise', each on its own line"
    assert [mark == "end exercise" for mark in marks] == [False, True] * (len(marks) // 2)


@every_unit
def test_guard(unit):
    assert unit.source.endswith('\n\nif __name__ == "__main__":\n    core.cli(main)\n')


@every_unit
def test_help_is_quick_and_does_not_import_tensorflow(unit):
    done, seconds = support.python("-X", "importtime", "-m", f"course.{unit.name}", "--help")
    assert done.returncode == 0, done.stderr
    assert seconds < 1.5
    assert "--preset" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tyro" in imported
    assert not imported & {"tensorflow", "keras", "numpy"}


@every_unit
def test_a_wrong_flag_is_one_line_and_quick(unit):
    done, seconds = support.python("-m", f"course.{unit.name}", "--no-such-flag", "1")
    assert done.returncode == 2
    assert seconds < 1.5
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.smoke
@every_unit
def test_smoke_preset_runs(unit, tmp_path):
    """In a process of its own, as a reader runs it, and in a folder of its own, where it may leave what it likes."""
    where = [field for field in dataclasses.fields(unit.outline.Config) if field.metadata.get("where")]
    words = ["-m", f"course.{unit.name}", "--preset", "smoke", "--runs", str(tmp_path / "runs")]
    words += report.elsewhere(where, tmp_path)  # a reader's own server may hold the usual ports
    done, _ = support.python(*words, cwd=tmp_path, PYTHONPATH=str(catalogue.ROOT))
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = (tmp_path / "runs").rglob("result.json")
    record = json.loads(path.read_text())
    assert (record["unit"], record["preset"], record["seed"]) == (unit.name, "smoke", 0)
    assert record["metrics"]
    for name, value in record["metrics"].items():
        assert isinstance(value, int | float), f"{name} is {value!r}"
        assert not isinstance(value, bool), name
    for name in record["figures"]:
        least = 100 if name.endswith(".gif") else 1000  # in films equal frames are one: a smoke policy may stand
        assert (path.parent / "figures" / name).stat().st_size > least
    for data in catalogue.sources(record["data"]):
        assert data["name"]
        assert data.get("synthetic") or {"source", "licence", "sha256"} <= set(data)
    assert catalogue.data_line(record)
    assert catalogue.comparable(unit, record) == {}, "a smoke run is on a part of the data: no reference beside it"
    assert record["command"].startswith(f"python -m course.{unit.name} --preset smoke --seed 0")
