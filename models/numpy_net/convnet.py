"""A small convolutional network's arrays, and what its layers, written in several versions, are measured by."""

import dataclasses
import functools
import time

import numpy as np

from course.core import plots
from models.numpy_net import checks, conv, gradcheck, initialisers, norm, optim, twin
from models.numpy_net.solver import Solver


@dataclasses.dataclass
class ConvNet:
    """Convolution - (normalization) - ReLU - 2x2 max pooling - affine - ReLU - affine."""

    # W1 [k,k,C,F], b1 [F], W2 [H/2 W/2 F, M], b2 [M], W3 [M, classes], b3 [classes]; normalized also gamma, beta [F]
    params: dict[str, np.ndarray]
    normalization: str | None = None  # None, "batch" or "group"
    running: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # batch normalization's mean, var [F]


def create(rng, shape, classes, *, filters=32, kernel=7, hidden=100, normalization=None, dtype=np.float32):
    """ConvNet for pictures of `shape` (H, W, C).  Weights are He's, the last layer's ten times smaller: all first
    scores are nearly 0, and the first softmax loss log(classes)."""
    (high, wide, channels), draw = shape, functools.partial(initialisers.he, rng, dtype=dtype)
    params = {
        "W1": draw(kernel**2 * channels, filters).reshape(kernel, kernel, channels, filters),
        "b1": np.zeros(filters, dtype),
        "W2": draw(high // 2 * (wide // 2) * filters, hidden),
        "b2": np.zeros(hidden, dtype),
        "W3": draw(hidden, classes) / dtype(10),
        "b3": np.zeros(classes, dtype),
    }
    if normalization:
        params |= {"gamma": np.ones(filters, dtype), "beta": np.zeros(filters, dtype)}
    return ConvNet(params, normalization, norm.running_statistics(filters, dtype) if normalization == "batch" else {})


# --- versions of one layer --------------------------------------------------------------------------------------------

# beside the naive ones that a lesson writes: name -> (forward, backward)
LIBRARY = {
    "convolution": {
        "im2col": (conv.conv_im2col_forward, conv.conv_im2col_backward),
        "fast": (conv.conv_forward, conv.conv_backward),
    },
    "pooling": {
        "tiles": (conv.max_pool_reshape_forward, conv.max_pool_reshape_backward),
        "fast": (conv.max_pool_forward, conv.max_pool_backward),
    },
}


def _timed(call, turns):
    """What `call` returns, and the least milliseconds that it took."""
    best = np.inf
    for _ in range(turns):
        began = time.perf_counter()
        answer = call()
        best = min(best, 1e3 * (time.perf_counter() - began))
    return answer, best


def times(naive, pictures, seed):
    """A row a version: milliseconds forward and backward in float32, and how many times faster than the naive one.

    naive: {"convolution" and "pooling": (forward, backward)}.  They are timed once, the library's ten times, on 32x32
    pictures: 32 kernels 7x7, then pooling of their maps by 2x2.
    """
    rows, rng, shapes = [], np.random.default_rng(seed), ((pictures, 32, 32, 3), (7, 7, 3, 32), (32,))
    x, w, b = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    given = {"convolution": (x, w, b, 1, 3), "pooling": (conv.conv_forward(x, w, b, 1, 3)[0], 2)}
    for layer, pair in naive.items():
        slow = None
        for name, (forward, backward) in ({"naive": pair} | LIBRARY[layer]).items():
            turns = 10 if slow else 1
            (out, cache), ahead = _timed(functools.partial(forward, *given[layer]), turns)
            _, back = _timed(functools.partial(backward, out, cache), turns)
            slow = slow or ahead + back
            rows.append({"layer": layer, "version": name, "forward, ms": ahead, "backward, ms": back,
                         "times faster": slow / (ahead + back)})  # fmt: skip
    return rows


def _answers(pair, arrays, d_out, **options):
    """Output and gradients of a (forward, backward), for as much of d_out as the output is large."""
    forward, backward = pair
    out, cache = forward(*arrays, **options)
    slopes = backward(d_out[: out.size].reshape(out.shape), cache)
    return (out, *slopes) if isinstance(slopes, tuple) else (out, slopes)


def differences(naive, norms, rng):
    """A row a comparison: the largest difference of outputs and gradients from the library's, in float64.

    naive: as `times` takes it, compared with strides and zeros around; norms: {"batch" and "group": (forward, backward)
    of a picture [N,H,W,C], gamma and beta}, the groups being two.
    """
    rows, d = [], rng.standard_normal(2_000)
    x, w, b = (rng.standard_normal(shape) for shape in ((3, 8, 8, 4), (3, 3, 4, 6), 6))
    for name, pair in LIBRARY["convolution"].items():
        settings = [{"stride": stride, "pad": pad} for stride, pad in ((1, 0), (1, 1), (2, 1))]
        worst = max(twin.largest_difference(*(_answers(p, (x, w, b), d, **o) for p in (naive["convolution"], pair)))
                    for o in settings)  # fmt: skip
        rows.append({"of": "naive convolution", "beside": f"numpy_net, {name}", "difference": worst})
    for name, pair in LIBRARY["pooling"].items():
        worst = twin.largest_difference(*(_answers(p, (x, 2), d) for p in (naive["pooling"], pair)))
        rows.append({"of": "naive pooling", "beside": f"numpy_net, {name}", "difference": worst})
    arrays, library = (x, rng.standard_normal(4), rng.standard_normal(4)), {
        "batch": (functools.partial(norm.spatial_batch_norm_forward, train=True), norm.spatial_batch_norm_backward),
        "group": (functools.partial(norm.spatial_group_norm_forward, groups=2), norm.spatial_group_norm_backward),
    }  # fmt: skip
    for name, pair in norms.items():
        worst = twin.largest_difference(*(_answers(p, arrays, d) for p in (pair, library[name])))
        rows.append({"of": f"spatial {name} norm", "beside": "numpy_net", "difference": worst})
    return rows


# --- gradients --------------------------------------------------------------------------------------------------------


def check_layers(naive, norms, rng):
    """The layers that `differences` takes -> {name: list of `gradcheck.Check`}."""
    x, w, b = (rng.standard_normal(shape) for shape in ((2, 6, 4, 4), (3, 3, 4, 3), 3))
    apart = rng.permutation(x.size).reshape(x.shape) / 10  # so that no step changes which number is the largest
    forward, backward = naive["convolution"]
    arrays = {"x": x, "gamma": rng.standard_normal(4), "beta": rng.standard_normal(4)}
    return {
        # linear in each array: a long step has no truncation, and leaves almost no rounding
        "convolution": gradcheck.check_layer(
            functools.partial(forward, stride=2, pad=1), backward, {"x": x, "w": w, "b": b}, rng, step=0.1
        ),
        "pooling": gradcheck.check_layer(*naive["pooling"], {"x": apart}, rng, step=0.01),
        **{f"spatial {name} norm": gradcheck.check_layer(*pair, arrays, rng) for name, pair in norms.items()},
    }


def check_stack(stack, params, x, loss, **options):
    """The gradients of loss() -> value, gradients by name -> list of `gradcheck.Check`.

    stack: what the loss stands on, layers (names of its parameters, forward, backward) that x goes through.  ReLU and
    pooling, the layers without parameters, have kinks: where what they let through changes, nothing is compared.
    """

    def passed():
        out, flags = x, []
        for names, forward, backward in stack:
            out, cache = forward(out, *(params[name] for name in names))
            if not names:
                flags.append((backward(np.ones_like(out), cache) > 0).ravel())
        return np.concatenate(flags)

    return gradcheck.check(lambda: loss()[0], params, loss()[1], pieces=passed, **options)


def check_sandwiches(sandwich, forward, backward, rng):
    """Convolution and what follows it -> {name: list of `gradcheck.Check`}.

    sandwich(normalization, pooled, pad) -> stack, forward(stack, params, x) -> out, caches; backward(stack, d, caches)
    -> dx, gradients by name.
    """
    found, shapes = {}, {"W1": (3, 3, 2, 4), "b1": 4, "gamma": 4, "beta": 4}
    for title, normalization, pooled in (
        ("conv-ReLU", None, False),
        ("conv-BN-ReLU", "batch", False),
        ("conv-GN-ReLU", "group", False),
        ("conv-ReLU-pool", None, True),
    ):
        stack, x = sandwich(normalization, pooled, pad=1), rng.standard_normal((2, 4, 4, 2))
        params = {name: rng.standard_normal(shapes[name]) for names, *_ in stack for name in names}
        start = forward(stack, params, x)[0]
        upstream = rng.standard_normal(start.shape)

        def loss(stack=stack, params=params, x=x, start=start, upstream=upstream):
            out, caches = forward(stack, params, x)
            return ((out - start) * upstream).sum(), backward(stack, upstream, caches)[1]  # less rounding than in out

        found[title] = check_stack(stack, params, x, loss, step=3e-5)
    return found


def check_networks(loss, network, rng):
    """A sample of the gradients of small float64 ConvNets, regularised or not -> {name: list of `gradcheck.Check`}.

    loss(net, x, y, reg) -> value, gradients; network(net, train) -> the net's stack.
    """
    found, x, y = {}, rng.standard_normal((3, 8, 6, 2)), rng.integers(0, 5, 3)
    for normalization, reg in ((None, 0.0), (None, 0.1), ("batch", 0.1), ("group", 0.1)):
        net = create(rng, x.shape[1:], 5, filters=4, hidden=6, normalization=normalization, dtype=np.float64)
        title = f"network, {normalization or 'no'} norm, reg {reg}"
        closed = functools.partial(loss, net, x, y, reg)
        found[title] = check_stack(network(net, train=True), net.params, x, closed, samples=30, rng=rng)
    return found


def in_keras(loss, scores, net, barebones, sequential, x, y):
    """Rows as `differences`: a trained ConvNet without normalization beside the same in Keras.

    barebones(params, x) -> scores, given tensors: compared in float64, with its gradients from a tape.
    sequential(shape, filters, hidden, classes) -> model: compared in float32.
    """
    import tensorflow as tf

    exact, x64 = ConvNet({name: array.astype(np.float64) for name, array in net.params.items()}), x.astype(np.float64)
    params = {name: tf.constant(array) for name, array in exact.params.items()}
    with tf.GradientTape() as tape:
        tape.watch(params)
        answers = barebones(params, tf.constant(x64))
        value = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, answers))
    slopes, ours = tape.gradient(value, params), loss(exact, x64, y)[1]
    model = sequential(x.shape[1:], *(net.params[name].size for name in ("b1", "b2", "b3")))
    model.set_weights(list(net.params.values()))
    return [
        {"of": "scores", "beside": "Keras, barebones",
         "difference": twin.largest_difference([scores(exact, x64)], [answers.numpy()])},
        {"of": "gradients", "beside": "tf.GradientTape",
         "difference": twin.largest_difference(ours.values(), [slopes[name].numpy() for name in ours])},
        {"of": "scores, float32", "beside": "Keras, Sequential",
         "difference": twin.largest_difference([scores(net, x)], [model.predict(x, verbose=0)])},
    ]  # fmt: skip


# --- learning ---------------------------------------------------------------------------------------------------------


def sanity(loss, scores, net, x, y):
    """The first losses of an untrained ConvNet without and with regularisation; and whether it learns (x, y) by heart.

    reg = 1 must add half the sum of all squared weights, W1's, W2's and W3's.
    """
    first, regularised = (float(loss(net, x, y, reg)[0]) for reg in (0.0, 1.0))
    squares = sum(float(np.square(net.params[name]).sum()) for name in ("W1", "W2", "W3"))
    history = Solver(loss, scores, 20, 25, 1e-3, rule=optim.adam, verbose=False).fit(net, (x, y), (x, y))
    return {
        "first_loss": first,
        "first_loss_expected": float(np.log(scores(net, x[:1]).shape[1])),
        "first_loss_regularised": regularised,
        "first_loss_regularised_expected": first + squares / 2,
        "overfit_accuracy": history.best_val_accuracy,
    }


def learn(run, loss, scores, new, train, validation, name, cfg):
    """One epoch of Adam on train = (x, y) -> a ConvNet and its `History`, accuracies of 5,000 training images in it.

    name: "plain", or a normalization; new(rng, normalization=...) -> ConvNet, from the same weights each time.
    """
    net = new(np.random.default_rng(cfg.seed), normalization=None if name == "plain" else name)
    solver = Solver(functools.partial(loss, reg=cfg.reg), scores, 1, cfg.batch, cfg.lr, rule=optim.adam,
                    train_samples=5_000, seed=cfg.seed, label=f"ConvNet, {name}:")  # fmt: skip
    return net, solver.fit(net, train, validation, run.checkpoint(None, f"convnet_{name}"))


# --- figures ----------------------------------------------------------------------------------------------------------


def draw_filters(kernels):
    """Kernels [k,k,C,F] of 1 or 3 channels as pictures, each scaled to its own range."""
    pictures = np.moveaxis(kernels, 3, 0)
    low, high = (f(pictures, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
    return plots.image_grid((pictures - low) / (high - low), columns=8, title="kernels of the first layer")


def draw_by_hand(pictures, convolve):
    """Pictures uint8 [N,H,W,C] and what kernels written by hand make of them: greyscale, and edges of two directions.

    convolve(x, w, b, pad=) -> out, cache.
    """
    grey = np.array([0.299, 0.587, 0.114] if pictures.shape[3] == 3 else [1.0])  # how bright red, green, blue seem
    centre, slope = np.outer([0, 1, 0], [0, 1, 0]), np.outer([-1, 0, 1], [1, 2, 1])
    w = np.stack([kernel[..., None] * grey for kernel in (centre, slope, slope.T)], axis=3)
    out, _ = convolve(pictures / 255, w, np.zeros(3), pad=1)
    edges = [0.5 + out[..., i] / (2 * np.abs(out[..., i]).max()) for i in (1, 2)]
    shown = [*pictures / 255, *out[..., 0], *edges[0], *edges[1]]
    labels = ("picture", "greyscale", "edges from\nabove to below", "edges from\nleft to right")
    return plots.image_grid(shown, columns=len(pictures), row_labels=labels)


def draw(run, learned, convolve, pictures, timed, gradients, deep):
    """All figures.  learned: name -> (net, `History`); timed, gradients: rows; deep: the logs of the Keras network."""
    run.figure("filters_by_hand", draw_by_hand(pictures, convolve))
    run.figure("filters_learned", draw_filters(learned["plain"][0].params["W1"]))
    run.figure("gradient_check", checks.draw(gradients))
    faster = {f"{row['layer']}, {row['version']}": row["times faster"] for row in timed if row["times faster"] != 1}
    run.figure("speed", plots.bars(faster, ylabel="times faster than four loops, forward and backward", form="{:.0f}"))
    losses = {name: np.convolve(history.losses, np.ones(20) / 20, "valid") for name, (_, history) in learned.items()}
    run.figure("one_epoch", plots.curves(losses, xlabel="step", ylabel="loss, mean of 20 steps"))
    run.figure("deep", plots.panels({
        "loss": {"training": deep["loss"], "validation": deep["val_loss"]},
        "accuracy": {"training, augmented": deep["accuracy"], "validation": deep["val_accuracy"]}}))  # fmt: skip
