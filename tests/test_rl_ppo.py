"""Acting in NumPy, and all minibatches of an update in one compiled call: equal to Keras, step by step."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from models.rl import normalise, ppo

JIT = pytest.mark.parametrize("jit", [False, True])


@pytest.fixture
def policy():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    norm = normalise.RunningNormalization()
    model = keras.Sequential(
        [keras.Input([5]), norm, layers.Dense(8, "tanh"), layers.Dense(7, "relu"), layers.Dense(3)]
    )
    norm.update(np.random.default_rng(0).normal(4, 3, (50, 5)))
    return model


def test_acting_in_numpy_is_the_network(policy):
    x = np.random.default_rng(1).normal(4, 3, (6, 5)).astype(np.float32)
    np.testing.assert_allclose(ppo.as_numpy(policy)(x), policy(x), atol=2e-6)


def test_the_numpy_network_is_a_copy(policy):
    x = np.ones((1, 5), np.float32)
    copied = ppo.as_numpy(policy)
    before = copied(x)
    policy.set_weights([weight + 1 for weight in policy.get_weights()])
    np.testing.assert_array_equal(copied(x), before)
    assert not np.allclose(ppo.as_numpy(policy)(x), before)


def test_other_layers_have_no_numpy_form():
    model = keras.Sequential([keras.Input([8, 8, 1]), keras.layers.Conv2D(2, 3), keras.layers.Flatten()])
    with pytest.raises(TypeError, match=r"Conv2D.*no NumPy form"):
        ppo.as_numpy(model)
    with pytest.raises(TypeError, match="no NumPy form"):
        ppo.as_numpy(keras.Sequential([keras.Input([3]), keras.layers.Dense(2, "softmax")]))


def test_orders_use_each_example_once_an_epoch():
    order = ppo.orders(np.random.default_rng(0), 3, 20, 6)  # 2 of 20 do not fill a minibatch
    assert order.shape == (9, 6) and order.dtype == np.int32
    epochs = order.reshape(3, 18)
    assert all(len(set(epoch)) == 18 for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


def regression(kl):
    """Variables, a loss of them that needs data, and its data; "approx_kl" is `kl`(the weights)."""
    weights = keras.Variable(np.array([1.0, -1.0], np.float32))

    def loss(batch):
        error = tf.reduce_mean((tf.linalg.matvec(batch["x"], weights.value) - batch["y"]) ** 2)
        return error, {"error": error, "approx_kl": kl(weights.value)}

    rng = np.random.default_rng(3)
    return weights, loss, {"x": rng.normal(size=(12, 2)).astype("f"), "y": rng.normal(size=12).astype("f")}


@JIT
def test_one_call_takes_the_same_steps_as_a_loop_of_keras(jit):
    weights, loss, data = regression(lambda w: 0 * w[0])
    order = ppo.orders(np.random.default_rng(0), 4, 12, 4)
    twin, errors = keras.Variable(weights.numpy()), []
    optimizer = keras.optimizers.Adam(0.05, epsilon=1e-5, global_clipnorm=0.5)
    for rows in order:
        x, y = data["x"][rows], data["y"][rows]
        residual = x @ twin.numpy() - y
        errors.append((residual**2).mean())
        optimizer.apply([tf.constant(2 * residual @ x / len(x))], [twin])
    update = ppo.updater(
        loss, [weights], keras.optimizers.Adam(0.05, epsilon=1e-5, global_clipnorm=0.5), jit_compile=jit
    )
    logs = update(data, order)
    np.testing.assert_allclose(weights.numpy(), twin.numpy(), rtol=1e-5)
    np.testing.assert_allclose(logs["error"], np.mean(errors), rtol=1e-5)
    assert logs["updates"] == 12 and logs["loss"] == logs["error"]


@JIT
def test_early_stop_leaves_the_step_out_that_went_too_far(jit):
    """SGD by a known rate: the weights' distance from their start serves as the divergence."""
    start = np.array([1.0, -1.0], np.float32)
    weights, loss, data = regression(lambda w: tf.reduce_sum((w - start) ** 2))
    order, path = ppo.orders(np.random.default_rng(0), 4, 12, 4), [start]
    for rows in order:
        x = data["x"][rows]
        path.append(path[-1] - 0.02 * 2 * (x @ path[-1] - data["y"][rows]) @ x / len(x))
    distance = ((np.array(path) - start) ** 2).sum(axis=1)
    target = float(distance[4]) * 0.99 / 1.5  # the fifth minibatch, seen after four steps, is the first beyond it
    assert (distance[:4] < 1.5 * target).all()
    update = ppo.updater(loss, [weights], keras.optimizers.SGD(0.02), target_kl=target, jit_compile=jit)
    logs = update(data, order)
    assert logs["updates"] == 4
    np.testing.assert_allclose(weights.numpy(), path[4], rtol=1e-5)
    np.testing.assert_allclose(logs["approx_kl"], distance[:5].mean(), rtol=1e-4)


def test_the_learning_rate_may_change_between_calls():
    weights, loss, data = regression(lambda w: 0 * w[0])
    optimizer = keras.optimizers.SGD(0.1)
    update, order = ppo.updater(loss, [weights], optimizer), np.arange(12, dtype=np.int32)[None]
    update(data, order)
    optimizer.learning_rate = 0.0
    before = weights.numpy()
    update(data, order)
    np.testing.assert_array_equal(weights.numpy(), before)
