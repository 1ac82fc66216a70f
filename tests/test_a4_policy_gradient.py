"""Assignment 4, policy gradient: each exercise by hand, its gradients, and a policy that learns."""

import numpy as np
import pytest

from course import a4_policy_gradient as a4
from models.rl import evaluate


def test_returns_by_hand():
    np.testing.assert_allclose(a4.discounted([1, 2, 4], 0.5), [3, 4, 4])
    np.testing.assert_allclose(a4.discounted([1, 1, 1, 1], 1.0), [4, 3, 2, 1])


def test_normalised_returns():
    found = a4.normalised(np.array([1.0, 3.0, 5.0]))
    np.testing.assert_allclose(found, np.array([-1, 0, 1]) * 1.5**0.5, rtol=1e-6)
    np.testing.assert_array_equal(a4.normalised(np.full(4, 7.0)), np.zeros(4))


def test_policy_by_hand():
    params = {"W1": np.array([[1.0, -1.0], [0, 0], [0, 0], [2.0, 0]]), "b1": np.array([0.0, 0.5]),
              "w2": np.array([1.0, -2.0]), "b2": np.array([-1.0])}  # fmt: skip
    p, h = a4.forward(params, np.array([[1.0, 9, 9, 0.5], [-1.0, 9, 9, 0.0]]))
    np.testing.assert_allclose(h, [[2, 0], [0, 1.5]])
    np.testing.assert_allclose(p, 1 / (1 + np.exp([-1.0, 4.0])))


def test_gradients_against_differences_and_keras():
    worst, difference = a4.check(a4.Config(seed=3))
    assert worst < 1e-6
    assert difference < 1e-6  # float32


def test_a_policy_that_is_sure_has_a_finite_loss():
    """z is 1,000: -log p of what it would never do is 1,000, of what it does 0."""
    params = {"W1": np.zeros((4, 3)), "b1": np.ones(3), "w2": np.zeros(3), "b2": np.array([1000.0])}
    for action, expected in (0, 1000.0), (1, 0.0):
        loss, gradients = a4.loss_and_gradients(params, np.ones((1, 4)), np.array([action]), np.array([1.0]))
        assert loss == expected
        assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_a_step_makes_the_better_action_likelier():
    rng = np.random.default_rng(0)
    params, x = a4.create(rng, 10), rng.normal(size=(2, 4))
    before = a4.forward(params, x[:1])[0]
    _, gradients = a4.loss_and_gradients(params, x[[0, 0]], np.array([1, 0]), np.array([1.0, -1.0]))
    for name in params:
        params[name] -= 0.1 * gradients[name]
    assert a4.forward(params, x[:1])[0] > before


def test_an_attempt_ends_and_is_noted_whole():
    import gymnasium

    env = gymnasium.make("CartPole-v1", max_episode_steps=9)
    env.reset(seed=0)
    for _ in range(5):
        x, actions, rewards = a4.attempt(env, a4.create(np.random.default_rng(0), 10), np.random.default_rng(1))
        assert x.shape == (len(rewards), 4) and x.dtype == np.float64
        assert len(actions) == len(rewards) <= 9 and set(actions) <= {0, 1}
        assert (rewards == 1).all()


def test_learning_beats_chance_and_repeats_itself():
    cfg = a4.Config(episodes=150)
    (params, lengths), (_, again) = (a4.learn(cfg, 200, a4.normalised, 0) for _ in range(2))
    assert lengths == again and len(lengths) == 150
    judged = evaluate.evaluate(a4.likelier(params), "CartPole-v1", 20, 1, limit=200)["mean"]
    chance = evaluate.evaluate(evaluate.uniform("CartPole-v1", 0), "CartPole-v1", 20, 1, limit=200)["mean"]
    assert judged > 2 * chance


@pytest.mark.slow
def test_the_short_task_is_solved():
    _, lengths = a4.learn(a4.Config(), 200, a4.normalised, 0)
    assert np.mean(lengths[-100:]) >= 195 and len(lengths) < 3000
