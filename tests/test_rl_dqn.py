"""The loop around a Q-learning update: counts, target networks, what it learns where that is known, and a restart."""

from collections import deque

import gymnasium
import keras
import numpy as np
import pytest
import tensorflow as tf
from gymnasium.vector import AutoresetMode, VectorEnv
from keras import layers

from course import core
from course.core import experiment
from models.rl import dqn, envs, replay


class Ring(VectorEnv):
    """`count` walkers on a ring of three places, seen as one-hot vectors; either action goes on, action 1 pays 1.

    An episode ends after `length` steps: `kind` says how.
    """

    def __init__(self, count, length, kind="truncated"):
        self.num_envs, self.length, self.kind, self.age = count, length, kind, 0
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.single_observation_space = gymnasium.spaces.Box(0, 1, (3,), np.float32)
        self.single_action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.age = 0
        return self.look(), {}

    def look(self):
        return np.eye(3, dtype=np.float32)[np.full(self.num_envs, self.age % 3)]

    def step(self, actions):
        self.age += 1
        obs, info, none = self.look(), {}, np.zeros(self.num_envs, bool)
        if self.age == self.length:
            info = {"final_obs": obs}
            obs, _ = self.reset()
        over = none | bool(info)
        return obs, actions.astype(np.float64), *((over, none) if self.kind == "terminated" else (none, over)), info


def table():
    """Q as a table: a linear map of a one-hot vector, from zeros."""
    model = keras.Sequential([keras.Input([3]), layers.Dense(2, use_bias=False, kernel_initializer="zeros")])
    return model, keras.models.clone_model(model)


def rule(online, target, lr=0.5, updates=None):
    """Q-learning's own update on a table: steps of `lr` times the weighted error, falling to 0 after `updates`."""
    falling = keras.optimizers.schedules.PolynomialDecay(lr, updates, 0.0) if updates else lr
    optimizer = keras.optimizers.SGD(falling)
    optimizer.build(online.trainable_variables)

    def update(batch):
        y = batch["reward"] + batch["discount"] * tf.reduce_max(target(batch["next_obs"]), axis=1)
        with tf.GradientTape() as tape:
            q = tf.gather(online(batch["obs"]), batch["action"], batch_dims=1)
            loss = tf.reduce_mean(batch["weight"] * (y - q) ** 2)
        optimizer.apply_gradients(zip(tape.gradient(loss, online.variables), online.variables, strict=True))
        return y - q, {"loss": loss}

    return update, optimizer


def run_in(folder):
    return experiment.Run(folder, {}, None)


def test_a_line_and_then_its_end():
    assert [dqn.linear(step, 1.0, 0.2, 4) for step in (0, 1, 4, 9)] == pytest.approx([1.0, 0.8, 0.2, 0.2])
    assert dqn.linear(0, 1.0, 0.2, 0) == 1.0
    assert dqn.linear(1, 1.0, 0.2, 0) == pytest.approx(0.2)


def test_greedy_takes_the_best_and_explores_as_often_as_told():
    model, _ = table()
    model.set_weights([np.array([[1.0, 0], [0, 1], [0, 1]])])
    obs = np.eye(3, dtype=np.float32)
    assert dqn.greedy(model)(obs).tolist() == [0, 1, 1]
    policy, many = dqn.greedy(model, 0.4, seed=1), np.repeat(obs[:1], 4_000, axis=0)
    assert (policy(many) == 1).mean() == pytest.approx(0.2, abs=5 * np.sqrt(0.2 * 0.8 / 4_000))


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize(("every", "tau"), [(2, 0.0), (0, 0.25)])
def test_the_target_follows_as_told(at_once, every, tau):
    """The "update" adds 1 to the online weights; the target is a copy of every second or a moving average."""
    online, target = table()
    loop = dqn.Loop(100, batch=2, at_once=at_once, target_every=every, tau=tau)

    def update(batch):
        online.variables[0].assign_add(tf.ones([3, 2]))
        return batch["reward"], {"loss": tf.reduce_sum(batch["reward"])}

    several = dqn.compile_updates(update, online, target, loop)
    rewards, expected, done = np.arange(2.0 * at_once, dtype=np.float32).reshape(at_once, 2), 0.0, 0
    for _ in range(4):
        errors, logs = several({"reward": rewards}, tf.constant(done))
        for _ in range(at_once):
            done += 1
            if every:
                expected = float(done) if done % every == 0 else expected
            else:
                expected += tau * (done - expected)
        assert errors.numpy().tolist() == rewards.tolist()
        assert float(logs["loss"]) == pytest.approx(rewards.sum(axis=1).mean())
        assert online.get_weights()[0] == pytest.approx(np.full((3, 2), done))
        assert target.get_weights()[0] == pytest.approx(np.full((3, 2), expected), rel=1e-5)


@pytest.mark.parametrize("n_step", [1, 2])
@pytest.mark.parametrize("prioritised", [None, 0.6])
@pytest.mark.parametrize("kind", ["truncated", "terminated"])
def test_the_values_it_learns_are_known(tmp_path, kind, n_step, prioritised):
    """With gamma 0.5 the best is worth 1 + 0.5 + 0.25 + ... = 2 where episodes are cut, for the world goes on; where
    they terminate after three steps 1.75, 1.5 and 1 are left.  With two steps the action in between, which is random
    and pays 0.5 on average, counts as well: x0 = 1 + 0.5 / 2 + x2 / 4, x1 = 1 + 0.5 / 2 + x0 / 4, and after the third
    place the episode is over: x2 = 1 + x0 / 2, so 12/7, 47/28, 13/7; terminated 1.5, 1.25 and 1."""
    online, target = table()
    update, _ = rule(online, target, updates=5_900 // 4)
    env, memory = Ring(4, 3, kind), replay.Replay(800, (3,), 4, np.float32, 1, n_step, 0.5, prioritised)
    loop = dqn.Loop(6_000, 32, 100, 4, 25, 10, epsilon=(1.0, 1.0, 1), report=3_000)
    history = dqn.learn(run_in(tmp_path), "ring", online, target, update, loop, env, memory, seed=0, quiet=True)
    best = {("truncated", 1): [2, 2, 2], ("terminated", 1): [1.75, 1.5, 1],
            ("truncated", 2): [12 / 7, 47 / 28, 13 / 7], ("terminated", 2): [1.5, 1.25, 1]}[kind, n_step]  # fmt: skip
    expected = np.stack([np.array(best) - 1, best], axis=1)  # action 0 goes the same way and pays 1 less
    assert online.get_weights()[0] == pytest.approx(expected, abs=0.005 if n_step == 1 else 0.05)
    assert history["step"] == [3_000, 6_000]
    assert history["updates"][-1] == (6_000 - 100) // 4 // 25 * 25
    assert history["return"][-1] == pytest.approx(1.5, abs=5 * np.sqrt(0.75 / 100)), "of the last 100; half of three"


def test_an_interrupted_run_goes_on_with_its_memory(tmp_path):
    def go(steps, stop=None):
        online, target = table()
        update, optimizer = rule(online, target, lr=0.1)
        memory = replay.Replay(800, (3,), 4, np.float32, prioritised=0.6)
        loop = dqn.Loop(steps, 8, 40, 4, 2, 10, report=200)
        reports = []

        def test():
            reports.append(len(memory))
            if len(reports) == stop:
                raise KeyboardInterrupt
            return {"remembered": len(memory)}

        try:
            return dqn.learn(run_in(tmp_path), "ring", online, target, update, loop, Ring(4, 7), memory, seed=0,
                             test=test, quiet=True, optimizer=optimizer), online  # fmt: skip
        except KeyboardInterrupt:
            return None

    assert go(1_000, stop=4) is None  # killed before the fourth report was saved
    checkpoint = next(tmp_path.rglob("replay-600.npz")).parent
    (checkpoint / ".tmp-1-replay-800.npz").write_bytes(b"what a kill left of a buffer")
    history, online = go(1_000)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert history["step"] == [200, 400, 600, 800, 1_000]
    assert history["updates"] == [(step - 40) // 4 // 2 * 2 for step in history["step"]]
    assert history["remembered"][3] > 600, "what was there before the restart is still there"
    assert np.abs(online.get_weights()[0]).max() > 0
    assert not list(tmp_path.rglob("replay-*")), "nobody needs the buffer after the end"
    again, other = go(1_000)
    assert again == history, "what has ended is not learned anew"
    assert np.array_equal(other.get_weights()[0], online.get_weights()[0])


def test_the_return_of_a_report_is_of_the_last_hundred_episodes():
    """Reports of 4 steps and episodes of 7: in every other one none ends, and yet it has a return."""
    online, target = table()
    update, _ = rule(online, target)
    loop, seen = dqn.Loop(800, 2, 1, 1, 1, 10, epsilon=(1.0, 1.0, 1), report=4), deque(maxlen=dqn.RECENT)
    env = Ring(1, 7)
    reports = dqn.train(env, replay.Replay(80, (3,), 1, np.float32), online, target, update, loop, obs=env.reset()[0],
                        rng=np.random.default_rng(0), finished=envs.Episodes(1), recent=seen)  # fmt: skip
    told = [report["return"] for _, report in reports]
    assert np.isnan(told[0])
    assert np.isfinite(told[1:]).all()
    assert len(seen) == 100
    assert told[-1] == np.mean(seen)


def valued(values):
    """A network that gives `values` of the actions whatever it sees."""
    model = keras.Sequential([keras.Input([3]), layers.Dense(len(values), kernel_initializer="zeros")])
    model.layers[0].bias.assign(values)
    return model


def test_estimates_stand_beside_what_was_returned():
    """Reward 1 a step, three steps an episode: 1.75, 1.5, 1; the last five of ten steps are not counted, for 0.5^5 is
    the first power of 0.5 below 0.04."""
    expected, realised = dqn.estimates(valued([0.0, 5.0]), Ring(2, 3, "terminated"), 10, 0.5, unresolved=0.04)
    assert expected.tolist() == [5.0] * 10
    assert realised.tolist() == [1.75, 1.75, 1.5, 1.5, 1, 1, 1.75, 1.75, 1.5, 1.5]


class Falls(Ring):
    """Pays 1 a step; each walker falls, which ends its episode, with a probability of 0.002 in each step."""

    def reset(self, *, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        return np.zeros((self.num_envs, 3), np.float32), {}

    def step(self, actions):
        fell = self.rng.random(self.num_envs) < 0.002
        obs = np.zeros((self.num_envs, 3), np.float32)
        return obs, np.ones(self.num_envs), fell, np.zeros(self.num_envs, bool), {"final_obs": obs}


def test_estimates_do_not_favour_states_whose_episode_ends_soon():
    """The value is 1 + 0.99 (1 - 0.002) V = 83.47.  Those states alone whose episode ended within the steps, which no
    unknown rest troubles, would have a mean far below."""
    _, realised = dqn.estimates(valued([0.0, 1.0]), Falls(2_000, 0), 700, 0.99, seed=1)
    assert len(realised) == 2_000 * (700 - 619)
    assert dqn.horizon(0.99) == 619
    starts = realised.reshape(-1, 2_000)[0]  # one state a walker: independent of each other
    truth, margin = 1 / (1 - 0.99 * 0.998), 4 * starts.std() / np.sqrt(2_000)
    assert margin < 3
    assert truth - margin - 0.2 < starts.mean() < truth + margin, "0.2: the unknown rest, of 0.002 at most"


def test_what_no_return_can_be_known_of_is_refused():
    with pytest.raises(core.InputError, match=r"known after 619 steps with gamma 0.99: give 620 steps"):
        dqn.estimates(valued([0.0, 1.0]), Falls(1, 0), 619, 0.99)
    with pytest.raises(core.InputError, match="cut off after 8 steps"):
        dqn.estimates(valued([0.0, 1.0]), Ring(1, 8), 20, 0.5)
    for gamma in (1.0, 0.9999):
        with pytest.raises(core.InputError, match=r"--gamma .* give 0.9994 or less"):
            dqn.horizon(gamma)
    assert dqn.horizon(0.0) == 1


def test_the_least_number_of_steps_is_named():
    def make(steps):
        return dqn.Loop(steps, warmup=steps // 40, every=2, at_once=32, report=steps // 20)

    with pytest.raises(core.InputError, match=r"--steps 100: .* give (\d+) or more") as error:
        dqn.check("--steps", 100, make, 8)
    least = int(str(error.value).split()[-3])
    dqn.check("--steps", least, make, 8)
    with pytest.raises(core.InputError):
        dqn.check("--steps", least - 1, make, 8)


def test_networks_are_float32_under_a_mixed_policy():
    with core.runtime.policy("mixed_float16"):
        online, target = dqn.pair(lambda: keras.Sequential([keras.Input([3]), layers.Dense(2)]))
        update, _ = rule(online, target)
        assert keras.config.dtype_policy().name == "mixed_float16", "the others' is as it was"
        assert online(np.eye(3, dtype=np.float32)).dtype == "float32"
        assert np.array_equal(online.get_weights()[0], target.get_weights()[0])
        batch = {"obs": tf.eye(3), "next_obs": tf.eye(3), "action": tf.zeros(3, tf.int32), "weight": tf.ones(3),
                 "reward": tf.ones(3), "discount": tf.ones(3)}  # fmt: skip
        error, _ = update(batch)
        assert error.dtype == "float32"


def test_summary_of_runs():
    runs = [{"score": 10, "estimate": [1.0, 2, 3, 9], "realised": [1.0, 1, 1, 1]},
            {"score": 20, "estimate": [1.0, 2, 3, 5], "realised": [1.0, 1, 1, 1]}]  # fmt: skip
    row = dqn.summary("DQN", runs)
    assert (row["arm"], row["score"], row["worst"], row["deviation"]) == ("DQN", 15, 10, 5)
    assert (row["Q less what followed"], row["of the last quarter"], row["largest Q"]) == (2.25, 6, 9)
    assert row["deviation of that"] == 0.5


def test_what_cannot_be_is_one_clear_line(tmp_path):
    online, target = table()
    update, _ = rule(online, target)
    with pytest.raises(core.InputError, match=r"4 environments and a replay buffer for 2"):
        dqn.learn(run_in(tmp_path), "a", online, target, update, dqn.Loop(100, report=90, warmup=10), Ring(4, 3),
                  replay.Replay(80, (3,), 2), seed=0)  # fmt: skip
    with pytest.raises(core.InputError, match=r"before the first update: give 108 or more"):
        dqn.learn(run_in(tmp_path), "b", online, target, update, dqn.Loop(200, warmup=100, report=50), Ring(4, 3),
                  replay.Replay(80, (3,), 4), seed=0)  # fmt: skip
