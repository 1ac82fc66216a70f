"""Day 03: the decomposition, dropout and batch normalisation, the stack of networks, and what the lesson claims."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from course import core
from course import day03_bias_variance as day03
from models import stacked
from models.overfitting import report, sets, trials


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture(scope="module")
def clothes():
    """The committed set, and a pool of it with a fifth of the labels wrong."""
    data = core.data.load("fashion_mnist_12k")
    return data, sets.pool(data, inputs=20, noise=0.2, tests=1_000, seed=0)


# --- decompositions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("truth", "noise", "bias2"),
    [((1.0, 0.0), 0.0, 0.5 - 0.5), ((0.8, 0.2), 1 - 0.64 - 0.04, 0.3**2 + 0.3**2 - 0.5)],
)
def test_the_terms_by_hand(truth, noise, bias2):
    found = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])  # two networks that disagree: mean (1/2, 1/2), distances^2 1/2
    terms = day03.decompose(found, np.array([truth]))
    assert terms["noise"] == pytest.approx(noise)
    assert terms["variance"] == pytest.approx((0.5 + 0.5) / (2 - 1))
    assert terms["bias2"] == pytest.approx(bias2)  # less variance / 2, which the mean of two still has
    assert terms["error"] == pytest.approx((2 * truth[1] + 2 * truth[0]) / 2)  # |y - f|^2 is 0 or 2


def test_the_terms_sum_to_the_expected_error_which_is_that_on_drawn_labels(rng):
    truth = sets.distribution(rng.integers(0, 4, 30), 4, 0.3)
    found = rng.standard_normal((7, 30, 4))
    terms = day03.decompose(found, truth)
    assert terms["noise"] + terms["bias2"] + terms["variance"] == pytest.approx(terms["error"], rel=1e-12)
    labels = np.stack([np.eye(4)[rng.choice(4, 4_000, p=p)] for p in truth], axis=1)  # [draws,N,C]
    drawn = np.mean([((labels - f) ** 2).sum(axis=2).mean() for f in found])
    assert drawn == pytest.approx(terms["error"], rel=0.01)


def test_the_estimates_are_unbiased(rng):
    truth, centre, spread = np.array([[0.9, 0.1]]), np.array([[0.5, 0.3]]), 0.4
    terms = [day03.decompose(centre + spread * rng.standard_normal((3, 1, 2)), truth) for _ in range(4_000)]
    assert np.mean([t["variance"] for t in terms]) == pytest.approx(2 * spread**2, rel=0.05)
    assert np.mean([t["bias2"] for t in terms]) == pytest.approx(0.4**2 + 0.2**2, abs=0.02)


def test_votes_by_hand():
    chosen = np.array([[0, 1], [0, 1], [2, 0]])  # main answers 0 and 1
    terms = trials.decompose_votes(chosen, np.array([0, 0]))  # the second example's is wrong
    third = 100 / 3
    expected = {"bias": 50, "unbiased": third / 2, "helped": third / 2, "error": 50}
    assert terms == pytest.approx(expected)
    assert terms["error"] == pytest.approx(terms["bias"] + terms["unbiased"] - terms["helped"])


# --- dropout and batch normalisation ---------------------------------------------------------------------------------


def test_inverted_dropout_has_the_same_mean_in_training_and_in_test(rng):
    keep, draws = (0.25, 0.5, 1.0), 40_000
    layer, x = day03.Dropout(keep), rng.uniform(0.5, 2, (3, 1, 6)).astype(np.float32)
    np.testing.assert_array_equal(layer(x, training=False), x)
    out = np.asarray(layer(np.repeat(x, draws, axis=1), training=True))
    for p, one, seen in zip(keep, x, out, strict=True):
        assert (np.isclose(seen, one / p) | (seen == 0)).all()
        assert (seen != 0).mean() == pytest.approx(p, abs=0.01)
        np.testing.assert_allclose(seen.mean(axis=0), one[0], atol=5 * 2 * (1 / p / draws) ** 0.5 + 1e-3)
    assert ((out[0] != 0) != (out[1] != 0)).any(axis=0).all(), "each network has a mask of its own"


def test_relu_and_dropout_commute(rng):
    x = rng.standard_normal((2, 50, 8)).astype(np.float32)

    def dropped(x):
        keras.utils.set_random_seed(5)
        return day03.Dropout((0.5, 0.3))(x, training=True)

    np.testing.assert_array_equal(ops.relu(dropped(x)), dropped(ops.relu(x)))


def test_batch_norm_equals_that_of_keras_for_each_network(rng):
    ours, theirs = day03.BatchNorm((1, 1, 0)), [keras.layers.BatchNormalization(momentum=0.9) for _ in range(2)]
    for _ in range(3):
        x = (3 * rng.standard_normal((3, 20, 5)) + 2).astype(np.float32)
        out = np.asarray(ours(x, training=True))
        for s, layer in enumerate(theirs):
            np.testing.assert_allclose(out[s], layer(x[s], training=True), atol=1e-4)
    np.testing.assert_allclose(out[:2].mean(axis=1), 0, atol=1e-5)
    np.testing.assert_array_equal(out[2], x[2])
    one = x[:, :1]  # alone in a batch: only running statistics can serve
    out = np.asarray(ours(one, training=False))
    for s, layer in enumerate(theirs):
        np.testing.assert_allclose(ours.variance[s, 0], layer.moving_variance, rtol=1e-5)
        np.testing.assert_allclose(out[s], layer(one[s], training=False), atol=1e-4)


def test_layers_survive_saving(rng, tmp_path):
    x = rng.standard_normal((2, 8, 4)).astype(np.float32)
    model = day03.build(2, 4, (6,), 3, day03.USUAL, keep=(0.5, 0.8), norm=(1, 0))
    model(x, training=True)  # moves the running statistics
    model.save(tmp_path / "stack.keras")
    again = keras.saving.load_model(tmp_path / "stack.keras")
    np.testing.assert_array_equal(again(x), model(x))
    assert [layer.get_config() for layer in again.layers] == [layer.get_config() for layer in model.layers]


def test_variance_shift_is_what_the_formula_says_and_mending_removes_it(rng):
    keep, mean, spread = 0.5, 1.0, 2.0
    x = (mean + spread * rng.standard_normal((2, 4_000, 3))).astype(np.float32)
    image = keras.Input((None, 3))
    norms = [day03.BatchNorm((1, 1), momentum=0.5) for _ in range(2)]
    model = keras.Model(image, norms[1](norms[0](day03.Dropout((keep, 1.0))(image))))
    for _ in range(30):
        model(x, training=True)
    shift = np.asarray(trials.variance_shift(model, norms, x))
    expected = spread**2 / ((spread**2 + mean**2) / keep - mean**2)
    np.testing.assert_allclose(shift[0], [expected, 1], rtol=0.05)
    np.testing.assert_allclose(shift[1], shift[0], rtol=0.01)  # it is handed on
    trials.variance_shift(model, norms, x, mend=True)
    np.testing.assert_allclose(trials.variance_shift(model, norms, x), 1, rtol=1e-3)


# --- the stack -------------------------------------------------------------------------------------------------------


def trained(model, x, target, l2, steps=30):
    stacked.trainer(model, lambda: (ops.convert_to_tensor(x), ops.convert_to_tensor(target)),
                    stacked.squared_error, 0.02, steps, l2)(steps)  # fmt: skip
    return model.get_weights()


@pytest.mark.parametrize("norm", [(0, 0, 0), (1, 0, 1)])
def test_a_stack_trains_each_network_as_if_it_were_alone(rng, norm):
    nets, l2 = 3, np.array([0.0, 0.01, 0.1])
    x = rng.standard_normal((nets, 30, 4)).astype(np.float32)
    target = np.eye(3, dtype=np.float32)[rng.integers(0, 3, (nets, 30))]
    stack = day03.build(nets, 4, (8, 6), 3, ("norm", "relu"), norm=norm)
    start = stack.get_weights()
    end = trained(stack, x, target, l2)
    assert max(np.abs(a - b).max() for a, b in zip(start, end, strict=True)) > 0.1, "it has learnt something"
    for s in range(nets):
        alone = day03.build(1, 4, (8, 6), 3, ("norm", "relu"), norm=norm[s : s + 1])
        alone.set_weights([w[s : s + 1] for w in start])
        single = trained(alone, x[s : s + 1], target[s : s + 1], l2[s])
        if not norm[s]:  # a bias before a normalisation does nothing: its gradient is rounding, which Adam enlarges
            for ours, theirs in zip(end, single, strict=True):
                np.testing.assert_allclose(ours[s : s + 1], theirs, atol=1e-4)
        answer = np.asarray(stack(x, training=True))[s]
        np.testing.assert_allclose(answer, alone(x[s : s + 1], training=True)[0], atol=2e-4)


def test_a_stack_trains_as_ordinary_keras_layers(rng):
    x = rng.standard_normal((2, 30, 4)).astype(np.float32)
    target = np.eye(3, dtype=np.float32)[rng.integers(0, 3, (2, 30))]
    stack = day03.build(2, 4, (8,), 3)
    start = stack.get_weights()
    end = trained(stack, x, target, 0.0)
    rate = keras.optimizers.schedules.PolynomialDecay(0.02, 30, end_learning_rate=0.0)
    for s in range(2):
        plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(3)])
        plain.set_weights([w[s].reshape(v.shape) for w, v in zip(start, plain.get_weights(), strict=True)])
        loss = lambda t, a: ops.sum(ops.square(t - a), axis=-1)  # noqa: E731
        plain.compile(keras.optimizers.Adam(rate), loss, run_eagerly=True)  # quicker than a graph for 30 steps
        plain.fit(x[s], target[s], batch_size=30, epochs=30, verbose=0)
        for ours, theirs in zip(end, plain.get_weights(), strict=True):
            np.testing.assert_allclose(ours[s].reshape(theirs.shape), theirs, atol=2e-4)


def test_answers_in_pieces_are_those_of_the_whole(rng):
    model, x = day03.build(2, 4, (5,), 3), rng.standard_normal((7, 4)).astype(np.float32)
    both = np.stack([x, x])
    np.testing.assert_allclose(stacked.answers(model, x, chunk=3), np.asarray(model(both)), atol=1e-6)
    assert stacked.error(np.array([[[1.0, 0], [1, 0]], [[0, 1], [1, 0]]]), np.array([0, 0])).tolist() == [0, 50]


def test_minibatches_keep_to_a_networks_own_examples():
    x = np.arange(2 * 2 * 10).reshape(2, 2, 10, 1).astype(np.float32)  # version, set, example
    target = (x[0] % 20) * np.ones((1, 1, 3), np.float32)
    draw = trials.minibatches(x, target, 500, of=[1, 0, 1], counts=[10, 4, 10], moved=[0, 0, 1])
    seen, goal = (np.asarray(part) for part in draw())
    own = [set(range(10, 20)), set(range(4)), {*range(10, 20), *range(30, 40)}]  # of set 1, of set 0, both versions
    assert [set(part.ravel().astype(int)) for part in seen] == own
    np.testing.assert_array_equal(goal[..., 0], seen[..., 0] % 20)


def test_early_stopping_keeps_the_best_weights_before_patience_ran_out(rng):
    cfg = day03.Config(size=20, batch=20, epochs=40, lr=0.3, patience=2)
    x = rng.standard_normal((4, 20, 3)).astype(np.float32)
    target = np.eye(3, dtype=np.float32)[rng.integers(0, 3, (4, 20))]
    model = day03.build(4, 3, (8,), 3)
    history, kept = day03.learn(model, trials.minibatches(x, target, 20), cfg, 0.0, (x[::-1], target[::-1]))
    history, expected = np.array(history), []
    for losses in history.T:
        best = 0
        for epoch, loss in enumerate(losses):
            if epoch - best > cfg.patience:
                break
            best = epoch if loss < losses[best] else best
        expected.append(losses[best])
    model.set_weights(kept)
    found = np.asarray(stacked.cross_entropy(target[::-1], stacked.answers(model, x[::-1])))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert (found < history[-1]).any(), "otherwise nothing was stopped"


# --- sets and measures -----------------------------------------------------------------------------------------------


def test_corrupted_labels_have_the_stated_distribution(rng):
    labels = rng.integers(0, 5, 50_000)
    noisy = sets.corrupt(labels, 5, 0.3, rng)
    assert (noisy != labels).mean() == pytest.approx(0.3, abs=0.01)
    found = np.bincount(noisy[labels == 2], minlength=5) / (labels == 2).sum()
    np.testing.assert_allclose(found, sets.distribution(np.array([2]), 5, 0.3)[0], atol=0.02)
    np.testing.assert_allclose(sets.distribution(np.array([2]), 5, 0.3), [[0.075, 0.075, 0.7, 0.075, 0.075]])


def test_shifted_pictures():
    image = np.zeros((1, 4, 4, 1), np.uint8)
    image[0, 0, 3] = 9
    moved = sets.shifted(image, by=1)
    assert moved.shape == (9, 1, 4, 4, 1)
    np.testing.assert_array_equal(moved[0], image)
    assert sorted(tuple(np.argwhere(m)[0][1:3]) for m in moved if m.any()) == [(0, 2), (0, 3), (1, 2), (1, 3)]


def test_the_pool(clothes):
    data, pool = clothes
    rows = pool.rows(4, 100, np.random.default_rng(0))
    assert rows.shape == (4, 100) and len(np.unique(rows)) == 400
    x, y, target = pool.take(rows, pool.noisy)
    assert x.shape == (4, 100, 20) and x.dtype == target.dtype == np.float32
    np.testing.assert_array_equal(target.argmax(axis=2), y)
    assert (x**2).mean() == pytest.approx(1, abs=0.1)
    np.testing.assert_allclose(pool.moved(rows[:1], by=1)[0], x[:1], atol=1e-4)
    np.testing.assert_allclose(pool.truth.sum(axis=1), 1)
    with pytest.raises(core.InputError, match="ask for fewer"):
        pool.rows(101, 100, np.random.default_rng(0))
    with pytest.raises(core.InputError, match="784"):
        sets.pool(data, inputs=785, noise=0.2, tests=10, seed=0)
    with pytest.raises(core.InputError, match=r"20,000 test images are asked of .*smaller --tests"):
        sets.pool(data, inputs=5, noise=0.2, tests=20_000, seed=0)


def test_measures_of_uncertainty_by_hand():
    np.testing.assert_allclose(trials.entropy(np.array([[0.5, 0.5], [1.0, 0.0]])), [np.log(2), 0], atol=1e-9)
    unsure, wrong = np.array([0.9, 0.1, 0.5, 0.2]), np.array([True, False, False, True])
    assert trials.refusal(unsure, wrong, (0, 0.25, 0.5)) == pytest.approx([50, 100 / 3, 50])
    assert trials.detects(unsure, wrong) == pytest.approx(3 / 4)
    assert np.isnan(trials.detects(unsure, np.zeros(4, bool)))


def test_the_peak_is_where_the_curve_rises_again():
    assert report.highest([70, 40, 30, 50, 35, 25]) == 3
    assert report.peak_ratio([70, 40, 30, 50, 35, 25]) == 2
    assert report.peak_ratio([70, 40, 30, 25]) == 1, "no second rise, no peak"


# --- claims ----------------------------------------------------------------------------------------------------------


def test_random_features_err_most_where_they_just_interpolate(clothes):
    cfg = day03.Config(seeds=3, size=100, inputs=20, features=(20, 100, 2_000))
    found = trials.random_features(clothes[1], cfg)
    train, test = np.array(found["train"]), np.array(found["test"])
    assert (train[:, 0] > 10).all() and (train[:, 1:] == 0).all()
    assert (test[:, 1] > test[:, 0] + 10).all() and (test[:, 1] > test[:, 2] + 10).all()


@pytest.mark.slow
def test_double_descent(clothes):
    """On clothes, for which nothing was tuned: up to the threshold, down behind it; L2 cuts the peak off."""
    cfg = day03.Config(size=200, inputs=20, seeds=3, resamples=3, steps=1_500)
    middle = cfg.size * 10 // (cfg.inputs + 11)  # parameters = examples x classes
    few, peak, many = (day03.rung(cfg, clothes[1], (units,)) for units in (6, middle, 1_000))
    assert peak["capacity"] == pytest.approx(1, abs=0.02)
    test = {name: np.array(rung["new sets"]["test"]) for name, rung in (("few", few), ("peak", peak), ("many", many))}
    assert np.mean(few["new sets"]["train"]) > 5 > 1 > np.mean(peak["new sets"]["train"])
    assert (test["peak"] > test["few"]).all() and (test["peak"] > 1.1 * test["many"]).all()
    assert peak["new sets"]["variance"] > 2 * max(rung["new sets"]["variance"] for rung in (few, many))
    assert np.mean(peak["with L2"]["test"]) < test["peak"].mean() - 10
    for rung in (few, peak, many):
        terms = rung["bootstrap"]
        assert terms["noise"] + terms["bias2"] + terms["variance"] == pytest.approx(terms["error"], rel=1e-4)


@pytest.mark.slow
def test_the_cures_together_narrow_the_gap(clothes):
    cfg = dataclasses.replace(day03.Config(), seeds=3, size=300, inputs=20, epochs=60, keeps=(0.25,))
    found = day03.cures(cfg, clothes[1])
    gap = {tuple(row["cures"]) + (row["keep"],): np.mean(row["validation"]) - np.mean(row["train"]) for row in found}
    none, together = gap[(0.5,)], gap[(*day03.CURES, "early stopping", 0.5)]
    assert together < none / 2
    assert gap[("dropout", 0.25)] < gap[("dropout", 0.5)] < none
