"""On-policy experience: T steps of N environments side by side, or one whole episode of each."""

import dataclasses

import numpy as np

from models.rl.envs import final_observations
from models.rl.policies import within


@dataclasses.dataclass
class Rollout:
    """What T steps of N environments gave, in the order of time; an episode's end is followed by the next one's start.

    observations [T, N, ...], which the actions [T, N] (discrete) or [T, N, A] were chosen from; rewards [T, N];
    terminated, truncated [T, N] bool; cut [K, ...]: the last observations of the K episodes that were truncated but not
    terminated, in the order of time, then of the environments; following [N, ...]: the observations after step T;
    finished: (return, length) of the episodes that ended, where they were counted.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    cut: np.ndarray
    following: np.ndarray
    finished: list[tuple[float, int]]

    @property
    def done(self):
        return self.terminated | self.truncated

    def flat(self, values):
        """[T, N, ...] -> [T * N, ...]"""
        return values.reshape(-1, *values.shape[2:])

    def values(self, value):
        """`value`: observations [B, ...] -> [B], asked once for all -> V of observations [T, N], of what follows the
        last step [N], and of the last observations where an episode was cut [T, N], elsewhere 0.
        """
        steps, envs = self.rewards.shape
        answers = value(np.concatenate([self.flat(self.observations), self.following, self.cut]))
        final = np.zeros((steps, envs), np.float32)
        final[self.truncated & ~self.terminated] = answers[(steps + 1) * envs :]
        return answers[: steps * envs].reshape(steps, envs), answers[steps * envs :][:envs], final


def collect(env, act, observation, steps, episodes=None):
    """`Rollout` of `steps` steps of the vector environment `env`, which goes on from `observation` [N, ...].

    act: (observations [N, ...], step 0..steps-1) -> actions; continuous ones are stored as they are and clipped to the
    action space's bounds on their way to the environment, whose choice of bounds the policy's density knows nothing of.
    episodes: an `envs.Episodes`, to count returns and lengths with.  Floating-point observations become float32.
    """
    start, clip = _narrow(observation), within(env.single_action_space)
    observations = np.empty((steps, *start.shape), start.dtype)
    rewards = np.empty((steps, len(start)), np.float32)
    terminated, truncated = np.empty((2, steps, len(start)), bool)
    actions, cut, finished, now = None, [], [], start
    for t in range(steps):
        action = act(now, t)
        if actions is None:
            actions = np.empty((steps, *action.shape), action.dtype)
        observations[t], actions[t] = now, action
        observation, rewards[t], terminated[t], truncated[t], info = env.step(clip(action))
        now = _narrow(observation)
        if truncated[t].any():
            cut.append(_narrow(final_observations(observation, info))[truncated[t] & ~terminated[t]])
        if episodes is not None:
            finished += episodes.add(rewards[t], terminated[t] | truncated[t])
    cut = np.concatenate([np.empty((0, *start.shape[1:]), start.dtype), *cut])
    return Rollout(observations, actions, rewards, terminated, truncated, cut, now, finished)


def _narrow(observation):
    return observation.astype(np.float32) if observation.dtype == np.float64 else observation


@dataclasses.dataclass
class Batch:
    """One whole episode of each of N environments, in arrays of `limit` = T steps; what follows an end is zero.

    observations [T, N, ...]; actions [T, N] or [T, N, A]; rewards [T, N]; mask [T, N]: 1.0 while the episode lasts;
    lengths [N]; last [N, ...]: the observations that the last steps led to; truncated [N] bool: whether the episode was
    cut there, by the environment's limit or by T, and would have gone on.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    last: np.ndarray
    truncated: np.ndarray


def play(env, act, limit):
    """`Batch` of one episode of each environment of `env`, which is reset first; `act` as `collect` takes it.

    Each environment counts once, however long its episode is: taking those that come until so many steps are full would
    favour the short ones.  An episode of more than `limit` steps is cut there.
    """
    observation, _ = env.reset()
    now, clip = _narrow(observation), within(env.single_action_space)
    envs, t = len(now), 0
    observations, last = np.zeros((limit, *now.shape), now.dtype), np.zeros_like(now)
    rewards, mask, actions = np.zeros((limit, envs), np.float32), np.zeros((limit, envs), np.float32), None
    alive, truncated = np.ones(envs, bool), np.ones(envs, bool)
    while alive.any() and t < limit:
        action = act(now, t)
        if actions is None:
            actions = np.zeros((limit, *action.shape), action.dtype)
        observations[t, alive], actions[t, alive], mask[t, alive] = now[alive], action[alive], 1
        observation, reward, terminated, cut, info = env.step(clip(action))
        rewards[t, alive] = reward[alive]
        ended = alive & (terminated | cut)
        last[alive] = _narrow(final_observations(observation, info))[alive]
        truncated[ended], alive = ~terminated[ended], alive & ~ended
        now, t = _narrow(observation), t + 1
    return Batch(observations, actions, rewards, mask, mask.sum(axis=0).astype(int), last, truncated)
