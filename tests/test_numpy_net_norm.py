"""models/numpy_net normalization and dropout: by hand, by finite differences, and against Keras."""

import numpy as np
import pytest

from models.numpy_net import checks, dropout, norm


@pytest.fixture
def rng():
    return np.random.default_rng(5)


# --- normalization --------------------------------------------------------------------------------------------------


def test_batch_norm_by_hand():
    x = np.array([[1.0, 10.0], [3.0, 10.0]])  # means 2 and 10, variances 1 and 0
    out, _ = norm.batch_norm_forward(x, np.array([2.0, 3.0]), np.array([0.5, -1.0]), train=True, eps=3.0)
    np.testing.assert_allclose(out, [[-1 + 0.5, -1], [1 + 0.5, -1]], rtol=1e-15)  # 2 * (+-1) / sqrt(1 + 3)


def test_running_statistics_follow_the_batches_in_place():
    running = norm.running_statistics(1, np.float64)
    mean, x = running["mean"], np.array([[2.0], [6.0]])  # mean 4, variance 4
    for expected in ((0.4, 1.3), (0.76, 1.57)):  # 0.9 of what was, 0.1 of the batch's
        norm.batch_norm_forward(x, np.ones(1), np.zeros(1), running, train=True)
        np.testing.assert_allclose((running["mean"][0], running["var"][0]), expected, rtol=1e-14)
    assert running["mean"] is mean
    out, _ = norm.batch_norm_forward(x, np.ones(1), np.zeros(1), running, train=False, eps=0)
    np.testing.assert_allclose(out, (x - 0.76) / np.sqrt(1.57), rtol=1e-14)
    np.testing.assert_allclose(running["mean"], 0.76, rtol=1e-14)  # testing changes nothing


def test_testing_needs_running_statistics():
    with pytest.raises(ValueError, match="running"):
        norm.batch_norm_forward(np.ones((2, 3)), np.ones(3), np.zeros(3), train=False)


def test_outputs_have_mean_beta_and_deviation_gamma(rng):
    x, gamma, beta = rng.normal(5, 3, (200, 4, 3, 6)), np.array([1.0, 2, 3, 4, 5, 6]), np.arange(6.0)
    out, _ = norm.spatial_batch_norm_forward(x, gamma, beta, train=True)
    np.testing.assert_allclose(out.mean(axis=(0, 1, 2)), beta, atol=1e-12)
    np.testing.assert_allclose(out.std(axis=(0, 1, 2)), gamma, rtol=1e-5)
    one, zero = np.ones(6), np.zeros(6)
    layer, _ = norm.layer_norm_forward(x, one, zero)
    np.testing.assert_allclose(layer.mean(axis=-1), 0, atol=1e-12)
    group, _ = norm.spatial_group_norm_forward(x, one, zero, 3)
    grouped = group.reshape(200, 4, 3, 3, 2)  # neighbouring channels share a group
    np.testing.assert_allclose(grouped.mean(axis=(1, 2, 4)), 0, atol=1e-12)
    np.testing.assert_allclose(grouped.std(axis=(1, 2, 4)), 1, rtol=1e-4)


def test_relations_between_the_methods(rng):
    x, gamma, beta = rng.standard_normal((5, 8)), rng.standard_normal(8), rng.standard_normal(8)
    layer, _ = norm.layer_norm_forward(x, gamma, beta)
    group, _ = norm.group_norm_forward(x, gamma, beta, 1)
    np.testing.assert_allclose(group, layer, rtol=0, atol=1e-14)
    # layer normalisation is batch normalisation of the transposed matrix
    batch, _ = norm.batch_norm_forward(x.T, np.ones(5), np.zeros(5), train=True)
    np.testing.assert_allclose(gamma * batch.T + beta, layer, rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_against_finite_differences(seed):
    found = checks.normalizing(np.random.default_rng(seed))
    assert len(found) == 7
    for name, checked in found.items():
        for check in checked:
            assert check.norm < 1e-8 and check.relative < checks.BOUND, (name, check)
            assert check.checked == check.size, (name, check)


def keras_layer(kind, gamma, beta, shape):
    import keras

    layer = {
        "batch": lambda: keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, dtype="float64"),
        "layer": lambda: keras.layers.LayerNormalization(epsilon=1e-5, dtype="float64"),
        "group": lambda: keras.layers.GroupNormalization(3, epsilon=1e-5, dtype="float64"),
    }[kind]()
    layer.build(shape)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    return layer


OURS = {
    ("batch", 2): (lambda x, g, b: norm.batch_norm_forward(x, g, b, train=True), norm.batch_norm_backward),
    ("batch", 4): (lambda x, g, b: norm.spatial_batch_norm_forward(x, g, b, train=True),
                   norm.spatial_batch_norm_backward),
    ("layer", 2): (norm.layer_norm_forward, norm.layer_norm_backward),
    ("layer", 4): (norm.layer_norm_forward, norm.layer_norm_backward),
    ("group", 2): (lambda x, g, b: norm.group_norm_forward(x, g, b, 3), norm.group_norm_backward),
    ("group", 4): (lambda x, g, b: norm.spatial_group_norm_forward(x, g, b, 3), norm.spatial_group_norm_backward),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "axes"), OURS)
def test_keras_agrees(rng, kind, axes):
    import tensorflow as tf

    x = rng.normal(2, 3, (5, 6) if axes == 2 else (5, 4, 3, 6))
    gamma, beta, d_out = rng.standard_normal(6), rng.standard_normal(6), rng.standard_normal(x.shape)
    layer, there = keras_layer(kind, gamma, beta, x.shape), tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(there)
        theirs = layer(there, training=True)
    forward, backward = OURS[kind, axes]
    out, cache = forward(x, gamma, beta)
    np.testing.assert_allclose(out, theirs, rtol=0, atol=1e-12)
    gradients = tape.gradient(theirs, [there, layer.gamma, layer.beta], output_gradients=tf.constant(d_out))
    for mine, their in zip(backward(d_out, cache), gradients, strict=True):
        np.testing.assert_allclose(mine, their, rtol=0, atol=1e-12)


def test_keras_keeps_the_same_running_statistics_and_tests_with_them(rng):
    running, gamma, beta = norm.running_statistics(6, np.float64), rng.standard_normal(6), rng.standard_normal(6)
    layer = keras_layer("batch", gamma, beta, (5, 6))
    for _ in range(4):
        x = rng.normal(2, 3, (50, 6))
        norm.batch_norm_forward(x, gamma, beta, running, train=True)
        layer(x, training=True)
    np.testing.assert_allclose(running["mean"], layer.moving_mean, rtol=1e-12)
    np.testing.assert_allclose(running["var"], layer.moving_variance, rtol=1e-12)
    out, _ = norm.batch_norm_forward(x, gamma, beta, running, train=False)
    np.testing.assert_allclose(out, layer(x, training=False), rtol=0, atol=1e-12)


@pytest.mark.parametrize("axes", [2, 4])
def test_batch_norm_backward_in_testing_is_kerass(rng, axes):
    import tensorflow as tf

    x = rng.normal(2, 3, (5, 6) if axes == 2 else (5, 4, 3, 6))
    gamma, beta, d_out = rng.standard_normal(6), rng.standard_normal(6), rng.standard_normal(x.shape)
    running = {"mean": rng.standard_normal(6), "var": rng.uniform(0.5, 2, 6)}
    layer, there = keras_layer("batch", gamma, beta, x.shape), tf.constant(x)
    layer.moving_mean.assign(running["mean"])
    layer.moving_variance.assign(running["var"])
    with tf.GradientTape() as tape:
        tape.watch(there)
        theirs = layer(there, training=False)
    kind = "batch_norm" if axes == 2 else "spatial_batch_norm"
    out, cache = getattr(norm, f"{kind}_forward")(x, gamma, beta, running, train=False)
    np.testing.assert_allclose(out, theirs, rtol=0, atol=1e-12)
    gradients = tape.gradient(theirs, [there, layer.gamma, layer.beta], output_gradients=tf.constant(d_out))
    for mine, their in zip(getattr(norm, f"{kind}_backward")(d_out, cache), gradients, strict=True):
        np.testing.assert_allclose(mine, their, rtol=0, atol=1e-12)


def test_dtype_is_kept(rng):
    x, one, zero = rng.standard_normal((3, 4, 4, 6)).astype(np.float32), np.ones(6, "f4"), np.zeros(6, "f4")
    running = norm.running_statistics(6)
    for train in (True, False):
        out, cache = norm.spatial_batch_norm_forward(x, one, zero, running, train=train)
        assert out.dtype == running["mean"].dtype == np.float32
        assert all(gradient.dtype == np.float32 for gradient in norm.spatial_batch_norm_backward(out, cache))
    out, cache = norm.spatial_group_norm_forward(x, one, zero, 2)
    assert all(array.dtype == np.float32 for array in (out, *norm.spatial_group_norm_backward(out, cache)))


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match="6 channels cannot be divided into 4 groups"):
        norm.group_norm_forward(np.zeros((2, 6)), np.ones(6), np.zeros(6), 4)


# --- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.25, 0.4, 0.7])
def test_dropout_keeps_the_expectation_and_the_share(rng, keep):
    x = rng.normal(10, 1, (400, 500))
    out, mask = dropout.dropout_forward(x, keep, rng, train=True)
    assert (out != 0).mean() == pytest.approx(keep, abs=0.005)  # 200,000 draws: standard error 0.001
    assert out.mean() == pytest.approx(10, rel=0.02)
    np.testing.assert_allclose(out[out != 0], (x / keep)[out != 0], rtol=1e-15)
    np.testing.assert_array_equal(dropout.dropout_backward(np.ones_like(x), mask), (out != 0) / keep)


def test_dropout_backward_is_the_tapes(rng):
    import tensorflow as tf

    x, d_out, keep = rng.standard_normal((30, 20)), rng.standard_normal((30, 20)), 0.6
    out, mask = dropout.dropout_forward(x, keep, rng, train=True)
    there = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(there)
        theirs = tf.where(out != 0, there / keep, 0)  # tf.nn.dropout's definition, with the units that ours has kept
    np.testing.assert_allclose(out, theirs, rtol=0, atol=1e-12)
    slope = tape.gradient(theirs, there, output_gradients=tf.constant(d_out))
    np.testing.assert_allclose(dropout.dropout_backward(d_out, mask), slope, rtol=0, atol=1e-12)


def test_testing_leaves_everything_as_it_is(rng):
    x = rng.standard_normal((3, 4))
    for keep, train in ((0.5, False), (1.0, True)):
        out, cache = dropout.dropout_forward(x, keep, rng, train=train)
        np.testing.assert_array_equal(out, x)
        np.testing.assert_array_equal(dropout.dropout_backward(x, cache), x)


def test_the_same_generator_state_gives_the_same_mask():
    x = np.ones((20, 30), np.float32)
    first, again, other = (dropout.dropout_forward(x, 0.5, np.random.default_rng(s), train=True)[0] for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.float32 and (first != other).any()


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5])
def test_keep_is_a_probability(rng, keep):
    with pytest.raises(ValueError, match="keep"):
        dropout.dropout_forward(np.ones(3), keep, rng, train=True)
