"""The pipeline's steps: what they refuse, what they keep, and what a kill leaves behind."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from course.core import InputError, files
from serving import client, pictures, pipeline

ROOT = Path(__file__).parents[1]


def picture(path, seed, *, grey=True, side=20, shift=0):
    """A PNG of noise, its own for every seed."""
    import cv2

    shape = (side, side) if grey else (side, side, 3)
    noise = np.random.default_rng(seed).integers(0, 100, shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), (noise + shift).astype(np.uint8))


@pytest.fixture
def source(tmp_path):
    """Two classes of 20 grey pictures, the second one brighter."""
    for k, name in enumerate(("cat", "dog")):
        for i in range(20):
            picture(tmp_path / "raw" / name / f"{i:03d}.png", 100 * k + i, shift=100 * k)
    return tmp_path / "raw"


def ingest(source, name="examples", **options):
    folder = source.parent / name
    return folder, pictures.ingest(source, folder, **({"seed": 0} | options))


# --- ExampleGen ------------------------------------------------------------------------------------------------------


def test_every_picture_lands_in_one_split_and_comes_back_as_it_was(source):
    folder, manifest = ingest(source)
    assert manifest["labels"] == ["cat", "dog"]
    assert sum(manifest["examples"].values()) == 40
    assert 2 <= manifest["examples"]["val"] <= 10  # a tenth of 40 by chance, at least one of each class
    assert 2 <= manifest["examples"]["test"] <= 14
    seen = []
    for name in pictures.SPLITS:
        part = pictures.read(folder, name)
        stored = list(pictures.contents(part).as_numpy_iterator())
        for content, filename, label in zip(stored, part.filename, part.label, strict=True):
            assert content == (source / filename).read_bytes()
            assert manifest["labels"][label] == filename.split("/")[0]
        seen += part.filename
    assert len(seen) == len(set(seen)) == 40


def test_copies_of_a_picture_never_cross_the_split_whatever_their_format(source):
    import cv2

    for i in range(20):  # the same pixels under other names and in another format
        image = cv2.imread(str(source / "cat" / f"{i:03d}.png"), cv2.IMREAD_GRAYSCALE)
        cv2.imwrite(str(source / "cat" / f"copy{i}.bmp"), image)
    folder, manifest = ingest(source)
    assert sum(manifest["examples"].values()) == 40
    assert [anomaly["text"] for anomaly in manifest["anomalies"]] == ["20 copies of a picture were left out"]
    hashes = [set(pictures.read(folder, name).filename) for name in pictures.SPLITS]
    stems = [
        {Path(name).stem.removeprefix("copy").lstrip("0") or "0" for name in part if "cat" in name} for part in hashes
    ]
    assert not (stems[0] & stems[1] or stems[0] & stems[2] or stems[1] & stems[2])


def test_no_picture_moves_from_training_to_test_when_pictures_are_added(source):
    def split(name, seed):
        folder, _ = ingest(source, f"{name}{seed}", seed=seed)
        return {name: set(pictures.read(folder, name).filename) for name in pictures.SPLITS}

    before = [split("few", seed) for seed in range(12)]
    for i in range(20, 60):
        picture(source / "cat" / f"{i:03d}.png", 1000 + i)
    for seed, old in enumerate(before):
        assert not old["train"] & split("more", seed)["test"]


def test_one_picture_under_two_labels_is_reported_and_kept_under_none(source):
    content = (source / "cat" / "000.png").read_bytes()
    (source / "dog" / "same.png").write_bytes(content)
    folder, manifest = ingest(source)
    assert [anomaly["anomaly"] for anomaly in manifest["anomalies"]] == ["LABEL_CONFLICT"]
    names = [name for split in pictures.SPLITS for name in pictures.read(folder, split).filename]
    assert not {"cat/000.png", "dog/same.png"} & set(names)


def test_a_given_test_part_is_kept_and_its_copies_leave_training(tmp_path):
    for part, count, start in (("train", 12, 0), ("test", 5, 500)):
        for k, name in enumerate(("cat", "dog")):
            for i in range(count):
                picture(tmp_path / "raw" / part / name / f"{i}.png", start + 100 * k + i)
    picture(tmp_path / "raw" / "train" / "cat" / "leak.png", 500)  # as test/cat/0.png
    folder, manifest = ingest(tmp_path / "raw")
    assert manifest["examples"]["test"] == 10
    assert sum(manifest["examples"].values()) == 34
    assert "cat/leak.png" not in pictures.read(folder, "train").filename


def test_a_corrupt_picture_stops_with_its_name_and_leaves_nothing(source):
    broken = source / "cat" / "007.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(InputError, match=r"cat/007\.png cannot be decoded .*--skip-corrupt"):
        ingest(source)
    assert [path.name for path in source.parent.iterdir()] == ["raw"]
    _, manifest = ingest(source, skip_corrupt=True)
    assert sum(manifest["examples"].values()) == 39
    assert manifest["anomalies"][0]["anomaly"] == "CORRUPT_IMAGE"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda raw: (raw / "owl").mkdir(), "class owl is empty"),
        (lambda raw: [path.unlink() for path in (raw / "dog").iterdir()], "class dog is empty"),
        (lambda raw: [path.unlink() for path in (raw / "dog").iterdir()] and (raw / "dog").rmdir(), "fewer than two"),
    ],
)
def test_folders_that_cannot_be_learned_from_are_refused(source, spoil, said):
    spoil(source)
    with pytest.raises(InputError, match=said):
        ingest(source)
    assert not (source.parent / "examples").exists()


@pytest.mark.parametrize("other", ["val", "cat"])
def test_a_folder_that_is_divided_in_part_is_refused(source, other):
    (source / "train").mkdir()
    for name in ("cat", "dog"):
        (source / name).rename(source / "train" / name)
    (source / other).mkdir()
    with pytest.raises(InputError, match=f"holds train/ and {other}"):
        ingest(source)


def test_notes_of_other_programs_are_not_pictures_and_a_broken_link_is_one_line(source):
    (source / "cat" / "._000.png").write_bytes(b"finder")
    (source / "__MACOSX").mkdir()
    picture(source / "cat" / ".thumbnails" / "new.png", 9000)
    _, manifest = ingest(source)
    assert sum(manifest["examples"].values()) == 40
    (source / "cat" / "gone.png").symlink_to(source / "nowhere.png")
    with pytest.raises(InputError, match=r"gone\.png cannot be decoded"):
        ingest(source, "again")


def test_a_name_that_is_not_text_is_one_line(source):
    (source / "cat" / "000.png").rename(os.fsdecode(os.fsencode(source / "cat") + b"/\xff.png"))
    with pytest.raises(InputError, match="not readable text"):
        ingest(source)


def test_names_of_models_tell_folders_apart(tmp_path):
    assert pipeline.model_name("day25", tmp_path / "My Pets") == "day25_my_pets"
    names = [
        pipeline.model_name("day25", tmp_path / name) for name in ("vision_pipeline", "фото", "снимки", "pets_lite")
    ]
    assert len(set(names)) == 4
    assert all(re.fullmatch(r"day25_[a-z0-9_]*[0-9a-f]{6}", name) for name in names)


def test_a_change_of_the_pictures_or_of_the_exports_is_seen(source):
    first = pipeline.inputs(source, "exports")
    assert pipeline.inputs(source, "exports") == first
    assert pipeline.inputs(source, "elsewhere") != first
    picture(source / "cat" / "new.png", 7)
    assert pipeline.inputs(source, "exports") != first


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        pictures.ingest(tmp_path / "nowhere", tmp_path / "examples", seed=0)


def test_a_damaged_shard_is_found_by_its_checksum(source):
    folder, _ = ingest(source)
    (shard,) = folder.glob("val-*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        pictures.read(folder, "val")


def test_pixels_are_fitted_as_the_served_graph_fits_them(source):
    folder, _ = ingest(source)
    part = pictures.read(folder, "train")
    same = pictures.pixels(part, (20, 20, 1))
    assert same.shape == (len(part.label), 20, 20, 1)
    assert part.brightness[0] == pytest.approx(same[0].mean(), abs=1e-3)
    assert pictures.pixels(part, (16, 24, 3), count=2).shape == (2, 16, 24, 3)


# --- statistics, schema, anomalies -----------------------------------------------------------------------------------


def test_a_schema_accepts_the_data_it_was_inferred_from_and_names_what_differs(source):
    folder, manifest = ingest(source)
    found = pipeline.statistics(pictures.read(folder, "train"), manifest["labels"])
    schema = pipeline.infer_schema(found)
    assert pipeline.validate(found, schema) == []

    other = json.loads(json.dumps(found))
    other["classes"] = {"cat": 28, "owl": 2}
    other["formats"] = {"gif": 30}
    other["channels"] = 3
    other["side"] = {"min": 2, "median": 20, "max": 20}
    other["brightness"]["histogram"] = found["brightness"]["histogram"][::-1]
    named = {anomaly["anomaly"]: anomaly["severity"] for anomaly in pipeline.validate(other, schema)}
    assert named == {
        "UNEXPECTED_LABEL": "error", "MISSING_LABEL": "error", "UNEXPECTED_CHANNELS": "error",
        "UNEXPECTED_FORMAT": "warning", "SIZE_OUT_OF_DOMAIN": "warning", "CLASS_SKEW": "warning",
        "BRIGHTNESS_DRIFT": "warning",
    }  # fmt: skip
    with pytest.raises(InputError, match="owl is not in the schema"):
        pipeline.verdict_on(pipeline.validate(other, schema))


# --- Evaluator -------------------------------------------------------------------------------------------------------


class Split:
    """As much of `Examples` as the Evaluator reads."""

    label = np.array([0, 0, 1, 1])
    brightness = np.array([10.0, 20.0, 30.0, 40.0])


def test_metrics_against_values_worked_by_hand():
    found = pipeline.evaluate(np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7]]), Split, ["a", "b"])
    assert found["accuracy"] == 0.75
    assert found["confusion"] == [[1, 1], [0, 2]]
    assert found["cross_entropy"] == pytest.approx(-np.log([0.9, 0.4, 0.8, 0.7]).mean())
    assert found["slices"]["class=a"] == {"accuracy": 0.5, "examples": 2}
    assert found["slices"]["brightness=dark quarter"] == {"accuracy": 0.0, "examples": 1}
    # four bins with one example each: |1-.9|, |0-.6|, |1-.8|, |1-.7|, a quarter each
    assert found["calibration_error"] == pytest.approx((0.1 + 0.6 + 0.2 + 0.3) / 4)


def test_wilsons_interval():
    low, high = pipeline.wilson(8, 10)  # Newcombe 1998's formula, worked out: (0.4902, 0.9433)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert pipeline.wilson(10, 10)[1] == pytest.approx(1)


def metrics(accuracy, **slices):
    return {
        "accuracy": accuracy,
        "slices": {name: {"accuracy": value, "examples": 100} for name, value in slices.items()},
    }


@pytest.mark.parametrize(
    ("candidate", "baseline", "verdict"),
    [
        (metrics(0.90), None, "BLESSED"),  # the first version: only the floor counts
        (metrics(0.10), None, "NOT_BLESSED"),
        (metrics(0.50), None, "NOT_BLESSED"),  # no better than always saying the commonest class
        (metrics(0.90), metrics(0.905), "BLESSED"),
        (metrics(0.90), metrics(0.92), "NOT_BLESSED"),
        (metrics(0.95, a=0.6), metrics(0.92, a=0.9), "NOT_BLESSED"),  # better on the whole, useless on a slice
        (metrics(float("nan")), None, "NOT_BLESSED"),
    ],
)
def test_blessing(candidate, baseline, verdict):
    answer = pipeline.bless(candidate, baseline, floor=0.5, max_drop=0.01, max_slice_drop=0.1)
    assert answer["verdict"] == verdict
    assert bool(answer["reasons"]) == (verdict == "NOT_BLESSED")


# --- Pusher ----------------------------------------------------------------------------------------------------------


def version_folder(path, content="weights"):
    (path / "variables").mkdir(parents=True)
    (path / "saved_model.pb").write_text("graph")
    (path / "variables" / "data").write_text(content)
    return path


def test_push_and_roll_back(tmp_path):
    base = tmp_path / "exports" / "model"
    for number in (5, 12):
        pipeline.push(version_folder(tmp_path / "made" / str(number)), base)
    assert pipeline.versions(base) == [5, 12]
    pipeline.push(tmp_path / "made" / "12", base)  # again, as after a kill: no harm
    assert pipeline.versions(base) == [5, 12]
    assert pipeline.roll_back(base) == (12, 5)
    assert pipeline.versions(base) == [5]
    with pytest.raises(InputError, match="none to roll back to"):
        pipeline.main(["roll-back", str(base)])
    with pytest.raises(InputError, match="no pushed version"):
        pipeline.main(["roll-back", str(tmp_path / "typo")])
    assert not (tmp_path / "typo").exists()


def test_a_withdrawn_version_comes_back(tmp_path, capsys):
    base = tmp_path / "exports" / "model"
    for number in (5, 12, 13):
        pipeline.push(version_folder(tmp_path / "made" / str(number), f"weights {number}"), base)
    with pytest.raises(InputError, match="has no withdrawn version"):
        pipeline.main(["restore", str(base)])
    pipeline.main(["roll-back", str(base)])
    pipeline.main(["roll-back", str(base)])
    assert pipeline.versions(base) == [5]
    capsys.readouterr()
    pipeline.main(["versions", str(base)])
    assert capsys.readouterr().out == f"{base} (12, 13 withdrawn): 5\n"
    with pytest.raises(InputError, match=r"has not withdrawn version 7 \(but 12, 13\)"):
        pipeline.main(["restore", str(base), "--version", "7"])
    pipeline.main(["restore", str(base)])  # the newest
    assert pipeline.versions(base) == [5, 13]
    pipeline.main(["restore", str(base), "--version", "12"])
    assert pipeline.versions(base) == [5, 12, 13]
    assert (base / "12" / "variables" / "data").read_text() == "weights 12"
    assert pipeline.withdrawn(base) == {}
    # withdrawn, pushed again under its number, withdrawn again: the later one is what comes back
    pipeline.roll_back(base)
    pipeline.push(version_folder(tmp_path / "again" / "13", "newer weights"), base)
    with pytest.raises(InputError, match="holds a version 13 already"):
        pipeline.restore(base)
    pipeline.roll_back(base)
    assert pipeline.restore(base) == 13
    assert (base / "13" / "variables" / "data").read_text() == "newer weights"


def test_twins_go_back_together_or_not_at_all(tmp_path):
    bases = [tmp_path / "exports" / name for name in ("model", "model_lite")]
    for base, numbers in zip(bases, ((5, 12), (5, 12)), strict=True):
        for number in numbers:
            pipeline.push(version_folder(tmp_path / base.name / str(number)), base)
    assert pipeline.roll_back(*bases) == (12, 5)
    with pytest.raises(InputError, match=r"holds 1 version\(s\): there is none to roll back to"):
        pipeline.roll_back(*bases)
    assert pipeline.restore(*bases) == 12
    assert [pipeline.versions(base) for base in bases] == [[5, 12], [5, 12]]
    pipeline.push(version_folder(tmp_path / "model_lite" / "13"), bases[1])
    with pytest.raises(InputError, match="the two newest versions differ"):
        pipeline.main(["roll-back", *map(str, bases)])
    assert [pipeline.versions(base) for base in bases] == [[5, 12], [5, 12, 13]]
    pipeline.roll_back(bases[1])
    with pytest.raises(InputError, match="has no withdrawn version"):
        pipeline.restore(*bases)
    assert [pipeline.versions(base) for base in bases] == [[5, 12], [5, 12]]


def test_a_running_server_says_which_version_serves_now(tmp_path, capsys):
    from serving.server import serve
    from tests import serving_models

    base = tmp_path / "exports" / "half_plus"
    serving_models.save_versions(tmp_path / "made", 2)
    for number in (1, 2):
        pipeline.push(tmp_path / "made" / str(number), base)
    with serve("half_plus", base, file_system_poll_wait_seconds=0.1) as server:
        server.wait_available(2)
        pipeline.main(["roll-back", str(base), "--url", server.url])
        assert capsys.readouterr().out == f"{base}: version 2 is withdrawn; 1 serves at {server.url}\n"
        pipeline.main(["restore", str(base), "--url", server.url])
        assert capsys.readouterr().out == f"{base}: version 2 is back; 2 serves at {server.url}\n"
    with serve("half_plus", base, file_system_poll_wait_seconds=0) as server:  # never looks again
        server.wait_available(2)
        with pytest.raises(InputError, match=r"version 2 is not withdrawn: after \d\.\d s .* serves 2 and not 1"):
            pipeline.main(["roll-back", str(base), "--url", server.url, "--timeout", "0.3"])
        assert pipeline.versions(base) == [1, 2]
        other = tmp_path / "elsewhere"
        base.rename(other)  # the server has it under another name than the folder's
        words = ["roll-back", str(other), "--url", server.url, "--timeout", "0.3"]
        with pytest.raises(InputError, match="serves 2 and not 1"):
            pipeline.main([*words, "--model", "half_plus"])
        with pytest.raises(InputError, match=r"serves nothing .*elsewhere"):
            pipeline.main(words)
        shutil.copytree(other, tmp_path / "twin")
        with pytest.raises(InputError, match="--model goes with one folder"):
            pipeline.main(["roll-back", str(other), str(tmp_path / "twin"), *words[2:], "--model", "half_plus"])
        with pytest.raises(InputError, match=r"'http://127\.0\.0\.1:abc' is no address of a server"):
            pipeline.main(["roll-back", str(other), "--url", "http://127.0.0.1:abc"])
        assert pipeline.versions(other) == [1, 2]


def test_where_older_versions_serve_on_the_highest_is_waited_for(tmp_path, capsys):
    from serving.server import serve
    from tests import serving_models

    base = tmp_path / "exports" / "half_plus"
    serving_models.save_versions(tmp_path / "made", 2)
    for number in (1, 2):
        pipeline.push(tmp_path / "made" / str(number), base)
    config = tmp_path / "models.config"
    text = pipeline.models_config({"half_plus": base})
    config.write_text(text.replace("model_platform", "model_version_policy { all {} } model_platform"))
    with serve("half_plus", model_config_file=config, file_system_poll_wait_seconds=0.1) as server:
        server.wait_available(2)
        pipeline.main(["roll-back", str(base), "--url", server.url])
        pipeline.main(["restore", str(base), "--url", server.url])
        assert capsys.readouterr().out.splitlines()[-1] == f"{base}: version 2 is back; 2 serves at {server.url}"
        with client.Client(server.url, model="half_plus") as asked:
            assert asked.available() == [1, 2]


def test_one_folder_in_two_spellings_goes_back_once(tmp_path, monkeypatch):
    base = tmp_path / "exports" / "model"
    for number in (5, 12):
        pipeline.push(version_folder(tmp_path / "made" / str(number)), base)
    monkeypatch.chdir(tmp_path)
    assert pipeline.roll_back(base, str(base), "exports/model") == (12, 5)
    assert pipeline.restore(base, "exports/model") == 12
    assert pipeline.versions(base) == [5, 12]


def test_other_names_in_a_models_folder_are_passed_over(tmp_path):
    base = tmp_path / "model"
    pipeline.push(version_folder(tmp_path / "made" / "12"), base)
    for name in ("00000123", "١٢", "withdrawn-7", "withdrawn-7-x", "withdrawn-8-100"):
        (base / name).mkdir()
    assert pipeline.versions(base) == [12]
    assert pipeline.withdrawn(base) == {8: base / "withdrawn-8-100"}
    assert pipeline.restore(base) == 8


def test_a_version_without_a_schema_is_one_line(tmp_path):
    assert pipeline.schema_of(tmp_path / "model") is None
    pipeline.push(version_folder(tmp_path / "made" / "12"), tmp_path / "model")
    with pytest.raises(InputError, match=r"12/assets\.extra/schema\.json is missing or damaged: roll it back"):
        pipeline.schema_of(tmp_path / "model")


@pytest.mark.parametrize("command", ["versions", "roll-back", "restore", "canary", "drift", "warm-up"])
def test_every_command_tells_of_itself_without_a_folder(command, capsys):
    with contextlib.suppress(SystemExit):
        pipeline.main([command, "--help"])
    out = capsys.readouterr().out
    assert command in out
    assert ("--timeout" in out) == (command in ("roll-back", "restore", "canary"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "usage: "),
        (["rollback", "exports/m"], "usage: "),
        (["versions"], "usage: "),
        (["versions", "exports/m", "--all"], "--all is not known"),
        (["roll-back", "exports/m", "--ulr", "x"], "--ulr"),
        (["warm-up", "exports/m"], "say where the requests are logged"),
    ],
)
def test_what_the_command_does_not_know_is_one_line(words, said):
    with pytest.raises(InputError, match=said):
        pipeline.main(words)


def test_kill_9_in_a_push_leaves_no_version_and_the_next_push_makes_it(tmp_path):
    made, base = version_folder(tmp_path / "made" / "7"), tmp_path / "model"
    code = f"""
        import os, shutil, signal
        from serving import pipeline
        def half(source, target, **options):
            shutil.copy(source / "saved_model.pb", target)
            os.kill(os.getpid(), signal.SIGKILL)
        shutil.copytree = half
        pipeline.push({str(made)!r}, {str(base)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=os.environ, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert pipeline.versions(base) == []
    assert [path for path in base.iterdir() if path.name.startswith(files.TEMPORARY)]
    pipeline.push(made, base)
    assert pipeline.versions(base) == [7]
    assert not [path for path in base.iterdir() if path.name.startswith(files.TEMPORARY)]
    assert (base / "7" / "variables" / "data").read_text() == "weights"


def test_an_unwritable_exports_folder_is_bad_input(tmp_path):
    (tmp_path / "exports").write_text("a file in the way")
    with pytest.raises(InputError, match="cannot write in the folder"):
        pipeline.push(version_folder(tmp_path / "made" / "7"), tmp_path / "exports" / "model")


def test_models_config_is_what_the_stock_server_parses(tmp_path):
    from google.protobuf import text_format
    from tensorflow_serving.config import model_server_config_pb2

    text = pipeline.models_config({"a": tmp_path / "a", "b": tmp_path / "b"}, {"b": tmp_path / "log"})
    parsed = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    assert [(entry.name, entry.base_path) for entry in parsed.model_config_list.config] == [
        ("a", str(tmp_path / "a")), ("b", str(tmp_path / "b"))
    ]  # fmt: skip
    assert [entry.HasField("logging_config") for entry in parsed.model_config_list.config] == [False, True]
    assert parsed.model_config_list.config[1].logging_config.log_collector_config.filename_prefix == str(
        tmp_path / "log"
    )
