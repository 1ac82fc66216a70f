"""Where an environment comes from, as a run's record wants it of its data."""

import importlib
import inspect
from importlib import metadata
from pathlib import Path

from course.core import files
from models.rl.envs import specification

# packages that bring environments, by the first part of the module an environment is made by
PACKAGES = {"gymnasium": ("gymnasium", "MIT"), "ale_py": ("ale-py", "GPL-2.0"), "highway_env": ("highway-env", "MIT"),
            "models": ("", "MIT")}  # fmt: skip


def provenance(name, note=""):
    """{"name", "source", "licence", "sha256"} of the environment `name`: its package, its version and the digest of the
    file that its rules stand in; of an ALE game, of the ROM.

    note: what makes it another thing than the environment of that name, or its use a mere trial: no published figure
    is shown beside it then.  Raises `InputError` where there is no such environment.
    """
    spec = specification(name)
    module = spec.entry_point.partition(":")[0] if isinstance(spec.entry_point, str) else spec.entry_point.__module__
    package, licence = PACKAGES[module.partition(".")[0]]
    if name.startswith("ALE/"):
        from ale_py import roms

        path = roms.get_rom_path(spec.kwargs["game"])
    else:
        path = inspect.getsourcefile(importlib.import_module(module))
    source = f"{package} {metadata.version(package)}" if package else f"this project, {module}"
    found = {"name": name, "source": source, "licence": licence, "sha256": files.sha256(Path(path))}
    return found | ({"note": note} if note else {})
