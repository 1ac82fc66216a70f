"""A small convolutional network made of a lesson's own layers, and the same network in Keras.

`stack`: the layers in order, each (forward, backward, names of its parameters).  The network that `create` has weights
for and `keras_model` builds: convolution 3x3, ReLU, max pooling by 2, convolution 3x3 with stride 2, ReLU, average
pooling by 2, affine.
"""

import time

import keras
import numpy as np
from keras import layers

from models.cnn import twin
from models.numpy_net import checks, conv, gradcheck, initialisers, losses, optim
from models.numpy_net.twin import largest_difference


def create(rng, shape, classes, filters=16, dtype=np.float32):
    """Parameters for pictures of `shape` (H,W,C): He weights, the last ones a tenth of that, so that all classes begin
    as likely; biases 0."""
    params, inputs = {}, 9 * shape[2]
    for layer, width in enumerate((filters, 2 * filters), start=1):
        params[f"W{layer}"] = initialisers.he(rng, inputs, width, dtype).reshape(3, 3, -1, width)
        params[f"b{layer}"], inputs = np.zeros(width, dtype), 9 * width
    high, wide = (-(-(side // 2) // 2) // 2 for side in shape[:2])  # pooled, strided, pooled
    params["W3"] = dtype(0.1) * initialisers.he(rng, high * wide * 2 * filters, classes, dtype)
    return params | {"b3": np.zeros(classes, dtype)}


def keras_model(shape, classes, filters=16, dtype="float32"):
    """The same in Keras.  Padding is a layer of its own: with a stride, "same" pads at the right and below only."""
    return keras.Sequential([
        keras.Input(shape, dtype=dtype),
        layers.ZeroPadding2D(1, dtype=dtype), layers.Conv2D(filters, 3, activation="relu", dtype=dtype),
        layers.MaxPooling2D(dtype=dtype),
        layers.ZeroPadding2D(1, dtype=dtype), layers.Conv2D(2 * filters, 3, 2, activation="relu", dtype=dtype),
        layers.AveragePooling2D(2, dtype=dtype),
        layers.Flatten(dtype=dtype), layers.Dense(classes, dtype=dtype),
    ])  # fmt: skip


def forward(stack, params, x):
    """x [B,H,W,C] -> scores [B,classes], caches (one a layer)."""
    caches = []
    for ahead, _, names in stack:
        x, cache = ahead(x, *(params[name] for name in names))
        caches.append(cache)
    return x, caches


def gradients(stack, params, x, y):
    """The softmax cross-entropy of the batch (x, y), y int [B], and its gradients by name."""
    scores, caches = forward(stack, params, x)
    value, d = losses.softmax_cross_entropy(scores, y)
    found = {}
    for (_, back, names), cache in zip(reversed(stack), reversed(caches), strict=True):
        d, *slopes = back(d, cache) if names else (back(d, cache),)
        found |= dict(zip(names, slopes, strict=True))
    return float(value), found


def check(stack, params, x, y, rng, sides, samples=20):
    """Centred differences for a sample of every parameter, in float64 -> list of `gradcheck.Check`; `params` stay.

    sides: caches of `forward` -> array that tells on which side of its kinks the loss stands (which ReLUs are on, which
    number of a window is the largest): where that changes within a step, the quotient is no derivative.
    """
    params, x = {name: array.astype(np.float64) for name, array in params.items()}, x.astype(np.float64)
    return gradcheck.check(
        lambda: losses.softmax_cross_entropy(forward(stack, params, x)[0], y)[0],
        params,
        gradients(stack, params, x, y)[1],
        samples=samples,
        rng=rng,
        pieces=lambda: sides(forward(stack, params, x)[1]),
    )


def compare(stack, params, x, y, *, batch, lr):
    """Gradient descent on the batches of (x, y) in the order given, by the stack and by Keras from the same weights.

    Returns {dtype: (our losses [steps], Keras's)} for float64 and float32, and the largest difference between the two
    first gradients in float64, ours and GradientTape's.
    """
    curves, differences = {}, {}
    filters, classes = params["b1"].size, params["b3"].size
    for dtype in ("float64", "float32"):
        ours, copy = [], {name: array.astype(dtype) for name, array in params.items()}
        model, x = keras_model(x.shape[1:], classes, filters, dtype), x.astype(dtype)
        theirs, slopes = twin.follow(model, copy.values(), x, y, batch=batch, lr=lr)
        first = gradients(stack, copy, x[:batch], y[:batch])[1]
        differences[dtype] = largest_difference([first[name] for name in copy], slopes)
        for i in range(0, len(x), batch):
            value, found = gradients(stack, copy, x[i : i + batch], y[i : i + batch])
            optim.sgd(copy, found, lr)
            ours.append(value)
        curves[dtype] = np.array(ours), theirs
    return curves, differences["float64"]


def train(stack, params, x, y, *, lr, batch):
    """One pass of SGD with momentum, in place; prints as it goes, returns the loss of each step."""
    state, curve = {}, []
    for i in range(0, len(x) - batch + 1, batch):
        value, found = gradients(stack, params, x[i : i + batch], y[i : i + batch])
        optim.momentum(params, found, state, lr)
        curve.append(value)
        if len(curve) % 50 == 0:
            print(f"NumPy network, step {len(curve)} of {len(x) // batch}: loss {np.mean(curve[-50:]):.3f}", flush=True)
    return curve


def accuracy(stack, params, x, y, batch=500):
    """Share of the pictures x [N,H,W,C] that get their label, in per cent."""
    right = [forward(stack, params, x[i : i + batch])[0].argmax(axis=1) == y[i : i + batch]
             for i in range(0, len(x), batch)]  # fmt: skip
    return 100 * float(np.concatenate(right).mean())


def examine(stack, sides, convolutions, pools, layer, parts, classes, *, images, batch, seed, steps=50):
    """All that is checked of a lesson's layers, and the stack trained for one pass: {tables, metrics, curves, losses}.

    convolutions, pools: name -> (forward, backward); layer: a Keras layer that is called like Conv2D; sides: as `check`
    takes it; parts: `core.data.Splits`, of whose training part the first `images` are used, in their order; steps: the
    first ones, in which Keras is followed.
    """
    rng = np.random.default_rng(seed)
    x, x_val = (pictures / np.float32(127.5) - 1 for pictures in (parts.x_train[:images], parts.x_val))
    y, params = parts.y_train[:images], create(rng, parts.x_train.shape[1:], classes)
    found = twin.gradients(convolutions, pools, rng) | {"network": check(stack, params, x[:2], y[:2], rng, sides)}
    gradient_rows = checks.rows(found)
    known = convolutions | {"numpy_net": (conv.conv_forward, conv.conv_backward)}
    same = twin.differences(known, rng, [layer])
    curves, slopes = compare(stack, params, x[: steps * batch], y[: steps * batch], batch=batch, lr=0.05)
    began = time.perf_counter()
    curve = train(stack, params, x, y, lr=0.02, batch=batch)
    seconds = time.perf_counter() - began
    return {
        "tables": {
            "gradient check": gradient_rows,
            "differences to Conv2D": same,
            "a convolution, forward and backward": twin.timings(known, rng),
        },
        "curves": curves,
        "losses": curve,
        "metrics": {
            "gradient_check_worst": max(row["relative"] for row in gradient_rows),
            "conv2d_difference": max(row[way] for row in same for way in row if way != "setting"),
            "gradients_checked": sum(row["checked"] for row in gradient_rows),
            "kinks_left_out": sum(row["skipped"] for row in gradient_rows),
            "twin_gradient_difference": slopes,
            **{f"twin_loss_difference_{dtype}": float(np.abs(a - b).max()) for dtype, (a, b) in curves.items()},
            "numpy_loss_first": curve[0],
            "numpy_loss_last": float(np.mean(curve[-20:])),
            "numpy_val_accuracy": accuracy(stack, params, x_val, parts.y_val),
            "numpy_us_a_picture": 1e6 * seconds / (len(curve) * batch),
        },
    }
