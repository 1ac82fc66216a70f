"""TF-Agents' DQN or PPO on Gymnasium's CartPole-v1, in a process of its own: it needs Keras 2 and a module named gym.

python tests/tf_agents_cartpole.py dqn 30000 0   (steps, seed) -> a line of JSON: returns at random and trained, seconds
"""
# ruff: noqa: E402 - two things must be so before TF-Agents is imported

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"  # before TensorFlow is imported

import json
import sys
import time

import gymnasium
import numpy as np
import tensorflow as tf

sys.modules["gym"], sys.modules["gym.spaces"] = gymnasium, gymnasium.spaces  # what TF-Agents imports by that name

import tf_keras
from tf_agents.agents.dqn import dqn_agent
from tf_agents.agents.ppo import ppo_clip_agent
from tf_agents.environments import batched_py_environment, py_environment, tf_py_environment
from tf_agents.networks import actor_distribution_network, q_network, value_network
from tf_agents.policies import random_tf_policy
from tf_agents.replay_buffers import tf_uniform_replay_buffer
from tf_agents.specs import array_spec
from tf_agents.trajectories import time_step, trajectory
from tf_agents.utils import common


class CartPole(py_environment.PyEnvironment):
    """Gymnasium's CartPole-v1 as TF-Agents wants an environment; truncation keeps the discount, termination ends it."""

    def __init__(self, seed):
        super().__init__()
        self.env, self.first = gymnasium.make("CartPole-v1"), seed

    def action_spec(self):
        return array_spec.BoundedArraySpec((), np.int64, 0, 1, "action")

    def observation_spec(self):
        return array_spec.ArraySpec((4,), np.float32, "observation")

    def _reset(self):
        obs, _ = self.env.reset(seed=self.first)
        self.first = None
        return time_step.restart(obs)

    def _step(self, action):
        if self.current_time_step().is_last():
            return self.reset()
        obs, reward, terminated, truncated, _ = self.env.step(int(action))
        if terminated:
            return time_step.termination(obs, reward)
        return time_step.truncation(obs, reward) if truncated else time_step.transition(obs, reward)


def environment(seed, copies=1):
    """`copies` of CartPole side by side, one after another in the same thread."""
    several = [CartPole(1_000 * seed + i) for i in range(copies)]
    return tf_py_environment.TFPyEnvironment(batched_py_environment.BatchedPyEnvironment(several, False))


def mean_return(env, policy, episodes=20):
    """Mean return of a policy over whole episodes."""
    act, total = common.function(policy.action), 0.0
    for _ in range(episodes):
        step = env.reset()
        while not step.is_last():
            step = env.step(act(step).action)
            total += float(step.reward[0])
    return total / episodes


def collect(env, act, buffer, step, count):
    """`count` steps of all copies together into the replay buffer; returns the time step to go on from."""
    for _ in range(count // env.batch_size):
        chosen = act(step)
        following = env.step(chosen.action)
        buffer.add_batch(trajectory.from_transition(step, chosen, following))
        step = following
    return step


def memory(agent, env, capacity):
    return tf_uniform_replay_buffer.TFUniformReplayBuffer(
        agent.collect_data_spec, env.batch_size, capacity // env.batch_size
    )


def train_dqn(seed, steps):
    """1,000 steps at random, then 256 steps and 128 updates in turns until `steps` are over; the trained policy."""
    env, first, turn, updates = environment(seed, 8), 1_000, 256, 128
    turns = (steps - first) // turn
    network = q_network.QNetwork(env.observation_spec(), env.action_spec(), fc_layer_params=(256, 256))
    lr = tf_keras.optimizers.schedules.PolynomialDecay(2.3e-3, turns * updates, 0.0)
    optimizer, epsilon = tf_keras.optimizers.Adam(lr, epsilon=1e-5, global_clipnorm=10.0), tf.Variable(1.0)
    agent = dqn_agent.DqnAgent(
        env.time_step_spec(), env.action_spec(), q_network=network, optimizer=optimizer,
        epsilon_greedy=epsilon.read_value, td_errors_loss_fn=common.element_wise_huber_loss,
        target_update_period=128, gamma=0.99,
    )  # fmt: skip
    agent.initialize()
    optimizer.build(network.trainable_weights)  # a loop in a graph can make no variables
    buffer = memory(agent, env, 50_000)
    batches = iter(buffer.as_dataset(sample_batch_size=64, num_steps=2))
    act, train = common.function(agent.collect_policy.action), common.function(agent.train)

    @tf.function
    def learn():
        for _ in tf.range(updates):
            train(next(batches)[0])

    step = collect(env, act, buffer, env.reset(), first)
    for i in range(turns):
        epsilon.assign(0.04 + 0.96 * max(0.0, 1 - i * turn / (0.16 * steps)))
        step = collect(env, act, buffer, step, turn)
        learn()
    return agent.policy


def train_ppo(seed, steps):
    """1,000 steps and ten passes over them in turns until `steps` are over; the trained policy."""
    env = environment(seed)
    agent = ppo_clip_agent.PPOClipAgent(
        env.time_step_spec(), env.action_spec(), optimizer=tf_keras.optimizers.Adam(1e-3), num_epochs=10,
        actor_net=actor_distribution_network.ActorDistributionNetwork(
            env.observation_spec(), env.action_spec(), fc_layer_params=(64, 64)),
        value_net=value_network.ValueNetwork(env.observation_spec(), fc_layer_params=(64, 64)),
        discount_factor=0.99, lambda_value=0.95, importance_ratio_clipping=0.2,
    )  # fmt: skip
    agent.initialize()
    agent.train = common.function(agent.train)
    buffer = memory(agent, env, 1_001)
    act, step = common.function(agent.collect_policy.action), env.reset()
    for _ in range(steps // 1_000):
        step = collect(env, act, buffer, step, 1_000)
        agent.train(experience=buffer.gather_all())
        buffer.clear()
    return agent.policy


if __name__ == "__main__":
    began, (kind, steps, seed) = time.perf_counter(), (sys.argv[1], *map(int, sys.argv[2:]))
    tf_keras.utils.set_random_seed(seed)
    judging = environment(seed + 1)
    first = mean_return(judging, random_tf_policy.RandomTFPolicy(judging.time_step_spec(), judging.action_spec()))
    last = mean_return(judging, {"dqn": train_dqn, "ppo": train_ppo}[kind](seed, steps))
    print(json.dumps({"at_random": first, "trained": last, "seconds": time.perf_counter() - began}))
