"""Running statistics against those of all the data at once, saved with the network, and of returns summed by hand."""

import keras
import numpy as np
import pytest

from models.rl import normalise


def test_merged_statistics_are_those_of_everything():
    rng = np.random.default_rng(0)
    parts = [rng.normal(3, 2, (size, 4)) for size in (1, 5, 1000, 17)]
    mean, variance, count = np.zeros(4), np.ones(4), 0
    for part in parts:
        mean, variance, count = normalise.merge(mean, variance, count, part)
    whole = np.concatenate(parts)
    np.testing.assert_allclose(mean, whole.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(variance, whole.var(axis=0), rtol=1e-12)
    assert count == len(whole)


def test_a_large_mean_costs_no_digits():
    """E[x^2] - E[x]^2 would be off by 1e16 * 2e-16 / 1e-4, four orders of magnitude."""
    values = 1e8 + 0.01 * np.random.default_rng(1).standard_normal((1000, 1))
    mean, variance, count = np.zeros(1), np.ones(1), 0
    for part in np.split(values, 10):
        mean, variance, count = normalise.merge(mean, variance, count, part)
    np.testing.assert_allclose(variance, np.var(values - 1e8, axis=0), rtol=1e-4)


@pytest.fixture
def layer():
    layer = normalise.RunningNormalization(clip=3.0)
    layer.build((None, 2))
    layer.update(np.array([[[0.0, 10.0], [2.0, 10.0]], [[4.0, 10.0], [6.0, 14.0]]]))  # [T, N, D]
    return layer


def test_layer_by_hand(layer):
    # means 3 and 11, variances 5 and 3
    x = np.array([[3.0, 11.0], [3 + 5**0.5, 11 - 3**0.5], [1e6, -1e6]], np.float32)
    expected = [[0, 0], [1, -1], [3, -3]]
    np.testing.assert_allclose(layer(x), expected, atol=1e-6)
    np.testing.assert_allclose(layer.as_numpy()(x), expected, atol=1e-6)


def test_layer_is_the_identity_before_the_first_update_and_calls_change_nothing():
    layer = normalise.RunningNormalization()
    x = np.array([[0.5, -2.0]], np.float32)
    for _ in range(3):
        np.testing.assert_allclose(layer(x, training=True), x, rtol=1e-6)


def test_layer_has_nothing_to_train_and_is_saved_with_its_network(layer, tmp_path):
    model = keras.Sequential([keras.Input([2]), layer, keras.layers.Dense(3)])
    assert len(model.trainable_variables) == 2
    model.save(tmp_path / "policy.keras")
    again = keras.saving.load_model(tmp_path / "policy.keras")
    x = np.random.default_rng(2).normal(5, 4, (6, 2)).astype(np.float32)
    np.testing.assert_array_equal(model(x), again(x))
    assert float(again.layers[0].count) == 4
    again.layers[0].update(x)
    assert float(again.layers[0].count) == 10


def test_returns_begin_anew_with_each_episode():
    scaler = normalise.ReturnScaler(envs=2, gamma=0.5, clip=100.0, epsilon=0.0)
    rewards = np.array([[1.0, 4.0], [1.0, 4.0], [1.0, 4.0]])
    done = np.array([[False, False], [False, True], [False, False]])
    seen = np.array([[1, 4], [1.5, 6], [1.75, 4]])  # G = 0.5 G + r; the second environment starts over
    np.testing.assert_allclose(scaler.scale(rewards, done), rewards / seen.std(), rtol=1e-6)
    more = np.array([[1.875, 6]])  # both go on over the edge of the batch
    expected = rewards[:1] / np.concatenate([seen, more]).std()
    np.testing.assert_allclose(scaler.scale(rewards[:1], done[:1]), expected, rtol=1e-6)


def test_scaled_rewards_are_cut_and_keep_their_sign():
    scaler = normalise.ReturnScaler(envs=1, gamma=0.9, clip=2.0)
    rewards = np.array([[0.01], [-0.01], [0.0], [50.0], [0.01]])
    scaled = scaler.scale(rewards, np.zeros((5, 1), bool))
    assert scaled.max() <= 2.0 and scaled.dtype == np.float32
    np.testing.assert_array_equal(np.sign(scaled), np.sign(rewards))
