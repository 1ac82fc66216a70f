"""Assignment 2, update rules: each against its formula in decimal arithmetic, the library and Keras."""

import inspect
from decimal import Decimal as D
from decimal import localcontext

import numpy as np
import pytest

from course import a2_update_rules as unit


@pytest.fixture
def rng():
    return np.random.default_rng(2)


# --- the formulas once more, for one number, in decimals; each answers w and the memory after a step ----------------


def sgd(w, g):
    return w - D("0.01") * g, {}


def momentum(w, g, velocity):
    velocity = D("0.9") * velocity - D("0.01") * g
    return w + velocity, {"velocity": velocity}


def nesterov(w, g, velocity):
    """As it is taught: look ahead, take the gradient there, and step; told in the point that is looked ahead to."""
    behind = w - D("0.9") * velocity
    velocity = D("0.9") * velocity - D("0.01") * g
    behind += velocity
    return behind + D("0.9") * velocity, {"velocity": velocity}


def adagrad(w, g, cache):
    cache += g * g
    return w - D("0.01") * g / (cache.sqrt() + D("1e-8")), {"cache": cache}


def rmsprop(w, g, cache):
    cache += (g * g - cache) * D("0.01")
    return w - D("0.01") * g / (cache.sqrt() + D("1e-8")), {"cache": cache}


def adam(w, g, t, m, v):
    t, m, v = t + 1, m + (g - m) * D("0.1"), v + (g * g - v) * D("0.001")
    m_hat, v_hat = m / (1 - D("0.9") ** t), v / (1 - D("0.999") ** t)
    return w - D("0.001") * m_hat / (v_hat.sqrt() + D("1e-8")), {"t": t, "m": m, "v": v}


FORMULAS = {rule.__name__: rule for rule in (sgd, momentum, nesterov, adagrad, rmsprop, adam)}


def decimals(values):
    return [D(repr(float(value))) for value in values]  # 0.3 is meant, not the double next to it


@pytest.mark.parametrize("name", FORMULAS)
def test_the_known_values_are_the_formulas(name):
    before, w, after = unit.KNOWN[name]
    arguments = [before[key] for key in inspect.signature(FORMULAS[name]).parameters if key in before]
    with localcontext() as context:
        context.prec = 40
        columns = [decimals(unit.W), decimals(unit.DW)]
        columns += [[value] * 4 if isinstance(value, int) else decimals(value) for value in arguments]
        for i, row in enumerate(zip(*columns, strict=True)):
            found, memory = FORMULAS[name](*row)
            assert abs(found - D(repr(w[i]))) < D("1e-11")
            assert memory.keys() == after.keys()
            for key, value in memory.items():
                known = after[key] if key == "t" else after[key][i]
                assert abs(value - D(repr(known))) < D("1e-11"), key


def test_every_rule_meets_its_known_values():
    rows = unit.check_known()
    assert [row["rule"] for row in rows] == list(unit.RULES) == list(FORMULAS)
    for row in rows:
        assert row["w"] < 1e-8 and row["memory"] < 1e-8, row  # asked: 1e-7 for Adam, 1e-8 for the others


def test_the_check_sees_a_wrong_rule(monkeypatch):
    def forgetful(w, dw, config=None):
        found, config = unit.adam(w, dw, config)
        return found, config | {"t": 1}

    monkeypatch.setitem(unit.RULES, "adam", forgetful)
    assert unit.check_known()[-1]["memory"] == 5


@pytest.mark.parametrize("name", FORMULAS)
def test_a_hundred_steps_are_those_of_the_library_and_of_keras(rng, name):
    row = unit.walk(name, unit.SAME[name], rng)
    assert row["from the library"] < 1e-14 and row["from Keras"] < 1e-14, row


def test_defaults_differ_where_epsilon_stands_elsewhere(rng):
    gaps = {name: unit.walk(name, unit.OWN[name], rng)["from Keras"] for name in ("momentum", "adam", "adagrad")}
    assert gaps["momentum"] < 1e-6  # Keras's 0.9 has eight digits
    assert 1e-7 < gaps["adam"] < 1e-4
    assert gaps["adagrad"] > 1e-4  # a sum from 0.1


@pytest.mark.parametrize("name", FORMULAS)
def test_a_rule_leaves_its_arguments_as_they_are(rng, name):
    w, dw, config = rng.standard_normal(5), rng.standard_normal(5), {"learning_rate": 0.5}
    before = w.copy(), dw.copy()
    next_w, next_config = unit.RULES[name](w, dw, config)
    assert config == {"learning_rate": 0.5} and next_config["learning_rate"] == 0.5
    np.testing.assert_array_equal(w, before[0])
    np.testing.assert_array_equal(dw, before[1])
    assert (next_w != w).any()
    kept = {key: np.copy(value) for key, value in next_config.items()}
    unit.RULES[name](next_w, dw, next_config)
    for key, value in kept.items():
        np.testing.assert_array_equal(next_config[key], value, err_msg=f"{key}: changed in place")


@pytest.mark.parametrize("name", FORMULAS)
def test_threaded_keeps_a_config_for_each_parameter(rng, name):
    params = {"w": rng.standard_normal(3), "b": rng.standard_normal(2)}
    alone = {key: (array.copy(), None) for key, array in params.items()}
    step, state, arrays = unit.threaded(unit.RULES[name]), {}, dict(params)
    for _ in range(4):
        gradients = {key: rng.standard_normal(array.shape) for key, array in params.items()}
        step(params, gradients, state, 0.05)
        for key, gradient in gradients.items():
            w, config = alone[key]
            alone[key] = unit.RULES[name](w, gradient, (config or {}) | {"learning_rate": 0.05})
    for key in params:
        np.testing.assert_array_equal(params[key], alone[key][0])
        assert params[key] is arrays[key]  # in place, as the Solver expects


def test_threaded_float32_stays_float32(rng):
    params = {"w": np.ones(3, np.float32)}
    state = {}
    for _ in range(2):
        unit.threaded(unit.adam)(params, {"w": np.ones(3, np.float32)}, state, 0.1)
    assert params["w"].dtype == state["w"]["m"].dtype == np.float32


def test_adagrad_slows_as_the_root_of_time_and_adam_does_not(rng):
    """Gradients of one size: the sum grows as t, the mean stays."""

    def sizes(rule):
        found = []
        step, params, state = unit.watched(rule, "w", found), {"w": np.zeros(2000)}, {}
        for _ in range(400):
            step(params, {"w": rng.choice([-1.0, 1.0], 2000)}, state, 0.1)
        return [found]

    assert unit.exponent(sizes(unit.adagrad)) == pytest.approx(-0.5, abs=1e-6)
    assert unit.exponent(sizes(unit.adam)) == pytest.approx(0, abs=0.02)
    assert sizes(unit.sgd)[0] == pytest.approx([0.1] * 400)


def test_the_network_has_as_many_scores_as_there_are_classes(rng):
    pair = rng.standard_normal((60, 8)).astype(np.float32), np.arange(60) % 12
    cfg = unit.Config(hidden=(10, 10), epochs=2, batch=20, trials=2)
    found = unit.compare("adam", pair, pair, 12, cfg)
    assert len(found["search"]) == 3 and len(found["runs"]) == 2
    assert found["runs"][0]["loss"][0] == pytest.approx(np.log(12), abs=1)
