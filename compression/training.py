"""The training loop that pruning, clustering, quantisation-aware training and distillation share."""

import dataclasses
from pathlib import Path

import keras
from keras import layers, ops

from course import core


@dataclasses.dataclass
class Training:
    """How a model is trained on, or anew; the defaults are for training on: few epochs at a small rate."""

    epochs: int = 5  # passes over the training part
    batch: int = 128  # examples a step
    optimizer: str = "sgd"  # sgd (Nesterov's momentum) or adam
    lr: float = 0.01  # highest learning rate; falls to 0 as a half cosine
    warm_up: float = 0.05  # share of the steps in which the rate rises to it, linearly
    momentum: float = 0.9  # of sgd
    weight_decay: float = 5e-4  # each step shrinks the weights by rate * this, beside the gradient
    label_smoothing: float = 0.0  # share of the target that goes to all classes alike
    flip: bool = False  # mirror pictures; not where left and right differ (digits, letters)
    shift: float = 0.0  # move pictures by up to this share of their sides
    seed: int = 0  # of the order of the batches and of the augmentation


def cross_entropy(smoothing=0.0):
    """A Keras loss: labels int [B] or [B, 1], logits [B, classes] -> [B], in float32."""

    def loss(labels, logits):
        target = ops.one_hot(ops.reshape(ops.cast(labels, "int32"), (-1,)), logits.shape[-1], dtype="float32")
        target = (1 - smoothing) * target + smoothing / logits.shape[-1]
        return -ops.sum(target * ops.log_softmax(ops.cast(logits, "float32"), axis=-1), axis=-1)

    return loss


def optimizer(settings, steps):
    """The optimizer of `settings` for `steps` steps, rate and warm-up included."""
    if not 0 <= settings.warm_up < 1:
        raise core.InputError(f"warm_up is {settings.warm_up}: give a share of the steps, from 0 to below 1")
    warm = round(settings.warm_up * steps)
    rising = {"warmup_target": settings.lr, "warmup_steps": warm} if warm else {}
    rate = keras.optimizers.schedules.CosineDecay(0.0 if warm else settings.lr, max(1, steps - warm), **rising)
    if settings.optimizer == "sgd":
        return keras.optimizers.SGD(
            rate, momentum=settings.momentum, nesterov=settings.momentum > 0, weight_decay=settings.weight_decay
        )
    if settings.optimizer == "adam":
        return keras.optimizers.AdamW(rate, weight_decay=settings.weight_decay)
    raise core.InputError(f"optimizer {settings.optimizer!r} is not known: choose sgd or adam")


def augmentation(settings, shape):
    """Layers that mirror and move pictures of `shape` (H, W, C) while training; none for anything but pictures."""
    if len(shape) != 3:
        return []
    drawn = {"seed": settings.seed, "dtype": "float32"}  # at any precision
    mirror = [layers.RandomFlip("horizontal", **drawn)] * settings.flip
    whole = {"fill_mode": "reflect", "interpolation": "nearest"}  # pixels stay as sharp as they are in use
    move = [layers.RandomTranslation(settings.shift, settings.shift, **whole, **drawn)]
    return mirror + move * (settings.shift > 0)


def fit(model, data, settings, callbacks=(), loss=None, checkpoint=None, *, metrics=("accuracy",), label=""):
    """Train `model` in place on `data` (`compression.data.Data`); returns the history of all epochs: name -> [epochs].

    loss: a Keras loss of labels int [B] and the model's outputs; default: cross-entropy of logits.  checkpoint: a
    folder; the same call goes on from what is saved there after each epoch.  A callback with `.variables` (masks) is
    saved and restored with it; the augmentation stands around the model, so that a callback's `self.model` is not
    `model`: one that changes weights keeps `model` itself.  label: stands before each line of progress.

    The order of the batches and the augmentation come from `settings.seed`; a strategy or precision policy is that
    under which `model` was built.
    """
    batch = min(settings.batch, len(data.x_train))
    steps = len(data.x_train) // batch
    shape = model.input_shape[1:]
    with model.distribute_strategy.scope():
        whole = keras.Sequential([keras.Input(shape), *augmentation(settings, shape), model])
        whole.compile(
            optimizer(settings, steps * settings.epochs),
            loss or cross_entropy(settings.label_smoothing),
            metrics=list(metrics),
            jit_compile=core.runtime.jit(),
        )
        held = {f"callback{i}": callback for i, callback in enumerate(callbacks) if hasattr(callback, "variables")}
        resume = core.Checkpoint(Path(checkpoint), whole, **held) if checkpoint else None
    first = resume.epoch if resume else 0
    stream = core.data.batches(
        (data.x_train, data.y_train), batch, seed=settings.seed, first_epoch=first, epochs=settings.epochs
    )
    kept = keras.callbacks.History() if resume is None else resume
    whole.fit(stream, steps_per_epoch=steps, initial_epoch=first, epochs=settings.epochs, verbose=0,
              validation_data=(data.x_val, data.y_val), validation_batch_size=500,
              callbacks=[*callbacks, kept, core.Progress(label)])  # fmt: skip
    return kept.history
