"""Loss scaling: day 12's machine against Keras's, and `core.runtime.scaled` in `fit`, in loops and on replicas."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from course import core
from course import day12_mixed_precision as day12


def keras_machine(start, growth):
    """A function: which of the steps have finite gradients -> (scale, count) of Keras's optimizer after each."""
    weight = keras.Variable(1.0)
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.0), start, growth)
    optimizer.build([weight])
    step = tf.function(lambda gradient: optimizer.apply([gradient], [weight]))

    def trace(finites):
        optimizer.dynamic_scale.assign(start)
        optimizer.step_counter.assign(0)
        found = []
        for finite in finites:
            step(tf.constant(1.0 if finite else np.inf))
            found.append((float(optimizer.dynamic_scale.numpy()), int(optimizer.step_counter.numpy())))
        return found

    return trace


def our_trace(finites, start, growth):
    state, trace = (start, 0), []
    for finite in finites:
        state = tuple(part.numpy() for part in day12.next_state(*state, finite, growth))
        trace.append((float(state[0]), int(state[1])))
    return trace


def test_the_machine_by_hand():
    finites = [True, True, True, False, False, True, True, True, True]
    wanted = [(8, 1), (8, 2), (16, 0), (8, 0), (4, 0), (4, 1), (4, 2), (8, 0), (8, 1)]
    assert our_trace(finites, 8.0, 3) == wanted


@pytest.mark.parametrize("growth", [1, 2, 3])
def test_the_machine_is_keras_in_every_sequence_of_steps(growth):
    trace = keras_machine(1024.0, growth)
    for finites in itertools.product([True, False], repeat=5):
        assert our_trace(finites, 1024.0, growth) == trace(finites), finites


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_spoilt_step_leaves_weights_and_optimizer_alone(bad):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    optimizer = keras.optimizers.Adam(0.1)

    def loss(y, output):  # whose gradient is spoilt where y is
        return tf.reduce_mean(output * y)

    step = day12.scaled_step(model, optimizer, loss, day12.Scaling(4.0, 2))
    before, x = model.get_weights(), np.ones((1, 1), np.float32)
    _, updated, scale = step(x, np.full((1, 1), bad, np.float32))
    assert not bool(updated) and float(scale) == 4 and int(optimizer.iterations.numpy()) == 0
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    _, updated, scale = step(x, np.ones((1, 1), np.float32))
    assert bool(updated) and float(scale) == 2 and int(optimizer.iterations.numpy()) == 1
    assert not np.array_equal(before[0], model.get_weights()[0])
    fixed = day12.scaled_step(model, keras.optimizers.SGD(0.1), loss, day12.Scaling(4.0))
    fixed(x, np.full((1, 1), bad, np.float32))
    assert not np.isfinite(model.get_weights()[0]).all(), "a fixed scale looks for nothing"


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_scaling_changes_no_step_in_float32(scale):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 8, 3)).astype(np.float32)
    trained = []
    for scaling in (day12.Scaling(), day12.Scaling(scale, 2)):  # powers of 2: not a bit differs
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
        loss = lambda y, output: tf.reduce_mean((y - output) ** 2)  # noqa: E731
        step = day12.scaled_step(model, keras.optimizers.Adam(0.01), loss, scaling)
        trained.append([float(step(x, y)[0]) for _ in range(5)])
    assert trained[0] == trained[1] and trained[0][-1] < trained[0][0]


# --- core.runtime.scaled ---------------------------------------------------------------------------------------------


def test_scaled_wraps_where_the_policy_is_mixed_float16_and_nowhere_else():
    for name in ("float32", "mixed_bfloat16"):
        with core.runtime.policy(name):
            assert core.runtime.scaled(optimizer := keras.optimizers.SGD(0.1)) is optimizer
            assert float(optimizer.scale_loss(3.0)) == 3.0
    with core.runtime.policy("mixed_float16"):
        plain, fixed = keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.1, loss_scale_factor=64.0)
        wrapped = core.runtime.scaled(plain, initial_scale=8.0, dynamic_growth_steps=2)
        assert isinstance(wrapped, keras.optimizers.LossScaleOptimizer) and wrapped.inner_optimizer is plain
        assert float(wrapped.scale_loss(3.0)) == 24.0
        assert core.runtime.scaled(wrapped) is wrapped and core.runtime.scaled(fixed) is fixed
        assert fixed.loss_scale_factor == 64.0 and float(fixed.scale_loss(3.0)) == 192.0


def test_a_loop_with_scaled_is_fit(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 24, 4)).astype(np.float32)

    def begin():
        keras.utils.set_random_seed(0)
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), keras.layers.Dense(4, dtype="float32")])

    with core.runtime.policy("mixed_float16"):
        model, optimizer = begin(), core.runtime.scaled(keras.optimizers.SGD(0.1))
        optimizer.build(model.trainable_variables)
        curve = []
        for i in range(0, 24, 8):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((y[i : i + 8] - model(x[i : i + 8], training=True)) ** 2)
                scaled = optimizer.scale_loss(loss)
            optimizer.apply(tape.gradient(scaled, model.trainable_variables), model.trainable_variables)
            curve.append(float(loss))
        fitted = begin()
        fitted.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
        assert isinstance(fitted.optimizer, keras.optimizers.LossScaleOptimizer)
        losses = [fitted.train_on_batch(x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8)]
    np.testing.assert_allclose(curve, losses, rtol=1e-5)
    for ours, theirs in zip(model.get_weights(), fitted.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    checkpoint = core.Checkpoint(tmp_path / "saved", model, optimizer=optimizer)
    checkpoint.save(0, {"loss": curve[-1]})
    scale = float(optimizer.dynamic_scale.numpy())
    optimizer.dynamic_scale.assign(1.0)
    core.Checkpoint(tmp_path / "saved", model, optimizer=optimizer)  # restores
    assert float(optimizer.dynamic_scale.numpy()) == scale and int(optimizer.step_counter.numpy()) == 3


MIRRORED = """
import numpy as np
from course import core
strategy = core.runtime.strategy("mirrored:2")
import keras, tensorflow as tf
keras.config.set_dtype_policy("mixed_float16")
def one(optimizer, bad):
    with strategy.scope():
        weight = keras.Variable(1.0)
        optimizer = optimizer(keras.optimizers.SGD(0.5))
        optimizer.build([weight])
    @tf.function
    def step():
        def on_each():
            here = tf.distribute.get_replica_context().replica_id_in_sync_group
            optimizer.apply([tf.where(here == bad, np.inf, 32768.0)], [weight])
        strategy.run(on_each)
    step()
    return float(weight.numpy()), float(optimizer.dynamic_scale.numpy()), int(optimizer.step_counter.numpy())
with strategy.scope():
    for bad in (0, 1, 2):
        print(*one(core.runtime.scaled, bad))
    print(*one(keras.optimizers.LossScaleOptimizer, 1))
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(core.runtime.scaled(keras.optimizers.SGD(0.1)), "mse", jit_compile=False)
y = np.zeros((4, 1), np.float32)
y[3] = 1e30  # of the second replica
model.fit(tf.data.Dataset.from_tensor_slices((np.ones((4, 2), np.float32), y)).batch(4), verbose=0)
print(all(np.isfinite(w).all() for w in model.get_weights()), float(model.optimizer.dynamic_scale.numpy()))
"""


def test_an_inf_on_any_replica_leaves_the_step_out():
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", MIRRORED], capture_output=True, text=True, cwd=core.experiment.ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second, none, keras_own, fit = done.stdout.splitlines()[-5:]
    assert first == second == "1.0 16384.0 0"
    assert none == "0.0 32768.0 1"  # 1 - 0.5 * (1 + 1): the sum over both
    assert keras_own.startswith("-inf"), "Keras has mended it: `scaled` need not any more"
    assert fit == "True 16384.0"
