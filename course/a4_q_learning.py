"""Assignment 4 - Q-learning: a table of action values, from samples alone, reaches what value iteration computes.

Paper:     Watkins, Dayan 1992, "Q-learning", Machine Learning 8, 279-292; Sutton, Barto 2018, "Reinforcement Learning:
           An Introduction", 2nd edition, sections 2.6, 4.4 and 6.5
Task:      cross a frozen lake (4x4 firm and slippery, 8x8 slippery) and drive a taxi; how should one explore?
Shapes:    state s in 0..S-1 -> Q [S,A]; L learners side by side: Q [L,S,A], states [L], actions [L]
Reference: Gymnasium calls FrozenLake solved at a mean return of 0.70 (4x4) and 0.85 (8x8), Taxi at 8
Run:       python -m course.a4_q_learning --preset cpu --seed 0
Departs:   1. the step size falls with the visits to a state and action, as the proof of convergence asks for
           2. the learners draw from the environments' own tables of probabilities, all at once, in place of env.step
"""

# %%
import dataclasses

import gymnasium
import numpy as np
from matplotlib import pyplot as plt

from course import core
from models.rl import evaluate
from models.rl.figures import BAND
from models.rl.provenance import provenance

REFERENCE = {
    "return_4x4": (0.70, "", "Gymnasium 1.4, specification of FrozenLake-v1, reward_threshold: solved"),
    "return_8x8": (0.85, "", "Gymnasium 1.4, specification of FrozenLake8x8-v1, reward_threshold: solved"),
    "return_taxi": (8.0, "", "Gymnasium 1.4, specification of Taxi-v4, reward_threshold: solved"),
}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of everything drawn
    tasks: tuple[str, ...] = ("firm", "4x4", "8x8", "taxi")  # of TASKS, by name
    steps: tuple[int, ...] = (20_000, 200_000, 1_000_000, 400_000)  # of each learner on each task
    trials: int = 20  # learners of each schedule, each with its own draws
    gamma: float = 0.99  # discount
    epsilon: float = 0.1  # share of random actions of the constant schedule
    least: float = 0.05  # share that the falling schedules end with
    patience: int = 100  # visits after which a step size has halved
    points: int = 40  # measurements on the way
    played: int = 2_000  # episodes that the first learner plays in Gymnasium in the end


PRESETS = {
    "smoke": {"tasks": ("firm", "4x4"), "steps": (1_000, 4_000), "trials": 2, "points": 5, "played": 50},
    "cpu": {"steps": (20_000, 150_000, 500_000, 250_000), "trials": 10},
    "full": {},
}
TASKS = {
    "firm": ("FrozenLake-v1", {"is_slippery": False}), "4x4": ("FrozenLake-v1", {}),
    "8x8": ("FrozenLake8x8-v1", {}), "taxi": ("Taxi-v4", {}),
}  # fmt: skip
BEST = "optimistic"  # the schedule whose results stand for Q-learning


# %% [markdown]
# ## What is known: value iteration
# These environments carry their own model: for state $s$ and action $a$ the outcomes $k$ with probability $p_k$, next
# state $s'_k$, reward $r_k$, and whether the episode ends ($d_k = 1$). Whoever has it need not learn: the best action
# values satisfy Bellman's equation, and repeating it as an assignment converges to them, by a factor of $\gamma$ each
# time:
#
# $$Q^*(s, a) = \sum_k p_k \left[ r_k + \gamma\, (1 - d_k) \max_{a'} Q^*(s'_k, a') \right] \;(1)$$
#
# **Why $\gamma < 1$, if only arriving counts?** With $\gamma = 1$ on firm ice every action that does not drown is worth
# exactly 1, now or later, and a policy that is greedy with respect to such a tie wanders. $\gamma = 0.99$ breaks the
# tie in favour of soon, and gives up very little: compare the columns "value iteration" and "upper bound" of the table
# `optimum`, of which the one is what the greedy policy really earns in an episode of limited length, and the other the
# most that any policy can earn, even one that looks at the clock.


# %%
@dataclasses.dataclass
class Model:
    """An environment's outcomes: probability, next, reward, ends [S,A,K]; start [S], a distribution; limit, steps."""

    probability: np.ndarray
    next: np.ndarray
    reward: np.ndarray
    ends: np.ndarray
    start: np.ndarray
    limit: int


def read_model(name, **kwargs):
    """The `Model` that a toy-text environment of Gymnasium is made from; unused places have probability 0."""
    env = gymnasium.make(name, **kwargs)
    outcomes = env.unwrapped.P
    shape = len(outcomes), len(outcomes[0]), max(len(listed) for by in outcomes.values() for listed in by.values())
    model = Model(np.zeros(shape), np.zeros(shape, int), np.zeros(shape), np.zeros(shape, bool),
                  np.asarray(env.unwrapped.initial_state_distrib), env.spec.max_episode_steps)  # fmt: skip
    for s, by_action in outcomes.items():
        for a, listed in by_action.items():
            for k, (probability, following, reward, ends) in enumerate(listed):
                model.probability[s, a, k], model.next[s, a, k] = probability, following
                model.reward[s, a, k], model.ends[s, a, k] = reward, ends
    return model


def value_iteration(model, gamma, tolerance=1e-12):
    """Q* [S,A], eq. 1 repeated until nothing changes by more than `tolerance`."""
    q = np.zeros(model.next.shape[:2])
    while True:
        # exercise: q by eq. 1 from the q before
        following = q.max(axis=-1)[model.next]
        new = (model.probability * (model.reward + gamma * following * ~model.ends)).sum(axis=-1)
        # end exercise
        if np.abs(new - q).max() < tolerance:
            return new
        q = new


def greedy(q):
    """q [...,S,A] -> probabilities of the same shape: the best action, or all that are best to nine places, alike."""
    best = q >= q.max(axis=-1, keepdims=True) - 1e-9
    return best / best.sum(axis=-1, keepdims=True)


def true_return(model, policy):
    """Policies [L,S,A] -> the expected undiscounted return [L] of an episode with its limit of steps: exact."""
    value = np.zeros(policy.shape[:2])
    for _ in range(model.limit):  # value with one step left, with two, ...
        outcome = model.probability * (model.reward + value[:, model.next] * ~model.ends)
        value = (outcome.sum(axis=-1) * policy).sum(axis=-1)
    return value @ model.start


def upper_bound(model):
    """The most that any policy can earn in an episode, one that may look at the clock included."""
    value = np.zeros(len(model.start))
    for _ in range(model.limit):
        value = (model.probability * (model.reward + value[model.next] * ~model.ends)).sum(axis=-1).max(axis=-1)
    return float(value @ model.start)


# %% [markdown]
# ## Without the model: Q-learning
# The learner sees one outcome at a time, $(s, a, r, s')$, and moves its estimate towards it:
#
# $$Q(s, a) \leftarrow Q(s, a) + \alpha \left[ r + \gamma\, (1 - d) \max_{a'} Q(s', a') - Q(s, a) \right] \;(2)$$
#
# The average of the bracket over $k$ is zero where eq. 1 holds. The maximum makes it *off-policy*: what it learns is
# the value of acting best, whatever the actions that it saw. With $\alpha = 1$ it would believe each outcome and forget
# the last; for convergence (with probability 1) every pair must be visited without end and its step sizes must have an
# infinite sum and a finite sum of squares. Here $\alpha_n = h / (h + n)$ at visit $n$, $h$ being `patience` (3).
#
# An episode that runs out of time has not ended ($d = 0$): the ice goes on, only we stop looking.
#
# ## Exploring
# A learner that always takes the action that looks best never finds out what it underrates. Five ways:
#
# - greedy: $\epsilon = 0$ from a $Q$ of zeros, only ties being drawn at random, to see what exploration is good for
# - constant: at random with probability `epsilon`
# - linear: that probability falls from 1 to `least` in half of the time
# - exponential: from 1 to `least` over all of it
# - optimistic: $\epsilon = 0$, but $Q$ starts at the highest return there is: what has been tried disappoints, and so
#   the untried is tried


# %%
def schedules(cfg, model):
    """name -> (epsilon as a function of the share of steps done, the start of Q)."""
    ceiling = max(model.reward.max(), 0.0) / (1 if model.ends[model.reward > 0].all() else 1 - cfg.gamma)
    decay = np.log(cfg.least)
    return {
        "greedy": (lambda done: 0.0, 0.0),
        "constant": (lambda done: cfg.epsilon, 0.0),
        "linear": (lambda done: max(cfg.least, 1 - 2 * done * (1 - cfg.least)), 0.0),
        "exponential": (lambda done: np.exp(decay * done), 0.0),
        "optimistic": (lambda done: 0.0, ceiling),
    }


def draw(probabilities, rng):
    """Distributions [L,K] -> one index each [L]."""
    return (rng.random((len(probabilities), 1)) > np.cumsum(probabilities, axis=-1)).sum(axis=-1)


def choose(q, epsilon, rng):
    """q [L,A], epsilon [L] -> actions [L]: the best, ties at random, or with probability epsilon any."""
    # exercise: epsilon-greedy, without a preference among equals
    best = np.where(q == q.max(axis=-1, keepdims=True), rng.random(q.shape), -1).argmax(axis=-1)
    return np.where(rng.random(len(q)) < epsilon, rng.integers(q.shape[1], size=len(q)), best)
    # end exercise


def update(q, visits, s, a, reward, following, ends, gamma, patience):
    """Eq. 2 and 3 for L learners at once, in place: q, visits [L,S,A]; the rest [L]."""
    row = np.arange(len(q))
    visits[row, s, a] += 1
    # exercise: the step sizes [L] of eq. 3, and eq. 2
    alpha = patience / (patience + visits[row, s, a])
    target = reward + gamma * ~ends * q[row, following].max(axis=-1)
    q[row, s, a] += alpha * (target - q[row, s, a])
    # end exercise


def learn(model, cfg, arms, steps, rng):
    """`trials` learners of each of `arms` (as `schedules`), side by side -> (steps measured at [P], true returns of the
    greedy policies [P,arms,trials], mean return while learning [arms,trials], q [arms,trials,S,A])."""
    shape = len(arms), cfg.trials
    count, states = shape[0] * shape[1], len(model.start)
    start = np.repeat([start for _, start in arms.values()], cfg.trials)
    q = np.zeros((count, *model.next.shape[:2])) + start[:, None, None]
    visits, row = np.zeros(q.shape, int), np.arange(count)
    s, age = rng.choice(states, count, p=model.start), np.zeros(count, int)
    earned, episodes, returns = np.zeros(count), np.ones(count), []
    at = np.linspace(steps / cfg.points, steps, cfg.points).astype(int)
    for step in range(1, steps + 1):
        epsilon = np.repeat([epsilon(step / steps) for epsilon, _ in arms.values()], cfg.trials)
        a = choose(q[row, s], epsilon, rng)
        k = draw(model.probability[s, a], rng)
        following, reward, ends = model.next[s, a, k], model.reward[s, a, k], model.ends[s, a, k]
        update(q, visits, s, a, reward, following, ends, cfg.gamma, cfg.patience)
        age, earned = age + 1, earned + reward
        over = ends | (age >= model.limit)
        following[over] = rng.choice(states, over.sum(), p=model.start)
        s, age, episodes = following, np.where(over, 0, age), episodes + over
        if step == at[len(returns)]:
            returns.append(true_return(model, greedy(q)).reshape(shape))
    online = (earned / episodes).reshape(shape)
    return at, np.array(returns), online, q.reshape(*shape, *q.shape[1:])


# %% [markdown]
# ## The maps
# The value of a field is $\max_a Q(s, a)$, the arrows are the actions that are best there. On slippery ice an action
# goes where it points, or to either side of that, one time in three each: the best policy leans against the edge of the
# lake, or away from a hole, and lets itself slip forward.


# %%
def draw_maps(maps, lake):
    """maps: title -> q [S,A] of a lake of letters [rows,columns]; returns the figure."""
    side = 0.5 * len(lake)
    figure, axes = plt.subplots(1, len(maps), figsize=(len(maps) * (side + 1.5), side + 1.2))
    for axis, (title, q) in zip(axes, maps.items(), strict=True):
        ends = np.isin(lake, (b"H", b"G"))  # nobody acts there: whatever Q says is where it started
        image = axis.imshow(np.ma.array(q.max(axis=1).reshape(lake.shape), mask=ends), vmin=0, vmax=1)
        axis.set_facecolor("0.6")
        figure.colorbar(image, ax=axis, shrink=0.7)
        axis.set(xticks=[], yticks=[], title=title)
        axis.grid(False)
        for state, ((row, column), letter) in enumerate(np.ndenumerate(lake)):
            if letter in (b"H", b"G"):
                axis.text(column, row, letter.decode(), ha="center", va="center", color="white", fontweight="bold")
                continue
            for a in np.flatnonzero(greedy(q[state])):
                across, down = ((-0.3, 0), (0, 0.3), (0.3, 0), (0, -0.3))[a]
                arrow = {"arrowstyle": "->", "color": "white"}
                axis.annotate("", (column + across, row + down), (column, row), arrowprops=arrow)
    return figure


# %% [markdown]
# ## What came out
# Optimism wins everywhere: all its learners end within 0.003 of value iteration or above, and it earns nearly the most
# from the start, because it stops trying what has disappointed it. Random actions are paid for while one learns (0.37
# instead of 0.73 on the 4x4 ice) and miss the mark on the 8x8 ice in one or two of ten learners. Without exploration
# the slippery lakes are never crossed; in the taxi, where each step costs, zeros are optimistic, and greed does well.
# Value iteration's policy is the best for discounted and endless episodes, not for these: on the 8x8 ice the mean
# learner is better. And Q may be far off for actions that no sensible policy takes; the policy does not mind.


# %%
def study(cfg, name, steps):
    """One task: optimum, learning and a check in Gymnasium -> JSON."""
    (called, kwargs), rng = TASKS[name], np.random.default_rng((cfg.seed, list(TASKS).index(name)))
    model = read_model(called, **kwargs)
    best = value_iteration(model, cfg.gamma)
    arms = schedules(cfg, model)
    at, returns, online, q = learn(model, cfg, arms, steps, rng)
    mine = greedy(q[list(arms).index(BEST), 0])
    played = evaluate.evaluate(lambda s: draw(mine[s], rng), called, cfg.played, cfg.seed, envs=50, **kwargs)
    optimum = float(true_return(model, greedy(best)[None])[0])
    close, error = returns[-1] >= optimum - 0.03, np.abs(q - best)[:, :, reachable(model)].max(axis=(2, 3))
    rows = [{"task": name, "exploration": arm, "return": returns[-1, i].mean(), "worst": returns[-1, i].min(),
             "share within 0.03 of the optimum": close[i].mean(), "while learning": online[i].mean(),
             "largest error of Q": error[i].mean()} for i, arm in enumerate(arms)]  # fmt: skip
    return {"rows": rows, "at": at, "returns": {arm: returns[:, i].T for i, arm in enumerate(arms)}, "best": best,
            "mine": q[list(arms).index(BEST), 0], "optimum": {
                "task": name, "states": len(best), "value iteration, discounted": best.max(axis=1) @ model.start,
                "value iteration": optimum, "upper bound": upper_bound(model),
                "Q-learning, exact": true_return(model, mine[None])[0], "Q-learning, played": played["mean"],
                "from": played["interval"][0], "to": played["interval"][1]}}  # fmt: skip


def reachable(model):
    """The states [S] that an episode can come to and go on from."""
    seen, flows = model.start > 0, (model.probability > 0) & ~model.ends
    while True:
        more = seen.copy()
        more[model.next[seen][flows[seen]]] = True
        if (more == seen).all():
            return seen
        seen = more


def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    if unknown := set(cfg.tasks) - set(TASKS):
        raise core.InputError(f"--tasks: {', '.join(sorted(unknown))} not known: choose from {', '.join(TASKS)}")
    if len(cfg.steps) != len(cfg.tasks) or min(cfg.steps) < cfg.points:
        raise core.InputError(f"--steps needs a number of at least --points ({cfg.points}) for each of --tasks")
    with core.run("a4_q_learning", options, cfg) as run:
        found = {name: run.once(name, lambda name=name, steps=steps: study(cfg, name, steps))
                 for name, steps in zip(cfg.tasks, cfg.steps, strict=True)}  # fmt: skip
        usual = dict(zip(Config.tasks, PRESETS["cpu"]["steps"], strict=True))
        short = {TASKS[task][0]: f"{steps} steps only" for task, steps in zip(cfg.tasks, cfg.steps, strict=True)
                 if steps < usual[task]}  # fmt: skip
        names = dict.fromkeys(TASKS[task][0] for task in cfg.tasks)
        run.record["data"] = [provenance(name, short.get(name, "")) for name in names]
        rows = [row for task in found.values() for row in task["rows"]]
        run.record["tables"] = {"exploration": rows, "optimum": [task["optimum"] for task in found.values()]}
        best = {row["task"]: row for row in rows if row["exploration"] == BEST}
        optimum = {name: task["optimum"]["value iteration"] for name, task in found.items()}
        run.record["metrics"] = {
            **{f"return_{name}": row["return"] for name, row in best.items() if name != "firm"},
            **{f"optimum_{name}": value for name, value in optimum.items()},
            **{f"gap_{name}": optimum[name] - row["return"] for name, row in best.items()},
            **{f"gap_of_the_worst_{name}": optimum[name] - row["worst"] for name, row in best.items()},
            **{f"{row['exploration']}_{row['task']}": row["return"] for row in rows if row["exploration"] != BEST},
        }  # fmt: skip
        history = {(name, arm): values for name, task in found.items() for arm, values in task["returns"].items()}
        run.record["history"] = {", ".join(of): np.mean(values, axis=0).tolist() for of, values in history.items()}
        curves = {name: task["returns"] | {"optimum": [task["optimum"]["value iteration"]] * len(task["at"])}
                  for name, task in found.items()}  # fmt: skip
        figure = core.plots.panels(curves, xlabel="share of the steps", x=np.arange(1, cfg.points + 1) / cfg.points,
                                   legend="side", title=BAND)  # fmt: skip
        run.figure("exploration", figure)
        for name in [name for name in found if name != "taxi"]:
            lake = gymnasium.make(TASKS[name][0]).unwrapped.desc
            maps = {"value iteration": np.array(found[name]["best"]), "Q-learning": np.array(found[name]["mine"])}
            run.figure(f"map_{name}", draw_maps(maps, lake))
    return run.record


if __name__ == "__main__":
    core.cli(main)
