"""The loop of deep Q-learning: acting and learning in turns, around an update that a unit writes.

What is learned stands in the unit: the network, the targets, the loss.  Here is what all of them need besides: epsilon-
greedy acting in many environments at once, the replay buffer's bookkeeping, several updates in one compiled call, the
target network, and counts.
"""

import bisect
import collections
import dataclasses
import functools
import math
import time

import numpy as np
import tensorflow as tf

from course.core import runtime
from course.core.errors import InputError
from models.rl import envs
from models.rl.resume import Resume


@dataclasses.dataclass(frozen=True)
class Loop:
    """How acting and learning take turns.  A step is one decision in one environment."""

    steps: int  # of all environments together
    batch: int = 32  # transitions an update
    warmup: int = 1_000  # steps at random before the first update
    every: int = 4  # steps for one update
    at_once: int = 1  # updates in one compiled call; with more, priorities are as old as that
    target_every: int = 1_000  # updates between copies of the weights to the target network; 0: Polyak averaging
    tau: float = 0.005  # of Polyak averaging: target += tau (online - target), after each update
    epsilon: tuple[float, float, int] = (1.0, 0.05, 10_000)  # share of random actions: from, to, over so many steps
    beta: tuple[float, float] = (0.4, 1.0)  # exponent of the importance weights: from, to, over all steps
    report: int = 10_000  # steps between two reports

    def until_first_update(self, envs):
        """Steps that are over, at the latest, when the first updates have been made in `envs` environments."""
        return self.warmup + self.at_once * self.every + envs


RECENT = 100  # episodes that the return of a report is the mean of


def check(flag, steps, make, envs):
    """`InputError` where `make(steps)`, a `Loop`, would report before its first update in `envs` environments.

    flag: the command line's name of the steps, for which the message says the least that will do.
    """

    def fits(steps):
        loop = make(steps)
        return loop.report >= loop.until_first_update(envs)

    if not fits(steps):
        least = bisect.bisect_left(range(2**40), True, lo=steps, key=fits)
        raise InputError(f"{flag} {steps}: the first report would come before the first update: give {least} or more")


def pair(build):
    """Two networks from `build()`, the online one and the target with its weights; float32 whatever Keras's policy."""
    with runtime.policy("float32"):
        online, target = build(), build()
    target.set_weights(online.get_weights())
    return online, target


def linear(step, start, end, over):
    """From `start` at step 0 to `end` at step `over`, in a straight line, and `end` after that."""
    return end + (start - end) * max(0.0, 1 - step / max(over, 1))


@functools.lru_cache(8)
def compiled(model):
    """`model` as a function of arrays: obs [N, ...] -> Q [N, actions]; compiled once, however often it is asked for."""
    values = tf.function(lambda obs: model(obs, training=False))
    return lambda obs: values(tf.convert_to_tensor(obs)).numpy()


def greedy(model, epsilon=0.0, seed=0):
    """A policy obs [N, ...] -> actions [N] int64: of the largest Q value, or at random with probability epsilon."""
    values, rng = compiled(model), np.random.default_rng(seed)

    def policy(obs):
        actions = values(obs).argmax(axis=-1)
        if epsilon:
            random = rng.random(len(actions)) < epsilon
            actions = np.where(random, rng.integers(model.output_shape[-1], size=len(actions)), actions)
        return actions

    return policy


def compile_updates(update, online, target, loop):
    """`loop.at_once` updates in one call: (batches {name: [K, B, ...]}, updates done) -> errors [K, B], mean logs.

    update(batch) changes `online` and returns the temporal-difference errors [B] and a dict of scalars to be logged.
    """
    pairs = list(zip(target.variables, online.variables, strict=True))

    def follow(done):
        if loop.target_every:
            if done % loop.target_every == 0:
                for slow, fast in pairs:
                    slow.assign(fast)
        else:
            for slow, fast in pairs:
                slow.assign(slow + loop.tau * (fast - slow))

    def one(batches, i, done):
        error, logs = update({name: value[i] for name, value in batches.items()})
        follow(done + i + 1)
        return error, logs

    @tf.function
    def updates(batches, done):
        error, logs = one(batches, 0, done)
        errors = tf.TensorArray(tf.float32, size=loop.at_once, element_shape=error.shape).write(0, error)
        for i in tf.range(1, loop.at_once):
            error, more = one(batches, i, done)
            errors = errors.write(i, error)
            logs = {name: logs[name] + more[name] for name in logs}
        return errors.stack(), {name: total / loop.at_once for name, total in logs.items()}

    return updates


def learn(run, name, online, target, update, loop, env, replay, *, seed, test=None, quiet=False, **objects):
    """Deep Q-learning from `loop.steps` steps of `env`, which a kill cannot hurt; returns its history {name: list}.

    run, name: of `core.run`, and of this loop in it.  online, target: networks of Q values, of one shape, the target
    with the weights it shall start with; `update` as in `compile_updates`; `objects`: whatever else it changes
    (an optimizer).  env: of `envs.vector`, `replay` for as many environments.  test() -> a dict of numbers, asked for
    at each report.

    The history has a number a report: step and updates, epsilon, return (the mean of the last 100 episodes that have
    ended), steps_per_second (without `test` and saving), the means of what the update logged, and what `test` said.
    The buffer is saved at each report but the last, after which nobody needs it: see `Replay.save` for its size.
    Raises `InputError` where the environments do not suit the buffer.
    """
    rng, finished = np.random.default_rng(seed), envs.Episodes(env.num_envs)
    resume = Resume(run, name, online, seed=seed, envs=env, replay=replay, episodes=finished,
                    generators={"acting": rng}, target=target, **objects)  # fmt: skip
    done = int(resume.history["updates"][-1]) if resume.step else 0
    recent = collections.deque(resume.arrays.get("recent", ()), RECENT)
    reports = train(env, replay, online, target, update, loop, rng=rng, finished=finished, obs=resume.begin(),
                    step=resume.step, updates=done, recent=recent)  # fmt: skip
    for obs, report in reports:
        report |= test() if test else {}
        resume.save(report["step"], obs, report, last=report["step"] >= loop.steps, recent=np.array(recent))
        if not quiet:
            told = ("return", "loss", *(key for key in report if key not in REPORTED))
            print(f"{name} step {report['step']}/{loop.steps}  "
                  + "  ".join(f"{key} {report[key]:.4g}" for key in dict.fromkeys(told) if key in report)
                  + f"  {report['steps_per_second']:.0f} steps/s", flush=True)  # fmt: skip
    return resume.history


REPORTED = ("step", "updates", "epsilon", "return", "steps_per_second")


def train(env, replay, online, target, update, loop, *, rng, finished, obs, step=0, updates=0, recent=None):
    """The loop itself: yields (observations to go on from, report) each `loop.report` steps and at the end.

    At these moments all that matters can be saved.  rng draws the random actions, `finished` counts episodes, and
    `recent`, a deque, takes their returns.
    """
    count, recent = env.num_envs, collections.deque(maxlen=RECENT) if recent is None else recent
    if count != replay.envs:
        raise InputError(f"{count} environments and a replay buffer for {replay.envs}: they must agree")
    if loop.report < (least := loop.until_first_update(count)):
        raise InputError(f"a report each {loop.report} steps would come before the first update: give {least} or more")
    policy, several = greedy(online), compile_updates(update, online, target, loop)
    logs, reported, began = [], step, time.perf_counter()
    while step < loop.steps:
        epsilon = 1.0 if step < loop.warmup else linear(step - loop.warmup, *loop.epsilon)
        random = rng.random(count) < epsilon
        actions = rng.integers(env.single_action_space.n, size=count)
        if not random.all():
            actions = np.where(random, actions, policy(obs))
        following, reward, terminated, truncated, info = env.step(actions)
        done = terminated | truncated
        last = envs.final_observations(following, info) if done.any() else None
        replay.add(obs, actions, reward, terminated, truncated, last)
        recent.extend(total for total, _ in finished.add(reward, done))
        obs, step = following, step + count

        while (step - loop.warmup) // loop.every - updates >= loop.at_once:
            sample = replay.sample(loop.at_once * loop.batch, linear(step, *loop.beta, loop.steps))
            index = sample.pop("index")
            batches = {name: value.reshape(loop.at_once, loop.batch, *value.shape[1:])
                       for name, value in sample.items()}  # fmt: skip
            errors, found = several(batches, tf.constant(updates))
            if replay.tree:
                replay.update(index, errors)
            updates += loop.at_once
            logs.append(found)

        if step // loop.report > reported // loop.report or step >= loop.steps:
            seconds = time.perf_counter() - began
            means = {name: float(np.mean([log[name] for log in logs])) for name in (logs[0] if logs else ())}
            yield obs, {"step": step, "updates": updates, "epsilon": epsilon,
                        "return": float(np.mean(recent)) if recent else float("nan"),
                        "steps_per_second": (step - reported) / seconds, **means}  # fmt: skip
            logs, reported, began = [], step, time.perf_counter()


def summary(name, runs):
    """A row of a comparison: means over runs, each {"score", "estimate": [T], "realised": [T]}, and the worst score."""
    scores, over = [one["score"] for one in runs], [np.subtract(one["estimate"], one["realised"]) for one in runs]
    return {
        "arm": name, "score": np.mean(scores), "deviation": np.std(scores), "worst": min(scores),
        "Q less what followed": np.mean(over), "of the last quarter": np.mean([run[-len(run) // 4 :] for run in over]),
        "deviation of that": np.std([run.mean() for run in over]),
        "largest Q": max(max(one["estimate"]) for one in runs),
    }  # fmt: skip


UNRESOLVED = 0.002  # share that the unknown rest may have in a discounted return
LONGEST = 10_000  # steps that are worth playing to know a return


def horizon(gamma, unresolved=UNRESOLVED):
    """Steps after which what follows weighs no more than `unresolved`: the least H with gamma^H <= unresolved.

    Raises `InputError` where that takes more than `LONGEST` steps, as with gamma = 1, where it takes for ever.
    """
    if gamma <= 0:
        return 1
    steps = math.ceil(math.log(unresolved) / math.log(gamma)) if gamma < 1 else math.inf
    if steps > LONGEST:
        most = unresolved ** (1 / LONGEST)
        raise InputError(f"--gamma {gamma}: no return would be known within {LONGEST} steps: give {most:.4f} or less")
    return steps


def estimates(model, env, steps, gamma, *, seed=0, unresolved=UNRESOLVED):
    """What a network expects and what then happens: (estimates [M], discounted returns [M]) of the states it meets.

    The policy greedy in `model`, whose value Q claims to be, plays `steps` steps of `env` from reset(seed) on.  The
    estimate is Q of the action taken, the return the discounted sum of the rewards from there on, as `env` gives them
    (clipped where training had them clipped).  The states are chosen by their time alone: those of the first `steps` -
    `horizon(gamma)` steps, of whose returns all but `unresolved` is then known.  (To take those whose episode happens
    to end soon would favour the bad ones.)
    Raises `InputError` where the steps are too few for that, or where `env` cuts episodes off, so that no return is
    known: make it without a limit.
    """
    counted = steps - horizon(gamma, unresolved)
    if counted < 1:
        raise InputError(f"no return is known after {steps} steps with gamma {gamma}: give {steps - counted + 1} steps")
    values = compiled(model)
    q, rewards, goes_on = (np.zeros((steps, env.num_envs)) for _ in range(3))
    obs, _ = env.reset(seed=seed)
    for t in range(steps):
        found = values(obs)
        actions = found.argmax(axis=1)
        obs, reward, terminated, truncated, _ = env.step(actions)
        if (truncated & ~terminated).any():
            raise InputError(f"an episode was cut off after {t + 1} steps: returns are known without a limit only")
        q[t], rewards[t], goes_on[t] = found[np.arange(env.num_envs), actions], reward, ~terminated
    returns, total = np.zeros_like(q), np.zeros(env.num_envs)
    for t in range(steps - 1, -1, -1):
        returns[t] = total = rewards[t] + gamma * goes_on[t] * total
    return q[:counted].ravel(), returns[:counted].ravel()
