"""The replay buffer, against transitions that are written down by hand and against a list of all of them."""

import numpy as np
import pytest

from course.core import InputError
from models.rl import replay

ACTIONS = 3


def play(buffer, steps, *, seed=0, ends=(5, 12), kinds=("terminated", "truncated")):
    """Fill `buffer` with made-up episodes whose frames number themselves; returns every transition there was.

    A frame is filled with (episode number, step in it), so that a sample tells where it is from.  The answer: (env,
    episode, step) -> (action, reward, terminated, truncated).
    """
    rng, envs, stack = np.random.default_rng(seed), buffer.envs, buffer.stack
    episode, step, known = np.zeros(envs, int), np.zeros(envs, int), {}
    length = rng.integers(*ends, size=envs)

    def stacked(env, episode, step):
        frames = [np.full(buffer.shape, 100 * episode + max(step - back, 0)) for back in range(stack - 1, -1, -1)]
        return np.stack(frames) if stack > 1 else frames[0]

    for _ in range(steps):
        obs = np.stack([stacked(e, episode[e], step[e]) for e in range(envs)])
        action, reward = rng.integers(ACTIONS, size=envs), rng.standard_normal(envs).astype(np.float32)
        done = step + 1 == length
        terminated = done & (rng.choice(kinds, size=envs) == "terminated")
        for e in range(envs):
            known[e, episode[e], step[e]] = action[e], reward[e], terminated[e], done[e] & ~terminated[e]
        final = np.stack([stacked(e, episode[e], step[e] + 1) for e in range(envs)])
        buffer.add(obs, action, reward, terminated, done & ~terminated, final if done.any() else None)
        step = np.where(done, 0, step + 1)
        episode = episode + done
        length = np.where(done, rng.integers(*ends, size=envs), length)
    return known


def expected(known, env, episode, step, n, gamma):
    """Reward, discount and the step that the value is taken from, by the definition."""
    reward, k = 0.0, 0
    while True:
        _, r, terminated, truncated = known[env, episode, step + k]
        reward, k = reward + gamma**k * r, k + 1
        if terminated or truncated or k == n:
            return reward, 0.0 if terminated else gamma**k, step + k


@pytest.mark.parametrize("stack", [1, 4])
@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("prioritised", [None, 0.6])
@pytest.mark.parametrize("steps", [40, 300])  # before the ring is full, and after it has gone round several times
def test_every_sample_is_what_happened(stack, n_step, prioritised, steps):
    buffer = replay.Replay(2 * 70, (2, 2), 2, np.int32, stack=stack, n_step=n_step, gamma=0.9, prioritised=prioritised)
    known = play(buffer, steps)
    got = buffer.sample(400)
    assert got["obs"].shape == ((400, 4, 2, 2) if stack > 1 else (400, 2, 2))
    seen = set()
    for i in range(400):
        env = int(got["index"][i] // buffer.length)
        frames = got["obs"][i].reshape(stack, 4)[:, 0]
        episode, step = divmod(int(frames[-1]), 100)
        assert frames.tolist() == [100 * episode + max(step - back, 0) for back in range(stack - 1, -1, -1)]
        reward, discount, at = expected(known, env, episode, step, n_step, 0.9)
        assert got["action"][i] == known[env, episode, step][0]
        assert got["reward"][i] == pytest.approx(reward, abs=1e-5)
        assert got["discount"][i] == pytest.approx(discount, abs=1e-6)
        following = got["next_obs"][i].reshape(stack, 4)[:, 0].tolist()
        assert following == [100 * episode + max(at - back, 0) for back in range(stack - 1, -1, -1)]
        seen.add((env, episode, step))
    newest = max(episode for _, episode, _ in known)
    assert any(known[key][2] for key in seen), "a terminated one among them"
    assert any(known[key][3] for key in seen), "a truncated one too"
    assert max(episode for _, episode, _ in seen) >= newest - 1
    if steps == 300:
        assert min(episode for _, episode, _ in seen) > 0, "the first episodes were overwritten"


def test_terminated_and_truncated_by_hand():
    """Two environments, gamma 0.5, two steps: the first terminates at its third step, the second is truncated there."""
    buffer = replay.Replay(40, (), 2, np.float32, n_step=2, gamma=0.5)
    for t in range(3):
        end = t == 2
        buffer.add([t, 10 + t], [0, 1], [1.0, 2.0], [end, False], [False, end], [t + 1, 11 + t])
    buffer.add([20, 30], [0, 0], [0.0, 0.0], [False, False], [False, False])
    got = buffer.sample(200)
    rows = {(float(obs), float(reward), float(following), float(discount))
            for obs, reward, following, discount in zip(*(got[k] for k in ("obs", "reward", "next_obs", "discount")),
                                                        strict=True)}  # fmt: skip
    assert rows == {
        (0, 1.5, 2, 0.25), (1, 1.5, 3, 0), (2, 1.0, 3, 0),
        (10, 3.0, 12, 0.25), (11, 3.0, 13, 0.25), (12, 2.0, 13, 0.5),
    }  # fmt: skip


def test_uniform_sampling_is_uniform():
    buffer = replay.Replay(60, (), 3, np.int32, stack=2)
    play(buffer, 90)
    index = buffer.sample(20_000)["index"]
    ready = np.flatnonzero(buffer._ready(np.arange(60)))
    counts = np.bincount(index, minlength=60)
    assert set(np.flatnonzero(counts)) == set(ready)
    expectation = 20_000 / len(ready)
    chi2 = ((counts[ready] - expectation) ** 2 / expectation).sum()
    assert chi2 < len(ready) - 1 + 5 * np.sqrt(2 * len(ready)), "five deviations"


def test_prioritised_sampling_follows_the_errors_and_the_weights_undo_it():
    buffer = replay.Replay(64, (), 1, np.int32, prioritised=0.5)
    play(buffer, 40)
    ready = np.flatnonzero(buffer._ready(np.arange(64)))
    assert set(np.flatnonzero(buffer.tree.leaves)) == set(ready), "what is ready has a priority, nothing else has"
    error = np.linspace(0.1, 4.0, len(ready))
    buffer.update(ready, error)
    got = buffer.sample(50_000, beta=1.0)
    share = np.sqrt(error) / np.sqrt(error).sum()
    counts = np.bincount(got["index"], minlength=64)[ready]
    assert counts / 50_000 == pytest.approx(share, rel=0.05)
    assert counts.sum() == 50_000
    weight = np.zeros(64)
    weight[got["index"]] = got["weight"]
    assert weight[ready] == pytest.approx(np.sqrt(error.min() / error), rel=1e-3)
    assert buffer.sample(100, beta=None)["weight"].tolist() == [1.0] * 100


def test_new_transitions_get_the_largest_priority_so_far():
    buffer = replay.Replay(64, (), 1, np.int32, prioritised=1.0)
    play(buffer, 20)
    first = np.flatnonzero(buffer.tree.leaves)
    assert set(buffer.tree.get(first)) == {1.0}
    buffer.update(first[:1], [7.0])
    play(buffer, 5)
    new = np.setdiff1d(np.flatnonzero(buffer.tree.leaves), first)
    assert len(new)
    assert buffer.tree.get(new) == pytest.approx(7.0, abs=1e-5)


@pytest.mark.parametrize("count", [1, 2, 7, 64, 100])
def test_sum_tree(count):
    tree, rng = replay.SumTree(count), np.random.default_rng(0)
    values = np.zeros(count)
    for _ in range(5):
        index = rng.integers(count, size=10)
        values[index] = new = np.zeros(10) + rng.random()
        tree.set(index, new)
        assert tree.total() == pytest.approx(values.sum())
    edges = np.cumsum(values)
    mass = rng.random(200) * edges[-1] * (1 - 1e-9)
    assert tree.find(mass).tolist() == np.searchsorted(edges, mass, side="right").tolist()
    copy = replay.SumTree(count)
    copy.leaves[:] = tree.leaves
    copy.rebuild()
    assert copy.sums[1:] == pytest.approx(tree.sums[1:])


def test_frames_are_kept_once():
    """Four-frame stacks of 84 x 84: a transition takes one frame and 10 bytes, not the eight frames of two stacks."""
    buffer = replay.Replay(1_000, (84, 84), 4, stack=4)
    assert buffer.memory() == 1_000 * (84 * 84 + 4 + 4 + 1 + 1)
    assert buffer.memory() < 1_000 * 8 * 84 * 84 / 7.9


@pytest.mark.parametrize("prioritised", [None, 0.6])
@pytest.mark.parametrize("steps", [20, 200])
def test_saved_and_loaded_it_goes_on_as_if_nothing_had_been(tmp_path, prioritised, steps):
    def make():
        return replay.Replay(120, (3,), 2, np.int32, stack=2, n_step=2, prioritised=prioritised, seed=3)

    one, other = make(), make()
    play(one, steps)
    one.update(one.sample(8)["index"], np.arange(8) + 0.5)
    one.save(tmp_path / "replay.npz")
    other.load(tmp_path / "replay.npz")
    for buffer in (one, other):
        play(buffer, 10, seed=9)
    first, second = one.sample(64, beta=0.5), other.sample(64, beta=0.5)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_loading_another_buffer_is_one_clear_line(tmp_path):
    one = replay.Replay(120, (3,), 2)
    one.save(tmp_path / "replay.npz")
    with pytest.raises(InputError, match=r"another replay buffer .* --fresh"):
        replay.Replay(120, (3,), 2, n_step=3).load(tmp_path / "replay.npz")


@pytest.mark.parametrize("prioritised", [None, 0.6])
def test_after_a_cut_no_sample_crosses_into_the_next_episode(prioritised):
    buffer = replay.Replay(200, (), 2, np.int32, stack=3, n_step=3, prioritised=prioritised)
    play(buffer, 7, ends=(50, 51))
    buffer.cut()
    play(buffer, 7, ends=(50, 51), seed=1)  # frames are numbered from 0 again
    got = buffer.sample(500)
    began = got["obs"][:, -1]
    assert (got["next_obs"][:, -1] > began).all(), "an observation and what follows are of one episode"
    assert set(got["next_obs"][:, -1] - began) == {1, 2, 3}, "shorter before the cut"
    assert (got["discount"] > 0).all(), "cut, not terminated"
    last = got["discount"][(got["index"] % buffer.length < 9) & (began == 5)]  # the one before the open action
    assert last == pytest.approx(0.99)


def test_nothing_to_sample_and_no_room():
    buffer = replay.Replay(40, ())
    with pytest.raises(ValueError, match="nothing to sample yet"):
        buffer.sample(1)
    buffer.add([1], [0], [0.0], [False], [False])
    with pytest.raises(ValueError, match="nothing to sample yet"):
        buffer.sample(1)
    with pytest.raises(InputError, match="give at least 64"):
        replay.Replay(40, (), envs=8, stack=3)
