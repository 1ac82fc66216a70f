"""Devices, precision and seed: the one place that knows what the machine has.

TensorFlow is imported inside the functions: the catalogue and `--help` use this module and must not wait for it.
"""

import contextlib
import importlib.abc
import importlib.util
import json
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

STRATEGIES = ("auto", "one", "mirrored", "mirrored:N", "central", "central:N", "multiworker", "parameter_server", "tpu")
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
    one.  "central", "central:N": as mirrored, but the variables stand once, on the CPU; Keras 3's batch normalisation
    is refused there by TensorFlow, other layers are not.  "tpu": the machine's TPU, or the one that TPU_NAME names.

    Two read the environment variable TF_CONFIG, the same in each process but for its task.  "multiworker": synchronous
    copies in several processes; for loops written by hand, as Keras 3's `fit` fails with it.  "parameter_server":
    asynchronous; in the chief it returns, for `tf.distribute.coordinator.ClusterCoordinator`; in a worker or parameter
    server it serves until the process is ended, and does not return.

    Raises `InputError` for another name, where what it needs is not there, or when the devices were already fixed by
    an earlier operation.
    """
    import tensorflow as tf

    match = re.fullmatch(r"(auto|one|multiworker|parameter_server|tpu)|(mirrored|central)(?::([1-9]\d*))?", name)
    if not match:
        raise InputError(f"--strategy {name} is not known: choose one of {', '.join(STRATEGIES)}")
    gpus = len(tf.config.list_physical_devices("GPU"))
    if name == "one" or (name == "auto" and gpus < 2):
        return tf.distribute.get_strategy()  # TensorFlow's default: no replication, no overhead
    if name in ("multiworker", "parameter_server"):
        task = cluster_task(name)
        return _multiworker() if name == "multiworker" else _parameter_server(task)
    if name == "tpu":
        return _tpu()
    count = int(match[3] or gpus or 1)
    if gpus and count > gpus:
        raise InputError(f"--strategy {name} needs {count} GPUs and this machine has {gpus}")
    places = devices(count)
    if match[2] == "central":
        return tf.distribute.experimental.CentralStorageStrategy(places, "CPU:0")
    # TensorFlow's own choice, collective operations, can wait for each other for ever on logical CPU devices where a
    # layer reduces too (synchronised batch normalisation does)
    reduction = None if gpus else tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy(places, cross_device_ops=reduction)


def devices(count):
    """Names of `count` devices: GPUs, where there are as many, or else logical devices that share the CPU.

    Raises `InputError` when the CPU would have to be split after TensorFlow has started.
    """
    import tensorflow as tf

    if len(tf.config.list_physical_devices("GPU")) >= count:
        return [f"GPU:{i}" for i in range(count)]
    _split_cpu(count)
    return [f"CPU:{i}" for i in range(count)]


def _split_cpu(count):
    """Make `count` logical devices of the CPU, so that replication can be run, and tested, without a GPU."""
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    have = tf.config.get_logical_device_configuration(cpu)
    if count <= len(have or [cpu]):
        return
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError as error:  # TensorFlow fixes its devices at the first operation
        raise InputError(
            f"{count} logical CPU devices were asked for after TensorFlow had started: "
            "choose the strategy before anything is computed"
        ) from error


# The jobs that a cluster of each strategy is made of: those it must have, and those it may
JOBS = {"multiworker": ({"worker"}, {"chief"}), "parameter_server": ({"chief", "worker", "ps"}, set())}


def cluster_task(name):
    """This process's part in the cluster of TF_CONFIG, as (job, index): ("worker", 1).

    name: "multiworker" or "parameter_server", the strategy that the cluster is for.  Raises `InputError` where
    TF_CONFIG is missing, is no JSON of the documented form, or describes a cluster of another strategy.
    """
    text = os.environ.get("TF_CONFIG", "")
    form = '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
    if not text.strip():
        raise InputError(f"--strategy {name} needs the environment variable TF_CONFIG: {form}")
    try:
        config = json.loads(text)
        cluster, task, index = config["cluster"], config["task"]["type"], config["task"]["index"]
        index = int(index)
        addresses = {job: [re.fullmatch(r"[^:\s]+:\d+", address)[0] for address in cluster[job]] for job in cluster}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"TF_CONFIG cannot be read ({error!r}): it has the form {form}") from error
    needed, possible = JOBS[name]
    found = {job for job in addresses if addresses[job]}
    if not needed <= found <= needed | possible:
        raise InputError(f"TF_CONFIG: a cluster of {', '.join(sorted(found)) or 'nothing'} is not one for --strategy "
                         f"{name}, which needs {', '.join(sorted(needed))}")  # fmt: skip
    if task not in found or not 0 <= index < len(addresses[task]):
        raise InputError(f"TF_CONFIG: the cluster has no task {task} {index}")
    return task, index


def is_chief(task):
    """Whether the process that is `task`, (job, index), writes what the cluster writes once."""
    return task[0] == "chief" or (
        task == ("worker", 0) and not json.loads(os.environ["TF_CONFIG"])["cluster"].get("chief")
    )


def _multiworker():
    import tensorflow as tf

    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        raise InputError(
            f"--strategy multiworker must be chosen before anything is computed, and all tasks must come: {error}"
        ) from error


def _parameter_server(task):
    import tensorflow as tf

    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    if task[0] == "chief":
        return tf.distribute.ParameterServerStrategy(resolver)
    server = tf.distribute.Server(resolver.cluster_spec(), job_name=task[0], task_index=task[1], protocol="grpc")
    return server.join()  # never returns


def _tpu():
    import tensorflow as tf

    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=os.environ.get("TPU_NAME", "local"))
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        raise InputError(f"--strategy tpu: no TPU answers ({str(error).splitlines()[0]})") from error
    return tf.distribute.TPUStrategy(resolver)


def precision(name="auto", strategy="auto"):
    """Set Keras's global dtype policy and return its name; `strategy`: the name of the one that is used with it.

    "auto" is mixed_float16 on GPUs with tensor cores (compute capability 7.0 and above) and float32 elsewhere.
    Mixed policies compute in 16 bits and keep variables in float32; Keras wraps the optimizer in loss scaling for
    mixed_float16 at `compile`.  Raises `InputError` for another name, and for mixed_float16 with "central" and
    "parameter_server": TensorFlow refuses to update the loss scale there ("auto" is float32).
    """
    import keras
    import tensorflow as tf

    if name not in PRECISIONS:
        raise InputError(f"--precision {name} is not known: choose one of {', '.join(PRECISIONS)}")
    unscaled = strategy.partition(":")[0] in ("central", "parameter_server")
    if name == "mixed_float16" and unscaled:
        raise InputError(
            f"--precision mixed_float16 cannot be had with --strategy {strategy}, which does not keep a loss scale: "
            "choose mixed_bfloat16 or float32"
        )
    if name == "auto":
        gpus = tf.config.list_physical_devices("GPU")
        capable = gpus and all(
            tf.config.experimental.get_device_details(gpu).get("compute_capability", (0, 0)) >= (7, 0) for gpu in gpus
        )
        name = "mixed_float16" if capable and not unscaled else "float32"
    keras.config.set_dtype_policy(name)
    return name


@contextlib.contextmanager
def policy(name):
    """Layers that are made in the block compute as the dtype policy `name` says, whatever `precision` has set."""
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


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


def scaled(optimizer, **options):
    """`optimizer` in Keras's dynamic loss scaling where the policy is mixed_float16; else as it is.

    For custom loops, on every policy alike: differentiate `optimizer.scale_loss(loss)`, give `optimizer.apply` the
    gradients as they come; and for `fit` on several replicas, to be compiled with.  By itself `fit` scales as well, but
    Keras asks the first replica alone whether its gradients are finite, and with them an inf of another one reaches
    the weights; here a step counts as finite where it is so on all.  `options`: `initial_scale`,
    `dynamic_growth_steps` of `keras.optimizers.LossScaleOptimizer`.  An optimizer that has a `loss_scale_factor`, a
    fixed scale, keeps it.
    """
    import keras
    import tensorflow as tf

    scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer) or optimizer.loss_scale_factor
    if keras.config.dtype_policy().name != "mixed_float16" or scales:
        return optimizer
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer, **options)
    if tf.distribute.get_strategy().num_replicas_in_sync > 1:
        on_this_replica = optimizer.check_finite

        def on_all(gradients):
            spoilt = tf.cast(tf.logical_not(on_this_replica(gradients)), tf.float32)
            context = tf.distribute.get_replica_context()
            return tf.equal(context.all_reduce(tf.distribute.ReduceOp.SUM, spoilt), 0)

        optimizer.check_finite = on_all
    return optimizer
