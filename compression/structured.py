"""Structured pruning: whole filters are removed, and a narrower network is built that computes the same without them.

Sources: Li et al. 2017, "Pruning Filters for Efficient ConvNets" (the L1 norm of a filter, section 3.1; shortcuts tie
the filters of several layers together, section 3.3); Liu et al. 2017, "Learning Efficient Convolutional Networks
through Network Slimming" (the scale of batch normalisation, section 3).

Which channels belong together is in `channels.py`.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np

from compression.channels import SEPARABLE, TRANSPOSED, Channels, rebuild, width_of
from compression.prune import accuracy
from compression.training import Training, fit
from course.core import InputError
from models import costs


@dataclasses.dataclass
class Structured:
    """Removal of filters, and training on."""

    fraction: float = 0.5  # share of the filters (and units of hidden Dense layers) removed
    by: str = "l1"  # l1: sum of a filter's magnitudes; scale: magnitude of batch normalisation's scale
    scope: str = "layer"  # layer: that share of every layer; global: the lowest of all layers together
    multiple: int = 8  # what stays of a layer is a multiple of this: kernels work on so many channels at a time
    rounds: int = 1  # in so many steps of equal ratio, each followed by the whole training
    keep: tuple[str, ...] = ()  # names of layers whose filters all stay
    training: Training = dataclasses.field(default_factory=Training)


# --- which filters go ------------------------------------------------------------------------------------------------


def scores(channels, by="l1", relative=False):
    """Importance [numbers] of channels, at their root; NaN where nothing gives it one.

    l1: sum |w| over a filter (Li et al. 2017, section 3.1).  scale: |gamma| of batch normalisation (Liu et al. 2017,
    section 3); filters that none follows have no score.  Of channels that a shortcut ties, the sum.  relative: each
    layer's are divided by their root mean square, so that filters of large and small kernels can be compared.
    """
    if by not in ("l1", "scale"):
        raise InputError(f"by {by!r} is not known: choose l1 or scale")
    total = np.full(len(channels.root), np.nan)
    if by == "scale":
        found = [(numbers, np.abs(np.asarray(layer.gamma))) for layer, numbers in channels.norms]
    else:
        found = [(numbers, _norms(layer)) for layer, numbers in channels.made.items()]
    for numbers, values in found:
        roots = channels.root[numbers]
        total[roots] = np.nan_to_num(total[roots])
        np.add.at(total, roots, values / np.sqrt(np.mean(np.square(values))) if relative else values)
    return total


def _norms(layer):
    """Sum of the magnitudes [filters] of each filter of a layer."""
    kernel = np.abs(np.asarray(layer.pointwise_kernel if isinstance(layer, SEPARABLE) else layer.kernel))
    out = kernel.ndim - (2 if isinstance(layer, TRANSPOSED) else 1)
    return kernel.sum(axis=tuple(axis for axis in range(kernel.ndim) if axis != out))


def choose(channels, settings):
    """Which channels stay, bool [numbers]: those of the highest scores, of each group the share that `settings` say.

    Every layer keeps at least one.  Raises `InputError` where there is nothing to choose from.
    """
    if not 0 <= settings.fraction < 1 or settings.multiple < 1:
        raise InputError("filter pruning needs a fraction from 0 to below 1, and a multiple of 1 or more")
    if settings.scope not in ("layer", "global"):
        raise InputError(f"scope {settings.scope!r} is not known: choose layer or global")
    together = settings.scope == "global"
    score = scores(channels, settings.by, relative=together and settings.by == "l1")
    groups = {name: roots[~np.isnan(score[roots])] for name, roots in channels.groups().items()}
    everything = np.concatenate([np.zeros(0, int), *groups.values()])
    if not len(everything):
        raise InputError(f"no filter can be removed: none is free, or none has a score by {settings.by}")
    lowest = np.argsort(score[everything], kind="stable")[: round(settings.fraction * len(everything))]
    gone = np.zeros(len(score), bool)
    for roots in groups.values():
        going = np.isin(roots, everything[lowest]).sum() if together else round(settings.fraction * len(roots))
        stay = _rounded(len(roots) - going, len(roots), settings.multiple)
        gone[roots[np.argsort(score[roots], kind="stable")[: len(roots) - stay]]] = True
    for made in channels.made.values():  # a layer may be the smaller part of its group
        if gone[channels.root[made]].all():
            gone[channels.root[made][np.argmax(score[channels.root[made]])]] = False
    return ~gone[channels.root]


def _rounded(count, most, multiple):
    """`count` to the nearest multiple, at least one of it and at most `most`."""
    return min(most, multiple * max(1, math.floor(count / multiple + 0.5)))


# --- the technique ---------------------------------------------------------------------------------------------------


def shrink(model, settings):
    """`model` without the filters that `settings` (`Structured`) remove, not trained on."""
    channels = Channels(model, settings.keep)
    return rebuild(model, channels, choose(channels, settings))


def prune_filters(model, data, settings, checkpoint=None):
    """Removal of filters and training on: a narrower network; `model` stays as it is.

    data: `compression.data.Data`; settings: `Structured`; checkpoint: a folder from which the same call goes on.
    """
    if settings.rounds < 1:
        raise InputError(f"rounds is {settings.rounds}: give 1 or more")
    each = dataclasses.replace(settings, fraction=1 - (1 - settings.fraction) ** (1 / settings.rounds))
    for turn in range(settings.rounds):
        model = shrink(model, each)
        folder = Path(checkpoint) / f"round-{turn}" if checkpoint else None
        fit(model, data, settings.training, checkpoint=folder, label="filters")
    return model


# --- reports ---------------------------------------------------------------------------------------------------------


def compare(before, after):
    """(rows {layer, filters, left} of the layers with filters, {params, flops, ... -> (before, after)})."""
    names = {layer.name: layer for layer in after._flatten_layers(include_self=False)}
    rows = [{"layer": layer.name, "filters": len(made), "left": width_of(names[layer.name])}
            for layer, made in Channels(before).made.items()]  # fmt: skip
    old, new = costs.count(before), costs.count(after)
    return rows, {key: (old[key], new[key]) for key in old}


def sensitivity(model, data, fractions=(0.25, 0.5, 0.75), by="l1", examples=2_000):
    """What each layer bears: validation accuracy when filters of it alone are removed, without training on (Li et al.
    2017, section 3.2).

    Returns a row a group of layers and fraction, {layers, filters, left, accuracy, drop, params, flops}; `drop` is
    against the model as it is.  examples: of the validation part, its first ones.
    """
    channels, x, y = Channels(model), data.x_val[:examples], data.y_val[:examples]
    score, whole, rows = scores(channels, by), accuracy(model, x, y), []
    for names, roots in channels.groups().items():
        for fraction in fractions:
            order = roots[np.argsort(score[roots], kind="stable")]
            gone = order[: min(round(fraction * len(order)), len(order) - 1)]
            smaller = rebuild(model, channels, ~np.isin(channels.root, gone))
            found = accuracy(smaller, x, y)
            rows.append({"layers": names, "filters": len(order), "left": len(order) - len(gone), "accuracy": found,
                         "drop": whole - found, "params": smaller.count_params(),
                         "flops": costs.flops(smaller)})  # fmt: skip
    return rows
