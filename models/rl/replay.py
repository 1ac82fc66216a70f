"""A replay buffer that keeps every frame once, for any number of environments side by side.

An observation of Atari is a stack of four frames, and the next observation shares three of them: stored as they come,
a transition would take eight frames, and here it takes one.  Each environment has a ring of *slots*.  An episode of T
steps stands in it as

    context (stack - 1 frames), o_0, o_1, ..., o_{T-1}, o_T

one frame a slot.  The slots o_0 ... o_{T-1} are *live*: a transition begins there, with its action and reward.  The
others are only looked at.  So the frames of a stack stand side by side, never those of two episodes; the observation
after k steps is k slots on; and o_T is there to bootstrap from where an episode was cut short.
"""

import json

import numpy as np

from course.core.errors import InputError

SMALLEST = 1e-6  # added to each absolute error, so that no transition is forgotten for good


class Replay:
    """Ring buffer over `envs` environments; uniform or prioritised; 1-step or n-step.

    capacity: slots of all environments together (a transition takes one, an episode `stack` more).
    shape, dtype: of one frame; with `stack` > 1 an observation is [stack, *shape], the newest frame last.
    n_step, gamma: a sample's reward is the discounted sum of up to n rewards, r_t + gamma r_{t+1} + ...
    prioritised: None for uniform, else the exponent alpha of Schaul et al. 2016, "Prioritized experience replay".
    """

    def __init__(
        self, capacity, shape, envs=1, dtype=np.uint8, stack=1, n_step=1, gamma=0.99, prioritised=None, seed=0
    ):
        self.length = capacity // envs
        if self.length < 2 * (stack + n_step):
            least = 2 * (stack + n_step) * envs
            raise InputError(f"a replay buffer of {capacity} slots for {envs} environments: give at least {least}")
        slots = envs * self.length
        self.shape, self.envs, self.stack, self.n_step, self.gamma = tuple(shape), envs, stack, n_step, gamma
        self.frames = np.zeros((slots, *self.shape), dtype)  # the system hands out the memory as it is written to
        self.actions, self.rewards = np.zeros(slots, np.int32), np.zeros(slots, np.float32)
        self.live, self.terminated = np.zeros(slots, bool), np.zeros(slots, bool)
        self.head, self.size = np.zeros(envs, np.int64), np.zeros(envs, np.int64)  # next slot to write; slots filled
        self.starting = np.ones(envs, bool)  # whose next observation begins an episode
        self.alpha = prioritised
        self.tree = None if prioritised is None else SumTree(slots)
        self.largest = 1.0  # priority of what has not been sampled yet: the largest so far
        self.rng = np.random.default_rng(seed)

    def __len__(self):
        """Slots filled."""
        return int(self.size.sum())

    def memory(self):
        """Bytes of the whole buffer, once it is full."""
        arrays = (self.frames, self.actions, self.rewards, self.live, self.terminated)
        return sum(array.nbytes for array in arrays) + (self.tree.sums.nbytes if self.tree else 0)

    # --- writing ----------------------------------------------------------------------------------------------------

    def add(self, obs, action, reward, terminated, truncated, final_obs=None):
        """One step of every environment, arrays [envs, ...].

        obs: what was acted upon.  final_obs: the observations after the step, read only where an episode ended (there
        the environment has already begun the next one); it may be None while none does.
        """
        obs = self._as_stacks(obs)
        before = self.head.copy() if self.tree else None
        if self.starting.any():
            rows = np.flatnonzero(self.starting)
            for j in range(self.stack - 1):
                self._push(rows, obs[rows, j])
        at = self._push(np.arange(self.envs), obs[:, -1])
        self.live[at], self.actions[at], self.rewards[at], self.terminated[at] = True, action, reward, terminated
        self.starting = np.asarray(terminated, bool) | np.asarray(truncated, bool)
        if self.starting.any():
            rows = np.flatnonzero(self.starting)
            self._push(rows, self._as_stacks(final_obs)[rows, -1])
        if self.tree:
            self._renew_priorities(before)

    def cut(self):
        """The environments begin anew without having ended (a restart): end the episodes under way as truncated.

        The last observation of each, whose action led nowhere that is known, becomes its last frame.
        """
        rows = np.flatnonzero(~self.starting)
        self.live[rows * self.length + (self.head[rows] - 1) % self.length] = False
        self.starting[:] = True
        if self.tree:
            self._renew_priorities(self.head.copy())

    def _as_stacks(self, obs):
        return np.asarray(obs).reshape(self.envs, self.stack, *self.shape)

    def _push(self, rows, frames):
        """Write a frame into the next slot of each environment in `rows`; returns the slots' flat indices."""
        at = rows * self.length + self.head[rows]
        self.frames[at] = frames
        self.live[at] = self.terminated[at] = False
        self.head[rows] = (self.head[rows] + 1) % self.length
        self.size[rows] = np.minimum(self.size[rows] + 1, self.length)
        return at

    def _renew_priorities(self, before):
        """Forget the slots written since the heads stood at `before`, and those whose context was; let in the new."""
        rows = np.arange(self.envs)[:, None]
        reach = int(((self.head - before) % self.length).max()) + self.stack - 1
        gone = rows * self.length + (before[:, None] + np.arange(reach)) % self.length
        self.tree.set(gone.ravel(), 0.0)
        newest = np.arange(1, min(self.n_step + self.stack + 3, self.length))  # an `add` takes at most stack + 1 slots
        newest = (rows * self.length + (self.head[:, None] - newest) % self.length).ravel()
        new = newest[self._ready(newest) & (self.tree.get(newest) == 0)]
        self.tree.set(new, self.largest)

    # --- reading ----------------------------------------------------------------------------------------------------

    def _after(self, at, steps):
        """Flat indices of the slots `steps` further on (or back) in the same rings."""
        env, slot = np.divmod(at, self.length)
        return env * self.length + (slot + steps) % self.length

    def _span(self, at):
        """Steps [B] that a sample spans: n_step, or fewer where the episode ends before."""
        if self.n_step == 1:
            return np.ones(len(at), np.int64)
        live = self.live[self._after(at[:, None], np.arange(1, self.n_step + 1))]
        return np.where(live.all(axis=1), self.n_step, live.argmin(axis=1) + 1)

    def _ready(self, at):
        """Whether [B] a transition begins at a slot, all it needs being there: its context and what came of it."""
        env, slot = np.divmod(at, self.length)
        age = (self.head[env] - 1 - slot) % self.length  # 0: the newest slot of its ring
        older = self.size[env] - 1 - age  # slots before it that are not overwritten; negative: never written
        return self.live[at] & (age >= self._span(at)) & (older >= self.stack - 1)

    def _draw(self, batch):
        """Flat indices [B], each ready slot as likely as another: draw from all of them, keep those that are ready."""
        found, tries, filled = np.zeros(0, np.int64), 0, int(self.size.max())
        while len(found) < batch:
            if (tries := tries + 1) > 1_000 or not filled:
                raise ValueError("nothing to sample yet: no transition in the buffer is complete")
            some = 2 * batch
            at = self.rng.integers(self.envs, size=some) * self.length + self.rng.integers(filled, size=some)
            found = np.concatenate([found, at[self._ready(at)]])
        return found[:batch]

    def _observations(self, at):
        """Observations [B, *shape], or [B, stack, *shape], that end in these slots."""
        if self.stack == 1:
            return self.frames.take(at, axis=0)
        return self.frames.take(self._after(at[:, None], np.arange(1 - self.stack, 1)), axis=0)

    def sample(self, batch, beta=None):
        """A dict of arrays [B, ...]: what a temporal-difference update needs.

        obs, action [B] int32; reward: the sum of k = 1..n_step discounted rewards; next_obs: after these k steps;
        discount: gamma^k, and 0 where the episode terminated in them; where it was truncated, next_obs is its last
        observation and the value goes on.
        index: of the slots, for `update`.  weight: 1, or with `beta` the importance weights (1 / (N P(i)))^beta of
        prioritised sampling, over the largest of the batch.  Raises ValueError while nothing is complete.
        """
        weight = np.ones(batch, np.float32)
        if self.tree is None:
            at = self._draw(batch)
        else:
            at, share = self._draw_by_priority(batch)
            if beta is not None:
                weight = (share / share.min()) ** -beta  # N cancels out
        span = self._span(at)
        steps = np.arange(self.n_step)
        within = steps < span[:, None]
        rewards = self.rewards[self._after(at[:, None], steps)] * within
        last = self._after(at, span - 1)
        return {
            "obs": self._observations(at),
            "action": self.actions[at],
            "reward": (rewards * self.gamma**steps).sum(axis=1).astype(np.float32),
            "next_obs": self._observations(self._after(at, span)),
            "discount": (self.gamma**span * ~self.terminated[last]).astype(np.float32),
            "weight": weight.astype(np.float32),
            "index": at,
        }

    def _draw_by_priority(self, batch):
        """Flat indices [B] and their shares of the priorities, one from each of B equal parts of their sum.

        In random order: whoever cuts the batch into smaller ones gets fair samples.
        """
        total = self.tree.total()
        if total <= 0:
            raise ValueError("nothing to sample yet: no transition in the buffer is complete")
        mass = (np.arange(batch) + self.rng.random(batch)) / batch * total
        at = self.tree.find(self.rng.permutation(mass))
        return at, self.tree.get(at) / total

    def update(self, index, error):
        """New priorities (|error| + a little)^alpha of the slots that `sample` returned; nothing where it is uniform.

        A slot that was sampled more than once keeps the last of its errors.
        """
        if self.tree is None:
            return
        index = np.asarray(index).ravel()
        priority = (np.abs(np.asarray(error, np.float64)).ravel() + SMALLEST) ** self.alpha
        there = self.tree.get(index) > 0  # not overwritten meanwhile
        self.tree.set(index[there], priority[there])
        self.largest = max(self.largest, float(priority.max()))

    # --- a restart --------------------------------------------------------------------------------------------------

    def save(self, path):
        """Write the filled part and the random state to `path` (.npz); `Resume` sees to it that it is there whole.

        The file is as large as what is filled: up to `memory()`, so 0.7 GB for 100,000 frames of Atari and 7 GB for a
        million, and while a new one is written the old one is still there.
        """
        slots = {f"{name}/{env}": rows[env, : self.size[env]]  # views: nothing is copied
                 for name, rows in self._rows().items() for env in range(self.envs)}  # fmt: skip
        state = {"settings": self._settings(), "largest": self.largest, "rng": self.rng.bit_generator.state}
        np.savez(path, state=json.dumps(state), head=self.head, size=self.size, starting=self.starting, **slots)

    def load(self, path):
        """Take up what `save` wrote, an environment at a time, so that little of it is in memory twice.

        Raises `InputError` where it is of a buffer with other settings.
        Call `cut` after it, unless the environments too go on exactly where they were.
        """
        with np.load(path, allow_pickle=False) as content:
            state = json.loads(str(content["state"]))
            if state["settings"] != json.loads(json.dumps(self._settings())):
                raise InputError(f"{path} is of another replay buffer ({state['settings']}): run again with --fresh")
            self.head, self.size, self.starting = content["head"], content["size"], content["starting"]
            for name, rows in self._rows().items():
                for env in range(self.envs):
                    rows[env, : self.size[env]] = content[f"{name}/{env}"]
        self.largest = state["largest"]
        self.rng.bit_generator.state = state["rng"]
        if self.tree:
            self.tree.rebuild()

    def _rows(self):
        """name -> view [envs, length, ...] of each array."""
        arrays = {"frames": self.frames, "actions": self.actions, "rewards": self.rewards, "live": self.live,
                  "terminated": self.terminated}  # fmt: skip
        arrays |= {"priorities": self.tree.leaves} if self.tree else {}
        return {name: array.reshape(self.envs, self.length, *array.shape[1:]) for name, array in arrays.items()}

    def _settings(self):
        return {"envs": self.envs, "length": self.length, "shape": list(self.shape), "dtype": str(self.frames.dtype),
                "stack": self.stack, "n_step": self.n_step, "gamma": self.gamma, "alpha": self.alpha}  # fmt: skip


class SumTree:
    """Non-negative numbers with the sums of all pairs, pairs of pairs, ...: drawing by size costs log2(count) steps.

    `sums[1]` is the total, `sums[2 i] + sums[2 i + 1] = sums[i]`, and the numbers themselves are the last row.
    """

    def __init__(self, count):
        self.first = 1 << max(1, count - 1).bit_length()  # where the leaves begin: a power of two
        self.sums = np.zeros(2 * self.first)
        self.leaves = self.sums[self.first : self.first + count]

    def total(self):
        return self.sums[1]

    def get(self, index):
        return self.leaves[index]

    def set(self, index, value):
        """Set leaves [B] and the sums above them, row by row."""
        self.leaves[index] = value
        above = (index + self.first) >> 1
        while above.size and above[0]:
            self.sums[above] = self.sums[2 * above] + self.sums[2 * above + 1]
            above = above >> 1

    def find(self, mass):
        """For masses [B] in [0, total): the leaf in which each falls when the numbers are laid end to end."""
        at = np.ones(len(mass), np.int64)
        while at[0] < self.first:
            left = self.sums[2 * at]
            right = (mass >= left) & (self.sums[2 * at + 1] > 0)  # rounding must not lead to an empty leaf
            mass = mass - left * right
            at = 2 * at + right
        return at - self.first

    def rebuild(self):
        """The sums, after the leaves were written to directly."""
        row = self.first
        while row > 1:
            self.sums[row // 2 : row] = self.sums[row : 2 * row].reshape(-1, 2).sum(axis=1)
            row //= 2
