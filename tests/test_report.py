"""From runs to the committed results and the README."""

import dataclasses
import json
import shutil
import statistics
import types
from pathlib import Path

import pytest
from PIL import Image

from course.core import InputError, catalogue, report
from tests import support

NAME = "day90_small_lesson"


@pytest.fixture
def unit(tmp_path):
    folder = tmp_path / "course"
    folder.mkdir()
    return catalogue.read_unit(support.write_unit(folder))


@pytest.fixture
def publish(tmp_path, unit):
    """`publish(preset)` of what lies in tmp_path/runs, into tmp_path/results; returns the whole file's content."""

    def publish(preset="cpu"):
        report.publish(unit, preset, tmp_path / "runs", tmp_path / "results")
        return json.loads((tmp_path / "results" / f"{NAME}.json").read_text())

    return publish


# --- publish ---------------------------------------------------------------------------------------------------------


def test_publish_aggregates_over_seeds(tmp_path, publish):
    for seed in (2, 0, 1):  # test_error 1 + seed, seconds 100 + seed
        support.write_run(tmp_path / "runs", seed)
    support.write_run(tmp_path / "runs", 0, "cpu+epochs=2")  # overridden: no part of cpu
    content = publish()
    assert content["unit"] == NAME
    record = content["presets"]["cpu"]
    assert record["metrics"]["test_error"] == {
        "mean": 2.0,
        "std": 1.0,  # of 1, 2, 3 with n - 1
        "n": 3,
        "values": {"0": 1.0, "1": 2.0, "2": 3.0},
        "unit": "%",
    }
    assert record["metrics"]["parameters"]["std"] == 0
    assert record["metrics"]["parameters"]["unit"] == ""
    assert record["seconds"]["mean"] == 101
    assert record["seeds"] == [0, 1, 2]
    assert record["command"] == f"python -m course.{NAME} --preset cpu --seed 0"
    assert record["data"] == support.DATA
    assert record["commit"] == "0123456789ab"
    assert record["hardware"]["cores"] == 2
    assert record["versions"] == {"python": "3.11.9"}
    assert list(record["metrics"]) == ["test_error", "parameters", "check", "last"]  # order is the headline


def test_one_seed_has_no_spread(tmp_path, publish):
    support.write_run(tmp_path / "runs", 3)
    metric = publish()["presets"]["cpu"]["metrics"]["test_error"]
    assert (metric["mean"], metric["std"], metric["n"]) == (4.0, None, 1)


def test_a_value_that_was_not_finite_leaves_no_mean(tmp_path, publish):
    support.write_run(tmp_path / "runs", 0, metrics={"loss": 1.0})
    support.write_run(tmp_path / "runs", 1, metrics={"loss": None})
    metric = publish()["presets"]["cpu"]["metrics"]["loss"]
    assert (metric["mean"], metric["std"], metric["values"]) == (None, None, {"0": 1.0, "1": None})


def test_seeds_may_draw_other_parts_of_the_same_data(tmp_path, publish):
    for seed in (0, 1):
        data = {
            "digits": support.DATA | {"note": f"10 of 20, seed {seed}"},
            "noise": {"name": "noise", "seed": seed},
        }
        support.write_run(tmp_path / "runs", seed, data=data)
    assert publish()["presets"]["cpu"]["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"config": {"seed": 1, "epochs": 6}}, r"cpu-s0 and .*cpu-s1 differ in config\.epochs \(5 against 6\)"),
        ({"data": support.DATA | {"sha256": "ab"}}, r"differ in data\.sha256 \(None against 'ab'\)"),
        ({"commit": "ba9876543210"}, r"differ in commit \('0123456789ab' against 'ba9876543210'\)"),
        ({"versions": {"python": "3.12.1"}}, r"differ in versions\.python"),
        ({"precision": "mixed_float16"}, r"differ in precision"),
        ({"metrics": {"test_error": 1.0}}, r"have other metrics"),
    ],
)
def test_mixed_runs_are_refused(tmp_path, publish, changes, difference):
    support.write_run(tmp_path / "runs", 0)
    support.write_run(tmp_path / "runs", 1, **changes)
    with pytest.raises(InputError, match=difference):
        publish()
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("value", ["high", True, [1.0]])
def test_a_metric_is_a_number(tmp_path, publish, value):
    support.write_run(tmp_path / "runs", 0, metrics={"loss": value})
    with pytest.raises(InputError, match=r"the metric loss is .*numbers only"):
        publish()


@pytest.mark.parametrize(
    ("preset", "complaint"),
    [
        ("cpu+epochs=2", "was overridden"),
        ("smoke", "only shows that a unit runs"),
        ("full", f"no finished run in .*: run python -m course.{NAME} --preset full"),
    ],
)
def test_what_cannot_stand_for_a_result_is_refused(tmp_path, publish, preset, complaint):
    for there in ("cpu", "smoke", "cpu+epochs=2"):
        support.write_run(tmp_path / "runs", 0, there)
    with pytest.raises(InputError, match=complaint):
        publish(preset)


def test_a_damaged_run_is_named(tmp_path, publish):
    folder = support.write_run(tmp_path / "runs", 0)
    (folder / "result.json").write_text('{"unit": ')
    with pytest.raises(InputError, match=r"cpu-s0/result\.json is damaged"):
        publish()


def test_an_interrupted_seed_is_passed_over(tmp_path, publish):
    support.write_run(tmp_path / "runs", 0)
    (support.write_run(tmp_path / "runs", 1) / "result.json").unlink()
    assert publish()["presets"]["cpu"]["seeds"] == [0]


def test_presets_are_kept_beside_each_other(tmp_path, publish):
    support.write_run(tmp_path / "runs", 0, "full")
    support.write_run(tmp_path / "runs", 0, "cpu")
    full = publish("full")["presets"]["full"]
    content = publish("cpu")
    assert list(content["presets"]) == ["cpu", "full"]  # the default leads
    assert content["presets"]["full"] == full
    assert full["figures"] == [f"{NAME}.full-curves.png"]
    assert {path.name for path in (tmp_path / "results").glob("*.png")} == {
        f"{NAME}-curves.png",
        f"{NAME}.full-curves.png",
    }


def test_figures_are_of_the_lowest_seed_and_stale_ones_go(tmp_path, publish):
    folder = support.write_run(tmp_path / "runs", 0, figures=["curves.png", "old.png"])
    support.write_run(tmp_path / "runs", 1, figures=["curves.png", "old.png"])
    Image.new("RGB", (40, 30), "red").save(folder / "figures" / "curves.png")
    assert publish()["presets"]["cpu"]["figures"] == [f"{NAME}-curves.png", f"{NAME}-old.png"]
    with Image.open(tmp_path / "results" / f"{NAME}-curves.png") as picture:
        assert picture.size == (40, 30)
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "results" / "day91_other-old.png").touch()  # of another unit
    for seed in (0, 1):
        support.write_run(tmp_path / "runs", seed)
    publish()
    names = {path.name for path in (tmp_path / "results").glob("*.png")}
    assert names == {f"{NAME}-curves.png", "day91_other-old.png"}


@pytest.mark.parametrize("size", [(1400, 700), (500, 500), (100, 50)])
def test_figures_are_small_enough_to_commit(tmp_path, publish, size):
    support.write_run(tmp_path / "runs", 0, size=size)
    publish()
    path = tmp_path / "results" / f"{NAME}-curves.png"
    assert path.stat().st_size <= report.FIGURE_BYTES
    with Image.open(path) as picture:
        assert picture.width <= report.FIGURE_WIDTH
        assert picture.width / picture.height == pytest.approx(size[0] / size[1], rel=0.02)  # whole pixels


def test_a_missing_figure_leaves_what_was_published(tmp_path, publish):
    folder = support.write_run(tmp_path / "runs", 0)
    before = publish()
    support.write_run(tmp_path / "runs", 0, metrics={"other": 1.0}, figures=["curves.png", "new.png"])
    (folder / "figures" / "new.png").unlink()
    with pytest.raises(InputError, match=r"new\.png is missing"):
        publish()
    assert json.loads((tmp_path / "results" / f"{NAME}.json").read_text()) == before
    assert not list((tmp_path / "results").glob(".tmp-*"))


# --- the README ------------------------------------------------------------------------------------------------------

README = "# Title\n\nbefore\n\n<!-- catalogue:begin -->\nold | text\n<!-- catalogue:end -->\n\nafter\n"


def test_readme_block_is_written_and_stays(tmp_path, unit, publish):
    for seed in (0, 1):
        support.write_run(tmp_path / "runs", seed)
    publish()
    text = report.readme_text(README, unit.path.parent, tmp_path / "results")
    assert text.startswith("# Title\n\nbefore\n\n<!-- catalogue:begin -->\n### Advent, days 1 to 30\n")
    assert text.endswith("|\n<!-- catalogue:end -->\n\nafter\n")
    assert "old | text" not in text
    row = next(line for line in text.splitlines() if NAME in line)
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    assert cells[:6] == [
        f"[`{NAME}`](course/{NAME}.py)",
        "Three lines show the shape of three hundred.",
        "mnist, 60,000 to train on",
        "test_error **1.50 ± 0.71 %**<br>parameters **7,850**<br>check **1e-09**<br>(cpu, 2 seeds)",
        "test_error 0.25 % (Doe and Roe 2017, Table 1, MNIST)",
        "2 min",
    ]
    assert cells[6] == catalogue.colab_badge(NAME)
    assert report.readme_text(text, unit.path.parent, tmp_path / "results") == text


def test_readme_without_a_record_or_with_other_data(tmp_path, unit, publish):
    text = report.readme_text(README, unit.path.parent, tmp_path / "results")
    assert "| none recorded |" in text
    support.write_run(tmp_path / "runs", 0, data=support.DATA | {"note": "5,000 of 60,000 training images"})
    publish()
    text = report.readme_text(README, unit.path.parent, tmp_path / "results")
    assert "Doe and Roe" not in text


def test_readme_cells_cannot_break_the_table(tmp_path, unit):
    unit.path.write_text(unit.source.replace("three lines show", "P(a|b) <i> shows"))
    assert r" | P(a\|b) &lt;i> shows the shape" in report.readme_text(README, unit.path.parent, tmp_path)


def test_readme_without_the_block_is_refused(unit, tmp_path):
    with pytest.raises(InputError, match=r"README\.md has no lines"):
        report.readme_text("# Title\n", unit.path.parent, tmp_path)
    with pytest.raises(InputError, match="a block list, which nothing makes: the blocks known are catalogue"):
        report.readme_text(README.replace("catalogue", "list"), unit.path.parent, tmp_path)


def test_readme_check_tells_drift(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(README)
    with pytest.raises(SystemExit) as stop:
        report.main(["readme", "--check"])
    assert stop.value.code == 1
    assert (tmp_path / "README.md").read_text() == README
    report.main(["readme"])
    report.main(["readme", "--check"])
    assert [line for line in capsys.readouterr().out.splitlines() if line] == [
        "README.md is stale: run python -m course.core.report readme",
        "README.md written",
    ]


def test_films_are_committed_as_they_are_if_they_are_small(tmp_path, publish):
    folder = support.write_run(tmp_path / "runs", 0, figures=["curves.png", "drive.gif"])
    film = folder / "figures" / "drive.gif"
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    frames[0].save(film, save_all=True, append_images=frames[1:])
    assert publish()["presets"]["cpu"]["figures"] == [f"{NAME}-curves.png", f"{NAME}-drive.gif"]
    assert (tmp_path / "results" / f"{NAME}-drive.gif").read_bytes() == film.read_bytes()
    film.write_bytes(bytes(report.FILM_BYTES + 1))
    with pytest.raises(InputError, match=r"drive\.gif has more than 400,000 bytes"):
        publish()


def test_the_readme_is_not_stale():
    text = (catalogue.ROOT / "README.md").read_text()
    assert report.readme_text(text) == text, "run python -m course.core.report readme"


def test_committed_results_are_of_units_and_their_figures_are_there():
    names = {unit.name for unit in catalogue.units()}
    figures = set()
    for path in catalogue.RESULTS.glob("*.json"):
        assert path.stem in names, f"{path} is of no unit"
        for preset, record in catalogue.recorded(path.stem).items():
            assert preset in catalogue.find(path.stem, catalogue.units()).presets
            figures |= set(record["figures"])
    most = {".png": report.FIGURE_BYTES, ".gif": report.FILM_BYTES}
    pictures = {path.name: path.stat().st_size for path in catalogue.RESULTS.iterdir() if path.suffix in most}
    assert set(pictures) == figures
    assert all(size <= most[Path(name).suffix] for name, size in pictures.items())


def test_committed_means_are_those_of_their_seeds():
    for path in catalogue.RESULTS.glob("*.json"):
        for record in catalogue.recorded(path.stem).values():
            for metric in record["metrics"].values():
                values = list(metric["values"].values())
                assert metric["n"] == len(values) == len(record["seeds"])
                if metric["mean"] is not None:
                    assert metric["mean"] == pytest.approx(statistics.fmean(values), rel=1e-12, abs=1e-300)


# --- replay ----------------------------------------------------------------------------------------------------------


def test_seed_command():
    words = report.seed_command("python -m course.day90 --preset cpu --seed 0", 4)
    assert words == ["python", "-m", "course.day90", "--preset", "cpu", "--seed", "4"]


@pytest.mark.parametrize(
    ("values", "replayed", "verdict"),
    [
        ([1.0, 2.0, 3.0], 4.9, "agrees"),  # mean 2, deviation 1: up to 5
        ([1.0, 2.0, 3.0], 5.1, "differs"),
        ([100.0], 100.9, "agrees"),  # one seed: 1 %
        ([100.0], 101.1, "differs"),
        ([0.0, 0.0], 9e-6, "agrees"),  # alike: 1e-5
        ([0.0, 0.0], 2e-5, "differs"),
        ([None], None, "agrees"),
        ([None], 1.0, "differs"),
        ([1.0], None, "differs"),
    ],
)
def test_compare(values, replayed, verdict):
    recorded = {"loss": report.summary({str(i): value for i, value in enumerate(values)})}
    ((name, _, value, _, found),) = report.compare(recorded, {"loss": replayed})
    assert (name, value, found) == ("loss", replayed, verdict)


def test_compare_does_not_judge_time_and_misses_no_metric():
    recorded = {name: report.summary({"0": 1.0}) for name in ("step_ms", "train_seconds", "gone", "forms")}
    rows = report.compare(recorded, {"step_ms": 9.0, "train_seconds": 9.0, "forms": 9.0, "new": 1.0})
    verdicts = {name: verdict for name, *_, verdict in rows}
    assert verdicts == {
        "step_ms": "not judged",
        "train_seconds": "not judged",
        "gone": "differs",
        "forms": "differs",
        "new": "differs",
    }


@pytest.fixture
def replayable(tmp_path, unit, publish, monkeypatch):
    """A checkout in tmp_path whose unit, run as a command, writes the metrics of `answer.json`."""
    (tmp_path / "course" / "__init__.py").touch()
    unit.path.write_text(
        "import json, pathlib, sys\n"
        "words = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "metrics = json.loads(pathlib.Path('answer.json').read_text())[words['--seed']]\n"
        f"folder = pathlib.Path(words['--runs'], '{NAME}', f\"{{words['--preset']}}-s{{words['--seed']}}\")\n"
        "folder.mkdir(parents=True)\n"
        "(folder / 'result.json').write_text(json.dumps({'metrics': metrics}))\n"
    )
    for seed in (0, 1):
        support.write_run(tmp_path / "runs", seed, metrics={"loss": 1.0 + seed})  # 1.5 +- 0.71
    publish()
    monkeypatch.setattr(catalogue, "ROOT", tmp_path)

    def replay(answers, **options):
        (tmp_path / "answer.json").write_text(json.dumps(answers))
        rows = report.replay(NAME, results=tmp_path / "results", **options)
        return {seed: [verdict for *_, verdict in table] for seed, table in rows.items()}

    return replay


def test_replay_runs_the_recorded_command(replayable):
    assert replayable({"0": {"loss": 1.2}}) == {0: ["agrees"]}
    assert replayable({"0": {"loss": 4.2}, "1": {"loss": 1.0}}, seeds=(0, 1)) == {0: ["differs"], 1: ["agrees"]}


def test_replay_tells_what_is_not_recorded_and_what_fails(replayable):
    with pytest.raises(InputError, match=f"nothing is recorded for {NAME} under full: there is cpu"):
        replayable({}, preset="full")
    with pytest.raises(InputError, match=r"--seed 7 --runs .* ended with status 1"):
        replayable({}, seeds=(7,))


def test_replay_command_exits_with_1_where_a_metric_differs(replayable, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(catalogue, "units", lambda: [catalogue.Unit(NAME, tmp_path, "", "", {})])
    where = dataclasses.make_dataclass(
        "Config", [("seed", int, 0), ("port", int, dataclasses.field(default=8501, metadata={"where": True}))]
    )
    monkeypatch.setattr(catalogue.Unit, "outline", types.SimpleNamespace(Config=where))
    rows = [("loss", report.summary({"0": 1.0}), 2.0, 0.01, "differs")]
    sent = []
    monkeypatch.setattr(report, "replay", lambda *words: sent.append(words) or {0: rows})
    with pytest.raises(SystemExit) as stop:
        report.main(["replay", NAME])
    assert stop.value.code == 1
    assert "1 metrics differ" in capsys.readouterr().out
    monkeypatch.setattr(report, "replay", lambda *words: {0: [(*rows[0][:-1], "agrees")]})
    report.main(["replay", NAME])
    assert "every judged metric falls within" in capsys.readouterr().out
    assert report.elsewhere(sent[0][-1], "thrown_away") == ["--port", "0"]  # never the user's own


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "Expected one of"),
        (["publish"], "Missing|required"),
        (["publish", "day999"], "there is no unit 'day999'"),
        (["reedme"], "reedme"),
    ],
)
def test_a_command_that_cannot_be_read_is_one_line(words, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        report.main(words)
    assert "\n" not in str(caught.value)


def test_publish_command(tmp_path, unit, monkeypatch, capsys):
    support.write_run(tmp_path / "runs", 0, commit=None)
    monkeypatch.setattr(catalogue, "units", lambda: [unit])
    results = tmp_path / "results"
    publish = report.publish
    monkeypatch.setattr(report, "publish", lambda *words: publish(*words, results=results))
    report.main(["publish", "day90", "--runs", str(tmp_path / "runs")])
    out = capsys.readouterr().out
    assert "uncommitted code (commit None)" in out
    assert f"course/results/{NAME}.json: cpu, seeds 0" in out
    assert (results / f"{NAME}.json").exists()
    shutil.rmtree(results)
