"""Day 02: the lesson's own rules, against hand-worked steps, Keras and closed forms; its training and measurements."""

import math

import numpy as np
import pytest

from course import core
from course import day02_optimizers as day02
from models.numpy_net import gradcheck, net, optim, over_seeds, rule_checks, surfaces


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def walked(rule, gradients, lr=0.1, **constants):
    """The steps of `rule` on a list of gradients."""
    state = {}
    return [rule(np.array([float(g)]), state, t, lr, **constants)[0] for t, g in enumerate(gradients, start=1)]


# --- the rules --------------------------------------------------------------------------------------------------------


def test_steps_by_hand():
    assert walked(day02.sgd, [2, -4]) == pytest.approx([-0.2, 0.4])
    assert walked(day02.heavy_ball, [2, 2, 0], momentum=0.5) == pytest.approx([-0.2, -0.3, -0.15])
    # beta m - lr g: 0.5 * -0.2 - 0.2, 0.5 * -0.3 - 0.2, 0.5 * -0.15
    assert walked(day02.nesterov, [2, 2, 0], momentum=0.5) == pytest.approx([-0.3, -0.35, -0.075])
    # v = 9 + 16 = 25, then 25 + 0; epsilon 0
    assert walked(day02.adagrad, [4, 12], initial_accumulator_value=9, epsilon=0) == pytest.approx([-0.08, -1.2 / 13])
    # v = 0.36 * 100 = 36, then 0.64 * 36 + 0.36 * 16 = 28.8
    assert walked(day02.rmsprop, [10, 4], rho=0.64, epsilon=0) == pytest.approx([-1 / 6, -0.4 / math.sqrt(28.8)])
    # m/(1 - b1^t) = 3, (0.5 * 1.5 + 0.5 * 1) / 0.75 = 5/3; v likewise = 9, (0.75 * 2.25 + 0.25 * 1) / 0.4375
    steps = walked(day02.adam, [3, 1], beta_1=0.5, beta_2=0.75, epsilon=0)
    assert steps == pytest.approx([-0.1, -0.1 * (5 / 3) / math.sqrt(1.9375 / 0.4375)])


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e4])
def test_adams_first_step_has_the_length_of_the_learning_rate(size, rng):
    g = size * rng.choice([-1, 1], 50) * rng.uniform(0.5, 2, 50)
    np.testing.assert_allclose(day02.adam(g, {}, 1, lr=0.01), -0.01 * np.sign(g), rtol=1e-3)
    uncorrected = day02.adam(g, {}, math.inf, lr=0.01)
    np.testing.assert_allclose(uncorrected, -0.01 * np.sign(g) * 0.1 / math.sqrt(0.001), rtol=1e-3)


def test_momentum_sums_to_the_geometric_series():
    assert walked(day02.heavy_ball, [1] * 500)[-1] == pytest.approx(-0.1 / (1 - 0.9), rel=1e-9)


def test_the_scale_of_the_loss_does_not_matter_to_adaptive_rules(rng):
    g = rng.uniform(1, 2, 30)
    for rule in (day02.rmsprop, day02.adam):
        np.testing.assert_allclose(walked(rule, 100 * g), walked(rule, g), rtol=1e-5)
    np.testing.assert_allclose(walked(day02.sgd, 100 * g), 100 * np.array(walked(day02.sgd, g)), rtol=1e-12)


@pytest.mark.parametrize("name", day02.RULES)
def test_the_library_has_the_same_rules(rng, name):
    rule, decay, lr, _ = day02.RULES[name]
    ours = {"W": rng.standard_normal((4, 3)), "b": rng.standard_normal(3)}
    theirs, states, state = {key: array.copy() for key, array in ours.items()}, {}, {}
    library = getattr(optim, name.lower())
    for t in range(1, 51):
        gradients = {key: rng.standard_normal(array.shape) for key, array in ours.items()}
        day02.descend(ours, gradients, states, t, rule, lr, decay)
        library(theirs, gradients, state, lr)
    for key in ours:
        np.testing.assert_allclose(ours[key], theirs[key], atol=1e-14)


def test_keras_steps_the_same(rng):
    x, y = rng.standard_normal((200, 12)).astype(np.float32), rng.integers(0, 4, 200)
    network = net.create(rng, (12, 16, 4))
    found = rule_checks.beside_keras(day02.descend, day02.RULES, network, x, y, seed=1)
    assert set(found) == {
        (what, dtype) for what in ("same gradients", "own network") for dtype in ("float64", "float32")
    }
    for (what, dtype), curves in found.items():
        assert list(curves) == list(day02.RULES)
        for name, gaps in curves.items():
            # the bound of the syllabus; float32's own rounding is amplified by a network, in Adam's hands above all
            assert len(gaps) == 100
            assert max(gaps) < (1e-4 if (what, dtype) == ("own network", "float32") else 1e-6), (what, dtype, name)
            assert dtype == "float32" or max(gaps) < 1e-12, (what, name)


def test_a_rule_that_is_not_keras_s_is_found_out(rng):
    rules = {"Adam": (lambda g, state, t, lr: day02.adam(g, state, t + 1, lr), 0.0, 0.001, day02.RULES["Adam"][3])}
    network, x, y = net.create(rng, (3, 4, 2)), rng.standard_normal((40, 3)), rng.integers(0, 2, 40)
    found = rule_checks.beside_keras(day02.descend, rules, network, x, y, seed=1, steps=5)
    assert all(max(curves["Adam"]) > 1e-4 for curves in found.values())


# --- known answers ----------------------------------------------------------------------------------------------------


def test_weight_decay_is_decoupled_in_adamw_and_not_in_adam_with_l2():
    found, closed = rule_checks.shrinking(day02.descend, day02.adam, seed=3)
    assert closed[-1] == pytest.approx((1 - 5e-4) ** 500)
    for curve in found["decoupled"].values():
        np.testing.assert_allclose(curve, closed, atol=0.005)  # the mean of 1,000 random walks
    loudest = found["in the gradient"]["100"][-1]
    assert loudest > 0.98  # hardly shrunk
    assert found["in the gradient"]["0.01"][-1] < closed[-1] - 0.1  # a small gradient is blown up


def test_the_decay_is_exactly_geometric_whatever_the_gradients(rng):
    a, b = {"w": np.full(5, 1.0)}, {"w": np.full(5, 3.0)}
    states = {}, {}
    for t in range(1, 101):
        g = {"w": rng.standard_normal(5) * 10.0 ** rng.integers(-3, 3)}
        day02.descend(a, g, states[0], t, day02.adam, 0.01, decay=0.3)
        day02.descend(b, g, states[1], t, day02.adam, 0.01, decay=0.3)
    np.testing.assert_allclose(b["w"] - a["w"], 2 * (1 - 0.003) ** 100, rtol=1e-12)


def test_the_quadratic_is_descended_as_the_closed_form_says():
    sgd, momentum = rule_checks.contraction(day02.descend, day02.heavy_ball, steps=300)
    assert sgd["difference of the paths"] < 1e-12 and momentum["difference of the paths"] < 1e-12
    assert sgd["rate by closed form"] == pytest.approx(49 / 51)
    assert sgd["rate of the last half"] == pytest.approx(49 / 51, rel=1e-9)
    # at its best, momentum's two eigenvalues are equal: t rate^t, whose rate is slower by 1 / t
    assert momentum["rate of the last half"] == pytest.approx(momentum["rate by closed form"], rel=0.01)
    assert momentum["rate of the last half"] < sgd["rate of the last half"] - 0.15


@pytest.mark.parametrize(("factor", "diverges"), [(0.99, False), (1.01, True)])
def test_gradient_descent_diverges_beyond_two_over_the_curvature(factor, diverges):
    surface, lr = surfaces.SURFACES["quadratic"], factor * 2 / surfaces.CONDITION
    path = surfaces.walk(day02.descend, day02.sgd, surface, [lr], 400)[:, 0, 1]
    assert (abs(path[-1]) > abs(path[0])) == diverges


@pytest.mark.parametrize("name", surfaces.SURFACES)
def test_surfaces_have_their_gradients_and_minima(name, rng):
    surface = surfaces.SURFACES[name]
    w = rng.uniform(-1.5, 1.5, (6, 2))
    (found,) = gradcheck.check(lambda: surface.function(w)[0].sum(), {"w": w}, {"w": surface.function(w)[1]})
    assert found.relative < 1e-7
    values, slopes = surface.function(np.array(surface.minima))
    np.testing.assert_allclose(slopes, 0, atol=1e-12)
    np.testing.assert_allclose(values, surface.least, atol=1e-12)
    assert (surface.function(rng.uniform(-3, 4, (500, 2)))[0] >= surface.least).all()


def test_every_rule_gets_down_every_surface():
    rules = {name: spec[0] for name, spec in day02.RULES.items() if not spec[1]}
    rows, paths = surfaces.best_walks(day02.descend, rules, 300)
    assert len(rows) == 4 * 6
    for row in rows:
        surface = surfaces.SURFACES[row["surface"]]
        start = float(surface.function(np.array(surface.start))[0]) - surface.least
        assert row["height"] < 0.2 * start, row
        assert paths[row["surface"]][row["rule"]].shape == (301, 2)
    steps = {row["rule"]: row["steps to 0.001"] for row in rows if row["surface"] == "quadratic"}
    assert steps["Nesterov"] < steps["momentum"] < steps["SGD"]  # the ordering on an ill-conditioned quadratic


# --- training and its measurements ------------------------------------------------------------------------------------


def small(**changes):
    return day02.Config(**(day02.PRESETS["smoke"] | {"batch": 20} | changes))


def blobs(rng, count=300):
    """Three classes around three points of 8 dimensions."""
    y = rng.integers(0, 3, count)
    return (2 * np.eye(3, 8)[y] + rng.standard_normal((count, 8))).astype(np.float32), y


@pytest.mark.parametrize("name", day02.RULES)
def test_every_rule_learns(name, rng):
    rule, decay, lr, _ = day02.RULES[name]
    (*_, (network, last)) = day02.train(small(), *blobs(rng), rule, 3 * lr, 0, (20,), 10, decay=decay)
    first = next(day02.train(small(), *blobs(rng), rule, 3 * lr, 0, (20,), 10, decay=decay))[1]
    assert np.mean(last) < 0.6 * first[0] and network.params["W1"].dtype == np.float32


def test_rules_start_from_the_same_network_and_see_the_same_order(rng):
    x, y = blobs(rng)
    curves = [next(day02.train(small(), x, y, rule, 0.0, 4, (20,), 1))[1] for rule in (day02.sgd, day02.adam)]
    np.testing.assert_array_equal(*curves)
    other = next(day02.train(small(), x, y, day02.sgd, 0.0, 5, (20,), 1))[1]
    assert (np.array(other) != curves[0]).any()


def test_soft_threshold_by_hand():
    w = np.array([-0.5, -0.1, 0.0, 0.1, 0.3])
    np.testing.assert_allclose(day02.soft_threshold(w, 0.2), [-0.3, 0, 0, 0, 0.1], atol=1e-15)


def test_penalties_are_the_subgradients_of_what_they_say(rng):
    w, strength = rng.standard_normal(20), 0.3
    costs = {"L2": lambda: strength / 2 * (w**2).sum(), "L1": lambda: strength * np.abs(w).sum()}
    costs["elastic"] = lambda: (costs["L2"]() + costs["L1"]()) / 2
    for name, cost in costs.items():
        slope = day02.PENALTIES[name][0](w, strength)
        (found,) = gradcheck.check(cost, {"w": w}, {"w": slope}, pieces=lambda: w > 0)
        assert found.relative < 1e-7, name
    assert day02.PENALTIES["L1"][0](np.zeros(2), strength).tolist() == [0, 0]


def test_eq_10_makes_zeros_the_subgradient_only_small_weights_and_l2_neither(rng):
    x, y = blobs(rng)
    x = np.concatenate([x, np.zeros((len(x), 20), np.float32)], axis=1)  # 20 inputs that never say anything
    shares = {}
    for name in ("L2", "L1", "L1, eq. 10"):
        penalty, after, _ = day02.PENALTIES[name]
        *_, (network, _) = day02.train(small(), x, y, day02.sgd, 0.1, 0, (20,), 90,
                                       penalty=penalty, after=after, strength=0.01)  # fmt: skip
        silent = np.abs(network.params["W1"][8:])
        shares[name] = (silent == 0).mean(), (silent <= 0.1 * 0.01 + 1e-7).mean()
    assert shares["L1, eq. 10"] == (1, 1)
    assert shares["L1"][0] < 0.1 and shares["L1"][1] == 1  # within lr * strength of 0, and not there
    assert shares["L2"][1] < 0.1


def test_sweeps_are_fair_and_say_what_diverged(rng):
    parts = blobs(rng), blobs(rng), blobs(rng)
    with np.errstate(all="raise"):  # the sweep must keep its own overflows to itself
        rows = day02.sweep(small(rates=3, seeds=2, hidden=(10,), epochs=2), parts, "SGD")
    assert [row["lr"] for row in rows[::2]] == pytest.approx([0.1 / math.sqrt(10), 0.1, 0.1 * math.sqrt(10)])
    assert all(len(row["curve"]) == 20 and 0 < row["loss"] <= 3 for row in rows)
    wild = (10**6 * parts[0][0], parts[0][1]), *parts[1:]
    assert all(row["loss"] == 3 for row in day02.sweep(small(rates=1, seeds=2, hidden=(10,)), wild, "SGD"))


def test_rows_over_seeds():
    rows = [{"lr": lr, "loss": lr + seed, "curve": [seed, lr]} for lr in (0.5, 2.0) for seed in (0, 2)]
    assert over_seeds.table(rows, "lr") == [{"lr": 0.5, "loss": 1.5, "loss_std": 1.0},
                                            {"lr": 2.0, "loss": 3.0, "loss_std": 1.0}]  # fmt: skip
    assert over_seeds.lowest(rows, "lr", "loss", near=1) == {
        "lr": 0.5,
        "loss": 1.5,
        "loss_std": 1.0,
        "near": 1,
        "at_edge": 1,
    }
    np.testing.assert_array_equal(over_seeds.gather(rows, "lr", "curve")[2.0], [[0, 2], [2, 2]])
    np.testing.assert_array_equal(over_seeds.line(rows, "lr", "loss"), [[0.5, 2], [2.5, 4]])
    assert over_seeds.ladder(1.0, 3) == pytest.approx([10**-0.5, 1, 10**0.5])


def test_figures_draw_bands_and_axes_of_their_own():
    lines = {"a": np.ones((3, 4)), "b": np.arange(4.0)}
    figure = core.plots.panels({"left": lines, "right": lines}, x={"a": [1, 2, 3, 4], "b": [5, 6, 7, 8]}, legend="side")
    left, right = figure.axes
    assert [line.get_xdata().tolist() for line in right.lines] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert len(left.collections) == 1  # one band: `b` has one seed
    assert left.get_legend() is None and len(figure.legends) == 1
    core.plots.close(figure)
    counts = {"a": [1, 2, 0], "b": [0, 3, 1]}
    figure = core.plots.histograms(counts, [0, 1, 2, 3])
    assert [patch.get_data().values.tolist() for patch in figure.axes[0].patches] == list(counts.values())
    core.plots.close(figure)


@pytest.mark.smoke
def test_smoke_preset_end_to_end(tmp_path):
    record = day02.main(["--preset", "smoke", "--seed", "3", "--runs", str(tmp_path)])
    folder = tmp_path / "day02_optimizers" / "smoke-s3"
    figures = {"keras", "decay", "paths", "weights", "penalties", "losses", "loss_curves", "sensitivity"}
    assert {path.stem for path in (folder / "figures").iterdir()} == figures
    metrics, tables = record["metrics"], record["tables"]
    assert list(metrics)[:2] == ["keras_difference", "fashion_mnist_12k_sgd_minus_adam"]
    assert metrics["keras_difference"] < 1e-6
    assert metrics["adam_first_step"] == pytest.approx(1, abs=1e-5)
    assert metrics["closed_form_difference"] < 1e-12 and metrics["loss_gradients_worst"] < 1e-7
    assert metrics["decay_error_adamw"] < 0.005 < metrics["decay_error_adam_l2"]
    assert [row["rule"] for row in tables["rules on fashion_mnist_12k"]] == list(day02.RULES)
    assert [row["penalty"] for row in tables["penalties"]] == list(day02.PENALTIES)
    assert tables["penalties"][0]["at_edge"] == 0 and {row["at_edge"] for row in tables["penalties"]} <= {0, 1}
    assert len(tables["losses"]) == len(day02.LOSSES) * 2
    assert all(row["accuracy"] > 20 and 0 <= row["ece"] <= 100 for row in tables["losses"])
