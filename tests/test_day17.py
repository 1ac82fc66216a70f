"""Day 17: targets, losses and the dueling layer by hand; the shapes of the network; some steps of an Atari game."""

import dataclasses
import os
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf

from course import core
from course import day17_dqn as unit
from course.core import experiment
from models.rl import dqn, envs
from tests import support


def fixed(values):
    """A "network" that answers `values` [B, A], whatever it is asked."""
    return lambda obs: tf.constant(values, tf.float32)


def test_targets_by_hand():
    """Two transitions, the second terminal; the online network prefers action 1 in the first, the target action 2."""
    batch = {"reward": tf.constant([1.0, 5.0]), "discount": tf.constant([0.5, 0.0]), "next_obs": None}
    online, target = fixed([[0, 3, 1], [9, 9, 9]]), fixed([[2, 4, 8], [7, 7, 7]])
    assert unit.targets(batch, online, target, double=False).numpy().tolist() == [1 + 0.5 * 8, 5]
    assert unit.targets(batch, online, target, double=True).numpy().tolist() == [1 + 0.5 * 4, 5]


def test_losses_by_hand():
    error = tf.constant([-3.0, -1.0, 0.5, 2.0])
    assert unit.losses(error, "huber").numpy() == pytest.approx([2.5, 0.5, 0.125, 1.5])
    assert unit.losses(error, "mse").numpy() == pytest.approx([4.5, 0.5, 0.125, 2.0])
    value = tf.Variable(4.0)
    with tf.GradientTape() as tape:
        loss = unit.losses(value, "huber")
    assert float(tape.gradient(loss, value)) == 1.0, "a line beyond 1"


def test_dueling_by_hand():
    q = unit.Dueling()(tf.constant([[10.0, 1.0, 2.0, 6.0]])).numpy()
    assert q.tolist() == [[8.0, 9.0, 13.0]]
    assert q.mean() == 10, "the mean of Q is V"


@pytest.mark.parametrize("dueling", [False, True])
def test_networks(tmp_path, dueling):
    model = unit.network((4, 84, 84), 6, dueling)
    convolutions = [layer.output.shape[1:] for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert convolutions == [(20, 20, 32), (9, 9, 64), (7, 7, 64)], "as in Mnih et al."
    if not dueling:
        assert model.count_params() == 1_686_180 + 513 * (6 - 4), "theirs, with six actions in place of four"
    obs = np.random.default_rng(0).integers(256, size=(2, 4, 84, 84), dtype=np.uint8)
    model.save(tmp_path / "q.keras")
    again = keras.models.load_model(tmp_path / "q.keras")
    assert again(obs).numpy() == pytest.approx(model(obs).numpy(), abs=1e-6)
    assert model(obs).shape == (2, 6)


def test_importance_weights_scale_the_update():
    agent, model = unit.Agent(), unit.network((4,), 2, dueling=False)
    batch = {"obs": tf.ones([2, 4]), "next_obs": tf.ones([2, 4]), "action": tf.constant([0, 1]),
             "reward": tf.constant([1.0, 1.0]), "discount": tf.zeros([2])}  # fmt: skip
    logged = []
    for weight in ([1.0, 1.0], [0.5, 0.5]):
        update = unit.rule(agent, model, model, keras.optimizers.SGD(0.0))
        _, logs = update(batch | {"weight": tf.constant(weight)})
        logged.append(float(logs["loss"]))
    assert logged[1] == pytest.approx(logged[0] / 2)


def test_a_game_of_atari_runs_through_the_whole_loop(tmp_path):
    """All switches on, 25 updates: shapes and types fit from the emulator to the optimizer and back."""
    agent = unit.Agent(batch=4, every=40, at_once=1, **unit.ARMS["all"])
    with envs.opened("ALE/Pong-v5", 4, 0) as env:
        online, history, memory = unit.learn(
            experiment.Run(tmp_path, {}, None), "game", agent, env, unit.schedule(agent, 1_000, 0, 1.0), seed=0,
            capacity=2_000, stack=4,
        )  # fmt: skip
    assert online.output_shape == (None, 6)
    assert history["step"][-1] == 1_000
    assert history["updates"][-1] == 25
    assert np.isfinite(history["loss"]).all()
    assert memory < 2_000 * 84 * 84 * 1.01


def pole(folder, kill=0):
    """A short training on CartPole with all switches; killed at its report number `kill`."""
    agent, reports = unit.Agent(at_once=4, **unit.ARMS["all"]), []
    env, endless = (envs.vector("CartPole-v1", 8, 0, max_episode_steps=steps) for steps in (500, 10**6))

    def look(online):
        reports.append(0)
        if len(reports) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        expected, realised = dqn.estimates(online, endless, 70, 0.9, seed=(0, 1))
        return {"estimate": expected.mean(), "realised": realised.mean()}

    online, history, _ = unit.learn(experiment.Run(folder, {}, None), "pole", agent, env, unit.pole(agent, 800),
                                    seed=0, capacity=2_000, look=look)  # fmt: skip
    history.pop("steps_per_second")
    return online.get_weights(), history, len(reports)


def test_killed_it_ends_with_the_numbers_of_an_unbroken_run(tmp_path):
    call = f"pole(pathlib.Path({str(tmp_path / 'killed')!r}), kill=7)"
    done, _ = support.python("-c", f"import pathlib; from tests.test_day17 import pole; {call}")
    assert done.returncode == -signal.SIGKILL, done.stderr
    weights, history, reports = pole(tmp_path / "killed")
    expected, unbroken, all_reports = pole(tmp_path / "unbroken")
    assert (reports, all_reports) == (20 - 6, 20), "it was killed before the seventh was saved"
    np.testing.assert_equal(history, unbroken)  # to the last bit; no return is known in the first report
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(weights, expected, strict=True))


def test_an_arm_has_the_last_word_in_the_game_too():
    agent = unit.player(unit.Config(game_arm="no target", lr=3e-4))
    assert (agent.target_every, agent.lr) == (1, 3e-4)
    assert unit.player(unit.Config(game_arm="Polyak")).target_every == 0
    assert unit.player(unit.Config(game_arm="larger lr", lr=3e-4)).lr_factor == 4
    assert unit.player(unit.Config()).target_every == unit.Config.target_every


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(game_arm="tripled"), "no arm tripled"),
        (dict(game="CartPole-v1"), "choose an Atari game"),
        (dict(game="ALE/Pongg-v5"), "no environment ALE/Pongg-v5"),
        (dict(steps=10_000), "--steps 10000: .* give 1600320 or more"),
        (dict(cartpole_steps=2_000), "--cartpole-steps 2000: .* or more"),
        (dict(capacity=50), "give at least"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(wrong, message):
    with pytest.raises(core.InputError, match=message):
        unit.check(dataclasses.replace(unit.Config(), **wrong))


@pytest.mark.parametrize("preset", unit.PRESETS)
def test_presets_can_be_run(preset):
    unit.check(unit.Config(**unit.PRESETS[preset]))
