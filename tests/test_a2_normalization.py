"""Assignment 2, batch normalisation: the unit's own layers by hand, by differences, against the library and Keras."""

import keras
import numpy as np
import pytest

from course import a2_normalization as unit
from models.numpy_net import checks, norm, trials


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def averages(features):
    return norm.running_statistics(features, np.float64)


def test_batch_norm_by_hand():
    x, running = np.array([[0.0], [4.0]]), averages(1)  # mean 2, variance 4
    out, _ = unit.batch_norm_forward(x, np.array([3.0]), np.array([1.0]), running, train=True, eps=0)
    np.testing.assert_allclose(out, [[-2], [4]], rtol=1e-15)  # 3 * -1 + 1 and 3 * 1 + 1
    assert running["mean"] == pytest.approx(0.9 * 0 + 0.1 * 2, rel=1e-15)
    assert running["var"] == pytest.approx(0.9 * 1 + 0.1 * 4, rel=1e-15)
    out, _ = unit.batch_norm_forward(np.array([[1.5]]), 3.0, 1.0, running, train=False, eps=0)
    assert out.item() == pytest.approx(3 * (1.5 - 0.2) / 1.3**0.5 + 1, rel=1e-15)
    assert running["mean"] == pytest.approx(0.2, rel=1e-15)  # testing leaves it alone


def test_layer_norm_by_hand():
    out, _ = unit.layer_norm_forward(np.array([[0.0, 4], [1, 2]]), np.array([3.0, 1]), np.array([1.0, 0]), eps=0)
    np.testing.assert_allclose(out, [[-2, 1], [-2, 1]], rtol=1e-15)


def test_layer_norm_is_batch_norm_of_the_transpose(rng):
    x = rng.standard_normal((7, 5))
    turned, _ = unit.batch_norm_forward(x.T, 1.0, 0.0, averages(7), train=True)
    np.testing.assert_allclose(unit.layer_norm_forward(x, 1.0, 0.0)[0], turned.T, rtol=1e-13, atol=1e-14)


def test_one_example_alone_comes_out_as_beta_in_training_and_as_itself_in_testing(rng):
    x, gamma, beta = rng.standard_normal((3, 5))
    alone, _ = unit.batch_norm_forward(x[None], gamma, beta, averages(5), train=True)
    np.testing.assert_array_equal(alone[0], beta)
    tested, _ = unit.batch_norm_forward(x[None], gamma, beta, averages(5), train=False, eps=0)
    np.testing.assert_allclose(tested[0], gamma * x + beta, rtol=1e-15)


def test_layer_norm_of_one_feature_is_beta_and_of_two_their_order(rng):
    one, _ = unit.layer_norm_forward(rng.standard_normal((9, 1)), 2.0, 0.5)
    np.testing.assert_array_equal(one, 0.5)
    x = rng.standard_normal((9, 2))
    two, _ = unit.layer_norm_forward(x, 1.0, 0.0, eps=0)
    np.testing.assert_allclose(two, np.sign(x - x[:, ::-1]), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_against_finite_differences_and_keras(seed):
    found, differences = unit.check(np.random.default_rng(seed))
    table = checks.rows(found)
    assert {row["of"] for row in table} >= {"batch norm, staged", "batch norm, short", "layer norm",
                                            "4-layer net, batch norm", "4-layer net, layer norm"}  # fmt: skip
    for row in table:
        assert row["relative"] < 1e-7, row  # the assignment reports 1e-13 to 1e-8, with a floor of its own
        assert row["checked"] > 0.9 * row["size"], row
        if not row["of"].startswith("4-layer net, batch"):  # there the gradient of a bias is zero but for rounding
            assert row["norm"] < 1e-8, row
    assert len(differences) == 5
    for row in differences:
        assert row["difference from Keras"] < 1e-13, row


@pytest.mark.parametrize("shape", [(4, 5), (50, 100), (1000, 20)])  # of 2 examples, dx is rounding alone
def test_both_backward_passes_are_equal(rng, shape):
    x, d_out, gamma = 5 * rng.standard_normal(shape) + 12, rng.standard_normal(shape), rng.standard_normal(shape[1])
    _, cache = unit.batch_norm_forward(x, gamma, 0.0, averages(shape[1]), train=True)
    staged, short = unit.batch_norm_backward(d_out, cache), unit.batch_norm_backward_short(d_out, cache)
    for a, b in zip(staged, short, strict=True):
        assert np.abs(a - b).max() <= 1e-13 * np.abs(a).max()


def test_the_gradient_has_no_part_along_what_normalisation_ignores(rng):
    x, d_out = rng.standard_normal((2, 20, 6))
    _, cache = unit.batch_norm_forward(x, np.ones(6), 0.0, averages(6), train=True, eps=0)
    dx, _, _ = unit.batch_norm_backward_short(d_out, cache)
    assert np.abs(dx.sum(axis=0)).max() < 1e-14  # shifts of a column
    assert np.abs((dx * cache[0]).sum(axis=0)).max() < 1e-14  # and stretches


def test_the_library_agrees_over_several_batches(rng):
    gamma, beta = rng.standard_normal((2, 6))
    ours, theirs = averages(6), averages(6)
    for _ in range(5):
        x, d_out = 3 * rng.standard_normal((2, 20, 6)) + 1
        out, cache = unit.batch_norm_forward(x, gamma, beta, ours, train=True)
        library, library_cache = norm.batch_norm_forward(x, gamma, beta, theirs, train=True)
        np.testing.assert_allclose(out, library, rtol=1e-12, atol=1e-14)
        slopes = unit.batch_norm_backward(d_out, cache), norm.batch_norm_backward(d_out, library_cache)
        for a, b in zip(*slopes, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)
    for name in ("mean", "var"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-13)


def test_keras_keeps_the_same_running_averages_and_tests_with_them(rng):
    gamma, beta = rng.standard_normal((2, 6))
    layer = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, dtype="float64")
    layer.build((None, 6))
    layer.set_weights([gamma, beta, np.zeros(6), np.ones(6)])
    running = averages(6)
    for _ in range(5):
        x = 3 * rng.standard_normal((20, 6)) + 1
        out, _ = unit.batch_norm_forward(x, gamma, beta, running, train=True)
        np.testing.assert_allclose(out, layer(x, training=True), rtol=1e-12, atol=1e-14)
    for name, variable in zip(("mean", "var"), layer.non_trainable_variables, strict=True):
        np.testing.assert_allclose(running[name], variable, rtol=1e-12)
    tested, _ = unit.batch_norm_forward(x, gamma, beta, running, train=False)
    np.testing.assert_allclose(tested, layer(x, training=False), rtol=1e-12, atol=1e-14)


def test_after_training_the_test_mode_output_has_mean_beta_and_deviation_gamma(rng):
    rows = unit.settle(rng)
    assert len(rows) == 3
    for row in rows:  # 5 standard errors of running averages over some 3,800 examples, and of 10,000 fresh ones
        assert row["mean"] == pytest.approx(row["beta"], abs=0.1 * row["gamma"])
        assert row["deviation"] == pytest.approx(row["gamma"], rel=0.1)


def test_invariances(rng):
    feature, example, others = unit.invariances(rng)
    assert feature["batch norm"] < 1e-12 < 0.1 < feature["layer norm"]
    assert example["layer norm"] < 1e-12 < 0.1 < example["batch norm"]
    assert others["layer norm"] == 0 and others["batch norm"] > 0.1


def test_float32_stays_float32(rng):
    x, d_out = rng.standard_normal((2, 10, 4)).astype(np.float32)
    gamma, beta = np.ones(4, np.float32), np.zeros(4, np.float32)
    running = norm.running_statistics(4)
    out, cache = unit.batch_norm_forward(x, gamma, beta, running, train=True)
    arrays = [out, *running.values(), *unit.batch_norm_backward(d_out, cache)]
    arrays += unit.batch_norm_backward_short(d_out, cache)
    out, cache = unit.layer_norm_forward(x, gamma, beta)
    arrays += [out, *unit.layer_norm_backward(d_out, cache)]
    assert {array.dtype for array in arrays} == {np.dtype(np.float32)}


def digits():
    """scikit-learn's 8x8 digits: [(x, y) to train on, (x, y) for validation], mean 0."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = ((x - x.mean(axis=0)) / 16).astype(np.float32)
    return [(x[:500], y[:500]), (x[500:1000], y[500:1000])]


def test_a_deep_network_with_small_weights_learns_only_when_normalised():
    settings = {"epochs": 10, "batch": 50, "lr": 1e-3}
    ends = {}
    for normalization in (None, "batch", "layer"):
        options = {"normalization": normalization, "weight_scale": 0.01}
        ends[normalization] = trials.learn(digits(), (64, 50, 50, 50, 50, 50, 10), options, 0, 0, **settings)
    assert ends[None]["training"][-1] < 20  # of ten classes
    assert ends["batch"]["training"][-1] > 80
    assert ends["layer"]["training"][-1] > 60
    assert ends[None]["spread"][0] < 1e-5 < 0.1 < ends["batch"]["spread"][0]


class Run:
    """What `trials.compare` asks of a run, in memory."""

    def __init__(self):
        self.kept, self.calls = {}, 0

    def once(self, name, function):
        if name not in self.kept:
            self.calls += 1
            self.kept[name] = function()
        return self.kept[name]


def test_trials_are_kept_and_gathered():
    run, kinds = Run(), {"plain": {}, "batch norm": {"normalization": "batch"}}
    settings = {"seed": 0, "trials": 2, "epochs": 3, "batch": 100, "lr": 1e-3}
    found = trials.compare(run, "five units", kinds, digits(), (5,), **settings)
    assert run.calls == 4 and found["plain"]["loss"].shape == (2, 3)
    assert (found["plain"]["loss"][0] != found["plain"]["loss"][1]).all()  # each from its own weights
    again = trials.compare(run, "five units", kinds, digits(), (5,), **settings)
    assert run.calls == 4
    np.testing.assert_array_equal(again["batch norm"]["loss"], found["batch norm"]["loss"])

    results = {5: found, 6: again}
    ends = trials.ends(results, "validation")
    assert list(ends) == list(kinds) and ends["plain"].shape == (2, 2)
    np.testing.assert_array_equal(ends["plain"][:, 0], found["plain"]["validation"][:, -1])
    rows = trials.table("units", results)
    assert [row["units"] for row in rows] == [5, 6]
    assert rows[0]["batch norm, training"] == pytest.approx(found["batch norm"]["training"][:, -1].mean())
