"""One run of one unit: its flags, its folder, its checkpoint and its record."""

import ast
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import shlex
import shutil
import sys
import time
import types
from pathlib import Path
from typing import Any

import tyro

from course.core import files, flags, runtime
from course.core.errors import InputError, cli

ROOT = Path(__file__).parents[2]


# --- flags -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Options:
    """How a unit is run, as opposed to what it computes."""

    preset: str = "cpu"  # smoke: seconds; cpu: minutes on two cores; full: the paper's scale
    strategy: str = "auto"  # devices: auto, one, mirrored, mirrored:N, central, multiworker, parameter_server, tpu
    precision: str = "auto"  # auto, float32, mixed_float16, mixed_bfloat16
    runs: str = "runs"  # folder of the run's checkpoint, figures and result.json
    fresh: bool = False  # start over, even where an interrupted run could be continued


def parse(config, presets, argv=None, *, unit=None):
    """Read a unit's flags: `(options, cfg)`, where `cfg` is `config` under the preset and the flags given.

    `options.preset` is the preset's bare name only where nothing was overridden; else the overrides follow it, as in
    "cpu+epochs=2", so that a changed setting can never pass for the recorded one.  Fields with the metadata
    `{"where": True}` (ports, output folders) say where and not what: they change neither the name nor the record.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    prog = f"python -m {unit or config.__module__}"
    preset = _preset(argv, presets)
    base = config(**presets[preset])
    settings = dataclasses.make_dataclass(
        "Settings", [("running", tyro.conf.OmitArgPrefixes[Options]), ("unit", tyro.conf.OmitArgPrefixes[config])]
    )
    settings.__doc__ = None
    read = flags.read(settings(Options(preset=preset), base), argv, prog=prog, description=_claim(config))
    _check_numbers(base, read.unit)
    overrides = _differences(base, read.unit) | _differences(
        Options(preset=preset, runs=read.running.runs, fresh=read.running.fresh), read.running
    )
    overrides.pop("seed", None)  # the seed has its own place in the folder's name
    return dataclasses.replace(read.running, preset=_name(preset, overrides)), read.unit


def _preset(argv, presets):
    """The preset named in `argv`; it must be known before the other flags, whose defaults it sets."""
    for i, word in enumerate(argv):
        name = argv[i + 1] if word == "--preset" and i + 1 < len(argv) else word.partition("--preset=")[2]
        if name:
            if name not in presets:
                raise InputError(f"--preset {name} is not known: choose one of {', '.join(presets)}")
            return name
    return "cpu"


def _claim(config):
    """First line of the docstring of the module that `config` stands in."""
    return (sys.modules[config.__module__].__doc__ or "").partition("\n")[0]


def _check_numbers(base, cfg):
    """Refuse what no unit can use: NaN, and below the sensible: a count of zero, or a negative size or rate."""
    for field in _whats(cfg):
        default, value = getattr(base, field.name), getattr(cfg, field.name)
        if isinstance(value, tuple) and default and not value:
            raise InputError(f"--{field.name.replace('_', '-')} needs at least one value")
        if isinstance(value, bool) or not isinstance(value, int | float) or not isinstance(default, int | float):
            continue
        least = -math.inf if default < 0 else 1 if isinstance(default, int) and default > 0 else 0
        if not (value >= least and math.isfinite(value)):
            flag = field.name.replace("_", "-")
            raise InputError(f"--{flag} {value} cannot be used: give a number of at least {least}")


def _whats(cfg):
    """The fields that the result depends on."""
    return [field for field in dataclasses.fields(cfg) if not field.metadata.get("where")]


def _what(cfg):
    return {field.name: getattr(cfg, field.name) for field in _whats(cfg)}


def _differences(base, other):
    pairs = ((field.name, getattr(other, field.name)) for field in _whats(other))
    return {name: value for name, value in pairs if value != getattr(base, name)}


def _name(preset, overrides):
    """A folder name that tells the overrides, shortened by a digest where it would be too long for a file system."""
    if not overrides:
        return preset
    text = ",".join(f"{name}={value}" for name, value in sorted(overrides.items()))
    safe = "".join(c if c.isalnum() or c in "=,.-_" else "_" for c in text)
    if safe != text or len(safe) > 80:
        safe = f"{safe[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return f"{preset}+{safe}"


def check_command_line(words):
    """Where `words` (the interpreter's own) run a unit as a module, read its flags before the unit is imported.

    `Config` and `PRESETS` hold literals only (a test sees to it), so they can be taken from the source alone.
    """
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    path = ROOT / "course" / f"{module.removeprefix('course.')}.py"
    if not module.startswith("course.") or "." in module.removeprefix("course.") or "__" in path.stem:
        return
    if not path.exists() and not path.with_suffix("").is_dir():
        cli(lambda argv: _name_in_full(module), [])
    if not path.exists():
        return
    stub = outline(module, path)
    if hasattr(stub, "Config"):
        cli(lambda argv: parse(stub.Config, stub.PRESETS, argv, unit=module), words[words.index("-m") + 2 :])


def _name_in_full(module):
    from course.core import catalogue

    unit = catalogue.find(module, catalogue.units())  # an InputError with the nearest names where there is none
    raise InputError(f"{module} is short for course.{unit.name}: python -m course.{unit.name}")


def outline(module, path):
    """A module object with a unit's docstring, REFERENCE, Config and PRESETS, and nothing of it imported.

    While it is being read it stands in `sys.modules`, where tyro looks for the comments that become help texts.
    """
    tree = ast.parse(path.read_text(), str(path))
    docstring = ast.get_docstring(tree)
    wanted = {"Config", "PRESETS", "REFERENCE"}
    tree.body = [
        node
        for node in tree.body
        if (isinstance(node, ast.ClassDef) and node.name in wanted)
        or (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in wanted)
    ]
    stub = types.ModuleType(f"{module}:outline", docstring)
    stub.__file__ = str(path)
    stub.dataclasses = dataclasses
    sys.modules[stub.__name__] = stub
    exec(compile(tree, str(path), "exec"), stub.__dict__)  # our own source, literals only
    return stub


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What `run` hands to a unit."""

    folder: Path
    record: dict[str, Any]
    strategy: Any
    seconds_before: float = 0.0  # of the sittings that were interrupted
    started: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def seconds(self):
        """Seconds of work so far, those before an interruption included, the pause between not."""
        return self.seconds_before + time.perf_counter() - self.started

    def checkpoint(self, model, name="model", **objects):
        """A Keras callback that saves `model` each epoch and has already restored it; see `core.Checkpoint`."""
        from course.core.checkpoint import Checkpoint

        return Checkpoint(self.folder / "checkpoints" / name, model, **objects)

    def once(self, name, function):
        """`function()`, computed once: an interrupted run finds the (JSON) answer in its folder and goes on.

        For experiments of several arms, each a call: after a kill only the arm that was running is lost.
        """
        path = self.folder / "stages" / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        answer = json.loads(to_json(function()))
        files.write_atomic(path, to_json(answer))
        note_time()
        return answer

    def figure(self, name, figure):
        """Save a matplotlib figure as `figures/<name>.png`, list it in the record, and free it."""
        from course.core import plots

        with files.atomic_path(self.picture(f"{name}.png")) as temporary:
            figure.savefig(temporary, dpi=110, bbox_inches="tight")
        plots.close(figure)

    def picture(self, name):
        """The path of a picture file of the run, "<name>.png" or the film "<name>.gif", listed in the record as one."""
        if name not in self.record["figures"]:
            self.record["figures"].append(name)
        return files.make_folder(self.folder / "figures") / name


def alone(options):
    """`options` with one device and float32 in place of "auto", and of all else, which a line then says.

    For units of many small networks, or of small differences of large values: where a step takes less than adding up
    gradients over devices would, and 16 bits would leave little of a temporal-difference error.
    """
    for name, kept in (("strategy", "one"), ("precision", "float32")):
        if (asked := getattr(options, name)) not in ("auto", kept):
            print(f"this unit stays on one device in float32: --{name} {asked} is not used")
    return dataclasses.replace(options, strategy="one", precision="float32")


_running = []  # the runs whose block is open, the innermost last


def note_time():
    """Keep how long the open runs have worked, so that an interrupted one counts on: called with all that is saved."""
    for run in _running:
        files.write_atomic(run.folder / "elapsed.json", json.dumps(run.seconds))


@contextlib.contextmanager
def run(unit, options, cfg, *, scope=True, inputs=None, typed=None):
    """Seed, devices and folder for one run of `unit`; on a clean exit its `result.json` is written.

    The block runs in the strategy's scope, unless `scope` is false: then the unit enters `run.strategy.scope()` where
    it builds and trains (exporting a model works outside of it only).  `inputs`, JSON, tells the state of what the run
    reads from outside; where it has changed, an interrupted run is not continued.  `typed`: the command, where it is
    not a unit that runs.

    An interrupted run leaves its checkpoints in the folder, and the same command goes on from them; they are removed
    when the run has ended well.  Two runs cannot share a folder: the second gets an `InputError`.
    """
    folder = files.make_folder(Path(options.runs) / unit / f"{options.preset}-s{cfg.seed}")
    with _locked(folder):
        before = _continue_or_clear(folder, to_json(_what(cfg) | {"inputs": inputs}), options.fresh)
        strategy = runtime.strategy(options.strategy)  # first: it fixes the devices
        precision = runtime.precision(options.precision, options.strategy)
        runtime.seed(cfg.seed)
        record = {
            "unit": unit,
            "preset": options.preset,
            "seed": cfg.seed,
            "config": _what(cfg),
            "metrics": {},
            "figures": [],
            "replicas": strategy.num_replicas_in_sync,
            "precision": precision,
        }
        run = Run(folder, record, strategy, before)
        with strategy.scope() if scope else contextlib.nullcontext():
            _running.append(run)
            try:
                yield run
            except KeyboardInterrupt:
                print(f"\nthe run is kept in {folder}: the same command goes on from its last checkpoint")
                raise
            finally:
                _running.pop()
        record |= {
            "seconds": round(run.seconds, 1),
            "hardware": runtime.hardware(),
            "versions": runtime.versions(),
            "commit": runtime.commit(),
            "command": typed or command(unit, options, cfg),
        }
        files.write_atomic(folder / "result.json", to_json(record))
        _clear(folder)
        _show(record, folder)


def command(unit, options, cfg):
    """The shell command that repeats a run: the preset and whatever was overridden."""
    words = [f"python -m course.{unit}", f"--preset {options.preset.partition('+')[0]}", f"--seed {cfg.seed}"]
    if "+" in options.preset:
        presets = sys.modules[type(cfg).__module__].PRESETS
        base = type(cfg)(**presets[options.preset.partition("+")[0]])
        changed = _differences(base, cfg) | _differences(Options(), options)
        for name, value in changed.items():
            if name in ("seed", "preset", "runs", "fresh"):
                continue
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                values = value if isinstance(value, tuple | list) else [value]
                words.append(f"--{flag} {' '.join(shlex.quote(str(item)) for item in values)}")
    return " ".join(words)


@contextlib.contextmanager
def _locked(folder):
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another process runs in {folder}: wait for it, or give --seed or --runs") from error
        yield


def _continue_or_clear(folder, config, fresh):
    """Seconds already spent, where an interrupted run of the same setting can go on; else a clean folder and 0."""
    saved = folder / "config.json"
    elapsed = folder / "elapsed.json"
    files.sweep(folder)
    if fresh or not saved.exists() or saved.read_text() != config:
        if saved.exists() and not fresh and elapsed.exists():
            print(f"the setting or the data has changed since the interrupted run in {folder}: starting over")
        _clear(folder)
        files.write_atomic(saved, config)
    if not elapsed.exists():
        return 0.0
    print(f"going on with the interrupted run in {folder}")
    return float(json.loads(elapsed.read_text()))


def _clear(folder):
    (folder / "config.json").unlink(missing_ok=True)  # first: without it a half-cleared folder is cleared again
    for name in ("checkpoints", "stages"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "elapsed.json").unlink(missing_ok=True)


def _show(record, folder):
    """The run's metrics as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in record["metrics"].items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console = Console()
    console.print(f"{record['unit']}, preset {record['preset']}, seed {record['seed']}", soft_wrap=True)
    console.print(table)
    console.print(f"{record['seconds']:.0f} s; record and figures in {folder}", soft_wrap=True)


def to_json(value):
    """JSON text with NumPy's scalars and arrays as numbers and lists, and non-finite numbers as null."""

    def plain(value):
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if hasattr(value, "tolist"):  # NumPy's and TensorFlow's
            return plain(value.tolist())
        if isinstance(value, Path):
            return str(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), indent=1) + "\n"
