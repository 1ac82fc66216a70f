"""Assignment 2, fully connected networks: the lesson's own layers, losses and networks."""

import numpy as np
import pytest

from course import a2_fully_connected as unit
from course import core
from models.numpy_net import losses
from models.numpy_net import net as nets


@pytest.fixture
def rng():
    return np.random.default_rng(4)


def few(rng, classes=10):
    """50 pictures of noise, which have nothing to learn but themselves."""
    return rng.standard_normal((50, 16, 16, 3)).astype(np.float32), rng.integers(0, classes, 50)


def test_layers_by_hand():
    x, w, b = np.array([[[1.0], [2.0]], [[0.0], [-1.0]]]), np.array([[3.0, 0.0], [1.0, -4.0]]), np.array([0.5, 1.0])
    out, cache = unit.affine_forward(x, w, b)
    np.testing.assert_array_equal(out, [[5.5, -7.0], [-0.5, 5.0]])
    dx, dw, db = unit.affine_backward(np.array([[1.0, 0.0], [2.0, 1.0]]), cache)
    np.testing.assert_array_equal(dx, [[[3.0], [1.0]], [[6.0], [-2.0]]])
    np.testing.assert_array_equal(dw, [[1.0, 0.0], [0.0, -1.0]])
    np.testing.assert_array_equal(db, [3.0, 1.0])
    out, cache = unit.affine_relu_forward(x, w, b)
    np.testing.assert_array_equal(out, [[5.5, 0.0], [0.0, 5.0]])
    dx, dw, db = unit.affine_relu_backward(np.ones((2, 2)), cache)
    np.testing.assert_array_equal(dx, [[[3.0], [1.0]], [[0.0], [-4.0]]])
    np.testing.assert_array_equal(dw, [[1.0, 0.0], [2.0, -1.0]])
    np.testing.assert_array_equal(db, [1.0, 1.0])


@pytest.mark.parametrize("name", ["softmax", "svm"])
def test_losses_are_the_librarys(rng, name):
    ours, theirs = {
        "softmax": (unit.softmax_loss, losses.softmax_cross_entropy),
        "svm": (unit.svm_loss, losses.svm),
    }[name]
    scores, y = 3 * rng.standard_normal((30, 10)), rng.integers(0, 10, 30)
    (loss, slope), (expected, d) = ours(scores, y), theirs(scores, y)
    assert loss == pytest.approx(expected, rel=1e-14)
    np.testing.assert_allclose(slope, d, atol=1e-16)
    np.testing.assert_array_equal(ours(scores.astype(np.float32), y)[1].dtype, np.float32)


def test_losses_by_hand():
    scores, y = np.array([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]]), np.array([1, 0])
    loss, _ = unit.softmax_loss(scores, y)
    assert loss == pytest.approx((1e4 + np.log(3)) / 2, rel=1e-15)
    loss, slope = unit.svm_loss(scores, y)
    assert loss == (10001 + 2) / 2  # the first row's third class is far below; both wrong ones of the second are equal
    np.testing.assert_array_equal(slope, [[0.5, -0.5, 0], [-1, 0.5, 0.5]])


@pytest.mark.parametrize("seed", range(3))
def test_every_gradient_is_right(seed):
    gradients, views = unit.check(np.random.default_rng(seed))
    assert len(gradients) == 3 + 1 + 3 + 2 + 2 * (4 + 6 + 10 + 10)
    for row in gradients:
        assert row["relative"] < 1e-6, row  # the notebook asks for "around 1e-6 or less"
        assert row["checked"] >= 0.9 * row["size"], row
    for row in views:
        assert row["library"] < 1e-15, row
        assert row.get("GradientTape", 0) < 1e-14, row
    assert ["GradientTape" in row for row in views] == [True, False, True, False, True, False, False, False]
    plain = [row["loss"] for row in views if row["reg"] == 0 and "norm" not in row["net"] and row["net"] != "all"]
    np.testing.assert_allclose(plain, np.log(10), atol=0.1)


def test_regularisation_is_added_once_and_to_weights_alone(rng):
    net = nets.create(rng, (6, 5, 3), dtype=np.float64)
    net.params["b1"] += 7
    x, y = rng.standard_normal((4, 6)), rng.integers(0, 3, 4)
    weights = sum((net.params[name] ** 2).sum() for name in ("W1", "W2"))
    for loss in unit.two_layer_loss, unit.deep_loss:
        (plain, before), (value, after) = loss(net, x, y), loss(net, x, y, 3.14)
        assert value - plain == pytest.approx(0.5 * 3.14 * weights, rel=1e-12)
        np.testing.assert_allclose(after["W1"] - before["W1"], 3.14 * net.params["W1"], rtol=1e-9)
        np.testing.assert_array_equal(after["b1"], before["b1"])


def test_testing_uses_running_statistics_and_drops_nothing(rng):
    net = nets.create(rng, (6, 8, 7, 3), normalization="batch", keep=0.5)
    x = rng.standard_normal((20, 6)).astype(np.float32)
    for _ in range(5):
        unit.forward(net, x, train=True, rng=rng)
    assert net.running["mean1"].any()
    np.testing.assert_array_equal(unit.deep_scores(net, x), nets.scores(net, x))


def test_a_normalisation_of_another_lesson_is_refused(rng):
    net, x = nets.create(rng, (6, 8, 3), normalization="layer"), rng.standard_normal((4, 6)).astype(np.float32)
    for call in (lambda: unit.deep_scores(net, x), lambda: unit.deep_loss(net, x, np.zeros(4, int), rng=rng)):
        with pytest.raises(core.InputError, match="layer normalisation is not in this lesson"):
            call()


def test_as_many_scores_as_there_are_classes(rng):
    curve = unit.learn_few(few(rng, classes=13), 13, 3, None, 0.03, unit.Config())
    assert max(curve) == 100


@pytest.mark.parametrize("depth", [3, 5])
def test_scores_grow_with_the_power_of_the_depth(rng, depth):
    """Eq. 6: all weights times a make all scores times a^L."""
    net = nets.create(rng, (12, *[9] * (depth - 1), 4), dtype=np.float64)
    larger = nets.cast(net, np.float64)
    for name in larger.params:
        larger.params[name] *= 1.7
    x = rng.standard_normal((5, 12))
    np.testing.assert_allclose(unit.deep_scores(larger, x), 1.7**depth * unit.deep_scores(net, x), rtol=1e-12)


@pytest.mark.parametrize("depth", [3, 5])
def test_fifty_pictures_are_learned_by_heart_within_20_epochs(rng, depth):
    curve = unit.learn_few(few(rng), 10, depth, None, 0.03, unit.Config())
    assert len(curve) == 20 and max(curve) == 100


def test_a_tiny_scale_learns_nothing_and_a_huge_one_explodes(rng):
    examples = few(rng)
    assert max(unit.learn_few(examples, 10, 5, 1e-3, 0.01, unit.Config())) < 50
    assert unit.learn_few(examples, 10, 5, 100.0, 0.1, unit.Config()) == [0.0]


def test_sweep_has_a_row_for_each_trial(rng):
    found = np.array(unit.sweep(few(rng), 10, 3, [1e-3, 0.08], unit.Config(trials=2)))
    assert found.shape == (2, 2)
    assert (found[:, 1] > found[:, 0] + 30).all()


def test_mirrored_reverses_half_of_the_pictures_left_to_right(rng):
    x = rng.standard_normal((400, 4, 6, 2)).astype(np.float32)
    out = unit.mirrored(x, rng)
    same, reversed_ = ((out == other).all(axis=(1, 2, 3)) for other in (x, x[:, :, ::-1]))
    assert (same ^ reversed_).all() and out.dtype == x.dtype
    assert reversed_.mean() == pytest.approx(0.5, abs=0.1)
