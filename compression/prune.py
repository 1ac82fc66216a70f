"""Pruning single weights by magnitude: schedules, masks that hold through training, the N:M pattern, sensitivity.

Sources: Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks" (the smallest weights
go, the rest is trained on); Zhu and Gupta 2017, "To prune, or not to prune" (gradually, eq. 1); Mishra et al. 2021,
"Accelerating Sparse Deep Neural Networks" (2:4).  `structured.py` removes whole filters, `lottery.py` looks for the
subnetwork that could have been trained alone.

A pruned network has the shape it had: its zeros make its compressed file smaller, and its arithmetic faster only where
the hardware or the kernels skip them.
"""

import contextlib
import dataclasses

import keras
import numpy as np
from keras import layers, ops

from compression.training import Training, fit
from course.core import InputError

# Weights with two axes and more that are not pruned: biases of attention heads, slopes of PReLU, and tables of which a
# row is read at a time, so that zeros save no arithmetic
DENSE = {"bias", "alpha", "embeddings", "depthwise_kernel"}
DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)  # few weights, each a channel's whole window


@dataclasses.dataclass
class Pruning:
    """Magnitude pruning while training on."""

    sparsity: float = 0.8  # share of the prunable weights that are zero in the end
    scope: str = "layer"  # layer: that share of every layer; global: the smallest of all layers together
    schedule: str = "polynomial"  # polynomial: more and more (Zhu and Gupta); constant: all of it at `begin`
    initial: float = 0.0  # share that goes at `begin`, of the polynomial schedule
    begin: float = 0.0  # share of the training's steps before the first weights go
    end: float = 0.6  # share of the steps after which no more go; the rest is for recovering
    updates: int = 40  # times that more weights go, evenly between `begin` and `end`
    keep: tuple[str, ...] = ()  # names of layers left as they are
    training: Training = dataclasses.field(default_factory=Training)


@dataclasses.dataclass
class Pattern:
    """N:M sparsity: `n` weights of each `m` neighbours along the input channels stay, the others are zero."""

    n: int = 2
    m: int = 4
    keep: tuple[str, ...] = ()  # names of layers left as they are
    training: Training = dataclasses.field(default_factory=Training)


# --- how much, and when ----------------------------------------------------------------------------------------------


def polynomial(step, final, *, initial=0.0, begin=0, end, power=3):
    """Sparsity [...] at `step` [...]: s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 (Zhu and Gupta 2017, eq. 1).

    begin: t_0, before which it is 0; end: t_0 + n dt, from which it is `final`.  Fast while there are many weights to
    spare, slow at the end.
    """
    step = np.asarray(step, float)
    left = 1 - np.clip((step - begin) / max(end - begin, 1e-9), 0, 1)
    return np.where(step < begin, 0.0, final + (initial - final) * left**power)


def constant(step, final, *, begin=0):
    """Sparsity [...] at `step` [...]: 0 before `begin`, `final` from there on."""
    return np.where(np.asarray(step) < begin, 0.0, final)


def milestones(settings, steps):
    """The moments of a training of `steps` steps when weights go: (steps done [T], sparsity from then on [T])."""
    for name in ("sparsity", "initial", "begin", "end"):
        if not 0 <= getattr(settings, name) <= 1:
            raise InputError(f"{name} is {getattr(settings, name)}: give a share from 0 to 1")
    if settings.begin > settings.end or settings.initial > settings.sparsity or settings.updates < 1:
        raise InputError("pruning needs begin <= end, initial <= sparsity and updates >= 1")
    begin, end = (round(share * steps) for share in (settings.begin, settings.end))
    if settings.schedule == "constant":
        return np.array([begin]), constant([begin], settings.sparsity, begin=begin)
    if settings.schedule != "polynomial":
        raise InputError(f"schedule {settings.schedule!r} is not known: choose polynomial or constant")
    when = np.unique(np.linspace(begin, end, settings.updates + 1).round().astype(int))
    return when, polynomial(when, settings.sparsity, initial=settings.initial, begin=begin, end=end)


# --- which weights ---------------------------------------------------------------------------------------------------


def prunable(model, keep=()):
    """Name -> variable of the weights that pruning may set to zero: kernels and other weights of two axes and more.

    Biases, normalisation and depthwise kernels stay whole: they are few, and much hangs on each of them.  keep: names
    of layers left out.  Raises `InputError` where nothing is left, or `keep` names a layer that is not there.
    """
    inner = list(model._flatten_layers(include_self=False))
    if missing := set(keep) - {layer.name for layer in inner}:
        raise InputError(f"the model has no layer {', '.join(sorted(missing))} to keep")
    whole = {id(weight) for layer in inner if layer.name in keep or isinstance(layer, DEPTHWISE)
             for weight in layer.weights}  # fmt: skip
    found = {}
    for weight in model.trainable_weights:
        if len(weight.shape) >= 2 and weight.name not in DENSE and id(weight) not in whole:
            found[weight.path if weight.path not in found else f"{weight.path}:{len(found)}"] = weight
    if not found:
        raise InputError(f"{model.name} has no weights to prune: no trainable kernel beside those kept")
    return found


def arrays(weights):
    """Name -> NumPy array, from name -> variable."""
    return {name: np.asarray(weight) for name, weight in weights.items()}


def smallest(scores, count):
    """True at the `count` smallest of `scores` [...], equal ones in their order in memory; bool [...]."""
    flat = np.zeros(scores.size, bool)
    flat[np.argsort(scores, axis=None, kind="stable")[:count]] = True
    return flat.reshape(scores.shape)


def magnitude(kernels, sparsity, scope="layer", masks=None):
    """The masks, True for a weight that stays, that remove the share `sparsity` of smallest magnitude.

    kernels: name -> array.  scope "layer": round(sparsity * size) weights of each; "global": as many of all together,
    which spares the layers whose weights are large and may empty one whose weights are small.  masks: from before;
    what they removed is removed again first, so that nothing comes back while the share rises.
    """
    if scope not in ("layer", "global"):
        raise InputError(f"scope {scope!r} is not known: choose layer or global")
    scores = {name: np.abs(kernel) for name, kernel in kernels.items()}
    if masks is not None:
        scores = {name: np.where(masks[name], score, -1) for name, score in scores.items()}
    if scope == "layer":
        return {name: ~smallest(score, round(sparsity * score.size)) for name, score in scores.items()}
    together = np.concatenate([score.ravel() for score in scores.values()])
    ends = np.cumsum([score.size for score in scores.values()])[:-1]
    parts = np.split(~smallest(together, round(sparsity * together.size)), ends)
    return {name: part.reshape(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def n_of_m(kernel, n=2, m=4):
    """The mask that keeps the `n` largest of each `m` neighbours along the input channels (Mishra et al. 2021,
    section 3): kernel [..., in, out] -> bool [..., in, out].  The number of channels must be a multiple of m.
    """
    if not 0 < n <= m or kernel.shape[-2] % m:
        raise InputError(f"{n}:{m} does not fit a kernel of shape {list(kernel.shape)}: its input channels are axis -2")
    groups = np.moveaxis(np.abs(kernel), -2, -1)  # [..., out, in]
    groups = groups.reshape(*groups.shape[:-1], -1, m)
    rank = np.argsort(np.argsort(-groups, axis=-1, kind="stable"), axis=-1, kind="stable")
    return np.moveaxis((rank < n).reshape(*groups.shape[:-2], -1), -1, -2)


def patterned(model, settings):
    """Name -> mask of `settings.n`:`settings.m` for every convolution and Dense layer whose input channels it fits."""
    kinds = (layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D)  # whose kernels are [..., in, out]
    fitting = {id(layer.kernel) for layer in model._flatten_layers(include_self=False)
               if isinstance(layer, kinds) and layer.kernel.shape[-2] % settings.m == 0}  # fmt: skip
    masks = {name: n_of_m(np.asarray(weight), settings.n, settings.m)
             for name, weight in prunable(model, settings.keep).items() if id(weight) in fitting}  # fmt: skip
    if not masks:
        raise InputError(f"{model.name} has no layer whose input channels are a multiple of {settings.m}")
    return masks


# --- keeping them zero -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(model, masks):
    """While the block runs, weights of `model` are zero where their mask is False, after every optimizer step.

    masks: name (as in `prunable`) -> bool array.  Yields name -> `keras.Variable` of bool: a mask assigned there holds
    from the next step on.  The mask is the weight's constraint, which the optimizer applies inside its own step, behind
    momentum and weight decay, compiled and replicated with it; so a model around `model` is compiled inside the block.
    An optimizer's own average of the weights (`use_ema`) knows no masks.  Raises `RuntimeError` at the end where a
    weight that was masked is not zero.
    """
    weights = prunable(model)
    with model.distribute_strategy.scope():
        variables = {name: keras.Variable(mask, dtype="bool", trainable=False, name=f"mask_{i}")
                     for i, (name, mask) in enumerate(masks.items())}  # fmt: skip
    before = {name: weights[name].constraint for name in masks}
    model.train_function = None  # one traced before would go on without the masks
    for name, mask in variables.items():
        weights[name].constraint = _Masked(mask, before[name])
        weights[name].assign(weights[name].constraint(weights[name]))
    try:
        yield variables
    finally:
        for name, constraint in before.items():
            weights[name]._constraint = constraint  # the setter takes no None
        model.train_function = None
    for name, mask in variables.items():
        if np.asarray(weights[name])[~np.asarray(mask)].any():
            raise RuntimeError(
                f"the mask of {name} was not held: its weights were set by something beside the optimizer, "
                "or by a step compiled before its mask"
            )


class _Masked(keras.constraints.Constraint):
    """w -> w where the mask is True, 0 elsewhere, even where w is not finite; after the weight's own constraint."""

    def __init__(self, mask, first=None):
        self.mask, self.first = mask, first

    def __call__(self, w):
        w = self.first(w) if self.first is not None else w
        return ops.where(self.mask, w, ops.zeros_like(w))


class Gradual(keras.callbacks.Callback):
    """Raises the sparsity of `weights` (name -> variable) as `settings` say, by the `masks` that `held` yields.

    `variables`, the masks, are saved and restored with a checkpoint of the training.
    """

    def __init__(self, weights, masks, settings):
        super().__init__()
        self.weights, self.masks, self.settings = weights, masks, settings
        self.variables = list(masks.values())

    def on_train_begin(self, logs=None):
        steps = self.params["steps"] * self.params["epochs"]
        self.when, self.sparsities = milestones(self.settings, steps)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self._reach(epoch * self.params["steps"])  # at the start of training, or where an interrupted one goes on

    def on_train_batch_end(self, batch, logs=None):
        self._reach(self.epoch * self.params["steps"] + batch + 1)

    def _reach(self, done):
        if done not in self.when:
            return
        sparsity = float(self.sparsities[np.searchsorted(self.when, done)])
        masks = magnitude(arrays(self.weights), sparsity, self.settings.scope, arrays(self.masks))
        for name, mask in masks.items():
            self.masks[name].assign(mask)
            self.weights[name].assign(self.weights[name].constraint(self.weights[name]))


# --- the techniques --------------------------------------------------------------------------------------------------


def copy_of(model):
    """The same network with the same weights, none of them shared."""
    with model.distribute_strategy.scope():
        copy = keras.models.clone_model(model)
    set_weights(copy, model.get_weights())
    return copy


def set_weights(module, values):
    """`set_weights` of a layer or model that reaches the constants, too, which a `Normalization` computes with: Keras
    makes them of its weights when it is built or loaded, and not again."""
    module.set_weights(values)
    for layer in module._flatten_layers():
        if isinstance(layer, layers.Normalization):
            layer.finalize_state()


def prune(model, data, settings, checkpoint=None):
    """Magnitude pruning while training on: the pruned network, of the same shape; `model` stays as it is.

    data: `compression.data.Data`; settings: `Pruning`; checkpoint: a folder from which the same call goes on.
    """
    milestones(settings, settings.training.epochs)  # what cannot be is said before anything is trained
    pruned = copy_of(model)
    weights = prunable(pruned, settings.keep)
    with held(pruned, magnitude(arrays(weights), 0.0, settings.scope)) as masks:
        gradual = Gradual(weights, masks, settings)
        fit(pruned, data, settings.training, [gradual], checkpoint=checkpoint, label="pruning")
    return pruned


def prune_pattern(model, data, settings, checkpoint=None):
    """N:M pruning: masks by magnitude, once, then training on under them (Mishra et al. 2021, section 4).

    Departs: the paper repeats the whole original training under the masks; here `settings.training`, a few epochs at a
    small rate by default, trains on.  settings: `Pattern`.  A layer whose input channels are not a multiple of m, such
    as the first one's three colours, stays dense.
    """
    pruned = copy_of(model)
    with held(pruned, patterned(pruned, settings)):
        fit(pruned, data, settings.training, checkpoint=checkpoint, label=f"{settings.n}:{settings.m}")
    return pruned


# --- reports ---------------------------------------------------------------------------------------------------------


def sparsity(model):
    """Share of zeros among the prunable weights."""
    kernels = arrays(prunable(model)).values()
    return float(sum((kernel == 0).sum() for kernel in kernels) / sum(kernel.size for kernel in kernels))


def accuracy(model, x, y, batch=500):
    """Share of `x` [N, ...] that the logits of `model` give the class `y` [N].

    Layer by layer: `predict` would first compile each of the many models that a table is made of.
    """
    found = [np.asarray(model(ops.convert_to_tensor(x[i : i + batch], "float32"), training=False)).argmax(axis=-1)
             for i in range(0, len(x), batch)]  # fmt: skip
    return float((np.concatenate(found) == y).mean())


def sensitivity(model, data, sparsities=(0.5, 0.7, 0.8, 0.9, 0.95), examples=2_000):
    """What each layer bears: validation accuracy when it alone is pruned, without training (Han et al. 2015, fig. 6).

    Returns a row a prunable weight and sparsity, {weight, size, sparsity, accuracy, drop}; `drop` is against the model
    as it is.  examples: of the validation part, its first ones.
    """
    copy = copy_of(model)
    x, y = data.x_val[:examples], data.y_val[:examples]
    whole, rows = accuracy(copy, x, y), []
    for name, weight in prunable(copy).items():
        kernel = np.asarray(weight).copy()
        for share in sparsities:
            weight.assign(kernel * magnitude({name: kernel}, share)[name])
            found = accuracy(copy, x, y)
            rows.append({"weight": name, "size": kernel.size, "sparsity": share, "accuracy": found,
                         "drop": whole - found})  # fmt: skip
        weight.assign(kernel)
    return rows
