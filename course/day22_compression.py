"""Day 22 - Compression: a network carries more bits, weights and channels than its answers need, and each has a price.

Paper:     Han, Mao, Dally 2016, "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization
           and Huffman Coding", ICLR; Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network"
Task:      make a trained classifier of 32x32 photographs small and fast, and say what each step costs in accuracy
Shapes:    kernel [3,3,C,F] -> int8 with F scales | a mask | K values and numbers 0..K-1;  pixels [B,32,32,3] -> [B,10]
Reference: MobileNet on CIFAR-10, pruned by half and trained with the rounding (PQAT): 0.36 points less at 8 bits
Run:       python -m course.day22_compression --preset cpu --seed 0     (an hour on two cores, most of it training)
Departs:   (1) an int8 file stands in for Han's 5 bits: no kernel computes with those; (2) few epochs of training on;
           (3) the reference's network is MobileNet and half of its weights are zero, here four fifths
"""

# %%
import dataclasses
from functools import partial

import keras
import numpy as np

from compression import arms, benchmark, cluster, lottery, prune, report, structured, target
from compression import data as sets
from compression.training import Training, fit
from course import core
from models import convnets

REFERENCE = {
    "pruned_aware_int8_points": (-0.36, "points", "TensorFlow Model Optimization guide, PQAT, MobileNetV1, on CIFAR-10")
}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the networks, the augmentation and the order of the batches
    data: str = "cifar10"  # data set, as core.data knows it
    stand_in: str = ""  # set to take where no source has it; empty: an error
    limit: int = 0  # training images; 0: all
    tests: int = 0  # test images; 0: all
    width: int = 64  # channels of the large network's first convolution
    epochs: int = 30  # of the large network
    lr: float = 0.2  # its highest learning rate
    batch: int = 250  # images a step
    arms: tuple[str, ...] = ()  # of the benchmark, by name; none: all of them
    train_on: int = 8  # epochs of training on, in each technique
    student_epochs: int = 60  # of distillation, and of the same network without a teacher
    sparsity: float = 0.8  # share of zeros of the pruned arms
    clusters: int = 16  # values that a kernel's weights share
    looks: int = 2_000  # validation images of the looks at one thing at a time
    ticket_width: int = 16  # of the network that lottery tickets are looked for in
    ticket_images: int = 45_000  # that it is trained on
    ticket_epochs: int = 20  # of each of its trainings
    ticket_rounds: int = 5  # of pruning, each by half of what is left
    rounds: int = 20  # turns in which every file is timed
    served_seconds: float = 0.5  # of requests to each served file in each of five turns; 0: nothing is served
    exports: str = dataclasses.field(default="exports", metadata={"where": True})  # folder that it is exported to


PRESETS = {
    "smoke": dict(data="fashion_mnist_12k", limit=512, tests=300, width=8, epochs=1, batch=64,
                  arms=("int8", "pruned clustered int8", "student"), train_on=1, student_epochs=1, looks=64,
                  ticket_width=4, ticket_images=128, ticket_epochs=1, ticket_rounds=1, rounds=2, served_seconds=0.0),
    "cpu": dict(stand_in="fashion_mnist", width=32, epochs=14, train_on=1, student_epochs=15, ticket_width=8,
                ticket_images=8_000, ticket_epochs=8, ticket_rounds=4),
    "full": {},
}  # fmt: skip


# %% [markdown]
# ## The large network
# Three stages of convolutions with shortcuts (`models/convnets.py`), trained as in day 11.  Its activation is ReLU, for
# a reason of this day: on whole numbers it is a maximum, done in passing; SiLU would take three operations of its own.


# %%
AUGMENT = {"flip": True, "shift": 1 / 16}  # in every training of the day


def build_model(width, data):
    """Pixels 0..255 [B,H,W,C] -> logits [B,classes]; normalisation, by the training pixels' moments, is inside."""
    pixels = data.x_train.reshape(-1, data.x_train.shape[-1]).astype(np.float32)
    mean, variance = pixels.mean(axis=0).tolist(), pixels.var(axis=0).tolist()
    return convnets.quick_resnet(data.x_train.shape[1:], len(data.labels), width, mean, variance, activation="relu")


def recipe(cfg, epochs):
    """How a network is trained from nothing: as the deep one of a2_convnet, but for its smoothed labels, which would
    blur what a student is to learn from it (Mueller, Kornblith, Hinton 2019)."""
    return Training(epochs=epochs, batch=cfg.batch, lr=cfg.lr, warm_up=0.2, seed=cfg.seed, **AUGMENT)


def train(run, cfg, data):
    """The large network, trained from nothing: (model in float32, history)."""
    network, settings = build_model(cfg.width, data), recipe(cfg, cfg.epochs)
    history = fit(network, data, settings, checkpoint=run.folder / "checkpoints" / "large", label="large network")
    return core.export.in_float32(network), history


# %% [markdown]
# ## Fewer bits
# A kernel's weights become whole numbers times a *scale*.  With $b$ bits, symmetric about 0 so that zero stays zero,
#
# $$s = \frac{\max |w|}{2^{b-1} - 1}, \qquad \hat w = s \cdot \mathrm{round}(w / s) \quad(1)$$
#
# The error of a weight lies evenly in $\pm s/2$, so each bit more takes 6 dB off the noise.  One scale for a whole
# kernel is set by its loudest filter; with one for each filter (*per channel*) the quiet ones are not drowned.
#
# ## Fewer weights
# *Magnitude pruning*: the share $\rho$ of the smallest $|w|$ becomes 0, of every kernel alike or of all together (2).
# While training on, the share may rise with the steps, fast at first, when much can be spared (Zhu and Gupta 2017):
#
# $$\rho_t = \rho - \rho \left( 1 - \frac{t}{T} \right)^3 \quad(3)$$
#
# ## Fewer values
# *Clustering*: k-means on the line puts $K$ values where the weights are; each weight becomes the nearest (4), and what
# is stored is its number, $\log_2 K$ bits, or less: by Huffman's code, frequent values (zero!) take short words.


# %%
def rounded(kernel, bits, per_channel=True):
    """Eq. 1: kernel [...,F] -> the nearest multiples of one scale, or of one for each of its F filters."""
    axes = tuple(range(kernel.ndim - 1)) if per_channel else None
    scale = np.abs(kernel).max(axis=axes, keepdims=True) / (2 ** (bits - 1) - 1)
    return scale * np.round(kernel / np.where(scale > 0, scale, 1))


def without_smallest(kernels, share, together=False):
    """Eq. 2: name -> kernel, with zeros for the `share` of smallest magnitude of each, or of all `together`."""
    every = np.concatenate([np.abs(kernel).ravel() for kernel in kernels.values()])
    limits = {name: np.quantile(every if together else np.abs(kernel), share) for name, kernel in kernels.items()}
    return {name: np.where(np.abs(kernel) > limits[name], kernel, 0) for name, kernel in kernels.items()}


def shared(kernel, count, rounds=25):
    """Eq. 4: kernel -> each weight the nearest of `count` values, by Lloyd's algorithm from evenly spaced ones."""
    weights, values = kernel.ravel(), np.linspace(kernel.min(), kernel.max(), count)
    for _ in range(rounds):
        nearest = np.searchsorted((values[1:] + values[:-1]) / 2, weights)
        members = np.bincount(nearest, minlength=count)
        means = np.bincount(nearest, weights, minlength=count) / np.maximum(members, 1)
        values = np.sort(np.where(members > 0, means, values))
    return values[np.searchsorted((values[1:] + values[:-1]) / 2, weights)].reshape(kernel.shape).astype(kernel.dtype)


BITS, SHARES, COUNTS = (2, 3, 4, 5, 6, 8), (0.3, 0.5, 0.6, 0.7, 0.8, 0.9), (4, 8, 16, 32, 64)


def bears(network, data, looks):
    """What the network bears without any training: rows {technique, strength, accuracy, snr_db} on validation images.

    snr_db: 10 log10 of the weights' power over that of what the technique changed.
    """
    copy = prune.copy_of(network)
    variables = prune.prunable(copy)
    kernels, rows = prune.arrays(variables), []
    ways = {
        "a scale for a kernel": (BITS, lambda n: {k: rounded(w, n, per_channel=False) for k, w in kernels.items()}),
        "a scale for a filter": (BITS, lambda n: {k: rounded(w, n) for k, w in kernels.items()}),
        "of each kernel": (SHARES, lambda share: without_smallest(kernels, share)),
        "of all together": (SHARES, lambda share: without_smallest(kernels, share, together=True)),
        "k-means": (COUNTS, lambda count: {k: shared(w, count) for k, w in kernels.items()}),
    }  # fmt: skip
    power = sum(float(np.square(kernel).sum()) for kernel in kernels.values())
    for name, (strengths, change) in ways.items():
        for strength in strengths:
            changed = change(strength)
            noise = sum(float(np.square(changed[key] - kernels[key]).sum()) for key in kernels)
            for key, variable in variables.items():
                variable.assign(changed[key])
            rows.append({"technique": name, "strength": strength, "snr_db": 10 * np.log10(power / noise),
                         "accuracy": prune.accuracy(copy, data.x_val[:looks], data.y_val[:looks])})  # fmt: skip
    return rows


# %% [markdown]
# ## Training with the damage in place
# What a network loses it can mostly learn back, if training goes on *under the restriction*.  Rounding has slope 0
# almost everywhere; the *straight-through estimator* passes the gradient as if it were not there (Jacob et al. 2018):
#
# $$\hat w = s \cdot \mathrm{round}(w/s), \qquad \partial L / \partial w := \partial L / \partial \hat w \quad(5)$$
#
# A pruned weight's mask is applied after every step, momentum or not; a cluster's value moves by the mean of its
# members' gradients.  `layers.fake_quant_weights`, `prune.held` and `layers.look_up` are these three in Keras.
#
# ## A smaller network that is told more
# A student learns the teacher's probabilities, softened by a temperature $T$: which wrong answers are nearly right.
# With logits $z$ of the student and $v$ of the teacher, labels $y$, and a weight $\alpha$ for them,
#
# $$L = \alpha\, \mathrm{CE}(y, z) + (1-\alpha)\, T^2\, \mathrm{KL}(\sigma(v/T) \,\|\, \sigma(z/T)), \qquad
#   \frac{\partial\, \mathrm{KL}}{\partial z} = \frac{\sigma(z/T) - \sigma(v/T)}{T} \quad(6)$$
#
# The difference of the two softmaxes shrinks as $1/T$ as well, so the gradient falls as $1/T^2$; the factor $T^2$
# undoes it, and $\alpha$ means the same at every temperature.


# %%
def softmax(logits):
    """Logits [N,C] -> probabilities [N,C]."""
    grown = np.exp(logits - logits.max(axis=1, keepdims=True))
    return grown / grown.sum(axis=1, keepdims=True)


def soft_gradients(wanted, given, temperatures=(1, 2, 4, 8, 16)):
    """Eq. 6 for logits [N,C] of teacher and student: rows {temperature, gradient, times_t_squared}, mean magnitudes."""
    rows = []
    for t in temperatures:
        slope = float(np.abs((softmax(given / t) - softmax(wanted / t)) / t).mean())
        rows.append({"temperature": t, "gradient": slope, "times_t_squared": t**2 * slope})
    return rows


# %% [markdown]
# ## Was the small network there from the start?
# *Lottery tickets* (Frankle and Carbin 2019): train, prune by magnitude, put what is left back to its initial weights -
# or, as deep networks need, to those after a few steps (Frankle et al. 2020; here half an epoch) - and train again.
# Two controls say what matters: as many weights of each layer at places drawn at random, and the same places with
# weights drawn anew that had the same few steps.  If the ticket beats both, mask and early weights belong together.


# %%
def tickets(run, cfg, data):
    """Rows {round, sparsity, arm, val_accuracy, test_accuracy} of a narrow network's tickets and their controls."""
    kept = core.data.stratified_order(data.y_train, cfg.seed)[: cfg.ticket_images]
    part = dataclasses.replace(data, x_train=data.x_train[kept], y_train=data.y_train[kept])
    settings = lottery.Lottery(
        rounds=cfg.ticket_rounds, rate=0.5, rewind=len(kept) // cfg.batch // 2, seed=cfg.seed,
        training=recipe(cfg, cfg.ticket_epochs),
    )  # fmt: skip
    return lottery.compare(build_model(cfg.ticket_width, part), part, settings, run.folder / "checkpoints" / "tickets")


# %% [markdown]
# ## All of it, side by side
# `compression.benchmark` makes a file of every technique and of their combinations (*arms*), asks all of them the same
# test images, times them in turns, lets the pipeline's gate of day 25 judge each against the original, and serves them.

# %%
OPENED = ("student", "pruned clustered int8", "filters")
MAIN = ("int8", "pruned aware int8", "pruned clustered int8", "student")


def compress(run, cfg, network, data):
    """The benchmark of all arms on the large network; rows by arm."""
    settings = benchmark.Config(
        seed=cfg.seed, epochs=cfg.train_on, batch=cfg.batch, sparsity=cfg.sparsity, clusters=cfg.clusters,
        student_epochs=cfg.student_epochs, rounds=cfg.rounds, served_seconds=cfg.served_seconds, **AUGMENT,
    )  # fmt: skip
    what = target.Target("day22_compression", network, True, data.provenance["name"], data.labels, run.folder)
    return benchmark.benchmark(run, what, data, settings, cfg.arms or [*arms.ARMS])


def inside(run, network, data, rows, looks):
    """Tables of models that came out: eq. 6 for the student, the code of clustered kernels, the filters left."""
    models = {row["arm"]: run.folder / "models" / row["model"] for row in rows if "why" not in row}
    models = {arm: keras.models.load_model(path, compile=False) for arm, path in models.items() if arm in OPENED}
    tables = {}
    if student := models.get("student"):
        logits = [model.predict(data.x_val[:looks], batch_size=500, verbose=0) for model in (network, student)]
        tables["temperature"] = soft_gradients(*logits)
    if clustered := models.get("pruned clustered int8"):
        tables["codes"] = cluster.table(clustered)
    if narrow := models.get("filters"):
        tables["filters left"] = structured.compare(network, narrow)[0]
    return tables


def metrics(rows):
    """{name: number} of the arms in `MAIN` that were run: points of accuracy against the original, sizes, speeds."""
    made = {row["arm"]: row for row in rows if "why" not in row}
    found = {"test_accuracy": 100 * made["float"]["accuracy"]}
    for arm in (name for name in MAIN if name in made):
        row, name = made[arm], arm.replace(" ", "_")
        found |= {f"{name}_points": 100 * row["difference"], f"{name}_times_smaller": row["times_smaller"],
                  f"{name}_times_smaller_gzip": row["times_smaller_gzip"],
                  f"{name}_times_faster": row["times_faster_1"]}  # fmt: skip
    return found


def draw(run, tables, history):
    """Figures beside the benchmark's two Pareto fronts."""
    looks = tables["without training"]
    panels, axes = {}, {}
    for title, names, scale in (("bits of a weight", ("a scale for a kernel", "a scale for a filter"), float),
                                ("% of the weights gone", ("of each kernel", "of all together"), lambda x: 100 * x),
                                ("bits of a value's number", ("k-means",), np.log2)):  # fmt: skip
        panels[title] = {name: [100 * row["accuracy"] for row in looks if row["technique"] == name] for name in names}
        axes |= {name: [scale(row["strength"]) for row in looks if row["technique"] == name] for name in names}
    run.figure("without_training", core.plots.panels(panels, x=axes, xlabel="", ylim=(0, 100),
                                                     title="validation accuracy without any training, %"))  # fmt: skip
    lost = {f"{row['weight'].split('/')[0]}\n{row['size']:,}": 100 * row["drop"] for row in tables["sensitivity"]
            if row["sparsity"] == 0.8}  # fmt: skip
    run.figure("sensitivity", core.plots.bars(lost, ylabel="points of accuracy lost", size=(7, 3.4),
                                              title="80 % of one layer's weights gone, the others whole"))  # fmt: skip
    tries = {arm: [row for row in tables["tickets"] if row["arm"] in (arm, "dense")]
            for arm in ("ticket", "random masks", "random weights")}  # fmt: skip
    lines = {arm: [100 * row["test_accuracy"] for row in rows] for arm, rows in tries.items()}
    left = [100 * (1 - row["sparsity"]) for row in tries["ticket"]]
    run.figure("tickets", core.plots.curves(lines, x=left, xscale="log", xlabel="% of the weights that are left",
                                            ylabel="test accuracy, %"))  # fmt: skip
    lines = {key: 100 * np.array(history[key]) for key in ("accuracy", "val_accuracy")}
    run.figure("learning", core.plots.curves(lines, ylabel="accuracy, %"))


# %% [markdown]
# ## What came out
# - **Bits.** int8 everywhere costs 0.12 points, less than its own interval, for a file 3.8 times smaller and 3.3 times
#   faster. Without any training 4 bits are nearly enough; at 3 the scale's reach matters, 82 % against 74.
# - **Weights.** Four fifths of them cost 2.3 points with an epoch of training, and 4.9 where every layer has to give up
#   as many: they are not equally dispensable, see the figure `sensitivity`. Zeros alone make a file neither smaller nor
#   faster; gzip finds them. With 16 values besides and int8 the file packs 13 times smaller, for 2.4 points: one was
#   allowed, so the target is **missed**, and the gate refuses these files. The gradual schedule gained nothing on
#   pruning at once: an epoch is short for it. (70 % zeros and three epochs: 10.2 times smaller, for 1.2 points.)
# - **Channels.** Half of the filters are worth 11 points, and one epoch does not bring them back. A student of the same
#   speed as our target asks, 5.4 times the teacher's, stays 3.1 points behind, where 1.5 were allowed: **missed**. Its
#   twin that never saw the teacher's probabilities is 4.4 behind: they are worth 1.3 points. (40 epochs: 2.0 behind.)
# - **Tickets.** A quarter of the weights, trained from where they began, reaches 67 %, the whole network 62, random
#   masks 57, the same masks from other weights 58: where they begin matters, and which are left. One seed.
# - **The toolkit.** Its clustering fell to 12 %: by default a shared value moves by the *sum* of its weights' own
#   gradients, and ran away. `compression.legacy` has since told it to take their mean, as ours does.


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    if unknown := set(cfg.arms) - set(arms.ARMS):
        raise core.InputError(f"--arms: there is no {', '.join(sorted(unknown))}: see compression/arms.py")
    options = benchmark.on_one_device(options)
    with core.run("day22_compression", options, cfg, scope=False) as run:
        found = core.data.load(cfg.data, stand_in=cfg.stand_in)
        data = sets.part(sets.of_set(found), "train", cfg.limit, cfg.seed)
        data = sets.part(data, "test", cfg.tests, cfg.seed)
        network, history = train(run, cfg, data)
        tables = {
            "without training": run.once("looks", partial(bears, network, data, cfg.looks)),
            "sensitivity": run.once("sensitivity", lambda: prune.sensitivity(network, data, examples=cfg.looks)),
            "filters": run.once("filters", lambda: structured.sensitivity(network, data, examples=cfg.looks)),
            "tickets": run.once("tickets", partial(tickets, run, cfg, data)),
        }
        rows = compress(run, cfg, network, data)
        run.record["tables"] |= tables | inside(run, network, data, rows, cfg.looks)
        run.record["metrics"], run.record["history"] = metrics(rows), history
        draw(run, tables, history)
    core.export.image_classifier(network, "day22_compression", found, cfg.exports)
    report.show(rows, run.record["targets"], run.record["load"])
    report.conclude(rows)
    return run.record


if __name__ == "__main__":
    core.cli(main)
