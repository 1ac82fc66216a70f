"""A cluster of real processes on one machine, watched: what Kubernetes or Slurm does for one of several machines."""

import contextlib
import ctypes
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from course.core import InputError, files

ROOT = Path(__file__).parents[2]
LOOK = 0.1  # seconds between two looks at the processes
GRACE = 5.0  # seconds that a process has to end by itself before it is killed
PORTS = range(20_000, 32_000)  # below those that the kernel gives to outgoing connections
LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec nothing may be


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a launch went: seconds from first start to last end, times that a dead task was started again, log files."""

    seconds: float
    restarts: int
    logs: dict


def launch(module, arguments, workers, *, parameter_servers=0, log_folder, restarts=3, environment=None,
           meanwhile=None, limit=None):  # fmt: skip
    """Run `python -m module *arguments` as a cluster of `workers` processes and wait for their end -> `Finished`.

    Each process has its part in TF_CONFIG, addresses on free local ports, and its own log in `log_folder`
    ("worker-0.log"); the first one's lines are printed as they come.  With `parameter_servers` there are a chief, which
    is worker 0's better half and coordinates, the workers and the servers; the launch ends when the chief does.

    A process that a signal ends is started again, at most `restarts` times in all.  Copies in step cannot go on with
    one missing: they all start again, from their checkpoint.  Beside parameter servers a dead worker starts alone, and
    the chief gives its work to another meanwhile; a dead chief or server takes all with it.

    environment: further variables, a dict, or a function of (job, index) that returns one.  meanwhile: called at each
    look with {(job, index): its `Popen`}.  limit: seconds after which it is given up.  Raises `InputError` where a
    process ends with an error of its own, dies too often, or the limit is over; then, and at Ctrl-C, all are ended.
    """
    jobs = {"chief": 1, "worker": workers, "ps": parameter_servers} if parameter_servers else {"worker": workers}
    tasks = [(job, index) for job, count in jobs.items() for index in range(count)]
    folder = files.make_folder(log_folder)
    logs = {task: folder / f"{task[0]}-{task[1]}.log" for task in tasks}
    for log in logs.values():
        log.write_bytes(b"")
    command = [sys.executable, "-m", module, *map(str, arguments)]
    running, began, restarted, printed = {}, time.monotonic(), 0, 0

    def start(which):
        for task in which:
            more = environment(*task) if callable(environment) else environment or {}
            running[task] = _process(command, {"TF_CONFIG": _config(cluster, task)} | more, logs[task])

    try:
        cluster = addresses(jobs)
        start(tasks)
        while True:
            time.sleep(LOOK)
            printed = _print_from(logs[tasks[0]], printed)
            if meanwhile:
                meanwhile(dict(running))
            ended = {task: code for task, process in running.items() if (code := process.poll()) is not None}
            if all(ended.get(task) == 0 for task in (tasks[:1] if parameter_servers else tasks)):
                return Finished(time.monotonic() - began, restarted, logs)
            if limit and time.monotonic() - began > limit:
                raise InputError(f"{module} has not ended within {limit:g} s: see the logs in {folder}")
            dead = _dead(ended, logs, parameter_servers)
            if not dead:
                continue
            what = ", ".join(f"{job} {index} ({signal.Signals(-ended[job, index]).name})" for job, index in dead)
            if restarted == restarts:
                raise InputError(f"{module}: {what} died, after {restarts} restarts: see the logs in {folder}")
            restarted += 1
            alone = parameter_servers and {job for job, _ in dead} == {"worker"}
            print(f"{what} died: {'it starts' if alone else 'all start'} again ({restarted} of {restarts})", flush=True)
            if not alone:
                _end(running.values())
                cluster = addresses(jobs)  # the old ports may be in use for a while yet
            start(dead if alone else tasks)
    finally:
        _end(running.values())
        _print_from(logs[tasks[0]], printed)


def _dead(ended, logs, parameter_servers):
    """Of the processes that ended, {task: exit code}, those that a signal did; `InputError` for an error of their own.

    When one dies, those that wait for it fail or abort soon after, and may have by now: what counts is the cause.
    """
    killed = [task for task, code in ended.items() if code < 0 and code != -signal.SIGABRT]
    failed = [task for task, code in ended.items() if code > 0 or (code == 0 and parameter_servers)]
    if failed and not killed:
        (job, index), code = failed[0], ended[failed[0]]
        lines = logs[job, index].read_text(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "it wrote nothing").strip()
        raise InputError(f"{job} {index} ended with status {code}: {said[:300]} (all of it in {logs[job, index]})")
    return killed or [task for task, code in ended.items() if code < 0]


def addresses(jobs):
    """Free local addresses for a cluster: {job: how many} -> {job: ["localhost:port", ...]}."""
    with contextlib.ExitStack() as held:  # until all are found, so that none is found twice
        ports = iter(random.SystemRandom().sample(PORTS, len(PORTS)))
        return {job: [f"localhost:{_free(ports, held)}" for _ in range(count)] for job, count in jobs.items()}


def _free(ports, held):
    for port in ports:
        probe = held.enter_context(socket.socket())
        with contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise InputError(f"no port between {PORTS.start} and {PORTS.stop} is free")


def _config(cluster, task):
    return json.dumps({"cluster": cluster, "task": {"type": task[0], "index": task[1]}})


def _process(command, variables, log):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | variables,
            start_new_session=True,  # Ctrl-C is for the launcher, which ends them
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )


def _die_with_parent():
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a launcher that is killed leaves nobody behind


def _end(processes):
    """End those processes that run: SIGTERM, and SIGKILL for one that has not ended `GRACE` seconds later."""
    processes = [process for process in processes if process.poll() is None]
    for process in processes:
        process.terminate()
    until = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _print_from(log, position):
    """Print what a log has beyond `position`, up to its last whole line; the position reached."""
    with log.open("rb") as file:
        file.seek(position)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    print(whole.decode(errors="replace"), end="", flush=True)
    return position + len(whole)
