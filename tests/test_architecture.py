"""Who may import whom, and what no file of the project may say."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from course.core import catalogue

ROOT = catalogue.ROOT
OURS = ("course", "models", "serving", "compression", "colab")
UPPER_FLOOR = ("day22", "day25", "day26")  # units whose subject is compression or serving
MODULES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


def module_name(path, root=ROOT):
    """course/core/__init__.py -> course.core"""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports(path, root=ROOT):
    """Dotted names that the file imports, wherever in it; `from a import b` gives a and a.b, as b may be a module."""
    package = module_name(path, root).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def our_modules(names, modules):
    """Of dotted names, the modules of ours that they mean: the longest beginning that is one."""
    found = set()
    for name in names:
        parts = name.split(".")
        beginnings = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        found |= {next((beginning for beginning in beginnings if beginning in modules), None)} - {None}
    return found


def allowed(importer, imported, units):
    """Whether the module `importer` may import `imported`; `units`: names of the units, in the order of the course."""
    floor, target = ".".join(importer.split(".")[:2]), imported.split(".")
    if imported == "course" or imported.startswith("course.core"):
        return True  # the package itself, which importing anything below it runs, and the ground floor
    if floor == "course.core":
        return False
    if target[0] == importer.split(".")[0] and target[0] != "course":
        return True
    if target[0] == "course":
        unit, other = importer.split(".")[-1], target[1]
        return importer.startswith("course.") and {unit, other} <= set(units) and units.index(other) < units.index(unit)
    if target[0] == "models":
        return importer.split(".")[0] in ("serving", "compression") or floor.removeprefix("course.") in units
    if target[0] in ("serving", "compression"):
        return importer.split(".")[0] in ("serving", "compression") or floor.startswith(
            tuple(f"course.{day}_" for day in UPPER_FLOOR)
        )
    return False


@pytest.mark.parametrize(
    ("importer", "imported", "answer"),
    [
        ("course.core.report", "course.core.files", True),
        ("course.core.data.images", "course.core", True),
        ("course.core.report", "models.vit", False),
        ("course.core.report", "course.day01_net", False),
        ("course.core.report", "colab.build", False),
        ("models.vit", "course.core.data", True),
        ("models.vit", "models.resnet", True),
        ("models.vit", "course.day01_net", False),
        ("models.vit", "serving.client", False),
        ("serving.pipeline", "compression.lite", True),
        ("compression.lite", "serving.client", True),
        ("serving.demos", "course.day01_net", False),
        ("colab.build", "course.core", True),
        ("colab.build", "models.vit", False),
        ("course.day12_x", "models.vit", True),
        ("course.day12_x", "course.day01_net", True),
        ("course.day01_net", "course.day12_x", False),
        ("course.day12_x", "serving.client", False),
        ("course.day25_x", "serving.client", True),
        ("course.__main__", "course.core.catalogue", True),
        ("course.__main__", "course.day01_net", False),
        ("course", "serving", False),
    ],
)
def test_the_rule(importer, imported, answer):
    assert allowed(importer, imported, ["day01_net", "day12_x", "day25_x"]) is answer


def test_imports_are_read_wherever_they_stand(tmp_path):
    path = tmp_path / "serving" / "server" / "app.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import a.b as c\ndef f():\n    from course import core\n    from . import codec\n    from ..x import y\n"
    )
    assert imports(path, tmp_path) == {
        "a.b", "course", "course.core", "serving.server", "serving.server.codec", "serving.x", "serving.x.y",
    }  # fmt: skip
    modules = {"course", "course.core", "serving", "serving.server", "serving.server.codec", "serving.x"}
    assert our_modules(imports(path, tmp_path), modules) == modules - {"serving"}


def test_every_import_points_down():
    names = {module_name(path): path for path in MODULES}
    assert len(names) > 20
    units = [unit.name for unit in catalogue.units()]
    wrong = [
        f"{importer} imports {imported}"
        for importer, path in names.items()
        for imported in our_modules(imports(path), names)
        if not allowed(importer, imported, units)
    ]
    assert wrong == []


def test_no_file_uses_tf_keras():
    """TensorFlow's `keras` attribute may be Keras 2 or 3 by an environment flag; ours is always `import keras`."""
    wrong = []
    for path in [*MODULES, *(ROOT / "tests").rglob("*.py")]:
        attributes = {
            (node.value.id, node.attr)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        if attributes & {("tf", "keras"), ("tensorflow", "keras")} or any(
            name.startswith("tensorflow.keras") for name in imports(path)
        ):
            wrong.append(str(path))
    assert wrong == []


def test_tensorflow_model_optimization_stays_in_its_own_process():
    """Importing it switches the process to Keras 2: only a script that nothing imports may do so."""
    users = {
        module_name(path)
        for path in MODULES
        if any(name.split(".")[0] == "tensorflow_model_optimization" for name in imports(path))
    }
    importers = {
        f"{module_name(path)} imports {user}"
        for path in [*MODULES, *(ROOT / "tests").rglob("*.py")]
        for user in users & our_modules(imports(path), {module_name(path) for path in MODULES})
    }
    assert importers == set()


# --- what is written -------------------------------------------------------------------------------------------------


def tracked():
    """Text files that are committed or about to be, with their text."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listing.stdout.split("\0")):
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" not in content[:8192]:
            yield Path(name), content.decode()


def test_no_file_names_a_machine():
    """A folder of somebody's machine in a committed file is a mistake, in a recorded result as much as in code."""
    machine = re.compile(r"(?<![\w.~$}])/(?:" + "|".join(("home", "root", "work", "Users")) + r")/[\w.-]")
    found, files = [], 0
    for name, text in tracked():
        files += 1
        found += [f"{name}: {line.strip()[:120]}" for line in text.splitlines() if machine.search(line)]
    assert files > 20
    assert found == []


def test_generated_files_are_not_committed():
    folders = {"runs", "exports", "build", "__pycache__", ".ipynb_checkpoints"}
    assert [str(name) for name, _ in tracked() if folders & set(name.parts[:-1])] == []


def test_packages_that_need_tensorflow_do_not_slow_the_foundation():
    """What the catalogue and --help import must not import TensorFlow, Keras or NumPy at its top."""
    names = {module_name(path): path for path in MODULES}
    waiting, seen = ["course.__main__", "course.core.report", "colab.build"], set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for node in ast.parse(names[name].read_text()).body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            top = {alias.name for alias in node.names} if isinstance(node, ast.Import) else {node.module}
            assert not {word.split(".")[0] for word in top} & {"tensorflow", "keras", "numpy"}, name
            more = top | {f"{base}.{alias.name}" for base in top for alias in node.names}
            waiting += [found for found in our_modules(more, names) if found not in seen]
    assert {"course.core.catalogue", "course.core.experiment", "course.core.flags"} <= seen


def test_every_file_that_the_readme_links_is_there():
    text = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert any(link.endswith(".png") for link in links), "a picture of the result"
    assert [link for link in links if not (ROOT / link).exists()] == []
