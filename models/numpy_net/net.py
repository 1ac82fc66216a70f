"""A fully connected network of any depth, built from the forward and backward of its layers."""

import dataclasses
import itertools
import zipfile

import numpy as np

from course.core import InputError, files
from models.numpy_net import initialisers, layers


@dataclasses.dataclass
class Net:
    """Affine layers 1..L with an activation after each but the last."""

    params: dict[str, np.ndarray]  # "W1" [D0, D1], "b1" [D1], ..., "WL" [D(L-1), DL], "bL" [DL]
    activation: str = "relu"  # a key of layers.ACTIVATIONS

    @property
    def depth(self):
        """Number L of affine layers."""
        return len(self.params) // 2


def create(rng, sizes, activation="relu", *, output_scale=1.0, dtype=np.float32):
    """Net with layer widths `sizes` (D0, ..., DL): He weights for the ReLU family, else Xavier; biases 0.

    output_scale: factor on the last layer's weights.  A small one makes every first score nearly 0, so that the first
    softmax cross-entropy is log C, that of a network which does not know yet.  Raises `InputError` for an unknown
    activation or a width below 1.
    """
    if activation not in layers.ACTIVATIONS:
        raise InputError(f"no activation is called {activation!r}: choose one of {', '.join(layers.ACTIVATIONS)}")
    if len(sizes) < 2 or min(sizes) < 1:
        raise InputError(
            f"layer widths {tuple(sizes)} cannot be used: give an input and an output width, all 1 or more"
        )
    draw = initialisers.he if activation in ("relu", "leaky_relu") else initialisers.xavier
    params = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes), start=1):
        params[f"W{layer}"] = draw(rng, inputs, outputs, dtype)
        params[f"b{layer}"] = np.zeros(outputs, dtype)
    params[f"W{len(sizes) - 1}"] *= dtype(output_scale)
    return Net(params, activation)


def cast(net, dtype):
    """A copy of the network with parameters of `dtype`."""
    return Net({name: array.astype(dtype) for name, array in net.params.items()}, net.activation)


def forward(net, x):
    """x [N, D0] -> scores [N, DL], caches (one a layer, for `backward`)."""
    activate, _ = layers.ACTIVATIONS[net.activation]
    caches = []
    for layer in range(1, net.depth + 1):
        x, affine = layers.affine_forward(x, net.params[f"W{layer}"], net.params[f"b{layer}"])
        active = None
        if layer < net.depth:
            x, active = activate(x)
        caches.append((affine, active))
    return x, caches


def backward(net, d_scores, caches):
    """dL/dscores [N, DL] -> gradients of `net.params`, by name."""
    _, undo = layers.ACTIVATIONS[net.activation]
    gradients, d = {}, d_scores
    for layer in range(net.depth, 0, -1):
        affine, active = caches[layer - 1]
        if layer < net.depth:
            d = undo(d, active)
        d, gradients[f"W{layer}"], gradients[f"b{layer}"] = layers.affine_backward(d, affine)
    return gradients


def save(net, path):
    """Write the network as one .npz file, whole or not at all."""
    with files.atomic_path(path) as temporary:
        np.savez(temporary, activation=net.activation, **net.params)


def load(path):
    """The network that `save` wrote.  Raises `InputError` where the file is missing, damaged or holds another thing."""
    try:
        with np.load(path, allow_pickle=False) as content:
            params = {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as a saved network ({error}): save it again") from error
    activation = str(params.pop("activation", ""))
    depth = len(params) // 2
    names = [f"{kind}{layer}" for layer in range(1, depth + 1) for kind in "Wb"]
    if activation not in layers.ACTIVATIONS or not depth or sorted(params) != sorted(names):
        raise InputError(f"{path} holds no fully connected network: it needs `activation` and W1, b1, W2, b2, ...")
    widths = [params["W1"].shape[:1], *(params[f"b{layer}"].shape for layer in range(1, depth + 1))]
    if any(params[f"W{layer}"].shape != widths[layer - 1] + widths[layer] for layer in range(1, depth + 1)):
        raise InputError(f"{path} holds layers that do not fit each other: save it again")
    return Net({name: params[name] for name in names}, activation)
