"""models/report: the tables of models/*/README.md are those of the records, and only these are rewritten."""

import json

import pytest

from course.core import InputError
from models import report
from models.rl import benchmark
from models.scale import cost


def test_each_readme_there_is_covered():
    assert {"rl", "scale"} <= set(report.packages())


@pytest.mark.parametrize("package", report.packages())
def test_the_readmes_are_not_stale(package):
    text = (report.FOLDER / package / "README.md").read_text()
    assert report.readme_text(text, package) == text, "run python -m models.report readme"


def test_tables_are_written_from_the_records(tmp_path):
    text = "a\n<!-- cost:begin -->\nold\n<!-- cost:end -->\nb\n<!-- overhead:begin -->\n<!-- overhead:end -->\nc\n"
    fresh = report.readme_text(text, "scale", tmp_path)
    assert cost.markdown(cost.table()) in fresh and "old" not in fresh
    assert fresh.endswith("b\n<!-- overhead:begin -->\nNothing is recorded yet.\n<!-- overhead:end -->\nc\n")
    assert report.readme_text(fresh, "scale", tmp_path) == fresh
    with pytest.raises(InputError, match=r"models/scale/README\.md has no lines"):
        report.readme_text("no place", "scale", tmp_path)


def test_readme_check_tells_drift(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    (tmp_path / "rl" / "results").mkdir(parents=True)
    path = tmp_path / "rl" / "README.md"
    path.write_text("<!-- benchmark:begin -->\n<!-- benchmark:end -->\n")
    (tmp_path / "rl" / "results" / "benchmark.json").write_text(json.dumps({"made": "of this"}))
    monkeypatch.setattr(benchmark, "markdown", lambda record: f"a table of {record['made']}")
    with pytest.raises(SystemExit) as stop:
        report.main(["readme", "--check"])
    assert stop.value.code == 1 and "of this" not in path.read_text()
    report.main(["readme"])
    assert "a table of of this" in path.read_text()
    report.main(["readme", "--check"])
    assert capsys.readouterr().out.splitlines() == [
        "models/rl/README.md is stale: run python -m models.report readme", "models/rl/README.md written"
    ]  # fmt: skip
