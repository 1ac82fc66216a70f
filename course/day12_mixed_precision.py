"""Day 12 - Mixed precision: sixteen bits are enough to train with, if the loss is scaled and the weights keep 32.

Paper:     Micikevicius et al. 2018, "Mixed Precision Training", ICLR, arXiv:1710.03740; bfloat16: Kalamkar et al. 2019,
           arXiv:1905.12322; the deep autoencoder: Hinton and Salakhutdinov 2006, Science 313
Task:      round to 16 bits by hand; write loss scaling; train in 16 bits what fails without it, and day 10's network
Shapes:    grey pixels [B,D] -> 256, 128, 64, 32, 64, 128, 256 -> pixels [B,D]; pictures [B,H,W,C] -> logits [B,classes]
Reference: ResNet-50 on ImageNet: 76.04 % in mixed precision against 75.92 % in float32 (table 1 of the first paper)
Run:       python -m course.day12_mixed_precision --preset cpu --seed 0
Departs:   1. Adam or SGD for few epochs: the question is whether 16 bits follow 32, not how far either gets
           2. a CPU has no float16 arithmetic and emulates it: its times say nothing of a GPU's
"""

# %%
import dataclasses
from functools import partial

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from course import core
from course.day10_distributed import share_of_step
from models.scale import benchmark, precision

REFERENCE = {"float16_minus_float32": (0.12, "points", "Micikevicius et al. 2018, table 1: ResNet-50 on ImageNet")}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the initial weights and the order of the batches
    data: str = "cifar100"  # data set, as core.data knows it
    stand_in: str = ""  # set to take where no source has it; empty: an error
    train: int = 45_000  # training images, from the front of the training part
    val: int = 5_000  # the next ones: validation
    deep: tuple[int, ...] = (256, 128, 64, 32)  # units of the autoencoder's first half; the second mirrors them
    deep_epochs: int = 20  # passes over the training images
    deep_batch: int = 128  # images a step
    deep_lr: float = 0.003  # Adam's
    depth: int = 20  # layers with weights of day 10's network: 6n + 2
    width: int = 16  # channels of its first stage
    epochs: int = 60  # passes over the training images
    batch: int = 128  # images a step
    lr: float = 0.1  # of SGD with momentum; falls to 0 as a half cosine
    growth: int = 200  # good steps after which the dynamic scale doubles; Keras's own default is 2,000
    followed: int = 20  # steps in which our scaling is compared with Keras's
    policies: tuple[str, ...] = ("float32", "mixed_float16", "mixed_bfloat16")  # whose steps are timed
    xla: tuple[bool, ...] = (False, True)  # compiled by XLA or not, while they are timed
    rounds: int = 5  # of 10 steps each, that are timed


PRESETS = {
    "smoke": dict(data="fashion_mnist_12k", train=256, val=64, deep=(32, 16), deep_epochs=1, deep_batch=64, depth=8,
                  width=4, epochs=1, batch=64, lr=0.05, growth=2, followed=8, policies=("float32",), xla=(False,),
                  rounds=1),
    "cpu": dict(data="cifar10", stand_in="fashion_mnist", train=20_000, val=5_000, deep_epochs=6, depth=8, width=8,
                epochs=8, batch=64, lr=0.05, growth=100),
    "full": {},
}  # fmt: skip


# %% [markdown]
# ## Numbers of 16 bits
# A floating-point number is a sign, an exponent $e$ and a fraction of $m$ bits behind a leading 1.  With $k$ bits of
# exponent and $b = 2^{k-1} - 1$, the normal numbers are
#
# $$\pm\, 2^{e} \Bigl( 1 + \frac{f}{2^m} \Bigr), \quad 1 - b \le e \le b, \quad 0 \le f < 2^m \quad(1), \qquad
#   \text{spacing at } x: \; 2^{\max(\lfloor \log_2 |x| \rfloor,\, 1-b) - m} \quad(2)$$
#
# Below $2^{1-b}$ the spacing stays: these *subnormal* numbers lose a digit with each halving, until after the least,
# $2^{1-b-m}$, there is 0.  What lies beyond $2^b (2 - 2^{-m})$ becomes inf.  float16 has $k, m = 5, 10$: three decimal
# digits, from $6 \cdot 10^{-8}$ to 65,504.  bfloat16 has 8, 7: float32's range, two digits.


# %%
@dataclasses.dataclass(frozen=True)
class Format:
    """Floating-point numbers with `exponent` and `fraction` bits, and a sign."""

    exponent: int
    fraction: int

    @property
    def largest(self):
        return 4 / self.least_normal * (1 - 2.0 ** (-1 - self.fraction))

    @property
    def least_normal(self):
        return 2.0 ** (2 - 2 ** (self.exponent - 1))

    @property
    def least(self):
        return self.least_normal * 2.0**-self.fraction


FORMATS = {"float32": Format(8, 23), "float16": Format(5, 10), "bfloat16": Format(8, 7)}


def spacing(x, form):
    """From |x| to the next larger number of the format, eq. 2."""
    exponent = np.frexp(np.maximum(np.abs(x), form.least_normal))[1] - 1  # frexp's fraction is in [0.5, 1)
    return 2.0 ** (exponent - form.fraction)


def rounded(x, form):
    """float64 numbers -> the nearest of the format, the even one of two; inf beyond the largest."""
    step = spacing(x, form)
    near = np.rint(np.asarray(x) / step) * step  # rint goes to the even one
    return np.where(np.abs(near) > form.largest, np.copysign(np.inf, x), near)


# %% [markdown]
# ## Why the weights keep 32 bits
# An update of less than half the spacing at the weight is lost: $w - \eta g$ rounds back to $w$ (3), certainly where
# $|\eta g| < 2^{-m-2} |w|$.  In float16 that is 1/4096 of the weight, and late in training many updates are smaller.
# They would add up to something; lost one by one they do not.  So *mixed* precision computes with 16-bit copies of the
# weights, and adds the updates to float32 *master weights*.


# %%
def lost(weights, updates):
    """Format -> share (%) of the updates, those of 0 aside, that leave the rounded weight as it was: eq. 3."""
    weights, updates = (np.concatenate([np.ravel(a).astype(np.float64) for a in part]) for part in (weights, updates))
    weights, updates, shares = weights[updates != 0], updates[updates != 0], {}
    for name, form in FORMATS.items():
        near = rounded(weights, form)
        shares[name] = 100 * float((rounded(near - updates, form) == near).mean()) if len(near) else 0.0
    return shares


# %% [markdown]
# ## What else keeps 32 bits
# Sums of many numbers (in float16 2048 + 1 is 2048), squares (of more than 256: inf), exponentials (of more than 11:
# inf; of less than -17: 0, whose logarithm is -inf).  So softmax and loss, mean and variance of a normalisation, and
# the mean over a batch are taken in float32.  Products of matrices, where the time goes, multiply 16-bit numbers and
# add them up in 32.  Under the policy `mixed_float16` a Keras layer casts its inputs and weights; normalisations cast
# back by themselves, and the last layer is *told* `dtype="float32"`, for logits that meet a softmax.


# %%
def fragile(dtype):
    """Three things computed wholly in NumPy's `dtype`: [their names and values, what they should be]."""
    logits, maps = np.array([0, 20], dtype), np.array([299, 301] * 512, dtype)
    with np.errstate(all="ignore"):
        shares = np.exp(logits - logits.max())
        return {
            "cross-entropy of a class 20 below the other": (float(-np.log(shares[0] / shares.sum())), 20.0),
            "4,096 ones added one by one": (float(np.add.accumulate(np.ones(4_096, dtype))[-1]), 4_096.0),
            "variance of 299 and 301, as the mean square less the square of the mean": (
                float((maps * maps).mean(dtype=dtype) - maps.mean(dtype=dtype) ** 2), 1.0),
        }  # fmt: skip


# %% [markdown]
# ## The loss scale
# Gradients are small: the loss is a mean over the batch, so each image's part has been divided by $B$, and in a mean
# over pixels each pixel's by $BD$.  On the way back a number below $2^{-25}$ is 0 in float16, while of the large ones,
# up to $2^{15}$, few are used.  The chain rule is linear: multiply the loss by $S$, and all gradients are multiplied,
#
# $$\nabla_w (S L) = S\, \nabla_w L \quad(4), \qquad g = \tfrac1S \nabla_w (S L) \text{ in float32} \quad(5)$$
#
# Where $S$ was too large, some gradient is inf or nan, and the step must be left out.  A fixed $S$ has to be guessed.
# The *dynamic* scale finds its own, as a machine with two numbers for its state, $S$ and a count $c$ of good steps:
#
# $$(S, c) \leftarrow \begin{cases} (S/2,\, 0) & \text{a gradient is not finite} \\ (2S,\, 0) & \text{else, if }
#   c + 1 = N \\ (S,\, c + 1) & \text{else} \end{cases} \quad(6)$$


# %%
@dataclasses.dataclass(frozen=True)
class Scaling:
    """How a loss is scaled: from where on, and after how many good steps it doubles."""

    start: float = 1.0
    growth: int = 0  # 0: fixed, and nobody looks for inf


def next_state(scale, good, finite, growth):
    """Eq. 6: the scale and the count after a step whose gradients were `finite` or not; numbers or tensors."""
    # exercise: eq. 6
    good = ops.where(finite, good + 1, 0)
    doubles = ops.equal(good, growth)
    scale = ops.where(finite, ops.where(doubles, 2 * scale, scale), scale / 2)
    return scale, ops.where(doubles, 0, good)
    # end exercise


def scaled_step(model, optimizer, loss, scaling):
    """A training step with its own loss scaling: batch (x, y) -> loss, whether the weights were updated, S."""
    scale, good = tf.Variable(scaling.start), tf.Variable(0)
    weights = model.trainable_variables
    optimizer.build(weights)  # a graph cannot make variables inside a condition

    @tf.function(jit_compile=core.runtime.jit())
    def step(x, y):
        used = scale.read_value()
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
            scaled = value * used  # eq. 4
        gradients = [tf.cast(g, tf.float32) / used for g in tape.gradient(scaled, weights)]  # eq. 5
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
        if scaling.growth == 0:
            optimizer.apply(gradients, weights)
            return value, tf.constant(True), used
        if finite:
            optimizer.apply(gradients, weights)
        after, count = next_state(used, good, finite, scaling.growth)
        scale.assign(after)
        good.assign(count)
        return value, finite, used

    return step


# %% [markdown]
# Keras has the same machine as an optimizer around an optimizer: `core.runtime.scaled`, for loops of one's own, which
# differentiate `optimizer.scale_loss(loss)`, and for `fit` on several replicas, where Keras looks for inf in the first
# one's gradients only.  So day 10's loop runs in float16 unchanged, with the losses of the step above.


# %%
def follow(task, batch, steps, growth):
    """The first steps by our scaling and by day 10's loop with Keras's: name -> [loss, S] a step."""
    start, curves = 2.0**24, {"ours": [], "Keras": []}  # so high that the first steps overflow
    with core.runtime.policy("mixed_float16"):
        step = scaled_step(*task.begin(), task.loss, Scaling(start, growth))
        for x, y in task.batches().repeat().take(steps):
            value, _, scale = step(x, y)
            curves["ours"].append([float(value), float(scale)])
        model, optimizer = task.begin()
        optimizer = core.runtime.scaled(optimizer, initial_scale=start, dynamic_growth_steps=growth)
        optimizer.build(model.trainable_variables)
        step = tf.function(share_of_step(model, optimizer, batch), jit_compile=core.runtime.jit())
        for x, y in task.batches().repeat().take(steps):
            scale = float(optimizer.dynamic_scale.numpy())
            curves["Keras"].append([float(step(x, y)), scale])
    return curves


# %% [markdown]
# ## Two networks
# *Deep* is the autoencoder with which Hinton and Salakhutdinov began: logistic units all through, squeezed to 32 and
# out again, mean squared error over batch and pixels.  A logistic unit's slope is at most 1/4, so each layer shrinks
# what comes back.  In float32 that does no harm, since Adam divides a gradient by its usual size.  *Residual* is day
# 10's network, whose shortcuts and normalisation keep gradients large.
#
# A layer's *delta* is the gradient of the loss by its output; all layers before it live on it.  In float32 their
# magnitudes can be counted and set beside float16's ends.  Then the same weights and batch compute in float16: how many
# deltas are 0 that were not, with the loss as it is and with the loss times $2^{15}$?


# %%
def autoencoder(widths, size):
    """pixels [B,size] -> logits of pixels [B,size] in float32, through logistic layers of `widths` and back."""
    x = image = keras.Input((size,))
    for i, units in enumerate((*widths, *widths[-2::-1]), start=1):
        x = layers.Dense(units, activation="sigmoid", name=f"layer{i}")(x)
    return keras.Model(image, layers.Dense(size, dtype="float32", name="logits")(x))


def deltas(model, task, x, y, scale):
    """Gradients of scale * loss by the outputs of the task's layers: for each a float64 array [numbers]."""
    probe = keras.Model(model.input, [*(model.get_layer(name).output for name in task.layers), model.output])
    with tf.GradientTape() as tape:
        *outputs, last = probe(x, training=True)
        scaled = task.loss(y, last) * scale
    return [ops.convert_to_numpy(ops.cast(delta, "float32")).ravel().astype(np.float64)
            for delta in tape.gradient(scaled, outputs)]  # fmt: skip


# %% [markdown]
# ## Seven trainings of each
# All begin with the same weights and see the same batches.  *Throughout*: the weights and the optimizer's averages are
# float16 too.  Last, what a step costs, in time and memory, on this machine: each setting in a process of its own.


# %%
def arms(growth):
    """Name -> dtype policy and `Scaling`; the dynamic scale begins as Keras's does."""
    dynamic = Scaling(2.0**15, growth)
    return {
        "float32": ("float32", Scaling()), "bfloat16": ("mixed_bfloat16", Scaling()),
        "float16, unscaled": ("mixed_float16", Scaling()),
        **{f"float16, fixed 2^{k}": ("mixed_float16", Scaling(2.0**k)) for k in (10, 24)},
        "float16, dynamic": ("mixed_float16", dynamic), "float16 throughout": ("float16", dynamic),
    }  # fmt: skip


# %% [markdown]
# ## What came out
# CIFAR-10 (re-encoded as JPEG), 20,000 images, two CPU cores. *Deep*: in float16 every delta of the first three layers
# is 0, and 77 % of the middle one's. Nothing fails, the loss just stays at 0.057, which is what the mean picture gives.
# With the loss times $2^{15}$, 0.4 % of the first layer's are 0; the mixed trainings with a scale, and bfloat16 without
# one, end at 0.0387 to 0.0395, float32 at 0.0394. *Throughout* learns nothing although its loss is scaled: there the
# optimizer's averages, of the gradient and of its square, have 16 bits too.
#
# *Residual*: shortcuts and normalisation leave less than 0.1 % at 0. Accuracies of float32, bfloat16, float16 scaled
# and unscaled are 64.1, 63.9, 64.5 and 63.7 %, of 5,000 images equal up to chance. A scale of $2^{24}$ ends in nan at
# once; the dynamic one moves between $2^{17}$ and $2^{19}$ and leaves out 17 steps of 2,496. Half way, weights in
# float16 would swallow 9.9 % of the updates; the 63.5 % of *throughout* do not show it yet. For 20 steps Keras's
# machine and ours agree to the last bit.
#
# Here float16 takes 2.4 times as long as float32, bfloat16 about as long, and XLA trebles the memory. No GPU's times
# are recorded yet.


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    if options.precision != "auto" or options.strategy not in ("auto", "one"):
        raise core.InputError("--precision, --strategy: all precisions are compared, on one device: give neither")
    options = dataclasses.replace(options, strategy="one")
    if max(cfg.batch, cfg.deep_batch) > cfg.train:
        raise core.InputError(f"--batch and --deep-batch must be at most --train, which is {cfg.train}")
    with core.run("day12_mixed_precision", options, cfg) as run:
        images = core.data.load(cfg.data, stand_in=cfg.stand_in)
        parts, half = core.data.three_way(images, cfg.train, cfg.val, 0), FORMATS["float16"]
        deep, mean_picture = precision.deep_task(cfg, parts, autoencoder)
        residual = precision.residual_task(cfg, parts, len(images.labels))
        tasks = {"deep": deep, "residual": residual}

        both = run.once("follow", partial(follow, residual, cfg.batch, cfg.followed, cfg.growth))
        ours, theirs = np.array(both["ours"]), np.array(both["Keras"])
        sunk = {name: run.once(f"underflow-{name}", partial(precision.underflow, task, deltas, half.least / 2,
                half.least_normal)) for name, task in tasks.items()}  # fmt: skip
        trained = {name: precision.train_all(run, name, task, arms(cfg.growth), scaled_step, lost)
                   for name, task in tasks.items()}  # fmt: skip
        speed = run.once("speed", partial(benchmark.run, benchmark.Benchmark(
            networks=("day10",), policies=cfg.policies, xla=cfg.xla, widths=(cfg.width,), depth=cfg.depth,
            batch=cfg.batch, steps=10, rounds=cfg.rounds)))["rows"]  # fmt: skip

        run.record |= {"data": images.provenance, "precision": "all"}
        run.record["history"] = {f"{task}, {arm}": one["losses"] for task in trained
                                 for arm, one in trained[task].items()}  # fmt: skip
        used = precision.used(residual, scaled_step, Scaling())
        tables = precision.tables(FORMATS, spacing, fragile, *used, sunk, trained)
        run.record["tables"] = tables | {"speed": speed}
        run.record["metrics"] = precision.metrics(trained, sunk, mean_picture) | {
            "keras_loss_difference": float(np.abs(ours[:, 0] - theirs[:, 0]).max()),
            "keras_scale_differs_in_steps": int((ours[:, 1] != theirs[:, 1]).sum()),
        }  # fmt: skip
        precision.draw(run, FORMATS, spacing, sunk, trained, half.least / 2, half.least_normal)
    return run.record


if __name__ == "__main__":
    core.cli(main)
