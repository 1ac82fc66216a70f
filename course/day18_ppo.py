"""Day 18 - Proximal policy optimisation: many steps on the same experience, none of them far; details decide.

Paper:     Schulman, Wolski, Dhariwal, Radford, Klimov 2017, "Proximal Policy Optimization Algorithms", arXiv
           1707.06347; Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage
           Estimation", ICLR
Task:      control MuJoCo's InvertedPendulum, HalfCheetah and Hopper, and CartPole (preset cpu: half an hour)
Shapes:    observations [N,D] -> means and log deviations [N,2A]; values [N]; rollouts [T,N]; minibatches [64,...]
Reference: CleanRL, 1 million steps, MuJoCo v4: InvertedPendulum 963, HalfCheetah 1,443, Hopper 2,383
Run:       python -m course.day18_ppo --preset cpu --seed 0
Departs:   1. the statistics that normalise observations change between rollouts, not within one, so that the policy
           that acts is the one that is improved; the first rollout passes as it is
           2. judged by the mean action on episodes of its own; the reference is of training episodes
           3. MuJoCo's v5, not v4; 4 environments with 512 steps a rollout, not 1 with 2,048; the pendulum gets
           200,000 steps, not 1 million: the reference is for orientation; one device in float32
"""

# %%
import dataclasses
import time
from dataclasses import replace
from functools import partial

import gymnasium
import keras
import numpy as np
import tensorflow as tf
from keras import layers

from course import core
from models.rl import curves, envs, evaluate, figures, policies, ppo, rollout
from models.rl.normalise import ReturnScaler, RunningNormalization
from models.rl.provenance import provenance
from models.rl.resume import Resume

REFERENCE = {
    "inverted_pendulum_return": (963.1, "", "CleanRL documentation, PPO, InvertedPendulum-v4, 1 M steps, 3 seeds"),
    "half_cheetah_return": (1442.6, "", "CleanRL documentation, PPO, HalfCheetah-v4, 1 M steps, 3 seeds"),
    "hopper_return": (2382.9, "", "CleanRL documentation, PPO, Hopper-v4, 1 M steps, 3 seeds"),
}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of networks, environments and draws; trial i adds 100 i
    trials: int = 3  # independent runs of each task, and of each arm of the ablation
    steps: int = 1_000_000  # of all environments together; the pendulum's and the pole's: a fifth
    tasks: tuple[str, ...] = ()  # of TASKS, by name; none: all of them
    ablation: str = "HalfCheetah-v5"  # environment in which the details are taken away one by one; "": no ablation
    ablation_steps: int = 300_000  # of each arm
    evaluated: int = 100  # episodes that judge a trained policy


PRESETS = {"smoke": dict(trials=1, steps=20_480, tasks=("inverted pendulum",), ablation="", evaluated=2),
           "cpu": dict(), "full": {}}  # fmt: skip


# %% [markdown]
# ## The details
# The paper's algorithm is eq. 4 below and a loop.  Its authors' code has besides what the paper hardly mentions; each
# detail is a field here, and the ablation takes them away one by one:
#
# - observations less their running mean, by their running deviation, cut at 10: inputs of order 1
# - rewards $r_t / \sqrt{\operatorname{Var}[G] + 10^{-8}}$ with $G_t = \gamma G_{t-1} + r_t$, cut at 10: returns of
#   order 1, whatever the task pays, so that one rate fits all; without it the clip of eq. 5 is far too narrow
# - advantages less their mean, by their deviation, in each minibatch: the step does not grow with the rewards
# - Adam's epsilon $10^{-5}$: a weight whose gradient is tiny is moved less than by the usual $10^{-7}$
# - annealing: the rate falls to zero, so that the noise of the last updates moves nothing far
# - gradient clipping: of one longer than 0.5 only the direction counts, and no minibatch throws the policy far
# - an orthogonal start, and value clipping: see below


# %%
@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to learn; the defaults are those of the authors' code for MuJoCo."""

    envs: int = 4  # environments side by side
    steps: int = 512  # of each of them a rollout
    epochs: int = 10  # passes over a rollout
    batch: int = 64  # steps a minibatch
    lr: float = 3e-4  # of Adam, at the start
    anneal: bool = True  # the rate falls to zero in a straight line
    adam_epsilon: float = 1e-5  # where Keras has 1e-7
    gamma: float = 0.99  # discount
    lam: float = 0.95  # lambda of eq. 2
    clip: float = 0.2  # epsilon of eq. 4
    value_clip: bool = True  # the same for the value, eq. 5
    value_weight: float = 0.5  # of the value's loss in eq. 6
    entropy_weight: float = 0.0  # of the entropy's
    clip_norm: float = 0.5  # the gradient's largest length
    target_kl: float = np.inf  # the update ends where the policy has moved further than 1.5 times this
    orthogonal: bool = True  # initial weights; else Glorot's
    normalise_advantages: bool = True  # within each minibatch
    normalise_observations: bool = True
    scale_rewards: bool = True  # by the deviation of the returns
    units: int = 64  # of each of the two hidden layers, in both networks


MUJOCO = Recipe()
POLE = Recipe(envs=8, steps=32, epochs=20, batch=256, lr=1e-3, gamma=0.98, lam=0.8, scale_rewards=False,
              normalise_observations=False, value_clip=False)  # V has 50 to go, not 0.2 at a time  # fmt: skip
A2C = replace(POLE, steps=5, epochs=1, batch=40, lam=1.0, clip=np.inf, normalise_advantages=False)
TASKS = {  # name -> environment, recipe, the steps' divisor
    "inverted pendulum": ("InvertedPendulum-v5", MUJOCO, 5), "half cheetah": ("HalfCheetah-v5", MUJOCO, 1),
    "hopper": ("Hopper-v5", MUJOCO, 1), "cart pole": ("CartPole-v1", POLE, 5),
    "cart pole, A2C": ("CartPole-v1", A2C, 5),
}  # fmt: skip
ABLATION = {label: replace(MUJOCO, **changes) for label, changes in {
    "all details": {}, "no observation normalisation": {"normalise_observations": False},
    "no value clipping": {"value_clip": False},  # which has to go with the scaling: compare the next arm with this one
    "no reward scaling, no value clipping": {"scale_rewards": False, "value_clip": False},
    "no advantage normalisation": {"normalise_advantages": False}, "no annealing": {"anneal": False},
    "no orthogonal initialisation": {"orthogonal": False}, "no gradient clipping": {"clip_norm": np.inf},
    "Adam's epsilon 1e-7": {"adam_epsilon": 1e-7}, "KL stop at 0.02": {"target_kl": 0.02}, "one epoch": {"epochs": 1},
    "no clipping of ratio and value": {"clip": np.inf, "value_clip": False},
}.items()}  # fmt: skip


# %% [markdown]
# ## Two networks
# The deviation of the actions is a weight, not a function of the state.  Orthogonal matrices keep the length of what
# passes through them; the gain of $\sqrt 2$ makes up for what the hidden layers take away, and the policy's last layer
# begins a hundred times smaller, so that every state starts with the same, undecided distribution.  Both networks see
# the observation through the same running statistics, which are part of them and are saved with them.


# %%
def build(recipe, size, kind, k):
    """(policy [B,D] -> [B,K] or [B,2K], value [B,D] -> [B,1]), which share their normalisation, if any."""
    first = [RunningNormalization()] if recipe.normalise_observations else []

    def network(outputs, gain, *head):
        def dense(units, gain, activation=None):
            start = keras.initializers.Orthogonal(gain) if recipe.orthogonal else "glorot_uniform"
            return layers.Dense(units, activation, kernel_initializer=start)

        hidden = [dense(recipe.units, 2**0.5, "tanh") for _ in range(2)]
        return keras.Sequential([keras.Input([size]), *first, *hidden, dense(outputs, gain), *head])

    head = [policies.GaussianHead()] if kind is policies.Gaussian else []
    return network(k, 0.01, *head), network(1, 1.0)


# %% [markdown]
# ## How good was an action?
# Day 16 waited for the end of the episode.  The critic's $V$ allows a judgement after one step, with its own error in
# it: $\delta_t = r_t + \gamma V(s_{t+1}) - V(s_t)$ (1).  In between lies the sum with weights that fall by $\lambda$,
#
# $$\hat A_t = \sum_{k \ge 0} (\gamma\lambda)^k\, \delta_{t+k} = \delta_t + \gamma\lambda\, \hat A_{t+1}, \qquad
#   \hat R_t = \hat A_t + V(s_t) \quad(2)$$
#
# $\lambda = 0$ is eq. 1, little noise and the critic's bias; $\lambda = 1$ the return less $V$, as on day 16.  The sum
# ends with the episode.  After a *terminated* one nothing follows, $V(s_{t+1}) = 0$; one that was *truncated*, by a
# limit of time, is worth $V$ of its last observation, which is not the next row of the rollout.


# %%
def advantages(rewards, terminated, truncated, values, last, final, gamma, lam):
    """Eq. 2, [T,N]: r_t, and whether step t ended its episode; values V(s_t), last [N] V(s_T), final V of a truncated
    episode's last observation (read only there)."""
    following = np.where(truncated, final, np.concatenate([values[1:], last[None]])) * ~terminated
    delta, found, ahead = rewards + gamma * following - values, np.zeros_like(values), 0.0
    for t in reversed(range(len(rewards))):
        found[t] = ahead = delta[t] + gamma * lam * ~(terminated | truncated)[t] * ahead
    return found


# %% [markdown]
# ## Many steps, none of them far
# A policy gradient holds for the policy that acted.  To use its experience $E$ times, weigh each action by how much
# likelier it has become,
#
# $$\rho_t(\theta) = \frac{\pi_\theta(a_t \mid s_t)}{\pi_{\text{old}}(a_t \mid s_t)} \quad(3), \qquad
#   L^\pi = -\mathbb{E}\bigl[\min\bigl(\rho_t \hat A_t,\; \operatorname{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon)
#   \hat A_t\bigr)\bigr] \quad(4)$$
#
# The minimum takes the incentive away beyond $1 \pm \epsilon$, on the side where the objective would gain, and only
# there: a step that went wrong can always be taken back.  The value is held near its old self in the same way, and the
# loss of a minibatch has three parts:
#
# $$L^V = \tfrac12 \mathbb{E}\bigl[\max\bigl((V - \hat R)^2, (V_{\text{old}} + \operatorname{clip}(V - V_{\text{old}},
#   -\epsilon, \epsilon) - \hat R)^2\bigr)\bigr] \;(5), \qquad L = L^\pi + c_V L^V - c_H H[\pi_\theta] \;(6)$$
#
# How far the policy has gone is logged: the share of clipped ratios, and the divergence
# $\mathrm{KL} \approx \mathbb{E}[\rho - 1 - \log \rho]$ (7), an estimate with the same mean as $-\log\rho$, which is
# never negative and varies less.  So is the explained variance $1 - \operatorname{Var}(\hat R - V) /
# \operatorname{Var}(\hat R)$ (8): 1 where the critic foresees the returns, 0 where it knows no more than their mean.


# %%
def losses(policy, value, kind, recipe, batch):
    """Eq. 6 of a minibatch, and what is logged.

    batch: observations [B,D], actions [B] or [B,A], and [B] each: log_probs and values, before the update, advantages
    and returns.
    """
    outputs, v, advantage = policy(batch["observations"]), value(batch["observations"])[:, 0], batch["advantages"]
    if recipe.normalise_advantages:
        advantage = (advantage - tf.reduce_mean(advantage)) / (tf.math.reduce_std(advantage) + 1e-8)
    # exercise: eqs. 3 to 7
    log_ratio = kind.log_prob(outputs, batch["actions"]) - batch["log_probs"]
    ratio = tf.exp(log_ratio)
    clipped = tf.clip_by_value(ratio, 1 - recipe.clip, 1 + recipe.clip)
    policy_loss = -tf.reduce_mean(tf.minimum(ratio * advantage, clipped * advantage))
    squares = (v - batch["returns"]) ** 2
    if recipe.value_clip:
        near = batch["values"] + tf.clip_by_value(v - batch["values"], -recipe.clip, recipe.clip)
        squares = tf.maximum(squares, (near - batch["returns"]) ** 2)
    value_loss, entropy = 0.5 * tf.reduce_mean(squares), tf.reduce_mean(kind.entropy(outputs))
    loss = policy_loss + recipe.value_weight * value_loss - recipe.entropy_weight * entropy
    # end exercise
    far = tf.reduce_mean(tf.cast(tf.abs(ratio - 1) > recipe.clip, tf.float32))
    return loss, {"approx_kl": tf.reduce_mean(ratio - 1 - log_ratio), "clip_fraction": far, "entropy": entropy,
                  "policy_loss": policy_loss, "value_loss": value_loss}  # fmt: skip


# %% [markdown]
# ## The loop
# Rollout, advantages, `epochs` passes in minibatches; all minibatches of an update are one compiled call, and acting is
# NumPy's, with noise drawn for the whole rollout.  Actions have no bounds for the policy and are clipped by the
# environment's own on the way in.  (Squashing by tanh instead needs the logarithm of its derivative in $\log\pi$.)
#
# With one epoch, one minibatch and no clipping, $\rho = 1$ and the gradient of eq. 4 is that of $\hat A \log \pi$: what
# is left is **A2C**.  It was at first A3C, whose environments ran in threads that sent gradients to common weights as
# they came, computed from weights that were no longer the same; to wait for all of them is simpler, and no worse.

# %%
LOGS = ("steps", "return", "approx_kl", "clip_fraction", "entropy", "policy_loss", "value_loss", "explained_variance",
        "updates", "seconds")  # fmt: skip


def examples(seen, rewards, forward, judge, kind, recipe):
    """A `Rollout` as the batch of `losses`, [T N, ...], and eq. 8; forward, judge: the networks that acted."""
    values, last, final = seen.values(lambda x: judge(x)[:, 0])
    advantage = advantages(rewards, seen.terminated, seen.truncated, values, last, final, recipe.gamma, recipe.lam)
    data = {"observations": seen.observations, "actions": seen.actions, "values": values, "advantages": advantage}
    data = {key: seen.flat(array) for key, array in (data | {"returns": advantage + values}).items()}
    data["log_probs"] = kind.log_prob(forward(data["observations"]), data["actions"]).numpy()
    return data, 1 - advantage.var() / (data["returns"].var() + 1e-12)


def learn(run, label, name, recipe, seed, steps):
    """Learn in the environment `name` for `steps` steps: the policy, its actions' space, logs [updates, len(LOGS)]."""
    core.runtime.seed(seed)
    env, rng, episodes = envs.vector(name, recipe.envs, seed), np.random.default_rng(seed), envs.Episodes(recipe.envs)
    (kind, k), size = policies.of(env.single_action_space), env.single_observation_space.shape[0]
    policy, value = build(recipe, size, kind, k)
    scaler, variables = ReturnScaler(recipe.envs, recipe.gamma), policy.trainable_variables + value.trainable_variables
    clip_norm = recipe.clip_norm if recipe.clip_norm < np.inf else None
    optimizer = keras.optimizers.Adam(recipe.lr, epsilon=recipe.adam_epsilon, global_clipnorm=clip_norm)
    loss = partial(losses, policy, value, kind, recipe)
    update = ppo.updater(loss, variables, optimizer, target_kl=recipe.target_kl, jit_compile=True)
    resume = Resume(run, label, None, seed=seed, envs=env, episodes=episodes, generators={"draws": rng}, policy=policy,
                    value=value, optimizer=optimizer, scaler=scaler)  # fmt: skip
    observation, logs, step = resume.begin(), list(resume.arrays.get("curve", [])), resume.step
    started = step
    while step < steps:
        began = time.perf_counter()
        forward, judge = ppo.as_numpy(policy), ppo.as_numpy(value)
        act = policies.acting(kind, forward, rng, recipe.steps, recipe.envs, k)
        seen = rollout.collect(env, act, observation, recipe.steps, episodes)
        rewards = scaler.scale(seen.rewards, seen.done) if recipe.scale_rewards else seen.rewards
        data, explained = examples(seen, rewards, forward, judge, kind, recipe)
        optimizer.learning_rate = recipe.lr * (max(0.0, 1 - step / steps) if recipe.anneal else 1)
        found = update(data, ppo.orders(rng, recipe.epochs, len(data["values"]), recipe.batch))
        if recipe.normalise_observations:
            policy.layers[0].update(seen.observations)
        compiling, observation, step = step == started, seen.following, step + len(data["values"])
        found |= {"return": np.mean([total for total, _ in seen.finished] or [np.nan]), "explained_variance": explained,
                  "steps": step, "seconds": np.nan if compiling else time.perf_counter() - began}  # fmt: skip
        logs.append([found[key] for key in LOGS])
        if len(logs) % 50 == 0:
            resume.save(step, observation, curve=np.array(logs))
    env.close()
    return policy, env.single_action_space, np.array(logs)


# %% [markdown]
# ## What came out
# Pendulum and pole stand to the end in every run.  Of three cheetahs two earn 1,762 and 1,795 and the third 5,042: a
# mean of three says little.  A2C, which uses each step but once, needs two to three times as many as PPO on the pole.
# (Where all returns are alike, as a standing pole's, eq. 8 divides nothing by nothing and means little.)
#
# Hold an arm of the ablation against "all details", and mind the deviations.  Clear of them: one epoch learns nothing
# in 300,000 steps, without normalised observations the return is less than half, without any clipping about half.
# Annealing costs return here, in so short a training; gradient clipping changes nothing that could be seen, and the
# stop at a KL of 0.02 never acts: the arm is the first one again, to the last digit.  Beside Stable-Baselines3:
# models/rl/README.md.


# %%
def trial(run, label, name, recipe, seed, steps, evaluated):
    """Learn, save the policy in the run's folder and judge it: JSON of its curves, its returns and its speed."""
    policy, space, logs = learn(run, label, name, recipe, seed, steps)
    with core.files.atomic_path(run.folder / "checkpoints" / label / "policy.keras") as path:
        policy.save(path)
    judged = evaluate.evaluate(policies.best(space, ppo.as_numpy(policy)), name, evaluated, (seed, 1))
    timed = logs[np.isfinite(logs[:, LOGS.index("seconds")]), LOGS.index("seconds")]  # all but those that compiled
    speed = recipe.envs * recipe.steps / np.median(timed) if len(timed) else np.nan
    print(f"{label}: mean return {judged['mean']:.1f}, {speed:,.0f} steps a second", flush=True)
    found = {column: curves.binned(values) for column, values in zip(LOGS, logs.T, strict=True)}
    return found | {"mean": judged["mean"], "steps_per_second": speed}


def several(run, cfg, label, name, recipe, steps):
    """The `trial`s of a task or an arm, one a seed."""
    calls = [partial(trial, run, f"{label}-{i}", name, recipe, cfg.seed + 100 * i, steps, cfg.evaluated)
             for i in range(cfg.trials)]  # fmt: skip
    return [run.once(f"{label}-{i}", call) for i, call in enumerate(calls)]


def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    if unknown := set(cfg.tasks) - set(TASKS):
        raise core.InputError(f"--tasks: there is no {', '.join(sorted(unknown))}: choose from {', '.join(TASKS)}")
    if cfg.steps < 5:
        raise core.InputError(f"--steps {cfg.steps}: some tasks get a fifth of them; give at least 5")
    if cfg.ablation:
        policies.require("--ablation", cfg.ablation)
    tasks = {label: (name, recipe, cfg.steps // divisor) for label, (name, recipe, divisor) in TASKS.items()
             if label in (cfg.tasks or TASKS)}  # fmt: skip
    arms = {label: (cfg.ablation, recipe, cfg.ablation_steps) for label, recipe in ABLATION.items() if cfg.ablation}
    with core.run("day18_ppo", core.alone(options), cfg) as run:
        done, taken = ({label: several(run, cfg, label, *one) for label, one in group.items()}
                       for group in (tasks, arms))  # fmt: skip
        rows, ablation = ([curves.row(label, *group[label][::2], runs) for label, runs in found.items()]
                          for group, found in ((tasks, done), (arms, taken)))  # fmt: skip
        chance = {name: evaluate.evaluate(evaluate.uniform(name, cfg.seed), name, cfg.evaluated, cfg.seed)["mean"]
                  for name in dict.fromkeys(name for name, _, _ in tasks.values())}  # fmt: skip
        for label, (name, _, _) in tasks.items():
            policy = keras.saving.load_model(run.folder / "checkpoints" / f"{label}-0" / "policy.keras")
            act = policies.best(gymnasium.make(name).action_space, ppo.as_numpy(policy))
            figures.film(run, label, act, name, cfg.seed, limit=300)
        note = "" if cfg.steps >= Config.steps else f"{cfg.steps} steps only"
        run.record["data"] = {name: provenance(name, note) for name in chance}
        run.record["tables"] = {"returns": [one | {"random": chance[one["environment"]]} for one in rows],
                                "ablation": ablation}  # fmt: skip
        run.record["history"] = {f"{label}, {column}": np.array([one[column] for one in runs], float).mean(axis=0)
                                 for label, runs in done.items() for column in LOGS[:-1]}  # fmt: skip
        kept = {"mean return": "return", "worst run": "worst_run", "steps_per_second": "steps_per_second"}
        run.record["metrics"] = {f"{figures.named(one['arm'])}_{key}": one[column] for column, key in kept.items()
                                 for one in rows if np.isfinite(one[column])}  # fmt: skip
        figures.learning(run, done)
        figures.ablation(run, ablation)
    return run.record


if __name__ == "__main__":
    core.cli(main)
