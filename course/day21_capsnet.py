"""Day 21 - Capsule Networks: capsules draw what they see, but a CNN of their size is as accurate and sturdier.

Paper:     Sabour, Frosst, Hinton 2017, "Dynamic Routing Between Capsules", arXiv:1710.09829
Task:      classify 28x28 digits; the length of digit capsule j is the evidence for class j
Shapes:    image [B,28,28,1] -> conv [B,20,20,256] -> primary capsules [B,1152,8]
           -> votes [B,10,1152,16] -> digit capsules [B,10,16] -> lengths [B,10]
Reference: MNIST test error 0.25 +- 0.005 % (paper, Table 1: 3 routing rounds, with reconstruction)
Run:       python -m course.day21_capsnet --preset cpu --seed 0
Departs:   1. preset cpu: a thirteenth of the encoder's parameters, 6 epochs; the paper's schedule is not known
           2. the CNN has as many parameters as CapsNet, the paper's baseline four times as many
           3. the affine test set is made here, in the manner of affNIST
"""

# %%
import dataclasses
import itertools

import keras
import numpy as np
from keras import layers, ops

from course import core
from models.capsules import figures, measures, rival, scenes

REFERENCE = {"test_error": (0.25, "%", "Sabour et al. 2017, Table 1, MNIST, 60,000 training images")}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the initial weights, the order of the batches and the shifts
    data: str = "mnist"  # name of the data set (28x28, one channel, ten classes)
    limit: int = 60_000  # training images used
    tests: int = 10_000  # test images used
    epochs: int = 50  # of the CapsNet and of the CNN on single digits
    batch: int = 128  # images a step
    lr: float = 1e-3  # Adam's learning rate in the first epoch
    decay: float = 0.9  # factor on the learning rate after each epoch
    width: int = 256  # channels of the first convolution
    capsules: int = 32  # channels of primary capsules; 6 * 6 * 32 = 1152 capsules
    rounds: int = 3  # routing rounds; 1 = uniform coupling
    reconstruct: float = 0.0005  # weight of a pixel's squared reconstruction error
    ablation: tuple[int, ...] = (1, 2, 3, 5)  # routing rounds compared, with and without reconstruction
    ablation_limit: int = 60_000  # training images of each arm of that comparison
    ablation_epochs: int = 20  # epochs of each arm
    canvas_epochs: int = 50  # of both networks on digits placed anywhere on a 40x40 canvas
    multi_epochs: int = 50  # of the CapsNet on two overlapping digits
    exports: str = dataclasses.field(default="exports", metadata={"where": True})  # folder that it is exported to


PRESETS = {
    "smoke": {"data": "fashion_mnist_12k", "limit": 256, "tests": 128, "epochs": 1, "batch": 32, "width": 8,
              "capsules": 2, "ablation": (1, 3), "ablation_limit": 64, "ablation_epochs": 1, "canvas_epochs": 1,
              "multi_epochs": 1},
    "cpu": {"epochs": 6, "batch": 64, "lr": 2e-3, "decay": 0.65, "width": 32, "capsules": 8,
            "ablation_limit": 10_000, "ablation_epochs": 5, "canvas_epochs": 2, "multi_epochs": 5},
    "full": {},
}  # fmt: skip
CLASSES = 10
EPSILON = 1e-7  # inside square roots: their gradient at zero is finite

# %% [markdown]
# ## Squash
# A capsule is a vector: its direction says *how* a part looks (pose, stroke, slant), its length *whether* it is there.
# `squash` keeps the direction and maps the length into [0, 1), to be read as a probability.  Written naively,
# $\frac{|s|^2}{1+|s|^2}\frac{s}{|s|}$ has no gradient for an empty capsule: 0/0.


# %%
def squash(s, axis=-1):
    """s [..., D] -> float32 [..., D] of length |s|^2 / (1 + |s|^2) (paper, eq. 1), with a finite gradient at 0."""
    s = ops.cast(s, "float32")  # a square overflows 16 bits at 256
    norm2 = ops.sum(ops.square(s), axis=axis, keepdims=True)
    return s * ops.sqrt(norm2 + EPSILON) / (1 + norm2)


def lengths(capsules):
    """capsules [..., D] -> their lengths [...]: the evidence that the entity is present."""
    return ops.sqrt(ops.sum(ops.square(ops.cast(capsules, "float32")), axis=-1) + EPSILON)


# %% [markdown]
# ## Votes and routing
# Primary capsule $i$ predicts what digit capsule $j$ would look like, if the part it saw belonged to a $j$: its vote
# $\hat u_{j|i} = W_{ij} u_i$.  A digit is present where many votes agree.  Routing finds such clusters: every primary
# capsule spreads itself over the ten digits by a softmax, each digit takes the weighted sum of its votes, and votes
# that point the same way as that sum get more weight in the next round.
#
# The rounds are an inner search, not layers to be trained: gradients flow through the last weighted sum alone.


# %%
def route(votes, rounds):
    """Routing by agreement (paper, Procedure 1).

    votes [B,J,I,D] -> capsules [B,J,D], and the coupling coefficients [B,J,I] of each round, which sum to 1 over J.
    """
    fixed = ops.stop_gradient(votes)
    logits = ops.zeros_like(fixed[..., 0])
    couplings = []
    for left in reversed(range(rounds)):
        # exercise: note the coupling (softmax over J) and take the squashed sum [B,J,1,D], of `fixed` but in the last
        # round; while rounds are left, add to each logit the agreement of its vote with that sum
        couplings.append(ops.softmax(logits, axis=1))
        capsules = squash(ops.matmul(couplings[-1][:, :, None], fixed if left else votes))
        if left:
            logits += ops.matmul(fixed, ops.swapaxes(capsules, 2, 3))[..., 0]
        # end exercise
    return capsules[:, :, 0], couplings


@keras.saving.register_keras_serializable("course.day21")
class DigitCapsules(layers.Layer):
    """Primary capsules [B,I,P] -> digit capsules float32 [B,capsules,dim], by votes and routing."""

    def __init__(self, capsules, dim, rounds, **kwargs):
        super().__init__(**kwargs)
        self.capsules, self.dim, self.rounds = capsules, dim, rounds

    def build(self, shape):
        matrices = (*shape[1:], self.capsules * self.dim)  # [I,P,J * D]
        self.w = self.add_weight(shape=matrices, initializer=keras.initializers.RandomNormal(stddev=0.1))

    def votes(self, primary):
        """[B,I,P] -> [B,J,I,D].  The einsum runs over I first and the votes are laid out J before I, so that every step
        is a batch of matrix products: on a CPU the layer trains 2.6 to 3.5 times as fast as with "bip,ijpd->bijd"."""
        votes = ops.einsum("bip,ipk->ibk", primary, self.w)  # W_ij of all j at once
        votes = ops.reshape(votes, (self.w.shape[0], -1, self.capsules, self.dim))
        return ops.cast(ops.transpose(votes, (1, 2, 0, 3)), "float32")  # softmax and agreement need the precision

    def call(self, primary):
        return route(self.votes(primary), self.rounds)[0]

    def macs(self):
        """Multiplications an image: the votes, then a sum in each round and an agreement in all but the last."""
        return int(np.prod(self.w.shape)) + (2 * self.rounds - 1) * self.w.shape[0] * self.w.shape[2]

    def get_config(self):
        return super().get_config() | {"capsules": self.capsules, "dim": self.dim, "rounds": self.rounds}


# %% [markdown]
# ## Margin loss
# Each class is judged alone, so that two digits can be present at once: a present digit must be longer than 0.9, an
# absent one shorter than 0.1.  Absent digits count half, else the nine of them shrink every capsule early on.


# %%
def margin_loss(labels, length):
    """labels int [B,K], the K digits in each picture, length [B,10] -> [B] (paper, eq. 4)."""
    length = ops.cast(length, "float32")
    present = ops.max(ops.one_hot(ops.cast(labels, "int32"), CLASSES, dtype="float32"), axis=1)
    # exercise: eq. 4 with m+ = 0.9, m- = 0.1, lambda = 0.5
    missed, invented = ops.square(ops.relu(0.9 - length)), ops.square(ops.relu(length - 0.1))
    return ops.sum(present * missed + 0.5 * (1 - present) * invented, axis=-1)
    # end exercise


def squared_error(pixels, reconstruction):
    """[B,K,P], [B,K,P] -> [B]: summed, not averaged, over the pixels; the weight 0.0005 is a pixel's (paper, 4.1)."""
    return ops.sum(ops.square(ops.cast(pixels, "float32") - ops.cast(reconstruction, "float32")), axis=(1, 2))


# %% [markdown]
# ## The network
# The decoder sees one digit capsule, the others masked by zeros, and must draw the digit: a regulariser that makes the
# capsule's 16 numbers describe the picture.  Of two digits in a picture it draws each from its own capsule.  `encoder`
# is the classifier; `trainer` shares its weights and adds the decoder, which gets the true labels while training.


# %%
def build_encoder(cfg, side=28, scale=1.0):
    """image [B,side,side,1], times `scale` in 0..1 -> {"capsules": [B,10,16], "lengths": [B,10]}."""
    image = keras.Input((side, side, 1), name="image")
    x = layers.Conv2D(cfg.width, 9, activation="relu")(layers.Rescaling(scale)(image))
    x = layers.Conv2D(cfg.capsules * 8, 9, strides=2, name="primary")(x)
    x = squash(layers.Reshape((-1, 8))(x))
    capsules = DigitCapsules(CLASSES, 16, cfg.rounds, name="digits")(x)
    return keras.Model(image, {"capsules": capsules, "lengths": lengths(capsules)}, name="capsnet")


def serve(cfg, encoder):
    """The classifier to export: pixels 0..255 [B,28,28,1] -> logits [B,10], ten times the capsules' lengths."""
    scaled = build_encoder(cfg, scale=1 / 255)
    scaled.set_weights(encoder.get_weights())
    return keras.Model(scaled.input, layers.Rescaling(10.0, name="logits")(scaled.output["lengths"]), name="capsnet")


def masked(capsules, labels):
    """capsules [B,10,16], labels [B,K] -> [B,K,160]: for each of K digits its own capsule, the others zero."""
    chosen = ops.one_hot(labels, CLASSES, dtype="float32")
    return ops.reshape(chosen[..., None] * capsules[:, None], (-1, labels.shape[1], CLASSES * capsules.shape[2]))


def build_decoder(side=28):
    """masked capsules [B,K,160] -> pixels float32 [B,K,side * side] (paper, figure 2)."""
    parts = [keras.Input((None, CLASSES * 16)), layers.Dense(512, "relu"), layers.Dense(1024, "relu")]
    return keras.Sequential([*parts, layers.Dense(side * side, "sigmoid", dtype="float32")], name="decoder")


def draw(decoder):
    """The function capsules [B,10,16], labels [B,K] -> pixels [B,K,side * side] that the figures take."""
    return lambda capsules, labels: decoder.predict(masked(capsules, labels), batch_size=250, verbose=0)


def build_trainer(cfg, encoder, decoder, digits=1):
    """The compiled model (image, labels [B,digits]) -> lengths [B,10], pixels [B,digits,side * side]."""
    labels = keras.Input((digits,), dtype="int32", name="labels")
    outputs = {"lengths": encoder.output["lengths"], "pixels": decoder(masked(encoder.output["capsules"], labels))}
    trainer = keras.Model([encoder.input, labels], outputs)
    trainer.compile(core.runtime.scaled(keras.optimizers.Adam(cfg.lr)), jit_compile=core.runtime.jit(),
                    loss={"lengths": margin_loss, "pixels": squared_error},
                    loss_weights={"lengths": 1.0, "pixels": cfg.reconstruct},
                    metrics={"lengths": "sparse_categorical_accuracy"} if digits == 1 else None)  # fmt: skip
    return trainer


# %% [markdown]
# ## A fair rival, and pictures
# A comparison means little if one side is larger.  `models/capsules/rival.py` has a CNN in the layout of the paper's
# baseline, with max-pooling, which helps it, and as many parameters as the encoder.  Both see the same pictures in the
# same order.  `models/capsules/scenes.py` makes them, afresh for every batch: digits moved by up to two pixels, as in
# the paper; digits anywhere on a 40x40 canvas; two different digits on top of each other (MultiMNIST).


# %%
def train(run, cfg, model, name, data, scene, epochs):
    """Fit a trainer or a CNN to the scenes made from `data` (images, labels); returns the history of all epochs."""
    resume = run.checkpoint(model, name)
    stream = scenes.batches(data, scene, cfg.batch, cfg.seed, epochs, resume.epoch, reconstruct=model.name != "cnn")
    rate = keras.callbacks.LearningRateScheduler(lambda epoch: cfg.lr * cfg.decay**epoch)
    model.fit(stream, steps_per_epoch=len(data[0]) // cfg.batch, initial_epoch=resume.epoch, epochs=epochs, verbose=0,
              callbacks=[rate, measures.Clock(), resume, core.Progress(name)])  # fmt: skip
    return resume.history


def single_digits(run, cfg, train_set, test_set, names):
    """CapsNet and CNN on single digits: errors, cost, reconstructions, what the dimensions mean, what routing does."""
    core.runtime.seed(cfg.seed)
    encoder, decoder = build_encoder(cfg), build_decoder()
    trainer = build_trainer(cfg, encoder, decoder)
    cnn = rival.cnn((28, 28, 1), CLASSES, cfg.width, encoder.count_params(), cfg.lr)
    past = {"capsnet": train(run, cfg, trainer, "capsnet", train_set, scenes.SINGLE, cfg.epochs),
            "cnn": train(run, cfg, cnn, "cnn", train_set, scenes.SINGLE, cfg.epochs)}  # fmt: skip
    encoder.save(run.folder / "encoder.keras")
    decoder.save(run.folder / "decoder.keras")
    images, labels = test_set[0].astype("float32") / 255, test_set[1]
    found = encoder.predict(images, batch_size=250, verbose=0)
    capsules, answers = found["capsules"], found["lengths"].argmax(axis=1)
    drawn = draw(decoder)(capsules, labels[:, None]).reshape(images.shape)
    run.record["history"] = {f"{model}_{name}": past[model][name] for model in past for name in past[model]}
    run.figure("learning", figures.learning(**past))
    run.figure("reconstructions", figures.reconstructions(draw(decoder), images, capsules, answers, labels, names))
    two = [np.argmax(labels == digit) for digit in (4, 5)]  # the first of each
    run.figure("dimensions", figures.dimensions(draw(decoder), capsules[two], labels[two]))
    trace = measures.trace(route, encoder, images[:500], labels[:500], rounds=6)
    run.figure("routing", figures.routing(trace))
    table = [measures.cost(encoder, images[:100], past["capsnet"]), measures.cost(cnn, images[:100], past["cnn"])]
    run.record["tables"] = {"cost": table, "routing": trace}
    costs = {f"{row['model']}_{key}": row[key] for row in table for key in ("params", "ms_alone", "seconds_an_epoch")}
    errors = {"test_error": 100 * np.mean(answers != labels), "cnn_test_error": measures.error(cnn, images, labels)}
    drawing = {"pixel_error": float(np.mean((drawn - images) ** 2)), "decoder_params": decoder.count_params()}
    return errors | costs | drawing


def ablation(run, cfg, train_set, test_set):
    """Routing rounds, with and without reconstruction: the same budget and the same initial weights for each."""
    images, labels = (array[: cfg.ablation_limit] for array in train_set)

    def arm(rounds, reconstruct):
        core.runtime.seed(cfg.seed)
        setting = dataclasses.replace(cfg, rounds=rounds, reconstruct=reconstruct)
        encoder = build_encoder(setting)
        trainer, name = build_trainer(setting, encoder, build_decoder()), f"rounds-{rounds}-{reconstruct}"
        train(run, setting, trainer, name, (images, labels), scenes.SINGLE, cfg.ablation_epochs)
        return measures.error(encoder, test_set[0].astype("float32") / 255, test_set[1])

    arms = {}
    for weight, rounds in itertools.product((cfg.reconstruct, 0.0), cfg.ablation):
        name = f"{rounds}{'' if weight else ' plain'}"
        arms[name] = run.once(f"ablation-{name}", lambda rounds=rounds, weight=weight: arm(rounds, weight))
    run.record["tables"]["ablation"] = [{"arm": name, "test_error": value} for name, value in arms.items()]
    run.figure("ablation", figures.ablation(arms, len(test_set[1])))
    return {f"rounds_{name.replace(' ', '_')}_error": value for name, value in arms.items()}


def robustness(run, cfg, train_set, test_set, strengths=(0.0, 0.5, 1.0, 1.5, 2.0)):
    """Trained on shifted digits alone, tested on turned, sheared and scaled ones: CapsNet against the CNN."""
    side = scenes.CANVAS.side

    def arm(kind):
        core.runtime.seed(cfg.seed)
        encoder = build_encoder(cfg, side)
        cnn = rival.cnn((side, side, 1), CLASSES, cfg.width, encoder.count_params(), cfg.lr)
        tested, fitted = (cnn, cnn) if kind == "cnn" else (encoder, build_trainer(cfg, encoder, build_decoder(side)))
        train(run, cfg, fitted, f"canvas-{kind}", train_set, scenes.CANVAS, cfg.canvas_epochs)
        return [100 - measures.error(tested, scenes.affine(test_set[0], s, cfg.seed), test_set[1]) for s in strengths]

    arms = {kind: run.once(f"canvas-{kind}", lambda kind=kind: arm(kind)) for kind in ("capsnet", "cnn")}
    run.record["tables"]["robustness"] = [
        {"strength": s, "capsnet": a, "cnn": b} for s, a, b in zip(strengths, *arms.values(), strict=True)]  # fmt: skip
    run.figure("robustness", figures.robustness(strengths, arms))
    return {f"{kind}_{name}_accuracy": values[strengths.index(strength)] for kind, values in arms.items()
            for name, strength in (("shifted", 0.0), ("affine", 1.0))}  # fmt: skip


def overlaps(run, cfg, train_set, test_set):
    """Two overlapping digits: are both found (it is an error else), and does each capsule draw its own one?"""
    core.runtime.seed(cfg.seed)
    encoder, decoder = build_encoder(cfg, scenes.MULTI.side), build_decoder(scenes.MULTI.side)
    train(run, cfg, build_trainer(cfg, encoder, decoder, digits=2), "multi", train_set, scenes.MULTI, cfg.multi_epochs)
    images, labels, pixels = scenes.fixed(*test_set, scenes.MULTI)
    found = encoder.predict(images, batch_size=250, verbose=0)
    capsules, order = found["capsules"], np.argsort(found["lengths"])  # shortest capsule first
    right = np.sort(order[:, -2:]) == np.sort(labels)
    run.figure("overlaps", figures.overlaps(draw(decoder), images, capsules, labels, pixels, absent=order[:, :1]))
    drawn = draw(decoder)(capsules, labels)
    own, other = measures.overlap(drawn, pixels), measures.overlap(drawn, pixels[:, ::-1])
    return {"multi_error": 100 * np.mean(~right.all(axis=1)), "multi_iou": own, "multi_iou_other_digit": other}


# %% [markdown]
# ## What came out
# Preset cpu: with equal size and training both networks err alike on MNIST; on bent digits the CNN holds up better:
# the paper's advantage under affine maps does not return.  One, two or three rounds of routing differ by less than a
# standard error.  Coupling stays near uniform (above 0.99 of the largest entropy after three rounds), yet many small
# shifts the same way make the true digit's capsule three times as long.  What the CNN has no part of is the drawing:
# one dimension thickens or slants a digit, and two digits on top of each other are drawn apart.


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    with core.run("day21_capsnet", options, cfg) as run:
        data = core.data.load(cfg.data, limit=cfg.limit, seed=cfg.seed)
        if data.x_train.shape[1:] != (28, 28, 1) or len(data.labels) != CLASSES:
            raise core.InputError(f"--data {cfg.data}: this unit needs ten classes of 28x28 pictures with one channel")
        if cfg.batch > min(len(data.x_train), cfg.ablation_limit):
            raise core.InputError(f"--batch {cfg.batch} is larger than the training set: give a smaller one")
        sets = (data.x_train, data.y_train), (data.x_test[: cfg.tests], data.y_test[: cfg.tests])
        run.record["data"] = data.provenance
        run.record["metrics"] |= single_digits(run, cfg, *sets, data.labels)
        for experiment in (ablation, robustness, overlaps):
            run.record["metrics"] |= experiment(run, cfg, *sets)
    model = serve(cfg, keras.models.load_model(run.folder / "encoder.keras", compile=False))
    core.export.image_classifier(model, "day21_capsnet", data, cfg.exports)
    return run.record


if __name__ == "__main__":
    core.cli(main)
