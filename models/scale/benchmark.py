"""Images a second and peak memory of a training step, in 32 and in 16 bits, with XLA and without, at several widths.

    python -m models.scale.benchmark                        on what TensorFlow finds
    python -m models.scale.benchmark --backend jax          the same Keras models on JAX, where only that has the GPU

Each setting is measured in a fresh process, by Keras's `fit`, whose mixed_float16 scales the loss; so memory is that
setting's alone, and the first epoch, which compiles, does not count.  Images are noise, uint8, handed over each step.
Tensor cores multiply tiles of 8 (16-bit numbers): widths that are no multiple of 8 show what that costs.
"""

import dataclasses
import importlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from course.core import InputError, cli, files, flags, runtime
from course.core.experiment import to_json

POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")
NETWORKS = ("day04", "day10")
BACKENDS = ("tensorflow", "jax")
ROOT = Path(__file__).parents[2]


@dataclasses.dataclass
class Benchmark:
    """What to measure, and for how long."""

    backend: str = "tensorflow"  # of Keras: tensorflow or jax
    networks: tuple[str, ...] = NETWORKS  # of day04 (plain) and day10 (residual)
    policies: tuple[str, ...] = POLICIES  # of float32, mixed_float16 and mixed_bfloat16
    xla: tuple[bool, ...] = (False, True)  # JAX always compiles by XLA: there only True is measured
    widths: tuple[int, ...] = (16, 15, 17)  # channels of the first stage; on a GPU wider: 64 60 63 65
    depth: int = 20  # layers of day10's network: 6n + 2
    side: int = 32  # of the pictures
    batch: int = 128  # images a step
    steps: int = 20  # in a round
    rounds: int = 5  # that count; the middle one is reported
    record: str = ""  # JSON file for the rows


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row: a network under one policy, compiled or not."""

    network: str
    policy: str
    xla: bool
    width: int
    depth: int
    side: int
    batch: int
    steps: int
    rounds: int
    backend: str = "tensorflow"


# --- in a process of its own -----------------------------------------------------------------------------------------


def build(setting):
    """The network: pixels [B,side,side,3] -> logits [B,10] in float32.  The units are named at run time only."""
    shape = (setting.side, setting.side, 3)
    if setting.network == "day04":
        unit = importlib.import_module("course.day04_cnn")
        return unit.build_model(unit.Design(norm=True), setting.width, shape, 10)
    from models.scale.resnet import cifar_resnet

    return cifar_resnet(shape, 10, [127.0] * 3, [64.0**2] * 3, setting.depth, setting.width)


def flops(model):
    """FLOPs of one example forwards: 2 a multiply-add of convolutions and affine layers.

    From the shapes alone: `models.costs` reads them off TensorFlow's graph, which other backends have not.
    """
    total = 0
    for layer in model.layers:
        if (kernel := getattr(layer, "kernel", None)) is not None:
            total += 2 * math.prod(layer.output.shape[1:-1]) * math.prod(kernel.shape)
    return total


def measure(setting):
    """Train on noise and return the row: milliseconds a step, images a second, TFLOP/s, memory in MiB, device."""
    import keras
    import numpy as np

    keras.config.set_dtype_policy(setting.policy)
    keras.utils.set_random_seed(0)
    before = _resident("VmRSS")
    model = build(setting)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, jit_compile=setting.xla)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (setting.batch, setting.side, setting.side, 3), dtype=np.uint8)
    y = rng.integers(0, 10, setting.batch, dtype=np.int32)

    def batches():
        while True:
            yield x, y

    timed = _timing()
    rounds = 1 + setting.rounds  # the first compiles
    history = model.fit(batches(), steps_per_epoch=setting.steps, epochs=rounds, verbose=0, callbacks=[timed])
    last = history.history["loss"][-1]
    ms = sorted(1e3 * seconds / setting.steps for seconds in timed.seconds[1:])
    middle = ms[len(ms) // 2]
    memory, how = _memory(before)
    return dataclasses.asdict(setting) | {
        "device": device(), "ms": middle, "ms_least": ms[0], "ms_most": ms[-1],
        "images_per_second": 1e3 * setting.batch / middle,
        "tflops": 3 * flops(model) * setting.batch / middle / 1e9,  # backwards costs twice what forwards does
        "memory_mib": memory, "memory_of": how, "parameters": model.count_params(), "last_loss": last,
    }  # fmt: skip


def _timing():
    """A callback with the seconds of each epoch, at whose end `fit` has fetched the loss, so all work is done."""
    import keras

    class Timing(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.seconds = []

        def on_epoch_begin(self, epoch, logs=None):
            self.began = time.perf_counter()

        def on_epoch_end(self, epoch, logs=None):
            self.seconds.append(time.perf_counter() - self.began)

    return Timing()


def device():
    """The name of what Keras's backend computes on: the GPU's, or the processor's."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        found = jax.devices()[0]
        name = found.device_kind if found.platform != "cpu" else ""
    else:
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", gpus[0].name) if gpus else ""
    if name:
        return name
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{models[0] if models else 'CPU'}, {len(os.sched_getaffinity(0))} cores"


def _resident(what):
    """Bytes of memory that this process holds ("VmRSS") or held at most ("VmHWM"); None where Linux does not tell.

    `ru_maxrss` is no use here: a fresh process inherits the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return 1024 * int(dict(row.split(":", 1) for row in status.read_text().splitlines())[what].split()[0])


def _memory(before):
    """Peak MiB of training, and what was asked: the device's allocator, or on a CPU the process's resident memory."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        found = jax.devices()[0].memory_stats()
        if found:
            return found["peak_bytes_in_use"] / 2**20, "peak of the device's allocator"
    else:
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**20, "peak of the device's allocator"
    if before is None:
        return None, "not known on this system"
    return (_resident("VmHWM") - before) / 2**20, "peak of the process's resident memory, less that before the network"


# --- around it -------------------------------------------------------------------------------------------------------


def in_a_process(setting):
    """`measure(setting)` in a fresh process.  Raises `InputError` with its last line where it fails."""
    words = [sys.executable, "-m", "models.scale.benchmark", "--child", json.dumps(dataclasses.asdict(setting))]
    env = os.environ | {"KERAS_BACKEND": setting.backend, "TF_FORCE_GPU_ALLOW_GROWTH": "true",
                        "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # fmt: skip
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"it ended with {done.returncode}"]
        raise InputError(
            f"{setting.network}, {setting.policy}, width {setting.width} on {setting.backend}: {lines[-1]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def settings(options):
    """The rows that `options` ask for, in order.  Raises `InputError` for what is not known or cannot be measured."""
    for name, known in (("networks", NETWORKS), ("policies", POLICIES)):
        if unknown := set(getattr(options, name)) - set(known):
            raise InputError(f"--{name} {', '.join(sorted(unknown))}: choose from {', '.join(known)}")
    if options.backend not in BACKENDS:
        raise InputError(f"--backend {options.backend} is not known: choose one of {', '.join(BACKENDS)}")
    for name in ("depth", "side", "batch", "steps", "rounds"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)} cannot be used: give a number of at least 1")
    if min(options.widths, default=0) < 1:
        raise InputError(f"--widths {options.widths}: give one or more numbers of at least 1")
    compiled = (True,) if options.backend == "jax" else tuple(dict.fromkeys(options.xla))
    return [
        Setting(network, policy, xla, width, options.depth, options.side, options.batch, options.steps, options.rounds,
                options.backend)
        for network in options.networks for width in options.widths for policy in options.policies for xla in compiled
    ]  # fmt: skip


def gains(rows):
    """Each row with `speed_up` and `memory_share`: against float32 of the same network, width and compilation.

    None where that was not measured.
    """
    same = ("network", "width", "xla", "backend", "batch", "side", "depth")
    base = {tuple(row[name] for name in same): row for row in rows if row["policy"] == "float32"}
    found = []
    for row in rows:
        plain = base.get(tuple(row[name] for name in same))
        found.append(row | {"speed_up": plain["ms"] / row["ms"] if plain else None,
                            "memory_share": row["memory_mib"] / plain["memory_mib"] if plain and row["memory_mib"]
                            else None})  # fmt: skip
    return found


def line(row):
    """A row as text for the terminal."""
    faster = "" if row["speed_up"] is None else f"  x {row['speed_up']:.2f}"
    return (f"{row['network']}  width {row['width']:<4} {row['policy']:<15} {'XLA' if row['xla'] else '   '}"
            f"  {row['ms']:9.2f} ms  {row['images_per_second']:10.0f} images/s  {row['tflops']:7.2f} TFLOP/s"
            f"  {row['memory_mib'] or math.nan:8.0f} MiB{faster}")  # fmt: skip


def markdown(record):
    """A record as the table of a README."""
    first, versions = record["rows"][0], record["versions"]
    by = f"Keras {versions['keras']} on {record['backend']} {versions[record['backend']]}"
    lines = [
        f"{', '.join(record['devices'])}; {by}; {first['batch']} images of {first['side']} x {first['side']} a step.",
        f"`{record['command']}`",
        "",
        "| network | width | policy | XLA | ms | images/s | TFLOP/s | MiB | times float32's speed | of its memory |",
        "|---" * 10 + "|",
    ]
    for row in record["rows"]:
        cells = (
            row["network"], row["width"], row["policy"], "yes" if row["xla"] else "no", f"{row['ms']:.1f}",
            f"{row['images_per_second']:,.0f}", f"{row['tflops']:.3g}", _number(row["memory_mib"], ",.0f"),
            _number(row["speed_up"], ".2f"), _number(row["memory_share"], ".0%"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", f"Memory is the {first['memory_of']}."])


def _number(value, form):
    return "" if value is None else f"{value:{form}}"


def _versions():
    found = {}
    for name in ("keras", "tensorflow", "jax", "jaxlib", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def run(options):
    """Measure every setting, print a line each, and return {"rows", "versions", "devices", "backend"}."""
    rows = []
    for setting in settings(options):
        rows.append(in_a_process(setting))
        print(line(gains(rows)[-1]), flush=True)
    return {"backend": options.backend, "devices": sorted({row["device"] for row in rows}), "versions": _versions(),
            "rows": gains(rows)}  # fmt: skip


def main(argv):
    if argv[:1] == ["--child"]:
        print(json.dumps(measure(Setting(**json.loads(argv[1])))))
        return
    options = flags.read(Benchmark(), argv, prog="python -m models.scale.benchmark", description=__doc__)
    found = run(options)
    if options.record:
        found |= {"command": shlex.join(["python", "-m", "models.scale.benchmark", *argv]), "commit": runtime.commit()}
        files.write_atomic(Path(options.record), to_json(found))
        print(f"record: {options.record}")


if __name__ == "__main__":
    cli(main)
