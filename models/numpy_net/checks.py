"""What a NumPy network must pass: every gradient against finite differences, and the questions to ask before training.

The lessons put these tables into their reports, and the tests hold them to their bounds.
"""

import dataclasses
import functools
import inspect

import numpy as np
from matplotlib import pyplot as plt

from models.numpy_net import conv, dropout, gradcheck, layers, losses, norm
from models.numpy_net import net as nets

BOUND = 1e-7  # on the relative error, elementwise and of the norms


def dense(rng):
    """The affine layer, the activations and the losses -> {name: list of `gradcheck.Check`}."""
    x, w, b = (rng.standard_normal(shape) for shape in ((6, 5), (5, 4), 4))
    found = {
        "affine": gradcheck.check_layer(layers.affine_forward, layers.affine_backward, {"x": x, "w": w, "b": b}, rng)
    }
    for name, (forward, backward) in layers.ACTIVATIONS.items():
        pieces = (lambda: x > 0) if "relu" in name else None
        found[name] = gradcheck.check_layer(forward, backward, {"x": x}, rng, pieces=pieces)
    found["softmax cross-entropy"] = _loss(losses.softmax_cross_entropy, x, rng.integers(0, 5, 6))
    found["binary cross-entropy"] = _loss(losses.bce_with_logits, x, rng.uniform(size=x.shape))
    return found


def _loss(loss, scores, targets):
    return gradcheck.check(lambda: loss(scores, targets)[0], {"scores": scores}, {"scores": loss(scores, targets)[1]})


def convolutional(rng):
    """Convolution and pooling, every version of each -> {name: list of `gradcheck.Check`}.

    They are linear in each of their arguments (the largest of a window as long as the same number stays the largest:
    those of x stand 0.1 apart), so a large step has no truncation, and leaves almost no rounding.
    """
    found, shapes = {}, {"x": (2, 6, 5, 3), "w": (3, 2, 3, 4), "b": (4,)}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    for name, forward, backward in (
        ("naive convolution", conv.conv_naive_forward, conv.conv_naive_backward),
        ("im2col convolution", conv.conv_im2col_forward, conv.conv_im2col_backward),
        ("fast convolution", conv.conv_forward, conv.conv_backward),
    ):
        forward = functools.partial(forward, stride=2, pad=1)
        found[name] = gradcheck.check_layer(forward, backward, arrays, rng, step=0.1)
    x = rng.permutation(2 * 6 * 4 * 3).reshape(2, 6, 4, 3) / 10
    for name, forward, backward, overlap in (
        ("naive max pooling", conv.max_pool_naive_forward, conv.max_pool_naive_backward, {"stride": 1}),
        ("max pooling of tiles", conv.max_pool_reshape_forward, conv.max_pool_reshape_backward, {}),
        ("max pooling", conv.max_pool_forward, conv.max_pool_backward, {"stride": 1}),
        ("average pooling", conv.avg_pool_forward, conv.avg_pool_backward, {"stride": 1}),
    ):
        forward = functools.partial(forward, size=2, **overlap)
        found[name] = gradcheck.check_layer(forward, backward, {"x": x}, rng, step=0.01)
    return found


def normalizing(rng):
    """Normalization of every kind, and dropout -> {name: list of `gradcheck.Check`}."""
    running = {"mean": rng.standard_normal(6), "var": rng.uniform(0.5, 2, 6)}
    flat, pictures = rng.standard_normal((7, 6)) + 1, rng.standard_normal((3, 4, 2, 6)) + 1
    found = {}
    for name, x, backward, forward, options in (
        ("batch norm", flat, norm.batch_norm_backward, norm.batch_norm_forward, {"train": True}),
        ("batch norm, testing", flat, norm.batch_norm_backward, norm.batch_norm_forward,
         {"running": running, "train": False}),
        ("layer norm", flat, norm.layer_norm_backward, norm.layer_norm_forward, {}),
        ("group norm", flat, norm.group_norm_backward, norm.group_norm_forward, {"groups": 2}),
        ("spatial batch norm", pictures, norm.spatial_batch_norm_backward, norm.spatial_batch_norm_forward,
         {"train": True}),
        ("spatial group norm", pictures, norm.spatial_group_norm_backward, norm.spatial_group_norm_forward,
         {"groups": 2}),
    ):  # fmt: skip
        arrays = {"x": x, "gamma": rng.standard_normal(6), "beta": rng.standard_normal(6)}
        found[name] = gradcheck.check_layer(functools.partial(forward, **options), backward, arrays, rng)

    def same_mask(x):
        return dropout.dropout_forward(x, 0.6, np.random.default_rng(0), train=True)

    found["dropout"] = gradcheck.check_layer(same_mask, dropout.dropout_backward, {"x": flat}, rng)
    return found


def lesson(pairs, losses, rng):
    """The layers and losses that a lesson wrote -> {name: list of `gradcheck.Check`}.

    pairs: name -> (forward, backward) of x [6, 5], or of x, w [5, 4] and b [4]; a kink is where an output is 0.
    losses: name -> loss(scores [6, 5], labels [6]).
    """
    x, w, b = (rng.standard_normal(shape) for shape in ((6, 5), (5, 4), 4))
    found, labels = {}, rng.integers(0, 5, 6)
    for name, (forward, backward) in pairs.items():
        arrays = {"x": x, "w": w, "b": b} if len(inspect.signature(forward).parameters) == 3 else {"x": x}
        kinks = functools.partial(_positive, forward, arrays)
        found[name] = gradcheck.check_layer(forward, backward, arrays, rng, pieces=kinks)
    return found | {name: _loss(loss, x, labels) for name, loss in losses.items()}


def _positive(forward, arrays):
    return forward(*arrays.values())[0] > 0


def network(forward, backward, net, x, y, **options):
    """Every parameter of a float64 `net` under the softmax cross-entropy of (x, y) -> list of `gradcheck.Check`.

    forward(net, x) -> scores, memory; backward(net, d_scores, memory) -> gradients by name: `nets`' own, or those of a
    lesson.  `options` (samples, rng, step) go to `gradcheck.check`.
    """
    scores, memory = forward(net, x)
    gradients = backward(net, losses.softmax_cross_entropy(scores, y)[1], memory)

    def sides():  # of the kinks: a hidden unit's output is positive where its pre-activation is
        _, caches = nets.forward(net, x)
        return np.concatenate([(affine[0] > 0).ravel() for affine, _ in caches[1:]])

    kinked = "relu" in net.activation and net.depth > 1
    return gradcheck.check(lambda: losses.softmax_cross_entropy(forward(net, x)[0], y)[0], net.params, gradients,
                           pieces=sides if kinked else None, **options)  # fmt: skip


def training_loss(loss, net, x, y, **options):
    """The gradients of loss(net, x, y, rng=rng, **options) -> value, gradients, for a float64 `net`, in training mode.

    Returns a list of `gradcheck.Check`.  Each call is given a generator that draws the same dropout masks.
    """

    def masked():
        return loss(net, x, y, rng=np.random.default_rng(0), **options)

    def sides():  # of the kinks, as in `network`
        _, caches = nets.forward(net, x, train=True, rng=np.random.default_rng(0))
        return np.concatenate([(affine[0] > 0).ravel() for affine, _ in caches[1:]])

    kinked = "relu" in net.activation and net.depth > 1
    return gradcheck.check(lambda: masked()[0], net.params, masked()[1], pieces=sides if kinked else None)


def networks(forward, backward, rng):
    """Small networks of 1, 2 and 4 layers with every activation -> {name: list of `gradcheck.Check`}."""
    found, x, y = {}, rng.standard_normal((8, 12)), rng.integers(0, 5, 8)
    for activation in ("relu", "leaky_relu", "sigmoid", "tanh"):
        for hidden in ((16,), (16, 16, 16)):
            net = nets.create(rng, (12, *hidden, 5), activation, dtype=np.float64)
            found[f"{net.depth}-layer net, {activation}"] = network(forward, backward, net, x, y)
    found["1-layer net"] = network(forward, backward, nets.create(rng, (12, 5), "identity", dtype=np.float64), x, y)
    return found


def sanity(net, step, x, y, path):
    """Four questions that catch most mistakes before hours are spent, for an untrained float32 `net` -> {name: number}.

    Is the first loss log C?  Can 500 steps of the lesson's `step(net, x, y, lr)` learn 50 examples by heart?  Do scores
    of 1e4 stay finite (the loss asked for is exactly 1e4)?  Does the network, saved to `path`, answer as in memory?
    """
    scores, _ = nets.forward(net, x)
    eager = nets.cast(net, np.float32)  # a copy
    for _ in range(500):
        step(eager, x[:50], y[:50], 0.1)
    learned, _ = nets.forward(eager, x[:50])
    nets.save(net, path)
    reloaded, _ = nets.forward(nets.load(path), x)
    return {
        "initial_loss": float(losses.softmax_cross_entropy(scores, y)[0]),
        "initial_loss_expected": float(np.log(scores.shape[1])),
        "overfit_50_loss": float(losses.softmax_cross_entropy(learned, y[:50])[0]),
        "overfit_50_error": 100 * float((learned.argmax(axis=1) != y[:50]).mean()),
        "loss_of_scores_1e4": float(losses.softmax_cross_entropy(np.array([[1e4, 0, -1e4]]), np.array([1]))[0]),
        "reloaded_difference": float(np.abs(scores - reloaded).max()),
    }


def rows(found):
    """{name: list of `Check`} -> one dict for each array checked, as a run's record takes them."""
    return [{"of": of} | dataclasses.asdict(check) for of, checks in found.items() for check in checks]


def draw(table):
    """Figure of `rows`: the worst relative error of each thing checked, beside the bound."""
    worst = {}
    for row in table:
        worst[row["of"]] = max(worst.get(row["of"], 0.0), row["relative"])
    figure, axes = plt.subplots(figsize=(6.4, 0.24 * len(worst) + 1.1))
    axes.scatter(np.maximum(list(worst.values()), 1e-12), list(worst))
    axes.axvline(BOUND, color="#D55E00", label=f"bound {BOUND:.0e}")
    right = 3 * max(BOUND, *worst.values())  # a check that failed is shown too
    axes.set(xscale="log", xlim=(7e-13, right), xlabel="worst relative error (float64, centred differences)")
    axes.invert_yaxis()
    axes.legend(loc="lower left")
    return figure
