"""DQN's preprocessing of Atari games, wrapper by wrapper, around one environment.

`models.rl.envs.vector` does the same in C++ for many games at once, and is what trains; here every step of it can be
read, tried and left out.  The two give the same pixels, rewards and ends of episodes (a test plays both).  Sources:
Mnih et al. 2015, "Human-level control through deep reinforcement learning", Methods; Machado et al. 2018, "Revisiting
the Arcade Learning Environment", arXiv:1709.06009.
"""

import cv2
import gymnasium
import numpy as np

from course.core.errors import InputError
from models.rl import envs

HUMAN = {  # score of random play and of a human tester: Mnih et al. 2015, Extended Data Table 2
    "ALE/Pong-v5": (-20.7, 9.3), "ALE/Breakout-v5": (1.7, 31.8), "ALE/Freeway-v5": (0.0, 29.6),
    "ALE/BeamRider-v5": (363.9, 5775.0), "ALE/SpaceInvaders-v5": (148.0, 1652.0), "ALE/Seaquest-v5": (68.4, 20182.0),
}  # fmt: skip


def human_share(name, score):
    """The human-normalised score: how far `score` is on the way from random play, 0, to a human tester, 1."""
    least, human = HUMAN[name]
    return (score - least) / (human - least)


def scores(name, judged, chance):
    """Metrics in the game `name` of a policy, `judged` as `evaluate.evaluate` does, beside random actions, `chance`.

    The policy's mean score and its interval, the human-normalised score in per cent where that is known, chance's.
    """
    human = {"human_normalised": 100 * human_share(name, judged["mean"])} if name in HUMAN else {}
    low, high = judged["interval"]
    return {"score": judged["mean"], **human, "score_at_random": chance["mean"], "score_low": low, "score_high": high}


def require(flag, name):
    """Raise `InputError`, in the name of the command line's `flag`, unless `name` is one of the ALE's games."""
    if not name.startswith("ALE/"):
        raise InputError(f"{flag} {name}: choose an Atari game, such as ALE/Pong-v5")
    envs.specification(name)


def make(name, *, stack=4, noop_max=30, frameskip=4, episodic_life=True, reward_clipping=True, fire_reset=True,
         sticky=0.0, frames=108_000, render_mode=None):  # fmt: skip
    """One ALE game with all the wrappers; observations uint8 [stack, 84, 84].  Arguments as `envs.atari_games`."""
    envs.specification(name)
    env = gymnasium.make(
        name, obs_type="grayscale", frameskip=1, repeat_action_probability=sticky, max_num_frames_per_episode=frames,
        render_mode=render_mode, disable_env_checker=True,
    )  # fmt: skip
    env = NoopReset(env, noop_max - 1)
    env = FireReset(env) if fire_reset and "FIRE" in env.unwrapped.get_action_meanings() else env
    env = MaxAndSkip(env, frameskip)
    env = EpisodicLife(env) if episodic_life else env
    env = Warp84(env)
    env = ClipReward(env) if reward_clipping else env
    return FrameStack(env, stack)


class NoopReset(gymnasium.Wrapper):
    """Wait for a random number of frames, 0 to `most`, when a game starts: else every game would start alike."""

    def __init__(self, env, most=29):
        super().__init__(env)
        self.most = most

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        for _ in range(self.unwrapped.np_random.integers(self.most, endpoint=True)):
            obs, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                obs, info = self.env.reset(options=options)
        return obs, info


class FireReset(gymnasium.Wrapper):
    """Press FIRE once when a game starts: some (Breakout) wait for it, and an untrained agent may never do so."""

    def __init__(self, env):
        super().__init__(env)
        self.fire = env.unwrapped.get_action_meanings().index("FIRE")

    def reset(self, *, seed=None, options=None):
        self.env.reset(seed=seed, options=options)
        obs, _, terminated, truncated, info = self.env.step(self.fire)
        return self.env.reset(options=options) if terminated or truncated else (obs, info)


class MaxAndSkip(gymnasium.Wrapper):
    """Hold each action for `skip` frames, sum their rewards, and show the maximum of the last two frames.

    The maximum, because the console drew some objects on every other frame only; an agent that acts on every fourth
    frame plays four times as many games in the same time.
    """

    def __init__(self, env, skip=4):
        super().__init__(env)
        self.skip = skip

    def step(self, action):
        total, before, obs = 0.0, None, None
        for _ in range(self.skip):
            before = obs
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return (obs if before is None else np.maximum(before, obs)), total, terminated, truncated, info


class EpisodicLife(gymnasium.Wrapper):
    """A lost life ends the episode, so that its value is that of what comes before; only a lost game is restarted.

    After a lost life `reset` goes on from the frame that showed it.
    """

    def reset(self, *, seed=None, options=None):
        if seed is not None or getattr(self, "game_over", True):
            self.obs, self.info = self.env.reset(seed=seed, options=options)
            self.game_over, self.lives = False, self.info["lives"]
        return self.obs, self.info

    def step(self, action):
        self.obs, reward, terminated, truncated, self.info = self.env.step(action)
        self.game_over = terminated or truncated
        lost, self.lives = self.info["lives"] < self.lives, self.info["lives"]
        return self.obs, reward, terminated or lost, truncated, self.info


class Warp84(gymnasium.ObservationWrapper):
    """Grey frames [210, 160] -> [84, 84], each pixel the mean of the area that it covers."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Box(0, 255, (84, 84), np.uint8)

    def observation(self, frame):
        return cv2.resize(frame, (84, 84), interpolation=cv2.INTER_AREA)


class ClipReward(gymnasium.RewardWrapper):
    """Rewards to -1..1, so that one learning rate suits all games; 10 points are then worth no more than one."""

    def reward(self, reward):
        return float(np.clip(reward, -1, 1))


class FrameStack(gymnasium.Wrapper):
    """The last `count` frames as one observation [count, H, W], the oldest first: one frame shows no motion.

    An episode starts with `count` times its first frame.
    """

    def __init__(self, env, count=4):
        super().__init__(env)
        shape = (count, *env.observation_space.shape)
        self.observation_space = gymnasium.spaces.Box(0, 255, shape, env.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        frame, info = self.env.reset(seed=seed, options=options)
        self.frames = np.broadcast_to(frame, self.observation_space.shape)
        return self.frames, info

    def step(self, action):
        frame, reward, terminated, truncated, info = self.env.step(action)
        self.frames = np.concatenate([self.frames[1:], frame[None]])
        return self.frames, reward, terminated, truncated, info
