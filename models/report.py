"""The tables in the READMEs of the packages beside this file, from the committed records.

python -m models.report readme            write them
python -m models.report readme --check    change nothing; exit status 1 where they are not those in them

Between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in models/PACKAGE/README.md stands what models/PACKAGE/NAME.py
makes of its record, results/NAME.json, by its function `markdown`.
"""

import dataclasses
import importlib
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from course.core import cli, flags, report

FOLDER = Path(__file__).parent
COMPUTED = {"models.scale.cost"}  # modules whose `table()` needs no record


def block(package, name, results):
    """The table of models.`package`.`name`, of its record in the folder `results`."""
    where = f"models.{package}.{name}"
    path = results / f"{name}.json"
    if where not in COMPUTED and not path.is_file():
        return "Nothing is recorded yet."
    module = importlib.import_module(where)
    return module.markdown(module.table() if where in COMPUTED else json.loads(path.read_text()))


def readme_text(text, package, results=None):
    """`text` of models/`package`/README.md with its tables written anew.

    results: folder of the records.  Raises `InputError` where the text has no place for a table.
    """
    results = results or FOLDER / package / "results"
    modules = (Path(__file__).parent / package).glob("*.py")
    makers = {path.stem: partial(block, package, path.stem, results) for path in modules}
    return report.fill(text, f"models/{package}/README.md", makers)


def packages():
    """The packages here that have a README."""
    return sorted(path.parent.name for path in FOLDER.glob("*/README.md"))


@dataclasses.dataclass
class Command:
    """Write the tables of the committed records into the READMEs of models/."""

    what: Annotated[Literal["readme"], tyro.conf.Positional]
    check: bool = False  # change nothing; exit with status 1 where one is stale


def main(argv):
    """Write or check the READMEs' tables."""
    command = flags.read(Command(tyro.MISSING), argv, prog="python -m models.report", description=Command.__doc__)
    for package in packages():
        path, rewrite = FOLDER / package / "README.md", partial(readme_text, package=package)
        report.refresh(path, f"models/{package}/README.md", rewrite, "models.report", command.check)


if __name__ == "__main__":
    cli(main)
