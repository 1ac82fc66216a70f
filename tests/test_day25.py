"""The main job from end to end on the smoke preset: pushed, refused, killed, resumed, and asked over the wire."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import gradio
import psutil
import pytest
from gradio.data_classes import ImageData
from PIL import Image

from course import core
from course import day25_vision_pipeline as unit
from serving import client, demos, pipeline

pytestmark = pytest.mark.smoke
ROOT = Path(__file__).parents[1]


def words(folder, *more):
    return ["--preset", "smoke", "--runs", str(folder / "runs"), "--exports", str(folder / "exports"),
            "--rest-port", "0", "--grpc-port", "0", *more]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("day25")


@pytest.fixture(scope="module")
def pushed(folder):
    return unit.main(words(folder))


def says(record, component):
    return next(row["says"] for row in record["tables"]["lineage"] if row["component"] == component)


def test_every_component_ran_in_order(pushed):
    assert [row["component"] for row in pushed["tables"]["lineage"]] == [
        "ExampleGen", "StatisticsGen", "SchemaGen", "ExampleValidator", "Tuner", "Trainer", "Compressor", "Exporter",
        "Evaluator", "InfraValidator", "Pusher", "Rehearsal", "Endpoint", "DriftMonitor", "DriftRehearsal",
    ]  # fmt: skip
    assert says(pushed, "Evaluator").startswith("BLESSED")
    assert says(pushed, "InfraValidator").startswith("INFRA_BLESSED")
    assert "would be NOT_BLESSED" in says(pushed, "Rehearsal")
    assert says(pushed, "DriftMonitor") == "NO_DRIFT: 6 of 6 features judged, by 677 logged requests"
    assert re.match(r"DRIFT: in brightness\b.*, by 256 logged requests", says(pushed, "DriftRehearsal"))
    assert "drift.png" in pushed["figures"]
    assert pushed["data"]["name"] == "fashion_mnist_12k"
    assert (
        pushed["metrics"]["test_accuracy"] > 0.4
    )  # ten classes, 36 training pictures each, 120 steps of a tiny network


def test_both_models_are_pushed_under_one_number_and_stay_servable(pushed, folder):
    floats, lites = (pipeline.versions(folder / "exports" / name) for name in (unit.UNIT, f"{unit.UNIT}_lite"))
    assert floats == lites
    assert len(floats) == 1
    assert (
        pipeline.infra_validate({unit.UNIT: folder / "exports" / unit.UNIT / str(floats[0])})["verdict"]
        == "INFRA_BLESSED"
    )


def test_a_worse_model_is_refused_and_the_old_version_keeps_serving(pushed, folder):
    before = pipeline.versions(folder / "exports" / unit.UNIT)
    record = unit.main(words(folder, "--worse"))
    assert says(record, "Evaluator").startswith("NOT_BLESSED")
    assert "Pusher" not in [row["component"] for row in record["tables"]["lineage"]]
    assert says(record, "Endpoint").startswith(f"version {before[0]};")
    assert pipeline.versions(folder / "exports" / unit.UNIT) == before
    assert says(record, "SchemaGen") == "of the last version"
    # the last run's dark requests are in the log, but not in the verdict
    assert says(record, "DriftMonitor").startswith("NO_DRIFT")


def test_the_demo_calls_the_endpoint(pushed, folder, monkeypatch):
    base = folder / "exports" / unit.UNIT
    picture = next((folder / "runs").rglob("raw/test/*/*.png")).read_bytes()
    with pipeline.endpoint({unit.UNIT: base}, folder, rest_port=0, grpc_port=0) as endpoint:
        pipeline.wait_available(endpoint, {unit.UNIT: base})
        answer = demos.predictor(endpoint.url, unit.UNIT)(picture)
        assert answer["version"] == pipeline.versions(base)[-1]
        assert len(answer["probabilities"]) == 10
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        tries = demos.examples(folder / "exports", unit.UNIT, folder)
        assert len(tries) == 4
        page = demos.pages({unit.UNIT: unit.UNIT}, endpoint.url, {unit.UNIT: tries})
        assert page.fn(None) == (None, "Choose a picture.")
        probabilities, told = page.fn(tries[0])
        assert re.fullmatch(rf"Version \*\*{answer['version']}\*\* answered in \d+\.\d ms\.", told)
        assert len(probabilities) == 10
        with pytest.raises(gradio.Error, match="400"):
            demos.predictor(endpoint.url, unit.UNIT)(b"not a picture")
        # a version that was unloaded between the look at the status and the request: the next one is asked
        seen = iter([[1], [answer["version"]], [answer["version"]]])
        monkeypatch.setattr(client.Client, "available", lambda self: next(seen))
        assert demos.predictor(endpoint.url, unit.UNIT)(picture) | {"milliseconds": 0} == answer | {"milliseconds": 0}
        monkeypatch.setattr(client.Client, "available", lambda self: [])
        with pytest.raises(gradio.Error, match="no version of day25_vision_pipeline serves"):
            demos.predictor(endpoint.url, unit.UNIT)(picture)


def test_only_what_has_been_pushed_has_a_page(tmp_path):
    (tmp_path / unit.UNIT).mkdir()  # as the endpoint makes it, before a version is there
    with pytest.raises(core.InputError, match="nothing has been pushed"):
        demos.models(demos.Options(exports=str(tmp_path)))
    (tmp_path / "day01_neural_network_from_scratch" / "3").mkdir(parents=True)
    chosen = demos.models(demos.Options(exports=str(tmp_path)))
    assert chosen == {"day01_neural_network_from_scratch": "day01_neural_network_from_scratch"}


@pytest.mark.parametrize(("mode", "name"), [("L", "grey.jpg"), ("L", "grey.png"), ("RGBA", "alpha.png")])
def test_the_page_sends_the_file_as_it_is(tmp_path, mode, name):
    Image.effect_noise((40, 30), 90).convert(mode).save(tmp_path / name)
    page = core.pages.image_classifier(lambda content: None, "title")
    sent = page.input_components[0].preprocess(ImageData(path=str(tmp_path / name), orig_name=name))
    assert Path(sent).read_bytes() == (tmp_path / name).read_bytes()


def test_a_demo_of_what_was_never_pushed_says_what_to_run(tmp_path):
    with pytest.raises(core.InputError, match=r"python -m course\.day25_vision_pipeline first"):
        demos.main(["day25_vision_pipeline", "--exports", str(tmp_path)])


def test_a_taken_port_is_one_line_and_nothing_is_lost(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(core.InputError, match=f"{port}.*taken"):
            unit.main([*words(tmp_path), "--rest-port", port])
    assert pipeline.versions(tmp_path / "exports" / unit.UNIT) == []


@pytest.mark.parametrize("words_for", [["--precision", "mixed_float16"], ["--strategy", "mirrored:2"]])
def test_it_runs_in_16_bits_and_on_two_replicas(tmp_path, words_for):
    """In a process of its own: devices and precision are fixed once."""
    more = ["--limit", "21", "--steps", "60", *words_for]  # an odd number of pictures
    code = f"from course import day25_vision_pipeline as unit; unit.main({words(tmp_path, *more)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(next(tmp_path.rglob("result.json")).read_text())
    assert (record["precision"], record["replicas"]) in [("mixed_float16", 1), ("float32", 2)]
    assert says(record, "InfraValidator").startswith("INFRA_BLESSED")


def start_and_kill(folder, when, patch=""):
    """Run the unit in a process of its own and kill -9 it as soon as `when()` is true, or by its own `patch`."""
    code = f"""
        import os, signal
        {patch}
        from course import day25_vision_pipeline as unit
        unit.main({words(folder, "--steps", "200")!r})
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=os.environ)
    children = []
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        children = psutil.Process(process.pid).children(recursive=True) or children
        if when():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.05)
    assert process.wait(60) == -signal.SIGKILL
    assert children, "the endpoint is a child process"
    psutil.wait_procs(children, timeout=20)
    assert not any(child.is_running() for child in children), "a server outlived the pipeline that had started it"


def test_kill_9_in_training_and_in_the_export_is_continued_by_the_same_command(tmp_path, capsys):
    run = tmp_path / "runs" / unit.UNIT / "smoke+steps=200-s0"
    base = tmp_path / "exports" / unit.UNIT
    start_and_kill(tmp_path, (run / "checkpoints" / "model" / "state.npz").exists)
    assert pipeline.versions(base) == []

    # the SavedModel is written, the folder not yet renamed
    patch = "from course.core import export; export.write_warmup = lambda *words: os.kill(os.getpid(), signal.SIGKILL)"
    start_and_kill(tmp_path, lambda: False, patch)
    assert (run / "stages" / "Trainer.json").exists()
    assert pipeline.versions(base) == []
    trained = json.loads((run / "stages" / "Trainer.json").read_text())

    capsys.readouterr()
    record = unit.main(words(tmp_path, "--steps", "200"))
    assert "going on with the interrupted run" in capsys.readouterr().out
    assert record["history"] == trained["answer"]["history"]  # not trained again
    assert len(pipeline.versions(base)) == 1
