"""models.numpy_net.linear: preparation, losses, training and search of a linear classifier."""

import numpy as np
import pytest

from course.core import InputError
from models.numpy_net import gradcheck, linear


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def test_preparation_uses_the_training_part_alone(rng):
    train, other = rng.integers(0, 256, (50, 4, 3)).astype(np.uint8), rng.integers(0, 256, (7, 4, 3)).astype(np.uint8)
    train[:, 0, 0] = 9  # a pixel that never changes
    x, z = linear.prepare(train, other, scale=True)
    assert x.shape == (50, 13) and z.shape == (7, 13) and x.dtype == z.dtype == np.float32
    assert (x[:, -1] == 1).all() and (z[:, -1] == 1).all()
    np.testing.assert_allclose(x[:, :-1].mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(x[:, 1:-1].std(axis=0), 1, atol=1e-5)
    assert (x[:, 0] == 0).all() and np.isfinite(z).all()
    flat = train.reshape(50, -1).astype(float)
    expected = (other.reshape(7, -1) - flat.mean(axis=0))[:, 1:] / flat.std(axis=0)[1:]
    np.testing.assert_allclose(z[:, 1:-1], expected, atol=1e-4)
    (plain,) = linear.prepare(train)
    np.testing.assert_allclose(plain[:, :-1], flat - flat.mean(axis=0), atol=1e-4)


def test_losses_by_hand():
    x, y = np.array([[1.0, 1.0]]), np.array([0])
    w = np.array([[1.0, 0.5, -2.0], [0.0, 0.0, 0.0]])
    assert linear.svm(w, x, y)[0] == pytest.approx(0.5)  # class 1 is 0.5 behind and ought to be 1, class 2 is 3 behind
    assert linear.softmax(w, x, y)[0] == pytest.approx(np.log(np.exp([1, 0.5, -2]).sum()) - 1)
    assert linear.svm(w, x, y, 2.0)[0] == pytest.approx(0.5 + (1 + 0.25 + 4))


@pytest.mark.parametrize("loss", [linear.svm, linear.softmax])
@pytest.mark.parametrize("reg", [0.0, 0.7])
def test_gradients(loss, reg, rng):
    x, y, w = rng.standard_normal((9, 6)), rng.integers(0, 4, 9), rng.standard_normal((6, 4))
    truth = np.eye(4, dtype=bool)[y]

    def sides():
        scores = x @ w
        return (scores - scores[truth][:, None] + 1 > 0) & ~truth

    pieces = sides if loss is linear.svm else None
    gradients = {"w": loss(w, x, y, reg)[1]}
    (check,) = gradcheck.check(lambda: loss(w, x, y, reg)[0], {"w": w}, gradients, pieces=pieces)
    assert check.relative < 1e-7 and check.checked > 20


@pytest.mark.parametrize("loss", [linear.svm, linear.softmax])
def test_training_separates_what_can_be_separated(loss, rng):
    y = rng.integers(0, 3, 300)
    (x,) = linear.prepare(np.eye(3)[y] + 0.1 * rng.standard_normal((300, 3)))
    w, history = linear.train(loss, x, y, 3, lr=0.5, reg=1e-4, steps=300, batch=30, rng=rng)
    assert w.shape == (4, 3) and w.dtype == np.float32
    assert linear.accuracy(w, x, y) == 100
    assert history.shape == (300,) and history[-20:].mean() < 0.2 * history[0]


def test_training_depends_on_its_generator_alone(rng):
    x, y = rng.standard_normal((40, 5)).astype(np.float32), rng.integers(0, 3, 40)
    runs = [linear.train(linear.svm, x, y, 3, lr=0.1, reg=0.1, steps=20, rng=np.random.default_rng(seed))[0]
            for seed in (1, 1, 2)]  # fmt: skip
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (runs[0] != runs[2]).any()


def test_a_loss_that_explodes_is_one_clear_line(rng):
    x, y = 100 * rng.standard_normal((40, 5)), rng.integers(0, 3, 40)
    with np.errstate(over="ignore", invalid="ignore"), pytest.raises(InputError, match="lower the learning rate"):
        linear.train(linear.softmax, x, y, 3, lr=1e3, reg=10.0, steps=1_000, rng=rng)


def test_the_search_visits_the_grid_and_the_best_is_the_first_of_equals():
    kept = {}

    def once(name, function):
        return kept.setdefault(name, function())

    rows = linear.search(once, lambda lr, reg: {"train": 1.0, "validation": min(lr * reg, 6)}, (1, 2), (3, 4))
    assert list(kept) == ["lr-1-reg-3", "lr-1-reg-4", "lr-2-reg-3", "lr-2-reg-4"]
    assert [(row["lr"], row["reg"]) for row in rows] == [(1, 3), (1, 4), (2, 3), (2, 4)]
    assert (linear.best(rows)["lr"], linear.best(rows)["reg"]) == (2, 3)


def test_two_searches_of_one_run_keep_their_answers_apart():
    kept = {}

    def once(name, function):
        return kept.setdefault(name, function())

    for stage, found in ("coarse", 1.0), ("fine", 2.0):
        (row,) = linear.search(once, lambda lr, reg, found=found: {"validation": found}, (0.1,), (3,), stage=stage)
        assert row == {"lr": 0.1, "reg": 3, "validation": found}
    assert list(kept) == ["coarse-lr-0.1-reg-3", "fine-lr-0.1-reg-3"]


def test_fit_measures_what_it_trained_and_trains_as_told(rng):
    x, y = rng.standard_normal((40, 5)).astype(np.float32), rng.integers(0, 3, 40)
    learn, held = (x[:30], y[:30]), (x[30:], y[30:])
    how = {"lr": 0.1, "reg": 0.1, "steps": 20, "batch": 8}
    found, w, history = linear.fit(linear.svm, learn, held, 3, seed=4, **how)
    expected, losses = linear.train(linear.svm, *learn, 3, rng=np.random.default_rng(4), **how)
    np.testing.assert_array_equal(w, expected)
    np.testing.assert_array_equal(history, losses)
    assert found == {"train": linear.accuracy(w, *learn), "validation": linear.accuracy(w, *held)}
    _, own, _ = linear.fit(linear.svm, learn, held, 3, seed=4, train=lambda *_, **__: (w + 1, history), **how)
    np.testing.assert_array_equal(own, w + 1)


def test_losses_are_compared_with_the_first(rng):
    x, y = rng.standard_normal((9, 6)), rng.integers(0, 4, 9)

    def off(w, x, y, reg):
        value, d_w = linear.svm(w, x, y, reg)
        return value + 0.5, d_w + 1

    first, same, wrong = linear.compare({"svm": linear.svm, "same": linear.svm, "off": off}, x, y, 4, rng)
    assert first["loss difference"] == same["loss difference"] == same["gradient difference"] == 0
    assert wrong["loss difference"] == pytest.approx(0.5)
    assert wrong["gradient difference"] == pytest.approx(np.sqrt(6 * 4))


def test_templates_leave_the_bias_out(rng):
    w = rng.standard_normal((2 * 3 * 3 + 1, 5))
    w[-1] = 1e6
    figure = linear.draw_templates(w, (2, 3, 3), list("abcde"))
    shown = np.stack([axis.images[0].get_array() for axis in figure.axes])
    assert shown.shape == (5, 2, 3, 3)
    assert shown.min() >= 0 and shown.max() <= 1 and np.ptp(shown) > 0.5
