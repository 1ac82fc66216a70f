"""The benchmark's arms: each a chain of techniques, one after another, and the kind of file it ends in.

A technique is a function (model, data, cfg, checkpoint) -> model (`legacy`'s: -> `legacy.Made`); `cfg` is the
benchmark's, from which the technique's own settings are filled, `checkpoint` a folder from which a killed one goes on.
"""

import dataclasses

import numpy as np

from compression import cluster, legacy, prune, quantize, structured
from compression.distill import Distillation, distill
from compression.training import Training, fit
from course.core.errors import InputError

SAVED = "saved"  # the kind of arms that LiteRT cannot hold


@dataclasses.dataclass(frozen=True)
class Arm:
    """Techniques in their order, by name, and the kind of file: one of `lite.KINDS`, or `SAVED`."""

    steps: tuple[str, ...] = ()
    kind: str = "float"


# --- techniques -------------------------------------------------------------------------------------------------------


def trained_on(cfg):
    """Training on: few epochs, a small rate."""
    return Training(epochs=cfg.epochs, batch=cfg.batch, lr=cfg.lr, flip=cfg.flip, shift=cfg.shift, seed=cfg.seed)


def _train(model, data, cfg, checkpoint):
    """Nothing but the epochs that the other techniques get as well: what they are to be held against."""
    copy = prune.copy_of(model)
    fit(copy, data, trained_on(cfg), checkpoint=checkpoint, label="training on")
    return copy


def _prune(**how):
    def technique(model, data, cfg, checkpoint):
        settings = prune.Pruning(**{"sparsity": cfg.sparsity, "scope": "global", "training": trained_on(cfg)} | how)
        return prune.prune(model, data, settings, checkpoint)

    return technique


def _pattern(model, data, cfg, checkpoint):
    return prune.prune_pattern(model, data, prune.Pattern(training=trained_on(cfg)), checkpoint)


def _filters(model, data, cfg, checkpoint):
    settings = structured.Structured(fraction=cfg.filters, training=trained_on(cfg))
    if structured.shrink(model, settings).count_params() == model.count_params():
        raise InputError(f"no layer has filters to spare: what stays of one is a multiple of {settings.multiple}")
    return structured.prune_filters(model, data, settings, checkpoint)


def _cluster(model, data, cfg, checkpoint):
    settings = cluster.Clustering(clusters=cfg.clusters, training=trained_on(cfg))
    return cluster.cluster(model, data, settings, checkpoint)


def _aware(**kept):
    def technique(model, data, cfg, checkpoint):
        training = dataclasses.replace(trained_on(cfg), lr=cfg.aware_lr, weight_decay=0.0)
        settings = quantize.Quantisation(pixels=data.x_train.dtype == np.uint8, training=training, **kept)
        return quantize.quantise(model, data, settings, checkpoint)

    return technique


def _weight_only(mode):
    return lambda model, data, cfg, checkpoint: quantize.weight_only(model, data, quantize.WeightOnly(mode=mode))


def _student(hard):
    def technique(model, data, cfg, checkpoint):
        recipe = {"epochs": cfg.student_epochs, "lr": cfg.student_lr, "warm_up": 0.2}  # from nothing, not trained on
        training = dataclasses.replace(trained_on(cfg), **recipe)
        settings = Distillation(cfg.width, cfg.taper, cfg.temperature, hard, seed=cfg.seed, training=training)
        return distill(model, data, settings, checkpoint=checkpoint)

    return technique


def _toolkit(technique, **kept):
    def run(model, data, cfg, checkpoint):
        training = trained_on(cfg)
        if technique == "quantise":
            training = dataclasses.replace(training, lr=cfg.aware_lr, weight_decay=0.0)
        pixels = data.x_train.dtype == np.uint8
        settings = legacy.Legacy(technique, cfg.sparsity, cfg.clusters, training=training, pixels=pixels, **kept)
        return legacy.optimise(model, data, settings)

    return run


TECHNIQUES = {
    "train": _train,
    "fold": lambda model, data, cfg, checkpoint: quantize.fold(model),
    "prune": _prune(),  # the smallest of all layers together, ever more of them
    "prune by layer": _prune(scope="layer"),
    "prune at once": _prune(schedule="constant"),
    "2:4": _pattern,
    "filters": _filters,
    "cluster": _cluster,
    "aware": _aware(),  # of quantisation, while training
    "aware, zeros kept": _aware(keep_zeros=True),
    "aware, clusters kept": _aware(keep_zeros=True, keep_clusters=True),
    "distil": _student(hard=0.1),
    "alone": _student(hard=1.0),  # the student without its teacher: what distillation is held against
    "tfmot prune": _toolkit("prune"),
    "tfmot cluster": _toolkit("cluster"),
    "tfmot cluster, zeros kept": _toolkit("cluster", keep_zeros=True),
    "tfmot aware": _toolkit("quantise"),
    "tfmot aware, all kept": _toolkit("quantise", keep_zeros=True, keep_clusters=True),
    "weights int8": _weight_only("int8"),
    "weights int4": _weight_only("int4"),
}

# --- arms -------------------------------------------------------------------------------------------------------------

POST_TRAINING = {
    "float": Arm(),
    "float16": Arm(kind="float16"),
    "dynamic": Arm(kind="dynamic"),
    "int8": Arm(kind="int8"),
}
ARMS = POST_TRAINING | {
    "trained on": Arm(("train",)),
    "folded": Arm(("fold",)),  # normalisation in the weights, which LiteRT does only right behind a convolution
    "folded int8": Arm(("fold",), "int8"),  # what training that is aware of the rounding is to be held against
    "aware int8": Arm(("aware",), "int8"),
    "pruned": Arm(("prune",)),
    "pruned at once": Arm(("prune at once",)),
    "pruned by layer int8": Arm(("prune by layer",), "int8"),  # as the toolkit prunes
    "pruned int8": Arm(("prune",), "int8"),
    "pruned aware int8": Arm(("prune", "aware, zeros kept"), "int8"),
    "2:4": Arm(("2:4",)),
    "2:4 int8": Arm(("2:4",), "int8"),
    "filters": Arm(("filters",)),
    "filters int8": Arm(("filters",), "int8"),
    "clustered": Arm(("cluster",)),
    "clustered int8": Arm(("cluster",), "int8"),
    "pruned clustered": Arm(("prune", "cluster")),
    "pruned clustered int8": Arm(("prune", "cluster"), "int8"),
    "pruned clustered aware int8": Arm(("prune", "cluster", "aware, clusters kept"), "int8"),
    "student": Arm(("distil",)),
    "student int8": Arm(("distil",), "int8"),
    "student pruned int8": Arm(("distil", "prune"), "int8"),
    "student alone": Arm(("alone",)),
    # tensorflow-model-optimization's own, on a tf_keras copy in a process of its own
    "tfmot pruned int8": Arm(("tfmot prune",), "int8"),
    "tfmot clustered int8": Arm(("tfmot cluster",), "int8"),
    "tfmot aware int8": Arm(("tfmot aware",), "int8"),
    "tfmot combined int8": Arm(("tfmot prune", "tfmot cluster, zeros kept", "tfmot aware, all kept"), "int8"),
    "SavedModel": Arm(kind=SAVED),  # what the two that follow are held against
    "weights int8": Arm(("weights int8",), SAVED),
    "weights int4": Arm(("weights int4",), SAVED),
}
