"""A second implementation on the same task: TF-Agents' DQN and PPO learn CartPole, each in a process of its own, and
ours beside them, with the same network, batches, learning rate and number of steps."""

import dataclasses
import json
from pathlib import Path

import pytest

from course import day17_dqn, day18_ppo
from course.core import experiment
from models.rl import dqn, envs, evaluate, policies, ppo
from tests import support

POLE = "CartPole-v1"


def our_dqn(folder, steps, seed=0):
    """Day 17's agent after 1,000 steps at random, then 256 steps and 128 updates in turns until `steps` are over."""
    agent = day17_dqn.Agent(at_once=128, epsilon=0.04)
    with envs.opened(POLE, day17_dqn.COPIES, seed) as env:
        loop = day17_dqn.schedule(agent, steps, 1_000, 0.16)
        run = experiment.Run(folder, {}, None)
        online, *_ = day17_dqn.learn(run, "dqn", agent, env, loop, seed=seed, capacity=50_000)
    return dqn.greedy(online)


def our_ppo(folder, steps, seed=0):
    """A policy after 1,000 steps and ten passes over them, all at once, in turns until `steps` are over."""
    recipe = dataclasses.replace(day18_ppo.MUJOCO, envs=1, steps=1_000, batch=1_000, lr=1e-3, anneal=False)
    policy, space, _ = day18_ppo.learn(experiment.Run(folder, {}, None), "ppo", POLE, recipe, seed, steps)
    return policies.best(space, ppo.as_numpy(policy))


@pytest.mark.slow
@pytest.mark.parametrize(("agent", "ours", "steps"), [("dqn", our_dqn, 30_000), ("ppo", our_ppo, 15_000)])
def test_tf_agents_and_ours_learn_cartpole(tmp_path, agent, ours, steps):
    done, _ = support.python(str(Path(__file__).with_name("tf_agents_cartpole.py")), agent, str(steps), "0")
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    mine = evaluate.evaluate(ours(tmp_path, steps), POLE, 20, 1)["mean"]
    print(f"{agent}: at random {found['at_random']:.0f}, TF-Agents {found['trained']:.0f}, ours {mine:.0f}")
    assert 10 < found["at_random"] < 40
    assert found["trained"] > 3 * found["at_random"]
    assert mine > 3 * found["at_random"]
