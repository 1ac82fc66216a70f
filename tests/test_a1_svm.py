"""Assignment 1, multiclass SVM: the hinge in loops and without, its gradient and kinks, and the training loop."""

import numpy as np
import pytest

from course import a1_svm
from models.numpy_net import linear

LOSSES = [a1_svm.svm_loss_naive, a1_svm.svm_loss]


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def problem(rng, n=40, inputs=12, classes=5):
    return rng.standard_normal((inputs, classes)), rng.standard_normal((n, inputs)), rng.integers(0, classes, n)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_by_hand(loss):
    x, y = np.eye(2), np.array([0, 2])
    w = np.array([[3.2, 5.1, -1.7], [2.2, 2.5, -3.1]])  # the scores of two examples
    value, d_w = loss(w, x, y, 0.0)
    assert value == pytest.approx((2.9 + 0 + 6.3 + 6.6) / 2)
    np.testing.assert_allclose(d_w, [[-0.5, 0.5, 0], [0.5, 0.5, -1]])
    with_l2, d_l2 = loss(w, x, y, 0.1)
    assert with_l2 == pytest.approx(value + 0.05 * (w**2).sum())
    np.testing.assert_allclose(d_l2, d_w + 0.1 * w)


@pytest.mark.parametrize("reg", [0.0, 0.3])
def test_naive_vectorised_library_and_tape_agree(reg, rng):
    w, x, y = problem(rng)
    value, d_w = a1_svm.svm_loss_naive(w, x, y, reg)
    for other in (a1_svm.svm_loss, linear.svm, linear.by_tape(a1_svm.hinge_in_tensorflow)):
        theirs, d_theirs = other(w, x, y, reg)
        assert theirs == pytest.approx(value, abs=1e-12)
        np.testing.assert_allclose(d_theirs, d_w, rtol=0, atol=1e-12)


def test_the_loss_of_one_who_knows_nothing(rng):
    _, x, y = problem(rng)
    assert a1_svm.svm_loss(np.zeros((12, 5)), x, y, 0.0)[0] == 4


def test_finite_differences_and_kinks(rng):
    _, x, y = problem(rng, n=100, inputs=30)
    regs, steps = a1_svm.check_gradients(x, y, 5, rng)
    assert [row["regularisation"] for row in regs] == [0.0, 0.5]
    assert all(row["relative"] < 1e-7 and row["checked"] > 50 for row in regs)
    assert steps[-1]["kinks crossed"] > 10 and steps[0]["kinks crossed"] == 0
    assert steps[-1]["worst error, all"] > 1e-3  # the check of a right gradient fails
    assert steps[-1]["worst error, uncrossed"] < 1e-8  # and here is why


@pytest.mark.parametrize("h", [1e-6, 1e-3, 1.0])
def test_the_slope_across_the_kink_is_wrong_at_any_step(h):
    assert a1_svm.kink(h) == pytest.approx(0.625, abs=1e-12)


def test_the_training_loop_is_the_library_s(rng):
    _, x, y = problem(rng)
    how = {"lr": 0.05, "reg": 0.1, "steps": 30, "batch": 10}
    for dtype in (np.float32, np.float64):
        rows = x.astype(dtype)
        ours, curve = a1_svm.train(a1_svm.svm_loss, rows, y, 5, rng=np.random.default_rng(1), **how)
        theirs, _ = linear.train(a1_svm.svm_loss, rows, y, 5, rng=np.random.default_rng(1), **how)
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == dtype
    assert len(curve) == 30 and curve[-5:].mean() < curve[:5].mean()


def test_batches_are_drawn_with_replacement(rng):
    seen = []

    def loss(w, x, y, reg):
        seen.append(np.sort(x[:, 0]).tolist())
        return 0.0, np.zeros_like(w)

    a1_svm.train(loss, np.arange(5.0)[:, None], np.arange(5), 5, lr=1, reg=0, steps=20, batch=5, rng=rng)
    assert any(len(set(rows)) < 5 for rows in seen)
    assert {row for rows in seen for row in rows} == set(range(5))


def test_predictions_and_accuracy():
    w = np.array([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    x = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]])
    assert a1_svm.predict(w, x).tolist() == [2, 1, 1, 0]  # of equals the first
    assert a1_svm.accuracy(w, x, np.array([2, 1, 0, 0])) == 75


def test_the_bias_trick(rng):
    w, x, _ = problem(rng)
    b = rng.standard_normal(5)
    with_one = np.column_stack([x, np.ones(len(x))])
    np.testing.assert_allclose(with_one @ np.vstack([w, b]), x @ w + b, atol=1e-12)


def test_digits_are_learned(rng):
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    learn, held = linear.prepare(x[:1400], x[1400:], scale=True)
    w, _ = a1_svm.train(a1_svm.svm_loss, learn, y[:1400], 10, lr=0.02, reg=0.01, steps=1_000, batch=50, rng=rng)
    assert a1_svm.accuracy(w, held, y[1400:]) > 88
