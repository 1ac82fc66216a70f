"""What every unit stands on: devices, data, runs, records, figures and exports.

The parts are imported when they are first used, so that the catalogue and `--help` never wait for TensorFlow.
"""

import importlib

from course.core.errors import InputError, cli

# name as used by the units -> the module of this package that holds it
_HOMES = {
    "alone": "experiment",
    "parse": "experiment",
    "run": "experiment",
    "Options": "experiment",
    "Checkpoint": "checkpoint",
    "Progress": "checkpoint",
}
_MODULES = {"checkpoint", "data", "experiment", "export", "files", "pages", "plots", "report", "runtime", "flags"}

__all__ = ["InputError", "cli", *sorted(_HOMES), *sorted(_MODULES)]


def __getattr__(name):
    """Resolve `core.<name>` on first use (PEP 562)."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
