"""Assignment 2, model search: folds that never meet, a search that resumes, and the measure of its optimism."""

import json
import types

import keras
import keras_tuner
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from keras_tuner import oracles

from course import a2_cross_validation as search
from course import core


@pytest.fixture
def rng():
    return np.random.default_rng(2)


def parts_of(rng, count=60, folds=3):
    """Three classes, well apart, in 8 numbers."""
    y = rng.integers(0, 3, 2 * count)
    x = (np.eye(8)[y] * 4 + rng.standard_normal((2 * count, 8))).astype(np.float32)
    train, held = search.fold_rows(count, folds, rng)
    return types.SimpleNamespace(x=x[:count], y=y[:count], train=train, held=held, x_audit=x[count:], y_audit=y[count:],
                                 strategy=tf.distribute.get_strategy())  # fmt: skip


def test_every_image_is_held_out_once_and_trained_on_by_the_other_folds(rng):
    train, held = search.fold_rows(20, 4, rng)
    assert train.shape == (15, 4) and held.shape == (5, 4)
    assert sorted(held.ravel()) == list(range(20))
    for fold in range(4):
        assert sorted([*train[:, fold], *held[:, fold]]) == list(range(20))


@pytest.mark.parametrize(("count", "folds"), [(20, 3), (20, 1), (3, 5)])
def test_folds_that_cannot_be_equal_are_refused(rng, count, folds):
    with pytest.raises(core.InputError, match=f"{count} images cannot be put into {folds} equal folds"):
        search.fold_rows(count, folds, rng)


def test_fold_dense_is_a_dense_layer_for_each_fold(rng):
    layer = search.FoldDense(5)
    x = rng.standard_normal((7, 3, 4)).astype(np.float32)
    out = keras.ops.convert_to_numpy(layer(x))
    kernel, bias = layer.get_weights()
    assert kernel.shape == (3, 4, 5) and bias.shape == (3, 5)
    for fold in range(3):
        np.testing.assert_allclose(out[:, fold], x[:, fold] @ kernel[fold] + bias[fold], atol=1e-5)
    wide = search.FoldDense(400)
    wide.build((None, 2, 50))
    assert wide.get_weights()[0].std() == pytest.approx((2 / 50) ** 0.5, rel=0.05)  # He: folds are no inputs
    assert search.FoldDense.from_config(layer.get_config()).units == 5


def test_the_folds_of_one_model_never_meet(rng):
    """Other images in one fold change nothing in the other: neither its scores nor its weights after training."""
    setting = {"rate": 0.01, "width": 6, "depth": 2, "dropout": 0.0, "decay": 0.01}
    x, y = rng.standard_normal((40, 2, 8)).astype(np.float32), rng.integers(0, 3, (40, 2))
    changed = np.stack([x[:, 0], rng.standard_normal((40, 8)).astype(np.float32) * 5 + 3], axis=1)
    after = []
    for images in (x, changed):
        keras.utils.set_random_seed(1)
        model = search.build_model(8, 2, 3, **setting)
        model.fit(images, y, batch_size=10, epochs=3, shuffle=False, verbose=0)
        after.append((model.get_weights(), keras.ops.convert_to_numpy(model(x, training=False))))
    (first, scores), (second, others) = after
    assert np.abs(scores[:, 0] - others[:, 0]).max() < 1e-5
    assert np.abs(scores[:, 1] - others[:, 1]).max() > 0.1
    assert len(first) == len(second) == 14
    for one, other in zip(first, second, strict=True):
        folded = (array if array.shape[0] == 2 else array.reshape(2, -1) for array in (one, other))
        a, b = folded
        np.testing.assert_allclose(a[0], b[0], atol=1e-5)
        assert np.abs(a[1] - b[1]).max() > 1e-4


def test_accuracies_by_fold(rng):
    model = search.build_model(8, 2, 3, rate=0.1, width=4, depth=1, dropout=0.5, decay=0.1)
    x, y = rng.standard_normal((30, 8)).astype(np.float32), rng.integers(0, 3, 30)
    both = np.repeat(x[:, None], 2, axis=1)
    said = keras.ops.convert_to_numpy(model(both, training=False)).argmax(axis=-1)
    expected = [100 * np.mean(said[:, fold] == y) for fold in range(2)]
    np.testing.assert_allclose(search.accuracies(model, x, y), expected)
    np.testing.assert_allclose(search.accuracies(model, both, np.repeat(y[:, None], 2, axis=1)), expected)


def test_halving_a_picture_averages_squares_of_four():
    x = np.zeros((1, 4, 2, 2), np.uint8)
    x[0, :2, :, 0] = [[255, 0], [255, 0]]
    x[0, 2:, :, 1] = 51
    np.testing.assert_allclose(search.halve(x), [[0.5, 0, 0, 0.2]], atol=1e-6)


def test_the_space_is_sampled_log_uniformly_within_its_bounds():
    drawn = []
    for seed in range(300):
        space = keras_tuner.HyperParameters()
        search.draw(space, search.SPACE)  # the questions
        for question in space.space:
            space.values[question.name] = question.random_sample(seed * 10 + len(question.name))
        drawn.append(search.draw(space, search.SPACE))
    for name, (low, high, sampling) in search.SPACE.items():
        values = np.array([setting[name] for setting in drawn])
        assert values.min() >= low and values.max() <= high
        if sampling == "log" and isinstance(low, float):
            assert np.median(np.log10(values)) == pytest.approx(np.log10(low * high) / 2, abs=0.4)
    assert all(isinstance(setting[name], int) for setting in drawn for name in ("width", "depth"))


@pytest.mark.parametrize("name", list(search.SPACE))
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_narrowed_is_a_third_as_long_around_the_best_and_inside(name, share):
    low, high, sampling = search.SPACE[name]
    to, back = (np.log, np.exp) if sampling == "log" else (float, float)
    at = back(to(low) + share * (to(high) - to(low)))
    middle = {other: (bounds[0] + bounds[1]) / 2 for other, bounds in search.SPACE.items()}
    bottom, top, kind = search.narrowed(search.SPACE, middle | {name: at})[name]
    assert kind == sampling and type(bottom) is type(low)
    slack = 0.5 if isinstance(low, int) else 1e-9
    assert low - 1e-9 <= bottom <= at + slack and at - slack <= top <= high + 1e-9
    if isinstance(low, float):
        assert to(top) - to(bottom if bottom > 0 else 0.0) == pytest.approx((to(high) - to(low)) / 3)


def hyperband(seed=1):
    return oracles.HyperbandOracle(keras_tuner.Objective("accuracy", "max"), max_epochs=3, factor=3, seed=seed,
                                   hyperband_iterations=1, max_consecutive_failed_trials=1)  # fmt: skip


CONFIG = search.Config(folds=3, epochs=3, batch=10)


@pytest.fixture(autouse=True)
def small_space(monkeypatch):
    monkeypatch.setitem(search.SPACE, "width", (4, 16, "log"))
    monkeypatch.setitem(search.SPACE, "depth", (1, 1, "linear"))


def test_successive_halving_sends_the_best_on_and_an_interrupted_search_ends_as_an_unbroken_one(
    tmp_path, monkeypatch, capsys
):
    parts = parts_of(np.random.default_rng(0))
    whole = search.search("halving", hyperband(), search.SPACE, parts, CONFIG, tmp_path / "whole")
    assert len(capsys.readouterr().out.splitlines()) == len(whole) == 6  # a line a trial and nothing else
    assert [row["epochs"] for row in whole] == [1, 1, 1, 3, 3, 3]
    assert [row["spent"] for row in whole] == [1, 1, 1, 2, 3, 3]
    assert [row["from"] for row in whole] == [None, None, None, search.best(whole[:3])["trial"], None, None]
    assert all(whole[3][name] == search.best(whole[:3])[name] for name in search.SPACE)
    for row in whole:
        assert 0 <= row["accuracy"] <= 100 and 0 <= row["audit"] <= 100

    fit, calls = search.fit, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:  # the trial that goes on from an earlier one
            raise KeyboardInterrupt
        fit(*arguments)

    monkeypatch.setattr(search, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search.search("halving", hyperband(), search.SPACE, parts, CONFIG, tmp_path / "broken")
    again = search.search("halving", hyperband(), search.SPACE, parts, CONFIG, tmp_path / "broken")
    assert len(calls) == 4 + 3
    assert json.dumps(again) == json.dumps(whole)


def test_a_trial_that_goes_on_has_the_weights_and_the_optimizer_of_the_earlier_one(tmp_path, monkeypatch):
    parts, seen = parts_of(np.random.default_rng(0)), []

    def noted(model, x, y, rows, first, last, cfg):
        before = [np.array(v) for v in model.optimizer.variables], model.get_weights()
        model.fit(x[rows], y[rows], batch_size=10, initial_epoch=first, epochs=last, verbose=0)
        seen.append((first, before, ([np.array(v) for v in model.optimizer.variables], model.get_weights())))

    monkeypatch.setattr(search, "fit", noted)
    rows = search.search("halving", hyperband(), search.SPACE, parts, CONFIG, tmp_path)
    (went_on,) = [i for i, row in enumerate(rows) if row["from"]]
    earlier = [row["trial"] for row in rows].index(rows[went_on]["from"])
    assert seen[went_on][0] == 1
    for then, now in zip(seen[earlier][2], seen[went_on][1], strict=True):
        for a, b in zip(then, now, strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_error_in_a_trial_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "fit", lambda *arguments: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        search.search("halving", hyperband(), search.SPACE, parts_of(np.random.default_rng(0)), CONFIG, tmp_path)


def test_optimism_of_scores_that_are_luck_alone_and_of_scores_that_are_merit_alone(rng):
    values = scipy.stats.norm.ppf((np.arange(400) + 0.5) / 400)
    luck = [{"score": value, "judge": 40.0} for value in values]
    found = search.optimism(luck, "score", "judge", rng, draws=3_000)[:10]
    assert found[0] == pytest.approx(0, abs=0.06)
    assert found[1] == pytest.approx(np.pi**-0.5, abs=0.06)  # the mean of the larger of two normal numbers
    assert found[9] == pytest.approx(1.5388, abs=0.06)  # and of the largest of ten
    merit = [{"score": value + 3, "judge": value} for value in rng.standard_normal(50)]  # an easier set of images
    np.testing.assert_allclose(search.optimism(merit, "score", "judge", rng), 0, atol=1e-9)
