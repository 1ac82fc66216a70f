"""Many copies of an environment, stepped together, that begin their next episode in the very step that ends one.

All of them behave alike.  `step` returns `obs, reward [N], terminated [N], truncated [N], info`.  Where an episode has
ended (`terminated | truncated`) `obs` is already the first observation of the next one, and the last of the old, from
which a truncated episode's value has to be estimated, is in `info["final_obs"]`: take `final_observations(obs, info)`.
"""

import contextlib
import warnings

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorWrapper

from course.core import InputError

SEEDS = 2**31 - 1  # ALE takes seeds of 1..2**31 - 1 and passes over 0


def vector(name, count, seed, *, autoreset="same_step", **kwargs):
    """`count` environments called `name`, as one `gymnasium.vector.VectorEnv`, seeded and reset.

    `reset()` without a seed then goes on from `seed`, and with one (an int, or a tuple of ints) starts over from that:
    the same seed gives the same episodes, and two seeds share none (numbers in a row, Gymnasium's own way, would give
    environment 1 of seed 0 the episodes of environment 0 of seed 1).

    ALE games ("ALE/Pong-v5") come from ale_py's own vector environment with DQN's preprocessing: observations uint8
    [N, 4, 84, 84], oldest frame first; see `atari_games` for its arguments.  CartPole is computed for all copies in one
    NumPy expression, any other environment in a loop, `kwargs` being what `gymnasium.make` takes.  `autoreset`:
    "same_step", or another of Gymnasium's modes, with Gymnasium's own classes and infos.
    Raises `InputError` where there is no such environment.
    """
    if count < 1:
        raise InputError(f"{count} environments of {name} were asked for: give at least 1")
    modes = {mode.name.lower(): mode for mode in AutoresetMode}
    if autoreset not in modes:
        raise InputError(f"autoreset {autoreset} is not known: choose one of {', '.join(modes)}")
    if name.startswith("ALE/"):
        envs = atari_games(name, count, autoreset=modes[autoreset], **kwargs)
        envs.reset(seed=seed if isinstance(envs, Lives) else np.array(seeds(seed, count)))
        return envs
    found = specification(name)
    if autoreset != "same_step":
        envs = SyncVectorEnv([lambda: gymnasium.make(name, **kwargs)] * count, autoreset_mode=modes[autoreset])
        seed = seeds(seed, count)
    elif found.vector_entry_point == CART_POLE and set(kwargs) <= {"max_episode_steps"}:
        envs = CartPoles(count, **{"max_episode_steps": found.max_episode_steps} | kwargs)
    else:
        envs = SameStep([lambda: gymnasium.make(name, **kwargs)] * count, autoreset_mode=modes[autoreset])
    envs.reset(seed=seed)
    return envs


def seeds(seed, count):
    """`count` numbers of 1..2**31 - 1, well apart for every `seed` (an int, or a tuple of ints)."""
    return [1 + int(word) % SEEDS for word in np.random.SeedSequence(seed).generate_state(count, np.uint64)]


def specification(name):
    """Gymnasium's specification of an environment; `InputError` where it has none of that name."""
    if name.startswith("ALE/"):
        import ale_py

        gymnasium.register_envs(ale_py)
    try:
        found = gymnasium.spec(name)
    except gymnasium.error.Error as error:
        raise InputError(f"there is no environment {name}: {' '.join(str(error).split())}") from error
    if "mujoco" in str(found.entry_point):
        import mujoco

        mujoco.set_mju_user_warning(_warn)  # else each goes to a file in the working folder
    return found


def _warn(text):
    """MuJoCo's warnings as Python's; not the one about how Gymnasium's own models are written."""
    if "settotalmass" not in text:
        warnings.warn(f"MuJoCo: {text}", stacklevel=2)


def final_observations(obs, info):
    """The observations that the step led to, [N, ...]: `obs`, but of ended episodes the last one, not the next's first.

    The values of these are what truncated episodes are bootstrapped with.
    """
    return info.get("final_obs", obs)


# --- episodes --------------------------------------------------------------------------------------------------------


class Episodes:
    """Returns and lengths of the episodes of `count` environments, as they end."""

    def __init__(self, count):
        self.returns, self.lengths = np.zeros(count), np.zeros(count, np.int64)

    def add(self, reward, done):
        """Count a step: `reward` [N], `done` [N] -> list of the (return, length) of the episodes that it ended."""
        self.returns += reward
        self.lengths += 1
        ended = np.flatnonzero(done)
        finished = [(float(self.returns[i]), int(self.lengths[i])) for i in ended]
        self.returns[ended], self.lengths[ended] = 0, 0
        return finished

    def state(self):
        """What `load` takes: a dict of arrays."""
        return {"returns": self.returns.copy(), "lengths": self.lengths.copy()}

    def load(self, state):
        """Go on from `state`."""
        self.returns, self.lengths = state["returns"].copy(), state["lengths"].copy()


# --- CartPole, all at once -------------------------------------------------------------------------------------------

CART_POLE = "gymnasium.envs.classic_control.cartpole:CartPoleVectorEnv"


class CartPoles(CartPoleVectorEnv):
    """Gymnasium's vectorised CartPole, which spends a step on each reset, made to reset within the step."""

    def __init__(self, count, max_episode_steps):
        super().__init__(count, max_episode_steps)
        self.metadata = self.metadata | {"autoreset_mode": AutoresetMode.SAME_STEP}

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=None if seed is None else seeds(seed, 1)[0], options=options)

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(np.asarray(action, np.int64))
        done = self.prev_done
        if done.any():
            info = {"final_obs": obs.copy(), "_final_obs": done.copy()}
            self.state[:, done] = self.np_random.uniform(self.low, self.high, (4, done.sum()))
            self.steps[done] = 0
            obs[done] = self.state[:, done].T
            self.prev_done = np.zeros_like(done)
        return obs, reward, terminated, truncated, info

    def positions(self):
        """All that the next steps depend on: dict of arrays, and the generator's state."""
        return {"state": self.state.copy(), "steps": self.steps.copy()}, self.np_random.bit_generator.state

    def go_back(self, arrays, generator):
        """Continue from `positions()`; returns the observations [N, 4]."""
        self.state, self.steps = arrays["state"].copy(), arrays["steps"].copy()
        self.prev_done = np.zeros(self.num_envs, bool)
        self.np_random.bit_generator.state = generator
        return self.state.T.astype(np.float32)


# --- any environment, one after the other ----------------------------------------------------------------------------


class SameStep(SyncVectorEnv):
    """Gymnasium's loop over copies without its bookkeeping of infos, which costs more than a small environment.

    `info` has `final_obs` [N, ...] (as `final_observations` returns them), `_final_obs` [N] (which have ended) and
    `final_info` (of those, a list [N] of dict or None); and nothing in a step that ends no episode.
    """

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=None if seed is None else seeds(seed, self.num_envs), options=options)

    def step(self, actions):
        if not isinstance(self._observations, np.ndarray):
            raise InputError(f"{self.spec.id if self.spec else 'this environment'} observes more than one array")
        obs, info = np.empty_like(self._observations), {}
        for i, (env, action) in enumerate(zip(self.envs, actions, strict=True)):
            obs[i], self._rewards[i], self._terminations[i], self._truncations[i], last = env.step(action)
            if self._terminations[i] or self._truncations[i]:
                info.setdefault("final_info", [None] * self.num_envs)[i] = last
        done = self._terminations | self._truncations
        if info:
            info |= {"final_obs": obs.copy(), "_final_obs": done}
            for i in np.flatnonzero(done):
                obs[i], _ = self.envs[i].reset()
        return obs, self._rewards.copy(), self._terminations.copy(), self._truncations.copy(), info


# --- Atari -----------------------------------------------------------------------------------------------------------


def atari_games(name, count, *, autoreset=AutoresetMode.SAME_STEP, stack=4, noop_max=30, frameskip=4, threads=0,
                episodic_life=True, reward_clipping=True, fire_reset=True, sticky=0.0, frames=108_000):  # fmt: skip
    """ALE games in C++ threads, preprocessed as in Mnih et al. 2015 (Methods): uint8 [N, stack, 84, 84].

    Fewer than `noop_max` no-ops at a game's start, then FIRE where the game has it; an action held for `frameskip`
    frames, the maximum of the last two, grey, 84 x 84; games cut at `frames` (half an hour).  For training a lost life
    ends an episode (`episodic_life`) though the game goes on, and rewards are clipped to -1..1; evaluate without both.
    `sticky`: probability that the last action is repeated (0.25 in Machado et al. 2018).  `threads`: 0 for one a core.
    """
    from ale_py.vector_env import AtariVectorEnv

    envs = AtariVectorEnv(
        rom(name), count, num_threads=threads, autoreset_mode=autoreset, stack_num=stack, noop_max=noop_max,
        frameskip=frameskip, reward_clipping=reward_clipping, use_fire_reset=fire_reset,
        repeat_action_probability=sticky, max_num_frames_per_episode=frames, life_loss_info=episodic_life,
    )  # fmt: skip
    return Lives(envs) if autoreset == AutoresetMode.SAME_STEP else envs


def rom(name):
    """The name of the ROM of a Gymnasium name: "ALE/MsPacman-v5" -> "ms_pacman"."""
    return specification(name).kwargs["game"]


class Lives(VectorWrapper):
    """ALE's vector environment with the infos of this module, and episodes that start with a stack of one frame.

    ale_py's own `episodic_life` restarts the game at a lost life, so that all lives but the first stay unseen; its
    `life_loss_info` says that a life was lost and plays on, which is what DQN's preprocessing means.  But then frames
    of the lost life are still in the stack, as black ones are at the start of a game: here an episode starts with the
    stack full of its first frame.
    """

    def reset(self, *, seed=None, options=None):
        spread = None if seed is None else np.array(seeds(seed, self.num_envs))
        obs, info = super().reset(seed=spread, options=options)
        self.began = info["frame_number"] - info["episode_frame_number"]  # changes where a game starts, and only there
        self.age = np.ones(self.num_envs, np.int64)  # frames of this episode
        return np.repeat(obs[:, -1:], obs.shape[1], axis=1), info

    def step(self, actions):
        obs, reward, terminated, truncated, info = super().step(np.asarray(actions, np.int64))
        began, done, stack = info["frame_number"] - info["episode_frame_number"], terminated | truncated, obs.shape[1]
        restarted, self.began, kept = began != self.began, began, {"lives": info["lives"]}
        final = obs.copy() if done.any() else obs  # what the step led to: where the game is over, ale_py has put it by
        if restarted.any():
            final[restarted] = info["final_obs"][restarted]
        self.age += 1
        for i in np.flatnonzero(self.age < stack):
            final[i, : stack - self.age[i]] = final[i, stack - self.age[i]]
        if done.any():
            kept |= {"final_obs": final, "_final_obs": done}
            self.age[done], first, obs = 1, obs[done, -1:], final.copy()
            obs[done] = first
        else:
            obs = final
        return obs, reward.astype(np.float64), terminated, truncated, kept


@contextlib.contextmanager
def opened(*args, **kwargs):
    """`vector(...)`, closed at the end of the block."""
    envs = vector(*args, **kwargs)
    try:
        yield envs
    finally:
        envs.close()
