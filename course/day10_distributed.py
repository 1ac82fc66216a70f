"""Day 10 - Distributed training: n replicas compute one device's step, and only the time it takes may differ.

Paper:     Goyal et al. 2017, "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", arXiv:1706.02677
Task:      classify 32x32 photographs by a residual network, its batches split over devices, processes and layers
Shapes:    pictures [B,H,W,C], of which each of n replicas gets [B/n,H,W,C] -> logits [B/n,classes] -> one loss
Reference: ResNet-110 on CIFAR-100: 71.3 % of the test images, TensorFlow's own reproduction of the network
Run:       python -m course.day10_distributed --preset cpu --seed 0
Departs:   1. the learning rate falls as a half cosine, not in steps, and weights decay apart from the momentum
           2. replicas without GPUs are parts of one CPU: they show that the result is the same, and gain no time
"""

# %%
import dataclasses
from functools import partial

import keras
import numpy as np
import tensorflow as tf
from keras import losses, ops
from keras.optimizers.schedules import CosineDecay

from course import core
from models.scale import cost, replicas, worker
from models.scale.resnet import cifar_resnet

REFERENCE = {"test_accuracy": (71.3, "%", "TensorFlow research models, resnet/README.md: 110 layers, CIFAR-100")}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the initial weights, the augmentation and the order of the batches
    data: str = "cifar100"  # data set, as core.data knows it
    stand_in: str = ""  # set to take where no source has it; empty: an error
    train: int = 45_000  # training images, from the front of the training part
    val: int = 5_000  # the next ones: validation
    test: int = 10_000  # test images
    depth: int = 110  # layers with weights of the network that is trained for long: 6n + 2
    width: int = 16  # channels of its first stage, and of that of the smaller network of the comparisons
    norm: str = "batch"  # its normalisation: batch, sync or group
    batch: int = 128  # images a step, of all replicas together
    lr: float = 0.1  # learning rate at that batch; falls to 0 as a half cosine
    warm_up: int = 1  # epochs in which it rises to that, in a straight line, from lr / large
    epochs: int = 164  # passes over the training images
    steps: int = 20  # steps over which the strategies are compared, and steps that are timed
    replicas: tuple[int, ...] = (2, 4)  # copies in one process
    small_depth: int = 20  # layers of the network of the comparisons
    images: int = 45_000  # training images of the comparisons of large batches and of normalisations
    small_epochs: int = 30  # passes over them
    large: int = 8  # the large batch, in batches
    share: int = 4  # images that each replica gets where normalisations are compared
    micro: int = 4  # micro-batches of the pipeline, and of the accumulated gradient
    processes: tuple[int, ...] = (1, 2)  # worker processes; of the last number one is killed


PRESETS = {
    "smoke": dict(data="fashion_mnist_12k", train=256, val=64, test=64, depth=8, width=8, batch=32, epochs=1, steps=3,
                  replicas=(2,), small_depth=8, images=64, small_epochs=1, large=2, share=8, processes=()),
    "cpu": dict(data="cifar10", stand_in="fashion_mnist", train=40_000, depth=20, batch=64, lr=0.05, epochs=6,
                small_depth=8, images=10_000, small_epochs=6),
    "full": {},
}  # fmt: skip


# %% [markdown]
# ## A step, divided
# The loss of a batch is a mean over its $B$ images, and so is its gradient.  Give each of $n$ *replicas*, copies of the
# network with equal weights, a share $S_k$ of $B/n$ images:
#
# $$L = \frac1B \sum_{i=1}^{B} \ell_i = \sum_{k=1}^{n} \underbrace{\frac1B \sum_{i \in S_k} \ell_i}_{L_k} \quad(1),
#   \qquad \nabla L = \sum_{k=1}^{n} \nabla L_k \quad(2)$$
#
# A replica divides its sum by the *global* batch $B$, though it sees $B/n$ images; had it taken the mean over its own,
# the sum of eq. 2 would be $n$ times too large, and nothing would say so.  The sum itself is an *all-reduce*: every
# replica gives an array and gets the sum of all.  Keras's optimizer does one and then updates: equal weights stay so.


# %%
def share_of_step(model, optimizer, batch):
    """What a replica does in a step: a function of its share (x, y) of `batch` images -> L_k."""

    def on_each(x, y):
        with tf.GradientTape() as tape:
            each = losses.sparse_categorical_crossentropy(y, model(x, training=True), from_logits=True)
            loss = ops.sum(each) / batch  # L_k of eq. 1
            scaled = optimizer.scale_loss(loss)  # the same number, but under mixed_float16: day 12
        gradients = tape.gradient(scaled, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)  # eq. 2: all-reduce, then update
        return loss

    return on_each


def replicated_step(strategy, model, optimizer, batch):
    """A step of all replicas, as a graph: a distributed (x, y) of `batch` images in all -> the loss L."""
    on_each = share_of_step(model, optimizer, batch)

    @tf.function
    def step(x, y):
        return strategy.reduce("SUM", strategy.run(on_each, args=(x, y)), axis=None)  # L of eq. 1

    return step


def build(strategy, cfg, data, rate):
    """Network and optimizer (`rate` a number or schedule), their variables where `strategy` puts them."""
    core.runtime.seed(cfg.seed)  # every strategy begins with the same weights
    mean, variance = replicas.moments(data.x_train[:5_000])
    with strategy.scope():
        model = cifar_resnet(data.x_train.shape[1:], int(data.y_train.max()) + 1, mean, variance, cfg.depth, cfg.width,
                             cfg.norm)  # fmt: skip
        optimizer = core.runtime.scaled(keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, weight_decay=1e-4))
        optimizer.build(model.trainable_variables)
    return model, optimizer


def distributed(strategy, cfg, data, first=0, change=lambda stream, steps: stream):
    """Batches without end, from epoch `first` on, each replica getting its share: an iterator of distributed (x, y)."""
    arrays = data.x_train[: cfg.train], data.y_train[: cfg.train]
    stream = change(core.data.batches(arrays, cfg.batch, seed=cfg.seed, first_epoch=first, epochs=10**6), first)
    options = tf.data.Options()  # several processes: each reads everything, and keeps its share of each batch
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    # without an end, or the workers would agree at every batch whether it is the last
    return iter(strategy.experimental_distribute_dataset(stream.repeat().with_options(options)))


# %% [markdown]
# ## The ring
# Were all arrays sent to one device and the sum back, $2(n-1)$ arrays would pass through its door.  In a ring each
# sends to its right neighbour only.  Cut the array into $n$ parts; in step $t$ device $k$ sends part $(k - t) \bmod n$.
# In the first $n - 1$ steps the receiver adds it to its own, and then every device has one part of the sum complete; in
# the next $n - 1$ the complete parts go round and replace the others.  Each device has sent
#
# $$2\,\frac{n-1}{n} \cdot \text{bytes} \quad(3),$$
#
# less than twice the array however many devices there are; no algorithm sends less.


# %%
def ring_all_reduce(arrays):
    """One array [size] a device -> the sum as each device ends with it, and the bytes that each has sent (eq. 3)."""
    n = len(arrays)
    parts, sent = [np.array_split(array, n) for array in arrays], [0] * n
    for t in range(2 * (n - 1)):
        messages = [parts[k][(k - t) % n] for k in range(n)]  # all are under way at once
        for k, message in enumerate(messages):
            mine, at = parts[(k + 1) % n], (k - t) % n
            mine[at] = mine[at] + message if t < n - 1 else message
            sent[k] += message.nbytes
    return [np.concatenate(mine) for mine in parts], sent


# %% [markdown]
# ## Every strategy, one result
# The same network, batches and weights under each strategy: the losses must be one device's, but for the order in
# which numbers are added.  `MirroredStrategy` keeps a copy of the weights on each device, `CentralStorageStrategy` one
# for all.  The network has group normalisation, which looks at one image at a time.  Batch normalisation takes mean and
# variance over the images that it sees, and a replica sees its share: another network, and with few images a worse
# one.  *Synchronised*, it first adds up sums and squares over all replicas,
#
# $$\mu = \frac1B \sum_k \sum_{i \in S_k} x_i, \qquad
#   \sigma^2 = \frac1B \sum_k \sum_{i \in S_k} x_i^2 - \mu^2 \quad(4)$$
#
# and is one device's again, for more all-reduces in each layer.  In float32 its losses part sooner: where a channel
# hardly varies, eq. 4 is a small difference of large numbers, and dividing by it magnifies their rounding.


# %%
def first_losses(strategy, cfg, data):
    """The losses of the first steps, and the row of the strategy's speed."""
    model, optimizer = build(strategy, cfg, data, cfg.lr / cfg.large)
    step, batches = replicated_step(strategy, model, optimizer, cfg.batch), distributed(strategy, cfg, data)
    curve = [float(step(*next(batches))) for _ in range(cfg.steps)]
    return curve, replicas.speed(strategy, step, next(batches), cfg, model)


def fit_loss(strategy, cfg, data):
    """The mean loss of the same steps by `fit`, which distributes, divides and sums by itself."""
    model, optimizer = build(strategy, cfg, data, cfg.lr / cfg.large)
    model.compile(optimizer, losses.SparseCategoricalCrossentropy(from_logits=True))
    stream = core.data.batches((data.x_train, data.y_train), cfg.batch, seed=cfg.seed, epochs=10**6)
    return model.fit(stream, steps_per_epoch=cfg.steps, verbose=0).history["loss"][0]


# %% [markdown]
# ## Larger batches
# More replicas at the same share make $B$ larger, and an epoch shorter.  $\kappa$ small steps and a large one come to
# about the same place if the rate grows with the batch, as long as the gradient hardly changes on the way (5).  At the
# start it changes a lot, so the rate rises in a straight line over the first $s_w$ steps (6):
#
# $$w_t - \eta \sum_{j<\kappa} \nabla L_{t+j}(w_{t+j}) \approx w_t - \kappa\eta\, \nabla \Bigl( \frac1\kappa
#   \sum_{j<\kappa} L_{t+j} \Bigr)(w_t) \quad(5), \qquad \eta_s = \eta + \frac{s}{s_w} (\kappa\eta - \eta) \quad(6)$$


# %%
def train(strategy, cfg, data, restore, change=replicas.augmented, chief=True):
    """Train by the loop above, from the last epoch saved -> model, losses of the epochs, row of the strategy's speed.

    `restore(model, optimizer)` gives a `core.Checkpoint`, which of several processes only the `chief` writes, and all
    read; `change`: of the images, by chance.
    """
    if (steps := min(cfg.train, len(data.x_train)) // cfg.batch) < 1:
        raise core.InputError(f"--batch {cfg.batch} is larger than the {cfg.train} training images: give a smaller one")
    first, rest = cfg.warm_up * steps, (cfg.epochs - cfg.warm_up) * steps
    rise = CosineDecay(cfg.lr / cfg.large, max(1, rest), warmup_target=cfg.lr, warmup_steps=first)  # eq. 6, then down
    model, optimizer = build(strategy, cfg, data, rise if first else CosineDecay(cfg.lr, rest))
    resume, step = restore(model, optimizer), replicated_step(strategy, model, optimizer, cfg.batch)
    batches = distributed(strategy, cfg, data, resume.epoch, partial(change, seed=cfg.seed, steps=steps))
    curve = list(resume.history.get("loss", []))
    for epoch in range(resume.epoch, cfg.epochs):
        curve.append(float(np.mean([step(*next(batches)) for _ in range(steps)])))
        if chief:
            resume.save(epoch, {"loss": curve[-1]})
            print(f"epoch {epoch + 1}/{cfg.epochs}  loss {curve[-1]:.4f}", flush=True)
    return model, curve, replicas.speed(strategy, step, next(batches), cfg, model)


# %% [markdown]
# ## A large batch on a small device
# Eq. 1 does not ask that the shares are computed at the same time.  One device can take them in turn, add the gradients
# up and update once: *gradient accumulation*, the same step in a fraction of the memory (Keras's optimizers do it if
# told `gradient_accumulation_steps`).  Each share is divided by the whole batch, and batch normalisation sees a share.


# %%
def gradient(model, x, y, batch):
    """L_k of eq. 1 for the images given, and its gradients."""
    with tf.GradientTape() as tape:
        loss = ops.sum(losses.sparse_categorical_crossentropy(y, model(x, training=True), from_logits=True)) / batch
    return loss, tape.gradient(loss, model.trainable_variables)


def accumulated(model, x, y, micro):
    """Gradients of the mean loss of (x, y), one of `micro` shares after another: eq. 2 on one device."""
    shares = zip(tf.split(x, micro), tf.split(y, micro), strict=True)
    parts = [gradient(model, share, labels, len(x))[1] for share, labels in shares]
    return [tf.add_n(part) for part in zip(*parts, strict=True)]


# %% [markdown]
# ## A network that does not fit
# When a device cannot hold the weights, the *layers* are divided: stage $s$ gets the activations $a_{s-1}$ of the stage
# before, hands on $a_s = f_s(a_{s-1})$, and on the way back hands on eq. 7.  With one batch all devices but one wait;
# cut into $m$ *micro-batches* (Huang et al. 2019, GPipe), stage 2 works on the first while stage 1 begins the second,
# and $S$ stages wait only while the pipe fills and empties, for the share of eq. 8.  Nobody schedules that here: in a
# TensorFlow graph each operation starts when its inputs are there.
#
# $$\delta_{s-1} = \Bigl( \frac{\partial f_s}{\partial a_{s-1}} \Bigr)^{\!\top} \delta_s, \quad
#   \delta_s = \frac{\partial L}{\partial a_s} \quad(7), \qquad \text{idle: } \frac{S - 1}{m + S - 1} \quad(8)$$


# %%
def pipelined(stages, places, x, y, micro):
    """Loss of (x, y) and its gradients, in `micro` micro-batches; `stages`: a model on each of the devices `places`."""
    found = []
    for share, labels in zip(tf.split(tf.cast(x, "float32"), micro), tf.split(y, micro), strict=True):
        a, tapes = [share], []
        for stage, place in zip(stages, places, strict=True):
            with tf.device(place), tf.GradientTape() as tape:
                tape.watch(a[-1])
                a.append(stage(a[-1], training=True))
            tapes.append(tape)
        with tf.device(places[-1]), tf.GradientTape() as tape:
            tape.watch(a[-1])
            loss = ops.sum(losses.sparse_categorical_crossentropy(labels, a[-1], from_logits=True)) / len(x)
        delta, gradients = tape.gradient(loss, a[-1]), []
        for s in reversed(range(len(stages))):
            with tf.device(places[s]):
                delta, *own = tapes[s].gradient(a[s + 1], [a[s], *stages[s].trainable_variables], delta)  # eq. 7
            gradients = own + gradients
        found.append([loss, *gradients])
    loss, *gradients = (tf.add_n(parts) for parts in zip(*found, strict=True))
    return loss, gradients


# %% [markdown]
# ## Several processes, and one that dies
# With several machines each runs this module with `--strategy multiworker`, and finds all addresses and its own place
# in the variable TF_CONFIG.  Keras 3's `fit` fails there; the loop above sees no difference.  An all-reduce needs
# everybody, so when one process dies none can go on: all start again from the last checkpoint, and as the data is a
# function of seed and epoch, the curve is that of a run in which nothing happened.
#
# Under `parameter_server` nobody waits: a worker fetches the weights, computes its gradient and has it applied, to
# weights that others may have changed since.  A death costs one step; the price is that the result is no longer one
# device's, nor the same twice.


# %%
def asynchronous(strategy, cfg, data):
    """Steps handed to whichever worker is free -> model and losses."""
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)
    model, optimizer = build(strategy, cfg, data, cfg.lr)
    on_each = share_of_step(model, optimizer, cfg.batch)
    step = tf.function(lambda x, y: strategy.run(on_each, args=(x, y)))
    stream = core.data.batches((data.x_train, data.y_train), cfg.batch, seed=cfg.seed, epochs=cfg.epochs)
    waiting = [coordinator.schedule(step, args=batch) for batch in stream]
    coordinator.join()
    return model, [float(one.fetch()) for one in waiting]


# %% [markdown]
# ## What came out
# CIFAR-10 (re-encoded as JPEG) on two CPU cores. *One result*: in float32 the losses of 2 and 4 replicas and of central
# storage stay within $3.4 \cdot 10^{-5}$ of one device's over 20 steps, two processes within $5 \cdot 10^{-5}$ over 120
# steps; in float64 all agree to the last digit. Batch normalisation is another network, 0.02 apart; synchronised it is
# the same, though in float32 rounding brings it $10^{-3}$ away. A killed worker leaves the curve unbroken, bit for bit.
#
# *Large batches*, in epochs of 10,000 images: 56.9 % with 64, 39.4 % with 512 at the same rate, 48.8 % at eight times
# the rate, 51.5 % warmed up: in 114 steps the rule brings back two thirds. With 4 images a replica, batch normalisation
# has 53.0 % in place of 56.7, synchronised 56.9 %, and group normalisation 44.5 %.
#
# *Time*: replicas on one CPU gain none. Two processes of one thread made 837 images a second, and 1,208 after the
# restart, where one made 857: on a machine with other users a single figure says little. ResNet-20 of 40,000 images
# reaches 77.5 % after six epochs.


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    if options.strategy in ("multiworker", "parameter_server"):  # one process of several
        return worker.work("day10_distributed", options, cfg, train, asynchronous)
    places = core.runtime.devices(max(2, *cfg.replicas))  # first of all: TensorFlow fixes its devices when it starts
    with core.run("day10_distributed", options, cfg, scope=False) as run:
        images = core.data.load(cfg.data, stand_in=cfg.stand_in)
        data = core.data.three_way(images, cfg.train, cfg.val, cfg.test)
        small = dataclasses.replace(cfg, depth=cfg.small_depth, norm="group")
        rows, speeds, apart, metrics = replicas.strategies(run, small, data, first_losses, fit_loss)
        divided = [row for norm in ("group", "batch") for row in run.once(f"gradients-{norm}", partial(
                   replicas.gradients, dataclasses.replace(small, norm=norm), data, places[:2], build, gradient,
                   accumulated, pipelined))]  # fmt: skip
        arms = dataclasses.replace(small, norm="batch", train=cfg.images, epochs=cfg.small_epochs)
        large, few = (compare(run, arms, data, train) for compare in (replicas.large_batches, replicas.few_images))
        faster, curves, found = worker.compare(run, "day10_distributed", options, cfg, data, train)
        model, history, long = train(run.strategy, cfg, data, partial(replicas.restore, run, "long"))

        run.record |= {"data": images.provenance, "history": {"loss": history, **curves, **apart}}
        run.record["tables"] = {"strategies": rows, "speed": speeds + faster, "one gradient": divided,
                                "large batches": large, "few images a replica": few, "cost": cost.table()}  # fmt: skip
        run.record["metrics"] = {
            "test_accuracy": replicas.accuracy(model, data.x_test, data.y_test), **metrics,
            "accumulated_distance": divided[1]["distance"], "pipeline_distance": divided[2]["distance"],
            "large_batch_val_accuracy": large[-1]["val_accuracy"], "small_batch_val_accuracy": large[0]["val_accuracy"],
            "images_per_second": long["images_per_second"], **replicas.ring(ring_all_reduce, cfg.seed), **found,
        }  # fmt: skip
        replicas.draw(run, run.record["tables"], apart, curves)
        run.figure("cost", cost.figure(run.record["tables"]["cost"]))
    return run.record


if __name__ == "__main__":
    core.cli(main)
