"""Training that a kill cannot hurt: the state after every epoch, saved whole, and found again by the same command."""

import json
import random
import sys
import time
import zipfile

import keras
import numpy as np

from course.core import experiment, files
from course.core.errors import InputError


class Checkpoint(keras.callbacks.Callback):
    """Saves and restores all that the next epoch depends on.

    Weights, the state of every dropout and augmentation layer, the optimizer (loss scale included), the history and
    the random states of Python and NumPy go into one file, replaced by rename.  The data position is the epoch, from
    which `core.data.batches` derives its order; so an interrupted run ends with the loss curve of an unbroken one.

    Created after `compile`, it restores at once: `epoch` is the first epoch still to run, `history` what came before.
    `objects` are further things with `.variables` (a second network, an optimizer of a custom loop); `model` may be
    None where all of the state is in them or in arrays.  `arrays`, given
    to `save`, is a dict of NumPy arrays, found again as the attribute of that name.
    """

    def __init__(self, folder, model, **objects):
        super().__init__()
        self.path = folder / "state.npz"
        self.objects = objects if model is None else {"model": model} | objects
        optimizer = getattr(model, "optimizer", None)
        if optimizer is not None:
            optimizer.build(model.trainable_variables)  # its slots must exist before they can be restored
            self.objects.setdefault("optimizer", optimizer)
        self.epoch, self.history, self.arrays = 0, {}, {}
        if self.path.exists():
            self._restore()

    def on_epoch_end(self, epoch, logs=None):
        self.save(epoch, logs or {})

    def save(self, epoch, logs, arrays=None):
        """Record that `epoch` (from 0) has ended with `logs`, and save the state."""
        for name, value in logs.items():
            self.history.setdefault(name, []).append(float(value))
        self.epoch = epoch + 1
        version, internal, gauss = random.getstate()
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - what keras.utils.set_random_seed seeds
        state = {"epoch": self.epoch, "history": self.history,
                 "python": [version, internal, gauss], "numpy": [kind, keys.tolist(), *rest]}  # fmt: skip
        content = {f"array/{name}": value for name, value in (arrays or {}).items()}
        for name, item in self.objects.items():
            content |= {f"{name}/{i}": np.asarray(variable) for i, variable in enumerate(item.variables)}
        with files.atomic_path(self.path) as temporary:
            np.savez(temporary, state=json.dumps(state), **content)
        experiment.note_time()

    def _restore(self):
        try:
            content = dict(np.load(self.path, allow_pickle=False))
            state = json.loads(str(content.pop("state")))
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InputError(f"the checkpoint {self.path} cannot be read ({error}): run again with --fresh") from error
        for name, item in self.objects.items():
            saved = [content[f"{name}/{i}"] for i in range(len(item.variables)) if f"{name}/{i}" in content]
            if [value.shape for value in saved] != [tuple(variable.shape) for variable in item.variables]:
                raise InputError(f"the checkpoint {self.path} is of another network: run again with --fresh")
            for variable, value in zip(item.variables, saved, strict=True):
                variable.assign(value)
        self.epoch, self.history = state["epoch"], state["history"]
        self.arrays = {key.removeprefix("array/"): value for key, value in content.items() if key.startswith("array/")}
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
        print(f"restored {self.path}: going on at epoch {self.epoch + 1}")


class Progress(keras.callbacks.Callback):
    """A line an epoch, with the time left; on a terminal a bar within the epoch as well."""

    def __init__(self, label=""):
        super().__init__()
        self.label = f"{label} " if label else ""

    def on_train_begin(self, logs=None):
        self.first = None
        self.began = self.painted = time.perf_counter()

    def on_epoch_begin(self, epoch, logs=None):
        self.first = epoch if self.first is None else self.first
        self.epoch, self.epoch_began = epoch, time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        now = time.perf_counter()
        if sys.stdout.isatty() and now - self.painted > 0.2:
            steps = self.params.get("steps") or 0
            done = f"{batch + 1}/{steps}" if steps else f"{batch + 1}"
            print(f"\r{self._where()}  step {done}  {now - self.epoch_began:.0f} s ", end="", flush=True)
            self.painted = now

    def on_epoch_end(self, epoch, logs=None):
        now = time.perf_counter()
        left = (now - self.began) / (epoch + 1 - self.first) * (self.params["epochs"] - epoch - 1)
        values = "  ".join(f"{name} {value:.4g}" for name, value in (logs or {}).items() if name != "learning_rate")
        start = "\r" if sys.stdout.isatty() else ""
        print(f"{start}{self._where()}  {values}  {now - self.epoch_began:.0f} s, {left:.0f} s left   ", flush=True)

    def _where(self):
        return f"{self.label}epoch {self.epoch + 1}/{self.params['epochs']}"
