"""Assignment 4 - Model and policy networks: a policy trained in its own model's imagination needs few real episodes.

Paper:     Sutton 1991, "Dyna, an Integrated Architecture for Learning, Planning, and Reacting", SIGART Bulletin 2(4);
           Chua, Calandra, McAllister, Levine 2018, "Deep Reinforcement Learning in a Handful of Trials using
           Probabilistic Dynamics Models", arXiv:1805.12114 (the ensemble)
Task:      balance CartPole's pole; learn what actions do from real episodes, and what to do in imagined ones only
Shapes:    model: state and action [B,E,6] -> change [B,E,4], end [B,E]; policy: state [B,4] -> logits [B,2]
Reference: CartPole-v1 counts as solved at a mean return of 475 over 100 episodes (Gymnasium's specification)
Run:       python -m course.a4_model_based --preset cpu --seed 0
Departs:   1. the policy is improved by the policy gradient in the model; Chua et al. plan anew at each step
           2. the members predict one next state each, not its distribution: CartPole's is certain; float32, one device
"""

# %%
import dataclasses

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from course import core
from models.rl import envs, evaluate, figures
from models.rl.provenance import provenance

REFERENCE = {"model_based_return": (475.0, "", "Gymnasium 1.4, specification of CartPole-v1, reward_threshold: solved")}
NAME, SOLVED, LONGEST = "CartPole-v1", 475.0, 500
LENGTHS = ("rounds", "fits", "imagined", "horizon", "evaluated")  # settings that make a run a mere trial where smaller


@dataclasses.dataclass
class Config:
    seed: int = 0  # of networks, environments and draws; trial i adds 100 i
    trials: int = 3  # independent runs of both agents
    rounds: int = 6  # of real episodes, model fitting and imagination
    episodes: int = 5  # real ones a round; the first round's are played at random
    members: int = 5  # networks of the ensemble
    units: int = 64  # of each of the two hidden layers, in every network
    fits: int = 600  # updates of the model a round
    fit_batch: int = 128  # real transitions an update, drawn anew for each member
    fit_lr: float = 0.002  # of Adam, for the model
    imagined: int = 40  # updates of the policy a round
    starts: int = 40  # imagined rollouts an update and member
    horizon: int = 150  # steps of an imagined rollout
    gamma: float = 0.99  # discount
    lr: float = 0.005  # of Adam, for the policy in imagination
    free_updates: int = 160  # of the policy that learns from real episodes alone
    free_episodes: int = 5  # real ones for each of them
    free_lr: float = 0.01  # of Adam, there, at the start
    free_every: int = 10  # updates between two evaluations, there, once the rounds' episodes are spent
    evaluated: int = 100  # episodes of an evaluation; they teach nobody and are not counted


PRESETS = {"smoke": dict(trials=1, rounds=2, fits=20, imagined=2, starts=4, horizon=20, free_updates=3, free_every=1,
                         units=16, evaluated=4), "cpu": dict(), "full": {}}  # fmt: skip


# %% [markdown]
# ## A model of the world
# After $s_t$ and action $a_t$ comes $s_{t+1}$, or the end. A network that has seen some of it can be asked about more:
#
# $$\hat s_{t+1} = s_t + \sigma \odot f_\theta(s_t, a_t), \qquad
#   \hat p(\text{end}) = \mathrm{sigmoid}(g_\theta(s_t, a_t)) \;(1)$$
#
# It predicts the *change*, in units of the changes' own deviation $\sigma$: in a fiftieth of a second little happens,
# and a network that had to copy its input would spend its accuracy on that. The loss is the squared error of $f$ and
# the cross-entropy of $g$.
#
# **Why several?** A policy looks for what pays, and where the model has seen nothing its errors may pay best. The five
# members agree where there were data; elsewhere each errs in its own way, as they start from different weights and see
# different data: each has its own sample of the transitions, drawn with replacement (*bootstrap*). An imagined rollout
# stays with one member; the policy has to do well with all.


# %%
def build_model(members, units):
    """The ensemble in one: inputs [B,E,6] (state, one-hot action) -> [B,E,5], f and the logit g; members share
    nothing but the optimizer."""

    def dense(outputs, activation=None):
        shape = (members, outputs)
        return layers.EinsumDense("bei,eio->beo", shape, activation, "eo", kernel_initializer="glorot_normal")

    inputs = keras.Input((members, 6))
    return keras.Model(inputs, dense(5)(dense(units, "swish")(dense(units, "swish")(inputs))))


@dataclasses.dataclass
class Experience:
    """Real transitions: state, change [n,4], action, end [n]; end: terminated, not cut."""

    state: np.ndarray
    action: np.ndarray
    change: np.ndarray
    end: np.ndarray

    def __add__(self, other):
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Experience(*(np.concatenate(pair) for pair in pairs))


def inputs_of(state, action, scales):
    """state [...,4], action [...] -> [...,6] of order 1; scales: {"state", "change"}, their deviations [4]."""
    return tf.concat([state / scales["state"], tf.one_hot(action, 2)], axis=-1)


def compile_fit(model, optimizer, scales):
    """(state, action, change, end, drawn [steps,B,E] places of them) -> squared error, cross-entropy of the last."""

    @tf.function(jit_compile=True)  # small networks, many steps: compiled they take a fifth of the time
    def fit(state, action, change, end, drawn):
        error = entropy = 0.0
        for places in drawn:
            with tf.GradientTape() as tape:
                out = model(inputs_of(tf.gather(state, places), tf.gather(action, places), scales))
                # exercise: the two losses of eq. 1
                error = tf.reduce_mean((out[..., :4] - tf.gather(change, places) / scales["change"]) ** 2)
                ends = tf.gather(end, places)
                entropy = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(ends, out[..., 4]))
                # end exercise
                loss = error + entropy
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return error, entropy

    return fit


# %% [markdown]
# ## Imagination
# A rollout starts at a state that was really met, half of them at the start of an episode. Then the policy draws an
# action, and a member of the ensemble says what comes of it, by eq. 1: the end, where $\hat p(\text{end}) > 1/2$.
# Every step is worth 1, so the return from step $t$ on of a rollout that ends at $T$ is
#
# $$G_t = \sum_{k=t}^{T} \gamma^{k-t}, \qquad
#   \nabla J = \mathbb{E}\Big[\sum_t \nabla \log \pi(a_t \mid s_t)\, \frac{G_t - b_t}{c}\Big] \;(2)$$
#
# where $b_t$ is the mean of $G_t$ over the *other* rollouts that got as far as $t$ (who is alone there is not judged),
# and $c$ the root of the mean square of all $G_t - b_t$. This is REINFORCE, and it does not know whether its episodes
# were real: the model-free agent below learns by the very same function.


# %%
def build_policy(units):
    """state [B,4] -> logits [B,2]."""
    inputs = keras.Input((4,))
    x = layers.Dense(units, "tanh")(layers.Rescaling([0.5, 0.5, 5.0, 0.5])(inputs))
    return keras.Model(inputs, layers.Dense(2, kernel_initializer="zeros")(layers.Dense(units, "tanh")(x)))


def returns_to_go(alive, gamma):
    """alive [T,N], 1 where a step was taken -> G [T,N] of eq. 2."""
    return tf.scan(lambda later, now: now * (1 + gamma * later), alive, tf.zeros_like(alive[0]), reverse=True)


def improve(policy, optimizer, states, actions, alive, gamma):
    """One step along eq. 2: states [T,N,4], actions [T,N], alive [T,N] -> the mean length of the rollouts."""
    # exercise: eq. 2 as a loss to descend
    gains, count = returns_to_go(alive, gamma), tf.reduce_sum(alive, axis=1, keepdims=True)
    advantage = alive * (gains - tf.reduce_sum(alive * gains, axis=1, keepdims=True) / tf.maximum(count, 1))
    advantage *= count / tf.maximum(count - 1, 1)  # G less the mean of n is (n - 1) / n of G less that of the others
    advantage /= tf.sqrt(tf.reduce_sum(advantage**2) / tf.reduce_sum(alive)) + 1e-6
    with tf.GradientTape() as tape:
        logits = tf.reshape(policy(tf.reshape(states, (-1, 4))), (*alive.shape, 2))
        unlikely = tf.nn.sparse_softmax_cross_entropy_with_logits(actions, logits)
        loss = tf.reduce_sum(unlikely * advantage) / tf.reduce_sum(alive)
    # end exercise
    optimizer.apply(tape.gradient(loss, policy.trainable_variables), policy.trainable_variables)
    return tf.reduce_mean(tf.reduce_sum(alive, axis=0))


def compile_dream(policy, optimizer, model, scales, cfg):
    """(starts [updates,B,E,4], seed [2]) -> the mean imagined length of each update, all in one call; only the policy
    is changed."""

    def rollout(state, seed):
        alive, (rows, members) = tf.ones(state.shape[:2]), state.shape[:2]
        states, actions, lives = (tf.TensorArray(kind, cfg.horizon) for kind in (tf.float32, tf.int32, tf.float32))
        for t in tf.range(cfg.horizon):
            now = tf.random.experimental.stateless_fold_in(seed, t)
            logits = policy(tf.reshape(state, (-1, 4)))
            action = tf.reshape(tf.random.stateless_categorical(logits, 1, now, tf.int32), (rows, members))
            states, actions, lives = states.write(t, state), actions.write(t, action), lives.write(t, alive)
            # exercise: state and alive after the step, by eq. 1
            out = model(inputs_of(state, action, scales))
            state += scales["change"] * out[..., :4]
            alive *= tf.cast(out[..., 4] < 0, tf.float32)
            # end exercise
        flat = cfg.horizon, rows * members
        return (tf.reshape(states.stack(), (*flat, 4)), tf.reshape(actions.stack(), flat),
                tf.reshape(lives.stack(), flat))  # fmt: skip

    @tf.function(jit_compile=True)
    def dream(starts, seed):
        lengths = tf.TensorArray(tf.float32, starts.shape[0])
        for i in tf.range(starts.shape[0]):
            lengths = lengths.write(i, improve(policy, optimizer, *rollout(starts[i], seed + i), cfg.gamma))
        return lengths.stack()

    return dream


# %% [markdown]
# ## The real world, and who counts its episodes
# Both agents play with actions drawn from their policies. Evaluation, 100 episodes of its own with the likelier action,
# shows how far they are; nobody learns from it, and it is not counted. As long as the model-based agent has episodes to
# spend, it comes after the same numbers of them for both.


# %%
def grid(cfg):
    """Real episodes after which the model-free agent is evaluated: those of the other's rounds, then sparser ones."""
    spent, size = cfg.rounds * cfg.episodes, cfg.free_episodes
    if cfg.episodes % size or cfg.free_updates * size < spent:
        raise core.InputError(f"--free-episodes {size} --free-updates {cfg.free_updates}: no comparison; give "
                              f"a divisor of {cfg.episodes}, and at least {spent} episodes in all")  # fmt: skip
    later = [size * update for update in range(1, cfg.free_updates + 1) if update % cfg.free_every == 0]
    return [*range(cfg.episodes, spent + 1, cfg.episodes), *(count for count in later if count > spent)]


def play(act, count, seed):
    """`count` real episodes, act: states [N,4] -> actions [N] -> (states [T,N,4], actions, alive [T,N], Experience)."""
    with envs.opened(NAME, count, seed) as world:
        state, _ = world.reset()
        alive, steps = np.ones(count, bool), []
        while alive.any():
            action = act(state)
            after, _, terminated, truncated, info = world.step(action)
            change = envs.final_observations(after, info) - state
            steps.append((state, action, alive, change, terminated))
            state, alive = after, alive & ~(terminated | truncated)
    states, actions, lives, changes, ends = (np.array(column) for column in zip(*steps, strict=True))
    seen = Experience(states[lives], actions[lives].astype(np.int32), changes[lives], ends[lives].astype(np.float32))
    return states, actions.astype(np.int32), lives.astype(np.float32), seen


def sampler(policy, rng):
    """The policy with its own draws: states [N,4] -> actions [N]."""

    def act(state):
        logits = policy.predict_on_batch(state)
        return (rng.random(len(state)) < 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))).astype(np.int64)

    return act


def score(policy, cfg, seed):
    """Mean return of the likelier actions over the evaluation's episodes."""
    found = evaluate.evaluate(lambda s: policy.predict_on_batch(s).argmax(axis=1), NAME, cfg.evaluated, seed, envs=100)
    return found["mean"]


def agent(cfg, rate):
    """A policy, and its optimizer with its variables made."""
    policy, optimizer = build_policy(cfg.units), keras.optimizers.Adam(rate)
    optimizer.build(policy.trainable_variables)
    return policy, optimizer


def learn_in_imagination(cfg, seed):
    """One run of the model-based agent -> rows, one a round: real episodes so far, what they brought, scores."""
    core.runtime.seed(seed)
    rng, rows, seen, starts = np.random.default_rng(seed), [], None, None
    (policy, optimizer), model = agent(cfg, cfg.lr), build_model(cfg.members, cfg.units)
    scales, fitter = {of: tf.Variable(tf.ones(4)) for of in ("state", "change")}, keras.optimizers.Adam(cfg.fit_lr)
    fitter.build(model.trainable_variables)
    fit, dream = compile_fit(model, fitter, scales), compile_dream(policy, optimizer, model, scales, cfg)
    for episode in range(cfg.rounds):
        states, _, alive, new = play(sampler(policy, rng), cfg.episodes, (seed, episode))
        seen, starts = (seen + new, np.concatenate([starts, states[0]])) if seen else (new, states[0])
        for of, scale in scales.items():
            scale.assign(getattr(seen, of).std(axis=0) + 1e-3)
        before = score(policy, cfg, (seed, episode, 1))
        own = rng.integers(len(seen.state), size=(len(seen.state), cfg.members))  # each member's bootstrap sample
        drawn = own[rng.integers(len(own), size=(cfg.fits, cfg.fit_batch, cfg.members)), np.arange(cfg.members)]
        error, entropy = fit(*map(tf.constant, dataclasses.astuple(seen)), tf.constant(drawn))
        # from here to the end of the round no real step is taken
        shape = cfg.imagined, cfg.starts, cfg.members
        met, first = (some[rng.integers(len(some), size=shape)] for some in (seen.state, starts))
        optimizer.learning_rate.assign(cfg.lr * (1 - episode / cfg.rounds))
        mixed = np.where(rng.random((*shape, 1)) < 0.5, met, first)
        lengths = dream(tf.constant(mixed), tf.constant(rng.integers(2**30, size=2), tf.int32))
        rows.append({"episodes": cfg.episodes * (episode + 1), "steps": len(seen.state),
                     "played": float(alive.sum(0).mean()), "before imagining": before,
                     "return": score(policy, cfg, (seed, episode, 1)),
                     "imagined at first": float(lengths[0]), "imagined at last": float(lengths[-1]),
                     "squared error": float(error), "cross-entropy": float(entropy)})  # fmt: skip
        print("model-based", rows[-1], flush=True)
    return rows


def learn_for_real(cfg, seed):
    """One run of the model-free agent, by the same `improve`, with the same fall of the rate -> rows, one of `grid`."""
    core.runtime.seed(seed)
    rng, (policy, optimizer), rows, steps = np.random.default_rng(seed), agent(cfg, cfg.free_lr), [], 0
    step = tf.function(lambda *batch: improve(policy, optimizer, *batch, cfg.gamma), reduce_retracing=True)
    for update in range(1, cfg.free_updates + 1):
        *batch, _ = play(sampler(policy, rng), cfg.free_episodes, (seed, update))
        steps += int(batch[2].sum())
        optimizer.learning_rate.assign(cfg.free_lr * (1 - (update - 1) / cfg.free_updates))
        missing = LONGEST - len(batch[0])  # one shape, so that the update is compiled once
        step(*(tf.constant(np.pad(part, [(0, missing)] + [(0, 0)] * (part.ndim - 1))) for part in batch))
        if cfg.free_episodes * update in grid(cfg):
            found = {"episodes": cfg.free_episodes * update, "steps": steps, "played": float(batch[2].sum(0).mean())}
            rows.append(found | {"return": score(policy, cfg, (seed, update, 1))})
            print("model-free", rows[-1], flush=True)
    return rows


# %% [markdown]
# ## What came out
# The model-based agents reach 475 after 5, 15 and 15 real episodes, the others after 100, 100 and 50; five episodes at
# random, a hundred steps, are enough to imagine one's way from 9 to 388. But a round may undo what worked: the model
# has to see a failure that the policy ran into before it can imagine it away, and one of the three ends at 358.


# %%
def episodes_to_solve(rows):
    """Real episodes before the first evaluation of at least 475; infinity, if none was."""
    return next((row["episodes"] for row in rows if row["return"] >= SOLVED), np.inf)


def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    at = {"model-based": grid(cfg)[: cfg.rounds], "model-free": grid(cfg)}
    arms = {"model-based": learn_in_imagination, "model-free": learn_for_real}
    with core.run("a4_model_based", core.alone(options), cfg) as run:
        found = {arm: [run.once(f"{arm}-{trial}", lambda learn=learn, trial=trial: learn(cfg, cfg.seed + 100 * trial))
                       for trial in range(cfg.trials)] for arm, learn in arms.items()}  # fmt: skip
        less = [f"{name} {getattr(cfg, name)} only" for name in LENGTHS if getattr(cfg, name) < getattr(Config, name)]
        run.record["data"] = provenance(NAME, ", ".join(less))
        run.record["tables"] = {arm: [{"trial": trial} | row for trial, rows in enumerate(runs) for row in rows]
                                for arm, runs in found.items()}  # fmt: skip
        needed = {figures.named(arm): [episodes_to_solve(rows) for rows in runs] for arm, runs in found.items()}
        returns = {arm: [[row["return"] for row in rows] for rows in runs] for arm, runs in found.items()}
        gained = [rows[0]["return"] - rows[0]["before imagining"] for rows in found["model-based"]]
        run.record["metrics"] = {
            "model_based_return": np.mean([own[-1] for own in returns["model-based"]]),
            **{f"{arm}_episodes_to_475": np.mean(some) for arm, some in needed.items() if np.isfinite(some).all()},
            **{f"{arm}_solved": np.isfinite(some).mean() for arm, some in needed.items()},
            "model_free_return": np.mean([own[-1] for own in returns["model-free"]]),
            "model_free_best_at_same_episodes": np.mean([max(own[: cfg.rounds]) for own in returns["model-free"]]),
            "gained_by_first_imagination": np.mean(gained),
        }
        run.record["history"] = {arm: np.mean(values, axis=0) for arm, values in returns.items()}
        figures.imagination(run, found, at)
    return run.record


if __name__ == "__main__":
    core.cli(main)
