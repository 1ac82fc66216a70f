"""Experience as the environments gave it, where episodes end and where they are cut."""

import gymnasium
import numpy as np
import pytest

from models.rl import envs, rollout


class Count(gymnasium.Env):
    """Observation: steps so far in this episode and its number; ends after 3 steps, is cut after 5 where `long`."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, long):
        self.long, self.number, self.actions = long, -1, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.number = 0, self.number + 1
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        self.actions.append(float(action[0]))
        ended = not self.long and self.steps == 3
        return self._observe(), float(self.steps), ended, self.steps == 5, {}

    def _observe(self):
        return np.array([self.steps, self.number], np.float64)


@pytest.fixture
def counted():
    made = [Count(False), Count(True)]
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    env = envs.SameStep([lambda e=e: e for e in made], autoreset_mode=mode)
    start, _ = env.reset(seed=0)
    episodes = envs.Episodes(2)
    chosen = rollout.collect(env, lambda x, t: np.full((2, 1), t - 3, np.float32), start, 7, episodes)
    return chosen, made


def test_experience_stands_as_it_came(counted):
    chosen, _ = counted
    np.testing.assert_array_equal(chosen.observations[:, 0], [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2)])
    np.testing.assert_array_equal(chosen.observations[:, 1, 0], [0, 1, 2, 3, 4, 0, 1])
    np.testing.assert_array_equal(chosen.rewards.T, [[1, 2, 3, 1, 2, 3, 1], [1, 2, 3, 4, 5, 1, 2]])
    np.testing.assert_array_equal(np.argwhere(chosen.terminated), [(2, 0), (5, 0)])
    np.testing.assert_array_equal(np.argwhere(chosen.truncated), [(4, 1)])
    np.testing.assert_array_equal(chosen.cut, [(5, 0)])  # where the second was cut, not where its next one began
    np.testing.assert_array_equal(chosen.following, [(1, 2), (2, 1)])
    assert chosen.observations.dtype == chosen.cut.dtype == np.float32
    assert (chosen.done == (chosen.terminated | chosen.truncated)).all()
    assert chosen.finished == [(6.0, 3), (15.0, 5), (6.0, 3)]


def test_actions_are_stored_as_chosen_and_clipped_for_the_environment(counted):
    chosen, made = counted
    np.testing.assert_array_equal(chosen.actions[:, 0, 0], [-3, -2, -1, 0, 1, 2, 3])
    assert made[0].actions == [-1, -1, -1, 0, 1, 1, 1]


def test_values_go_where_they_belong(counted):
    chosen, _ = counted
    values, last, final = chosen.values(lambda x: 10 * x[:, 1] + x[:, 0])
    np.testing.assert_array_equal(values[:, 0], [0, 1, 2, 10, 11, 12, 20])
    np.testing.assert_array_equal(last, [21, 12])
    assert final[4, 1] == 5 and np.count_nonzero(final) == 1


def test_whole_episodes_count_once_each_and_end_in_zeros():
    made = [Count(False), Count(True), Count(True)]
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    env = envs.SameStep([lambda e=e: e for e in made], autoreset_mode=mode)
    for limit, lengths in (7, [3, 5, 5]), (4, [3, 4, 4]):
        batch = rollout.play(env, lambda x, t: np.full((3, 1), t + 1, np.float32), limit)
        np.testing.assert_array_equal(batch.lengths, lengths)
        np.testing.assert_array_equal(batch.mask, np.arange(limit)[:, None] < lengths)
        np.testing.assert_array_equal(batch.rewards, batch.mask * np.arange(1, limit + 1)[:, None])
        np.testing.assert_array_equal(batch.actions[..., 0], batch.rewards)  # 1, 2, 3: as chosen, then nothing
        np.testing.assert_array_equal(batch.observations[..., 0], batch.mask * np.arange(limit)[:, None])
        np.testing.assert_array_equal(batch.last[:, 0], lengths)  # not where a following episode has got to
        np.testing.assert_array_equal(batch.truncated, [False, True, True])
