"""A fully connected network of any depth, built from the forward and backward of its layers."""

import dataclasses
import functools
import itertools
import zipfile

import numpy as np

from course.core import InputError, files
from models.numpy_net import dropout, initialisers, layers, losses, norm

NORMALIZATIONS = (None, "batch", "layer")


@dataclasses.dataclass
class Net:
    """Affine layers 1..L; after each but the last: normalization (optional), activation, dropout (optional)."""

    # "W1" [D0, D1], "b1" [D1], ..., "WL" [D(L-1), DL], "bL" [DL]; with normalization also "gamma1", "beta1" [D1], ...
    params: dict[str, np.ndarray]
    activation: str = "relu"  # a key of layers.ACTIVATIONS
    normalization: str | None = None  # None, "batch" or "layer"
    keep: float = 1.0  # probability that dropout keeps a hidden unit in training
    # batch normalization's "mean1", "var1" [D1], ...: followed in training, used in testing
    running: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def depth(self):
        """Number L of affine layers."""
        return sum(name.startswith("W") for name in self.params)


def create(rng, sizes, activation="relu", *, normalization=None, keep=1.0, weight_scale=None, output_scale=1.0,
           dtype=np.float32):  # fmt: skip
    """Net with layer widths `sizes` (D0, ..., DL): He weights for the ReLU family, else Xavier; biases 0.

    weight_scale: standard deviation of all weights, in place of He's and Xavier's.
    output_scale: factor on the last layer's weights.  A small one makes every first score nearly 0, so that the first
    softmax cross-entropy is log C, that of a network which does not know yet.  Raises `InputError` for an unknown
    activation or normalization, a width below 1, or a `keep` that is no probability.
    """
    if activation not in layers.ACTIVATIONS:
        raise InputError(f"no activation is called {activation!r}: choose one of {', '.join(layers.ACTIVATIONS)}")
    if normalization not in NORMALIZATIONS:
        raise InputError(f"no normalization is called {normalization!r}: choose one of None, batch, layer")
    if not 0 < keep <= 1:
        raise InputError(f"keep = {keep} is no probability of keeping a unit: give a number above 0 and up to 1")
    if len(sizes) < 2 or min(sizes) < 1:
        raise InputError(
            f"layer widths {tuple(sizes)} cannot be used: give an input and an output width, all 1 or more"
        )
    draw = initialisers.he if activation in ("relu", "leaky_relu") else initialisers.xavier
    if weight_scale is not None:
        draw = functools.partial(initialisers.normal, scale=weight_scale)
    params, running = {}, {}
    for name, shape in shapes(sizes, normalization).items():
        if name.startswith("W"):
            params[name] = draw(rng, *shape, dtype=dtype)
        elif name.startswith(("mean", "var")):
            running[name] = np.full(shape, name.startswith("var"), dtype)
        else:
            params[name] = np.full(shape, name.startswith("gamma"), dtype)
    params[f"W{len(sizes) - 1}"] *= dtype(output_scale)
    return Net(params, activation, normalization, keep, running)


def shapes(sizes, normalization=None):
    """Name -> shape of all arrays, running statistics included, of a Net with layer widths `sizes`."""
    found = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes), start=1):
        found |= {f"W{layer}": (inputs, outputs), f"b{layer}": (outputs,)}
        if layer < len(sizes) - 1:
            kinds = {None: (), "layer": ("gamma", "beta"), "batch": ("gamma", "beta", "mean", "var")}[normalization]
            found |= {f"{kind}{layer}": (outputs,) for kind in kinds}
    return found


def cast(net, dtype):
    """A copy of the network with parameters (and running statistics) of `dtype`."""
    params, running = ({name: array.astype(dtype) for name, array in arrays.items()}
                       for arrays in (net.params, net.running))  # fmt: skip
    return dataclasses.replace(net, params=params, running=running)


# --- forward and backward ---------------------------------------------------------------------------------------------


def forward(net, x, *, train=False, rng=None):
    """x [N, D0] (or pictures [N, H, W, C] with H W C = D0) -> scores [N, DL], caches (one a layer, for `backward`).

    train: normalise by the batch (and let the running statistics follow), and drop units, by masks drawn from `rng`.
    A cache is (affine's, those of what follows it); the affine's begins with the layer's input.
    """
    activate, _ = layers.ACTIVATIONS[net.activation]
    caches = []
    for layer in range(1, net.depth + 1):
        x, affine = layers.affine_forward(x, net.params[f"W{layer}"], net.params[f"b{layer}"])
        normal = active = mask = None
        if layer < net.depth:
            x, normal = _normalize(net, layer, x, train)
            x, active = activate(x)
            if net.keep < 1:
                x, mask = dropout.dropout_forward(x, net.keep, rng, train=train)
        caches.append((affine, (normal, active, mask)))
    return x, caches


def _normalize(net, layer, x, train):
    if net.normalization is None:
        return x, None
    gamma, beta = net.params[f"gamma{layer}"], net.params[f"beta{layer}"]
    if net.normalization == "layer":
        return norm.layer_norm_forward(x, gamma, beta)
    running = {name: net.running[f"{name}{layer}"] for name in ("mean", "var")}  # the arrays change in place
    return norm.batch_norm_forward(x, gamma, beta, running, train=train)


def backward(net, d_scores, caches):
    """dL/dscores [N, DL] -> gradients of `net.params`, by name."""
    _, undo = layers.ACTIVATIONS[net.activation]
    undo_normal = {"batch": norm.batch_norm_backward, "layer": norm.layer_norm_backward}.get(net.normalization)
    gradients, d = {}, d_scores
    for layer in range(net.depth, 0, -1):
        affine, (normal, active, mask) = caches[layer - 1]
        if layer < net.depth:
            d = undo(dropout.dropout_backward(d, mask), active)
            if undo_normal:
                d, gradients[f"gamma{layer}"], gradients[f"beta{layer}"] = undo_normal(d, normal)
        d, gradients[f"W{layer}"], gradients[f"b{layer}"] = layers.affine_backward(d, affine)
    return gradients


def loss(net, x, y, reg=0.0, *, rng=None, train=True, of=losses.softmax_cross_entropy):
    """of(scores, y) + reg/2 sum of all squared weights W (no biases, no gamma, no beta) -> value, gradients by name.

    rng: draws the dropout masks; a network with dropout needs it in training.
    """
    scores, caches = forward(net, x, train=train, rng=rng)
    value, d_scores = of(scores, y)
    gradients = backward(net, d_scores, caches)
    if reg:
        for name in (name for name in net.params if name.startswith("W")):
            value += 0.5 * reg * np.square(net.params[name]).sum()
            gradients[name] += reg * net.params[name]
    return value, gradients


def scores(net, x):
    """The scores [N, DL] of a trained network: running statistics, nothing dropped."""
    return forward(net, x)[0]


# --- on disk ----------------------------------------------------------------------------------------------------------


def save(net, path):
    """Write the network as one .npz file, whole or not at all."""
    with files.atomic_path(path) as temporary:
        settings = {"activation": net.activation, "normalization": net.normalization or "", "keep": net.keep}
        np.savez(temporary, **settings, **net.params, **net.running)


def load(path):
    """The network that `save` wrote.  Raises `InputError` where the file is missing, damaged or holds another thing."""
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as a saved network ({error}): save it again") from error
    activation, normalization = (str(arrays.pop(name, "")) for name in ("activation", "normalization"))
    normalization, keep = normalization or None, float(arrays.pop("keep", 1))
    weights = [arrays.get(f"W{layer}") for layer in range(1, 1 + sum(name.startswith("W") for name in arrays))]
    known = activation in layers.ACTIVATIONS and normalization in NORMALIZATIONS and weights
    if not known or any(weight is None or weight.ndim != 2 for weight in weights):
        raise InputError(f"{path} holds no fully connected network: it needs `activation` and W1, b1, W2, b2, ...")
    expected = shapes([len(weights[0]), *(weight.shape[1] for weight in weights)], normalization)
    if {name: array.shape for name, array in arrays.items()} != expected:
        raise InputError(f"{path} holds layers that do not fit each other: save it again")
    running = {name: arrays.pop(name) for name in expected if name.startswith(("mean", "var"))}
    return Net({name: arrays[name] for name in expected if name in arrays}, activation, normalization, keep, running)
