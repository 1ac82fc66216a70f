"""Assignment 4 - Dueling networks: a value for the state, advantages for the actions; it pays where actions are many.

Paper:     Wang, Schaul, Hessel, van Hasselt, Lanctot, de Freitas 2016, "Dueling network architectures for deep
           reinforcement learning", ICML, arXiv:1511.06581
Task:      evaluate a policy in the paper's corridor with 5, 10 and 20 actions; navigate a world with idle actions
Shapes:    state one-hot [B,70] -> streams V [B,1] and A [B,K] -> Q [B,K]; pictures [B,20,20,3] -> Q [B,12]
Reference: the paper's Figure 3: with 5 actions both are alike, with 10 and 20 the dueling network learns faster
Run:       python -m course.a4_dueling_dqn --preset cpu --seed 0
Departs:   1. the corridor's policy leaves the way in a tenth of its steps, the paper's in a thousandth; Adam
           2. three ways of putting the streams together are compared, not only the mean
           3. one device in float32, whatever is asked for

The cpu preset takes a quarter of an hour on two cores.
"""

# %%
import dataclasses
from functools import partial

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from course import a4_world_navigation as navigation
from course import core
from course.a4_world_navigation import returns
from course.day17_dqn import Agent, learn
from models.rl import dqn, figures, world
from models.rl.provenance import provenance

REFERENCE = {}  # the paper has curves only, and no numbers


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the networks, the walks and the worlds; trial i adds 100 i
    trials: int = 5  # runs of each
    actions: tuple[int, ...] = (5, 10, 20)  # in the corridor: four directions, the others idle
    updates: int = 20_000  # of each network there
    walkers: int = 32  # side by side
    lr: float = 1e-3  # of Adam
    gamma: float = 0.99  # discount, in the corridor
    wander: float = 0.1  # share of random actions of the policy that is evaluated
    idle: int = 8  # actions that do nothing, in the world of pixels
    steps: int = 400_000  # decisions there
    arms: tuple[str, ...] = ("DQN", "Double", "Dueling")  # of ARMS
    judged: int = 300  # episodes that judge a policy there


PRESETS = {
    "smoke": dict(trials=1, actions=(5,), updates=400, steps=2_400, arms=("Dueling",), judged=10),
    "cpu": dict(trials=3, updates=10_000, steps=120_000),
    "full": {},
}  # fmt: skip
ARMS = {"DQN": {}, "Double": dict(double=True), "Dueling": dict(dueling=True),
        "Double and Dueling": dict(double=True, dueling=True)}  # fmt: skip


# %% [markdown]
# ## Two streams
# Of the many states that an agent sees, in most it hardly matters what it does.  An ordinary Q-network has to learn
# that a state is good for each action anew, and learns nothing of an action that was not taken.  The dueling network
# has, after common layers, two streams: $V(s)$ and the *advantages* $A(s, a)$.  What is learned of one action moves
# $V$, hence the Q of all.
#
# How to put them together?  The plain sum
#
# $$Q(s, a) = V(s) + A(s, a) \quad(1)$$
#
# does not tell which is which: a constant can be moved from one to the other.  Two ways to fix it: the best action has
# no advantage (2), or all have none on average (3):
#
# $$Q = V + A - \max_{a'} A(s, a') \quad(2) \qquad Q = V + A - \tfrac{1}{K} \textstyle\sum_{a'} A(s, a') \quad(3)$$
#
# With (2) V is the value of the greedy policy; with (3) it is off by a constant, but the mean moves less than the
# maximum does, and the paper takes that.  A stream of width 1 for A would make (3) nothing at all: its mean is itself.


# %%
@keras.saving.register_keras_serializable("course.a4_dueling")
class Combine(layers.Layer):
    """V [B, 1] and A [B, K] -> Q [B, K], by eq. 1 ("sum"), 2 ("max") or 3 ("mean")."""

    def __init__(self, kind="mean", **options):
        super().__init__(**options)
        self.kind = kind

    def call(self, value, advantage):
        # exercise: the three equations
        if self.kind == "max":
            advantage = advantage - ops.max(advantage, axis=1, keepdims=True)
        elif self.kind == "mean":
            advantage = advantage - ops.mean(advantage, axis=1, keepdims=True)
        return value + advantage
        # end exercise

    def get_config(self):
        return super().get_config() | {"kind": self.kind}


def network(states, actions, kind):
    """State one-hot [B, states] -> Q [B, actions]; three layers, 50 units wide, or "single" split into 25 and 25."""
    state = keras.Input([states])
    x = layers.Dense(50, "relu")(state)
    if kind == "single":
        return keras.Model(state, layers.Dense(actions)(layers.Dense(50, "relu")(x)))
    value, advantage = (layers.Dense(outputs)(layers.Dense(25, "relu")(x)) for outputs in (1, actions))
    return keras.Model(state, Combine(kind)(value, advantage))


# %% [markdown]
# ## The corridor
# 70 places in three corridors: up 10, right 50, up 10; the end pays 1.  A policy walks there, but takes a random action
# in a tenth of its steps; its Q can be computed exactly, from $V = (I - \gamma P_\pi)^{-1} r_\pi$ (4).  The networks
# learn it from the walks, towards the policy's mean over the next actions (expected SARSA),
#
# $$y = r + \gamma \textstyle\sum_{a'} \pi(a' \mid s') \, Q(s', a'). \quad(5)$$
#
# The actions beside the way are taken once in a while only, and the more there are, the more seldom each: that is where
# a common V should help.  The error is the mean square over all states and all actions.


# %%
CORNERS, PLACES, UP, RIGHT = (9, 59), 70, 0, 1  # up, right, down, left; then idle ones


def corridor(actions, gamma, wander):
    """next [S, K] (S: the end), reward [S, K], policy [S, K] and its exact Q [S, K]."""
    place = np.arange(PLACES)
    along = np.where((place >= CORNERS[0]) & (place < CORNERS[1]), RIGHT, UP)  # the direction of the way
    following = np.repeat(place[:, None], actions, axis=1)
    following[place, along] = place + 1
    following[place[1:], along[:-1] + 2] = place[:-1]  # back: the opposite of what led here
    reward = (following == PLACES).astype(np.float32)
    policy = np.full((PLACES, actions), wander / actions)
    policy[place, along] += 1 - wander
    moves = np.zeros((PLACES, PLACES + 1))
    np.add.at(moves, (place[:, None], following), policy)
    # exercise: V by eq. 4, and from it Q; nothing follows the end
    value = np.linalg.solve(np.eye(PLACES) - gamma * moves[:, :PLACES], (policy * reward).sum(axis=1))
    exact = reward + gamma * np.append(value, 0.0)[following]
    # end exercise
    return following, reward, policy.astype(np.float32), exact.astype(np.float32)


def evaluate_policy(cfg, kind, actions, seed, reports=50):
    """Learn Q of the corridor's policy: mean squared error over all states and actions [reports]."""
    core.runtime.seed(seed)
    following, reward, policy, exact = (tf.constant(table) for table in corridor(actions, cfg.gamma, cfg.wander))
    model, optimizer = network(PLACES, actions, kind), keras.optimizers.Adam(cfg.lr)
    optimizer.build(model.trainable_variables)
    every = tf.eye(PLACES)
    generator = tf.random.Generator.from_seed(seed)

    @tf.function(jit_compile=True)
    def walk(places, steps):
        for _ in tf.range(steps):
            shares = tf.cumsum(tf.gather(policy, places), axis=1)
            drawn = generator.uniform([cfg.walkers, 1], maxval=0.999999)
            action = tf.reduce_sum(tf.cast(shares <= drawn, tf.int64), axis=1)
            pairs = tf.stack([places, tf.minimum(action, actions - 1)], axis=1)
            to = tf.gather_nd(following, pairs)
            over = to == PLACES
            there = tf.where(over, tf.zeros_like(to), to)  # the end: begin anew
            # exercise: y of eq. 5
            ahead = tf.reduce_sum(tf.gather(policy, there) * model(tf.one_hot(there, PLACES)), axis=1)
            y = tf.gather_nd(reward, pairs) + cfg.gamma * tf.where(over, 0.0, ahead)
            # end exercise
            with tf.GradientTape() as tape:
                q = tf.gather(model(tf.one_hot(places, PLACES)), pairs[:, 1], batch_dims=1)
                loss = tf.reduce_mean((y - q) ** 2)
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
            places = there
        return places, tf.reduce_mean((model(every) - exact) ** 2)

    places, errors = tf.random.uniform([cfg.walkers], maxval=PLACES, dtype=tf.int64, seed=seed), []
    for _ in range(reports):
        places, error = walk(places, tf.constant(max(1, cfg.updates // reports)))
        errors.append(float(error))
    return errors


# %% [markdown]
# ## A world with idle actions
# The world of pixels of `a4_world_navigation`, where besides the four directions eight actions do nothing: DQN, Double
# DQN and the dueling network, on the same seeds.  The bound is computed as there, for waiting never helps.


# %%
WORLDS = 16  # side by side


def player(name):
    """The agent of an arm in the world."""
    return Agent(lr=1e-3, gamma=0.9, every=8, at_once=8, target_every=250, clip=0.0, **ARMS[name])


def navigate(run, cfg, name, trial):
    """One run in the world; JSON: its return in worlds held out, and its curve."""
    seed, agent = cfg.seed + 100 * trial, player(name)
    env = world.vector(WORLDS, seed, part="train", idle=cfg.idle)
    probe = world.vector(50, (seed, 1), part="held_out", idle=cfg.idle)

    def look(online):
        return {"test_return": returns(dqn.greedy(online), probe, (seed, 1)).mean()}

    online, history, _ = learn(run, f"{name}, {trial}", agent, env, navigation.loop(agent, cfg.steps),
                               navigation.network, seed=seed, capacity=50_000, look=look)  # fmt: skip
    judge = world.vector(cfg.judged, (seed, 2), part="held_out", idle=cfg.idle)
    return {"return": returns(dqn.greedy(online), judge).mean(), "step": history["step"],
            "test_return": history["test_return"]}  # fmt: skip


def bound(cfg, trial):
    """The mean of what the best policy collects where a trial's policies are judged."""
    judge = world.vector(cfg.judged, (cfg.seed + 100 * trial, 2), part="held_out", idle=cfg.idle)
    judge.reset()
    return world.best_returns(judge.worlds).mean()


# %% [markdown]
# ## What came out
# In the corridor the error of the ordinary network, averaged over its learning, is 1.4 times the dueling one's with 5
# actions, 2.5 times with 10 and 4.6 times with 20: it pays where actions are many.  Most of that is won in the first
# thousand updates; in the end it is 2.6 times with 20 actions, and with 10 nothing.  How the streams are put together
# does not matter here: eqs. 1, 2 and 3 differ by less than their runs do, though the sum cannot tell V from A.
#
# In the world of twelve actions, eight of them idle, the dueling network is ahead on the way: after half of its
# decisions it collects 15.7, Double DQN 12.5 and DQN 12.0.  In the end they come to 19.2, 18.4 and 18.8 of the 23.1
# that are possible, and the runs of one arm differ by as much as the arms do.


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    if unknown := set(cfg.arms) - set(ARMS):
        raise core.InputError(f"there is no arm {', '.join(sorted(unknown))}: choose from {', '.join(ARMS)}")
    if min(cfg.actions) < 4:
        raise core.InputError(f"--actions {min(cfg.actions)}: the corridor has four directions: give at least 4")
    dqn.check("--steps", cfg.steps, partial(navigation.loop, player("DQN")), WORLDS)
    with core.run("a4_dueling_dqn", core.alone(options), cfg) as run:
        kinds = ("single", "sum", "max", "mean")
        trials = range(cfg.trials)
        errors = {count: {kind: [run.once(f"{kind}-{count}-{i}",
                                          partial(evaluate_policy, cfg, kind, count, cfg.seed + 100 * i))
                                 for i in trials]
                          for kind in kinds} for count in cfg.actions}  # fmt: skip
        found = {name: [run.once(f"{name}-{i}", partial(navigate, run, cfg, name, i)) for i in trials]
                 for name in cfg.arms}  # fmt: skip
        most = [run.once(f"bound-{i}", partial(bound, cfg, i)) for i in trials]

        table = [{"actions": count, "form": kind, "last error": np.mean([one[-1] for one in runs]),
                  "mean error while learning": np.mean(runs),
                  "deviation over seeds": np.mean(runs, axis=1).std()}
                 for count, forms in errors.items() for kind, runs in forms.items()]  # fmt: skip
        worlds = [{"arm": name, "return": np.mean([one["return"] for one in runs]),
                   "deviation": np.std([one["return"] for one in runs]), "worst": min(one["return"] for one in runs),
                   "% of the bound": 100 * np.mean([one["return"] / top for one, top in zip(runs, most, strict=True)])}
                  for name, runs in found.items()]  # fmt: skip
        mean = {(row["actions"], row["form"]): row["mean error while learning"] for row in table}
        widest = max(cfg.actions)
        run.record["tables"] = {"corridor": table, "world": worlds}
        run.record["metrics"] = {
            "error_ratio": mean[widest, "single"] / mean[widest, "mean"],  # above 1: dueling is nearer to the truth
            **{f"return_{row['arm'].lower().replace(' ', '_')}": row["return"] for row in worlds},
            "bound": np.mean(most),
            **{f"error_ratio_{count}": mean[count, "single"] / mean[count, "mean"] for count in cfg.actions},
        }  # fmt: skip
        run.record["data"] = [provenance("WorldNavigate-v0")]
        ticks = np.linspace(0, cfg.updates, 51)[1:]
        run.figure("corridor", core.plots.panels(
            {f"{count} actions": forms for count, forms in errors.items()}, x=ticks, xlabel="updates", yscale="log",
            ylabel="mean squared error of Q", title=figures.BAND))  # fmt: skip
        step = next(iter(found.values()))[0]["step"]
        run.figure("world", core.plots.curves(
            {name: [one["test_return"] for one in runs] for name, runs in found.items()}
            | {"bound": [np.mean(most)] * len(step)}, x=step, xlabel="decisions", title=figures.BAND,
            ylabel="return of 50 steps, held out"))  # fmt: skip
    return run.record


if __name__ == "__main__":
    core.cli(main)
