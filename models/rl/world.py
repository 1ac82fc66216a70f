"""WorldNavigate: a grid world seen as pixels, small enough that the best any policy can do is known exactly.

An agent walks a square of cells among obstacles, which stand still for an episode, and goals.  Reaching a goal pays +1,
and it appears again at a free cell drawn at random; running into an obstacle costs 1 and moves nothing, as the edge
does, which costs nothing.  After 50 steps the episode is cut off (truncated, not terminated: the world goes on).

`import models.rl.world` registers "WorldNavigate-v0" with Gymnasium; `vector` has many of them in NumPy at once, an
order of magnitude faster than one after the other.  `best_returns` is the bound: the expected return of the best
policy, by dynamic programming over the agent's cell, the goals' cells and the steps left.
"""

import functools

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from course.core.errors import InputError

STEPS = 50  # of an episode
FLOOR, OBSTACLE, GOAL, AGENT = range(4)
COLOURS = np.array([(24, 26, 32), (176, 58, 46), (60, 190, 90), (70, 130, 245)], np.uint8)
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # up, right, down, left
PARTS = ("train", "held_out", "all")
HELD_OUT = 5  # one of so many arrangements of the obstacles is kept for the evaluation


# --- the rules, for any number of worlds at once ---------------------------------------------------------------------


class Worlds:
    """`count` worlds and what happens in them; cells are numbered row by row.

    agent [N]; goals [N, G]; obstacles [N, O]: cells.  `part` of all arrangements of obstacles: "train", "held_out"
    (which no training sees) or "all".  `idle`: further actions that do nothing.
    Raises `InputError` where a world has no room for what stands in it.
    """

    def __init__(self, count, rng, *, size=5, obstacles=3, goals=3, part="all", idle=0):
        if part not in PARTS:
            raise InputError(f"part {part} of the worlds is not known: choose one of {', '.join(PARTS)}")
        if size < 2 or min(goals - 1, obstacles, idle) < 0 or size * size - obstacles < goals + 2:
            raise InputError(f"a world of {size} x {size} has no room for {obstacles} obstacles and {goals} goals")
        self.rng, self.size, self.arrangements = rng, size, arrangements(size, obstacles, part)
        self.actions = len(MOVES) + idle
        self.agent = np.zeros(count, np.int64)
        self.goals = np.zeros((count, goals), np.int64)
        self.obstacles = np.zeros((count, obstacles), np.int64)
        self.begin(np.arange(count))

    def begin(self, rows):
        """New worlds in `rows`."""
        chosen = self.rng.integers(len(self.arrangements), size=len(rows))
        self.obstacles[rows] = self.arrangements[chosen]
        order = self.rng.random((len(rows), self.size**2))
        np.put_along_axis(order, self.obstacles[rows], 2.0, axis=1)  # last, after every free cell
        cells = order.argsort(axis=1)
        self.agent[rows], self.goals[rows] = cells[:, 0], cells[:, 1 : 1 + self.goals.shape[1]]

    def move(self, actions):
        """One step of every world -> rewards [N] float32; `actions` [N]: up, right, down, left, and from 4 on idle."""
        rows = np.arange(len(self.agent))
        to = np.where(actions < len(MOVES), neighbours(self.size)[self.agent, actions % len(MOVES)], self.agent)
        hit = (self.obstacles == to[:, None]).any(axis=1)
        self.agent = np.where(hit, self.agent, to)
        reached = self.goals == self.agent[:, None]
        ended = rows[reached.any(axis=1)]
        if len(ended):
            order = self.rng.random((len(ended), self.size**2))
            for taken in (self.obstacles[ended], self.goals[ended], self.agent[ended, None]):
                np.put_along_axis(order, taken, 2.0, axis=1)
            self.goals[ended, reached[ended].argmax(axis=1)] = order.argmin(axis=1)
        reward = np.where(hit, -1.0, 0.0)
        reward[ended] = 1.0
        return reward.astype(np.float32)

    def pixels(self, cell=4):
        """Pictures uint8 [N, size * cell, size * cell, 3]."""
        kinds = np.full((len(self.agent), self.size**2), FLOOR)
        np.put_along_axis(kinds, self.obstacles, OBSTACLE, axis=1)
        np.put_along_axis(kinds, self.goals, GOAL, axis=1)
        np.put_along_axis(kinds, self.agent[:, None], AGENT, axis=1)
        tiles = sprites(cell)[kinds].reshape(-1, self.size, self.size, cell, cell, 3)
        return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, self.size * cell, self.size * cell, 3)


@functools.cache
def neighbours(size):
    """The cell that each action leads to, [cells, 4]; over the edge: the same cell."""
    row, column = np.divmod(np.arange(size**2), size)
    to = [(np.clip(row + i, 0, size - 1), np.clip(column + j, 0, size - 1)) for i, j in MOVES]
    return np.stack([r * size + c for r, c in to], axis=1)


@functools.cache
def arrangements(size, obstacles, part="all"):
    """All sets of `obstacles` cells that leave the others connected, [M, obstacles]; or the part asked for of them."""
    sets = np.array([[]], np.int64)
    for _ in range(obstacles):  # one larger cell more
        last = sets[:, -1] if sets.shape[1] else np.full(len(sets), -1)
        sets = np.concatenate([np.append(sets[last < cell], np.full(((last < cell).sum(), 1), cell), axis=1)
                               for cell in range(size**2)])  # fmt: skip
    free = np.ones((len(sets), size**2), bool)
    np.put_along_axis(free, sets, False, axis=1)
    reached = np.zeros_like(free)
    reached[np.arange(len(sets)), free.argmax(axis=1)] = True
    for _ in range(size**2):  # flood from the first free cell, a step at a time
        reached = (reached | reached[:, neighbours(size)].any(axis=2)) & free
    sets = sets[(reached == free).all(axis=1)]
    if part == "all":
        return sets
    order = np.random.default_rng(0).permutation(len(sets))
    held_out = order % HELD_OUT == 0
    chosen = sets[held_out if part == "held_out" else ~held_out]
    if not len(chosen):
        raise InputError(f"{size} x {size} cells with {obstacles} obstacles have too few arrangements for two parts")
    return chosen


@functools.cache
def sprites(cell):
    """How the four kinds of cell look, uint8 [4, cell, cell, 3]: obstacles fill theirs, the others leave a margin."""
    tiles = np.broadcast_to(COLOURS[FLOOR], (4, cell, cell, 3)).copy()
    tiles[OBSTACLE] = COLOURS[OBSTACLE]
    y, x = np.indices((cell, cell)) - (cell - 1) / 2
    tiles[GOAL][np.abs(y) + np.abs(x) <= cell / 2] = COLOURS[GOAL]
    tiles[AGENT][np.maximum(np.abs(y), np.abs(x)) <= cell / 2 - cell / 8] = COLOURS[AGENT]
    return tiles


# --- as Gymnasium has it ---------------------------------------------------------------------------------------------


def spaces(worlds, cell):
    """Observations uint8 [size * cell, size * cell, 3], and the actions."""
    shape = (worlds.size * cell, worlds.size * cell, 3)
    return gymnasium.spaces.Box(0, 255, shape, np.uint8), gymnasium.spaces.Discrete(worlds.actions)


class WorldNavigate(gymnasium.Env):
    """One world.  `gymnasium.make` adds the limit of 50 steps; `render` gives the same picture, larger."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}  # noqa: RUF012 - Gymnasium's way

    def __init__(self, render_mode=None, cell=4, **rules):
        self.render_mode, self.cell, self.rules = render_mode, cell, rules
        self.worlds = Worlds(1, self.np_random, **rules)
        self.observation_space, self.action_space = spaces(self.worlds, cell)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.worlds.rng = self.np_random
        self.worlds.begin(np.zeros(1, np.int64))
        return self.worlds.pixels(self.cell)[0], {}

    def step(self, action):
        reward = float(self.worlds.move(np.array([action]))[0])
        return self.worlds.pixels(self.cell)[0], reward, False, False, {}

    def render(self):
        return self.worlds.pixels(8 * self.cell)[0]


gymnasium.register("WorldNavigate-v0", entry_point=f"{__name__}:WorldNavigate", max_episode_steps=STEPS)


class WorldNavigateVector(VectorEnv):
    """`count` worlds in NumPy, with a limit of `steps` (None: none) and the conventions of `models.rl.envs.vector`."""

    def __init__(self, count, seed, *, steps=STEPS, cell=4, **rules):
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.num_envs, self.steps, self.cell, self.age = count, steps, cell, 0
        self.worlds = Worlds(count, np.random.default_rng(seed), **rules)
        self.single_observation_space, self.single_action_space = spaces(self.worlds, cell)
        self.observation_space = batch_space(self.single_observation_space, count)
        self.action_space = batch_space(self.single_action_space, count)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.worlds.rng = np.random.default_rng(seed)
        self.worlds.begin(np.arange(self.num_envs))
        self.age = 0
        return self.worlds.pixels(self.cell), {}

    def step(self, actions):
        reward = self.worlds.move(np.asarray(actions))
        obs, info, self.age = self.worlds.pixels(self.cell), {}, self.age + 1
        truncated = np.full(self.num_envs, self.age == self.steps)
        if self.age == self.steps:
            info = {"final_obs": obs, "_final_obs": truncated}
            obs, _ = self.reset()
        return obs, reward, np.zeros(self.num_envs, bool), truncated, info

    def positions(self):
        """All that the next steps depend on: dict of arrays, and the generator's state."""
        worlds = self.worlds
        arrays = {"agent": worlds.agent, "goals": worlds.goals, "obstacles": worlds.obstacles, "age": self.age}
        return {name: np.array(value) for name, value in arrays.items()}, worlds.rng.bit_generator.state

    def go_back(self, arrays, generator):
        """Continue from `positions()`; returns the observations."""
        self.worlds.agent, self.worlds.goals = arrays["agent"].copy(), arrays["goals"].copy()
        self.worlds.obstacles, self.age = arrays["obstacles"].copy(), int(arrays["age"])
        self.worlds.rng.bit_generator.state = generator
        return self.worlds.pixels(self.cell)


def vector(count, seed, **rules):
    """`count` worlds side by side; `rules`: those of `Worlds` (size, obstacles, ...), and cell, its pixels a side, and
    steps, after which an episode is cut off (None: never)."""
    return WorldNavigateVector(count, seed, **rules)


# --- the bound -------------------------------------------------------------------------------------------------------


def best_values(size, obstacles, goals, steps=STEPS):
    """The largest expected return for all states of one arrangement, by steps left: a list of `steps` + 1 arrays.

    obstacles: cells.  An array is [F, F, ..., F], indexed by the place among the F free cells (in rising order) of the
    agent and of each of the `goals`; entries in which two of them share a cell mean nothing (0).

    Bellman's equation backwards from 0 steps left.  V(a, g): the agent at a, goals at g.  Arriving at a is worth
    W(a, g) = V(a, g), or, where a goal stands there, 1 plus the mean of V over the free cells where it may appear next;
    V of one step more is the largest W over the cells that the actions lead to (running into obstacles: V - 1).
    """
    free = np.setdiff1d(np.arange(size**2), obstacles)
    count, places = len(free), np.full(size**2, -1)
    places[free] = np.arange(count)
    to = places[neighbours(size)[free]]  # [F, 4]; -1: an obstacle
    axes = np.indices((count,) * (goals + 1), sparse=True)
    apart = np.ones((count,) * (goals + 1), bool)
    for i in range(goals + 1):
        for j in range(i):
            apart &= axes[i] != axes[j]
    at = np.arange(count)
    values = [np.zeros(apart.shape, np.float32)]
    for _ in range(steps):
        value = values[-1]
        reborn = 1 + value.sum(axis=1) / (count - goals)  # [F, F, ...]: agent, the other goals; all goals are alike
        arrival = value.copy()
        for goal in range(goals):
            np.moveaxis(arrival, 1 + goal, 1)[at, at] = reborn
        ways = (np.where((way >= 0).reshape(-1, *[1] * goals), arrival[way], value - 1) for way in to.T)
        values.append(functools.reduce(np.maximum, ways) * apart)
    return values


def best_returns(worlds, steps=STEPS):
    """The largest expected return [N] that any policy has from where `worlds` (of `Worlds`) stand, `steps` to go.

    Idle actions do not change it: whoever waits might as well have taken the step already.
    """
    found = np.zeros(len(worlds.agent))
    sets, which = np.unique(np.sort(worlds.obstacles, axis=1), axis=0, return_inverse=True)
    for i, obstacles in enumerate(sets):
        value = best_values(worlds.size, obstacles, worlds.goals.shape[1], steps)[-1]
        free = np.setdiff1d(np.arange(worlds.size**2), obstacles)
        rows = np.flatnonzero(which.ravel() == i)
        states = np.concatenate([worlds.agent[rows, None], worlds.goals[rows]], axis=1)
        found[rows] = value[tuple(np.searchsorted(free, states).T)]
    return found
