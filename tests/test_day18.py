"""Day 18: advantages and each term of the loss by hand, what the details do, and what is refused."""

import dataclasses

import gymnasium
import keras
import numpy as np
import pytest
import tensorflow as tf

from course import core
from course import day18_ppo as day18
from course.core import catalogue
from models.rl import curves, policies, ppo, rollout
from models.rl.provenance import provenance

RECIPE = day18.Recipe(normalise_advantages=False)


def column(*values, dtype=np.float32):
    return np.array(values, dtype)[:, None]


def one(terminated=(0, 0, 0), truncated=(0, 0, 0), final=(0, 0, 0)):
    """Three steps of one environment: rewards 1, 2, 3, values 4, 6, 8, and 10 after the last; gamma lambda is 0.4."""
    ends = column(*terminated, dtype=bool), column(*truncated, dtype=bool)
    last = np.array([10.0], np.float32)
    return day18.advantages(column(1, 2, 3), *ends, column(4, 6, 8), last, column(*final), 0.5, 0.8)[:, 0]


def test_an_episode_that_goes_on():
    # delta: 1 + 3 - 4 = 0,  2 + 4 - 6 = 0,  3 + 5 - 8 = 0
    np.testing.assert_allclose(one(), [0, 0, 0])


def test_nothing_follows_a_terminated_step():
    # delta: 0,  2 - 6 = -4,  0;  A_1 = -4,  A_0 = 0 + 0.4 * -4
    np.testing.assert_allclose(one(terminated=(0, 1, 0), final=(0, 99, 0)), [-1.6, -4, 0], rtol=1e-6)


def test_a_truncated_step_is_followed_by_the_value_of_its_own_last_observation():
    # delta_1 = 2 + 0.5 * 20 - 6 = 6;  A_0 = 0.4 * 6; not V = 8 of the next episode's start
    np.testing.assert_allclose(one(truncated=(0, 1, 0), final=(99, 20, 99)), [2.4, 6, 0], rtol=1e-6)


def test_termination_outranks_truncation():
    np.testing.assert_allclose(one(terminated=(0, 1, 0), truncated=(0, 1, 0), final=(0, 20, 0)), [-1.6, -4, 0])


def test_the_last_step_may_end_an_episode():
    # A_2 = 3 - 8 = -5;  A_1 = -2,  A_0 = -0.8
    np.testing.assert_allclose(one(terminated=(0, 0, 1)), [-0.8, -2, -5], rtol=1e-6)


def test_extremes_of_lambda_are_one_step_errors_and_discounted_returns():
    rng = np.random.default_rng(0)
    rewards, values, final = rng.normal(size=(3, 30, 4))
    last, ends = rng.normal(size=4), rng.random((2, 30, 4)) < 0.1
    one_step, whole = (day18.advantages(rewards, *ends, values, last, final, 0.9, lam) for lam in (0.0, 1.0))
    following = np.where(ends[0], 0, np.where(ends[1], final, np.concatenate([values[1:], last[None]])))
    np.testing.assert_allclose(one_step, rewards + 0.9 * following - values, atol=1e-9)
    for n in range(4):
        for t in range(30):
            total, discount, s = 0.0, 1.0, t
            while True:
                total, discount = total + discount * rewards[s, n], discount * 0.9
                if ends[0, s, n] or ends[1, s, n]:
                    total += 0 if ends[0, s, n] else discount * final[s, n]
                    break
                s += 1
                if s == 30:
                    total += discount * last[n]
                    break
            assert whole[t, n] + values[t, n] == pytest.approx(total, abs=1e-9)


def loss_of(ratio, advantage, recipe=RECIPE, value=0.0, old=0.0, returns=0.0):
    """Eq. 6 of one step of a policy that has two actions and gives the one that was taken `ratio` times what it had."""
    p = 0.25 * ratio
    outputs = tf.Variable([[np.log(p), np.log(1 - p)]], dtype=tf.float32)
    one = lambda number: tf.constant([number], tf.float32)  # noqa: E731
    batch = {"observations": tf.zeros((1, 1)), "actions": np.array([0]), "advantages": one(advantage),
             "returns": one(returns), "values": one(old), "log_probs": one(np.log(0.25))}  # fmt: skip
    with tf.GradientTape() as tape:
        loss, logs = day18.losses(lambda x: outputs, lambda x: tf.fill((1, 1), value), policies.Categorical, recipe,
                                  batch)  # fmt: skip
    gradient = tape.gradient(loss, outputs)
    return {key: float(number) for key, number in logs.items()} | {
        "loss": float(loss), "moves": gradient is not None and bool(np.abs(gradient).max() > 1e-6)}  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "moves"),
    [
        (1.0, 3.0, 3.0, True),
        (1.1, 3.0, 3.3, True),
        (1.5, 3.0, 3.6, False),  # as good as it gets: 1.2 * 3
        (0.5, 3.0, 1.5, True),  # it went the wrong way, and may come back
        (0.5, -3.0, -2.4, False),
        (1.5, -3.0, -4.5, True),
    ],
)
def test_clipping_by_hand(ratio, advantage, objective, moves):
    found = loss_of(ratio, advantage)
    assert found["policy_loss"] == pytest.approx(-objective, rel=1e-5)
    assert found["moves"] is moves
    assert found["clip_fraction"] == (abs(ratio - 1) > 0.2)
    assert found["approx_kl"] == pytest.approx(ratio - 1 - np.log(ratio), abs=1e-5)


def test_without_clipping_there_is_no_limit():
    found = loss_of(3.0, 2.0, dataclasses.replace(RECIPE, clip=np.inf))
    assert found["policy_loss"] == pytest.approx(-6.0, rel=1e-5) and found["moves"]


@pytest.mark.parametrize(
    ("value", "old", "returns", "clipped", "plain"),
    [
        (1.1, 1.0, 2.0, 0.81, 0.81),  # within 0.2 of the old value
        (1.8, 1.0, 2.0, 0.64, 0.04),  # the worse of 1.8 and 1.2
        (5.0, 1.0, 2.0, 9.0, 9.0),  # too far and worse than 1.2: it may come back
    ],
)
def test_value_clipping_by_hand(value, old, returns, clipped, plain):
    for clip, squared in (True, clipped), (False, plain):
        found = loss_of(1.0, 0.0, dataclasses.replace(RECIPE, value_clip=clip), value, old, returns)
        assert found["value_loss"] == pytest.approx(squared / 2, rel=1e-4)
        assert found["loss"] == pytest.approx(found["policy_loss"] + 0.5 * squared / 2, rel=1e-4)


def test_entropy_is_a_bonus():
    plain, bonus = loss_of(1.0, 1.0), loss_of(1.0, 1.0, dataclasses.replace(RECIPE, entropy_weight=0.1))
    assert bonus["loss"] == pytest.approx(plain["loss"] - 0.1 * plain["entropy"], rel=1e-5)


def minibatch(policy, value, kind, k):
    rng = np.random.default_rng(1)
    x, noise = rng.normal(size=(16, 3)).astype("f"), rng.normal(size=(16, k)).astype("f")
    outputs = policy(x).numpy()
    actions = kind.sample(outputs, noise)
    numbers = {key: rng.normal(size=16).astype("f") for key in ("advantages", "returns")}
    return {"observations": x, "actions": actions, "values": value(x).numpy()[:, 0],
            "log_probs": kind.log_prob(outputs, actions).numpy(), **numbers}  # fmt: skip


@pytest.mark.parametrize("kind", [policies.Categorical, policies.Gaussian])
def test_the_first_step_is_a2c_s(kind):
    """With ratios of 1, clipped or not, the gradient is that of the advantage times the log-probability."""
    core.runtime.seed(0)
    policy, value = day18.build(day18.Recipe(orthogonal=False), 3, kind, 2)
    batch = minibatch(policy, value, kind, 2)
    with tf.GradientTape() as tape:
        loss, logs = day18.losses(policy, value, kind, RECIPE, batch)
    with tf.GradientTape() as other:
        log_prob = kind.log_prob(policy(batch["observations"]), batch["actions"])
        plain = -tf.reduce_mean(batch["advantages"] * log_prob)
    assert float(logs["approx_kl"]) == pytest.approx(0, abs=1e-6) and float(logs["clip_fraction"]) == 0
    variables = policy.trainable_variables
    for ours, theirs in zip(tape.gradient(loss, variables), other.gradient(plain, variables), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_advantages_are_normalised_within_the_minibatch():
    core.runtime.seed(0)
    policy, value = day18.build(day18.Recipe(), 3, policies.Gaussian, 2)
    batch = minibatch(policy, value, policies.Gaussian, 2)
    scaled = batch | {"advantages": 50 + 9 * batch["advantages"]}
    first, second = (float(day18.losses(policy, value, policies.Gaussian, day18.Recipe(), b)[1]["policy_loss"])
                     for b in (batch, scaled))  # fmt: skip
    assert first == pytest.approx(second, abs=1e-5)


def test_orthogonal_start_and_shared_statistics(tmp_path):
    core.runtime.seed(0)
    policy, value = day18.build(day18.Recipe(), 5, policies.Gaussian, 3)
    norm, one, two, last, _ = policy.layers
    assert value.layers[0] is norm
    kernel = two.kernel.numpy()
    np.testing.assert_allclose(kernel.T @ kernel, 2 * np.eye(64), atol=1e-5)
    np.testing.assert_allclose(one.kernel.numpy() @ one.kernel.numpy().T, 2 * np.eye(5), atol=1e-5)
    np.testing.assert_allclose(last.kernel.numpy().T @ last.kernel.numpy(), 1e-4 * np.eye(3), atol=1e-8)
    norm.update(np.random.default_rng(0).normal(5, 3, (20, 5)))
    policy.save(tmp_path / "policy.keras")
    x = np.random.default_rng(1).normal(5, 3, (4, 5)).astype("f")
    again = keras.saving.load_model(tmp_path / "policy.keras")
    np.testing.assert_array_equal(again(x), policy(x))
    np.testing.assert_allclose(ppo.as_numpy(again)(x), policy(x), atol=1e-6)


class Interrupted(Exception):
    pass


class Saves:
    """As much of a run as `Resume` needs."""

    def __init__(self, folder):
        self.folder = folder

    def checkpoint(self, model, name, **objects):
        return core.Checkpoint(self.folder / name, model, **objects)


SMALL = dataclasses.replace(day18.MUJOCO, envs=2, steps=16, epochs=2, batch=8, units=8)


def columns(logs):
    return logs[:, : day18.LOGS.index("seconds")]


def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path, monkeypatch):
    arguments = ("InvertedPendulum-v5", SMALL, 0, 60 * 32)
    whole, _, expected = day18.learn(Saves(tmp_path / "whole"), "arm", *arguments)
    assert expected.shape == (60, len(day18.LOGS)) and expected[-1, 0] == 60 * 32
    real, calls = rollout.collect, []

    def collect(*words):
        calls.append(1)
        if len(calls) == 54:
            raise Interrupted
        return real(*words)

    monkeypatch.setattr(day18.rollout, "collect", collect)
    with pytest.raises(Interrupted):
        day18.learn(Saves(tmp_path / "broken"), "arm", *arguments)
    monkeypatch.setattr(day18.rollout, "collect", real)
    policy, _, found = day18.learn(Saves(tmp_path / "broken"), "arm", *arguments)
    np.testing.assert_allclose(columns(found), columns(expected), rtol=1e-4, atol=1e-6)
    assert np.flatnonzero(np.isnan(expected[:, -1])).tolist() == [0]
    assert np.flatnonzero(np.isnan(found[:, -1])).tolist() == [0, 50]  # compiled again after the restart
    for ours, theirs in zip(policy.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(day18.ABLATION) + ["A2C"])
@pytest.mark.slow
def test_every_arm_runs(name, tmp_path):
    recipe = {**day18.ABLATION, "A2C": day18.A2C}[name]
    if name != "A2C":
        recipe = dataclasses.replace(recipe, steps=64)
    *_, logs = day18.learn(Saves(tmp_path), "arm", "InvertedPendulum-v5", recipe, 0, 600)
    assert np.isfinite(columns(logs)[:, [0, *range(2, len(day18.LOGS) - 1)]]).all()
    full = recipe.epochs * (recipe.envs * recipe.steps // recipe.batch)
    assert (logs[:, day18.LOGS.index("updates")] <= full).all()


@pytest.mark.slow
def test_the_pendulum_is_learned(tmp_path):
    policy, space, _ = day18.learn(Saves(tmp_path), "arm", "InvertedPendulum-v5", day18.MUJOCO, 0, 200_000)
    act = policies.best(space, ppo.as_numpy(policy))
    assert day18.evaluate.evaluate(act, "InvertedPendulum-v5", 20, 1)["mean"] >= 950


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "walker"], "no walker: choose from inverted pendulum"),
        (["--steps", "4"], "--steps 4: .* at least 5"),
        (["--ablation", "HalfCheeta-v5"], "--ablation HalfCheeta-v5: there is no environment"),
        (["--ablation", "ALE/Pong-v5"], "--ablation ALE/Pong-v5: it observes"),
        (["--ablation", "FrozenLake-v1"], "--ablation FrozenLake-v1: it observes Discrete"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(words, message, tmp_path):
    with pytest.raises(core.InputError, match=message):
        day18.main(["--preset", "smoke", "--runs", str(tmp_path), *words])
    assert list(tmp_path.iterdir()) == []


def test_an_ablation_can_be_left_out():
    words = ["--preset", "cpu", "--ablation", ""]
    assert core.parse(day18.Config, day18.PRESETS, words)[1].ablation == ""


def test_no_figure_of_the_reference_is_called_comparable():
    """It is of MuJoCo v4, other rollouts and, of the pendulum, five times the steps."""
    unit = catalogue.find("day18_ppo", catalogue.units())
    record = {"data": {name: provenance(name) for name, _, _ in day18.TASKS.values()},
              "metrics": dict.fromkeys(day18.REFERENCE, 0.0)}  # fmt: skip
    assert unit.reference.keys() == day18.REFERENCE.keys()
    assert catalogue.comparable(unit, record) == {}


def test_ppo_and_a2c_discount_alike_and_no_unscaled_value_is_clipped():
    assert day18.POLE.gamma == day18.A2C.gamma
    recipes = [recipe for _, recipe, _ in day18.TASKS.values()] + list(day18.ABLATION.values())
    assert not any(recipe.value_clip and not recipe.scale_rewards for recipe in recipes)


def test_the_speed_is_the_median_of_updates_that_did_not_compile(tmp_path, monkeypatch):
    logs = np.ones((5, len(day18.LOGS)))
    logs[:, -1] = [np.nan, 2.0, 1.0, np.nan, 4.0]  # as after a restart before the fourth
    network, _ = day18.build(SMALL, 4, policies.Gaussian, 1)
    space = gymnasium.spaces.Box(-3, 3, (1,), np.float32)
    monkeypatch.setattr(day18, "learn", lambda *_: (network, space, logs))
    run = Saves(tmp_path)
    assert day18.trial(run, "arm", "InvertedPendulum-v5", SMALL, 0, 0, 2)["steps_per_second"] == 32 / 2.0
    logs[:, -1] = np.nan
    found = day18.trial(run, "arm", "InvertedPendulum-v5", SMALL, 0, 0, 2)
    assert np.isnan(found["steps_per_second"])
    assert np.isnan(curves.row("arm", "x", 1, [found])["steps_per_second"])
