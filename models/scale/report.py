"""The tables of models/scale/README.md, from the committed records.

python -m models.scale.report readme            write them
python -m models.scale.report readme --check    change nothing; exit status 1 where they are not those in it
"""

import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from course.core import InputError, cli, flags, report
from models.scale import cost

FOLDER = Path(__file__).parent
BLOCK = re.compile(r"(<!-- (\w+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)


def block(name, folder):
    """The table called `name`: computed for cost, else that of the record of the module of that name in `folder`."""
    if name == "cost":
        return cost.markdown(cost.table())
    path = folder / f"{name}.json"
    if not path.is_file():
        return "Nothing is recorded yet."
    return importlib.import_module(f"models.scale.{name}").markdown(json.loads(path.read_text()))


def readme_text(text, folder=None):
    """`text` with what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` written anew.

    folder: of the records.  Raises `InputError` where the text has no such place.
    """
    folder = folder or FOLDER / "results"
    fresh, found = BLOCK.subn(lambda place: f"{place[1]}{block(place[2], folder)}\n{place[3]}", text)
    if not found:
        raise InputError("the README has no lines <!-- cost:begin --> and <!-- cost:end -->: put them in")
    return fresh


@dataclasses.dataclass
class Command:
    """Write the tables of the committed records into models/scale/README.md."""

    what: Annotated[Literal["readme"], tyro.conf.Positional]
    check: bool = False  # change nothing; exit with status 1 where the README is stale


def main(argv):
    """Write or check the README's tables."""
    command = flags.read(Command(tyro.MISSING), argv, prog="python -m models.scale.report", description=Command.__doc__)
    report.refresh(FOLDER / "README.md", "models/scale/README.md", readme_text, "models.scale.report", command.check)


if __name__ == "__main__":
    cli(main)
