"""Assignment 4, Q-learning: against closed forms, and the learners against Gymnasium's own environment."""

import gymnasium
import numpy as np
import pytest

from course import a4_q_learning as unit
from course import core


@pytest.fixture(scope="module")
def lake():
    return unit.read_model("FrozenLake-v1")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def corridor(length=4, limit=50):
    """States 0..length-1, actions back and forth; a reward of 1 for stepping off the far end, which ends it."""
    steps = np.arange(length)
    following = np.stack([np.maximum(steps - 1, 0), np.minimum(steps + 1, length - 1)], axis=1)[..., None]
    last = np.zeros((length, 2, 1), bool)
    last[-1, 1] = True
    start = np.zeros(length)
    start[0] = 1
    return unit.Model(np.ones(following.shape), following, last.astype(float), last, start, limit)


def test_value_iteration_by_hand():
    """Forth from state s earns gamma^(3 - s); back costs a step more to undo."""
    q = unit.value_iteration(corridor(), 0.9)
    np.testing.assert_allclose(q[:, 1], 0.9 ** np.array([3, 2, 1, 0]), atol=1e-12)
    np.testing.assert_allclose(q[1:, 0], 0.9 ** np.array([4, 3, 2]), atol=1e-12)


@pytest.mark.parametrize("name", ["FrozenLake-v1", "FrozenLake8x8-v1", "Taxi-v4"])
def test_the_model_is_a_distribution(name):
    model = unit.read_model(name)
    np.testing.assert_allclose(model.probability.sum(axis=-1), 1)
    np.testing.assert_allclose(model.start.sum(), 1)
    assert model.limit == gymnasium.spec(name).max_episode_steps


def test_optimum_of_the_lake(lake):
    """14 / 17 is what the best policy earns in an endless episode; with gamma near 1 its discounted value is close."""
    q = unit.value_iteration(lake, 0.999999)
    np.testing.assert_allclose(q[0].max(), 14 / 17, atol=1e-4)
    best = unit.true_return(lake, unit.greedy(unit.value_iteration(lake, 0.99))[None])[0]
    assert 0.70 < best <= unit.upper_bound(lake) < 14 / 17


def test_true_return_is_what_gymnasium_pays(lake, rng):
    """A policy that is drawn at random, in 3,000 episodes played: within 4 standard errors."""
    policy = rng.dirichlet(np.ones(4), 16) * 0.3 + 0.7 * unit.greedy(unit.value_iteration(lake, 0.99))
    exact = unit.true_return(lake, policy[None])[0]
    found = unit.evaluate.evaluate(lambda s: unit.draw(policy[s], rng), "FrozenLake-v1", 3_000, 0, envs=50)
    assert 0.1 < exact < 0.9
    assert abs(found["mean"] - exact) < 4 * np.sqrt(exact * (1 - exact) / 3_000)


def test_no_policy_beats_the_upper_bound(lake, rng):
    policies = unit.greedy(rng.random((200, 16, 4)))
    assert unit.true_return(lake, policies).max() <= unit.upper_bound(lake)
    assert unit.upper_bound(corridor(limit=4)) == 1
    assert unit.upper_bound(corridor(limit=3)) == 0


def test_greedy_shares_between_equals():
    np.testing.assert_array_equal(unit.greedy(np.array([[1.0, 0, 1], [0, 2, 1]])), [[0.5, 0, 0.5], [0, 1, 0]])


def test_draw_follows_its_distributions(rng):
    drawn = unit.draw(np.tile([0.2, 0.0, 0.5, 0.3], (20_000, 1)), rng)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20_000, [0.2, 0, 0.5, 0.3], atol=0.015)


def test_choose_is_greedy_without_preference_and_explores_as_often_as_told(rng):
    q = np.tile([1.0, 2.0, 2.0, 0.0], (20_000, 1))
    shares = np.bincount(unit.choose(q, np.zeros(20_000), rng), minlength=4) / 20_000
    np.testing.assert_allclose(shares, [0, 0.5, 0.5, 0], atol=0.015)
    shares = np.bincount(unit.choose(q, np.full(20_000, 0.4), rng), minlength=4) / 20_000
    np.testing.assert_allclose(shares, [0.1, 0.4, 0.4, 0.1], atol=0.015)


def test_update_by_hand():
    """Two learners: one goes on, one ends; step sizes 100 / 101 and 100 / 102."""
    q, visits = np.zeros((2, 3, 2)), np.zeros((2, 3, 2), int)
    q[:, 1] = [4.0, 2.0]
    visits[1, 0, 1] = 1
    unit.update(q, visits, *map(np.array, ([0, 0], [1, 1], [1.0, 1.0], [1, 1], [False, True])), 0.5, 100)
    np.testing.assert_allclose(q[:, 0, 1], [100 / 101 * (1 + 0.5 * 4), 100 / 102 * 1])
    assert visits.sum() == 3
    assert (q[:, 0, 0] == 0).all()


def test_schedules_fall_from_1_to_the_least(lake):
    arms = unit.schedules(unit.Config(), lake)
    assert [arms[name][0](0.0) for name in ("linear", "exponential")] == [1, 1]
    np.testing.assert_allclose([arms[name][0](1.0) for name in ("linear", "exponential")], 0.05)
    assert arms["linear"][0](0.5) == pytest.approx(0.05)
    assert arms["optimistic"][1] == 1
    assert unit.schedules(unit.Config(), unit.read_model("Taxi-v4"))["optimistic"][1] == 20


def test_learners_side_by_side_learn_what_one_in_gymnasium_does(lake):
    """Uniform actions for 30,000 steps: the mean of 30 tables and that of one learner that calls env.step agree on the
    states' values as far as the tables' own spread lets them."""
    cfg = unit.Config(trials=30, points=1, patience=100)
    everywhere = {"uniform": (lambda done: 1.0, 0.0)}
    *_, q = unit.learn(lake, cfg, everywhere, 30_000, np.random.default_rng(0))
    env, rng = gymnasium.make("FrozenLake-v1"), np.random.default_rng(1)
    mine, visits = np.zeros((1, 16, 4)), np.zeros((1, 16, 4), int)
    s, _ = env.reset(seed=0)
    for _ in range(30_000):
        a = int(rng.integers(4))
        following, reward, terminated, truncated, _ = env.step(a)
        step = map(np.array, ([s], [a], [float(reward)], [following], [terminated]))
        unit.update(mine, visits, *step, cfg.gamma, cfg.patience)
        s = env.reset()[0] if terminated or truncated else following
    values = q[0].max(axis=-1)
    states = [0, 4, 8, 9, 10, 13, 14]
    spread = values.std(axis=0)[states]
    assert (np.abs(mine[0].max(axis=-1) - values.mean(axis=0))[states] < 4 * spread).all()
    assert (values.mean(axis=0)[states] > 0.1).all()  # something was learned everywhere


def test_the_firm_lake_is_solved_exactly():
    model = unit.read_model("FrozenLake-v1", is_slippery=False)
    cfg = unit.Config(trials=5, points=2)
    arms = unit.schedules(cfg, model)
    at, returns, online, q = unit.learn(model, cfg, arms, 20_000, np.random.default_rng(0))
    assert list(at) == [10_000, 20_000]
    assert (returns[-1, list(arms).index("optimistic")] == 1).all()
    assert (online <= 1).all()
    best = unit.value_iteration(model, cfg.gamma)
    np.testing.assert_allclose(q[list(arms).index("linear")].max(axis=-1)[:, 0], best[0].max(), atol=1e-3)


def test_points_that_do_not_divide_the_steps_are_measured_to_the_last(lake):
    cfg = unit.Config(trials=1, points=7)
    at, returns, *_ = unit.learn(lake, cfg, {"uniform": (lambda done: 1.0, 0.0)}, 100, np.random.default_rng(0))
    assert at.tolist() == [14, 28, 42, 57, 71, 85, 100]
    assert len(returns) == 7


def test_reachable_leaves_out_holes_and_goal(lake):
    assert np.flatnonzero(~unit.reachable(lake)).tolist() == [5, 7, 11, 12, 15]
    assert unit.reachable(unit.read_model("Taxi-v4")).sum() == 400


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "9x9"], "9x9 not known"),
        (["--steps", "5"], "--steps needs"),
        (["--steps", *"1234"], "at least"),
        (["--patience", "0"], "--patience 0 cannot be used"),
    ],
)
def test_bad_flags(words, message):
    with pytest.raises(core.InputError, match=message):
        unit.main(["--preset", "cpu", *words])


@pytest.mark.slow
def test_optimism_reaches_the_optimum_on_the_large_lake():
    model = unit.read_model("FrozenLake8x8-v1")
    cfg = unit.Config(trials=5, points=1)
    arms = {name: arm for name, arm in unit.schedules(cfg, model).items() if name in ("greedy", "optimistic")}
    _, returns, _, _ = unit.learn(model, cfg, arms, 300_000, np.random.default_rng(0))
    optimum = unit.true_return(model, unit.greedy(unit.value_iteration(model, cfg.gamma))[None])[0]
    assert (returns[-1, 1] >= optimum - 0.03).all()
    assert (returns[-1, 0] < 0.2).all()
