"""The three assignments on Q-networks: what each adds, by hand or against exact values."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from course import a4_double_dqn as double
from course import a4_dueling_dqn as dueling
from course import a4_world_navigation as navigation
from course import core, day17_dqn
from models.rl import world

# --- world navigation ------------------------------------------------------------------------------------------------


def test_distances_by_hand():
    """3 x 3 cells, the middle row blocked but for its right end: from top left to bottom left it is six steps."""
    blocked = np.isin(np.arange(9), [3, 4])
    steps = navigation.distances(blocked, 3)
    assert steps[0].tolist() == [0, 1, 2, np.inf, np.inf, 3, 6, 5, 4]
    assert np.array_equal(steps, steps.T)
    assert np.isinf(steps[3]).all()


def test_the_nearest_goal_is_not_far_below_the_bound_and_never_above():
    cfg = navigation.Config(judged=60)
    env = navigation.held_out(cfg, 0)
    found, bound = navigation.returns(navigation.nearest_goal(env), env), navigation.bound(cfg, 0)
    margin = 4 * found.std() / np.sqrt(60)
    assert 0.9 * bound < found.mean() < bound + margin


def test_the_worlds_that_judge_are_held_out():
    env = navigation.held_out(navigation.Config(judged=200), 3)
    train = {tuple(cells) for cells in world.arrangements(5, 3, "train").tolist()}
    assert not train & {tuple(sorted(cells)) for cells in env.worlds.obstacles.tolist()}


def test_bound_and_score_are_of_the_same_starts():
    """Judged from where the bound was computed: without idle actions and with, and another trial elsewhere."""
    cfg, other = navigation.Config(judged=5), dueling.Config(judged=5)
    env = navigation.held_out(cfg, 100)
    env.reset()
    assert navigation.bound(cfg, 1) == world.best_returns(env.worlds).mean()
    assert dueling.bound(other, 0) != dueling.bound(other, 1)


def test_the_same_episode_is_asked_at_every_report():
    env = navigation.held_out(navigation.Config(), 0, 5)
    env.reset()
    once, again = (navigation.returns(lambda obs: obs[:, 0, 0, 0] % 4, env, (7, 2)) for _ in range(2))
    assert np.array_equal(once, again)


def test_the_arm_that_is_shown_is_chosen_by_name():
    assert navigation.chief(navigation.Config(arms=("both", "plain"))) == "both"
    assert navigation.chief(navigation.Config(arms=("plain", "double"))) == "double"


@pytest.mark.parametrize(
    ("unit", "argv", "message"),
    [
        (navigation, ["--gamma", "1"], "--gamma 1.0: no return would be known"),
        (navigation, ["--steps", "500"], r"--steps 500: .* give \d+ or more"),
        (navigation, ["--obstacles", "20", "--goals", "4"], "no room"),
        (navigation, ["--arms", "best"], "no arm best"),
        (navigation, ["--capacity", "20"], "give at least"),
        (double, ["--gamma", "1"], "--gamma 1.0: no return would be known"),
        (double, ["--samples", "1"], "--samples 1: .* give 2 or more"),
        (double, ["--steps", "500"], r"--steps 500: .* give \d+ or more"),
        (dueling, ["--steps", "500"], r"--steps 500: .* give \d+ or more"),
        (dueling, ["--actions", "3"], "give at least 4"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(unit, argv, message, tmp_path):
    with pytest.raises(core.InputError, match=message):
        unit.main([*argv, "--runs", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", [False, True])
def test_the_network_sees_where_things_are(split):
    model = navigation.network((20, 20, 3), 4, split)
    obs = world.vector(2, 0).reset()[0]
    q = model(obs).numpy()
    assert q.shape == (2, 4)
    assert np.abs(model(obs[:, ::-1]).numpy() - q).max() > 1e-4


# --- Double ----------------------------------------------------------------------------------------------------------


def test_estimators_by_hand():
    rewards = np.array([[[1.0, 3, 0, 2], [4, 0, 9, 1]]])  # means 1.5 and 3.5; of the halves 2, 1 and 2, 5
    assert double.single_estimate(rewards).tolist() == [3.5]
    assert double.double_estimate(rewards).tolist() == [1.0], "a tie: the first is chosen"


def test_the_bias_of_the_maximum_is_the_known_one():
    """Two standard normal means of n samples: their maximum is 1 / sqrt(pi n) too large on average."""
    row = double.biases(np.random.default_rng(0), 20_000, 10, counts=(2,))[0]
    assert row["single, equal"] == pytest.approx(1 / np.sqrt(np.pi * 10), abs=0.01)
    assert row["double, equal"] == pytest.approx(0, abs=0.015)
    assert row["double, 0 to 1"] < -0.03


def test_who_chooses_and_who_judges():
    online, target = tf.constant([[1.0, 2.0]]), tf.constant([[5.0, 3.0]])
    assert double.next_values(online, target, False).numpy().tolist() == [5.0]
    assert double.next_values(online, target, True).numpy().tolist() == [3.0]


def test_the_update_uses_these_targets_and_logs_the_gap():
    """Errors of an update without a learning rate: eq. 4 and eq. 5 less Q; the gap is the same for both."""
    keras.utils.set_random_seed(0)
    online, target = (day17_dqn.network((4,), 2, dueling=False) for _ in range(2))
    obs = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    batch = {"obs": obs, "next_obs": -obs, "action": np.zeros(50, np.int32), "reward": np.ones(50, np.float32),
             "discount": np.full(50, 0.5, np.float32), "weight": np.ones(50, np.float32)}  # fmt: skip
    q, ahead, judged = (network(x).numpy() for network, x in ((online, obs), (online, -obs), (target, -obs)))
    worth = {False: judged.max(axis=1), True: judged[np.arange(50), ahead.argmax(axis=1)]}
    assert (worth[False] > worth[True]).any()
    for kind, following in worth.items():
        update = double.rule(day17_dqn.Agent(double=kind), online, target, keras.optimizers.SGD(0.0))
        error, logs = update({name: tf.constant(value) for name, value in batch.items()})
        assert error.numpy() == pytest.approx(1 + 0.5 * following - q[:, 0], abs=1e-5)
        assert float(logs["gap"]) == pytest.approx((worth[False] - worth[True]).mean(), abs=1e-6)


def test_q_learning_goes_astray_and_double_does_not():
    rng = np.random.default_rng(0)
    single, _ = double.small_problem(rng, 500, 120, 10, 0.1, double=False)
    both, _ = double.small_problem(rng, 500, 120, 10, 0.1, double=True)
    assert single.max() > 0.8, "Sutton and Barto, Figure 6.5"
    assert both.max() < 0.65
    assert both[-20:].mean() < 0.15
    assert single[-20:].mean() > 2 * both[-20:].mean()


# --- Dueling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "expected"), [("sum", [11, 12, 16]), ("max", [5, 6, 10]), ("mean", [8, 9, 13])])
def test_combining_by_hand(tmp_path, kind, expected):
    assert dueling.Combine(kind)(tf.constant([[10.0]]), tf.constant([[1.0, 2.0, 6.0]])).numpy().tolist() == [expected]
    model = dueling.network(70, 3, kind)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again(tf.eye(70)).numpy() == pytest.approx(model(tf.eye(70)).numpy(), abs=1e-6)


def test_single_and_dueling_are_of_about_one_size():
    single, split = (dueling.network(70, 10, kind).count_params() for kind in ("single", "mean"))
    assert split == pytest.approx(single, rel=0.1)


@pytest.mark.parametrize("actions", [5, 20])
def test_the_corridor_and_its_values(actions):
    following, reward, policy, exact = dueling.corridor(actions, 0.99, 0.1)
    assert policy.sum(axis=1) == pytest.approx(np.ones(70), abs=1e-6)
    assert (following == 70).sum() == 1
    assert reward.sum() == reward[69, dueling.UP] == 1
    value = np.append((policy * exact).sum(axis=1), 0)
    assert exact == pytest.approx(reward + 0.99 * value[following], abs=1e-5), "Bellman's equation"
    place = 0
    for _ in range(70):  # the policy's preferred actions lead to the end
        place = following[place, policy[place].argmax()]
    assert place == 70
    assert following[20, 3] == 19, "left, in the horizontal corridor"
    assert following[5, 2] == 4, "down, in the first"
    assert following[20, 0] == following[20, 2] == following[20, 4] == 20, "walls, and an idle action"
    greedy = dueling.corridor(actions, 0.99, 0.0)[3]
    assert greedy[0, dueling.UP] == pytest.approx(0.99**69, rel=1e-4)


def test_a_trial_stands_beside_the_bound_of_its_own_worlds(tmp_path, monkeypatch):
    found = {"return": 10.0, "step": [1, 2], "test_return": [0.0, 10.0]}
    monkeypatch.setattr(dueling, "evaluate_policy", lambda *_: [1.0] * 50)
    monkeypatch.setattr(dueling, "navigate", lambda *_: found)
    argv = ["--preset", "smoke", "--trials", "2", "--judged", "5", "--runs", str(tmp_path)]
    record = dueling.main(argv)
    bounds = [dueling.bound(dueling.Config(judged=5), trial) for trial in range(2)]
    assert record["metrics"]["bound"] == pytest.approx(np.mean(bounds))
    (row,) = record["tables"]["world"]
    assert row["% of the bound"] == pytest.approx(np.mean([1_000 / bound for bound in bounds]))


def test_evaluating_the_corridors_policy_comes_nearer_to_its_values():
    errors = dueling.evaluate_policy(dueling.Config(updates=300, walkers=16), "mean", 5, 0, reports=3)
    assert errors[-1] < errors[0] / 2
