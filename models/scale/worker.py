"""A unit's training in several processes: what each of them does, and what starts, kills and compares them."""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
from pathlib import Path

import tensorflow as tf

from course.core import Checkpoint, InputError, data, experiment, runtime
from models.scale import cluster, replicas

EPOCHS = 6  # of `cfg.steps` steps, that workers train to be compared


# --- one of several --------------------------------------------------------------------------------------------------


def work(unit, options, cfg, train, asynchronous):
    """What a process that TF_CONFIG gives a part does under `options.strategy`; the record in the chief, else None.

    The chief writes checkpoint and record, in the folder `options.runs`, which all must see.  Under "multiworker" it is
    `train(strategy, cfg, parts, restore, chief=)` in all of them, under "parameter_server"
    `asynchronous(strategy, cfg, parts)` in the chief; both give model, losses and more.  Exits with status 1 where
    another worker has died.
    """
    task = runtime.cluster_task(options.strategy)
    with contextlib.ExitStack() as stack:
        if chief := runtime.is_chief(task):
            run = stack.enter_context(experiment.run(unit, options, cfg, scope=False))
            strategy = run.strategy
        else:
            strategy = runtime.strategy(options.strategy)  # beside parameter servers this serves, and never returns
            runtime.precision(options.precision, options.strategy)
        images = data.load(cfg.data, stand_in=cfg.stand_in)
        parts = data.three_way(images, cfg.train, cfg.val, cfg.test)
        if options.strategy == "multiworker":
            folder = Path(options.runs) / unit / f"{options.preset}-s{cfg.seed}" / "checkpoints" / "model"
            try:
                restore = functools.partial(_restore, strategy, folder)
                model, curve, speed = train(strategy, cfg, parts, restore, chief=chief)
                shards = {policy: seen(strategy, policy) for policy in ("DATA", "OFF")}
            except (tf.errors.UnavailableError, tf.errors.AbortedError) as error:
                # no setting is to blame: exit status 1, by which whoever watches knows that a restart mends it
                raise SystemExit(
                    "another worker is gone: start all again, and they go on from the last epoch"
                ) from error
        else:
            model, curve, *_ = asynchronous(strategy, cfg, parts)
            speed, shards = {}, {}
        if chief:
            run.record |= {"data": images.provenance, "history": {"loss": curve}, "shards": shards}
            accuracy = replicas.accuracy(model, parts.x_test, parts.y_test)
            run.record["metrics"] = {"test_accuracy": accuracy, "last_loss": curve[-1], **speed}
    return run.record if chief else None


def _restore(strategy, folder, model, optimizer):
    """The checkpoint in `folder`, which this process has restored; `InputError` where another found another."""
    resume = Checkpoint(folder, model, optimizer=optimizer)
    found = set(strategy.gather(tf.constant([resume.epoch]), axis=0).numpy())
    if len(found) > 1:
        raise InputError("the workers find different checkpoints: --runs must be a folder that all of them share")
    return resume


def seen(strategy, policy):
    """Of the examples 0..7 in two batches of four, those that each worker gets under an auto-shard policy, in order."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = getattr(tf.data.experimental.AutoShardPolicy, policy)
    stream = strategy.experimental_distribute_dataset(tf.data.Dataset.range(8).batch(4).with_options(options))
    mine = tf.concat([part for batch in stream for part in strategy.experimental_local_results(batch)], axis=0)
    return strategy.gather(mine, axis=0).numpy().reshape(-1, len(mine)).tolist()


# --- all of them -----------------------------------------------------------------------------------------------------


def in_processes(unit, folder, options, cfg, workers, *, strategy="multiworker", servers=0, kill=False):
    """Run `unit`, which calls `work`, with setting `cfg` as a cluster -> its chief's record, with "restarts".

    Each worker has one thread for its operations and, where there are GPUs, one of them.  `kill`: the last worker is
    killed once the first epoch has been saved.  `folder` is emptied first.  All compute in float32: in 16 bits rounding
    would hide whether their curves are one.
    """
    shutil.rmtree(folder, ignore_errors=True)
    gpus, killed = len(tf.config.list_physical_devices("GPU")), []
    words = [f"--preset={options.preset.partition('+')[0]}", "--precision=float32"]
    words += [f"--strategy={strategy}", f"--runs={folder}"]
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value not in ("", ()):  # no words of a flag
            several = value if isinstance(value, tuple) else (value,)
            words += [f"--{field.name.replace('_', '-')}", *several]

    def environment(job, index):
        visible = {"CUDA_VISIBLE_DEVICES": str(index) if job == "worker" else "-1"} if gpus else {}
        return {"TF_NUM_INTRAOP_THREADS": "1", "OMP_NUM_THREADS": "1"} | visible

    def meanwhile(processes):
        if kill and not killed and list(folder.rglob("state.npz")):
            os.kill(processes["worker", workers - 1].pid, signal.SIGKILL)
            killed.append(True)

    done = cluster.launch(f"course.{unit}", words, workers, parameter_servers=servers, log_folder=folder / "logs",
                          environment=environment, meanwhile=meanwhile)  # fmt: skip
    (path,) = folder.rglob("result.json")
    return json.loads(path.read_text()) | {"restarts": done.restarts}


def compare(run, unit, options, cfg, parts, train):
    """The same training in one process, in several, and in several of which one is killed: rows, curves, metrics.

    Rows are of speed.  The network has group normalisation: all curves but the parameter server's should be one.  The
    processes have one thread each; how far this one, with all of its threads, comes from them is the metric
    "threads_difference": with the number of threads the order of every sum changes, on one device too.
    """
    if not cfg.processes:
        return [], {}, {}
    counts = replicas.possible(sorted({1, *cfg.processes}))
    own = dataclasses.replace(cfg, depth=cfg.small_depth, norm="group", lr=cfg.lr / 10, warm_up=1, epochs=EPOCHS,
                              train=cfg.batch * cfg.steps)  # fmt: skip
    cut = dataclasses.replace(parts, x_train=parts.x_train[: own.train], y_train=parts.y_train[: own.train])
    restore = functools.partial(replicas.restore, run, "all threads")
    here = run.once("all threads", lambda: train(tf.distribute.get_strategy(), own, cut, restore)[1])
    curves, rows, metrics = {}, [], {}

    def launched(name, count, **how):
        folder = run.folder / "workers" / name
        return run.once(name, lambda: in_processes(unit, folder, options, own, count, **how))

    def speed(strategy, record):
        figures = {key: value for key, value in record["metrics"].items() if key not in ("test_accuracy", "last_loss")}
        rows.append({"strategy": strategy, **figures})

    for count in counts:
        record = launched(name := f"processes, {count}", count)
        speed(f"multiworker, {count}", record)
        curves[name] = record["history"]["loss"]
    one = curves["processes, 1"]
    metrics["processes_difference"] = max(replicas.difference(curve, one) for curve in curves.values())
    metrics["threads_difference"] = replicas.difference(here, one)
    killed = launched(f"{name}, one killed", count, kill=True)
    speed(f"multiworker, {count}, restarted", killed)
    curves[f"{name}, one killed"] = killed["history"]["loss"]
    metrics |= {
        "killed_difference": replicas.difference(killed["history"]["loss"], curves[name]),
        "restarts": killed["restarts"],
    }
    free = launched("parameter server", count, strategy="parameter_server", servers=1)["history"]["loss"]
    curves["parameter server"] = [sum(part) / len(part) for part in zip(*[iter(free)] * cfg.steps, strict=True)]
    run.record["shards"] = record["shards"]
    return replicas.efficiency(rows), curves, metrics
