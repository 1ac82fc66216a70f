"""A training loop that `kill -9` cannot hurt: all that the next step depends on, saved together and found again.

    resume = Resume(run, "agent", model, seed=cfg.seed, envs=envs, replay=replay, episodes=episodes,
                    generators={"acting": rng}, target=target)
    obs = resume.begin()
    while resume.step < cfg.steps:
        ...                                                    # as many steps as shall be between two checkpoints
        resume.save(step, obs, {"return": mean}, curve=array)

Of most environments the state itself is kept (CartPole and the other classic ones, FrozenLake and Taxi, MuJoCo, and
any with `positions` and `go_back`), and the run ends with the very numbers of an unbroken one.  ale_py's vector
environment does not give its state away: there the games under way are lost, new ones begin, and the replay buffer is
told so (`continued` is false).
"""

import contextlib
import json

import gymnasium
import numpy as np

from course.core import InputError, files


class Resume:
    """Saves and restores a loop's networks and optimizers, replay buffer, generators, environments and counts.

    `run`: what `core.run` gave; `name`: of this loop in it.  `model` may be None; `objects` are further things with
    `.variables`.  `envs`: of `models.rl.envs.vector`; `replay`: has save(path), load(path) and cut(); `episodes`: an
    `envs.Episodes`; `generators`: name -> `numpy.random.Generator`.  Where an interrupted run left a checkpoint, all of
    these are as it left them once this object is there: `step` says how many steps were done, `history` has the logs
    {name: list} and `arrays` the arrays of its saves.
    """

    def __init__(self, run, name, model, *, seed, envs=None, replay=None, episodes=None, generators=None, **objects):
        self.checkpoint = run.checkpoint(model, name, **objects)
        self.envs, self.replay, self.episodes, self.generators = envs, replay, episodes, generators or {}
        self.seed, self.continued = seed, False
        held = self.checkpoint.arrays
        self.arrays = {key.removeprefix("own/"): held[key] for key in held if key.startswith("own/")}
        self.step = int(held.get("step", 0))
        if self.step:
            self._restore(held)
        files.sweep(self.checkpoint.path.parent)  # a kill while the buffer was written leaves most of it behind
        self._sweep(keep=self._replay_path() if self.step else None)

    @property
    def history(self):
        """name -> list, one number a save, those before a restart too."""
        return self.checkpoint.history

    def begin(self):
        """The observations [N, ...] to go on from (None without `envs`)."""
        if self.envs is None:
            return None
        if self.continued:
            return self.obs
        return self.envs.reset(seed=(self.seed, self.step))[0]

    def save(self, step, obs=None, logs=None, *, last=False, **arrays):
        """After `step` steps in all: `obs`, what acts next; `logs`, numbers for the history; `arrays` to be kept.

        The replay buffer is a file of its own, which is there before the state that needs it and goes after it; after
        the `last` step none is written, for there is nothing left to learn from it.
        """
        held = {f"own/{key}": np.asarray(value) for key, value in arrays.items()}
        held |= {"step": np.int64(step), "last": np.bool_(last)}
        state = {f"generator/{name}": rng.bit_generator.state for name, rng in self.generators.items()}
        found = positions(self.envs) if self.envs is not None and obs is not None else None
        if found:
            own, state["environments"] = found
            held |= {f"environments/{key}": value for key, value in own.items()} | {"obs": np.asarray(obs)}
        if self.episodes and found:
            held |= {f"episodes/{key}": value for key, value in self.episodes.state().items()}
        self.step = step
        if self.replay is not None and not last:
            with files.atomic_path(self._replay_path()) as temporary:
                self.replay.save(temporary)
        self.checkpoint.save(self.checkpoint.epoch, logs or {}, held | {"state": np.array(json.dumps(state))})
        self._sweep(keep=None if last else self._replay_path())

    def _restore(self, held):
        def part(name):
            return {key.removeprefix(name): held[key] for key in held if key.startswith(name)}

        state = json.loads(str(held["state"]))
        for name, rng in self.generators.items():
            rng.bit_generator.state = state[f"generator/{name}"]
        if self.replay is not None and not held.get("last"):
            if not self._replay_path().exists():
                raise InputError(f"the replay buffer {self._replay_path()} is gone: run again with --fresh")
            self.replay.load(self._replay_path())
        self.continued = self.envs is not None and "environments" in state
        if self.continued:
            go_back(self.envs, part("environments/"), state["environments"])
            self.obs = held["obs"]
            if self.episodes:
                self.episodes.load(part("episodes/"))
        elif self.replay is not None and self.envs is not None:
            self.replay.cut()

    def _replay_path(self):
        return self.checkpoint.path.with_name(f"replay-{self.step}.npz")

    def _sweep(self, keep):
        for path in self.checkpoint.path.parent.glob("replay-*.npz"):
            if path != keep:
                path.unlink()


# --- the state of environments ---------------------------------------------------------------------------------------

FIELDS = ("state", "s", "lastaction", "steps_beyond_terminated", "last_u")  # of Gymnasium's classic control, toy text


def positions(envs):
    """All that the next steps of a vector environment depend on: (dict of arrays, JSON), or None where it tells not."""
    if hasattr(envs, "positions"):
        return envs.positions()
    if not isinstance(envs, gymnasium.vector.SyncVectorEnv):
        return None
    arrays, generators = {}, []
    for i, env in enumerate(envs.envs):
        inner = env.unwrapped
        if hasattr(inner, "data") and hasattr(inner, "model"):
            arrays[f"{i}/mujoco"] = _mujoco(inner)
        elif type(inner).__module__.startswith(("gymnasium.envs.classic_control.", "gymnasium.envs.toy_text.")):
            held = {name: getattr(inner, name) for name in FIELDS if getattr(inner, name, None) is not None}
            arrays |= {f"{i}/{name}": np.asarray(value) for name, value in held.items()}
        else:
            return None
        arrays[f"{i}/elapsed"] = np.int64(getattr(_time_limit(env), "_elapsed_steps", 0) or 0)
        generators.append(inner.np_random.bit_generator.state)
    return arrays, generators


def go_back(envs, arrays, generators):
    """Put `envs`, made and reset like those that gave them, where `positions` said."""
    if hasattr(envs, "go_back"):
        envs.go_back(arrays, generators)
        return
    for i, (env, generator) in enumerate(zip(envs.envs, generators, strict=True)):
        inner = env.unwrapped
        for name in FIELDS:
            if (value := arrays.get(f"{i}/{name}")) is not None:
                setattr(inner, name, value if value.ndim else value.item())
        if f"{i}/mujoco" in arrays:
            _mujoco(inner, arrays[f"{i}/mujoco"])
        with contextlib.suppress(AttributeError):
            _time_limit(env)._elapsed_steps = int(arrays[f"{i}/elapsed"])
        inner.np_random.bit_generator.state = generator


def _time_limit(env):
    """The wrapper that truncates episodes, or None."""
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, gymnasium.wrappers.TimeLimit):
            return env
        env = env.env
    return None


def _mujoco(env, state=None):
    """Read the simulation's state, solver's warm start included, or set it."""
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    if state is None:
        state = np.empty(mujoco.mj_stateSize(env.model, kind))
        mujoco.mj_getState(env.model, env.data, state, kind)
        return state
    return mujoco.mj_setState(env.model, env.data, state, kind)
