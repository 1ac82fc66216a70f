"""models/scale/pipelines: what is measured, what is taken away, and what the command says of it."""

import json
import time

import numpy as np
import pytest

from course.core.errors import InputError
from models import report
from models.scale import pipelines

WITHIN = 0.02  # seconds that the tests' steps and batches take


def slowly(wait):
    """A stream without end whose every batch takes `wait` seconds."""
    while True:
        if wait:  # sleeping for no time still lets others go first
            time.sleep(wait)
        yield np.zeros((4, 2)), np.zeros(4)


def adapter(wait):
    """In the place of a unit's: a step of some milliseconds, batches that take `wait` seconds."""
    return lambda unit, cfg: (lambda batch: pipelines.by_hand(sleep, batch), lambda: slowly(wait))


def sleep(batch):
    """A step that trains nothing."""
    time.sleep(WITHIN)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_a_turn_tells_waiting_from_working():
    stream = slowly(WITHIN)
    step = pipelines.by_hand(lambda _: time.sleep(2 * WITHIN), None)
    waiting, spent, count = pipelines.turn(lambda: step.on_next(stream), 0.3)
    assert count >= 5
    assert count * WITHIN <= waiting <= spent - count * 2 * WITHIN
    assert pipelines.turn(lambda: 0.0, seconds=0)[2] == 5  # at least


def test_a_graph_waits_for_its_batch_as_long_as_the_batch_takes():
    """Keras's `fit` asks for the batch inside its compiled function, and so does the step that is measured."""
    import keras
    import tensorflow as tf

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    shapes = (tf.TensorSpec((4, 2)), tf.TensorSpec((4,)))
    x, y = next(slowly(0))
    for wait in (0, 5 * WITHIN):
        step = pipelines.stepper(model, (x, y))
        batches = iter(tf.data.Dataset.from_generator(lambda wait=wait: slowly(wait), output_signature=shapes))
        step.on_next(batches)  # is compiled, and the first batch is made
        began = time.perf_counter()
        waited = [step.on_next(batches) for _ in range(3)]
        assert 3 * wait <= sum(waited) <= time.perf_counter() - began
        assert min(waited) < WITHIN or wait


def test_measure_compares_with_a_batch_that_is_there():
    begun = []

    def begin():
        begun.append(True)
        return slowly(2 * WITHIN)

    found = pipelines.measure(pipelines.by_hand(sleep, None), begin, None, rounds=2, seconds=0.2)
    assert len(begun) == 2  # each round begins anew
    assert found["waiting_ms"] >= 2e3 * WITHIN and found["step_ms"] >= 3e3 * WITHIN
    assert found["waiting"] == pytest.approx(found["waiting_ms"] / found["step_ms"])
    assert found["slower_least"] <= found["slower"] <= found["slower_most"]
    assert found["slower"] > 1.2  # three times, on a machine that does nothing else


def test_captured_stops_at_fit_and_says_where_it_is_not_reached():
    import keras
    import tensorflow as tf

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = [weight.copy() for weight in model.get_weights()]
    x, y = np.ones((4, 3), np.float32), np.array([0, 1, 0, 1])
    after = []

    def train():
        model.fit(tf.data.Dataset.from_tensors((x, y)), epochs=2)
        after.append(True)

    make_step, begin = pipelines.captured(train)
    assert after == [] and all(map(np.array_equal, before, model.get_weights()))
    stream = begin()
    first, *_ = (next(stream) for _ in range(3))  # without end
    np.testing.assert_array_equal(first[0], x)
    step = make_step(first)
    losses = [step.on(first) for _ in range(3)]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[2]  # it trains
    assert step.on_next(stream) >= 0 and step.on(first) < losses[2]  # on the stream as well
    with pytest.raises(RuntimeError, match="does not fit"):
        pipelines.captured(lambda: None)
    with pytest.raises(RuntimeError, match="does not fit"):
        pipelines.captured(lambda: model.fit(x, y))
    model.fit(x, y, verbose=0)  # fit is itself again


# --- what is taken away -----------------------------------------------------------------------------------------------


def stages(stream):
    """The names of a pipeline's stages, the last first."""
    found = []
    while hasattr(stream, "_input_dataset"):
        found.append(type(stream).__name__.strip("_").removesuffix("Dataset").removesuffix("V2"))
        stream = stream._input_dataset
    return found


@pytest.mark.parametrize("variant", pipelines.VARIANTS)
def test_every_variant_gives_the_same_batches_and_lacks_its_parts(variant):
    from course import core

    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (12, 5, 4, 3), np.uint8), np.arange(12, dtype=np.int32)
    arguments = {"seed": 3, "epochs": 2, "transform": lambda x, y: (x // 2, y + 1)}
    expected = list(core.data.batches((x, y), 4, **arguments).as_numpy_iterator())
    parts = pipelines.VARIANTS[variant]
    with pipelines.without(parts):
        stream = core.data.batches((x, y), 4, **arguments)
    found = list(stream.as_numpy_iterator())
    assert len(found) == 6
    for (x_found, y_found), (x_expected, y_expected) in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x_found, x_expected)
        np.testing.assert_array_equal(y_found, y_expected)
        assert x_found.dtype == np.uint8
    names = stages(stream)
    assert ("Prefetch" in names) is ("prefetch" not in parts)
    assert names.count("Map") == 2 * ("workers" in parts)
    assert names.count("ParallelMap") == 2 * ("workers" not in parts)
    assert stages(core.data.batches((x, y), 4, **arguments)) == ["Prefetch", "ParallelMap", "ParallelMap", "FlatMap"]


def test_numbers_that_are_no_pixels_cannot_come_from_files():
    from course import core

    with pipelines.without(["cache"]), pytest.raises(InputError, match="not held as pixels"):
        core.data.batches((np.zeros((8, 4, 4, 1), np.float32), np.zeros(8)), 4, seed=0, epochs=1)


# --- units, and the command -------------------------------------------------------------------------------------------


def test_a_unit_is_measured_with_its_own_training():
    options = pipelines.Pipelines(variants=(pipelines.OWN, "not cached"), preset="smoke", rounds=1, seconds=0)
    own, undecoded = pipelines.of_unit("day04_cnn", options)
    assert own["input"] == undecoded["input"] == [64, 28, 28, 1]  # day 4's batch
    assert (own["variant"], undecoded["variant"]) == options.variants
    for row in own, undecoded:
        assert 0 < row["waiting"] < 1 and row["step_ms"] > row["waiting_ms"] > 0 and row["slower"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", pipelines.UNITS)
def test_every_unit_can_be_measured(name):
    options = pipelines.Pipelines(preset="smoke", rounds=1, seconds=0)
    rows = pipelines.of_unit(name, options)
    assert [row["variant"] for row in rows] == list(pipelines.VARIANTS)
    assert all(row.get("step_ms", 0) > 0 or "pixels" in row["why"] for row in rows)
    assert "why" not in rows[0]


def test_the_command_records_and_its_exit_status_is_the_bound(monkeypatch, tmp_path, capsys):
    record, words = tmp_path / "pipelines.json", ["--rounds", "1", "--seconds", "0.2", "--record"]
    monkeypatch.setattr(pipelines, "UNITS", {"day04_cnn": adapter(0.0)})
    pipelines.main([*words, str(record)])
    found = json.loads(record.read_text())
    assert found["met"] is True and [row["variant"] for row in found["rows"]] == list(pipelines.VARIANTS)
    assert found["hardware"]["cores"] >= 1 and "--rounds 1" in found["command"]
    text = report.readme_text("<!-- pipelines:begin -->\n<!-- pipelines:end -->", "scale", tmp_path)
    assert "| day04_cnn | 4x2 |" in text and "| met |" in text

    monkeypatch.setattr(pipelines, "UNITS", {"day04_cnn": adapter(WITHIN)})
    with pytest.raises(SystemExit) as ended:
        pipelines.main([*words, str(record)])
    assert ended.value.code == 1 and "missed: day04_cnn, waiting / step" in capsys.readouterr().err
    assert json.loads(record.read_text())["met"] is False
    assert "**missed**" in report.readme_text(text, "scale", tmp_path)


def test_a_variant_that_does_not_fit_is_said_to_be_left_out(capsys):
    first = {"unit": "a", "variant": pipelines.OWN, "input": [8, 2], "step_ms": 10.0, "waiting_ms": 0.1,
             "waiting": 0.01, "slower": 1.02, "slower_least": 1.0, "slower_most": 1.1}  # fmt: skip
    rows = [first, {"unit": "a", "variant": "not cached", "why": "its pictures are not held as pixels"}]
    pipelines.show(rows)
    assert "a, not cached: not measured: its pictures" in capsys.readouterr().out
    (target,) = pipelines.targets(rows)
    assert target.met and target.value == pytest.approx(0.01)
    hardware = {"cpu": "CPU", "cores": 2, "gpus": []}
    text = pipelines.markdown({"rows": rows, "hardware": hardware, "command": "python"})
    assert "| a | 8x2 | 10.0 | 1.0 % / 1.02 |  | met |" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--units", "day99"], "--units day99 is not known: choose from day04_cnn"),
        (["--variants", "fast"], "--variants fast is not known"),
        (["--preset", "huge"], "--preset huge is not known"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_bad_settings(words, message):
    with pytest.raises(InputError, match=message):
        pipelines.main(words)
