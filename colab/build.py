"""The notebooks, one a unit, generated from its module: `python -m colab.build`, and `--check` for drift.

A notebook holds what the module holds, cell by cell, between a title made of the header and a cell that runs `main`.
The same source gives the same bytes, so that a notebook can be committed and compared.
"""

import ast
import dataclasses
import re

import jupytext
import nbformat

from course.core import catalogue, cli, files, flags

SETUP = """\
# In a checkout the project is found in a folder above this one; elsewhere (on Colab, say) it is fetched first.
import os
import subprocess
import sys
from pathlib import Path

here = Path.cwd()
fetched = here / "{folder}"
checkout = next((folder for folder in [here, *here.parents, fetched] if (folder / "course/core").is_dir()), None)
if checkout is None:
    checkout = fetched
    address = "https://{repository}"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", address, str(checkout)], check=True)
    requirements = str(checkout / "requirements.txt")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
    if "numpy" in sys.modules:  # the session has begun with another version
        raise SystemExit("The packages are installed: choose Runtime > Restart session, then run this cell again.")
os.chdir(checkout)
sys.path.insert(0, str(checkout))
import course  # sets the process's flags, before TensorFlow is imported"""

RUN = """\
preset = "{default}"  # @param {choices}

record = main(["--preset", preset])"""

FIGURES = """\
from IPython.display import Image, display
from matplotlib import pyplot

pyplot.close("all")  # the figures are shown as they were saved
folder = Path("runs") / record["unit"] / f"{record['preset']}-s{record['seed']}"
for name in record["figures"]:
    display(Image(folder / "figures" / name))"""


def build(unit):
    """The notebook of a `catalogue.Unit`, as text: no outputs, the same for the same source."""
    prose, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    lesson = jupytext.reads(_body(unit.source), fmt="py:percent").cells
    setup = SETUP.format(repository=catalogue.REPOSITORY, folder=catalogue.REPOSITORY.rpartition("/")[2])
    choices = "[" + ", ".join(f'"{name}"' for name in unit.presets) + "]"
    cells = [
        prose(title(unit)),
        code(setup),
        *(cell for cell in lesson if cell.source.strip()),
        prose("## Run it\n" + presets(unit)),
        code(RUN.format(default="cpu", choices=choices)),
        code(FIGURES),
    ]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = {}
    notebook = nbformat.v4.new_notebook(
        cells=cells,
        metadata={
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
    )
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def _body(source):
    """A unit's source without its docstring, which becomes the title, and without the guard that runs it."""
    tree = ast.parse(source)
    lines = source.splitlines()
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            lines[node.lineno - 1 : node.end_lineno] = []
            break
    return "\n".join(lines[tree.body[0].end_lineno :])


def title(unit):
    """Markdown of the first cell: badge, title, claim and the header's fields, papers linked."""
    header = unit.header
    lines = [f"# {header['title']}", "", catalogue.colab_badge(unit.name), "", f"**{header['claim']}**", ""]
    for field in catalogue.FIELDS:
        text = header[field.lower()]
        if field == "Shapes":
            lines += ["", "Shapes:", "```text", text, "```", ""]
        elif field != "Run":  # the notebook runs by its last cells
            lines.append(f"- **{field}.** {_links(' '.join(text.split()))}")
    lines += ["", f"Generated from [`course/{unit.name}.py`]({_source(unit)}): change that file, not this notebook."]
    return "\n".join(lines)


def _links(text):
    """arXiv numbers become links."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def _source(unit):
    return f"https://{catalogue.REPOSITORY}/blob/{catalogue.BRANCH}/course/{unit.name}.py"


def presets(unit):
    """Markdown that says what each preset changes."""
    lines = ["The preset decides how much is computed:", ""]
    for name, changed in unit.presets.items():
        settings = ", ".join(f"`{key}={value!r}`" for key, value in changed.items()) or "the defaults of `Config`"
        lines.append(f"- `{name}`: {settings}")
    return "\n".join(lines)


@dataclasses.dataclass
class Build:
    """Generate the notebooks of all units."""

    check: bool = False  # change nothing; exit with status 1 where a notebook is stale, missing or of no unit


def stale(units, folder=catalogue.NOTEBOOKS):
    """({path: text} of the notebooks to be written, [paths] of those whose unit is gone)."""
    wanted = {folder / f"{unit.name}.ipynb": build(unit) for unit in units}
    changed = {path: text for path, text in wanted.items() if not path.exists() or path.read_text() != text}
    return changed, sorted(set(folder.glob("*.ipynb")) - set(wanted))


def main(argv, folder=catalogue.NOTEBOOKS):
    options = flags.read(Build(), argv, prog="python -m colab.build", description=__doc__)
    changed, orphans = stale(catalogue.units(), folder)
    if options.check:
        for path in [*changed, *orphans]:
            print(f"{path.name}: {'of no unit' if path in orphans else 'stale' if path.exists() else 'missing'}")
        if changed or orphans:
            print("run python -m colab.build")
            raise SystemExit(1)
        return
    for path, text in changed.items():
        files.write_atomic(path, text)
        print(f"{path.name}: written")
    for path in orphans:
        path.unlink()
        print(f"{path.name}: removed")


if __name__ == "__main__":
    cli(main)
