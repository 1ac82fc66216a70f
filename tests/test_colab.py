"""The notebooks: made from the units alone, the same each time, and they run."""

import ast
import json
import os
import subprocess
import sys

import nbclient
import nbformat
import pytest

from colab import build
from course.core import catalogue
from tests import support


@pytest.fixture
def unit(tmp_path):
    return catalogue.read_unit(support.write_unit(tmp_path))


def cells(text, kind):
    return [cell.source for cell in nbformat.reads(text, as_version=4).cells if cell.cell_type == kind]


def test_the_same_source_gives_the_same_bytes(unit):
    assert build.build(unit) == build.build(catalogue.read_unit(unit.path))


def test_notebook_is_valid_and_bare(unit):
    text = build.build(unit)
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert ids == [f"cell-{number:02d}" for number in range(len(ids))]
    for cell in notebook.cells:
        assert cell.metadata == {}
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)
    assert text.endswith("}\n")


def test_title_says_what_the_header_says(unit):
    title = cells(build.build(unit), "markdown")[0]
    for part in (
        "# Day 90 - Small Lesson\n",
        catalogue.colab_badge("day90_small_lesson"),
        "**Three lines show the shape of three hundred.**",
        "[arXiv:1710.09829](https://arxiv.org/abs/1710.09829)",
        "- **Task.** classify digits",
        "```text\nimage [B,28,28,1] -> hidden [B,20]\n-> logits [B,10]\n```",
        "- **Departs.** 1. Adam, the paper gives no schedule 2. no decoder",
    ):
        assert part in title


def test_prose_and_code_keep_their_order(unit):
    prose, code = (cells(build.build(unit), kind) for kind in ("markdown", "code"))
    assert prose[1] == "## The idea\nTwice the **half** is $x$."
    assert [ast.unparse(ast.parse(cell).body[0]).splitlines()[0] for cell in code[1:4]] == [
        "import dataclasses",
        "def half(x):",
        "def main(argv=None):",
    ]
    assert "`epochs=1`" in prose[-1]
    assert "`full`: the defaults of `Config`" in prose[-1]


def test_last_cells_run_the_preset_in_sight(unit):
    *_, run, figures = cells(build.build(unit), "code")
    assert run.splitlines() == [
        'preset = "cpu"  # @param ["smoke", "cpu", "full"]',
        "",
        'record = main(["--preset", preset])',
    ]
    assert "display(Image(" in figures


def all_units():
    return [pytest.param(unit, id=unit.name) for unit in catalogue.units()]


@pytest.mark.parametrize("unit", all_units())
def test_no_line_of_a_unit_is_lost_but_docstring_and_guard(unit):
    code = "\n".join(cells(build.build(unit), "code")[1:-2])
    body = ast.parse(unit.source).body
    assert isinstance(body[-1], ast.If)
    expected = ast.Module(body=body[1:-1], type_ignores=[])
    assert ast.unparse(ast.parse(code)) == ast.unparse(expected)
    comments = [line.strip() for line in unit.source.splitlines() if line.strip().startswith("# exercise:")]
    assert all(comment in code for comment in comments)


# --- drift -----------------------------------------------------------------------------------------------------------


def test_check_names_what_is_missing_stale_or_orphaned(tmp_path, unit, monkeypatch, capsys):
    monkeypatch.setattr(catalogue, "units", lambda: [unit])
    folder = tmp_path / "notebooks"

    def check():
        try:
            build.main(["--check"], folder)
        except SystemExit as stop:
            return stop.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    name = "day90_small_lesson.ipynb"
    assert check() == (1, f"{name}: missing\nrun python -m colab.build\n")
    build.main([], folder)
    capsys.readouterr()
    assert check() == (0, "")
    (folder / name).write_text((folder / name).read_text().replace("half", "third"))
    (folder / "day91_gone.ipynb").write_text("{}")
    assert check() == (1, f"{name}: stale\nday91_gone.ipynb: of no unit\nrun python -m colab.build\n")
    build.main([], folder)
    capsys.readouterr()
    assert check() == (0, "")
    assert [path.name for path in folder.iterdir()] == [name]


def test_the_notebooks_are_not_stale():
    changed, orphans = build.stale(catalogue.units())
    assert [path.name for path in [*changed, *orphans]] == [], "run python -m colab.build"


# --- the setup cell --------------------------------------------------------------------------------------------------


def run_setup(unit, folder, **environment):
    """Run the setup cell alone in `folder`; prints where it ended and which `course` it found."""
    setup = cells(build.build(unit), "code")[0] + "\nprint(os.getcwd(), course.__file__)"
    return subprocess.run(
        [sys.executable, "-c", setup],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("below", ["", "colab", "colab/notebooks"])
def test_setup_finds_the_checkout_it_lies_in(tmp_path, unit, below):
    (tmp_path / "course" / "core").mkdir(parents=True)
    (tmp_path / "course" / "__init__.py").touch()
    (tmp_path / below).mkdir(parents=True, exist_ok=True)
    done = run_setup(unit, tmp_path / below, PATH="")  # no git to be had
    assert done.stdout.split() == [str(tmp_path), str(tmp_path / "course" / "__init__.py")], done.stderr


def test_setup_clones_and_installs_elsewhere(tmp_path, unit):
    origin = tmp_path / "origin"
    (origin / "course" / "core").mkdir(parents=True)
    (origin / "course" / "__init__.py").touch()
    (origin / "course" / "core" / "__init__.py").touch()
    (origin / "requirements.txt").write_text("# nothing to fetch in a test\n")
    author = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "all"]):
        subprocess.run(["git", *words], cwd=origin, env=os.environ | author, check=True)
    elsewhere = tmp_path / "content"
    elsewhere.mkdir()
    redirect = {
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{origin}.insteadOf",
        "GIT_CONFIG_VALUE_0": f"https://{catalogue.REPOSITORY}",
    }
    clone = elsewhere / catalogue.REPOSITORY.rpartition("/")[2]
    for _ in range(2):  # the second time as after a restart of the kernel
        done = run_setup(unit, elsewhere, **redirect)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-2:] == [str(clone), str(clone / "course" / "__init__.py")]
        redirect = {"PATH": ""}


# --- execution -------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_notebook_runs_from_top_to_bottom(tmp_path):
    unit = catalogue.find("day01", catalogue.units())
    for name in ("course", "models"):
        (tmp_path / name).symlink_to(catalogue.ROOT / name)  # a checkout of its own: its runs stay out of ours
    notebook = nbformat.reads(build.build(unit), as_version=4)
    (run,) = [cell for cell in notebook.cells if cell.source.startswith('preset = "cpu"')]
    run.source = run.source.replace('preset = "cpu"', 'preset = "smoke"')
    nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (path,) = (tmp_path / "runs").glob("*/*/result.json")
    record = json.loads(path.read_text())
    assert (record["unit"], record["preset"], path.parent.name) == (unit.name, "smoke", "smoke-s0")
    assert record["metrics"]
    shown = [output for output in notebook.cells[-1].outputs if {"image/png", "image/gif"} & {*output.get("data", {})}]
    assert len(shown) == len(record["figures"]) > 0
    assert not [output for output in run.outputs if "image/png" in output.get("data", {})]  # each is shown once
