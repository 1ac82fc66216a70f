"""Vector environments, Atari's preprocessing on real ROMs, and training loops that go on after a kill."""

import json
import os
import signal
import types

import cv2
import gymnasium
import keras
import numpy as np
import pytest

from course import core
from course.core import checkpoint
from models.rl import atari, envs, replay, resume
from tests import support

NAMES = ["CartPole-v1", "FrozenLake-v1", "MountainCar-v0", "InvertedPendulum-v5"]


def play(vector, steps, seed=0):
    """Random actions -> the observations, rewards, ends and last observations of every step."""
    obs, _ = vector.reset()
    vector.action_space.seed(seed)
    seen = [obs]
    for _ in range(steps):
        obs, reward, terminated, truncated, info = vector.step(vector.action_space.sample())
        seen += [obs, reward, terminated, truncated, envs.final_observations(obs, info)]
    return seen


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# --- seeds and episodes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "ALE/Breakout-v5"])
def test_a_seed_gives_the_same_episodes(name):
    first, again, other = (play(envs.vector(name, 2, seed), 60) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


def test_no_environment_of_one_seed_is_one_of_another():
    seeds = [number for seed in range(20) for number in envs.seeds(seed, 50)]
    assert len(set(seeds)) == len(seeds)
    assert 1 <= min(seeds) <= max(seeds) < 2**31
    starts = [tuple(row) for seed in range(5) for row in envs.vector("InvertedPendulum-v5", 4, seed).reset()[0]]
    assert len(set(starts)) == len(starts)


def test_reset_with_a_seed_starts_over():
    vector = envs.vector("MountainCar-v0", 3, 7)
    first = vector.reset(seed=5)[0]
    assert not np.array_equal(vector.reset()[0], first)
    assert np.array_equal(vector.reset(seed=5)[0], first)


@pytest.mark.parametrize("name", NAMES)
def test_the_next_episode_begins_in_the_step_that_ends_one(name):
    vector = envs.vector(name, 3, 0)
    obs, _ = vector.reset()
    vector.action_space.seed(0)
    ends = 0
    for _ in range(250):
        obs, _, terminated, truncated, info = vector.step(vector.action_space.sample())
        done = terminated | truncated
        last = envs.final_observations(obs, info)
        assert np.array_equal(last[~done], obs[~done])
        if not done.any():
            assert info == {}
            continue
        ends += done.sum()
        assert np.array_equal(info["_final_obs"], done)
        if name == "CartPole-v1":
            assert (np.abs(obs[done]) <= 0.05).all()
            assert ((np.abs(last[done, 0]) > 2.4) | (np.abs(last[done, 2]) > 0.2095)).all()
        if name == "FrozenLake-v1":
            assert (obs[done] == 0).all()
            assert np.isin(last[done], [5, 7, 11, 12, 15]).all()  # the holes and the goal
    assert ends >= 3


def test_cart_poles_move_as_gymnasiums_single_one():
    """float64 inside and the same formula: the observations are equal to the last bit but one of float32."""
    vector, single = envs.vector("CartPole-v1", 4, 0), gymnasium.make("CartPole-v1")
    vector.reset()
    single.reset()
    rng, compared = np.random.default_rng(0), 0
    for _ in range(100):
        single.unwrapped.state = vector.state[:, 2].copy()
        single.unwrapped.steps_beyond_terminated = None
        actions = rng.integers(2, size=4)
        theirs, _, over, _, _ = single.step(int(actions[2]))
        obs, reward, terminated, _, info = vector.step(actions)
        np.testing.assert_allclose(envs.final_observations(obs, info)[2], theirs, rtol=0, atol=2e-7)
        assert terminated[2] == over
        assert (reward == 1).all()
        compared += over
        if over:
            single.reset()
    assert compared >= 2


def test_cart_pole_is_truncated_at_its_limit():
    vector = envs.vector("CartPole-v1", 2, 0, max_episode_steps=5)
    vector.reset()
    for step in range(1, 11):
        _, _, terminated, truncated, info = vector.step(np.array([step % 2, step % 2]))
        assert not terminated.any()
        assert truncated.all() == (step % 5 == 0)
        assert ("final_obs" in info) == (step % 5 == 0)


def test_other_ways_to_reset_are_gymnasiums_own():
    vector = envs.vector("CartPole-v1", 2, 0, autoreset="next_step")
    assert type(vector) is gymnasium.vector.SyncVectorEnv
    assert vector.metadata["autoreset_mode"] == gymnasium.vector.AutoresetMode.NEXT_STEP


def test_episodes_are_counted_over_steps():
    episodes = envs.Episodes(2)
    assert episodes.add([1.0, 2.0], [False, False]) == []
    assert episodes.add([1.0, 3.0], [False, True]) == [(5.0, 2)]
    state = episodes.state()
    assert episodes.add([0.5, 1.0], [True, True]) == [(2.5, 3), (1.0, 1)]
    episodes.load(state)
    assert episodes.add([0.5, 1.0], [True, False]) == [(2.5, 3)]


@pytest.mark.parametrize(
    ("name", "count", "changes", "message"),
    [
        ("NoSuch-v0", 1, {}, "there is no environment NoSuch-v0"),
        ("ALE/NoSuch-v5", 1, {}, "there is no environment ALE/NoSuch-v5"),
        ("CartPole-v1", 0, {}, "give at least 1"),
        ("CartPole-v1", 1, {"autoreset": "never"}, "autoreset never is not known"),
    ],
)
def test_bad_input_is_one_line(name, count, changes, message):
    with pytest.raises(core.InputError, match=message) as caught:
        envs.vector(name, count, 0, **changes)
    assert "\n" not in str(caught.value)


# --- Atari, wrapper by wrapper ---------------------------------------------------------------------------------------


def raw(game, **kwargs):
    """The game frame by frame, grey, without any preprocessing."""
    envs.specification(f"ALE/{game}-v5")
    return gymnasium.make(f"ALE/{game}-v5", obs_type="grayscale", frameskip=1, repeat_action_probability=0.0, **kwargs)


def test_noop_reset_waits_for_a_random_number_of_frames():
    env = atari.NoopReset(raw("Breakout"), most=9)
    first = [env.reset(seed=3 if again == 0 else None)[1]["episode_frame_number"] for again in range(60)]
    assert set(first) == set(range(10))
    assert [env.reset(seed=3)[1]["episode_frame_number"], env.reset()[1]["episode_frame_number"]] == first[:2]


def test_fire_reset_serves_the_ball():
    for wrapper, moves in ((lambda env: env, False), (atari.FireReset, True)):
        env = wrapper(raw("Breakout"))
        first, _ = env.reset(seed=0)
        later = [env.step(0)[0] for _ in range(30)]
        field = np.s_[95:188, 8:152]  # between the bricks and the paddle there is only the ball
        assert any((frame[field] != first[field]).any() for frame in later) is moves


def test_max_and_skip_holds_an_action_and_takes_the_brighter_of_the_last_two_frames():
    env, frame_by_frame = atari.MaxAndSkip(raw("Pong")), raw("Pong")
    env.reset(seed=1)
    frame_by_frame.reset(seed=1)
    rng, flickers, points = np.random.default_rng(0), 0, 0.0
    for _ in range(120):
        action = rng.integers(6)
        obs, reward, terminated, _, info = env.step(action)
        frames, rewards, *_ = zip(*[frame_by_frame.step(action) for _ in range(4)], strict=True)
        assert np.array_equal(obs, np.maximum(frames[2], frames[3]))
        assert reward == sum(rewards)
        flickers += not np.array_equal(obs, frames[3])
        points += abs(reward)
    assert not terminated
    assert info["episode_frame_number"] == 4 * 120
    assert flickers > 20
    assert points > 0


def test_episodic_life_ends_at_a_lost_life_and_plays_on():
    env = atari.EpisodicLife(atari.FireReset(raw("Breakout")))
    _, info = env.reset(seed=0)
    assert info["lives"] == 5
    lives, frames = [], []
    for _ in range(6):
        terminated = False
        while not terminated:
            obs, _, terminated, _, info = env.step(1)  # FIRE serves each new ball and moves nothing
        lives.append(info["lives"])
        again, after = env.reset()
        frames.append(after["episode_frame_number"])
        assert np.array_equal(again, obs) is (info["lives"] > 0)
    assert lives == [4, 3, 2, 1, 0, 4]
    assert frames[:4] == sorted(frames[:4])
    assert frames[4] < frames[0]  # a new game


def test_warp_averages_areas():
    env = atari.Warp84(raw("Pong"))
    obs, _ = env.reset(seed=0)
    frame, _ = raw("Pong").reset(seed=0)
    assert (obs.shape, obs.dtype) == ((84, 84), np.uint8)
    assert obs.shape == env.observation_space.shape
    np.testing.assert_allclose(obs.mean(), frame.mean(), atol=0.5)  # an average keeps the mean but for rounding
    block = frame[0:5, 0:40].astype(float).mean(axis=0)  # 2.5 rows and 1.905 columns a pixel: two pixels are five rows
    np.testing.assert_allclose(obs[0:2, 0:21].astype(float).mean(), block.mean(), atol=0.6)


def test_clip_reward():
    env = atari.ClipReward(raw("Pong"))
    assert [env.reward(points) for points in (-200.0, -1.0, 0.0, 0.5, 7.0)] == [-1, -1, 0, 0.5, 1]


def test_frame_stack_moves_by_one_frame_and_never_across_an_episodes_edge():
    env = atari.FrameStack(atari.Warp84(raw("Pong")), 4)
    obs, _ = env.reset(seed=0)
    assert obs.shape == env.observation_space.shape == (4, 84, 84)
    assert (obs == obs[0]).all()
    before = obs
    for _ in range(6):
        obs, *_ = env.step(2)
        assert np.array_equal(obs[:3], before[1:])
        before = obs
    assert not (obs == obs[0]).all()
    obs, _ = env.reset()
    assert (obs == obs[0]).all()


@pytest.mark.parametrize("game", ["Breakout", "Pong", "Freeway"])
def test_the_wrappers_and_ales_own_vector_environment_are_one(game):
    """Pixels, rewards and ends of 520 steps, lost lives and lost games among them; no-ops at their least, as the two
    draw them differently.  Where a game ends within the four frames of a step, ALE shows the frames of the last."""
    least = dict(noop_max=1, frames=2_000)
    fast, slow = envs.vector(f"ALE/{game}-v5", 1, 0, **least), atari.make(f"ALE/{game}-v5", **least)
    obs, _ = fast.reset()
    theirs, _ = slow.reset(seed=0)
    assert np.array_equal(obs[0], theirs)
    rng, ends, points = np.random.default_rng(0), [], 0.0
    for step in range(520):
        action = int(rng.integers(fast.single_action_space.n))
        obs, reward, terminated, truncated, info = fast.step(np.array([action]))
        theirs, their_reward, their_end, cut, their_info = slow.step(action)
        assert (reward[0], terminated[0], truncated[0]) == (their_reward, their_end, cut), step
        points += abs(their_reward)
        if their_end or cut:
            ends.append("cut" if cut else "game" if their_info["lives"] == 0 else "life")
            if ends[-1] == "life":
                assert np.array_equal(envs.final_observations(obs, info)[0], theirs), step
            theirs, _ = slow.reset()
        assert np.array_equal(obs[0], theirs), step
    assert points > 0 or game == "Freeway"
    if game == "Breakout":
        assert ends.count("life") >= 8
        assert ends.count("game") >= 2
    else:
        assert ends == ["cut"]


def test_the_wrappers_resize_as_dqn_does():
    frame = np.arange(210 * 160, dtype=np.uint32).reshape(210, 160).astype(np.uint8)
    expected = cv2.resize(frame, (84, 84), interpolation=cv2.INTER_AREA)
    assert np.array_equal(atari.Warp84(raw("Pong")).observation(frame), expected)


# --- going on after a kill -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CartPole-v1", "FrozenLake-v1", "Taxi-v4", "Pendulum-v1", "Hopper-v5"])
def test_environments_go_back_to_the_last_bit(name):
    vector = envs.vector(name, 2, 0)
    play(vector, 30)
    arrays, generators = json_round_trip(resume.positions(vector))
    rng = [np.random.default_rng(1), np.random.default_rng(1)]
    expected = steps(vector, rng[0])
    other = envs.vector(name, 2, 99)
    resume.go_back(other, arrays, generators)
    assert same(expected, steps(other, rng[1]))


def json_round_trip(found):
    arrays, generators = found
    return arrays, json.loads(json.dumps(generators))


def steps(vector, rng):
    """Sixty steps without a reset before; ends among them, by truncation for those that have no other."""
    seen = []
    for _ in range(230 if vector.single_action_space.shape else 60):
        space = vector.single_action_space
        action = rng.integers(space.n, size=2) if not space.shape else rng.uniform(-1, 1, (2, *space.shape))
        obs, reward, terminated, truncated, _ = vector.step(action)
        seen += [obs, reward, terminated, truncated]
    return seen


def test_ales_state_cannot_be_had():
    assert resume.positions(envs.vector("ALE/Pong-v5", 1, 0)) is None


def a_run(folder):
    """What `core.run` gives, as far as a loop needs it."""
    return types.SimpleNamespace(
        checkpoint=lambda model, name, **objects: checkpoint.Checkpoint(folder / name, model, **objects)
    )


def loop(folder, name, stop=0, kill=False):
    """120 steps with a checkpoint every 20, left or killed at step `stop` -> all that may depend on what was saved."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    vector, episodes, rng = envs.vector(name, 2, 0), envs.Episodes(2), np.random.default_rng(0)
    space, stack = vector.single_observation_space, 4 if name.startswith("ALE/") else 1
    memory = replay.Replay(400, space.shape[stack // 4 :], envs=2, dtype=space.dtype, stack=stack, seed=0)
    found = resume.Resume(
        a_run(folder), "agent", model, seed=0, envs=vector, replay=memory, episodes=episodes, generators={"acting": rng}
    )
    obs, step = found.begin(), found.step
    began, marks = step, len(found.arrays.get("marks", ()))
    while step < 120:
        following, reward, terminated, truncated, info = vector.step(action := rng.integers(2, size=2))
        memory.add(obs, action, reward, terminated, truncated, envs.final_observations(following, info))
        episodes.add(reward, terminated | truncated)
        obs, step = following, step + 1
        model.set_weights([weight + rng.normal(size=weight.shape) for weight in model.get_weights()])
        if step % 20 == 0:
            found.save(step, obs, {"weight": float(model.get_weights()[0].sum())}, marks=np.arange(step))
        if step == stop:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return None
    samples = [float(value.astype(float).sum()) for value in memory.sample(8).values()]
    ends = [obs, model.get_weights()[0], episodes.returns, episodes.lengths, samples, found.history["weight"]]
    return types.SimpleNamespace(ends=ends, began=began, marks=marks, continued=found.continued, slots=len(memory))


def test_a_loop_killed_goes_on_and_ends_as_an_unbroken_one(tmp_path):
    """Killed at step 70 it has lost 10 steps: weights, environments, replay buffer, generator and counts go on."""
    call = f"loop(pathlib.Path({str(tmp_path)!r}), 'CartPole-v1', stop=70, kill=True)"
    done, _ = support.python("-c", f"import pathlib; from tests.test_rl_envs import loop; {call}")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (tmp_path / "agent").glob("replay-*")] == ["replay-60.npz"]
    killed, unbroken = loop(tmp_path, "CartPole-v1"), loop(tmp_path / "unbroken", "CartPole-v1")
    assert (killed.began, killed.marks, killed.continued) == (60, 60, True)
    assert (unbroken.began, unbroken.marks, unbroken.continued) == (0, 0, False)
    assert same(killed.ends, unbroken.ends)
    assert killed.slots == unbroken.slots


def test_games_that_do_not_tell_their_state_begin_anew(tmp_path):
    assert loop(tmp_path, "ALE/Pong-v5", stop=70) is None
    left, unbroken = loop(tmp_path, "ALE/Pong-v5"), loop(tmp_path / "unbroken", "ALE/Pong-v5")
    assert (left.began, left.continued) == (60, False)
    assert np.array_equal(left.ends[1], unbroken.ends[1])  # the generator went on
    assert (left.ends[3] == 60).all()  # of the games that began after the restart
    assert (unbroken.ends[3] == 120).all()
    assert left.slots == unbroken.slots + 2 * 3  # each of the new games needs a context of its own


def test_a_lost_replay_buffer_is_one_line(tmp_path):
    class Memory:
        def save(self, path):
            path.write_bytes(b"frames")

    resume.Resume(a_run(tmp_path), "agent", None, seed=0, replay=Memory()).save(5)
    (tmp_path / "agent" / "replay-5.npz").unlink()
    with pytest.raises(core.InputError, match="run again with --fresh"):
        resume.Resume(a_run(tmp_path), "agent", None, seed=0, replay=Memory())
