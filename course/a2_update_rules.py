"""Assignment 2 - Update rules: six ways down from the same gradients, each true to its formula to the eighth digit.

Paper:     Kingma, Ba 2015, arXiv:1412.6980 (Adam); Duchi, Hazan, Singer 2011, JMLR 12 (AdaGrad); Sutskever et al. 2013
Task:      write the rules; hold them to known values, to the library and to Keras; train one deep network by each
Shapes:    w, dw: one shape, any; images [N,3072] -> 5 times (affine -> ReLU) [N,100] -> scores [N,10]
Reference: each rule's values and state to 1e-8; RMSProp and Adam expected below SGD's loss (CS231n 2018, assignment 2)
Run:       python -m course.a2_update_rules --preset cpu --seed 0
Departs:   1. the known values are our own, worked out in decimal arithmetic, not the notebook's
           2. each rule has its best of several learning rates, and three seeds; there it has one of each
"""

# %%
import dataclasses

import numpy as np

from course import core
from models.numpy_net import net as nets
from models.numpy_net import optim
from models.numpy_net.solver import Solver


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the first initial weights and order; further trials take the next
    data: str = "cifar10"  # data set, as core.data knows it
    stand_in: str = ""  # set to take where no source has it; empty: an error
    examples: int = 4_000  # training images
    validation: int = 1_000  # validation images
    hidden: tuple[int, ...] = (100, 100, 100, 100, 100)  # units of the hidden layers
    epochs: int = 8  # passes over the training images
    batch: int = 100  # images a step
    trials: int = 3  # runs of each rule at its best rate


PRESETS = {
    "smoke": {"data": "fashion_mnist_12k", "examples": 600, "validation": 200, "hidden": (20, 20), "epochs": 2,
              "batch": 20},
    "cpu": {"stand_in": "fashion_mnist"},
    "full": {},
}  # fmt: skip


# %% [markdown]
# ## A rule and its memory
# Backpropagation says which way is down from here, for this batch. How to step is another question, and each answer is
# a function `rule(w, dw, config) -> next_w, config`. What it remembers of earlier steps it keeps in `config`, next to
# its constants: the caller hands back the config it got, one for each parameter array. With an empty one a rule starts
# from its defaults. Below, $w$, the gradient $g$ and every memory are arrays of one shape; all is elementwise.
#
# **SGD** goes straight down: $w \leftarrow w - \eta g$ (1). In a ravine that is mostly from side to side.
#
# **Momentum** lets the steps add up, and friction $1 - \mu$ take some of it: what changes sign every step cancels.
#
# $$v \leftarrow \mu v - \eta g, \qquad w \leftarrow w + v \quad(2)$$
#
# **Nesterov's** takes the gradient where the velocity is about to carry us, $w + \mu v$. If we call *that* point $w$,
# since it is the one where gradients are known, the rule becomes
#
# $$v \leftarrow \mu v - \eta g, \qquad w \leftarrow w + \mu v - \eta g \quad(3)$$


# %%
def sgd(w, dw, config=None):
    """Eq. 1.  config: learning_rate."""
    config = {"learning_rate": 1e-2} | (config or {})
    # exercise: eq. 1
    next_w = w - config["learning_rate"] * dw
    # end exercise
    return next_w, config


def momentum(w, dw, config=None):
    """Eq. 2.  config: learning_rate, momentum; velocity."""
    config = {"learning_rate": 1e-2, "momentum": 0.9, "velocity": np.zeros_like(w)} | (config or {})
    # exercise: eq. 2; the new velocity goes into config
    config["velocity"] = config["momentum"] * config["velocity"] - config["learning_rate"] * dw
    next_w = w + config["velocity"]
    # end exercise
    return next_w, config


def nesterov(w, dw, config=None):
    """Eq. 3.  config: learning_rate, momentum; velocity."""
    config = {"learning_rate": 1e-2, "momentum": 0.9, "velocity": np.zeros_like(w)} | (config or {})
    # exercise: eq. 3; the new velocity goes into config
    config["velocity"] = config["momentum"] * config["velocity"] - config["learning_rate"] * dw
    next_w = w + config["momentum"] * config["velocity"] - config["learning_rate"] * dw
    # end exercise
    return next_w, config


# %% [markdown]
# ## A rate for each weight
# Weights whose gradients are always large should take smaller steps than those that are seldom moved.
#
# **AdaGrad** divides by the root of the sum of all squares so far; **RMSProp** by that of their running mean, which can
# forget; **Adam** also replaces the gradient by a running mean of it, and corrects both means for having begun at 0.
#
# $$a \leftarrow a + g^2, \qquad w \leftarrow w - \frac{\eta\, g}{\sqrt a + \epsilon} \quad(4)$$
#
# $$a \leftarrow \rho a + (1 - \rho) g^2, \qquad w \leftarrow w - \frac{\eta\, g}{\sqrt a + \epsilon} \quad(5)$$
#
# $$t \leftarrow t + 1, \quad m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
#   v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
#   w \leftarrow w - \eta\, \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} \quad(6)$$


# %%
def adagrad(w, dw, config=None):
    """Eq. 4.  config: learning_rate, epsilon; cache."""
    config = {"learning_rate": 1e-2, "epsilon": 1e-8, "cache": np.zeros_like(w)} | (config or {})
    # exercise: eq. 4; the new cache goes into config
    config["cache"] = config["cache"] + dw**2
    next_w = w - config["learning_rate"] * dw / (np.sqrt(config["cache"]) + config["epsilon"])
    # end exercise
    return next_w, config


def rmsprop(w, dw, config=None):
    """Eq. 5.  config: learning_rate, decay_rate, epsilon; cache."""
    config = {"learning_rate": 1e-2, "decay_rate": 0.99, "epsilon": 1e-8, "cache": np.zeros_like(w)} | (config or {})
    # exercise: eq. 5; the new cache goes into config
    config["cache"] = config["decay_rate"] * config["cache"] + (1 - config["decay_rate"]) * dw**2
    next_w = w - config["learning_rate"] * dw / (np.sqrt(config["cache"]) + config["epsilon"])
    # end exercise
    return next_w, config


def adam(w, dw, config=None):
    """Eq. 6.  config: learning_rate, beta1, beta2, epsilon; t, m, v."""
    start = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
    config = start | {"t": 0, "m": np.zeros_like(w), "v": np.zeros_like(w)} | (config or {})
    # exercise: eq. 6; t is raised before it is used; t, m and v go into config, without the correction
    config["t"] = config["t"] + 1
    config["m"] = config["beta1"] * config["m"] + (1 - config["beta1"]) * dw
    config["v"] = config["beta2"] * config["v"] + (1 - config["beta2"]) * dw**2
    m_hat = config["m"] / (1 - config["beta1"] ** config["t"])
    v_hat = config["v"] / (1 - config["beta2"] ** config["t"])
    next_w = w - config["learning_rate"] * m_hat / (np.sqrt(v_hat) + config["epsilon"])
    # end exercise
    return next_w, config


RULES = {rule.__name__: rule for rule in (sgd, momentum, nesterov, adagrad, rmsprop, adam)}


# %% [markdown]
# ## Known values
# One step from the same $w$, $g$ and memory. The numbers are not this program's: they were worked out from eqs. 1 to 6
# in decimal arithmetic, number by number (the test of this unit does it again, to 40 digits).

# %%
W, DW, MEMORY = np.array([-0.4, -0.1, 0.3, 0.8]), np.array([-0.5, 0.25, 1.0, -0.2]), np.array([0.6, 0.7, 0.8, 0.9])
KNOWN = {  # rule: the config before the step, the w after it, and the memory after it
    "sgd": ({}, [-0.395, -0.1025, 0.29, 0.802], {}),
    "momentum": ({"velocity": MEMORY}, [0.145, 0.5275, 1.01, 1.612], {"velocity": [0.545, 0.6275, 0.71, 0.812]}),
    "nesterov": ({"velocity": MEMORY}, [0.0955, 0.46225, 0.929, 1.5328], {"velocity": [0.545, 0.6275, 0.71, 0.812]}),
    "adagrad": ({"cache": MEMORY}, [-0.39457673861, -0.10286299164, 0.29254644013, 0.80206284247],
                {"cache": [0.85, 0.7625, 1.8, 0.94]}),
    "rmsprop": ({"cache": MEMORY}, [-0.39352611807, -0.10300177153, 0.28883360951, 0.80211833029],
                {"cache": [0.5965, 0.693625, 0.802, 0.8914]}),
    "adam": ({"t": 5, "m": MEMORY, "v": MEMORY}, [-0.40010447579, -0.10012931790, 0.29984864977, 0.79986244324],
             {"t": 6, "m": [0.49, 0.655, 0.82, 0.79], "v": [0.59965, 0.6993625, 0.8002, 0.89914]}),
}  # fmt: skip


def check_known():
    """One row a rule: the largest difference from the known w, and from the known memory."""
    rows = []
    for name, (before, w, after) in KNOWN.items():
        found, config = RULES[name](W, DW, before)
        memory = [np.abs(config[key] - np.array(value)).max() for key, value in after.items()]
        rows.append({"rule": name, "w": float(np.abs(found - w).max()), "memory": float(max(memory, default=0.0))})
    return rows


# %% [markdown]
# ## A hundred steps beside the library and Keras
# One step can be right and the second wrong: a memory that is not handed on, a $t$ that stays 1. So each rule walks 100
# steps down a noisy bowl, its config threaded from call to call, beside `models/numpy_net/optim.py` and
# `keras.optimizers`, which see the same noise. These two add $\epsilon$ elsewhere (under the root; in Adam beside
# the uncorrected $\sqrt v$), begin AdaGrad's sum at 0.1 and forget faster in RMSProp. With the constants below all
# three are the same rule; with each one's own defaults, the table says how far they come apart.

# %%
SAME = {  # rule: constants of ours, the library's and Keras's; exact in float32, in which Keras keeps them
    "sgd": ({}, {}, {}),
    "momentum": ({"momentum": 0.875}, {"momentum": 0.875}, {"momentum": 0.875}),
    "nesterov": ({"momentum": 0.875}, {"momentum": 0.875}, {"momentum": 0.875, "nesterov": True}),
    "adagrad": ({"epsilon": 0}, {"epsilon": 0, "initial_accumulator": 0},
                {"epsilon": 0, "initial_accumulator_value": 0}),
    "rmsprop": ({"epsilon": 0, "decay_rate": 0.9375}, {"epsilon": 0, "rho": 0.9375}, {"epsilon": 0, "rho": 0.9375}),
    "adam": ({"epsilon": 0, "beta1": 0.875, "beta2": 0.984375},
             *[{"epsilon": 0, "beta_1": 0.875, "beta_2": 0.984375}] * 2),
}  # fmt: skip
OWN = {name: ({}, {}, {}) for name in RULES} | {
    "momentum": ({}, {}, {"momentum": 0.9}),
    "nesterov": ({}, {}, {"momentum": 0.9, "nesterov": True}),
}


def walk(name, constants, rng, steps=100, lr=2.0**-7):
    """Largest difference of w, over the steps, from the library's and from Keras's, each with its `constants`."""
    import keras
    import tensorflow as tf

    kinds = {"adagrad": keras.optimizers.Adagrad, "rmsprop": keras.optimizers.RMSprop, "adam": keras.optimizers.Adam}
    start, noise, gaps = rng.standard_normal(20), rng.standard_normal((steps, 20)), []
    ours, config, library, state = start, dict(constants[0], learning_rate=lr), {"w": start.copy()}, {}
    variable, optimizer = tf.Variable(start), kinds.get(name, keras.optimizers.SGD)(lr, **constants[2])
    for jolt in noise:  # the gradient of |w|^2 / 2, with noise
        ours, config = RULES[name](ours, ours + jolt, config)
        getattr(optim, name)(library, {"w": library["w"] + jolt}, state, lr, **constants[1])
        optimizer.apply([variable + jolt], [variable])
        gaps.append([np.abs(ours - other).max() for other in (library["w"], variable.numpy())])
    from_library, from_keras = np.max(gaps, axis=0)
    return {"rule": name, "from the library": float(from_library), "from Keras": float(from_keras)}


# %% [markdown]
# ## Six rules, one network
# Six layers on 4,000 pictures: deep enough that the layers' gradients differ in size. Each rule first tries three
# learning rates on one seed and keeps the one with the lowest training loss at the end, since what we compare is how
# fast they descend; then it has two more seeds. The assignment expects RMSProp and Adam to end below SGD's loss; the
# table says what came out here. (Validation accuracy soon stops rising, whatever the rule: 4,000 pictures are learned
# by heart before much else.)
#
# ## AdaGrad's fate
# *Why do AdaGrad's updates become very small, and would Adam's?* Its cache only grows. After $t$ gradients of size $g$
# it is $t g^2$, and the step is $\eta / \sqrt t$ (7): the rate decays by itself, whether or not we have arrived. Adam's
# $v$ is a mean, not a sum: of gradients that keep their size, its steps keep theirs. Measured below is the mean size of
# the updates at each step, and the exponent $p$ of $t^p$ fitted to it: first for gradients of size 1 and random sign,
# then for one layer of the network, whose gradients grow as it learns, so that AdaGrad's updates shrink less fast.

# %%
RATES = {"sgd": (0.01, 0.03, 0.06), "momentum": (0.001, 0.003, 0.01), "nesterov": (0.003, 0.01, 0.02),
         "adagrad": (0.001, 0.003, 0.01), "rmsprop": (1e-4, 3e-4, 1e-3), "adam": (3e-4, 1e-3, 3e-3)}  # fmt: skip


def threaded(rule):
    """An assignment's rule in the library's form, for the Solver: each parameter's config waits in `state`."""

    def step(params, gradients, state, lr, **constants):
        for name, gradient in gradients.items():
            config = state.get(name, constants) | {"learning_rate": lr}
            params[name][...], state[name] = rule(params[name], gradient, config)

    return step


def watched(rule, layer, sizes):
    """`threaded(rule)`, and the mean size of each update of `layer` is added to the list `sizes`."""
    step = threaded(rule)

    def watch(params, *rest, **constants):
        before = params[layer].copy()
        step(params, *rest, **constants)
        sizes.append(float(np.abs(params[layer] - before).mean()))

    return watch


def steady(name, rng, steps=1000):
    """Sizes of the updates [steps] under gradients of size 1 and random sign."""
    sizes, params, state = [], {"w": np.zeros(1000)}, {}
    step = watched(RULES[name], "w", sizes)
    for _ in range(steps):
        step(params, {"w": rng.choice((-1.0, 1.0), 1000)}, state, 1e-3)
    return [sizes]


def train(name, lr, examples, held_out, classes, cfg, trial):
    """Train the deep network by one rule -> what is drawn: per epoch loss and accuracies (%), per step update sizes."""
    sizes, widths = [], (examples[0].shape[1], *cfg.hidden, classes)
    net = nets.create(np.random.default_rng((cfg.seed, trial)), widths)
    rule = watched(RULES[name], f"W{len(cfg.hidden)}", sizes)
    solver = Solver(nets.loss, nets.scores, cfg.epochs, cfg.batch, lr, rule=rule, seed=cfg.seed + trial, verbose=False)
    history = solver.fit(net, examples, held_out)
    print(f"{name} {lr:g}, trial {trial}: loss {history.loss[-1]:.3f}, validation {history.val_accuracy[-1]:.1f} %")
    return {"lr": lr, "loss": history.loss, "train": history.train_accuracy, "val": history.val_accuracy,
            "updates": sizes}  # fmt: skip


def compare(name, examples, held_out, classes, cfg):
    """All runs of one rule: its search (one seed), then those at the best rate, one for each trial."""
    search = [train(name, lr, examples, held_out, classes, cfg, 0) for lr in RATES[name]]
    best = min(search, key=lambda run: run["loss"][-1])
    return {"search": search, "runs": [best] + [train(name, best["lr"], examples, held_out, classes, cfg, trial)
                                                for trial in range(1, cfg.trials)]}  # fmt: skip


def exponent(updates):
    """p of the power t^p that fits update sizes [trials, steps], over the second half of the steps."""
    sizes = np.mean(updates, axis=0)
    t, first = np.arange(1, len(sizes) + 1), len(sizes) // 2
    return float(np.polyfit(np.log(t[first:]), np.log(sizes[first:]), 1)[0])


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    with core.run("a2_update_rules", options, cfg, scope=False) as run:
        data = core.data.load(cfg.data, stand_in=cfg.stand_in)
        parts = core.data.three_way(data, cfg.examples, cfg.validation, 0)
        x, x_val = (images.reshape(len(images), -1).astype(np.float32) for images in (parts.x_train, parts.x_val))
        mean, spread = x.mean(axis=0), x.std()
        examples, held_out = ((x - mean) / spread, parts.y_train), ((x_val - mean) / spread, parts.y_val)

        known = check_known()
        walks = {kind: [walk(name, table[name], np.random.default_rng(cfg.seed)) for name in RULES]
                 for kind, table in (("same", SAME), ("own", OWN))}  # fmt: skip
        calm = {name: steady(name, np.random.default_rng(cfg.seed)) for name in ("adagrad", "rmsprop", "adam")}
        classes = len(data.labels)
        found = {name: run.once(name, lambda name=name: compare(name, examples, held_out, classes, cfg))
                 for name in RULES}  # fmt: skip

        curves = {key: {name: [one[key] for one in arm["runs"]] for name, arm in found.items()}
                  for key in ("loss", "train", "val", "updates")}  # fmt: skip
        rates = [{"rule": name, "lr": one["lr"], "val_accuracy": one["val"][-1], "loss": one["loss"][-1]}
                 for name, arm in found.items() for one in arm["search"]]  # fmt: skip
        run.record["data"] = data.provenance
        run.record["history"] = {key: curves[key] for key in ("loss", "train", "val")}
        run.record["tables"] = {"known values": known, "a hundred steps, same constants": walks["same"],
                                "a hundred steps, own defaults": walks["own"], "learning rates": rates}  # fmt: skip
        run.record["metrics"] = {
            "known_values_worst": max(max(row["w"], row["memory"]) for row in known),
            "keras_worst_difference": max(row["from Keras"] for row in walks["same"]),
            **{f"loss_{name}": float(np.mean(values, axis=0)[-1]) for name, values in curves["loss"].items()},
            "library_worst_difference": max(row["from the library"] for row in walks["same"]),
            **{f"val_accuracy_{name}": float(np.mean(values, axis=0)[-1]) for name, values in curves["val"].items()},
            **{f"update_exponent_{name}": exponent(curves["updates"][name]) for name in calm},
            **{f"update_exponent_steady_{name}": exponent(sizes) for name, sizes in calm.items()},
        }
        shown = {"training loss": curves["loss"], "training accuracy, %": curves["train"],
                 "validation accuracy, %": curves["val"]}  # fmt: skip
        run.figure("rules", core.plots.panels(shown, legend="side"))
        shown = {"updates, gradients of size 1": calm,
                 "updates, fifth layer": {name: curves["updates"][name] for name in calm}}  # fmt: skip
        run.figure("update_sizes", core.plots.panels(shown, xlabel="step", xscale="log", yscale="log"))
    return run.record


if __name__ == "__main__":
    core.cli(main)
