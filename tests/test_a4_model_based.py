"""Assignment 4, model-based: the pieces against CartPole itself and against values worked by hand."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from course import a4_model_based as unit
from course import core
from models.rl import envs

SMALL = unit.Config(members=2, units=16, horizon=12, starts=8, imagined=3, fit_batch=32)


@pytest.fixture(scope="module")
def seen():
    """Two hundred random episodes."""
    rng = np.random.default_rng(0)
    *_, experience = unit.play(lambda state: rng.integers(2, size=len(state)), 200, 0)
    return experience


def scales_of(seen):
    return {of: tf.Variable(getattr(seen, of).std(axis=0) + 1e-3) for of in ("state", "change")}


def test_play_gives_whole_episodes():
    states, actions, alive, seen = unit.play(lambda state: np.zeros(len(state), int), 20, 3)
    lengths = alive.sum(axis=0)
    assert ((lengths >= 8) & (lengths <= 11)).all()  # pushed to one side only
    assert states.shape == (*alive.shape, 4) == (*actions.shape, 4)
    assert (np.abs(states[0]) <= 0.05).all()
    assert len(seen.state) == lengths.sum()
    assert seen.end.sum() == 20
    assert (np.diff(alive, axis=0) <= 0).all()
    fell = np.abs((seen.state + seen.change)[seen.end == 1, 2]) > 0.2094
    assert fell.all()


def test_experience_adds_up(seen):
    double = seen + seen
    assert len(double.state) == 2 * len(seen.state)
    assert all(np.array_equal(a[: len(b)], b) for a, b in zip(*map(dataclasses.astuple, (double, seen)), strict=True))


def test_members_share_nothing():
    keras.utils.set_random_seed(0)
    model = unit.build_model(3, 8)
    x = np.random.default_rng(0).normal(size=(5, 3, 6)).astype(np.float32)
    before = model(x).numpy()
    x[:, 1] += 1
    changed = np.abs(model(x).numpy() - before).max(axis=(0, 2)) > 0
    assert changed.tolist() == [False, True, False]
    same = np.repeat(x[:, :1], 3, axis=1)
    assert not np.allclose(model(same)[:, 0], model(same)[:, 1])


def test_the_model_learns_cart_pole(seen):
    """After 600 updates it predicts the next state to 3 % of the changes' deviation, and most of the ends."""
    keras.utils.set_random_seed(0)
    rng, scales = np.random.default_rng(0), scales_of(seen)
    model, optimizer = unit.build_model(2, 32), keras.optimizers.Adam(0.005)
    optimizer.build(model.trainable_variables)
    fit = unit.compile_fit(model, optimizer, scales)
    drawn = rng.integers(len(seen.state), size=(600, 64, 2))
    fit(*map(tf.constant, dataclasses.astuple(seen)), tf.constant(drawn))
    *_, fresh = unit.play(lambda state: rng.integers(2, size=len(state)), 50, 99)
    inputs = unit.inputs_of(fresh.state, fresh.action, scales)
    out = model(tf.repeat(inputs[:, None], 2, axis=1)).numpy()
    error = np.abs(out[..., :4] - (fresh.change / scales["change"].numpy())[:, None])
    assert np.median(error) < 0.03
    says = out[:, 0, 4] > 0
    assert says[fresh.end == 1].mean() > 0.7
    assert says[fresh.end == 0].mean() < 0.02


def test_returns_to_go_by_hand():
    alive = tf.constant([[1.0, 1], [1, 1], [1, 0]])
    expected = [[1 + 0.5 + 0.25, 1.5], [1.5, 1], [1, 0]]
    np.testing.assert_allclose(unit.returns_to_go(alive, 0.5), expected)


def test_improve_makes_what_lasted_longer_likelier():
    """Two rollouts of one state: action 0 ended at once, action 1 went on; what follows an end counts for nothing."""
    keras.utils.set_random_seed(0)
    policy, optimizer = unit.build_policy(8), keras.optimizers.SGD(0.5)
    states = np.full((3, 2, 4), 0.1, np.float32)
    actions, alive = np.array([[0, 1], [0, 1], [0, 1]], np.int32), np.array([[1.0, 1], [0, 1], [0, 1]], np.float32)
    before = policy(states[0, :1]).numpy()[0]
    length = unit.improve(policy, optimizer, *map(tf.constant, (states, actions, alive)), 0.9)
    after = policy(states[0, :1]).numpy()[0]
    assert length == 2
    assert (before == 0).all()
    assert after[1] - after[0] > 0.01


def test_improve_is_the_policy_gradient():
    """Its step, for plain gradient descent, against the mean of log-probability gradients times advantages by hand."""
    keras.utils.set_random_seed(1)
    policy = unit.build_policy(4)
    policy.layers[-1].kernel.assign(np.random.default_rng(0).normal(size=(4, 2)))
    before = [weight.numpy() for weight in policy.trainable_variables]
    rng = np.random.default_rng(2)
    states = rng.normal(size=(4, 3, 4)).astype(np.float32)
    actions, alive = (
        rng.integers(2, size=(4, 3)).astype(np.int32),
        np.tril(np.ones((4, 3), np.float32)[::-1])[::-1].copy(),
    )
    alive[0] = 1
    gains = np.zeros((5, 3))
    for t in reversed(range(4)):
        gains[t] = alive[t] * (1 + 0.9 * gains[t + 1])
    advantage = np.zeros((4, 3))
    for t, n in np.argwhere(alive):
        others = [gains[t, m] for m in range(3) if m != n and alive[t, m]]
        advantage[t, n] = gains[t, n] - np.mean(others) if others else 0  # who is alone is not judged
    assert (alive.sum(axis=1) == 1).any()
    advantage /= np.sqrt((advantage**2).sum() / alive.sum())
    with tf.GradientTape() as tape:
        chances = tf.nn.log_softmax(policy(states.reshape(-1, 4)))
        chosen = tf.gather(chances, actions.ravel(), batch_dims=1)
        goal = tf.reduce_sum(chosen * advantage.ravel().astype(np.float32)) / alive.sum()
    expected = tape.gradient(goal, policy.trainable_variables)
    unit.improve(policy, keras.optimizers.SGD(1.0), *map(tf.constant, (states, actions, alive)), 0.9)
    for old, new, slope in zip(before, policy.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(new.numpy() - old, slope, atol=1e-5)


def test_imagination_changes_the_policy_only_and_repeats(seen):
    """The same seed imagines the same; the model stays as it was; lengths lie within the horizon."""

    keras.utils.set_random_seed(0)
    (policy, optimizer), model = unit.agent(SMALL, 0.01), unit.build_model(2, 16)
    changing = [*policy.variables, *optimizer.variables]
    start, before = [value.numpy() for value in changing], [value.numpy() for value in model.variables]
    dream = unit.compile_dream(policy, optimizer, model, scales_of(seen), SMALL)

    def dreamt(seed):
        for variable, value in zip(changing, start, strict=True):
            variable.assign(value)
        lengths = dream(tf.zeros((3, 8, 2, 4)), tf.constant(seed)).numpy()
        return lengths, [weight.numpy() for weight in policy.trainable_variables]

    lengths, weights = dreamt([1, 2])
    again, same = dreamt([1, 2])
    _, other = dreamt([3, 4])
    assert ((lengths >= 1) & (lengths <= SMALL.horizon)).all()
    assert np.array_equal(lengths, again)
    assert all(np.array_equal(a, b) for a, b in zip(weights, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(weights, other, strict=True))
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(before, model.variables, strict=True))


def test_an_imagined_end_is_the_end(seen):
    """A model that says "end" whatever is done: every imagined rollout has one step."""
    policy, optimizer = unit.agent(SMALL, 0.01)
    model = unit.build_model(2, 16)
    model.layers[-1].bias.assign(np.tile([0.0, 0, 0, 0, 100], (2, 1)))
    dream = unit.compile_dream(policy, optimizer, model, scales_of(seen), SMALL)
    assert (dream(tf.zeros((3, 8, 2, 4)), tf.constant([0, 0])).numpy() == 1).all()


def test_sampler_draws_from_the_policy():
    policy = unit.build_policy(4)
    policy.layers[-1].bias.assign([0.0, np.log(3)])
    drawn = unit.sampler(policy, np.random.default_rng(0))(np.zeros((8_000, 4), np.float32))
    assert abs(drawn.mean() - 0.75) < 0.02


def test_episodes_to_solve():
    rows = [{"episodes": 5, "return": 300.0}, {"episodes": 10, "return": 480.0}, {"episodes": 15, "return": 500.0}]
    assert unit.episodes_to_solve(rows) == 10
    assert unit.episodes_to_solve(rows[:1]) == np.inf


def test_cart_pole_is_as_long_as_the_unit_says():
    assert envs.specification(unit.NAME).max_episode_steps == unit.LONGEST
    assert envs.specification(unit.NAME).reward_threshold == unit.SOLVED


# --- the comparison --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", unit.PRESETS)
def test_both_agents_are_evaluated_after_the_same_real_episodes(preset, tmp_path, monkeypatch):
    """Of every preset, to the end of the run, with agents that learn nothing: neither solves, nothing is missing."""
    cfg = unit.Config(**unit.PRESETS[preset])
    rounds = [cfg.episodes * (i + 1) for i in range(cfg.rounds)]
    found = unit.grid(cfg)
    assert found[: cfg.rounds] == rounds and found == sorted(set(found)) and len(found) > cfg.rounds
    made = {"return": 9.0, "before imagining": 8.0, "squared error": 1.0, "cross-entropy": 1.0}
    monkeypatch.setattr(unit, "learn_in_imagination", lambda *_: [{"episodes": count, **made} for count in rounds])
    monkeypatch.setattr(unit, "learn_for_real", lambda *_: [{"episodes": count, "return": 9.0} for count in found])
    record = unit.main(["--preset", preset, "--runs", str(tmp_path)])
    assert record["metrics"]["model_free_best_at_same_episodes"] == 9
    assert record["metrics"]["model_based_solved"] == record["metrics"]["model_free_solved"] == 0
    assert not [name for name in record["metrics"] if name.endswith("to_475")]
    assert bool(record["data"].get("note")) is (preset == "smoke")


@pytest.mark.parametrize("words", [["--free-episodes", "8"], ["--free-updates", "5"], ["--episodes", "4"]])
def test_agents_that_cannot_be_compared_are_refused_before_training(words, tmp_path):
    with pytest.raises(core.InputError, match="no comparison; give a divisor of"):
        unit.main(["--preset", "cpu", "--runs", str(tmp_path), *words])
    assert list(tmp_path.iterdir()) == []


def test_the_model_free_agent_is_evaluated_on_the_grid_and_its_rate_falls(monkeypatch):
    cfg = unit.Config(rounds=2, episodes=6, free_episodes=3, free_updates=6, free_every=3, units=4, evaluated=2)
    assert unit.grid(cfg) == [6, 12, 18]
    rates, assigned = [], []
    monkeypatch.setattr(unit, "score", lambda *_: 0.0)
    real = unit.agent

    def agent(cfg, rate):
        policy, optimizer = real(cfg, rate)
        assign = optimizer.learning_rate.assign
        monkeypatch.setattr(optimizer.learning_rate, "assign", lambda value: (rates.append(value), assign(value)))
        assigned.append(optimizer)
        return policy, optimizer

    monkeypatch.setattr(unit, "agent", agent)
    rows = unit.learn_for_real(cfg, 0)
    assert [row["episodes"] for row in rows] == [6, 12, 18]
    np.testing.assert_allclose(rates, cfg.free_lr * np.array([6, 5, 4, 3, 2, 1]) / 6)
    np.testing.assert_allclose(assigned[0].learning_rate, cfg.free_lr / 6)


def test_members_draw_from_bootstrap_samples_of_their_own(monkeypatch):
    """About 1 - 1/e of the transitions are in a member's sample, and two members' samples differ."""
    drawn = []
    monkeypatch.setattr(
        unit, "compile_fit", lambda *_: lambda *args: (drawn.append((len(args[0]), args[-1])), (0, 0))[1]
    )
    monkeypatch.setattr(unit, "score", lambda *_: 0.0)
    unit.learn_in_imagination(dataclasses.replace(SMALL, rounds=1, episodes=20, fits=200), 0)
    ((count, places),) = drawn
    shares = [set(places.numpy()[..., member].ravel()) for member in range(2)]
    assert all(abs(len(share) / count - 0.63) < 0.05 for share in shares)
    assert shares[0] != shares[1] and max(map(max, shares)) < count


@pytest.mark.slow
def test_twenty_real_episodes_are_enough():
    rows = unit.learn_in_imagination(unit.Config(rounds=6), 0)
    assert unit.episodes_to_solve(rows) <= 30
    assert rows[0]["return"] > rows[0]["before imagining"] + 50
