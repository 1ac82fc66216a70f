"""Assignment 1, two-layer network: scores, loss and gradients against numbers worked out otherwise, and training."""

import dataclasses

import numpy as np
import pytest

from course import a1_two_layer_net as two
from models.numpy_net import gradcheck, twin
from models.numpy_net import net as nets


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def small(rng, scale=None):
    return two.create(rng, 6, 7, 4, scale, np.float64), rng.standard_normal((9, 6)), rng.integers(0, 4, 9)


def test_the_toy_is_what_was_worked_out_by_hand():
    scores, hidden = two.forward(two.TOY_PARAMS, two.TOY_X)
    np.testing.assert_array_equal(hidden, [[1, 2, 0], [0, 3, 0], [2, 0, 4]])
    assert np.abs(scores - [[1, 2, 2], [0, 3, 4], [6, -4, -1]]).max() < 1e-7  # the bound of the assignment
    value, found = two.loss(two.TOY_PARAMS, two.TOY_X, two.TOY_Y, two.TOY_REG)
    assert value == pytest.approx(0.7298380897729763 + 0.7, abs=1e-12)  # cross-entropy and 0.1 / 2 * 14
    p = np.array([[1, np.e, np.e], [np.exp(-4), np.exp(-1), 1], [1, np.exp(-10), np.exp(-7)]])
    p /= p.sum(axis=1, keepdims=True)
    delta = (p - np.eye(3)[[2, 1, 0]]) / 3
    np.testing.assert_allclose(found["b2"], delta.sum(axis=0), atol=1e-15)
    np.testing.assert_allclose(found["W2"][0], delta[0] + 2 * delta[2] + 0.1 * two.TOY_PARAMS["W2"][0], atol=1e-15)


def test_the_loss_that_the_notebook_of_2018_prints():
    draw = np.random.RandomState(0)  # as the notebook draws its numbers
    params = {"W1": 0.1 * draw.randn(4, 10), "b1": np.zeros(10), "W2": 0.1 * draw.randn(10, 3), "b2": np.zeros(3)}
    x = 10 * np.random.RandomState(1).randn(5, 4)
    value, _ = two.loss(params, x, np.array([0, 1, 2, 2, 1]), reg=2 * 0.05)  # it has no 1/2 before its reg
    assert value == pytest.approx(1.30378789133, abs=1e-12)
    printed = [[-0.81233741, -1.27654624, -0.70335995], [-0.17129677, -1.18803311, -0.47310444],
               [-0.51590475, -1.01354314, -0.8504215], [-0.15419291, -0.48629638, -0.52901952],
               [-0.00618733, -0.12435261, -0.15226949]]  # fmt: skip
    assert np.abs(two.forward(params, x)[0] - printed).sum() < 1e-7


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reg", [0.0, 3.14])
def test_gradients_against_finite_differences(rng, reg, masked):
    params, x, y = small(rng)
    mask = (rng.random((9, 7)) < 0.5) / 0.5 if masked else None

    def on():
        return x @ params["W1"] + params["b1"] > 0

    _, found = two.loss(params, x, y, reg, mask)
    checks = gradcheck.check(lambda: two.loss(params, x, y, reg, mask)[0], params, found, pieces=on)
    for check in checks:
        # elementwise the loss's own rounding, 1e-16 * loss / step, stands in the way where reg makes it large
        assert check.norm < 1e-8 and check.relative < (1e-7 if reg else 1e-8), check
        assert check.checked > 0.9 * check.size


def test_the_library_and_gradient_tape_agree(rng):
    params, x, y = small(rng)
    net = nets.Net({name: params[name] for name in ("W1", "b1", "W2", "b2")})
    scores, _ = two.forward(params, x)
    np.testing.assert_allclose(scores, nets.forward(net, x)[0], atol=1e-15)
    assert twin.largest_difference(two.loss(params, x, y)[1], twin.gradients(net, x, y)) < 1e-14


def test_scores_of_ten_thousand_are_safe():
    params = {"W1": 100 * np.eye(2), "b1": np.zeros(2), "W2": 100 * np.eye(2), "b2": np.zeros(2)}
    value, found = two.loss(params, np.array([[1.0, 0]]), np.array([1]))
    assert value == 1e4 and all(np.isfinite(array).all() for array in found.values())


def test_what_the_unit_checks_in_its_run(rng):
    found = two.check_toy(rng)
    assert found["toy_score_difference"] < 1e-7 and found["toy_loss_difference"] < 1e-12
    assert found["toy_gradient_error"] < 1e-8
    assert found["toy_library_difference"] < 1e-15 and found["toy_tape_difference"] < 1e-14
    assert found["toy_training_loss"] < 0.1  # the assignment asks for 0.2


def test_a_step_is_gradient_descent_with_momentum(rng):
    params, x, y = small(rng)
    before = {name: array.copy() for name, array in params.items()}
    _, first = two.loss(params, x, y, 0.1)
    recipe, velocity = two.Recipe(reg=0.1, momentum=0.5), dict.fromkeys(params, 0)
    assert two.step(params, velocity, x, y, 0.2, recipe, rng) == pytest.approx(two.loss(before, x, y, 0.1)[0])
    for name in params:
        np.testing.assert_allclose(params[name], before[name] - 0.2 * first[name], atol=1e-15)
    middle = {name: array.copy() for name, array in params.items()}
    _, second = two.loss(params, x, y, 0.1)
    two.step(params, velocity, x, y, 0.2, recipe, rng)
    for name in params:
        expected = middle[name] - 0.2 * (second[name] + 0.5 * first[name])
        np.testing.assert_allclose(params[name], expected, atol=1e-15)


def test_dropout_masks_in_training_only(rng):
    params, x, y = small(rng)
    still = dict.fromkeys(params, 0)
    recipe = two.Recipe(hidden=7, reg=0.0, keep=0.5)
    losses = {two.step({n: a.copy() for n, a in params.items()}, still, x, y, 0.0, recipe, rng) for _ in range(5)}
    assert len(losses) == 5  # another mask each time
    assert two.forward(params, x)[0].tobytes() == two.forward(params, x)[0].tobytes()


@pytest.fixture
def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = ((x - x.mean()) / x.std()).astype(np.float32)
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


def test_training_learns_and_depends_on_the_seed_alone(digits):
    recipe = two.Recipe(50, None, 1.0, lr=0.05, decay=0.8, reg=1e-4, batch=50, epochs=8, momentum=0.9)
    params, history = two.train(recipe, *digits, 10, 0, "digits")
    assert history["validation_accuracy"][-1] > 90
    assert len(history["losses"]) == 8 * 28 and len(history["loss"]) == 8
    assert history["loss"][-1] < 0.1 < history["losses"][0]
    assert history["losses"][0] == pytest.approx(np.log(10), abs=0.1)
    again, _ = two.train(recipe, *digits, 10, 0, "digits")
    other, _ = two.train(recipe, *digits, 10, 1, "digits")
    assert twin.largest_difference(params, again) == 0 < twin.largest_difference(params, other)


def test_inputs_in_units_of_64_are_the_same_as_inputs_64_times_as_large(digits):
    (x, y), (x_held, y_held) = digits
    recipe = two.Recipe(20, epochs=1, unit=64.0)
    params, _ = two.train(recipe, (x, y), (x_held, y_held), 10, 0, "unit")
    large = dataclasses.replace(recipe, unit=1.0)
    same, _ = two.train(large, (64 * x, y), (64 * x_held, y_held), 10, 0, "unit")
    assert twin.largest_difference(params, same) == 0


def test_mirroring_turns_pictures_left_to_right_and_changes_nothing_else(monkeypatch):
    x = np.arange(2 * 3 * 4, dtype=np.float32).reshape(1, 2, 3, 4).repeat(40, axis=0)
    seen = []
    monkeypatch.setattr(two, "step", lambda params, velocity, batch, *rest: seen.append(batch.copy()) or 1.0)
    recipe = two.Recipe(5, None, 1.0, batch=40, epochs=1, flip=True)
    two.train(recipe, (x, np.zeros(40, int)), (x, np.zeros(40, int)), 2, 0, "mirror")
    kinds = {image.tobytes() for image in seen[0]}
    assert kinds == {x[0].tobytes(), np.ascontiguousarray(x[0][:, ::-1]).tobytes()}


def test_a_training_that_diverges_ends_and_says_so(digits):
    recipe = two.Recipe(50, None, 1.0, lr=1e6, reg=1.0, batch=50, epochs=20)
    with np.errstate(all="ignore"):
        _, history = two.train(recipe, *digits, 10, 0, "diverges")
    assert not np.isfinite(history["losses"][-1]) and len(history["loss"]) < 20


def test_symptoms_tell_like_templates_from_different_ones_and_count_the_idle_steps(rng):
    history = {
        "losses": [2.3] * 30 + [1.0] * 30,
        "loss": [1.65],
        "train_accuracy": [60.0],
        "validation_accuracy": [50.0],
    }
    alike = {"W1": np.ones((64, 20)) * rng.uniform(0.5, 1, 20)}
    found = two.symptoms(alike, history)
    assert found["likeness"] == pytest.approx(1)
    assert found["idle steps"] == 21  # ten steps from there on, one of them is at 1.0
    assert (found["train"], found["validation"], found["last loss"]) == (60, 50, 1.65)
    orthogonal = {"W1": np.linalg.qr(rng.standard_normal((64, 20)))[0]}
    found = two.symptoms(orthogonal, history | {"losses": [2.3] * 60})
    assert found["likeness"] == pytest.approx(0, abs=1e-12)
    assert found["idle steps"] == 60


def test_the_search_draws_log_uniformly_within_its_bounds():
    recipes = two.draw_recipes(two.Config(trials=2_000))
    lr, reg = (np.log10([getattr(recipe, name) for recipe in recipes]) for name in ("lr", "reg"))
    assert lr.min() >= -3.5 and lr.max() <= -1 and np.median(lr) == pytest.approx(-2.25, abs=0.1)
    assert reg.min() >= -4.5 and reg.max() <= -1.5 and np.median(reg) == pytest.approx(-3, abs=0.12)
    assert {recipe.hidden for recipe in recipes} == {100, 200, 400}
