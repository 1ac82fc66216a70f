"""Day 16 - Policy gradients: likelier actions that turned out well; what they are compared with decides the noise.

Paper:     Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning",
           Machine Learning 8; Sutton, McAllester, Singh, Mansour 1999, "Policy Gradient Methods for Reinforcement
           Learning with Function Approximation", NeurIPS
Task:      learn to balance, from returns alone: CartPole (push left or right), InvertedPendulum (push by any force)
Shapes:    observations [N,4] -> logits [N,2], or mean and log deviation [N,2]; episodes [T,N]; weights of eq. 3 [T,N]
Reference: CartPole-v1 counts as solved at a mean return of 475 over 100 episodes (Gymnasium's specification)
Run:       python -m course.day16_reinforce --preset cpu --seed 0
Departs:   1. the factor gamma^t before each step of the discounted gradient is left out, as is usual: late steps count
           2. Adam in place of plain gradient ascent; one device in float32, whatever is asked for
"""

# %%
import dataclasses
from functools import partial

import gymnasium
import keras
import numpy as np
import tensorflow as tf
from keras import layers

from course import core
from models.rl import envs, evaluate, figures, policies, ppo, rollout
from models.rl.provenance import provenance

REFERENCE = {"evaluation_return": (475.0, "", "Gymnasium 1.4, specification of CartPole-v1, reward_threshold: solved")}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the networks, the environments and the draws; trial i adds 100 i
    trials: int = 5  # independent runs of each arm
    arms: tuple[str, ...] = ()  # of ARMS, by name; none: all of them
    episodes: int = 16  # an update's batch, played side by side
    updates: int = 100  # of the policy
    gamma: float = 0.99  # discount
    lr: float = 0.005  # of Adam, for policy and baseline
    fit_steps: int = 10  # of the baseline a batch, on the whole batch
    units: int = 64  # of each of the two hidden layers, in both networks
    snapshots: tuple[int, ...] = (0, 5, 10, 15, 20)  # updates before which the gradient's variance is measured
    measured: int = 1_000  # episodes it is measured on
    evaluated: int = 100  # episodes that judge a trained policy
    continuous: str = "InvertedPendulum-v5"  # the task for the Gaussian policy
    continuous_trials: int = 3  # independent runs on it
    limit: int = 1_000  # steps after which an episode is cut, if the environment has not done so
    exports: str = dataclasses.field(default="exports", metadata={"where": True})  # folder that it is exported to


PRESETS = {"smoke": dict(trials=1, arms=("learned V",), episodes=4, updates=3, fit_steps=2, units=8, snapshots=(1,),
                         measured=8, evaluated=2, continuous_trials=1), "cpu": dict(), "full": {}}  # fmt: skip


# %% [markdown]
# ## A policy is a distribution
# Nobody says which action was right; there is only a number at the end.  So the policy $\pi_\theta(a \mid s)$ draws its
# actions, and those that went well are made likelier.  A network turns the state into the parameters of a distribution:
# logits for a choice of $K$ actions; mean and deviation of a normal for a force.  The deviation does not depend on the
# state here: it is how much is tried out, and shrinks as the policy gets sure.
#
# `models/rl/policies.py` has both, with $\log \pi$ and the entropy of each.  Draws are made from noise that is drawn
# beforehand: $\arg\max_k (\ell_k + g_k)$ with $g$ from a Gumbel distribution is a draw from softmax($\ell$), and
# $\mu + \sigma \varepsilon$ one from the normal.  NumPy acts: a compiled call takes ten times as long as the products.


# %%
def network(size, units, outputs, *head):
    """Observations [B, size] -> [B, outputs], or what `head` makes of that, over two hidden layers."""
    hidden = [layers.Dense(units, "tanh"), layers.Dense(units, "tanh")]
    return keras.Sequential([keras.Input([size]), *hidden, layers.Dense(outputs), *head])


# %% [markdown]
# ## The gradient of what cannot be differentiated
# Wanted is the gradient of the expected return $J(\theta) = \mathbb{E}_{\tau \sim \pi_\theta}[R(\tau)]$, but $R$
# depends on $\theta$ only through what gets drawn.  The *score function* moves the derivative to what can be computed:
#
# $$\nabla \mathbb{E}[R] = \int R \,\nabla p_\theta = \int R \,p_\theta \nabla \log p_\theta
#   = \mathbb{E}\bigl[R(\tau) \nabla \log p_\theta(\tau)\bigr], \qquad
#   \nabla \log p_\theta(\tau) = \sum_t \nabla \log \pi_\theta(a_t \mid s_t) \quad(1)$$
#
# for the world's own probabilities do not depend on $\theta$.  With $R = 1$ the same line says that the score has mean
# zero, $\mathbb{E}[\nabla \log \pi_\theta(a \mid s)] = 0$ (2).  So what is known before $a_t$ is drawn may be added to
# the weight of $a_t$, or taken from it, without a change of the mean, and what is noise in it should be taken away:
#
# $$\nabla J \approx \frac1N \sum_{n=1}^N \sum_t \nabla \log \pi_\theta(a_t \mid s_t)\, \Psi_t, \qquad
#   \Psi_t = R \;\to\; G_t = \sum_{k \ge 0} \gamma^k r_{t+k} \;\to\; G_t - b \;\to\; G_t - V(s_t) \quad(3)$$
#
# with the episode's whole discounted return $R = G_0$ first.  Then the reward of the past goes (*reward-to-go*), then
# the mean of what was to be expected anyway (a *baseline* $b$: a running mean, or a network $V(s_t)$ that is fitted to
# the returns).  For a step at $t$ the whole return counts the future at $\gamma^t G_t$: see Departs 1.
#
# CartPole is cut at 500 steps.  The pole still stands there: $G$ must not end in zero but in what would have followed,
# $G_T = V(s_T)$ (4).  Else the last steps before the limit look bad, and $V$, which sees the pole and not the clock,
# cannot know why.


# %%
def returns_to_go(rewards, mask, final, gamma):
    """G_t of eq. 3: rewards, mask [T, N] -> [T, N], 0 after the end; final [N]: what follows the last step, eq. 4."""
    returns, ahead = np.zeros_like(rewards), np.asarray(final, rewards.dtype)
    for t in reversed(range(len(rewards))):
        ahead = np.where(mask[t] > 0, rewards[t] + gamma * ahead, ahead)
        returns[t] = ahead * mask[t]
    return returns


def weights(kind, batch, returns, mean, judge):
    """Psi_t of eq. 3, [T, N], 0 after the end; mean: the running mean; judge: observations [B, ...] -> V [B, 1]."""
    if kind == "whole return":  # R: all that was received before t is counted as well
        return returns[0] * batch.mask
    if kind == "reward to go":
        return returns
    if kind == "running mean":
        return (returns - mean) * batch.mask
    observations = batch.observations
    expected = judge(observations.reshape(-1, *observations.shape[2:])).reshape(returns.shape)
    return (returns - expected) * batch.mask


def surrogate(policy, kind, observations, actions, psi, episodes, bonus):
    """A scalar whose gradient is eq. 3's, with the sign of a loss; `bonus` times the entropy is added to the gain.

    Rows are the steps of all `episodes`: observations [B, ...], actions [B, ...], psi [B].  The entropy's gradient
    keeps the policy from being sure too early.  Returns the mean entropy as well.
    """
    outputs = policy(observations)
    gain = kind.log_prob(outputs, actions) * psi + bonus * kind.entropy(outputs)
    return -tf.reduce_sum(gain) / episodes, tf.reduce_mean(kind.entropy(outputs))


# %% [markdown]
# ## The loop
# Play a batch of whole episodes, weigh every step, take one step of the policy, throw the batch away: eq. 1 holds for
# actions that the present policy drew, and for no others.  The baseline is fitted after the policy's step: before, it
# would know the outcome of the very actions that it is subtracted from, and eq. 2 would not apply.


# %%
@dataclasses.dataclass(frozen=True)
class Arm:
    """What a run may do otherwise."""

    psi: str = "learned V"  # the weights: see `weights`
    bootstrap: bool = True  # eq. 4, which needs a learned V
    bonus: float = 0.0  # times the entropy


ARMS = {
    "no baseline": Arm("reward to go", bootstrap=False), "running mean": Arm("running mean", bootstrap=False),
    "learned V, cut is 0": Arm(bootstrap=False), "learned V": Arm(), "learned V, entropy": Arm(bonus=0.3),
}  # fmt: skip


def learn(cfg, name, arm, seed, updates, snapshots=()):
    """REINFORCE on the environment `name`: policy, action space, history by update, rows of `spread` at `snapshots`."""
    core.runtime.seed(seed)
    rng, env = np.random.default_rng(seed), envs.vector(name, cfg.episodes, seed)
    (kind, k), size = policies.of(env.single_action_space), env.single_observation_space.shape[0]
    policy = network(size, cfg.units, k, *([policies.GaussianHead()] if kind is policies.Gaussian else []))
    baseline, mean = network(size, cfg.units, 1), 0.0
    improve, regress = compiled_steps(cfg, policy, baseline, kind, arm.bonus)
    history, measured = {"return": [], "entropy": [], "value_error": []}, []
    for update in range(updates):
        forward, judge = ppo.as_numpy(policy), ppo.as_numpy(baseline)
        if update in snapshots:
            act = policies.acting(kind, forward, np.random.default_rng((seed, update)), cfg.limit, cfg.measured, k)
            table = spread(cfg, name, act, mean, judge, policy, kind)
            measured += [{"updates": update, **row} for row in table]
        act = policies.acting(kind, forward, rng, cfg.limit, cfg.episodes, k)
        batch = rollout.play(env, act, cfg.limit)
        final = judge(batch.last)[:, 0] * (batch.truncated & arm.bootstrap)
        returns = returns_to_go(batch.rewards, batch.mask, final, cfg.gamma)
        entropy = improve(*rows(batch, weights(arm.psi, batch, returns, mean, judge)))
        error = regress(*rows(batch, returns)[::2]) if arm.psi == "learned V" else 0.0
        level = returns.sum() / batch.mask.sum()
        mean = 0.9 * mean + 0.1 * level if update else level
        for key, number in zip(history, (batch.rewards.sum(axis=0).mean(), entropy, error), strict=True):
            history[key].append(float(number))
    env.close()
    return policy, env.single_action_space, history, measured


def rows(batch, *values):
    """The steps that were played, one a row: observations [B, ...], actions [B, ...] and each of `values` as [B]."""
    alive = batch.mask > 0
    return [tf.constant(array[alive]) for array in (batch.observations, batch.actions, *values)]


def compiled_steps(cfg, policy, baseline, kind, bonus):
    """(improve, regress): one step of Adam by eq. 3, and `fit_steps` on the baseline's squared error."""
    one, two = (keras.optimizers.Adam(cfg.lr) for _ in range(2))
    one.build(policy.trainable_variables)
    two.build(baseline.trainable_variables)

    @tf.function(reduce_retracing=True)
    def improve(observations, actions, psi):
        with tf.GradientTape() as tape:
            loss, entropy = surrogate(policy, kind, observations, actions, psi, cfg.episodes, bonus)
        one.apply(tape.gradient(loss, policy.trainable_variables), policy.trainable_variables)
        return entropy

    @tf.function(reduce_retracing=True)
    def regress(observations, returns):
        error = tf.constant(0.0)
        for _ in tf.range(cfg.fit_steps):
            with tf.GradientTape() as tape:
                error = tf.reduce_mean((baseline(observations)[:, 0] - returns) ** 2)
            two.apply(tape.gradient(error, baseline.trainable_variables), baseline.trainable_variables)
        return error

    return improve, regress


# %% [markdown]
# ## How noisy is the gradient?
# One policy, $M$ episodes, eq. 3 for each of them alone: the vectors $g_n$ spread about their mean $\bar g$ with the
# variance $\mathrm{tr}\,\mathrm{Cov}[g]$.  All four weights are tried on the same episodes, with the baselines that the
# training has come to (before its first update: 0, and a $V$ of random weights).  The variance over the squared length
# of the true gradient says how many episodes a batch needs to see a direction at all.  That of $\bar g$ is too long, by
# its own noise, and the noise has to be taken off: $\lVert \nabla J \rVert^2 \approx \lVert \bar g \rVert^2 -
# \mathrm{tr}\,\mathrm{Cov}[g] / M$ (5); where that is not positive, $M$ episodes show no gradient, and there is no
# figure.  The cosine is between a mean and that of the reward to go.  With baselines they estimate one gradient; with
# the whole return the one in which step $t$ counts $\gamma^t$.

# %%
WEIGHTS = ("whole return", "reward to go", "running mean", "learned V")


def spread(cfg, name, act, mean, judge, policy, kind):
    """Rows, one a choice of weights: the variance of an episode's gradient, as such and against the mean."""
    with envs.opened(name, cfg.measured, cfg.seed) as many:
        batch = rollout.play(many, act, cfg.limit)
    final = judge(batch.last)[:, 0] * batch.truncated
    returns = returns_to_go(batch.rewards, batch.mask, final, cfg.gamma)

    @tf.function(reduce_retracing=True)
    def gradient(observations, actions, psi):
        with tf.GradientTape() as tape:
            loss, _ = surrogate(policy, kind, observations, actions, psi, 1, 0.0)
        return tf.concat([tf.reshape(part, [-1]) for part in tape.gradient(loss, policy.trainable_variables)], axis=0)

    found = {}
    for choice in WEIGHTS:
        psi = weights(choice, batch, returns, mean, judge)
        parts = [(batch.observations[:end, n], batch.actions[:end, n], psi[:end, n])
                 for n, end in enumerate(batch.lengths)]  # fmt: skip
        found[choice] = np.stack([gradient(*map(tf.constant, part)) for part in parts]).astype(np.float64)
    means = {choice: gradients.mean(axis=0) for choice, gradients in found.items()}
    variance = {choice: gradients.var(axis=0, ddof=1).sum() for choice, gradients in found.items()}
    norm = {choice: np.linalg.norm(value) for choice, value in means.items()}
    usual = "reward to go"
    square = {choice: norm[choice] ** 2 - variance[choice] / cfg.measured for choice in WEIGHTS}  # eq. 5
    return [{
        "mean length": batch.lengths.mean(), "weights": choice, "variance": variance[choice],
        "ratio": variance[choice] / variance[usual],
        "over signal": variance[choice] / square[choice] if square[choice] > 0 else None,
        "cosine": means[choice] @ means[usual] / (norm[choice] * norm[usual]),
    } for choice in WEIGHTS]  # fmt: skip


# %% [markdown]
# ## What came out
# With a learned $V$ all five policies stand for 500 of 500 steps in 100 episodes of their own. Without a baseline each
# had a batch that was solved, and lost it again: 391 in the mean, 187 in the worst run (running mean: 461, 304). With
# eq. 4, once $V$ fits, a policy that never falls finds no advantage in anything, and rests; without a baseline its
# returns, all large and alike, push it about. Before update 10, about 6 episodes show the direction with $V$, 10 with
# the running mean, 27 with the reward to go, 1,070 with the whole return: the better the policy, the more is noise.


# %%
def trial(run, cfg, name, label, arm, number, snapshots):
    """Train one policy, save it in the run's folder and judge it: JSON of its history and its returns."""
    policy, space, history, measured = learn(cfg, name, arm, cfg.seed + 100 * number, cfg.updates, snapshots)
    with core.files.atomic_path(saved(run, label, number)) as path:
        policy.save(path)
    act = policies.best(space, ppo.as_numpy(policy))
    judged = evaluate.evaluate(act, name, cfg.evaluated, (cfg.seed, number, 1))
    print(f"{name}, {label}, run {number}: mean return {judged['mean']:.1f}", flush=True)
    return {"history": history, "measured": measured, "returns": judged["returns"], "mean": judged["mean"]}


def saved(run, label, number):
    """Where the policy of a finished trial is kept, until the run ends."""
    return run.folder / "checkpoints" / f"{label}-{number}.keras"


def several(run, cfg, name, label, arm, count, snapshots=()):
    """The `trial`s of an arm; the gradient is measured in the first one."""
    calls = [partial(trial, run, cfg, name, label, arm, i, () if i else snapshots) for i in range(count)]
    return [run.once(f"{label}-{i}", call) for i, call in enumerate(calls)]


def table(name, arms):
    """Rows, one an arm: mean return of the trained policies, the worst, and how many had a batch that was solved."""
    rows, solved = [], envs.specification(name).reward_threshold
    for label, runs in arms.items():
        means, best = [one["mean"] for one in runs], [max(one["history"]["return"]) for one in runs]
        rows.append({"task": name, "arm": label, "runs": len(runs), "mean return": np.mean(means),
                     "worst run": min(means),
                     "runs with a solved batch": sum(np.array(best) >= solved) if solved else None})  # fmt: skip
    return rows


def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    if unknown := set(cfg.arms) - set(ARMS):
        raise core.InputError(f"--arms: there is no {', '.join(sorted(unknown))}: choose from {', '.join(ARMS)}")
    if [*cfg.snapshots] != sorted({*cfg.snapshots}) or not 0 <= min(cfg.snapshots) <= max(cfg.snapshots) < cfg.updates:
        raise core.InputError(f"--snapshots {cfg.snapshots}: give rising numbers from 0 to --updates less 1")
    policies.require("--continuous", cfg.continuous, policies.Gaussian)
    usual, pole = "learned V", "CartPole-v1"
    chosen = [label for label in ARMS if label in (cfg.arms or ARMS) or label == usual]
    with core.run("day16_reinforce", core.alone(options), cfg) as run:
        arms = {label: several(run, cfg, pole, label, ARMS[label], cfg.trials,
                               cfg.snapshots if label == usual else ()) for label in chosen}  # fmt: skip
        force = several(run, cfg, cfg.continuous, "continuous", ARMS[usual], cfg.continuous_trials)
        chance = evaluate.evaluate(evaluate.uniform(pole, cfg.seed), pole, cfg.evaluated, cfg.seed)["mean"]
        policy, measured = keras.saving.load_model(saved(run, usual, 0)), arms[usual][0]["measured"]
        act = policies.best(gymnasium.make(pole).action_space, ppo.as_numpy(policy))
        evaluate.film(act, pole, run.picture("episode.gif"), cfg.seed)
        trial_only = "" if cfg.updates >= Config.updates else f"{cfg.updates} updates only"
        run.record["data"] = {name: provenance(name, trial_only) for name in (pole, cfg.continuous)}
        rows = table(pole, arms) + table(cfg.continuous, {usual: force})
        run.record["tables"] = {"arms": rows, "gradient": measured}
        curves = {label: [one["history"]["return"] for one in runs] for label, runs in arms.items()}
        run.record["history"] = {f"{label}, return": np.mean(runs, axis=0).tolist() for label, runs in curves.items()}
        of = {row["arm"]: row for row in rows[:-1]}
        middle = cfg.snapshots[len(cfg.snapshots) // 2]  # later there is hardly a gradient left
        noise = {row["weights"]: row["ratio"] for row in measured if row["updates"] == middle}
        run.record["metrics"] = {
            "evaluation_return": of[usual]["mean return"], "evaluation_return_worst_run": of[usual]["worst run"],
            **{f"gradient_variance_ratio_{figures.named(choice)}": noise[choice]
               for choice in ("learned V", "running mean", "whole return")},
            "random_return": chance, "continuous_return": rows[-1]["mean return"],
            "continuous_return_worst_run": rows[-1]["worst run"],
            **{f"return_{figures.named(label)}": of[label]["mean return"] for label in chosen},
        }  # fmt: skip
        force = {usual: [one["history"]["return"] for one in force]}
        figures.reinforce(run, {pole: curves, cfg.continuous: force}, measured, cfg.snapshots)
    evaluate.export_policy(policy, "day16_reinforce", pole, cfg.exports, policy=act, labels=["left", "right"],
                           seed=cfg.seed)  # fmt: skip
    return run.record


if __name__ == "__main__":
    core.cli(main)
