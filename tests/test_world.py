"""WorldNavigate: its rules by hand, Gymnasium's own checker, and the bound against policies that are simulated."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from course.core import InputError
from models.rl import world

UP, RIGHT, DOWN, LEFT = range(4)


def put(worlds, agent, goals, obstacles):
    """All of `worlds` in one state."""
    worlds.agent[:], worlds.goals[:], worlds.obstacles[:] = agent, goals, obstacles


def test_the_rules_by_hand():
    """3 x 3 cells:  agent . goal / obstacle . . / . . ."""
    worlds = world.Worlds(5, np.random.default_rng(0), size=3, obstacles=1, goals=1)
    put(worlds, 0, [2], [3])
    assert worlds.move(np.array([UP, LEFT, DOWN, RIGHT, RIGHT])).tolist() == [0, 0, -1, 0, 0]
    assert worlds.agent.tolist() == [0, 0, 0, 1, 1]
    assert worlds.move(np.array([RIGHT, RIGHT, RIGHT, RIGHT, DOWN])).tolist() == [0, 0, 0, 1, 0]
    assert worlds.agent.tolist() == [1, 1, 1, 2, 4]
    assert worlds.goals[[0, 1, 2, 4], 0].tolist() == [2, 2, 2, 2]
    assert worlds.goals[3, 0] not in (2, 3)


def test_idle_actions_do_nothing():
    worlds = world.Worlds(2, np.random.default_rng(0), size=3, obstacles=1, goals=1, idle=2)
    put(worlds, 0, [1], [3])
    assert worlds.move(np.array([4, 5])).tolist() == [0, 0]
    assert worlds.agent.tolist() == [0, 0]
    assert world.vector(1, 0, idle=2).single_action_space.n == 6


def test_a_goal_appears_again_at_every_free_cell_alike():
    worlds = world.Worlds(8_000, np.random.default_rng(0), size=3, obstacles=2, goals=2)
    put(worlds, 0, [1, 8], [3, 6])
    assert (worlds.move(np.full(8_000, RIGHT)) == 1).all()
    assert (worlds.goals[:, 1] == 8).all()
    counts = np.bincount(worlds.goals[:, 0], minlength=9)
    assert np.flatnonzero(counts).tolist() == [0, 2, 4, 5, 7], "not the agent, another goal or an obstacle"
    assert counts[counts > 0] == pytest.approx(1_600, abs=5 * np.sqrt(1_600))


def test_nothing_ever_shares_a_cell():
    worlds = world.Worlds(50, np.random.default_rng(0))
    for _ in range(200):
        worlds.move(worlds.rng.integers(4, size=50))
        cells = np.concatenate([worlds.agent[:, None], worlds.goals, worlds.obstacles], axis=1)
        assert (np.diff(np.sort(cells, axis=1), axis=1) > 0).all()


def test_arrangements_leave_the_free_cells_connected_and_the_parts_share_none():
    every = {tuple(cells) for cells in world.arrangements(3, 2).tolist()}
    shut_in = {(1, 3), (1, 5), (3, 7), (5, 7)}  # a corner cut off
    assert len(every) == 36 - len(shut_in)
    assert not every & shut_in
    train, held_out = ({tuple(c) for c in world.arrangements(5, 3, part).tolist()} for part in ("train", "held_out"))
    assert not train & held_out
    assert len(train | held_out) == len(world.arrangements(5, 3))
    assert len(held_out) == pytest.approx(len(train) / 4, rel=0.01)


def test_pixels_tell_the_state():
    worlds = world.Worlds(2, np.random.default_rng(0))
    put(worlds, 7, [0, 12, 24], [3, 4, 20])
    for cell in (3, 4, 16):
        pictures = worlds.pixels(cell)
        assert pictures.shape == (2, 5 * cell, 5 * cell, 3)
        middle = pictures[0, cell // 2 :: cell, cell // 2 :: cell].reshape(25, 3)
        kinds = (middle[:, None] == world.COLOURS).all(axis=2)
        assert (kinds.sum(axis=1) == 1).all()
        kinds = kinds.argmax(axis=1)
        assert np.flatnonzero(kinds == world.GOAL).tolist() == [0, 12, 24]
        assert np.flatnonzero(kinds == world.OBSTACLE).tolist() == [3, 4, 20]
        assert np.flatnonzero(kinds == world.AGENT).tolist() == [7]


def test_gymnasium_finds_no_fault():
    env = gymnasium.make("WorldNavigate-v0", render_mode="rgb_array")
    check_env(env.unwrapped)
    obs, _ = env.reset(seed=5)
    again, _ = env.reset(seed=5)
    assert np.array_equal(obs, again)
    for step in range(1, 51):
        _, _, terminated, truncated, _ = env.step(step % 4)
        assert not terminated
        assert truncated == (step == 50)
    assert env.render().shape == (160, 160, 3)


def test_the_vector_of_worlds_has_the_conventions_of_the_others():
    env = world.vector(3, 0)
    obs, _ = env.reset()
    for step in range(1, 101):
        obs, reward, terminated, truncated, info = env.step(np.full(3, step % 4))
        assert obs.shape == (3, *env.single_observation_space.shape)
        assert reward.shape == (3,)
        assert not terminated.any()
        assert truncated.all() == truncated.any() == (step % 50 == 0)
        assert ("final_obs" in info) == truncated.any()
    assert not np.array_equal(info["final_obs"], obs)
    first, second = (world.vector(3, seed).reset()[0] for seed in (1, 1))
    assert np.array_equal(first, second)
    endless = world.vector(1, 0, steps=None)
    assert not any(endless.step(np.zeros(1, int))[3].any() for _ in range(120))


def optimal_actions(worlds, left):
    """The best actions [N] where all worlds have the same obstacles, by one step of Bellman's equation, in full."""
    obstacles, goals = worlds.obstacles[0], worlds.goals.shape[1]
    free = np.setdiff1d(np.arange(worlds.size**2), obstacles)
    value = world.best_values(worlds.size, obstacles, goals, left)[left - 1]

    def look_up(agent, cells):
        return value[tuple(np.searchsorted(free, (agent, *cells)))]

    def worth(agent, cells, action):
        to = world.neighbours(worlds.size)[agent, action]
        if to in obstacles:
            return -1 + look_up(agent, cells)
        if to not in cells:
            return look_up(to, cells)
        others = [cell for cell in cells if cell != to]
        return 1 + np.mean([look_up(to, (cell, *others)) for cell in free if cell not in (to, *others)])

    return np.array([[worth(agent, tuple(cells), action) for action in range(4)]
                     for agent, cells in zip(worlds.agent, worlds.goals, strict=True)]).argmax(axis=1)  # fmt: skip


@pytest.mark.parametrize(("obstacles", "goals"), [(0, 1), (2, 1), (1, 2)])
def test_the_bound_is_what_the_best_policy_gets_and_no_other_gets_more(obstacles, goals):
    count, steps = 600, 12
    for best in (True, False):
        worlds = world.Worlds(count, np.random.default_rng(1), size=3, obstacles=obstacles, goals=goals)
        worlds.arrangements = worlds.arrangements[:1]
        worlds.begin(np.arange(count))
        bound, total = world.best_returns(worlds, steps), np.zeros(count)
        for left in range(steps, 0, -1):
            actions = optimal_actions(worlds, left) if best else worlds.rng.integers(4, size=count)
            total += worlds.move(actions)
        margin = 4 * (total - bound).std() / np.sqrt(count)
        if best:
            assert total.mean() == pytest.approx(bound.mean(), abs=margin)
            assert margin < 0.2
        else:
            assert total.mean() < bound.mean() / 2


def test_the_bound_by_hand():
    """Three free cells, the first beside both others, and one goal."""
    values = world.best_values(2, [3], 1, 2)  # cells 0 1 / 2 #: free 0, 1, 2
    assert values[1][0].tolist() == [0, 1, 1], "both neighbours of cell 0"
    assert values[1][1].tolist() == [1, 0, 0], "cell 2 is two steps from cell 1"
    assert values[2][1, 2] == 1
    assert values[2][0, 1] == pytest.approx(1.5), "then it appears at cell 0, one step away, or at cell 2, two"
    assert values[2][1, 0] == pytest.approx(2.0), "from cell 0 both are one step away"


@pytest.mark.parametrize("wrong", [dict(size=2, goals=3), dict(part="test"), dict(size=3, obstacles=6, goals=2)])
def test_what_cannot_be_is_one_clear_line(wrong):
    with pytest.raises(InputError, match=r"no room|not known"):
        world.vector(1, 0, **wrong)
