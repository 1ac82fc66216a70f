"""models/numpy_net/losses: squared error of probabilities, focal, label smoothing, and calibration."""

import numpy as np
import pytest

from models.numpy_net import gradcheck, losses

NEW = {
    "squared error": losses.softmax_squared_error,
    "focal": losses.focal,
    "focal, gamma 0.5": lambda scores, labels: losses.focal(scores, labels, gamma=0.5),
    "label smoothing": losses.label_smoothing,
    "label smoothing 0.4": lambda scores, labels: losses.label_smoothing(scores, labels, amount=0.4),
}
HALF = np.array([[np.log(2), 0.0, 0.0]])  # probabilities 1/2, 1/4, 1/4


@pytest.fixture
def rng():
    return np.random.default_rng(19)


def test_squared_error_by_hand():
    value, slope = losses.softmax_squared_error(HALF, np.array([0]))
    assert value == pytest.approx((0.25 + 0.0625 + 0.0625) / 3, rel=1e-14)
    # u = 2/3 (-1/2, 1/4, 1/4), sum of p u = -1/12, slope = p (u + 1/12)
    np.testing.assert_allclose(slope, [[-1 / 8, 1 / 16, 1 / 16]], rtol=1e-14)


def test_focal_by_hand():
    value, slope = losses.focal(HALF, np.array([0]))
    assert value == pytest.approx(np.log(2) / 4, rel=1e-14)  # (1 - 1/2)^2 log 2
    factor = 1 / 4 + 2 * (1 / 2) * (1 / 2) * np.log(2)  # (1 - p)^2 - 2 p (1 - p) log p
    np.testing.assert_allclose(slope, factor * np.array([[-1 / 2, 1 / 4, 1 / 4]]), rtol=1e-14)


def test_label_smoothing_by_hand():
    value, slope = losses.label_smoothing(HALF, np.array([0]), amount=0.3)  # targets 0.8, 0.1, 0.1
    assert value == pytest.approx(0.8 * np.log(2) + 0.2 * np.log(4), rel=1e-14)
    np.testing.assert_allclose(slope, [[0.5 - 0.8, 0.25 - 0.1, 0.25 - 0.1]], rtol=1e-14)


@pytest.mark.parametrize("name", NEW)
def test_against_finite_differences(rng, name):
    scores, labels = 2 * rng.standard_normal((20, 7)), rng.integers(0, 7, 20)
    gradients = {"scores": NEW[name](scores, labels)[1]}
    (found,) = gradcheck.check(lambda: NEW[name](scores, labels)[0], {"scores": scores}, gradients)
    assert found.checked == 140
    assert found.relative < 1e-7 and found.norm < 1e-7


def keras_losses():
    import keras

    return {
        "squared error": lambda y, s: keras.ops.mean(keras.losses.mean_squared_error(y, keras.ops.softmax(s))),
        # Keras weighs every class by alpha, where the paper weighs the rare one
        "focal": lambda y, s: keras.ops.mean(keras.losses.categorical_focal_crossentropy(y, s, 1.0, 2.0, True)),
        "label smoothing": lambda y, s: keras.ops.mean(keras.losses.categorical_crossentropy(y, s, True, 0.1)),
    }


@pytest.mark.parametrize("name", ["squared error", "focal", "label smoothing"])
def test_against_keras_and_its_tape(rng, name):
    import tensorflow as tf

    labels, scores = rng.integers(0, 6, 12), tf.constant(rng.standard_normal((12, 6)))
    with tf.GradientTape() as tape:
        tape.watch(scores)
        theirs = keras_losses()[name](tf.one_hot(labels, 6, dtype=tf.float64), scores)
    value, slope = NEW[name](scores.numpy(), labels)
    assert value == pytest.approx(float(theirs), rel=1e-6)  # Keras clips probabilities and keeps constants in float32
    np.testing.assert_allclose(slope, tape.gradient(theirs, scores), rtol=1e-6, atol=1e-8)


def test_binary_cross_entropy_against_the_tape(rng):
    import tensorflow as tf

    targets, scores = rng.uniform(size=(12, 6)), tf.constant(3 * rng.standard_normal((12, 6)))
    with tf.GradientTape() as tape:
        tape.watch(scores)
        theirs = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(targets, scores))
    value, slope = losses.bce_with_logits(scores.numpy(), targets)
    assert value == pytest.approx(float(theirs), abs=1e-12)
    np.testing.assert_allclose(slope, tape.gradient(theirs, scores), rtol=0, atol=1e-12)


@pytest.mark.parametrize("margin", [1.0, 2.5])
def test_svm_against_the_tape(rng, margin):
    import tensorflow as tf

    labels, scores = rng.integers(0, 6, 12), tf.constant(2 * rng.standard_normal((12, 6)))
    truth = tf.one_hot(labels, 6, dtype=tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(scores)
        true = tf.reduce_sum(truth * scores, axis=1, keepdims=True)
        theirs = tf.reduce_sum(tf.nn.relu(scores - true + margin) * (1 - truth)) / 12
    value, slope = losses.svm(scores.numpy(), labels, margin)
    assert value == pytest.approx(float(theirs), abs=1e-12)
    np.testing.assert_allclose(slope, tape.gradient(theirs, scores), rtol=0, atol=1e-12)


def test_focal_with_gamma_0_and_no_smoothing_are_cross_entropy(rng):
    scores, labels = 3 * rng.standard_normal((30, 5)), rng.integers(0, 5, 30)
    value, slope = losses.softmax_cross_entropy(scores, labels)
    for other in (losses.focal(scores, labels, gamma=0.0), losses.label_smoothing(scores, labels, amount=0.0)):
        assert other[0] == pytest.approx(value, rel=1e-14)
        np.testing.assert_allclose(other[1], slope, atol=1e-15)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_huge_scores_are_safe_and_the_dtype_is_kept(name, dtype):
    scores = np.array([[1e4, 0, -1e4], [1e4, 0, -1e4]], dtype)
    value, slope = NEW[name](scores, np.array([0, 2]))
    assert np.isfinite(value) and np.isfinite(slope).all() and slope.dtype == dtype
    np.testing.assert_allclose(slope.sum(axis=1), 0, atol=1e-6)  # no loss of the probabilities sees a constant


def test_a_sure_and_wrong_answer_is_pulled_by_cross_entropy_and_not_by_squared_error():
    scores, labels = np.array([[20.0, 0.0, 0.0]]), np.array([1])
    assert np.abs(losses.softmax_cross_entropy(scores, labels)[1]).max() > 0.99
    assert np.abs(losses.softmax_squared_error(scores, labels)[1]).max() < 1e-8


def test_label_smoothing_is_least_at_its_targets():
    scores = np.log(np.array([[0.8, 0.1, 0.1]]))
    value, slope = losses.label_smoothing(scores, np.array([0]), amount=0.3)
    np.testing.assert_allclose(slope, 0, atol=1e-16)
    assert value == pytest.approx(-(0.8 * np.log(0.8) + 0.2 * np.log(0.1)), rel=1e-14)


def test_calibration_by_hand():
    # answers with 0.9: one right, one wrong | with 0.6: right
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    ece = losses.expected_calibration_error(p, np.array([0, 1, 1]), bins=10)
    assert ece == pytest.approx((2 * abs(0.5 - 0.9) + 1 * abs(1 - 0.6)) / 3, rel=1e-12)


def test_calibration_of_the_sure():
    sure = np.eye(2)
    assert losses.expected_calibration_error(sure, np.array([0, 1])) == 0  # the last bin takes a confidence of 1
    assert losses.expected_calibration_error(sure, np.array([1, 0])) == 1


def test_calibration_of_honest_probabilities_falls_with_their_number(rng):
    p = rng.dirichlet(np.ones(4), 40_000)
    labels = (p.cumsum(axis=1) < rng.random((40_000, 1))).sum(axis=1)  # drawn as p says
    assert losses.expected_calibration_error(p, labels) < 0.01
    sharper = p**3 / (p**3).sum(axis=1, keepdims=True)
    assert losses.expected_calibration_error(sharper, labels) > 0.1
