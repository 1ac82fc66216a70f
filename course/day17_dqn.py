"""Day 17 - Deep Q-learning: values learned from memory, from the pixels of an Atari game, and what each mend mends.

Paper:     Mnih et al. 2015, "Human-level control through deep reinforcement learning", Nature 518, 529-533; van
           Hasselt, Guez, Silver 2016, arXiv:1509.06461; Wang et al. 2016, arXiv:1511.06581; Schaul et al. 2016,
           arXiv:1511.05952; n steps: Hessel et al. 2018, "Rainbow", arXiv:1710.02298
Task:      Pong from its pixels; CartPole from its four numbers, with the switches one by one
Shapes:    frames uint8 [B,4,84,84] (or numbers [B,4]) -> Q [B,actions]; targets and errors [B]
Reference: Pong: 20.25 +- 0.41 at 10 million steps (CleanRL); CartPole-v1 is solved at a mean return of 475
Run:       python -m course.day17_dqn --preset cpu --seed 0
Departs:   1. Adam with a learning rate that falls to 0, not RMSProp; gradients clipped to a norm of 10
           2. eight games side by side; the cpu preset has all switches on, and makes its updates count with fewer steps
           3. no sticky actions; a game starts with 0 to 29 frames of no-ops, then FIRE, which after a lost life is left
              to the agent; dueling's gradient is not rescaled; one device in float32, whatever is asked for

Preset cpu plays Pong and compares some switches on CartPole, in 70 minutes on two cores; preset cartpole compares both
losses, learning rates, clipping and Polyak averaging too, in half an hour.  So that a run can be resumed, its
buffer is on disk until it ends: 0.7 GB (full: 7 GB), for moments twice.
"""

# %%
import dataclasses
from functools import partial

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from course import core
from models.rl import atari, dqn, envs, evaluate, figures
from models.rl.provenance import provenance
from models.rl.replay import Replay

REFERENCE = {"score": (20.25, "points", "CleanRL documentation, dqn_atari.py, 10 million steps: ALE Pong-v5's ROM, v4")}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the networks, the environments and the draws; trial i adds 100 i
    game: str = "ALE/Pong-v5"  # Atari game; empty: CartPole alone
    game_arm: str = "DQN"  # switches with which it is learned: one of ARMS
    steps: int = 10_000_000  # decisions, four frames each, of all copies of the game together
    capacity: int = 1_000_000  # frames remembered
    warmup: int = 80_000  # decisions at random before the first update
    explore: float = 0.1  # share of the decisions in which epsilon falls
    lr: float = 1e-4  # of Adam, in the game
    target_every: int = 250  # updates between copies to the target network
    evaluated: int = 30  # games that judge a policy, each begun with up to 29 frames of no-ops
    game_epsilon: float = 0.05  # share of random actions in these games, as in the paper
    arms: tuple[str, ...] = ()  # on CartPole, of ARMS; none: all of them
    trials: int = 3  # runs of each
    cartpole_steps: int = 60_000  # of each
    cartpole_evaluated: int = 100  # episodes that judge a policy there
    exports: str = dataclasses.field(default="exports", metadata={"where": True})  # folder that the policy goes to


PRESETS = {
    "smoke": dict(game="", arms=("DQN", "all"), trials=1, cartpole_steps=3_000, cartpole_evaluated=4),
    "cartpole": dict(game=""),
    "cpu": dict(game_arm="all", steps=450_000, capacity=100_000, warmup=5_000, explore=0.2, lr=2.5e-4,
                target_every=500, arms=("DQN", "double", "dueling", "prioritised", "3 steps", "all", "no target")),
    "full": {},
}  # fmt: skip


# %% [markdown]
# ## Learning a value from other values
# $Q(s, a)$ is what action $a$ is worth in state $s$: the reward, and from there on the best there is.  So Bellman's
# equation says what it has to equal, and a network $Q_\theta$ is trained towards that:
#
# $$y = r + \gamma \max_{a'} Q_{\theta^-}(s', a') \quad(1), \qquad L = H\bigl(y - Q_\theta(s, a)\bigr) \quad(2)$$
#
# The target moves with what is trained, and steps in a row resemble each other; both can make it diverge.  Mnih et al.
# made it work by two things: the transitions $(s, a, r, s')$ go into a *replay buffer* and are learned in random order,
# and the targets come from a *target network* $\theta^-$, a copy that is renewed now and then, or, as Polyak averaging,
# $\theta^- \leftarrow \theta^- + \tau(\theta - \theta^-)$.  Huber's loss $H$ is a square near 0 and a line beyond.
#
# **Where an episode ends** two things must not be mixed up.  If it *terminated* (the pole fell), nothing follows and
# $y = r$.  If it was *truncated* (500 steps are over), the world would have gone on: $y$ is eq. 1, and $s'$ the last
# observation of the old episode, not the first of the next.  The buffer gives $d = \gamma$, or 0 for the former.
#
# ## Four mends
# *Double*: the maximum of noisy estimates is too large on average.  Let the online network choose, the other judge:
#
# $$y = r + d \; Q_{\theta^-}\bigl(s', \arg\max_{a'} Q_\theta(s', a')\bigr) \quad(3)$$
#
# *n steps*: $r_t + \gamma r_{t+1} + \dots + \gamma^{n-1} r_{t+n-1} + \gamma^n \max Q(s_{t+n})$ (4) carries a reward $n$
# states back in one update.  The actions in between were the ones of an older policy; a small $n$ forgives that.
#
# *Prioritised*: transitions are drawn with probability $\propto |y - Q|^\alpha$, and weighted by $(1 / N P)^\beta$ (5).
#
# *Dueling*: most states are good or bad whatever is done, so the network has a stream for the state's value and one for
# the actions' advantages, whose mean is taken off, or any constant could wander between the two:
#
# $$Q(s, a) = V(s) + A(s, a) - \tfrac{1}{|\mathcal A|} \textstyle\sum_{a'} A(s, a') \quad(6)$$


# %%
@dataclasses.dataclass(frozen=True)
class Agent:
    """What a DQN is made of; the defaults are those for CartPole."""

    double: bool = False
    dueling: bool = False
    n_step: int = 1
    prioritised: float | None = None  # exponent alpha of eq. 5
    loss: str = "huber"  # or "mse"
    lr: float = 2.3e-3  # times lr_factor
    lr_factor: float = 1.0
    clip: float = 10.0  # norm that gradients are cut to; 0: they are not
    gamma: float = 0.99
    batch: int = 64
    every: int = 2  # steps for one update
    at_once: int = 32  # updates in one compiled call: what costs milliseconds needs it, what costs tens does not
    target_every: int = 128  # updates between copies; 0: Polyak averaging
    tau: float = 0.01  # of that
    epsilon: float = 0.05  # share of random actions in the end


ATARI = Agent(batch=32, every=4, at_once=2, epsilon=0.01)
ARMS = {
    "DQN": {}, "double": dict(double=True), "dueling": dict(dueling=True), "prioritised": dict(prioritised=0.6),
    "3 steps": dict(n_step=3), "all": dict(double=True, dueling=True, prioritised=0.6, n_step=3),
    "MSE": dict(loss="mse"), "Polyak": dict(target_every=0), "no target": dict(target_every=1),
    "larger lr": dict(lr_factor=4.0), "smaller lr": dict(lr_factor=0.25), "no clipping": dict(clip=0.0),
}  # fmt: skip


@keras.saving.register_keras_serializable("course.day17")
class Dueling(layers.Layer):
    """[B, 1 + actions] -> Q [B, actions]: eq. 6, the first column being V and the others A."""

    def call(self, x):
        value, advantage = x[:, :1], x[:, 1:]
        return value + advantage - ops.mean(advantage, axis=1, keepdims=True)


def network(shape, actions, dueling):
    """Q: frames [B,4,84,84] through the convolutions of Mnih et al., or numbers [B,n] -> [B, actions]."""
    obs = keras.Input(shape)
    if len(shape) == 3:
        x = layers.Permute((2, 3, 1))(layers.Rescaling(1 / 255)(obs))
        for filters, size, stride in (32, 8, 4), (64, 4, 2), (64, 3, 1):
            x = layers.Conv2D(filters, size, stride, activation="relu", kernel_initializer="he_uniform")(x)
        x, width = layers.Flatten()(x), 512
    else:
        x, width = layers.Dense(256, "relu")(obs), 256

    def stream(outputs):
        return layers.Dense(outputs)(layers.Dense(width, "relu")(x))

    if dueling:
        return keras.Model(obs, Dueling()(layers.Concatenate()([stream(1), stream(actions)])))
    return keras.Model(obs, stream(actions))


# %%
def targets(batch, online, target, double):
    """y [B] of eq. 1 or, `double`, eq. 3; of eq. 4 where the rewards are sums over n steps and the discount gamma^n."""
    following = target(batch["next_obs"])
    # exercise: the value of what follows; the discount is 0 where the episode terminated
    best = tf.argmax(online(batch["next_obs"]) if double else following, axis=1)  # who chooses: eq. 3 or 1
    return batch["reward"] + batch["discount"] * tf.gather(following, best, batch_dims=1)
    # end exercise


def losses(error, kind):
    """H(error) [B] of eq. 2: error^2 / 2, and for "huber" a line of slope 1 where |error| > 1."""
    # exercise: both losses
    square, size = error**2 / 2, tf.abs(error)
    return square if kind == "mse" else tf.where(size <= 1, square, size - 0.5)
    # end exercise


def rule(agent, online, target, optimizer, targets=targets):
    """The update that `models.rl.dqn` repeats: batch -> (errors [B], what to log)."""
    optimizer.build(online.trainable_variables)

    def update(batch):
        y = targets(batch, online, target, agent.double)
        with tf.GradientTape() as tape:
            q = tf.gather(online(batch["obs"], training=True), batch["action"], batch_dims=1)
            loss = tf.reduce_mean(batch["weight"] * losses(y - q, agent.loss))  # eq. 2, by eq. 5's weights
        gradients = tape.gradient(loss, online.trainable_variables)
        optimizer.apply_gradients(zip(gradients, online.trainable_variables, strict=True))
        return y - q, {"loss": loss, "q": tf.reduce_mean(q)}

    return update


# %% [markdown]
# ## The loop
# Algorithm 1 of Mnih et al., which `models/rl/dqn.py` goes through with this network and this update:
#
# 1. Fill the buffer with the transitions of some thousand random steps.
# 2. Act: at random with probability $\varepsilon$, else take $\arg\max_a Q_\theta(s, a)$.
# 3. Store $(s, a, r, s')$ and whether the episode ended; where it did, begin another.
# 4. Every few steps, draw a batch from the buffer and compute its $y$, which is then held fixed.
# 5. Take one step of gradient descent on $L$, by $\theta$ alone.
# 6. Every so many updates $\theta^- \leftarrow \theta$.  Go on with 2.
#
# Of $T$ steps, $\varepsilon$ falls in the first $T_\varepsilon$ after step 1; $\beta$ of eq. 5 rises until the end:
#
# $$\varepsilon_t = \varepsilon_1 + (1 - \varepsilon_1) \max(0, 1 - t / T_\varepsilon) \quad(7), \qquad
#   \beta_t = 0.4 + 0.6 \, t / T \quad(8)$$
#
# Training ends with $\varepsilon_1$ = 0.05, in games 0.01.  A policy is judged with another: 0, in games 0.05.
# A million transitions of two stacks of four frames of 84 x 84 bytes are 56 GB.  With each frame stored once, and put
# together when it is drawn (`models/rl/replay.py`), they are 7 GB.


# %%
COPIES = 8  # of the environment, side by side


def schedule(agent, steps, warmup, explore):
    """The loop of `agent`: eq. 7 with T_epsilon = explore * steps, eq. 8, and 20 reports."""
    return dqn.Loop(steps, agent.batch, warmup, agent.every, agent.at_once, agent.target_every, agent.tau,
                    epsilon=(1.0, agent.epsilon, round(explore * steps)), report=steps // 20)  # fmt: skip


def learn(run, name, agent, env, loop, network=network, *, seed, capacity=50_000, stack=1, rule=rule, look=None):
    """Train `agent` in `env` by `loop`: (network, history, bytes of its memory).

    network(shape, actions, dueling) makes a network, rule(agent, online, target, optimizer) the update.  Where an
    observation is a `stack` of frames, each is kept once.  look(network) -> dict of numbers, at each report.
    """
    core.runtime.seed(seed)
    space, actions = env.single_observation_space, int(env.single_action_space.n)
    online, target = dqn.pair(lambda: network(space.shape, actions, agent.dueling))
    replay = Replay(capacity, space.shape[1:] if stack > 1 else space.shape, env.num_envs, space.dtype, stack,
                    agent.n_step, agent.gamma, agent.prioritised, seed)  # fmt: skip
    updates = max(1, (loop.steps - loop.warmup) // loop.every)
    lr = keras.optimizers.schedules.PolynomialDecay(agent.lr * agent.lr_factor, updates, 0.0)
    optimizer = keras.optimizers.Adam(lr, epsilon=1e-5, global_clipnorm=agent.clip or None)
    history = dqn.learn(run, name, online, target, rule(agent, online, target, optimizer), loop, env, replay, seed=seed,
                        test=look and partial(look, online), optimizer=optimizer)  # fmt: skip
    return online, history, replay.memory()


# %% [markdown]
# ## Switch by switch
# CartPole is small enough to change one thing at a time, over several seeds: the mends, the loss, the target network,
# the learning rate, the clipping.  A policy is judged by 100 episodes of its own, with no random actions.  Beside that
# stands what the network believed: $Q$ of the states that its greedy policy meets, and the discounted rewards that
# really followed, in a CartPole without a limit.  None is worth more than $1 / (1 - 0.99) = 100$.


# %%
def pole(agent, steps):
    """The loop on CartPole."""
    return schedule(agent, steps, min(1_000, steps // 40), 0.2)


def on_cartpole(run, name, agent, *, seed, steps, evaluated, rule=rule):
    """Train `agent` on CartPole, JSON: its policy's score, and its history with `estimate` and `realised`."""
    env = envs.vector("CartPole-v1", COPIES, seed)
    endless = envs.vector("CartPole-v1", COPIES, seed, max_episode_steps=10**6)

    def look(online):
        found = dqn.estimates(online, endless, dqn.horizon(agent.gamma) + 200, agent.gamma, seed=(seed, 1))
        return {key: float(values.mean()) for key, values in zip(("estimate", "realised"), found, strict=True)}

    online, history, _ = learn(run, name, agent, env, pole(agent, steps), seed=seed, rule=rule, look=look)
    judged = evaluate.evaluate(dqn.greedy(online), "CartPole-v1", evaluated, (seed, 2))
    return {"score": judged["mean"], **history}


# %% [markdown]
# ## Pong
# Seen every fourth frame, as 84 x 84 grey pixels, the last four at once so that the ball's motion can be seen; rewards
# clipped to -1, 0, 1.  Judged by whole games, each begun with 0 to 29 frames of no-ops, with 5 % random actions; but
# what $Q$ says is held against games without any, for it is the greedy policy's value.  The human-normalised score is
# (score - random) / (human - random).


# %%
def player(cfg):
    """The agent that learns the game; its arm has the last word."""
    return dataclasses.replace(ATARI, **dict(lr=cfg.lr, target_every=cfg.target_every) | ARMS[cfg.game_arm])


def play(run, cfg):
    """Learn the game and judge the policy: its metrics, its network, its history and what it expected of states."""
    agent = player(cfg)
    with envs.opened(cfg.game, COPIES, cfg.seed) as env:
        loop = schedule(agent, cfg.steps, cfg.warmup, cfg.explore)
        online, history, memory = learn(run, "game", agent, env, loop, seed=cfg.seed, capacity=cfg.capacity, stack=4)
    policy = dqn.greedy(online, cfg.game_epsilon, cfg.seed)
    judged = evaluate.evaluate(policy, cfg.game, cfg.evaluated, (cfg.seed, 1))
    chance = evaluate.evaluate(evaluate.uniform(cfg.game, cfg.seed), cfg.game, cfg.evaluated, (cfg.seed, 1))
    with envs.opened(cfg.game, COPIES, cfg.seed) as probe:
        told = dqn.estimates(online, probe, dqn.horizon(agent.gamma) + 1_400, agent.gamma, seed=(cfg.seed, 3))
    metrics = atari.scores(cfg.game, judged, chance) | {
        "frames_per_second": 4 * np.median(history["steps_per_second"]), "memory_gb": memory / 1e9,
        "estimate": told[0].mean(), "realised": told[1].mean()}  # fmt: skip
    return metrics, online, history, told


# %% [markdown]
# ## What came out
# After 450,000 decisions, 8 hours of playing, Pong is won by 17.9 points of 21; random play loses by 20.4, the human
# tester of Mnih et al. won by 9.3.  On CartPole only all switches together reach 475 in 60,000 steps; each alone comes
# to between 254 and 383, the plain network to 319, with deviations of 160 to 190: none is told from it.  What can be
# told is what they believe: in the last quarter the plain network's $Q$ is 44 too large, double's 32, with priorities
# 15, with all switches 3.  Without a target network $Q$ grows to $4 \cdot 10^9$, and the pole falls at once.


# %%
def check(cfg):
    """Raise `InputError` where a setting cannot be run."""
    if unknown := {*cfg.arms, cfg.game_arm} - set(ARMS):
        raise core.InputError(f"there is no arm {', '.join(sorted(unknown))}: choose from {', '.join(ARMS)}")
    dqn.check("--cartpole-steps", cfg.cartpole_steps, partial(pole, Agent()), COPIES)
    if cfg.game:
        atari.require("--game", cfg.game)
        dqn.check("--steps", cfg.steps, partial(schedule, player(cfg), warmup=cfg.warmup, explore=cfg.explore), COPIES)
        Replay(cfg.capacity, (), COPIES, stack=4, n_step=player(cfg).n_step)  # refuses what is too small


def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    check(cfg)
    with core.run("day17_dqn", core.alone(options), cfg) as run:
        found = {name: [run.once(f"{name}-{i}", partial(
                            on_cartpole, run, f"CartPole, {name}, {i}", Agent(**ARMS[name]), seed=cfg.seed + 100 * i,
                            steps=cfg.cartpole_steps, evaluated=cfg.cartpole_evaluated)) for i in range(cfg.trials)]
                 for name in cfg.arms or ARMS}  # fmt: skip
        table = [dqn.summary(name, runs) for name, runs in found.items()]
        rows, metrics = {row["arm"]: row for row in table}, {}
        figures.switches(run, found, table, over=("DQN", "double", "dueling", "all"))
        if cfg.game:
            metrics, online, run.record["history"], told = play(run, cfg)
            with core.files.atomic_path(run.folder / "game.keras") as path:
                online.save(path)
            figures.game(run, run.record["history"], *told)
            evaluate.film(dqn.greedy(online), cfg.game, run.picture("episode.gif"), cfg.seed, limit=600)
        chief = rows.get("all", table[-1])
        metrics |= {"cartpole_return": chief["score"], "cartpole_worst_seed": chief["worst"]}
        run.record["metrics"] = metrics | ({"cartpole_return_plain": rows["DQN"]["score"]} if "DQN" in rows else {})
        run.record["tables"] = {"switches on CartPole": table}
        run.record["data"] = [provenance(name) for name in ("CartPole-v1", cfg.game) if name]
    if cfg.game:
        evaluate.export_policy(online, "day17_dqn", cfg.game, cfg.exports, seed=cfg.seed,
                               policy=dqn.greedy(online, cfg.game_epsilon, cfg.seed))  # fmt: skip
    return run.record


if __name__ == "__main__":
    core.cli(main)
