"""Assignment 2 - Batch Normalization: deep networks train from almost any initial scale, given enough examples a batch.

Paper:     Ioffe, Szegedy 2015, arXiv:1502.03167 (batch); Ba, Kiros, Hinton 2016, arXiv:1607.06450 (layer)
Task:      write both normalisations and their gradients, then classify CIFAR-10 by deep networks with and without them
Shapes:    images [N,3072] -> 5 times (affine -> normalisation -> ReLU) [N,100] -> scores [N,10]
Reference: gradient errors between 1e-13 and 1e-8, random data (CS231n 2018, assignment 2, BatchNormalization notebook)
Run:       python -m course.a2_normalization --preset cpu --seed 0
Departs:   pixels are divided by 255, so our scales are not the notebook's; every figure is a mean over initialisations
"""

# %%
import dataclasses
import functools

import keras
import numpy as np

from course import core
from course.core import timing
from models.numpy_net import checks, gradcheck, norm, trials
from models.numpy_net import net as nets


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the initial weights and the order of the examples
    data: str = "cifar10"  # data set, as core.data knows it
    stand_in: str = ""  # set to take where no source has it; empty: an error
    examples: int = 1_000  # training images
    validation: int = 1_000  # validation images
    hidden: tuple[int, ...] = (100, 100, 100, 100, 100)  # units of the hidden layers
    epochs: int = 10  # passes over the training images, in every experiment
    batch: int = 50  # images a step, but in the batch-size experiment
    lr: float = 1e-3  # Adam's
    weight_scale: float = 0.05  # standard deviation of the first weights, but in the sweep
    scales: int = 20  # weight scales of the sweep, from 1e-4 to 1
    batches: tuple[int, ...] = (5, 10, 50)  # sizes of the batch-size experiment
    batches_lr: float = 3e-4  # Adam's in it: small enough for batches of 5
    trials: int = 5  # runs of each setting, each from its own weights
    sweep_trials: int = 5  # the same, in the sweep


PRESETS = {
    "smoke": {"data": "fashion_mnist_12k", "examples": 200, "validation": 200, "hidden": (20, 20, 20), "epochs": 2,
              "scales": 3, "batches": (5, 50), "trials": 2, "sweep_trials": 1},
    "cpu": {"stand_in": "fashion_mnist", "trials": 3, "sweep_trials": 2}, "full": {},
}  # fmt: skip
KINDS = {"none": None, "batch norm": "batch", "layer norm": "layer"}


# %% [markdown]
# ## Batch normalisation, forward
# Layers learn best from inputs of mean 0 and variance 1. We can scale the data so, but not the outputs of a hidden
# layer: they drift as the weights before them learn. So let the network do it, with what it has at hand, a batch. For
# each feature (column) of $x$ [N, D], over the $N$ examples:
#
# $$\mu = \tfrac1N \sum_n x_n \;(1), \quad v = \tfrac1N \sum_n (x_n - \mu)^2 \;(2), \quad
#   \hat x_n = \frac{x_n - \mu}{\sigma},\; \sigma = \sqrt{v + \epsilon} \;(3), \quad
#   y_n = \gamma \hat x_n + \beta \;(4)$$
#
# $\gamma$ and $\beta$ are learned: with them the layer can still have any mean and spread, but as two parameters, no
# longer as a tangle of all earlier weights. At test time an answer must not depend on the other examples in the batch
# (one alone would always come out as $\beta$!), so training keeps running averages for use in eq. 3 then:
#
# $$r \leftarrow m\, r + (1 - m)\, (\mu \text{ or } v) \quad(5)$$


# %%
def batch_norm_forward(x, gamma, beta, running, *, train, momentum=0.9, eps=1e-5):
    """x [N, D], gamma and beta [D] -> out [N, D], cache; training updates `running` {"mean", "var"} [D] in place."""
    # exercise: eqs. 1 to 3, and eq. 5 in place; in testing the running averages take the place of eqs. 1 and 2
    if train:
        mean = x.mean(axis=0)
        centred = x - mean
        var = (centred**2).mean(axis=0)
        running["mean"] += (1 - momentum) * (mean - running["mean"])
        running["var"] += (1 - momentum) * (var - running["var"])
    else:
        centred, var = x - running["mean"], running["var"]
    sigma = np.sqrt(var + eps)
    normal = centred / sigma
    # end exercise
    return gamma * normal + beta, (normal, centred, sigma, gamma)


# %% [markdown]
# ## Backward, in stages
# $\mu$ and $v$ are made of all $N$ inputs, so every output depends on every input of its column. No matter: draw the
# forward pass as a graph of single operations and walk it backwards, one line each. Where one number went to many
# (broadcasting), its gradient is the sum over them; where many were averaged, each gets $1/N$ of the gradient.
#
# $$x \to \mu; \quad c = x - \mu; \quad q = c^2; \quad v = \tfrac1N \textstyle\sum q;
#   \quad \sigma = \sqrt{v + \epsilon}; \quad i = 1/\sigma; \quad \hat x = c\, i; \quad y = \gamma \hat x + \beta$$


# %%
def batch_norm_backward(d_out, cache):
    """d_out [N, D] and the cache of a training forward -> dx [N, D], dgamma [D], dbeta [D], node by node."""
    normal, centred, sigma, gamma = cache
    # exercise: the gradient of each node of the graph, from y back to x (c is used twice, and so is x)
    d_beta = d_out.sum(axis=0)
    d_gamma = (d_out * normal).sum(axis=0)
    d_normal = d_out * gamma
    d_inverse = (d_normal * centred).sum(axis=0)
    d_centred = d_normal / sigma  # c's first use
    d_sigma = -d_inverse / sigma**2
    d_var = d_sigma / (2 * sigma)
    d_square = np.broadcast_to(d_var / len(d_out), d_out.shape)
    d_centred = d_centred + 2 * centred * d_square  # and its second
    d_mean = -d_centred.sum(axis=0)
    dx = d_centred + d_mean / len(d_out)
    # end exercise
    return dx, d_gamma, d_beta


# %% [markdown]
# ## Backward, on paper
# Write $g_n = \partial L / \partial \hat x_n = \gamma\, \partial L / \partial y_n$. From eqs. 1 to 3, with $[n = k]$
# one where $n = k$ and else zero,
#
# $$\frac{\partial (x_n - \mu)}{\partial x_k} = [n = k] - \tfrac1N \;(6), \qquad
#   \frac{\partial \sigma}{\partial x_k} = \frac{1}{2 \sigma} \cdot \frac2N (x_k - \mu) = \frac{\hat x_k}{N} \;(7)$$
#
# (in eq. 7 the way through $\mu$ vanishes, because $\sum_n (x_n - \mu) = 0$). The quotient rule on eq. 3 gives
#
# $$\frac{\partial \hat x_n}{\partial x_k} = \frac1\sigma \Bigl([n = k] - \tfrac1N
#   - \tfrac1N \hat x_n \hat x_k\Bigr) \;(8), \qquad
#   \frac{\partial L}{\partial x_k} = \sum_n g_n \frac{\partial \hat x_n}{\partial x_k}
#   = \frac1\sigma \Bigl(g_k - \tfrac1N \sum_n g_n - \hat x_k\, \tfrac1N \sum_n g_n \hat x_n\Bigr) \;(9)$$
#
# The two sums are needed anyway: $\sum_n g_n = \gamma\, \partial L/\partial\beta$ and
# $\sum_n g_n \hat x_n = \gamma\, \partial L/\partial\gamma$. Hence
#
# $$\frac{\partial L}{\partial x_k} = \frac{\gamma}{\sigma} \Bigl(\frac{\partial L}{\partial y_k}
#   - \tfrac1N \Bigl(\frac{\partial L}{\partial \beta} + \hat x_k \frac{\partial L}{\partial \gamma}\Bigr)\Bigr)\;(10)$$
#
# Eq. 9 says what normalisation does to learning: from the gradient it removes the part along the vector of ones and the
# part along $\hat x$. Shifting or stretching a column changes nothing after it, so no gradient asks for it.


# %%
def batch_norm_backward_short(d_out, cache):
    """The same as `batch_norm_backward`, by eq. 10."""
    normal, _, sigma, gamma = cache
    # exercise: two sums, then eq. 10 in one line
    d_beta, d_gamma = d_out.sum(axis=0), (d_out * normal).sum(axis=0)
    dx = gamma / sigma * (d_out - (d_beta + normal * d_gamma) / len(d_out))
    # end exercise
    return dx, d_gamma, d_beta


# %% [markdown]
# ## Layer normalisation
# The same equations 1 to 4, but the mean and variance are those of one example over its $D$ features: along a row, not
# down a column. There is no batch, so nothing to remember for test time. $\gamma$ and $\beta$ still belong to features;
# eq. 9 therefore holds along a row with $g = \gamma\, \partial L/\partial y$, but its sums are no longer those of
# $\gamma$ and $\beta$, and eq. 10 does not hold.


# %%
def layer_norm_forward(x, gamma, beta, *, eps=1e-5):
    """x [N, D], gamma and beta [D] -> out [N, D], cache; training and testing are the same."""
    # exercise: eqs. 1 to 3 along each row
    centred = x - x.mean(axis=1, keepdims=True)
    sigma = np.sqrt((centred**2).mean(axis=1, keepdims=True) + eps)
    normal = centred / sigma
    # end exercise
    return gamma * normal + beta, (normal, sigma, gamma)


def layer_norm_backward(d_out, cache):
    """d_out [N, D] -> dx [N, D], dgamma [D], dbeta [D]."""
    normal, sigma, gamma = cache
    # exercise: eq. 9 along each row; gamma and beta as before
    g = d_out * gamma
    dx = (g - g.mean(axis=1, keepdims=True) - normal * (g * normal).mean(axis=1, keepdims=True)) / sigma
    d_gamma, d_beta = (d_out * normal).sum(axis=0), d_out.sum(axis=0)
    # end exercise
    return dx, d_gamma, d_beta


# %% [markdown]
# ## Checks
# Gradients, deep networks' too, against centred differences; the layers' against Keras's GradientTape; both backwards
# against each other, and timed. After many batches the test-mode output must have mean $\beta$ and deviation $\gamma$.
#
# **Which preparation of the images is like batch norm, which like layer norm?** Batch norm ignores any rescaling of a
# *feature*, as does taking off the mean image and dividing each pixel by its deviation. Layer norm ignores any
# rescaling of an *example*, as does giving each image one brightness and contrast (table of invariances).


# %%
def in_training(function):
    """A batch-norm forward of (x, gamma, beta) alone, in training, with running averages of its own."""
    return lambda x, gamma, beta, **o: function(x, gamma, beta, norm.running_statistics(x.shape[1]), train=True, **o)


def tape(layer, arrays, upstream):
    """A Keras layer in training on arrays = x, gamma, beta: its output, and the arrays' gradients from `upstream`."""
    import tensorflow as tf

    layer = layer(epsilon=1e-5, dtype="float64")
    model = keras.Sequential([keras.Input(arrays[0].shape[1:], dtype="float64"), layer])
    inputs, state = [tf.constant(array) for array in arrays], [v.value for v in layer.non_trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        out, _ = model.stateless_call(inputs[1:], state, inputs[0], training=True)
    return [out.numpy(), *(slope.numpy() for slope in tape.gradient(out, inputs, upstream))]


def check(rng):
    """Ours and the library's -> {name: list of `gradcheck.Check`}, and rows of the largest differences from Keras."""
    arrays = {"x": 3 * rng.standard_normal((4, 5)) + 1, "gamma": rng.standard_normal(5), "beta": rng.standard_normal(5)}
    upstream, inputs = rng.standard_normal((4, 5)), list(arrays.values())
    theirs = {"batch norm": tape(keras.layers.BatchNormalization, inputs, upstream),
              "layer norm": tape(keras.layers.LayerNormalization, inputs, upstream)}  # fmt: skip
    pairs = {"batch norm, staged": (in_training(batch_norm_forward), batch_norm_backward),
             "batch norm, short": (in_training(batch_norm_forward), batch_norm_backward_short),
             "batch norm, library": (in_training(norm.batch_norm_forward), norm.batch_norm_backward),
             "layer norm": (layer_norm_forward, layer_norm_backward),
             "layer norm, library": (norm.layer_norm_forward, norm.layer_norm_backward)}  # fmt: skip
    found, rows = {}, []
    for name, (forward, backward) in pairs.items():
        found[name] = gradcheck.check_layer(forward, backward, arrays, rng)
        out, cache = forward(*inputs)
        both = zip([out, *backward(upstream, cache)], theirs[name.partition(",")[0]], strict=True)
        rows.append({"of": name, "difference from Keras": max(float(np.abs(a - b).max()) for a, b in both)})
    x, y = rng.standard_normal((8, 12)), rng.integers(0, 5, 8)
    for name in ("batch", "layer"):
        net = nets.create(rng, (12, 10, 10, 10, 5), normalization=name, dtype=np.float64)
        found[f"4-layer net, {name} norm"] = checks.training_loss(nets.loss, net, x, y)
    return found, rows


def time_backward(rng, shape):
    """Row: the median milliseconds of both backward passes of batch norm, and their largest relative difference."""
    x, d_out, gamma = rng.standard_normal((3, *shape))
    _, cache = in_training(batch_norm_forward)(x, gamma[0], 0)
    both = [functools.partial(f, d_out, cache) for f in (batch_norm_backward, batch_norm_backward_short)]
    staged, short = (timing.time_calls(call)["p50_ms"] for call in both)
    gap = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(*(call() for call in both), strict=True))
    return {"examples": shape[0], "features": shape[1], "staged, ms": staged, "short, ms": short,
            "staged / short": staged / short, "relative difference": gap}  # fmt: skip


def settle(rng, passes=100):
    """Rows: gamma and beta of three features, and the test-mode output's mean and deviation on fresh examples."""
    mix, running = rng.standard_normal((10, 3)), norm.running_statistics(3, np.float64)
    gamma, beta = np.array([1.0, 2, 3]), np.array([11.0, 12, 13])
    for n in [200] * passes + [10_000]:
        x = np.maximum(rng.standard_normal((n, 10)), 0) @ mix
        out, _ = batch_norm_forward(x, gamma, beta, running, train=n == 200)
    return [{"beta": b, "mean": mean, "gamma": g, "deviation": deviation}
            for b, mean, g, deviation in zip(beta, out.mean(axis=0), gamma, out.std(axis=0), strict=True)]  # fmt: skip


def invariances(rng):
    """Rows: how far the first example's output moves when the batch is changed, for both normalisations."""
    x, scale, shift = rng.uniform(1, 9, (3, 20, 10))
    changes = {"each feature rescaled": x * scale[0] + shift[0],
               "each example rescaled": x * scale[:, :1] + shift[:, :1],
               "the other examples exchanged": np.concatenate([x[:1], shift[1:]])}  # fmt: skip

    def moved(forward, changed):
        return float(np.abs(forward(changed, 1, 0, eps=0)[0] - forward(x, 1, 0, eps=0)[0])[0].max())

    return [{"change": name, "batch norm": moved(in_training(batch_norm_forward), changed),
             "layer norm": moved(layer_norm_forward, changed)} for name, changed in changes.items()]  # fmt: skip


# %% [markdown]
# ## In a deep network
# Each hidden layer becomes affine, normalisation, ReLU (`models/numpy_net/net.py`).
#
# **How does the scale of the first weights matter, and why?** Without normalisation each layer multiplies the signal,
# and on the way back the gradient, by a factor in proportion to it: after five layers the fifth power. Too small, and
# only biases learn; too large, and the loss is in the thousands. Normalisation resets the signal at each layer. What
# remains: the larger a weight, the less a step of Adam turns it, hence the slow learning at scale 1; and where $v$ is
# far below $\epsilon$, eq. 3 no longer normalises. With small weights layer norm helps less than batch norm.
#
# **How do batch norm and batch size depend on each other?** A mean over $N$ examples has noise of $\sigma / \sqrt N$:
# with 5 examples nearly half a deviation, a new one at each step, so batch norm suffers from small batches. The others,
# which have no such noise, take the same steps and show what is due to the number of steps alone.
#
# **When does layer norm fail?** With few features. One alone becomes $\beta$ whatever it was; of two only the order is
# left, one bit. The table takes networks with one narrow layer.


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    with core.run("a2_normalization", options, cfg) as run:
        images = core.data.load(cfg.data, stand_in=cfg.stand_in)
        data = trials.centred(core.data.three_way(images, cfg.examples, cfg.validation, 0))
        rng = np.random.default_rng(cfg.seed)

        def train(stage, hidden=cfg.hidden, scale=cfg.weight_scale, batch=cfg.batch, lr=cfg.lr, times=cfg.trials):
            kinds = {kind: {"normalization": name, "weight_scale": scale} for kind, name in KINDS.items()}
            return trials.compare(run, stage, kinds, data, hidden, seed=cfg.seed, trials=times,
                                  epochs=cfg.epochs, batch=batch, lr=lr)  # fmt: skip

        found, differences = check(rng)
        gradients, settled, times = checks.rows(found), settle(rng), [time_backward(rng, (n, 100)) for n in (50, 1_000)]
        deep = train("deep network")
        batches = {n: train(f"batches of {n}", batch=n, lr=cfg.batches_lr) for n in cfg.batches}
        narrow = {n: train(f"narrow layer of {n}", (100, n, 100)) for n in (1, 2, 3, 5, 10, 20)}
        sweep = {scale: train(f"scale {scale:.1e}", scale=scale, times=cfg.sweep_trials)
                 for scale in np.logspace(-4, 0, cfg.scales).tolist()}  # fmt: skip

        run.record |= {"data": images.provenance, "tables": {
            "gradient check": gradients, "difference from Keras": differences, "backward": times,
            "after training": settled, "invariances": invariances(rng),
            "deep network": trials.table("scale", {cfg.weight_scale: deep}), "scale": trials.table("scale", sweep),
            "batch size": trials.table("examples", batches), "narrow layer": trials.table("units", narrow),
        }}  # fmt: skip
        run.record["metrics"] = {
            "gradient_check_worst": max(row["relative"] for row in gradients),
            "backward_difference": max(row["relative difference"] for row in times),
            "backward_speedup": times[0]["staged / short"],
            "difference_from_keras": max(row["difference from Keras"] for row in differences),
            "settled_mean_error": max(abs(row["mean"] - row["beta"]) / row["gamma"] for row in settled),
            "settled_deviation_error": max(abs(row["deviation"] / row["gamma"] - 1) for row in settled),
        }
        for kind, values in trials.ends(sweep, "validation").items():
            name = kind.replace(" ", "_")
            run.record["metrics"] |= {f"{name}_training_accuracy": float(deep[kind]["training"][:, -1].mean()),
                                      f"{name}_validation_accuracy": float(deep[kind]["validation"][:, -1].mean()),
                                      f"{name}_scales_above_25": int((values.mean(axis=0) > 25).sum())}  # fmt: skip

        run.record["history"] = {f"{kind}, {curve}": one[curve].mean(axis=0).tolist() for kind, one in deep.items()
                                 for curve in ("loss", "training", "validation")}  # fmt: skip
        titles = {"loss": "training loss", "training": "training accuracy, %", "validation": "validation accuracy, %"}
        curves = {title: {kind: found[curve] for kind, found in deep.items()} for curve, title in titles.items()}
        run.figure("deep_network", core.plots.panels(curves))
        curves = {f"batches of {n}": {kind: found[kind]["training"] for kind in KINDS} for n, found in batches.items()}
        run.figure("batch_size", core.plots.panels(curves, ylabel="training accuracy, %", ylim=(0, 100)))
        titles = {"spread": "spread of the last layer at the start"} | titles
        figure = core.plots.panels({title: trials.ends(sweep, curve) for curve, title in titles.items()}, x=list(sweep),
                                   xlabel="standard deviation of the first weights", xscale="log")  # fmt: skip
        for axes in figure.axes[:2]:
            axes.set_yscale("log")
        run.figure("scale", figure)
        run.figure("narrow_layer", core.plots.curves(
            trials.ends(narrow, "training"), x=list(narrow), ylabel="training accuracy, %",
            xlabel="units of the second of three hidden layers"))  # fmt: skip
    return run.record


if __name__ == "__main__":
    core.cli(main)
