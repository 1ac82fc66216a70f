"""Assignment 2 - Convolutional networks: four slow loops become one fast product, and depth takes CIFAR-10 past 88 %.

Paper:     LeCun, Bottou, Bengio, Haffner 1998, "Gradient-based learning applied to document recognition", Proc. IEEE 86
Task:      write convolution, pooling and spatial normalisation; train a small ConvNet in NumPy and a deep one in Keras
Shapes:    picture [N,H,W,C] -> 7x7 convolution, ReLU, 2x2 max pooling [N,H/2,W/2,32] -> affine, ReLU [N,100] -> [N,10]
Reference: CIFAR-10: over 40 % of the training images after one epoch; a Keras network 70 % (CS231n 2018, assignment 2)
Run:       python -m course.a2_convnet --preset cpu --seed 0
Departs:   1. pictures are channels-last, as in Keras; the notebook's are channels-first
           2. pixels are divided by their spread and weights start from He's scale; the notebook keeps 0..255 and 0.001
"""

# %%
import dataclasses
import functools

import keras
import numpy as np
from keras import layers, ops

from course import core
from models import convnets
from models.numpy_net import checks, convnet, losses, norm
from models.numpy_net import layers as dense
from models.numpy_net.solver import accuracy

REFERENCE = {
    "epoch_train_accuracy": (40.0, "%", "CS231n 2018, assignment 2, ConvolutionalNetworks notebook: over, CIFAR-10"),
    "keras_val_accuracy": (70.0, "%", "CS231n 2018, assignment 2, TensorFlow notebook: at least, CIFAR-10"),
}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of the weights, the order of the pictures and their augmentation
    data: str = "cifar10"  # data set, as core.data knows it
    stand_in: str = ""  # set to take where no source has it; empty: an error
    train: int = 49_000  # training images
    validation: int = 1_000  # validation images
    test: int = 1_000  # the assignment's test images: each kept network answers them once; they choose nothing
    timed: int = 8  # pictures in the table of times
    filters: int = 32  # kernels of the NumPy network, 7x7
    batch: int = 50  # images a step
    lr: float = 1e-3  # of Adam
    reg: float = 1e-3  # weight of the squared weights in the loss
    width: int = 64  # channels of the deep network's first layer; later ones have two and four times as many
    epochs: int = 30  # its passes over the training images
    deep_batch: int = 250  # its images a step
    peak: float = 0.2  # its highest learning rate


PRESETS = {
    "smoke": {"data": "fashion_mnist_12k", "train": 1_000, "validation": 200, "test": 200, "timed": 1, "filters": 8,
              "width": 8, "epochs": 1, "deep_batch": 50},
    "cpu": {"stand_in": "fashion_mnist", "width": 32, "epochs": 14}, "full": {},
}  # fmt: skip


# %% [markdown]
# ## Convolution
# A convolution shows each unit a window of $k \times k$ pixels, and gives all windows the same weights: what is worth
# finding in one corner is worth finding in all. With stride $s$, kernel $f$ answers at place $(i, j)$ of picture $n$:
#
# $$o_{nijf} = \sum_{a, b, c} x_{n,\, si + a,\, sj + b,\, c}\; w_{abcf} + b_f \quad(1)$$
#
# Each output is an inner product of a window and a kernel. Hence, on the way back, its derivative $d_{nijf}$ times the
# kernel goes to the window, times the window to the kernel, and as it is to the bias (2); all is added up. (An aside: a
# figure shows eq. 1 with kernels as people once wrote them, one for the grey of a pixel, two for differences, edges.)


# %%
def conv_naive_forward(x, w, b, stride=1, pad=0):
    """x [N,H,W,C], w [k,k,C,F], b [F] -> out [N,H',W',F], cache; `pad` zeros on each side."""
    x, k = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))), len(w)
    size = (x.shape[1] - k) // stride + 1, (x.shape[2] - k) // stride + 1
    out = np.empty((len(x), *size, w.shape[3]), x.dtype)
    for n, i, j, f in np.ndindex(out.shape):  # four loops
        # exercise: eq. 1
        window = x[n, stride * i : stride * i + k, stride * j : stride * j + k]
        out[n, i, j, f] = (window * w[:, :, :, f]).sum() + b[f]
        # end exercise
    return out, (x, w, stride, pad)


def conv_naive_backward(d_out, cache):
    """d_out [N,H',W',F] -> dx [N,H,W,C], dw [k,k,C,F], db [F]."""
    x, w, stride, pad = cache
    k, dx, dw, db = len(w), np.zeros_like(x), np.zeros_like(w), np.zeros_like(w[0, 0, 0])
    for n, i, j, f in np.ndindex(d_out.shape):
        # exercise: eq. 2, for the padded x
        rows, columns = slice(stride * i, stride * i + k), slice(stride * j, stride * j + k)
        dx[n, rows, columns] += d_out[n, i, j, f] * w[:, :, :, f]
        dw[:, :, :, f] += d_out[n, i, j, f] * x[n, rows, columns]
        db[f] += d_out[n, i, j, f]
        # end exercise
    return dx[:, pad : x.shape[1] - pad, pad : x.shape[2] - pad], dw, db


# %% [markdown]
# ## Pooling
# Where exactly a feature was found matters less and less on the way to a class: keep the largest answer of each small
# window (3). Only this number had an influence on the output, so it alone gets the derivative (4).


# %%
def max_pool_naive_forward(x, size=2):
    """x [N,H,W,C] -> out [N,H/size,W/size,C], cache."""
    out = np.empty((len(x), x.shape[1] // size, x.shape[2] // size, x.shape[3]), x.dtype)
    for n, i, j, c in np.ndindex(out.shape):
        # exercise: eq. 3
        out[n, i, j, c] = x[n, size * i : size * (i + 1), size * j : size * (j + 1), c].max()
        # end exercise
    return out, (x, size)


def max_pool_naive_backward(d_out, cache):
    """d_out [N,H/size,W/size,C] -> dx [N,H,W,C]."""
    x, size = cache
    dx = np.zeros_like(x)
    for n, i, j, c in np.ndindex(d_out.shape):
        # exercise: eq. 4 (np.unravel_index(window.argmax(), window.shape) is the place of the largest)
        window = x[n, size * i : size * (i + 1), size * j : size * (j + 1), c]
        a, b = np.unravel_index(window.argmax(), window.shape)
        dx[n, size * i + a, size * j + b, c] = d_out[n, i, j, c]
        # end exercise
    return dx


# %% [markdown]
# ## Fast
# A turn of a Python loop costs microseconds, a multiplication a fraction of a nanosecond. `models/numpy_net/conv.py`
# has the remedies. *im2col* writes the windows as rows of a matrix: eq. 1 is then one product of matrices, and so is
# each part of eq. 2. *fast* does so for a few pictures at a time, which stay in the cache. Pooling is a reshape and a
# maximum over two axes where windows are *tiles*; the maximum of shifted pictures (*fast*) serves overlapping ones too.

# %%
NAIVE = {"convolution": (conv_naive_forward, conv_naive_backward),
         "pooling": (max_pool_naive_forward, max_pool_naive_backward)}  # fmt: skip
FAST = {layer: kinds["fast"] for layer, kinds in convnet.LIBRARY.items()}


# %% [markdown]
# ## Spatial normalisation
# A channel is one feature, wherever in the picture it is found: batch normalisation of pictures treats all $N H W$
# places as examples of $C$ features (5). Group normalisation (Wu and He 2018) needs no other picture: mean and variance
# (below, a bar) are one picture's, over its places and one group of its channels,
#
# $$\hat x = \frac{x - \mu}{\sigma}, \quad \sigma^2 = \operatorname{var} + \epsilon, \quad
#   y = \gamma_c \hat x + \beta_c \quad(6) \qquad\Rightarrow\qquad
#   \frac{\partial L}{\partial x} = \frac{d - \overline{d} - \hat x\, \overline{d\, \hat x}}{\sigma}, \quad
#   d = \gamma_c \frac{\partial L}{\partial y} \quad(7)$$


# %%
def spatial_batch_norm_forward(x, gamma, beta, running=None, train=True):
    """x [N,H,W,C], gamma and beta [C] -> out, cache; `running`: {"mean", "var"} [C], followed in training."""
    # exercise: eq. 5, by norm.batch_norm_forward(rows, gamma, beta, running, train=train)
    out, cache = norm.batch_norm_forward(x.reshape(-1, x.shape[3]), gamma, beta, running, train=train)
    # end exercise
    return out.reshape(x.shape), cache


def spatial_batch_norm_backward(d_out, cache):
    """d_out [N,H,W,C] -> dx, dgamma, dbeta."""
    # exercise: by norm.batch_norm_backward(rows, cache), which returns dx as rows, dgamma and dbeta
    dx, *slopes = norm.batch_norm_backward(d_out.reshape(-1, d_out.shape[3]), cache)
    # end exercise
    return dx.reshape(d_out.shape), *slopes


def spatial_group_norm_forward(x, gamma, beta, groups=2, eps=1e-5):
    """x [N,H,W,C], gamma and beta [C] -> out, cache."""
    grouped = x.reshape(len(x), -1, groups, x.shape[3] // groups)  # [N, HW, groups, C / groups]
    # exercise: x_hat and sigma of eq. 6, grouped
    centred = grouped - grouped.mean(axis=(1, 3), keepdims=True)
    sigma = np.sqrt((centred**2).mean(axis=(1, 3), keepdims=True) + eps)
    x_hat = centred / sigma
    # end exercise
    return gamma * x_hat.reshape(x.shape) + beta, (x_hat, sigma, gamma)


def spatial_group_norm_backward(d_out, cache):
    """d_out [N,H,W,C] -> dx, dgamma, dbeta."""
    x_hat, sigma, gamma = cache
    d = (d_out * gamma).reshape(x_hat.shape)
    # exercise: eq. 7, and the slopes of gamma and beta [C]
    dx = (d - d.mean(axis=(1, 3), keepdims=True) - x_hat * (d * x_hat).mean(axis=(1, 3), keepdims=True)) / sigma
    d_gamma, d_beta = (d_out * x_hat.reshape(d_out.shape)).sum(axis=(0, 1, 2)), d_out.sum(axis=(0, 1, 2))
    # end exercise
    return dx.reshape(d_out.shape), d_gamma, d_beta


NORMS = {"batch": (spatial_batch_norm_forward, spatial_batch_norm_backward),
         "group": (spatial_group_norm_forward, spatial_group_norm_backward)}  # fmt: skip


# %% [markdown]
# ## Sandwiches
# Conv-ReLU, conv-BN-ReLU, conv-ReLU-pool: layers in a row are a layer again, and so is a whole network. A layer is
# written as (names of its parameters, forward, backward); forwards run first to last, backwards last to first.


# %%
def stack_forward(stack, params, x):
    """x through the layers of `stack` -> out, caches."""
    caches = []
    for names, forward, _ in stack:
        x, cache = forward(x, *(params[name] for name in names))
        caches.append(cache)
    return x, caches


def stack_backward(stack, d, caches):
    """dL/dout -> dL/dx, and the gradients of the parameters by name."""
    gradients = {}
    for (names, _, backward), cache in zip(reversed(stack), reversed(caches), strict=True):
        d, *slopes = backward(d, cache) if names else (backward(d, cache),)  # without parameters dL/dx comes alone
        gradients |= zip(names, slopes, strict=True)
    return d, gradients


def sandwich(normalization=None, pooled=True, pad=3, version=FAST, **options):
    """Convolution, normalisation ("batch" or "group", with `options`) or none, ReLU, and 2x2 max pooling or none."""
    (convolve, unconvolve), (pool, unpool) = version["convolution"], version["pooling"]
    stack = [(("W1", "b1"), functools.partial(convolve, pad=pad), unconvolve)]
    if normalization:
        forward, backward = NORMS[normalization]
        stack.append((("gamma", "beta"), functools.partial(forward, **options), backward))
    stack.append(((), dense.relu_forward, dense.relu_backward))
    return stack + [((), functools.partial(pool, size=2), unpool)] * pooled


def network(net, train=False, version=FAST):
    """The layers of a `convnet.ConvNet`: a sandwich, then affine - ReLU - affine."""
    options = {"running": net.running, "train": train} if net.normalization == "batch" else {}
    affine = dense.affine_forward, dense.affine_backward
    return [*sandwich(net.normalization, version=version, **options), (("W2", "b2"), *affine),
            ((), dense.relu_forward, dense.relu_backward), (("W3", "b3"), *affine)]  # fmt: skip


def loss(net, x, y, reg=0.0, rng=None, version=FAST):
    """Softmax loss in training mode + reg / 2 times the sum of all squared weights -> value, gradients by name."""
    stack = network(net, True, version)
    # exercise: scores, softmax loss, gradients; then what the squares of W1, W2, W3 add to loss and gradients
    scores, caches = stack_forward(stack, net.params, x)
    value, d = losses.softmax_cross_entropy(scores, y)
    _, gradients = stack_backward(stack, d, caches)
    for name in ("W1", "W2", "W3"):
        value += 0.5 * reg * (net.params[name] ** 2).sum()
        gradients[name] += reg * net.params[name]
    # end exercise
    return value, gradients


def scores_of(net, x):
    """x [N,H,W,C] -> scores [N,10] in testing mode."""
    return stack_forward(network(net), net.params, x)[0]


# %% [markdown]
# ## The same in Keras
# There are three ways to say it. *Barebones*: operations on arrays, gradients from a tape; *Sequential*: a list of
# layers. With our weights both must give our scores, and the tape our gradients. The third, the *functional API*, calls
# layers on a symbolic picture and allows any graph, such as the shortcuts that the deeper network below needs.


# %%
def barebones(params, x):
    """Scores [N,10] of the network without normalisation; params: name -> tensor."""
    maps = ops.relu(ops.conv(x, params["W1"], padding="same") + params["b1"])
    flat = ops.reshape(ops.max_pool(maps, 2), (len(x), -1))
    return ops.relu(flat @ params["W2"] + params["b2"]) @ params["W3"] + params["b3"]


def sequential(shape, filters, hidden, classes):
    """The same for pictures of `shape` as a list of layers."""
    return keras.Sequential([keras.Input(shape), layers.Conv2D(filters, 7, padding="same", activation="relu"),
                             layers.MaxPooling2D(), layers.Flatten(), layers.Dense(hidden, activation="relu"),
                             layers.Dense(classes)])  # fmt: skip


# %% [markdown]
# ## Deeper, and tuned
# `convnets.quick_resnet` has three blocks, each a convolution with pooling and one with a shortcut around it (He et al.
# 2016). Batch normalisation allows a high learning rate, which rises for a fifth of the steps and then falls. Mirrored
# and shifted pictures, weight decay and softened targets keep it from learning by heart. The scores of a test picture,
# of its mirror image, and of both moved by a pixel either way are added.


# %%
def train_deep(run, parts, cfg, classes):
    """Train the network by SGD with Nesterov's momentum -> the model (pixels -> scores), and each epoch's logs."""
    x, one_hot, steps = parts.x_train, np.eye(classes, dtype=np.float32), len(parts.x_train) // cfg.deep_batch
    mean, variance = (f(x[:5_000].astype(np.float32), axis=(0, 1, 2)) for f in (np.mean, np.var))
    model = convnets.quick_resnet(x.shape[1:], classes, cfg.width, mean, variance)
    augment = [layers.RandomFlip("horizontal"), layers.RandomTranslation(1 / 16, 1 / 16, "reflect", "nearest")]
    trained, rising = keras.Sequential([keras.Input(x.shape[1:]), *augment, model]), cfg.epochs * steps // 5
    rate = keras.optimizers.schedules.CosineDecay(0.2 * cfg.peak, cfg.epochs * steps - rising, alpha=0.02,
                                                  warmup_target=cfg.peak, warmup_steps=rising)  # fmt: skip
    trained.compile(core.runtime.scaled(keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, weight_decay=5e-4)),
                    keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
                    metrics=["accuracy"], jit_compile=core.runtime.jit())  # fmt: skip
    resume, pair = run.checkpoint(trained, "deep"), (x, one_hot[parts.y_train])
    stream = core.data.batches(pair, cfg.deep_batch, seed=cfg.seed, first_epoch=resume.epoch, epochs=cfg.epochs)
    trained.fit(stream, steps_per_epoch=steps, initial_epoch=resume.epoch, epochs=cfg.epochs, verbose=0,
                validation_data=(parts.x_val, one_hot[parts.y_val]), callbacks=[resume, core.Progress()])  # fmt: skip
    return model, resume.history


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    if cfg.deep_batch > cfg.train:
        raise core.InputError(f"--deep-batch {cfg.deep_batch} is more than --train {cfg.train}: give no more than that")
    with core.run("a2_convnet", options, cfg) as run:
        data = core.data.load(cfg.data, stand_in=cfg.stand_in)
        parts, rng = core.data.three_way(data, cfg.train, cfg.validation, cfg.test), np.random.default_rng(cfg.seed)
        mean, spread = parts.x_train.mean(axis=0, dtype=np.float32), np.float32(parts.x_train[:1000].std())
        x, x_val, x_test = ((images - mean) / spread for images in (parts.x_train, parts.x_val, parts.x_test))
        create = functools.partial(convnet.create, shape=x.shape[1:], classes=len(data.labels), filters=cfg.filters)

        times, same = convnet.times(NAIVE, cfg.timed, cfg.seed), convnet.differences(NAIVE, NORMS, rng)
        gradients = checks.rows(convnet.check_layers(NAIVE, NORMS, rng) | convnet.check_networks(loss, network, rng)
                                | convnet.check_sandwiches(sandwich, stack_forward, stack_backward, rng))  # fmt: skip
        start = convnet.sanity(loss, scores_of, create(rng), x[:100], parts.y_train[:100])
        learn = functools.partial(convnet.learn, run, loss, scores_of, create, (x, parts.y_train), (x_val, parts.y_val))
        learned = {name: learn(name, cfg) for name in ("plain", *NORMS)}
        net, plain = learned["plain"]
        same += convnet.in_keras(loss, scores_of, net, barebones, sequential, x[:100], parts.y_train[:100])

        model, logs = train_deep(run, parts, cfg, len(data.labels))
        alone, together = convnets.scores_of_six(model, data.x_test)
        right, right_alone = (100 * (scores.argmax(axis=1) == data.y_test) for scores in (together, alone))
        tables = {"times": times, "the same answers": same, "gradient check": gradients}
        run.record |= {"data": data.provenance, "history": logs, "tables": tables}
        run.record["metrics"] = {
            "keras_test_accuracy": right[: cfg.test].mean(), "epoch_train_accuracy": plain.train_accuracy[-1],
            "conv_speed_up": times[2]["times faster"], "pool_speed_up": times[5]["times faster"],
            "keras_test_accuracy_10k": right.mean(), "keras_test_accuracy_10k_alone": right_alone.mean(),
            "keras_val_accuracy": 100 * logs["val_accuracy"][-1], "keras_parameters": model.count_params(),
            "test_accuracy": accuracy(scores_of, net, x_test, parts.y_test),
            **{f"epoch_train_accuracy_{name}_norm": learned[name][1].train_accuracy[-1] for name in NORMS},
            "gradient_check_worst": max(row["relative"] for row in gradients),
            "same_answers_worst": max(row["difference"] for row in same if "float32" not in row["of"]),
        } | start  # fmt: skip
        convnet.draw(run, learned, conv_naive_forward, data.x_train[:8], times, gradients, logs)
    return run.record


if __name__ == "__main__":
    core.cli(main)
