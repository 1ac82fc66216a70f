"""Day 02 - Optimizers: of seven rules tuned alike, Adam reaches a lower training loss than SGD, and Nesterov keeps up.

Paper:     Kingma, Ba 2015, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980; the others at their equations
Task:      descend 2-D test surfaces; train one network by every rule; shrink its weights; change its loss
Shapes:    image [B,H,W,C] -> flat [B,D] -> five hidden ReLU layers [B,100] -> scores [B,10]
Reference: CS231n assignment 2: RMSProp and Adam reach a lower loss than SGD in a 6-layer network (CIFAR-10, no figure)
Run:       python -m course.day02_optimizers --preset cpu --seed 0
Departs:   1. every rule gets the same number of learning rates to choose from; the assignment fixes one by hand
           2. constants and the place of epsilon are Keras's; He's initial weights; constant learning rates
"""

# %%
import dataclasses
import functools
import itertools
import math

import keras
import numpy as np
from threadpoolctl import threadpool_limits  # to one: for matrices this small a second thread costs more than it brings

from course import core
from course.day01_neural_network_from_scratch import backward, evaluate, forward
from models.numpy_net import losses, rule_checks
from models.numpy_net import net as nets
from models.numpy_net.over_seeds import gather, ladder, line, lowest, table

REFERENCE = {}  # the assignment claims an order, and gives no figure to stand beside


@dataclasses.dataclass
class Config:
    seed: int = 0  # of everything random
    data: tuple[str, ...] = ("mnist", "cifar10")  # the rules are compared on each; the rest is on the first
    stand_in: str = ""  # set to take where no source has one of them; empty: an error
    images: int = 45_000  # to train on
    validation: int = 5_000  # to see what was learned; strengths of penalties are chosen by them
    test: int = 10_000  # for the comparison of losses, in which nothing is chosen
    hidden: tuple[int, ...] = (100, 100, 100, 100, 100)  # units of each hidden layer; for penalties and losses, two
    epochs: int = 5  # at each learning rate of each rule
    batch: int = 100  # images a step
    rates: int = 7  # learning rates each rule is given, a factor of 10^0.5 apart
    seeds: int = 5  # networks and orders of the examples, the same for every rule, penalty and loss
    few: int = 1_000  # images from which penalised networks learn
    few_epochs: int = 100  # of those networks
    loss_epochs: int = 15  # of the networks with other losses
    noise: tuple[float, ...] = (0.0, 0.2, 0.4)  # shares of the training labels that are made wrong


PRESETS = {
    "smoke": {"data": ("fashion_mnist_12k",), "images": 600, "validation": 200, "test": 500, "epochs": 1, "rates": 2,
              "seeds": 2, "hidden": (30, 30, 30), "few": 200, "few_epochs": 3, "loss_epochs": 2, "noise": (0.0, 0.4)},
    "cpu": {"stand_in": "fashion_mnist", "images": 4_000, "validation": 1_000, "seeds": 3},  # the assignment's 4,000
    "full": {},
}  # fmt: skip


# %% [markdown]
# ## Seven rules
# All of them add a step $\Delta_t$ to a weight; they differ in what they make of its gradients $g_1, \dots, g_t$.
# A rule here is a function of $(g, \text{state}, t)$, elementwise. With learning rate $\eta$:
#
# $$\text{SGD: } \Delta_t = -\eta g_t \quad(1) \qquad
#   \text{momentum: } \Delta_t = m_t = \beta m_{t-1} - \eta g_t \quad(2) \qquad
#   \text{Nesterov: } \Delta_t = \beta m_t - \eta g_t \quad(3)$$
#
# Momentum (Polyak 1964) adds up what the gradients agree on, up to $1/(1-\beta)$ times, and cancels their quarrels.
# Nesterov's takes the gradient where momentum is about to lead; in eq. 3 the weights are kept at that point.
#
# The adaptive rules divide by how large a weight's gradients have been, so that a step's length is near $\eta$ whatever
# the scale of the loss. AdaGrad (Duchi et al. 2011) sums the squares, and its steps only shrink; RMSProp (Hinton's
# lecture 6e, 2012) forgets the old ones; Adam averages the gradients as well:
#
# $$\text{AdaGrad: } v_t = v_{t-1} + g_t^2 \quad(4) \qquad \text{RMSProp: } v_t = \rho v_{t-1} + (1-\rho) g_t^2
#   \quad(5) \qquad \text{both: } \Delta_t = -\eta g_t / \sqrt{v_t + \epsilon} \quad(6)$$
#
# $$\text{Adam: } m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2, \quad
#   \Delta_t = -\eta \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t} \cdot \frac{m_t}{\sqrt{v_t} + \epsilon} \quad(7)$$
#
# The averages begin at 0 and are too small at first, by $1-\beta^t$. The fraction corrects that, and makes Adam's first
# step $-\eta \operatorname{sign} g$; uncorrected it would be $(1-\beta_1)/\sqrt{1-\beta_2} = 3.16$ times as long.


# %%
def sgd(g, state, t, lr):
    return -lr * g  # eq. 1


def heavy_ball(g, state, t, lr, momentum=0.9):
    state["m"] = momentum * state.get("m", 0.0) - lr * g  # eq. 2
    return state["m"]


def nesterov(g, state, t, lr, momentum=0.9):
    return momentum * heavy_ball(g, state, t, lr, momentum) - lr * g  # eq. 3


def adagrad(g, state, t, lr, initial_accumulator_value=0.1, epsilon=1e-7):
    state["v"] = state.get("v", initial_accumulator_value) + g**2  # eq. 4
    return -lr * g / np.sqrt(state["v"] + epsilon)  # eq. 6


def rmsprop(g, state, t, lr, rho=0.9, epsilon=1e-7):
    state["v"] = rho * state.get("v", 0.0) + (1 - rho) * g**2  # eq. 5
    return -lr * g / np.sqrt(state["v"] + epsilon)  # eq. 6


def adam(g, state, t, lr, beta_1=0.9, beta_2=0.999, epsilon=1e-7):
    state["m"] = beta_1 * state.get("m", 0.0) + (1 - beta_1) * g
    state["v"] = beta_2 * state.get("v", 0.0) + (1 - beta_2) * g**2
    return -lr * math.sqrt(1 - beta_2**t) / (1 - beta_1**t) * state["m"] / (np.sqrt(state["v"]) + epsilon)  # eq. 7


# %% [markdown]
# ## Weight decay
# L2 regularisation adds $\lambda w$ to the gradient. For SGD that is to shrink every weight by $1-\eta\lambda$ a step;
# an adaptive rule divides the penalty too, and hardly shrinks the weights with large gradients. AdamW (Loshchilov and
# Hutter 2019, algorithm 2) keeps the shrinking away from the rule:
#
# $$w_{t+1} = w_t + \Delta_t(g_1, \dots, g_t) - \eta \lambda w_t \quad(8)$$


# %%
def descend(params, gradients, states, t, rule, lr, decay=0.0):
    """Step t = 1, 2, ... of `rule` on every array of `params`, in place, by eq. 8; `states`: {} before the first."""
    for name, g in gradients.items():
        step = rule(g, states.setdefault(name, {}), t, lr)
        params[name] += step - lr * decay * params[name]


RULES = {  # name: (rule, decay, the middle one of the learning rates it may choose from, Keras's optimizer)
    "SGD": (sgd, 0.0, 0.1, keras.optimizers.SGD),
    "momentum": (heavy_ball, 0.0, 0.01, keras.optimizers.SGD),
    "Nesterov": (nesterov, 0.0, 0.01, functools.partial(keras.optimizers.SGD, nesterov=True)),
    "AdaGrad": (adagrad, 0.0, 0.01, keras.optimizers.Adagrad),
    "RMSProp": (rmsprop, 0.0, 0.001, keras.optimizers.RMSprop),
    "Adam": (adam, 0.0, 0.001, keras.optimizers.Adam),
    "AdamW": (adam, 0.004, 0.001, keras.optimizers.AdamW),
}


# %% [markdown]
# ## Checks
# What `models/numpy_net/rule_checks.py` asks of the rules:
# - Are they Keras's? On the same random gradients, and each on those of a network that it trains, in float64 they must
#   stay within $10^{-6}$ for 100 steps. (In float32 Adam may make a whole step of mere rounding.)
# - Is eq. 8 decoupled? Weights that start at 1 and feel nothing but noise must shrink by $(1-\eta\lambda)^t$ however
#   loud the noise is; with $\lambda w$ in the gradient, the noise decides.
# - Do they follow a known path? On $f = (x^2 + \kappa y^2)/2$ gradient descent multiplies $x$ by $1-\eta$ and $y$ by
#   $1-\eta\kappa$: it diverges for $\eta > 2/\kappa$, and at best, at $\eta = 2/(1+\kappa)$, the distance shrinks to
#   $(\kappa-1)/(\kappa+1)$ a step, 96 % for $\kappa = 50$; momentum's to $(\sqrt\kappa-1)/(\sqrt\kappa+1)$, 75 %.
#   Elsewhere each walks at the best of the same 25 learning rates.
#
# ## One network
# For every rule the same first weights, the same order of the examples, and as many learning rates to choose from,
# around its customary one. Chosen is the least training loss in the mean over the seeds, for that is what an optimizer
# is asked to lower; what came of it for other images is shown beside.


# %%
def train(cfg, x, y, rule, lr, seed, hidden, epochs, *, decay=0.0, loss=losses.softmax_cross_entropy,
          penalty=None, after=None, strength=0.0):  # fmt: skip
    """Yields after each epoch the network and the losses of its steps; `penalty` is of eq. 9, `after` of eq. 10."""
    rng = np.random.default_rng((cfg.seed, seed))
    net, states, t = nets.create(rng, (x.shape[1], *hidden, int(y.max()) + 1)), {}, 0
    matrices = [name for name in net.params if name.startswith("W")]
    for _ in range(epochs):
        rows, values = rng.permutation(len(x)), []
        for first in range(0, len(x), cfg.batch):
            t, batch = t + 1, rows[first : first + cfg.batch]
            scores, memory = forward(net, x[batch])
            value, delta = loss(scores, y[batch])
            gradients = backward(net, delta, memory)
            for name in matrices if penalty else ():
                gradients[name] += penalty(net.params[name], strength)
            descend(net.params, gradients, states, t, rule, lr, decay)
            for name in matrices if after else ():
                net.params[name] = after(net.params[name], lr * strength)
            values.append(float(value))
        yield net, values


@np.errstate(all="ignore")  # what diverges overflows; a loss above 3, or no number, counts as 3: log 10 is 2.3
def sweep(cfg, parts, name):
    """Rows, a learning rate and seed each: the training loss along the way (20 points) and in the end, accuracy."""
    rows, ((x, y), held_out, _), (rule, decay, middle, _) = [], parts, RULES[name]
    for lr, seed in itertools.product(ladder(middle, cfg.rates), range(cfg.seeds)):
        epochs = list(train(cfg, x, y, rule, lr, seed, cfg.hidden, cfg.epochs, decay=decay))
        net, along = epochs[-1][0], np.concatenate([values for _, values in epochs])
        points = [part.mean() for part in np.array_split(along, min(20, len(along)))]
        *curve, loss = np.nan_to_num([*points, evaluate(net, x, y)["loss"]], nan=3).clip(max=3)
        rows.append({"lr": lr, "loss": loss, "accuracy": evaluate(net, *held_out)["accuracy"], "curve": curve})
    return rows


def compare_rules(run, cfg, parts, title):
    """The sweeps on data set `title`; returns the chosen curves {rule: [S, T]} and the final losses {rule: [S, R]}."""
    chosen, curves, final = [], {}, {}
    for name in RULES:
        rows = run.once(f"{title}-{name}", functools.partial(sweep, cfg, parts, name))
        chosen.append({"rule": name} | (best := lowest(rows, "lr", "loss", near=0.2)))
        curves[name], final[name] = gather(rows, "lr", "curve")[best["lr"]], line(rows, "lr", "loss")
        print(f"{title}, {name}: lr {best['lr']:.2g}, training loss {best['loss']:.3f}", flush=True)
    run.record["tables"][f"rules on {title}"] = chosen
    loss = {f"{title}_loss_{row['rule'].lower()}": row["loss"] for row in chosen}
    run.record["metrics"] |= {f"{title}_sgd_minus_adam": loss[f"{title}_loss_sgd"] - loss[f"{title}_loss_adam"]} | loss
    return curves, final


# %% [markdown]
# ## Penalties
# Added to the loss with strength $\lambda$: L2, $\frac\lambda2 \lVert w\rVert^2$, L1, $\lambda \lVert w \rVert_1$,
# and the elastic net, half of each. At L1's kink any number in $[-\lambda, \lambda]$ is a subgradient; we take 0:
#
# $$g_{\text{L2}} = \lambda w, \qquad g_{\text{L1}} = \lambda \operatorname{sign} w, \qquad
#   g_{\text{elastic}} = \tfrac{\lambda}{2} (w + \operatorname{sign} w) \quad(9)$$
#
# L2 pulls a small weight less and less, L1 all the way. But a subgradient step jumps over 0 and back, and the weight
# hovers within $\eta\lambda$ of it. For zeros, step on the loss alone, then move by $\eta\lambda$ and *stop at 0*:
#
# $$w \leftarrow \operatorname{sign}(w) \max(|w| - \eta\lambda, 0) \quad(10)$$


# %%
def soft_threshold(w, amount):
    """Eq. 10: every weight moved towards 0 by `amount`, and no further."""
    return np.sign(w) * np.maximum(np.abs(w) - amount, 0)


PENALTIES = {  # name: (eq. 9, eq. 10, the middle one of the strengths it may choose from)
    "none": (None, None, 0.0),
    "L2": (lambda w, strength: strength * w, None, 1e-2),
    "elastic": (lambda w, strength: strength / 2 * (w + np.sign(w)), None, 1e-3),
    "L1": (lambda w, strength: strength * np.sign(w), None, 1e-3),
    "L1, eq. 10": (None, soft_threshold, 1e-3),
}
BINS = np.linspace(-0.2025, 0.2025, 82)  # of histograms; the middle one is around 0


def penalised(cfg, parts, name):
    """Rows, a strength and seed each: SGD on few images; norm of the weights and gap in accuracy after each epoch."""
    rows, ((x, y), held_out, _), (penalty, after, middle) = [], parts, PENALTIES[name]
    few = x[: cfg.few], y[: cfg.few]
    for strength, seed in itertools.product(ladder(middle, 5) if middle else [0.0], range(cfg.seeds)):
        norms, gaps = [], []
        for net, _ in train(cfg, *few, sgd, 0.1, seed, cfg.hidden[:2], cfg.few_epochs,
                            penalty=penalty, after=after, strength=strength):  # fmt: skip
            w = np.concatenate([array.ravel() for key, array in net.params.items() if key.startswith("W")])
            accuracy, val_accuracy = (evaluate(net, *part)["accuracy"] for part in (few, held_out))
            norms.append(np.linalg.norm(w))
            gaps.append(accuracy - val_accuracy)
        rows.append({"strength": strength, "val_accuracy": val_accuracy, "gap": gaps[-1], "norm": norms[-1],
                     "below_0.001": 100 * (np.abs(w) < 1e-3).mean(), "zero": 100 * (w == 0).mean(), "gaps": gaps,
                     "norms": norms, "counts": np.histogram(net.params["W1"], BINS)[0]})  # fmt: skip
    return rows


def compare_penalties(run, cfg, parts):
    """Each penalty at the strongest setting within half a point of its own best validation accuracy, into `run`;
    `at_edge`: 1 where that is the last of the settings, so that a stronger one might do as well."""
    chosen, counts, norms, gaps = [], {}, {}, {}
    for name in PENALTIES:
        rows = run.once(f"penalty-{name}", functools.partial(penalised, cfg, parts, name))
        tried = table(rows, "strength")
        enough = max(row["val_accuracy"] for row in tried) - 0.5
        best = [row for row in tried if row["val_accuracy"] >= enough][-1]
        chosen.append({"penalty": name} | best | {"at_edge": int(0 < best["strength"] == tried[-1]["strength"])})
        norms[name], gaps[name] = (gather(rows, "strength", what)[best["strength"]] for what in ("norms", "gaps"))
        counts[name] = gather(rows, "strength", "counts")[best["strength"]].mean(axis=0)
    run.record["tables"]["penalties"] = chosen
    run.record["metrics"] |= {"zero_weights_l1": chosen[-2]["zero"], "zero_weights_l1_eq10": chosen[-1]["zero"]}
    run.figure("weights", core.plots.histograms(counts, BINS, xlabel="weight of the first layer"))
    panels = {"norm of all weights": norms, "gap in accuracy, training - validation": gaps}
    run.figure("penalties", core.plots.panels(panels, legend="side"))


# %% [markdown]
# ## Losses
# Five ways to say how wrong scores are (`models/numpy_net/losses.py` has formulas and gradients), lowered by Adam, to
# which their sizes are all one, on labels of which a share was made wrong; tested on clean ones. Calibration: of the
# answers given with 80 % confidence, are 80 % right? (The hinge loss never said that the softmax of its scores would be
# confidence.) With the answers sorted by it into 15 bins $B$ of equal width (Guo et al. 2017), the expected error is
#
# $$\text{ECE} = \sum_B \frac{|B|}{N} \left| \text{accuracy}(B) - \text{mean confidence}(B) \right| \quad(11)$$

# %%
LOSSES = {"cross-entropy": losses.softmax_cross_entropy, "squared error": losses.softmax_squared_error,
          "focal": losses.focal, "label smoothing": losses.label_smoothing, "hinge": losses.svm}  # fmt: skip


def with_loss(cfg, parts, name):
    """Rows, a share of wrong labels and seed each: accuracy and ECE, both in per cent, on the test images."""
    rows, ((x, y), _, (x_test, y_test)) = [], parts
    for share, seed in itertools.product(cfg.noise, range(cfg.seeds)):
        rng, classes = np.random.default_rng((cfg.seed, seed, 1)), int(y.max()) + 1
        noisy = np.where(rng.random(len(y)) < share, (y + rng.integers(1, classes, len(y))) % classes, y)
        *_, (net, _) = train(cfg, x, noisy, adam, 1e-3, seed, cfg.hidden[:2], cfg.loss_epochs, loss=LOSSES[name])
        p = losses.softmax(forward(net, x_test)[0])
        rows.append({"noise": share, "accuracy": 100 * (p.argmax(axis=1) == y_test).mean(),
                     "ece": 100 * losses.expected_calibration_error(p, y_test)})  # fmt: skip
    return rows


def compare_losses(run, cfg, parts):
    """Accuracy and calibration with every loss, by share of wrong labels: table and figure go to `run`."""
    found, accuracy, ece = [], {}, {}
    for name in LOSSES:
        rows = run.once(f"loss-{name}", functools.partial(with_loss, cfg, parts, name))
        found += [{"loss": name} | row for row in table(rows, "noise")]
        accuracy[name], ece[name] = line(rows, "noise", "accuracy"), line(rows, "noise", "ece")
    run.record["tables"]["losses"] = found
    panels = {"test accuracy, %": accuracy, "calibration error (ECE), %": ece}
    run.figure("losses", core.plots.panels(panels, x=cfg.noise, xlabel="share of wrong labels", legend="side"))


# %%
def load(cfg, name):
    """Training, validation and test part, each (x [N, D] less the mean training image, y), and the provenance."""
    images = core.data.load(name, stand_in=cfg.stand_in)
    parts = core.data.three_way(images, cfg.images, cfg.validation, cfg.test)
    x, x_val, x_test = (p.reshape(len(p), -1) / np.float32(255) for p in (parts.x_train, parts.x_val, parts.x_test))
    m = x.mean(axis=0)
    return [(x - m, parts.y_train), (x_val - m, parts.y_val), (x_test - m, parts.y_test)], images.provenance


def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    with core.run("day02_optimizers", options, cfg, scope=False) as run, threadpool_limits(1, "blas"):
        run.record |= {"data": [], "tables": {}}
        curves, final = {}, {}
        for name in cfg.data:
            parts, provenance = load(cfg, name)
            run.record["data"].append(provenance)
            if name == cfg.data[0]:
                rule_checks.record(run, descend, RULES, LOSSES, *parts[0], seed=cfg.seed)
                compare_penalties(run, cfg, parts)
                compare_losses(run, cfg, parts)
            title = provenance["name"]
            curves[title], final[title] = compare_rules(run, cfg, parts, title)
        axes = {"ylabel": "training loss", "yscale": "log", "legend": "side"}
        run.figure("loss_curves", core.plots.panels(curves, xlabel="twentieth of the training", **axes))
        rates = {name: ladder(middle, cfg.rates) for name, (_, _, middle, _) in RULES.items()}
        run.figure("sensitivity", core.plots.panels(final, x=rates, xlabel="learning rate", xscale="log", **axes))
        headline = ["keras_difference", *(f"{title}_sgd_minus_adam" for title in curves)]
        run.record["metrics"] = {name: run.record["metrics"][name] for name in headline} | run.record["metrics"]
    return run.record


if __name__ == "__main__":
    core.cli(main)
