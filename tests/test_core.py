"""Runs, flags, checkpoints and files: what every unit relies on."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from course import core
from course.core import experiment, files, runtime

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass
class Config:
    seed: int = 0
    epochs: int = 4  # passes over the data
    rate: float = 1e-2
    widths: tuple[int, ...] = (8, 4)  # layers
    port: int = dataclasses.field(default=8501, metadata={"where": True})


PRESETS = {"smoke": dict(epochs=2), "cpu": dict(epochs=3), "full": {}}


def parse(*words):
    return core.parse(Config, PRESETS, words)


def child(code, *, check=True, **environment):
    """Run Python code in a process of its own, in the project's root."""
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | environment, check=check, timeout=240)  # fmt: skip


# --- flags -----------------------------------------------------------------------------------------------------------


def test_default_preset_is_cpu():
    options, cfg = parse()
    assert (options.preset, cfg.epochs, cfg.widths) == ("cpu", 3, (8, 4))


def test_an_overridden_preset_loses_its_bare_name_but_seed_and_place_do_not_count():
    assert parse("--preset", "smoke", "--seed", "5", "--port", "9000", "--runs", "x")[0].preset == "smoke"
    assert parse("--preset=full", "--rate", "0.5")[0].preset == "full+rate=0.5"
    assert parse("--precision", "mixed_bfloat16")[0].preset == "cpu+precision=mixed_bfloat16"
    first, second = (parse("--widths", *widths)[0].preset for widths in (["1", "2"], ["1", "3"]))
    assert first != second  # the folder's name tells two settings apart even where it had to be shortened


def test_the_recorded_command_parses_to_the_same_setting():
    options, cfg = parse("--preset", "smoke", "--rate", "0.5", "--widths", "3", "2", "1", "--strategy", "one")
    words = experiment.command("some_unit", options, cfg).split()
    assert words[:3] == ["python", "-m", "course.some_unit"]
    again, same = core.parse(Config, PRESETS, words[3:])
    assert (again.preset, same) == (options.preset, cfg)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "huge"], "--preset huge is not known: choose one of smoke, cpu, full"),
        (["--epoch", "3"], "perhaps --epochs?"),
        (["--epochs", "three"], "invalid literal"),
        (["--epochs", "0"], "--epochs 0 cannot be used: give a number of at least 1"),
        (["--rate", "-1"], "--rate -1.0 cannot be used"),
        (["--rate", "nan"], "--rate nan cannot be used"),
        (["--widths"], "--widths needs at least one value"),
    ],
)
def test_bad_flags_are_one_line(words, said):
    with pytest.raises(core.InputError, match=said.replace("?", r"\?")) as caught:
        parse(*words)
    assert "\n" not in str(caught.value)


def test_bad_input_ends_with_status_2_and_one_line(capsys):
    def main(argv):
        raise core.InputError("the file x is missing:\n  put it there")

    with pytest.raises(SystemExit) as caught:
        core.cli(main, [])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: the file x is missing: put it there\n"


def test_a_mistyped_flag_is_answered_before_tensorflow_is_imported():
    command = [sys.executable, "-X", "importtime", "-m", "course.day25_vision_pipeline", "--step", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "tensorflow" not in done.stderr and "keras" not in done.stderr
    assert any(line.startswith("error: Unrecognized options: --step") for line in done.stderr.splitlines())


def test_a_units_short_name_is_answered_with_the_whole_one():
    done = subprocess.run([sys.executable, "-m", "course.day21"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "python -m course.day21_capsnet" in done.stderr


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_file_is_whole_or_not_there(tmp_path):
    target = tmp_path / "a" / "file.txt"
    files.write_atomic(target, "first")
    with pytest.raises(RuntimeError), files.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "first"
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_killed_half_way_is_swept_and_was_never_there(tmp_path):
    code = f"""
        import os, signal
        from course.core import files
        with files.atomic_folder("{tmp_path}/7") as folder:
            (folder / "saved_model.pb").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert child(code, check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(files.TEMPORARY)
    files.sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_published_folder_is_never_overwritten(tmp_path):
    with files.atomic_folder(tmp_path / "1") as folder:
        (folder / "a").write_text("1")
    with pytest.raises(FileExistsError), files.atomic_folder(tmp_path / "1") as folder:
        (folder / "a").write_text("2")
    assert (tmp_path / "1" / "a").read_text() == "1"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_bad_input(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(core.InputError, match="cannot write in the folder"):
        files.make_folder(tmp_path / "taken" / "below")


# --- runs ------------------------------------------------------------------------------------------------------------


def train(runs, *words, stop=None):
    """A small unit: two dense layers with dropout on data made here; `stop` raises after that epoch."""
    import keras
    from keras import layers

    options, cfg = parse("--runs", str(runs), *words)
    with core.run("small", options, cfg) as run:
        x = np.random.default_rng(0).normal(size=(640, 8)).astype("float32")
        y = (x.sum(axis=1) > 0).astype("int32")
        model = keras.Sequential([layers.Input((8,)), layers.Dense(16, "relu"), layers.Dropout(0.3),
                                  layers.Dense(2, dtype="float32")])  # fmt: skip
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        resume = run.checkpoint(model)
        callbacks = [resume]
        if stop is not None:

            def halt(epoch, logs):
                if epoch == stop:
                    raise KeyboardInterrupt

            callbacks.append(keras.callbacks.LambdaCallback(on_epoch_end=halt))
        stream = core.data.batches((x, y), 64, seed=cfg.seed, epochs=cfg.epochs, first_epoch=resume.epoch)
        model.fit(
            stream, steps_per_epoch=10, epochs=cfg.epochs, initial_epoch=resume.epoch, callbacks=callbacks, verbose=0
        )
        run.record["history"] = resume.history
        run.record["metrics"] = {"loss": resume.history["loss"][-1]}
    return run.record


@pytest.mark.parametrize("precision", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_an_interrupted_run_ends_with_the_loss_curve_of_an_unbroken_one(tmp_path, precision, capsys):
    import keras

    try:
        whole = train(tmp_path / "whole", "--precision", precision)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "broken", "--precision", precision, stop=1)
        assert not list((tmp_path / "broken").rglob("result.json"))
        resumed = train(tmp_path / "broken", "--precision", precision)
    finally:
        keras.config.set_dtype_policy("float32")
    assert "going on at epoch 3" in capsys.readouterr().out
    # the same arithmetic on the same state; only the order of threads' additions may differ
    np.testing.assert_allclose(resumed["history"]["loss"], whole["history"]["loss"], rtol=1e-5)
    assert len(resumed["history"]["loss"]) == 3
    assert resumed["precision"] == precision


def test_the_record_says_what_is_needed_to_repeat_it(tmp_path):
    train(tmp_path, "--seed", "3")
    folder = tmp_path / "small" / "cpu-s3"
    record = json.loads((folder / "result.json").read_text())
    assert record["command"] == "python -m course.small --preset cpu --seed 3"
    assert record["config"] == {"seed": 3, "epochs": 3, "rate": 1e-2, "widths": [8, 4]}
    assert {"python", "tensorflow", "keras", "numpy"} <= record["versions"].keys()
    assert {"cpu", "cores", "memory_gib", "gpus"} == record["hardware"].keys()
    assert record["seconds"] > 0
    assert not (folder / "checkpoints").exists()  # it ended: the next run starts anew
    assert train(tmp_path, "--seed", "3")["history"] == record["history"]  # and one seed drives everything


def test_kill_9_in_training_loses_one_epoch_at_most(tmp_path):
    code = f"""
        import sys; sys.path.insert(0, "tests")
        import test_core
        test_core.train({str(tmp_path)!r}, "--epochs", "2000")
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT)
    folder = tmp_path / "small" / "cpu+epochs=2000-s0"
    state, elapsed = folder / "checkpoints" / "model" / "state.npz", folder / "elapsed.json"  # written in this order
    deadline = time.monotonic() + 90
    while not elapsed.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    saved = json.loads(str(np.load(state)["state"]))["epoch"]
    assert saved >= 1
    assert not (folder / "result.json").exists()
    options, cfg = parse("--runs", str(tmp_path), "--epochs", "2000")
    with pytest.raises(ZeroDivisionError), core.run("small", options, cfg) as run:  # the lock died with the process
        assert run.seconds_before > 0
        raise ZeroDivisionError
    assert state.exists()


def test_a_finished_arm_is_not_computed_again_after_an_interruption(tmp_path):
    calls = []
    options, cfg = parse("--runs", str(tmp_path))

    def arm():
        calls.append(1)
        return {"accuracy": np.float32(0.5), "per_class": np.arange(2)}

    with pytest.raises(KeyboardInterrupt), core.run("arms", options, cfg) as run:
        assert run.once("first", arm) == {"accuracy": 0.5, "per_class": [0, 1]}
        raise KeyboardInterrupt
    with core.run("arms", options, cfg) as run:
        assert run.once("first", arm) == {"accuracy": 0.5, "per_class": [0, 1]}
    assert len(calls) == 1
    with core.run("arms", options, cfg) as run:
        run.once("first", arm)
    assert len(calls) == 2  # a run that had ended well starts over


def test_a_checkpoint_of_anybodys_keeps_the_time_of_the_run_around_it(tmp_path):
    options, cfg = parse("--runs", str(tmp_path))
    with pytest.raises(ZeroDivisionError), core.run("timed", options, cfg) as run:
        core.Checkpoint(run.folder / "checkpoints" / "library", None).save(0, {})
        assert 0 < json.loads((run.folder / "elapsed.json").read_text()) <= run.seconds
        raise ZeroDivisionError
    (run.folder / "elapsed.json").unlink()
    core.Checkpoint(tmp_path / "alone", None).save(0, {})
    assert not (run.folder / "elapsed.json").exists()  # that run is over


def test_two_runs_cannot_share_a_folder(tmp_path):
    options, cfg = parse("--runs", str(tmp_path))
    second = core.run("shared", options, cfg)
    with core.run("shared", options, cfg), pytest.raises(core.InputError, match="another process"):
        second.__enter__()


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop=0)
    (state,) = tmp_path.rglob("state.npz")
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(core.InputError, match="--fresh"):
        train(tmp_path)
    assert len(train(tmp_path, "--fresh")["history"]["loss"]) == 3


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "name"), [(runtime.strategy, "many"), (runtime.strategy, "mirrored:0"), (runtime.precision, "float8")]
)
def test_unknown_devices_and_precisions_are_refused(call, name):
    with pytest.raises(core.InputError, match="choose one of"):
        call(name)


def test_two_replicas_compute_one_replicas_loss():
    """MirroredStrategy over two logical CPU devices; the batches are the same, so the losses are, to rounding."""
    code = """
        import json, sys
        import numpy as np
        from course import core
        from course.core import runtime
        strategy = runtime.strategy(sys.argv[1] if len(sys.argv) > 1 else NAME)
        runtime.seed(0)
        import keras
        from keras import layers
        with strategy.scope():
            model = keras.Sequential([layers.Input((8,)), layers.Dense(16, "tanh"), layers.Dense(1)])
            model.compile(keras.optimizers.SGD(0.05), "mse")
            x = np.random.default_rng(0).normal(size=(640, 8)).astype("float32")
            stream = core.data.batches((x, x.sum(1)), 64, seed=0, epochs=3)
            losses = model.fit(stream, steps_per_epoch=10, epochs=3, verbose=0).history["loss"]
        print(json.dumps([strategy.num_replicas_in_sync, losses]))
    """
    (one, single), (two, double) = (
        json.loads(child(code.replace("NAME", repr(name))).stdout.splitlines()[-1]) for name in ("one", "mirrored:2")
    )
    assert (one, two) == (1, 2)
    np.testing.assert_allclose(double, single, rtol=1e-4)


def test_mixed_precision_computes_in_16_bits_and_keeps_variables_in_32():
    import keras

    try:
        assert runtime.precision("mixed_float16") == "mixed_float16"
        layer = keras.layers.Dense(3)
        assert keras.backend.standardize_dtype(layer(np.ones((2, 4), "float32")).dtype) == "float16"
        assert layer.kernel.dtype == "float32"
        model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1, dtype="float32")])
        model.compile("sgd", "mse")
        assert type(model.optimizer).__name__ == "LossScaleOptimizer"
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("strategy", ["central", "central:2", "parameter_server"])
def test_no_loss_scale_where_variables_stand_once(strategy):
    with pytest.raises(core.InputError, match=f"mixed_float16 cannot be had with --strategy {strategy}"):
        runtime.precision("mixed_float16", strategy)
    assert runtime.precision("auto", strategy) == "float32"


def test_a_policy_holds_in_its_block_alone():
    import keras

    with pytest.raises(KeyError), runtime.policy("mixed_bfloat16"):
        assert keras.layers.Dense(1).compute_dtype == "bfloat16"
        raise KeyError
    assert keras.layers.Dense(1).compute_dtype == "float32"


def test_units_that_stay_alone_say_what_they_do_not_use(capsys):
    options = experiment.Options()
    kept = experiment.alone(options)
    assert (kept.strategy, kept.precision) == ("one", "float32") and capsys.readouterr().out == ""
    asked = dataclasses.replace(options, strategy="mirrored:2", precision="mixed_bfloat16")
    assert experiment.alone(asked) == kept
    assert capsys.readouterr().out.splitlines() == [
        "this unit stays on one device in float32: --strategy mirrored:2 is not used",
        "this unit stays on one device in float32: --precision mixed_bfloat16 is not used",
    ]


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_are_a_permutation_of_the_seed_and_the_epoch_alone():
    x = np.arange(10)
    epochs = [np.concatenate(part) for part in np.split(np.array(list(
        core.data.batches(x, 5, seed=1, epochs=3).as_numpy_iterator())), 3)]  # fmt: skip
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    late = np.concatenate(list(core.data.batches(x, 5, seed=1, epochs=3, first_epoch=2).as_numpy_iterator()))
    np.testing.assert_array_equal(late, epochs[2])
    other = np.concatenate(list(core.data.batches(x, 5, seed=2, epochs=1).as_numpy_iterator()))
    assert not np.array_equal(other, epochs[0])


def test_every_batch_has_one_shape():
    shapes = {part.shape for part in core.data.batches(np.arange(11), 4, seed=0, epochs=2).as_numpy_iterator()}
    assert shapes == {(4,)}
