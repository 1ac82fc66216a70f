"""Day 10: a step divided over replicas, shares, stages and processes is one device's step."""

import dataclasses
import functools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, losses

from course import core
from course import day10_distributed as day10
from models.scale import cluster, replicas, worker
from models.scale.resnet import cifar_resnet

ROOT = Path(__file__).parents[1]


def child(code):
    """The last line that Python code prints in a process of its own, as JSON: TensorFlow there is not yet started."""
    words = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def setting(**changes):
    """The smoke preset's setting, changed."""
    return dataclasses.replace(day10.Config(**day10.PRESETS["smoke"]), **changes)


def some_data(count=32, side=8, seed=0):
    """Made images of two channels, of ten classes, as `core.data.three_way` gives them."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 256, (count, side, side, 2)).astype("uint8"), np.arange(count, dtype="int32") % 10
    return core.data.Splits(x, y, x, y, x, y)


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "million"), [(20, 0.27), (32, 0.46), (56, 0.85)])
def test_depth_and_size_are_the_papers(depth, million):
    """He et al. 2016, table 6: 0.27, 0.46 and 0.85 million parameters."""
    model = cifar_resnet((32, 32, 3), 10, [0.0] * 3, [1.0] * 3, depth)
    weighted = [layer for layer in model.layers if isinstance(layer, layers.Conv2D | layers.Dense)]
    assert len(weighted) == depth
    assert sum(np.prod(one.shape) for one in model.trainable_variables) / 1e6 == pytest.approx(million, abs=0.006)
    names = [layer.name for layer in model.layers if layer.name.startswith("block")]
    assert names == [f"block{i}" for i in range(1, (depth - 2) // 2 + 1)]
    assert [model.get_layer(f"block{i * (depth - 2) // 6}").output.shape[1:] for i in (1, 2, 3)] == [
        (32, 32, 16), (16, 16, 32), (8, 8, 64)
    ]  # fmt: skip


def test_shortcuts_take_every_second_pixel_and_add_channels_of_zeros():
    """With the last normalisation of a block at 0 only its shortcut is left."""
    model = cifar_resnet((8, 8, 3), 10, [0.0] * 3, [1.0] * 3, 8, 8)
    norms = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    for norm in norms[2::2]:
        norm.gamma.assign(0 * norm.gamma)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
    first, second = keras.Model(model.input, [model.get_layer(f"block{i}").output for i in (1, 2)])(x)
    np.testing.assert_allclose(second[..., :8], first[:, ::2, ::2], rtol=1e-6)
    assert second.shape[-1] == 16 and not np.any(second[..., 8:])


@pytest.mark.parametrize(("norm", "kind"), [("batch", "Batch"), ("sync", "Batch"), ("group", "Group")])
def test_normalisations(norm, kind):
    found = [one for one in cifar_resnet((8, 8, 1), 3, [0.0], [1.0], 8, 8, norm).layers if "Normalization" in
             type(one).__name__ and type(one).__name__ != "Normalization"]  # fmt: skip
    assert len(found) == 7
    assert {type(one).__name__ for one in found} == {f"{kind}Normalization"}
    assert {getattr(one, "synchronized", False) for one in found} == {norm == "sync"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(depth=18), "is not 6n"),
        (dict(depth=2), "is not 6n"),
        (dict(norm="layer"), "--norm layer is not known"),
        (dict(norm="group", width=12), "divisible by 8"),
    ],
)
def test_networks_that_are_not(changes, said):
    with pytest.raises(core.InputError, match=said):
        cifar_resnet((8, 8, 1), 3, [0.0], [1.0], **changes)


def test_logits_are_float32_in_mixed_precision():
    with core.runtime.policy("mixed_bfloat16"):
        model = cifar_resnet((8, 8, 1), 3, [0.0], [1.0], 8, 8)
    assert model.output.dtype == "float32"
    assert model.get_layer("block3").output.dtype == "bfloat16"


# --- the ring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 8, 1001])
def test_the_ring_gives_every_device_the_sum(devices, size):
    arrays = list(np.random.default_rng(devices).normal(size=(devices, size)))
    before = [array.copy() for array in arrays]
    sums, sent = day10.ring_all_reduce(arrays)
    assert len(sums) == devices
    for one in sums:
        np.testing.assert_allclose(one, np.sum(before, axis=0), rtol=1e-12, atol=1e-12)
    assert all((one == sums[0]).all() for one in sums), "copies must stay equal"
    np.testing.assert_array_equal(arrays, before)
    bound = 2 * (devices - 1) / devices * 8 * size
    assert max(sent) <= bound + 2 * (devices - 1) * 8  # parts of unequal size: by up to a number a message
    if size % devices == 0:
        assert sent == [bound] * devices


# --- one step --------------------------------------------------------------------------------------------------------


def test_a_share_is_divided_by_the_whole_batch():
    cfg, data = setting(norm="group"), some_data()
    one = tf.distribute.get_strategy()
    grown = []
    for batch in (32, 64):
        model, optimizer = day10.build(one, cfg, data, 0.1)
        optimizer.momentum, optimizer.weight_decay = 0.0, None
        before = model.get_weights()
        loss = day10.share_of_step(model, optimizer, batch)(data.x_train, data.y_train)
        grown.append((float(loss), [a - b for a, b in zip(model.get_weights(), before, strict=True)]))
    (loss, whole), (half_loss, half) = grown
    assert loss == pytest.approx(np.log(10), abs=1.5) and half_loss == pytest.approx(loss / 2, rel=1e-5)
    assert replicas.distance([2 * one for one in half], whole) < 1e-3
    assert max(np.abs(one).max() for one in whole) > 1e-3


def test_shares_in_turn_are_the_whole_batch_unless_a_layer_looks_at_the_batch():
    data = some_data()
    x, y = tf.constant(data.x_train), tf.constant(data.y_train)
    for norm, low, high in (("group", 0, 1e-4), ("batch", 1e-2, 10)):
        model, _ = day10.build(tf.distribute.get_strategy(), setting(norm=norm), data, 0.1)
        loss, whole = day10.gradient(model, x, y, 32)
        assert low <= replicas.distance(day10.accumulated(model, x, y, 4), whole) <= high
        stages = replicas.split(model, ["CPU:0"] * 3)
        assert [len(stage.trainable_variables) for stage in stages] == [9, 6, 8]
        total, found = day10.pipelined(stages, ["CPU:0"] * 3, x, y, 4)
        assert low <= replicas.distance(found, whole) <= high
        if norm == "group":
            assert float(total) == pytest.approx(float(loss), rel=1e-5)


def test_keras_accumulates_as_the_lesson_says():
    x, y = np.random.default_rng(0).normal(size=(8, 5)).astype("float32"), np.arange(8, dtype="int32") % 3
    weights = []
    for options, batch in ((dict(), 8), (dict(gradient_accumulation_steps=4), 2)):
        core.runtime.seed(0)
        model = keras.Sequential([keras.Input((5,)), layers.Dense(4, "tanh"), layers.Dense(3)])
        model.compile(keras.optimizers.SGD(0.5, **options), losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(x, y, batch_size=batch, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    assert replicas.distance(*weights) < 1e-6


def test_strategies_fit_and_the_stages_devices():
    """On logical devices of a process of its own."""
    found = child("""
        import json
        import numpy as np
        from course.core import runtime
        places = runtime.devices(2)
        from tests import test_day10 as tests
        from course import day10_distributed as day10
        from models.scale import replicas
        data, found = tests.some_data(64), {}
        cfg = tests.setting(norm="group", train=64, batch=16)
        for name in ("one", "mirrored:2"):
            found[name], found["speed"] = day10.first_losses(runtime.strategy(name), cfg, data)
        found["fit"] = day10.fit_loss(runtime.strategy("mirrored:2"), cfg, data)
        model, _ = day10.build(runtime.strategy("one"), tests.setting(norm="group"), data, 0.1)
        stages = replicas.split(model, places)
        found["devices"] = [sorted({v.value.device[-5:] for v in stage.trainable_variables}) for stage in stages]
        print(json.dumps(found))
    """)
    assert len(found["one"]) == 3
    np.testing.assert_allclose(found["mirrored:2"], found["one"], atol=1e-4)
    assert found["fit"] == pytest.approx(np.mean(found["one"]), abs=1e-4)
    assert found["speed"]["replicas"] == 2
    assert all(value > 0 for value in found["speed"].values())
    first, second = found["devices"]
    assert len(first) == len(second) == 1 and first != second


# --- data ------------------------------------------------------------------------------------------------------------


def test_images_are_moved_whole_and_by_the_step_alone():
    x = np.arange(1, 1 + 3 * 64, dtype="uint8").reshape(3, 8, 8, 1)
    one, again, other = (replicas.moved(tf.constant(x), seed).numpy() for seed in ((0, 1), (0, 1), (0, 2)))
    assert one.shape == x.shape and one.dtype == x.dtype
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    for image, source in zip(one, x, strict=True):
        padded = [np.pad(side, ((4, 4), (4, 4), (0, 0))) for side in (source, source[:, ::-1])]
        places = [(dy, dx) for side in padded for dy in range(9) for dx in range(9)
                  if (side[dy : dy + 8, dx : dx + 8] == image).all()]  # fmt: skip
        assert len(places) == 1


def test_a_stream_that_begins_later_is_the_same_from_there_on():
    data, cfg, one = some_data(), setting(train=32, batch=8), tf.distribute.get_strategy()
    change = functools.partial(replicas.augmented, seed=3, steps=4)
    whole, late = (day10.distributed(one, cfg, data, first, change) for first in (0, 1))
    for _ in range(4):
        first = next(whole)
    for _ in range(4):
        (x, y), (a, b) = next(whole), next(late)
        np.testing.assert_array_equal(x, a)
        np.testing.assert_array_equal(y, b)
    assert (first[0].numpy() != x.numpy()).any()


# --- processes -------------------------------------------------------------------------------------------------------


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(core.InputError, match="--batch 64 is larger than the 32 training images"):
        day10.train(tf.distribute.get_strategy(), setting(batch=64, train=32), some_data(), None)


def test_workers_that_find_different_checkpoints_are_refused(tmp_path, monkeypatch):
    class Strategy:
        def gather(self, value, axis):
            return tf.concat([value, value + self.ahead], axis)

    monkeypatch.setattr(worker, "Checkpoint", lambda *_, **__: dataclasses.make_dataclass("At", ["epoch"])(2))
    strategy = Strategy()
    strategy.ahead = 0
    assert worker._restore(strategy, tmp_path, None, None).epoch == 2
    strategy.ahead = 1
    with pytest.raises(core.InputError, match="--runs must be a folder that all of them share"):
        worker._restore(strategy, tmp_path, None, None)


def test_two_processes_of_which_one_is_killed_train_as_one_device_does(tmp_path):
    """Real processes, a real SIGKILL after the first epoch, a restart from the checkpoint: one loss curve."""
    options, cfg = core.parse(day10.Config, day10.PRESETS, ["--preset=smoke", f"--runs={tmp_path}"])
    cfg = dataclasses.replace(cfg, norm="group", train=64, val=1, test=10, epochs=3)
    record = worker.in_processes("day10_distributed", tmp_path / "cluster", options, cfg, 2, kill=True)
    assert record["restarts"] == 1
    said = (tmp_path / "cluster/logs/worker-0.log").read_text()
    assert "restored" in said and "Traceback" not in said
    assert record["replicas"] == record["metrics"]["replicas"] == 2
    data = core.data.three_way(core.data.load(cfg.data), cfg.train, cfg.val, cfg.test)

    def restore(model, optimizer):
        return core.Checkpoint(tmp_path / "alone", model, optimizer=optimizer)

    _, curve, _ = day10.train(tf.distribute.get_strategy(), cfg, data, restore)
    assert len(curve) == 3
    np.testing.assert_allclose(record["history"]["loss"], curve, atol=1e-4)
    assert record["shards"]["DATA"] == [[0, 1, 4, 5], [2, 3, 6, 7]], "each has its own half of every batch"
    assert record["shards"]["OFF"][0] == record["shards"]["OFF"][1], "everyone trains on the same"


@pytest.mark.slow
def test_a_parameter_server_trains(tmp_path):
    options, cfg = core.parse(day10.Config, day10.PRESETS, ["--preset=smoke", f"--runs={tmp_path}"])
    cfg = dataclasses.replace(cfg, norm="group", train=512, val=1, test=10, epochs=4)
    folder = tmp_path / "cluster"
    record = worker.in_processes("day10_distributed", folder, options, cfg, 2, strategy="parameter_server", servers=1)
    curve = record["history"]["loss"]
    assert len(curve) == 4 * 512 // cfg.batch
    assert np.mean(curve[-8:]) < np.mean(curve[:8])


@pytest.mark.slow
def test_two_processes_train_in_float16(tmp_path):
    words = ["--preset=smoke", "--strategy=multiworker", "--precision=mixed_float16", f"--runs={tmp_path}",
             "--norm=group", "--train=128", "--epochs=2"]  # fmt: skip
    cluster.launch("course.day10_distributed", words, 2, log_folder=tmp_path / "logs", limit=600)
    (path,) = (tmp_path / "day10_distributed").glob("smoke*/result.json")
    record = json.loads(path.read_text())
    assert (record["precision"], record["replicas"]) == ("mixed_float16", 2)
    first, last = record["history"]["loss"]
    assert last < first


@pytest.mark.slow
def test_all_of_the_unit_with_processes(tmp_path):
    """The smoke preset with what it leaves out: two processes, unbroken and killed, and a parameter server."""
    words = ["-m", "course.day10_distributed", "--preset=smoke", "--processes=2", f"--runs={tmp_path}"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, timeout=900, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "day10_distributed").glob("smoke*/result.json")
    record = json.loads(path.read_text())
    metrics = record["metrics"]
    assert metrics["worst_loss_difference"] < 1e-4
    assert metrics["processes_difference"] < 1e-4
    assert metrics["killed_difference"] < 1e-4
    assert metrics["restarts"] == 1
    assert metrics["batch_norm_difference"] > 1e-3
    assert metrics["sync_batch_norm_difference_float64"] < 1e-9
    assert {"workers.png", "cost.png", "efficiency.png"} <= set(record["figures"])
    assert metrics["threads_difference"] < 1e-2
    one, two = "processes, 1", "processes, 2"
    apart = {f"{name}, {norm}" for name in ("mirrored:2", "central:2") for norm in ("group", "group, float64")}
    apart |= {f"mirrored:2, {norm}" for norm in ("batch", "sync", "sync, float64")}
    assert set(record["history"]) == {"loss", one, two, f"{two}, one killed", "parameter server"} | apart
    assert len(record["history"]["mirrored:2, group, float64"]) == 3
    assert metrics["worst_loss_difference_float64"] < 1e-9
