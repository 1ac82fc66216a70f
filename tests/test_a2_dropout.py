"""Assignment 2, dropout: masks, means and gradients by hand, by differences, and against the library and Keras."""

import keras
import numpy as np
import pytest

from course import a2_dropout as unit
from course import core
from models.numpy_net import checks, dropout, gradcheck
from models.numpy_net import net as nets

KEEPS = 0.25, 0.4, 0.7  # those of the assignment


@pytest.fixture
def rng():
    return np.random.default_rng(3)


class Draws:
    """A generator whose next numbers are known."""

    def __init__(self, numbers):
        self.numbers = np.array(numbers)

    def random(self, shape):
        return self.numbers.reshape(shape)


def test_by_hand():
    out, mask = unit.dropout_forward(np.array([1.0, 2, 3, 4]), 0.5, Draws([0.4, 0.6, 0.0, 0.5]), train=True)
    np.testing.assert_array_equal(out, [2, 0, 6, 0])  # draws below 0.5 keep, and what is kept is doubled
    np.testing.assert_array_equal(unit.dropout_backward(np.array([1.0, 1, -1, 1]), mask), [2, 0, -2, 0])


def test_in_testing_nothing_happens(rng):
    x, d_out = rng.standard_normal((2, 3, 4))
    out, mask = unit.dropout_forward(x, 0.25, rng, train=False)
    assert out is x
    assert unit.dropout_backward(d_out, mask) is d_out


@pytest.mark.parametrize("keep", [*KEEPS, 1.0])
def test_equal_generators_draw_equal_masks_ours_and_the_librarys(rng, keep):
    x = rng.standard_normal((20, 30))
    (out, mask), (again, _) = (unit.dropout_forward(x, keep, np.random.default_rng(7), train=True) for _ in range(2))
    library, library_mask = dropout.dropout_forward(x, keep, np.random.default_rng(7), train=True)
    other, _ = unit.dropout_forward(x, keep, np.random.default_rng(8), train=True)
    np.testing.assert_array_equal(out, again)
    np.testing.assert_allclose(out, library, rtol=1e-15)
    slopes = unit.dropout_backward(x, mask), dropout.dropout_backward(x, library_mask)
    np.testing.assert_allclose(*slopes, rtol=1e-15)
    assert (out != other).any() == (keep < 1)


def test_float32_stays_float32(rng):
    out, mask = unit.dropout_forward(np.ones((5, 5), np.float32), 0.3, rng, train=True)
    assert out.dtype == mask.dtype == unit.dropout_backward(out, mask).dtype == np.float32


@pytest.mark.parametrize("keep", KEEPS)
def test_means_and_draws_of_ours_the_library_and_keras(rng, keep):
    rows = unit.measure(rng, keep)
    assert [row["of"] for row in rows] == ["ours", "library", "Keras"]
    for row in rows:
        assert row["mean in training"] == pytest.approx(10, abs=0.3)
        assert row["mean in testing"] == row["mean of x"] == pytest.approx(10, abs=0.02)
        assert row["zeros"] == pytest.approx(1 - keep, abs=0.01)
        for name in ("z of the mean", "z of the zeros", "z of the dispersion"):
            assert abs(row[name]) < 4, (row["of"], name)  # standard errors
        assert row["difference from eq. 3"] < 1e-13


def test_without_dividing_the_means_would_not_pass(rng, monkeypatch):
    def undivided(x, keep, rng, *, train):
        mask = (rng.random(x.shape) < keep).astype(x.dtype)
        return (x * mask, mask) if train else (x, None)

    monkeypatch.setattr(unit, "dropout_forward", undivided)
    ours, library, _ = unit.measure(rng, 0.4)
    assert abs(ours["z of the mean"]) > 100 > 4 > abs(library["z of the mean"])
    assert ours["difference from eq. 3"] > 1


def test_a_mask_shared_by_all_units_would_not_pass(rng, monkeypatch):
    def together(x, keep, rng, *, train):
        mask = (rng.random((len(x), 1)) < keep) / keep * np.ones_like(x)
        return (x * mask, mask) if train else (x, None)

    monkeypatch.setattr(unit, "dropout_forward", together)
    assert unit.measure(rng, 0.4)[0]["z of the dispersion"] > 100


@pytest.mark.parametrize("seed", range(3))
def test_gradients_and_first_losses(seed):
    found, first = unit.check_gradients(np.random.default_rng(seed))
    table = checks.rows(found)
    assert {row["of"] for row in table} == {*(f"keep {keep}" for keep in KEEPS),
                                            *(f"net, keep {keep}" for keep in (1.0, 0.75, 0.5))}  # fmt: skip
    for row in table:
        assert row["relative"] < 1e-7 and row["norm"] < 1e-7, row
        assert row["checked"] > 0.9 * row["size"], row
    for row in first:
        assert row["first loss"] == pytest.approx(np.log(10), abs=0.02)


def test_without_one_mask_differences_are_no_derivative(rng):
    x = rng.standard_normal((4, 5))
    (row,) = gradcheck.check_layer(lambda x: unit.dropout_forward(x, 0.5, rng, train=True), unit.dropout_backward,
                                   {"x": x}, rng)  # fmt: skip
    assert row.relative > 0.5


def test_three_conventions_for_one_network(rng):
    assert unit.keep_probability(0.25, "keep") == 0.25  # the paper, and CS231n since 2018
    assert unit.keep_probability(0.75, "drop") == 0.25  # CS231n in 2017, and Keras
    x = np.ones((100, 1000))
    ours, _ = unit.dropout_forward(x, unit.keep_probability(0.75, "drop"), rng, train=True)
    theirs = np.asarray(keras.layers.Dropout(0.75, seed=1, dtype="float64")(x, training=True))
    misread, _ = unit.dropout_forward(x, unit.keep_probability(0.75, "keep"), rng, train=True)
    error = 4 * (0.25 * 0.75 / x.size) ** 0.5  # four standard errors of a share
    assert (ours == 0).mean() == pytest.approx(0.75, abs=error)
    assert (theirs == 0).mean() == pytest.approx(0.75, abs=error)
    assert (misread == 0).mean() == pytest.approx(0.25, abs=error)
    assert set(np.unique(ours)) == set(np.unique(theirs)) == {0, 4}


@pytest.mark.parametrize(("p", "means"), [(0.0, "keep"), (1.0, "drop"), (1.5, "keep"), (-0.1, "drop"), (0.5, "half")])
def test_what_is_no_probability_is_refused(p, means):
    with pytest.raises(core.InputError, match="--p"):
        unit.keep_probability(p, means)


def test_a_wrong_convention_is_refused_before_the_run(tmp_path):
    with pytest.raises(core.InputError, match="--p-means half is not known: choose keep or drop"):
        unit.main(["--preset", "smoke", "--p-means", "half", "--runs", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_the_gradient_without_dividing(rng):
    net = nets.create(rng, (6, 9, 4), keep=0.5, dtype=np.float64)
    table = checks.training_loss(unit.undivided_loss, net, rng.standard_normal((5, 6)), rng.integers(0, 4, 5))
    assert {check.name for check in table} == {"W1", "b1", "W2", "b2"}
    assert max(check.relative for check in table) < 1e-7


def test_dividing_is_what_makes_the_scores_of_training_and_testing_agree(rng):
    net = nets.create(rng, (6, 200, 4), keep=0.25, dtype=np.float64)
    x = rng.standard_normal((10, 6))
    tested = nets.scores(net, x)
    trained = np.mean([nets.forward(net, x, train=True, rng=rng)[0] for _ in range(4000)], axis=0)
    np.testing.assert_allclose(trained, tested, atol=0.1 * np.abs(tested).max())
    y = rng.integers(0, 4, 10)
    quarter = nets.Net(net.params | {"W2": net.params["W2"] * 4}, keep=0.25)  # undoes the missing division
    value, _ = unit.undivided_loss(quarter, x, y, rng=np.random.default_rng(1))
    assert value == pytest.approx(nets.loss(net, x, y, rng=np.random.default_rng(1))[0], rel=1e-12)
