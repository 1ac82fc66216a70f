"""Devices, precision and seed: the one place that knows what the machine has.

TensorFlow is imported inside the functions: the catalogue and `--help` use this module and must not wait for it.
"""

import importlib.abc
import importlib.util
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

from course.core.errors import InputError

STRATEGIES = ("auto", "one", "mirrored", "mirrored:N")
PRECISIONS = ("auto", "float32", "mixed_float16", "mixed_bfloat16")


def environment():
    """Set the process's flags, where the user has not; must run before TensorFlow is imported."""
    for name, value in {
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",  # fatal only: what fails in C++ reaches Python as an exception anyway
        "TF_FORCE_GPU_ALLOW_GROWTH": "true",  # share a GPU with the serving process of the same lesson
        "MPLBACKEND": "Agg",  # figures are files; a notebook has set its own backend by now
        "GRPC_VERBOSITY": "ERROR",
        "GRADIO_ANALYTICS_ENABLED": "False",
    }.items():
        os.environ.setdefault(name, value)
    # `core.data.batches` shuffles by itself; Keras remarks on it at every `fit`
    warnings.filterwarnings("ignore", message=r"`shuffle=True` was passed, but will be ignored")
    # a lesson that compares networks traces each of them: TensorFlow takes them for one function called in a wrong way
    logging.getLogger("tensorflow").addFilter(lambda record: "function retracing" not in record.getMessage())
    if "tensorflow" not in sys.modules and not any(isinstance(finder, _QuietStart) for finder in sys.meta_path):
        sys.meta_path.insert(0, _QuietStart())


class _QuietStart(importlib.abc.MetaPathFinder):
    """Imports TensorFlow without the notes that its C++ libraries write before they have read any flag.

    They go straight to file descriptor 2, so it is held back during the import; whatever else was written comes out
    afterwards, and everything does where the import fails.
    """

    NOTES = re.compile(r"WARNING: All log messages before absl|I0000 .*(port|cudart_stub|cpu_feature_guard)\.cc")

    def find_spec(self, name, path=None, target=None):
        if name != "tensorflow":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: self._held_back(load, module)
        return spec

    def _held_back(self, load, module):
        failed = True
        sys.stderr.flush()
        original = os.dup(2)
        with tempfile.TemporaryFile("w+", errors="replace") as held:
            os.dup2(held.fileno(), 2)
            try:
                load(module)
                failed = False
            finally:
                sys.stderr.flush()
                os.dup2(original, 2)
                os.close(original)
                held.seek(0)
                sys.stderr.writelines(line for line in held if failed or not self.NOTES.match(line))


def seed(value):
    """Seed Python, NumPy and Keras (hence every initialiser, dropout and augmentation layer) with one number."""
    import keras

    keras.utils.set_random_seed(value)


def strategy(name="auto"):
    """The `tf.distribute.Strategy` that `name` asks for.

    "one": a single device.  "mirrored": synchronous copies on all GPUs.  "mirrored:N": on N GPUs, or, where there are
    none, on N logical CPU devices, which share the cores: correct, not faster.  "auto": mirrored on several GPUs, else
    one.  Raises `InputError` for another name, or when the devices were already fixed by an earlier operation.
    """
    import tensorflow as tf

    match = re.fullmatch(r"auto|one|mirrored(?::(\d+))?", name)
    if not match or match[1] == "0":
        raise InputError(f"--strategy {name} is not known: choose one of {', '.join(STRATEGIES)}")
    gpus = tf.config.list_physical_devices("GPU")
    if name == "one" or (name == "auto" and len(gpus) < 2):
        return tf.distribute.get_strategy()  # TensorFlow's default: no replication, no overhead
    replicas = int(match[1] or len(gpus) or 1)
    if gpus:
        if replicas > len(gpus):
            raise InputError(f"--strategy {name} needs {replicas} GPUs and this machine has {len(gpus)}")
        return tf.distribute.MirroredStrategy([f"GPU:{i}" for i in range(replicas)])
    _split_cpu(replicas)
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


def _split_cpu(count):
    """Make `count` logical devices of the CPU, so that replication can be run, and tested, without a GPU."""
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    have = tf.config.get_logical_device_configuration(cpu)
    if have and len(have) >= count:
        return
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError as error:  # TensorFlow fixes its devices at the first operation
        raise InputError(
            f"{count} logical CPU devices were asked for after TensorFlow had started: "
            "choose the strategy before anything is computed"
        ) from error


def precision(name="auto"):
    """Set Keras's global dtype policy and return its name.

    "auto" is mixed_float16 on GPUs with tensor cores (compute capability 7.0 and above) and float32 elsewhere.
    Mixed policies compute in 16 bits and keep variables in float32; Keras wraps the optimizer in loss scaling for
    mixed_float16 at `compile`.  Raises `InputError` for another name.
    """
    import keras
    import tensorflow as tf

    if name not in PRECISIONS:
        raise InputError(f"--precision {name} is not known: choose one of {', '.join(PRECISIONS)}")
    if name == "auto":
        gpus = tf.config.list_physical_devices("GPU")
        capable = gpus and all(
            tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0)) >= (7, 0) for gpu in gpus
        )
        name = "mixed_float16" if capable else "float32"
    keras.config.set_dtype_policy(name)
    return name


def jit():
    """Whether `compile(jit_compile=...)` pays here: XLA fuses well on a GPU; on CPUs its convolutions are slower
    than oneDNN's, which TensorFlow uses by itself."""
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def versions():
    """Version of Python and of every library that a result may depend on."""
    libraries = ("tensorflow", "keras", "numpy", "scikit-learn", "ai-edge-litert", "gymnasium")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in libraries}


def hardware():
    """What the result was computed on: processor, usable cores, memory in GiB, GPUs by name."""
    import psutil
    import tensorflow as tf

    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    gpus = [tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
            for gpu in tf.config.list_physical_devices("GPU")]  # fmt: skip
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
    }


def commit():
    """The checked-out commit, with "+changes" where tracked files differ from it; None outside a checkout."""
    root = Path(__file__).parents[2]

    def git(*words):
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
