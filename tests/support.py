"""What several tests need: a unit of a few lines, records of it, commands with their cost, manifests read strictly."""

import copy
import json
import os
import resource
import subprocess
import sys

import yaml

from course.core import catalogue

KUBERNETES = ["1.30", "1.37"]  # the oldest and the newest that the manifests are held against

SOURCE = '''"""Day 90 - Small Lesson: three lines show the shape of three hundred.

Paper:     Doe, Roe 2017, "A Title", arXiv:1710.09829
Task:      classify digits
Shapes:    image [B,28,28,1] -> hidden [B,20]
           -> logits [B,10]
Reference: MNIST test error 0.25 %
Run:       python -m course.day90_small_lesson --preset full
Departs:   1. Adam, the paper gives no schedule
           2. no decoder
"""

# %%
import dataclasses

from course import core

REFERENCE = {"test_error": (0.25, "%", "Doe and Roe 2017, Table 1, MNIST")}


@dataclasses.dataclass
class Config:
    seed: int = 0  # of everything random
    epochs: int = 50  # passes over the training images


PRESETS = {"smoke": {"epochs": 1}, "cpu": {"epochs": 5}, "full": {}}

# %% [markdown]
# ## The idea
# Twice the **half** is $x$.


# %%
def half(x):
    """x -> x / 2."""
    # exercise: halve x
    return x / 2
    # end exercise


def serve(model):
    """The graph to export."""
    return model


# %%
def main(argv=None):
    options, cfg = core.parse(Config, PRESETS, argv)
    with core.run("day90_small_lesson", options, cfg) as run:
        run.record["data"] = {"name": "mnist", "train": 10, "synthetic": False, "note": ""}
        run.record["metrics"] = {"test_error": half(1.0)}
    return run.record


if __name__ == "__main__":
    core.cli(main)
'''

DATA = {"name": "mnist", "source": "registry", "train": 60_000, "synthetic": False, "stand_in_for": None, "note": ""}


def write_unit(folder, name="day90_small_lesson"):
    """The small unit as `<folder>/<name>.py`; returns the path."""
    path = folder / f"{name}.py"
    path.write_text(SOURCE)
    return path


def result(seed=0, preset="cpu", **changes):
    """A run's result.json, as `core.run` leaves it."""
    return {
        "unit": "day90_small_lesson",
        "preset": preset,
        "seed": seed,
        "config": {"seed": seed, "epochs": 5},
        "metrics": {"test_error": 1.0 + seed, "parameters": 7850, "check": 1e-9, "last": 4.0},
        "figures": ["curves.png"],
        "replicas": 1,
        "precision": "float32",
        "data": DATA,
        "history": {"loss": [2.0, 1.0]},
        "seconds": 100.0 + seed,
        "hardware": {"cpu": "a processor", "cores": 2, "memory_gib": 24.0, "gpus": []},
        "versions": {"python": "3.11.9"},
        "commit": "0123456789ab",
        "command": f"python -m course.day90_small_lesson --preset {preset} --seed {seed}",
    } | changes


def write_run(runs, seed=0, preset="cpu", size=(300, 200), **changes):
    """A finished run's folder below `runs`, with its figure; returns the folder."""
    from PIL import Image

    folder = runs / "day90_small_lesson" / f"{preset}-s{seed}"
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    content = result(seed, preset, **changes)
    for name in content["figures"]:
        Image.effect_noise(size, 90).save(folder / "figures" / name)  # nothing compresses worse
    (folder / "result.json").write_text(json.dumps(content))
    return folder


def python(*words, cwd=catalogue.ROOT, **environment):
    """Run this interpreter with `words`; returns (the finished process, the seconds of processor time it took).

    Processor time is what the command takes on a machine with nothing else to do; a loaded one does not change it.
    """
    kept = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=300
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


# --- manifests -------------------------------------------------------------------------------------------------------


class StrictLoader(yaml.SafeLoader):
    """YAML as the standard says: no key twice in a mapping."""


def _mapping(loader, node):
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    repeated = {key for key in keys if keys.count(key) > 1}
    if repeated:
        raise yaml.constructor.ConstructorError(None, None, f"twice in a mapping: {repeated}", node.start_mark)
    return loader.construct_mapping(node, deep=True)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def documents(path):
    """The documents of a YAML file."""
    return list(yaml.load_all(path.read_text(), StrictLoader))


def changed(document, *path, value):
    """A copy with one value set, for a validator to refuse."""
    document = copy.deepcopy(document)
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document
