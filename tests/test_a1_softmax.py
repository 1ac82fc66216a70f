"""Assignment 1, softmax classifier: the cross-entropy in loops and without, large scores, and the hinge beside it."""

import numpy as np
import pytest

from course import a1_softmax
from models.numpy_net import linear

LOSSES = [a1_softmax.softmax_loss_naive, a1_softmax.softmax_loss]


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def problem(rng, n=40, inputs=12, classes=5):
    return rng.standard_normal((inputs, classes)), rng.standard_normal((n, inputs)), rng.integers(0, classes, n)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_by_hand(loss):
    x, y = np.eye(2), np.array([0, 1])
    w = np.log([[1.0, 2.0, 5.0], [2.0, 2.0, 4.0]])  # probabilities 1/8, 2/8, 5/8 and 1/4, 1/4, 1/2
    value, d_w = loss(w, x, y, 0.0)
    assert value == pytest.approx((np.log(8) + np.log(4)) / 2)
    np.testing.assert_allclose(d_w, [[-7 / 16, 2 / 16, 5 / 16], [1 / 8, -3 / 8, 2 / 8]])
    with_l2, d_l2 = loss(w, x, y, 0.1)
    assert with_l2 == pytest.approx(value + 0.05 * (w**2).sum())
    np.testing.assert_allclose(d_l2, d_w + 0.1 * w)


@pytest.mark.parametrize("reg", [0.0, 0.3])
def test_naive_vectorised_library_and_tape_agree(reg, rng):
    w, x, y = problem(rng)
    value, d_w = a1_softmax.softmax_loss_naive(w, x, y, reg)
    for other in (a1_softmax.softmax_loss, linear.softmax, linear.by_tape(a1_softmax.cross_entropy_in_keras)):
        theirs, d_theirs = other(w, x, y, reg)
        assert theirs == pytest.approx(value, abs=1e-12)
        np.testing.assert_allclose(d_theirs, d_w, rtol=0, atol=1e-12)


def test_the_loss_of_one_who_knows_nothing(rng):
    _, x, y = problem(rng)
    assert a1_softmax.softmax_loss(np.zeros((12, 5)), x, y, 0.0)[0] == pytest.approx(np.log(5), abs=1e-12)


def test_finite_differences(rng):
    _, x, y = problem(rng)
    table = a1_softmax.check_gradients(x, y, 5, rng)
    assert [row["regularisation"] for row in table] == [0.0, 0.5]
    assert all(row["relative"] < 1e-7 and row["checked"] == 60 for row in table)


def test_finite_differences_with_as_many_inputs_as_a_cifar_picture(rng):
    _, x, y = problem(rng, n=50, inputs=3_073, classes=10)
    table = a1_softmax.check_gradients(x / 2, y, 10, rng)  # |w|^2 is large here, and rounds
    assert [row["checked"] for row in table] == [60, 60]
    assert max(row["relative"] for row in table) < 1e-7


def test_large_scores_break_the_naive_loss_alone():
    table = a1_softmax.stability()
    for row in table:
        lead = row["score of a wrong class"]
        expected = lead + np.log1p(9 * np.exp(-float(lead)))
        assert row["stable loss"] == pytest.approx(expected, rel=1e-6)
        if lead <= 80:
            assert row["naive loss"] == pytest.approx(expected, rel=1e-5)
        else:
            assert np.isnan(row["naive loss"])  # e^100 is beyond float32
    assert max(row["score of a wrong class"] for row in table) == 1e4


def test_large_scores_have_finite_gradients():
    w = np.array([[0.0, 1e4, -1e4]], dtype=np.float32)
    value, d_w = a1_softmax.softmax_loss(w, np.ones((1, 1), np.float32), np.array([0]), 0.0)
    assert value == 1e4
    np.testing.assert_array_equal(d_w, [[-1, 1, 0]])


def test_an_example_beyond_the_margin_moves_the_cross_entropy_alone(rng):
    w, x, y = problem(rng)
    hinge, cross_entropy = a1_softmax.add_example(w, x, y)
    assert hinge["change of the sum"] == pytest.approx(0, abs=1e-10)
    assert hinge["joins the gradient"] == pytest.approx(0, abs=1e-10)
    # it leads by 2: between one rival at that distance, and four
    assert np.log1p(np.exp(-2)) < cross_entropy["change of the sum"] < np.log1p(4 * np.exp(-2))
    assert cross_entropy["joins the gradient"] > 0.1
    near, _ = a1_softmax.add_example(w, x, y, reach=0.5)  # within the margin the hinge minds
    assert near["change of the sum"] >= 0.5 - 1e-10


def test_the_loop_of_the_svm_learns_digits_with_this_loss(rng):
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    learn, held = linear.prepare(x[:1400], x[1400:], scale=True)
    w, curve = linear.train(
        a1_softmax.softmax_loss, learn, y[:1400], 10, lr=0.1, reg=1e-3, steps=1_000, batch=50, rng=rng
    )
    assert curve[0] == pytest.approx(np.log(10), abs=0.05)
    assert linear.accuracy(w, held, y[1400:]) > 88
