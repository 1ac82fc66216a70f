"""Day 16: the score function's identities, returns by hand, and the gradient estimate that they make."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from course import core
from course import day16_reinforce as day16
from models.rl import envs, policies, ppo, rollout

CFG = day16.Config(episodes=3, units=8, fit_steps=3, limit=40, measured=6)


def test_returns_by_hand():
    rewards = np.array([[1, 1], [2, 2], [4, 0], [0, 0]], np.float32)
    mask = np.array([[1, 1], [1, 1], [1, 0], [0, 0]], np.float32)
    # first episode: 4 + 0, 2 + 2, 1 + 2;  second, cut before a state worth 8: 2 + 4, 1 + 3
    expected = [[3, 4], [4, 6], [4, 0], [0, 0]]
    np.testing.assert_allclose(day16.returns_to_go(rewards, mask, [0, 8], 0.5), expected)


def batch_of(rewards, mask):
    """A batch whose observations are the numbers of its steps."""
    steps, n = mask.shape
    observations = np.tile(np.arange(steps, dtype=np.float32)[:, None, None], (1, n, 1)) * mask[..., None]
    return rollout.Batch(observations, np.zeros((steps, n), np.int32), rewards, mask,
                         mask.sum(axis=0).astype(int), observations[-1], np.zeros(n, bool))  # fmt: skip


def test_weights_by_hand():
    mask = np.array([[1, 1], [1, 1], [1, 0]], np.float32)
    batch = batch_of(mask * [[1], [2], [4]], mask)
    returns = day16.returns_to_go(batch.rewards, mask, [0, 0], 1.0)
    np.testing.assert_array_equal(returns, [[7, 3], [6, 2], [4, 0]])
    found = {kind: day16.weights(kind, batch, returns, 5.0, lambda x: 10 * x) for kind in day16.WEIGHTS}
    np.testing.assert_array_equal(found["whole return"], [[7, 3], [7, 3], [7, 0]])
    np.testing.assert_array_equal(found["reward to go"], returns)
    np.testing.assert_array_equal(found["running mean"], [[2, -2], [1, -3], [-1, 0]])
    np.testing.assert_array_equal(found["learned V"], [[7, 3], [-4, -8], [-16, 0]])


def test_the_whole_return_is_the_episode_s_discounted_one():
    mask = np.array([[1, 1], [1, 1], [1, 0]], np.float32)
    batch = batch_of(mask * [[1], [2], [4]], mask)
    returns = day16.returns_to_go(batch.rewards, mask, [0, 8], 0.5)
    # 1 + 2 / 2 + 4 / 4;  1 + 2 / 2 + 8 / 4, as the second was cut before a state worth 8
    found = day16.weights("whole return", batch, returns, 5.0, None)
    np.testing.assert_array_equal(found, [[3, 4], [3, 4], [3, 0]])


# --- distributions ---------------------------------------------------------------------------------------------------


def test_categorical_is_the_textbook_s():
    logits = np.log([[0.2, 0.3, 0.5]]).astype(np.float32) + 4
    found = [float(policies.Categorical.log_prob(logits, np.array([i]))[0]) for i in range(3)]
    np.testing.assert_allclose(np.exp(found), [0.2, 0.3, 0.5], rtol=1e-5)
    p = np.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose(policies.Categorical.entropy(logits), [-(p * np.log(p)).sum()], rtol=1e-5)
    noise = policies.Categorical.noise(np.random.default_rng(0), 1, 40_000, 3)[0]
    drawn = np.bincount(policies.Categorical.sample(logits, noise), minlength=3) / 40_000
    np.testing.assert_allclose(drawn, p, atol=4 * np.sqrt(0.25 / 40_000))  # four standard errors
    assert policies.Categorical.mode(logits) == [2]


def test_gaussian_is_scipy_s():
    from scipy import stats

    mean, log_std = np.array([[0.5, -1.0]], np.float32), np.array([[0.2, -0.7]], np.float32)
    outputs, actions = np.concatenate([mean, log_std], axis=1), np.array([[1.0, -1.5]], np.float32)
    expected = stats.norm(mean, np.exp(log_std))
    np.testing.assert_allclose(
        policies.Gaussian.log_prob(outputs, actions), expected.logpdf(actions).sum(axis=1), rtol=1e-5
    )
    np.testing.assert_allclose(policies.Gaussian.entropy(outputs), expected.entropy().sum(axis=1), rtol=1e-5)
    noise = policies.Gaussian.noise(np.random.default_rng(0), 40_000, 1, 2)
    drawn = policies.Gaussian.sample(outputs, noise)
    np.testing.assert_allclose(drawn.mean(axis=(0, 1)), mean[0], atol=4 * 1.3 / 200)
    np.testing.assert_allclose(drawn.std(axis=(0, 1)), np.exp(log_std[0]), rtol=0.02)
    np.testing.assert_array_equal(policies.Gaussian.mode(outputs), mean)


def test_the_score_of_a_choice_has_mean_zero_and_gives_the_gradient_of_an_expectation():
    """Eqs. 1 and 2, exactly: both sides are sums over three actions."""
    logits, reward = tf.Variable([[0.3, -1.0, 0.8]]), tf.constant([2.0, -1.0, 5.0])
    with tf.GradientTape() as tape:
        expectation = tf.reduce_sum(tf.nn.softmax(logits) * reward)
    gradient, p = tape.gradient(expectation, logits), tf.nn.softmax(logits)[0]
    scores = []
    for action in range(3):
        with tf.GradientTape() as tape:
            log_prob = policies.Categorical.log_prob(logits, np.array([action]))
        scores.append(tape.gradient(log_prob, logits))
    np.testing.assert_allclose(sum(p[a] * scores[a] for a in range(3)), np.zeros((1, 3)), atol=1e-7)
    np.testing.assert_allclose(sum(p[a] * scores[a] * reward[a] for a in range(3)), gradient, rtol=1e-5)


def test_the_score_of_a_normal_has_mean_zero_and_gives_the_gradient_of_an_expectation():
    """Eqs. 1 and 2 by quadrature: E[a^2] = mu^2 + sigma^2, whose derivative by (mu, log sigma) is (2 mu, 2 sigma^2)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = weights / weights.sum()
    outputs = tf.Variable([[0.7, -0.4]])
    sigma = float(np.exp(-0.4))
    actions = (0.7 + sigma * nodes).astype(np.float32)
    scores = []
    for action in actions:
        with tf.GradientTape() as tape:
            log_prob = policies.Gaussian.log_prob(outputs, np.array([[action]]))
        scores.append(tape.gradient(log_prob, outputs).numpy()[0])
    np.testing.assert_allclose(weights @ scores, [0, 0], atol=1e-5)
    np.testing.assert_allclose((weights * actions**2) @ scores, [1.4, 2 * sigma**2], rtol=1e-4)


def test_the_gaussian_head_is_saved_and_has_a_numpy_form(tmp_path):
    model = day16.network(3, 8, 2, policies.GaussianHead(-0.5))
    model.layers[-1].log_std.assign([0.1, -2.0])
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    assert model(x).shape == (4, 4)
    np.testing.assert_allclose(model(x)[:, 2:], [[0.1, -2.0]] * 4, rtol=1e-6)
    np.testing.assert_allclose(ppo.as_numpy(model)(x), model(x), atol=1e-6)
    model.save(tmp_path / "policy.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "policy.keras")(x), model(x))


def test_actions_to_be_judged_stay_within_their_bounds():
    import gymnasium

    space = gymnasium.spaces.Box(-1.0, 0.5, (2,), np.float32)
    act = policies.best(space, lambda x: np.array([[3.0, -4.0, 9, 9], [0.25, 0.0, 9, 9]]))
    np.testing.assert_array_equal(act(np.zeros((2, 3))), [[0.5, -1.0], [0.25, 0.0]])


# --- the estimate ----------------------------------------------------------------------------------------------------


def test_surrogate_has_the_gradient_of_eq_3():
    core.runtime.seed(0)
    policy = day16.network(4, 6, 2)
    rng = np.random.default_rng(0)
    x, actions, psi = rng.normal(size=(5, 4)).astype("f"), np.array([0, 1, 1, 0, 1]), rng.normal(size=5).astype("f")
    with tf.GradientTape() as tape:
        loss, _ = day16.surrogate(policy, policies.Categorical, x, actions, psi, 2, 0.0)
    found = tape.gradient(loss, policy.trainable_variables)
    expected = [np.zeros(variable.shape) for variable in policy.trainable_variables]
    for i in range(5):
        with tf.GradientTape() as tape:
            log_prob = tf.nn.log_softmax(policy(x[i : i + 1]))[0, actions[i]]
        for total, part in zip(expected, tape.gradient(log_prob, policy.trainable_variables), strict=True):
            total -= psi[i] / 2 * part.numpy()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_entropy_bonus_spreads_a_policy_that_is_too_sure():
    policy = keras.Sequential([keras.Input([1]), keras.layers.Dense(2)])
    policy.set_weights([np.zeros((1, 2)), np.array([2.0, -2.0])])
    x, actions, psi = np.zeros((3, 1), "f"), np.zeros(3, np.int32), np.zeros(3, "f")
    with tf.GradientTape() as tape:
        loss, entropy = day16.surrogate(policy, policies.Categorical, x, actions, psi, 1, 0.1)
    bias = tape.gradient(loss, policy.trainable_variables)[1]
    assert bias[0] > 0 > bias[1], "descent brings the two logits together"
    np.testing.assert_allclose(loss, -0.1 * 3 * entropy, rtol=1e-5)


@pytest.fixture(scope="module")
def measured():
    """`spread` of a policy that knows nothing, from 400 episodes; the running mean is that of what it gets."""
    core.runtime.seed(0)
    cfg = day16.Config(measured=400, limit=100)
    policy, rng = day16.network(4, 8, 2), np.random.default_rng(0)
    act = policies.acting(policies.Categorical, ppo.as_numpy(policy), rng, 100, 400, 2)
    return day16.spread(cfg, "CartPole-v1", act, 12.0, lambda x: np.full((len(x), 1), 12.0, np.float32), policy,
                        policies.Categorical)  # fmt: skip


def test_all_four_weights_estimate_one_gradient_and_baselines_are_less_noisy(measured):
    """Episodes of some 20 steps, in which a discount of 0.99 changes little of the direction."""
    assert [row["weights"] for row in measured] == list(day16.WEIGHTS)
    assert all(row["cosine"] > 0.9 for row in measured)
    whole, to_go, mean, learned = (row["variance"] for row in measured)
    assert whole > 2 * to_go > 2 * mean
    assert mean == pytest.approx(learned), "a constant V is a constant baseline"


def test_a_gradient_that_noise_hides_has_no_figure(monkeypatch):
    """Variance / (squared mean - variance / M), by hand from two vectors; none where that is not positive."""
    mask = np.ones((1, 2), np.float32)
    batch = batch_of(np.array([[1.0, 3.0]], np.float32), mask)
    batch.observations[:] = 1
    monkeypatch.setattr(day16.rollout, "play", lambda *_: batch)
    policy = keras.Sequential([keras.Input([1]), keras.layers.Dense(2, use_bias=False, kernel_initializer="zeros")])
    cfg = day16.Config(measured=2)
    one = lambda x: np.zeros((len(x), 1), np.float32)  # noqa: E731
    found = {row["weights"]: row for row in day16.spread(cfg, "CartPole-v1", None, 2.5, one, policy,
                                                        policies.Categorical)}  # fmt: skip
    # the loss's gradient of action 0 at even odds is r (-1/2, 1/2): r = 1 and 3 have the mean (-1, 1), variance 1
    np.testing.assert_allclose(found["reward to go"]["variance"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(found["reward to go"]["over signal"], 1 / (2 - 1 / 2), rtol=1e-6)
    assert found["running mean"]["over signal"] is None  # -1.5 and 0.5: 1 / 8 - 1 / 2


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CartPole-v1", "InvertedPendulum-v5"])
def test_learning_runs_and_repeats_itself(name):
    arm = day16.ARMS["learned V, entropy"]
    (policy, space, history, measured), (_, _, again, _) = (
        day16.learn(CFG, name, arm, 3, 2, snapshots) for snapshots in ((1,), ())
    )
    assert len(history["return"]) == 2 and all(np.isfinite(history[key]).all() for key in history)
    assert history == again, "measuring changes nothing, and the seed fixes the rest"
    assert [row["updates"] for row in measured] == [1] * 4
    observations = envs.vector(name, 2, 0).reset()[0]
    assert policies.best(space, ppo.as_numpy(policy))(observations).shape[0] == 2


@pytest.mark.slow
def test_cart_pole_is_learned():
    policy, space, _, _ = day16.learn(day16.Config(), "CartPole-v1", day16.ARMS["learned V"], 0, 60)
    judged = day16.evaluate.evaluate(policies.best(space, ppo.as_numpy(policy)), "CartPole-v1", 100, 1)
    assert judged["mean"] >= 475


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "luck"], "no luck: choose from no baseline"),
        (["--snapshots", "1", "1"], "--snapshots"),
        (["--snapshots", "2", "0"], "--snapshots"),
        (["--snapshots", "3"], "rising numbers from 0"),
        (["--continuous", "CartPole-v1"], r"--continuous CartPole-v1: its actions are Discrete\(2\); .* are a Box"),
        (["--continuous", "Pendulum"], "--continuous Pendulum: there is no environment"),
        (["--continuous", "CarRacing-v3"], "--continuous CarRacing-v3"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(words, message, tmp_path):
    with pytest.raises(core.InputError, match=message):
        day16.main(["--preset", "smoke", "--runs", str(tmp_path), *words])
    assert list(tmp_path.iterdir()) == []


def test_trials_have_seeds_of_their_own(tmp_path, monkeypatch):
    """A hundred apart, so that trial 1 of seed 0 is not trial 0 of seed 1."""
    seen = []

    def learn(cfg, name, arm, seed, *_):
        seen.append(seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(day16, "learn", learn)
    for number in range(2):
        with pytest.raises(KeyboardInterrupt):
            day16.trial(None, day16.Config(seed=7), "CartPole-v1", "x", day16.Arm(), number, ())
    assert seen == [7, 107]
