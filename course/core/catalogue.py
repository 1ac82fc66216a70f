"""What the repository holds, read from its files alone: units, their headers, their recorded results.

Nothing here imports a unit, TensorFlow or NumPy, so that `python -m course` answers at once; the notebooks, the
README's tables and the tests read the units through this module too.
"""

import ast
import dataclasses
import difflib
import functools
import json
import math
import re
import textwrap
import tokenize
from pathlib import Path

from course.core import experiment
from course.core.errors import InputError

ROOT = Path(__file__).parents[2]
COURSE = ROOT / "course"
RESULTS = COURSE / "results"
NOTEBOOKS = ROOT / "colab" / "notebooks"

REPOSITORY = "github.com/deep-learning-workbook/deep-learning-workbook"  # the one place that names it
BRANCH = "main"

GROUPS = {  # title -> what the names of its units begin with, in the order of the course
    "Advent, days 1 to 30": r"day\d\d_",
    "COMP4901J assignments": r"a\d_",
    "NTHU DataLab competitions": r"cup\d_",
    "VSE challenges": r"vse_",
    "VSE project ideas": r"idea_",
    "NCTU homework": r"hw\d_",
}
SEQUENCE = [  # of the units whose names do not tell it: within a group they come first, in this order
    *("a1_knn", "a1_svm", "a1_softmax", "a1_two_layer_net", "a1_features"),
    *("a2_fully_connected", "a2_update_rules", "a2_normalization", "a2_dropout", "a2_convnet", "a2_cross_validation"),
    *("a3_rnn_captioning", "a3_lstm_captioning", "a3_network_visualization", "a3_style_transfer", "a3_gan"),
    *("a4_q_learning", "a4_world_navigation", "a4_double_dqn", "a4_dueling_dqn"),
    *("a4_policy_gradient", "a4_model_based"),
]
FIELDS = ("Paper", "Task", "Shapes", "Reference", "Run", "Departs")
HEADLINE = 3  # metrics shown in a table: the first ones of record["metrics"], in the order the unit gave them


@dataclasses.dataclass(frozen=True)
class Unit:
    """One module of the course, as its source describes it."""

    name: str  # of the module: day21_capsnet
    path: Path
    group: str  # a key of GROUPS
    source: str
    header: dict[str, str]  # as `parse_header` returns it

    @functools.cached_property
    def outline(self):
        """An object with the unit's Config, PRESETS and REFERENCE; parsed when asked for, since a course is long."""
        try:
            return experiment.outline(f"course.{self.name}", self.path)
        except (SyntaxError, NameError, TypeError) as error:
            raise InputError(
                f"{self.path}: Config, PRESETS and REFERENCE must be readable literals ({error})"
            ) from error

    @property
    def reference(self):
        """What others report: {metric: (value, unit, "source, place in it, data set")}."""
        return getattr(self.outline, "REFERENCE", {})

    @property
    def presets(self):
        """{preset: {setting: value}}, what each changes of the defaults."""
        return getattr(self.outline, "PRESETS", {})

    @property
    def offers(self):
        """What can be done with the unit besides running it: "notebook", "exercises", "export", "demo"."""
        found = {
            "notebook": (NOTEBOOKS / f"{self.name}.ipynb").exists(),
            "exercises": re.search(r"^ *# exercise:", self.source, re.MULTILINE),
            "export": re.search(r"^def serve\(", self.source, re.MULTILINE),
            "demo": re.search(r"^def demo\(", self.source, re.MULTILINE),
        }
        return [name for name, there in found.items() if there]


# --- units -----------------------------------------------------------------------------------------------------------


def parse_header(text, where="the docstring"):
    """The fields of a unit's docstring: `title`, `claim`, and `paper`, `task`, `shapes`, `reference`, `run`, `departs`.

    The first line is `Day 21 - Capsule Networks: the claim in one line.`; after an empty line each field is
    `Key:   text`, continued by indented lines (kept as lines); prose may follow after another empty line.
    Raises `InputError`, which names `where`, for a missing, repeated or unknown field.
    """
    first, _, rest = (text or "").strip().partition("\n")
    match = re.fullmatch(r"(\S.* - \S.*?): (\S.*)", first.strip())
    if not match:
        raise InputError(f"{where}: the first line must read 'Day NN - Title: the claim in one line.', not {first!r}")
    header = {"title": match[1], "claim": match[2][0].upper() + match[2][1:]}
    block = re.split(r"\n[ \t]*\n", rest.strip("\n"), maxsplit=1)[0]
    key = None
    for line in block.splitlines():
        field = re.fullmatch(r"([A-Z]\w*):\s+(\S.*)", line)
        if field:
            key = field[1].lower()
            if field[1] not in FIELDS or key in header:
                fault = "more than once" if key in header else f"but the fields are {', '.join(FIELDS)}"
                raise InputError(f"{where}: '{field[1]}:' stands there {fault}")
            header[key] = field[2].rstrip()
        elif key and line.startswith(" "):
            header[key] += "\n" + line.strip()
        else:
            raise InputError(f"{where}: {line!r} is neither 'Key:   text' nor the indented continuation of one")
    missing = [name for name in FIELDS if name.lower() not in header]
    if missing:
        raise InputError(f"{where}: the header lacks {', '.join(f'{name}:' for name in missing)}")
    return header


def read_unit(path):
    """The `Unit` in the file `path`; `InputError` where its source does not have the shape of one."""
    path = Path(path)
    group = next((title for title, pattern in GROUPS.items() if re.match(pattern, path.stem)), None)
    if group is None:
        raise InputError(f"{path}: the name of a unit begins as in course.core.catalogue.GROUPS (day01_, a1_, ...)")
    return Unit(path.stem, path, group, path.read_text(), parse_header(_docstring(path), path))


def _docstring(path):
    """The docstring of the module at `path`, of which only the first words are read."""
    with path.open() as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.STRING:
                return ast.literal_eval(token.string)
            if token.type not in (tokenize.COMMENT, tokenize.NL):
                break
    return ""


def units(folder=COURSE):
    """Every `Unit` on disk, in the order of the course."""
    found = [read_unit(path) for path in Path(folder).glob("*.py") if not path.name.startswith("_")]
    groups, place = list(GROUPS), {name: number for number, name in enumerate(SEQUENCE)}
    return sorted(found, key=lambda unit: (groups.index(unit.group), place.get(unit.name, len(place)), unit.name))


def blank(source):
    """A unit's source with its exercises to do: each region's lines make room for an error that says what to write."""

    def empty(region):
        task = textwrap.shorten(region["task"], 70, placeholder=" ...").replace("\\", "\\\\").replace('"', "'")
        return f'{region["mark"]}{region["indent"]}raise NotImplementedError("exercise: {task}")\n{region["end"]}'

    region = (  # a task may go on in comments below its first line
        r"(?P<mark>^(?P<indent> *)# exercise: (?P<task>.+)\n(?:(?P=indent)# (?!end exercise).*\n)*)"
        r"(?:.*\n)*?(?P<end> *# end exercise$)"
    )
    return re.sub(region, empty, source, flags=re.MULTILINE)


def find(name, known):
    """The one of `known` units that `name` means: its module, or the beginning of it that no other shares (day21).

    Raises `InputError` with the nearest names otherwise.
    """
    wanted = Path(name).name.removesuffix(".py").removeprefix("course.")
    matches = [unit for unit in known if unit.name == wanted] or [u for u in known if u.name.startswith(wanted)]
    if len(matches) == 1:
        return matches[0]
    names = {unit.name for unit in matches or known}
    if not matches:
        short = {part: unit for unit in names for part in (unit, unit.partition("_")[0], unit.partition("_")[2])}
        names = {short[part] for part in difflib.get_close_matches(wanted, short, n=4, cutoff=0.6)}
    hint = f"did you mean {', '.join(sorted(names)[:6])}?" if names else "`python -m course` lists them"
    raise InputError(f"there is no unit {name!r}: {hint}" if not matches else f"{name!r} fits several units: {hint}")


# --- results ---------------------------------------------------------------------------------------------------------


def recorded(unit, results=RESULTS):
    """Preset name -> record, as `report publish` wrote it for the unit of this name; {} where it has none."""
    path = Path(results) / f"{unit}.json"
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())["presets"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): restore it from git, or publish the unit again") from error


def headline(record):
    """The metrics of a published record that stand for it in a table: its first ones, in the unit's own order."""
    return list(record["metrics"])[:HEADLINE]


def sources(data):
    """A record's data as a list of provenances: a unit gives one, a list of them, or a dict of name -> provenance."""
    if isinstance(data, list):
        return data
    if data and "name" not in data:
        return [value for value in data.values() if isinstance(value, dict)]
    return [data] if data else []


def data_line(record):
    """The data of a record in a few words; made data, stand-ins and changed copies always say so."""
    parts = []
    for data in sources(record.get("data")):
        text = data["name"]
        if data.get("stand_in_for"):
            text += f", in place of {data['stand_in_for']}"
        if data.get("synthetic"):
            text += " (synthetic)"
        if data.get("note"):  # what makes it another thing than the set of that name
            text += f" ({data['note']})"
        if isinstance(data.get("train"), int):
            text += f", {data['train']:,} to train on"
        parts.append(text)
    return "; ".join(parts)


def comparable(unit, record):
    """REFERENCE entries whose source names a data set of the record: {metric: entry}.

    Made data, stand-ins and sets that were cut or changed (their provenance has a note) share no column with anything
    published, whatever their name.
    """
    names = [
        data["name"]
        for data in sources(record.get("data"))
        if not any(data.get(key) for key in ("synthetic", "stand_in_for", "note"))
    ]
    return {
        metric: entry
        for metric, entry in unit.reference.items()
        if metric in record["metrics"] and any(_names(entry[2], name) for name in names)
    }


def _names(source, name):
    """Whether `source` has the data set as a word of its own: cifar10 as CIFAR-10, not mnist in Fashion-MNIST."""
    spelt = "[-_ ]?".join(re.findall(r"[a-z]+|\d+", name.lower()))
    return re.search(rf"(?<![\w-]){spelt}(?![\w-])", source.lower())


def number(metric):
    """A published metric as text: the mean, and the spread to two significant digits where there are several seeds."""
    mean, std = metric["mean"], metric["std"]
    if mean is None:
        return "not finite"
    if not std:
        whole = all(isinstance(value, int) for value in metric["values"].values())
        return f"{mean:,.0f}" if whole or 1000 <= abs(mean) < 1e7 else f"{mean:.4g}"
    places = 1 - math.floor(math.log10(std))
    if places > 7:
        return f"{mean:.2e} ± {std:.1e}"
    return f"{mean:,.{max(places, 0)}f} ± {std:,.{max(places, 0)}f}"


def measured(metric):
    """A published metric with its unit of measure: "0.71 ± 0.04 %"."""
    return f"{number(metric)} {metric['unit']}".rstrip()


def duration(record):
    """Mean time of a run, to be read by people: "48 s", "12 min", "3.2 h"."""
    seconds = record["seconds"]["mean"]
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


# --- addresses -------------------------------------------------------------------------------------------------------


def notebook_path(unit):
    """The generated notebook of the unit of this name, from the repository's root."""
    return f"colab/notebooks/{unit}.ipynb"


def colab_badge(unit):
    """Markdown of the badge that opens the unit's notebook in Colab."""
    colab = "https://colab.research.google.com"
    address = f"{colab}/{REPOSITORY.replace('.com', '', 1)}/blob/{BRANCH}/{notebook_path(unit)}"
    return f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({address})"
