"""Strategies and devices of the runtime: what is refused and how, and that each computes what one device does."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from course import core
from course.core import runtime

ROOT = Path(__file__).parents[1]
WORKERS = {"worker": ["a:1", "b:2"]}
SERVERS = {"chief": ["a:1"], "worker": ["b:2"], "ps": ["c:3"]}


def child(code):
    """The last line that Python code prints in a process of its own, as JSON."""
    words = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def config(cluster, job, index):
    return json.dumps({"cluster": cluster, "task": {"type": job, "index": index}})


# --- the cluster's description ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cluster", "job", "index", "chief"),
    [
        ("multiworker", WORKERS, "worker", 0, True),
        ("multiworker", WORKERS, "worker", 1, False),
        ("multiworker", WORKERS | {"chief": ["c:3"]}, "worker", 0, False),
        ("multiworker", WORKERS | {"chief": ["c:3"]}, "chief", 0, True),
        ("parameter_server", SERVERS, "chief", 0, True),
        ("parameter_server", SERVERS, "worker", 0, False),
        ("parameter_server", SERVERS, "ps", 0, False),
    ],
)
def test_a_process_knows_its_task_and_whether_it_writes(monkeypatch, name, cluster, job, index, chief):
    monkeypatch.setenv("TF_CONFIG", config(cluster, job, index))
    task = runtime.cluster_task(name)
    assert task == (job, index)
    assert runtime.is_chief(task) is chief


def test_the_index_may_be_text_as_kubernetes_gives_it(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config(WORKERS, "worker", "1"))
    assert runtime.cluster_task("multiworker") == ("worker", 1)


@pytest.mark.parametrize("name", ["multiworker", "parameter_server"])
@pytest.mark.parametrize("text", [None, "", "  "])
def test_without_a_cluster_the_form_is_shown(monkeypatch, name, text):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(core.InputError, match=rf"--strategy {name} needs the environment variable TF_CONFIG: \{{"):
        runtime.strategy(name)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("multiworker", "{", "cannot be read"),
        ("multiworker", "[]", "cannot be read"),
        ("multiworker", '{"cluster": {"worker": ["a:1"]}}', "cannot be read"),
        ("multiworker", config(["a:1"], "worker", 0), "cannot be read"),
        ("multiworker", config({"worker": "a:1"}, "worker", 0), "cannot be read"),
        ("multiworker", config({"worker": ["a"]}, "worker", 0), "cannot be read"),
        ("multiworker", config({"worker": [7]}, "worker", 0), "cannot be read"),
        ("multiworker", config(WORKERS, "worker", "one"), "cannot be read"),
        ("multiworker", config(WORKERS, "worker", 2), "no task worker 2"),
        ("multiworker", config(WORKERS, "worker", -1), "no task worker -1"),
        ("multiworker", config(WORKERS, "ps", 0), "no task ps 0"),
        ("multiworker", config({}, "worker", 0), "a cluster of nothing is not one for"),
        ("multiworker", config(SERVERS, "worker", 0), "is not one for --strategy multiworker, which needs worker"),
        ("parameter_server", config(WORKERS, "worker", 0), "which needs chief, ps, worker"),
    ],
)
def test_a_wrong_cluster_is_refused_in_one_line(monkeypatch, name, text, said):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(core.InputError, match=said) as caught:
        runtime.strategy(name)
    assert "\n" not in str(caught.value) and "TF_CONFIG" in str(caught.value)


@pytest.mark.parametrize("name", ["mirrored:0", "mirrored:", "mirrored:x", "one:2", "central:0", "tpu:2", "multi", ""])
def test_unknown_strategies_are_refused_with_those_that_are(name):
    with pytest.raises(core.InputError, match="choose one of auto, one, mirrored"):
        runtime.strategy(name)


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(os.environ.get("TPU_NAME")) or Path("/dev/accel0").exists(), reason="there may be a TPU")
def test_devices_cannot_be_split_late_and_no_tpu_is_one_line():
    said = child("""
        import json
        from course import core
        from course.core import runtime
        import tensorflow as tf
        said = {"before": runtime.devices(1)}
        tf.constant(1.0) + 1.0
        said["one"] = runtime.devices(1)
        for name in ("mirrored:2", "central:3", "tpu"):
            try:
                runtime.strategy(name)
            except core.InputError as error:
                said[name] = str(error)
        print(json.dumps(said))
    """)
    assert said["before"] == said["one"] and len(said["one"]) == 1
    if said["one"] == ["CPU:0"]:
        assert said["mirrored:2"].startswith("2 logical CPU devices were asked for after TensorFlow had started")
        assert said["central:3"].startswith("3 logical CPU devices were asked for after TensorFlow had started")
    assert said["tpu"].startswith("--strategy tpu: no TPU answers") and "\n" not in said["tpu"]


def test_strategies_compute_what_one_device_does():
    """Mirrored and central, by a loop; synchronised batch normalisation, whose layers reduce too, under mirrored."""
    found = child("""
        import json
        import numpy as np
        from course.core import runtime
        places = runtime.devices(2)
        import keras
        import tensorflow as tf
        from keras import layers, losses, ops
        x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")

        def curve(name, norm):
            strategy = runtime.strategy(name)
            runtime.seed(0)
            with strategy.scope():
                inner = [layers.Dense(16), *([layers.BatchNormalization(synchronized=norm == 1)] if norm else [])]
                model = keras.Sequential([layers.Input((8,)), *inner, layers.ReLU(), layers.Dense(1)])
                optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
                optimizer.build(model.trainable_variables)

            def on_each(x, y):
                with tf.GradientTape() as tape:
                    loss = ops.sum(losses.mean_squared_error(y, model(x, training=True))) / 32
                optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
                return loss

            @tf.function
            def step(x, y):
                return strategy.reduce("SUM", strategy.run(on_each, args=(x, y)), axis=None)

            data = tf.data.Dataset.from_tensors((x, x.sum(1, keepdims=True))).repeat(6)
            return [float(step(*batch)) for batch in strategy.experimental_distribute_dataset(data)]

        found = {f"{name} {norm}": curve(name, norm) for name, norm in
                 [("one", 0), ("mirrored:2", 0), ("central:2", 0), ("one", 1), ("mirrored:2", 1), ("mirrored:2", 2)]}
        try:
            curve("central:2", 1)
        except ValueError as error:
            found["refused"] = str(error)
        print(json.dumps(found))
    """)
    for name in ("mirrored:2 0", "central:2 0"):
        np.testing.assert_allclose(found[name], found["one 0"], atol=1e-5)
    np.testing.assert_allclose(found["mirrored:2 1"], found["one 1"], atol=1e-4)
    assert np.abs(np.subtract(found["mirrored:2 2"], found["one 1"])).max() > 1e-3, "each replica's own statistics"
    assert found["one 0"][-1] < found["one 0"][0] != found["one 1"][0]
    assert "aggregation" in found["refused"], "the docstring of runtime.strategy says that this is refused"


@pytest.mark.slow
def test_parameter_servers_train(tmp_path):
    """A chief, two workers and a server: processes that only serve never come back from `runtime.strategy`."""
    from models.scale import cluster

    (tmp_path / "toy_asynchronous.py").write_text(
        textwrap.dedent("""
        from course.core import runtime
        strategy = runtime.strategy("parameter_server")
        import keras
        import tensorflow as tf
        coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
        with strategy.scope():
            total = tf.Variable(0.0)
        step = tf.function(lambda x: total.assign_add(x))
        for i in range(10):
            coordinator.schedule(step, args=(tf.constant(float(i)),))
        coordinator.join()
        print("total", float(total.read_value()), strategy.num_replicas_in_sync)
        """)
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = cluster.launch("toy_asynchronous", [], 2, parameter_servers=1, log_folder=tmp_path / "logs", limit=240,
                          environment={"PYTHONPATH": path})  # fmt: skip
    assert "total 45.0" in done.logs["chief", 0].read_text()
