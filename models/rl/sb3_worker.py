"""What the benchmark compares with: Stable-Baselines3's DQN and PPO, set as its own documentation sets them.

Run by an environment of its own (benchmark-requirements.txt), which has nothing of this project's:
TASK SETTINGS, the latter as JSON.  Prints a line of JSON when it is ready; then, for each line with a number of steps
on its standard input, trains for so many and prints {"steps", "seconds", "updates"}, and the "returns" of `judged`
episodes where the settings ask for them.
"""

import json
import sys
import time

import ale_py
import gymnasium
import stable_baselines3
import torch
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.env_util import make_atari_env, make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

VECTORS = {"loop": DummyVecEnv, "processes": SubprocVecEnv}


def dqn(s):
    """Atari from pixels: `s.every` steps of all environments together for an update, as `models.rl.dqn` counts them."""
    env = make_atari_env(s["env"], s["envs"], seed=0, vec_env_cls=VECTORS[s["vector"]],
                         env_kwargs={"frameskip": 1, "repeat_action_probability": 0.0})  # fmt: skip
    # train_freq counts steps of the whole vector: one of them, and as many updates as the ratio then wants
    return DQN("CnnPolicy", VecFrameStack(env, 4), learning_rate=1e-4, buffer_size=s["capacity"], batch_size=s["batch"],
               learning_starts=s["warmup"], train_freq=1, gradient_steps=s["envs"] // s["every"],
               target_update_interval=s["target_every"] * s["every"], exploration_initial_eps=s["epsilon"],
               exploration_final_eps=s["epsilon"], max_grad_norm=10, seed=0, device="cpu")  # fmt: skip


def ppo(s):
    """MuJoCo: observations and rewards normalised, and the details that day 18 has (its policy and value networks have
    two hidden layers of 64, as here by default)."""
    env = make_vec_env(s["env"], s["envs"], seed=s["seed"], vec_env_cls=VECTORS[s["vector"]])
    return PPO("MlpPolicy", VecNormalize(env, gamma=s["gamma"]), n_steps=s["steps"], batch_size=s["batch"],
               n_epochs=s["epochs"], learning_rate=lambda left: s["lr"] * (left if s["anneal"] else 1),
               policy_kwargs={"optimizer_kwargs": {"eps": s["adam_epsilon"]}}, gamma=s["gamma"], gae_lambda=s["lam"],
               clip_range=s["clip"], clip_range_vf=s["clip"], ent_coef=s["entropy_weight"],
               vf_coef=s["value_weight"] / 2,  # of the squared error; day 18 weighs half of it
               max_grad_norm=s["clip_norm"], seed=s["seed"], device="cpu")  # fmt: skip


def judge(model, s):
    """Returns of `s.judged` episodes of the mean action, the statistics of the observations held as they are."""
    env = VecNormalize(make_vec_env(s["env"], 10, seed=s["seed"] + 1), training=False, norm_reward=False)
    env.obs_rms = model.get_env().obs_rms
    returns, _ = evaluate_policy(model, env, s["judged"], deterministic=True, return_episode_rewards=True)
    return returns


def main(task, settings):
    torch.set_num_threads(settings["threads"])
    model = {"dqn": dqn, "ppo": ppo}[task](settings)
    trained = model.q_net if task == "dqn" else model.policy
    an_update = 1 if task == "dqn" else settings["steps"] * settings["envs"] // settings["batch"]  # PPO counts epochs
    versions = {module.__name__: module.__version__ for module in (stable_baselines3, torch, gymnasium, ale_py)}
    print(json.dumps({"parameters": sum(p.numel() for p in trained.parameters()), "versions": versions}), flush=True)
    for line in sys.stdin:
        steps, updates = model.num_timesteps, model._n_updates
        began = time.perf_counter()
        model.learn(int(line), reset_num_timesteps=False)
        seconds = time.perf_counter() - began
        done = {"steps": model.num_timesteps - steps, "seconds": seconds,
                "updates": (model._n_updates - updates) * an_update}  # fmt: skip
        if settings.get("judged"):
            done["returns"] = judge(model, settings)
        print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
