"""Day 22's own lines, against worked values and against the tools of `compression` that do the same."""

import numpy as np
import pytest
import tensorflow as tf

from compression import cluster, distill, layers, prune
from course import day22_compression as day22


@pytest.fixture(scope="module")
def kernel():
    return np.random.default_rng(0).normal(size=(3, 3, 16, 8)).astype(np.float32) * np.geomspace(0.01, 1, 8, dtype="f")


def test_rounded_by_hand():
    w = np.array([[1.0, 0.3], [-0.5, -0.1], [0.2, 0.04]], np.float32)  # 3 bits: -3 s .. 3 s
    expected = np.array([[1.0, 0.3], [-2 / 3, -0.1], [1 / 3, 0.0]])  # s = 1/3 and 0.1; -1.5 s is made even: -2 s
    np.testing.assert_allclose(day22.rounded(w, 3), expected, atol=1e-6)
    expected = np.array([[1.0, 1 / 3], [-2 / 3, 0.0], [1 / 3, 0.0]])
    np.testing.assert_allclose(day22.rounded(w, 3, per_channel=False), expected, atol=1e-6)
    assert not day22.rounded(np.zeros((2, 2), np.float32), 8).any()


def test_rounded_is_what_the_training_rounds_to(kernel):
    for bits in (4, 8):
        ours = day22.rounded(kernel, bits)
        theirs = np.asarray(layers.fake_quant_weights(kernel, layers.bounds(kernel), bits))
        steps = np.abs(kernel).max(axis=(0, 1, 2)) / (2 ** (bits - 1) - 1)
        assert (np.abs(ours - theirs) < 1e-3 * steps).mean() > 0.999  # a half may go either way


def test_a_bit_is_six_decibels_and_a_scale_a_filter_is_worth_more_than_one(kernel):
    flat = np.random.default_rng(1).uniform(-1, 1, (64, 512)).astype(np.float32)

    def noise(w, bits, **how):
        return 10 * np.log10(np.mean(np.square(day22.rounded(w, bits, **how) - w)))

    gains, steps = np.diff([noise(flat, bits) for bits in range(4, 10)]), 2.0 ** np.arange(3, 9) - 1  # to max |w|
    np.testing.assert_allclose(gains, -20 * np.log10(steps[1:] / steps[:-1]), atol=0.1)
    assert gains[-1] == pytest.approx(-6.02, abs=0.05)
    quiet = kernel[..., :1]  # a hundredth of the loudest filter
    together = np.mean(np.square(day22.rounded(kernel, 8, per_channel=False)[..., :1] - quiet))
    alone = np.mean(np.square(day22.rounded(kernel, 8)[..., :1] - quiet))
    assert together > 1_000 * alone


def test_without_smallest_is_magnitude_pruning(kernel):
    kernels = {"a": kernel, "b": 3 * kernel[:1]}
    for together, scope in ((False, "layer"), (True, "global")):
        masks = prune.magnitude(kernels, 0.75, scope)
        for name, pruned in day22.without_smallest(kernels, 0.75, together).items():
            np.testing.assert_array_equal(pruned != 0, masks[name])
            np.testing.assert_array_equal(pruned[masks[name]], kernels[name][masks[name]])


def test_shared_is_k_means(kernel):
    by_hand = day22.shared(np.array([0.0, 0.1, 0.9, 1.0, 5.0], np.float32), 3)
    np.testing.assert_allclose(by_hand, [0.5, 0.5, 0.5, 0.5, 5.0])  # 0, 2.5, 5: none is nearest to 2.5, which stays
    ours = day22.shared(kernel, 8, rounds=300)
    centroids, members = cluster.k_means(kernel, cluster.first_centroids(kernel, 8))
    theirs = centroids[members].reshape(kernel.shape)
    assert len(np.unique(ours)) <= 8
    assert np.mean(np.square(ours - kernel)) < 1.05 * np.mean(np.square(theirs - kernel))


def test_soft_gradients_are_those_of_the_loss():
    rng = np.random.default_rng(2)
    wanted, given = 5 * rng.normal(size=(2, 40, 10))
    for row in day22.soft_gradients(wanted, given):
        z = tf.Variable(given)
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(distill.soft_loss(tf.constant(wanted), z, float(row["temperature"])))
        slope = float(np.abs(tape.gradient(value, z)).mean())
        assert row["times_t_squared"] == pytest.approx(slope, rel=1e-6)
        assert row["gradient"] == pytest.approx(slope / row["temperature"] ** 2, rel=1e-6)
    rows = day22.soft_gradients(wanted, given, (50, 100))
    assert rows[1]["gradient"] / rows[0]["gradient"] == pytest.approx(1 / 4, rel=0.05)  # eq. 6's limit
    assert rows[1]["times_t_squared"] / rows[0]["times_t_squared"] == pytest.approx(1, rel=0.05)


def test_metrics_name_the_arms_that_were_made():
    row = {"difference": -0.01, "times_smaller": 4.0, "times_smaller_gzip": 5.0, "times_faster_1": 3.0}
    rows = [{"arm": "float", "accuracy": 0.9} | row, {"arm": "int8"} | row, {"arm": "student", "why": "no layers"}]
    found = day22.metrics(rows)
    assert next(iter(found)) == "test_accuracy" and found["test_accuracy"] == pytest.approx(90)
    assert found["int8_points"] == pytest.approx(-1) and found["int8_times_faster"] == 3.0
    assert not any(name.startswith("student") for name in found)
