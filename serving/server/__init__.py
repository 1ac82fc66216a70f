"""An embedded model server that speaks TensorFlow Serving's protocol, REST and gRPC, for one machine.

    with serve("mnist", "exports/mnist") as server:
        server.wait_available()
        requests.post(f"{server.url}/v1/models/mnist:predict", json={"instances": [...]})

`python -m serving.server --model_name mnist --model_base_path exports/mnist` is the same as a process of its own.

Read `app.py` for the REST routes, `grpc_service.py` for the gRPC calls, `manager.py` for versions, `batching.py` for
what makes it fast.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from course.core.errors import InputError
from serving.server.status import StatusError

__all__ = ["ChildServer", "Server", "StatusError", "serve", "spawn"]


@dataclass
class Server:
    """A server in this process."""

    model_name: str
    url: str
    grpc_target: str
    manager: object

    def wait_available(self, version=None, timeout=60):
        """Wait until a version (any, where None) serves; `StatusError` with its error, or when the time is up."""
        self.manager.wait_available(self.model_name, version, timeout)


@dataclass
class ChildServer:
    """A server in a process of its own."""

    model_name: str
    url: str
    grpc_target: str
    process: subprocess.Popen

    def wait_available(self, version=None, timeout=60):
        """Wait until a version (any, where None) serves; `StatusError` with its error, or when the time is up."""
        what = f"/v1/models/{quote(self.model_name, safe='')}" + ("" if version is None else f"/versions/{version}")
        deadline, failing_since = time.monotonic() + timeout, None
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise StatusError("UNAVAILABLE", f"the server process ended with status {self.process.returncode}")
            with contextlib.suppress(OSError):  # 404 until the version is found, or an answer that is late
                with urllib.request.urlopen(self.url + what, timeout=5) as response:
                    states = json.load(response)["model_version_status"]
                if any(entry["state"] == "AVAILABLE" for entry in states):
                    return
                has_failed = all(entry["state"] == "END" for entry in states)
                failing_since = (failing_since or time.monotonic()) if has_failed else None
                if has_failed and time.monotonic() - failing_since > 2:  # not at once: an older one may stand in yet
                    status = states[0]["status"]
                    raise StatusError(status["error_code"], status["error_message"])
            time.sleep(0.05)
        raise StatusError("DEADLINE_EXCEEDED", f"{self.model_name} was not available after {timeout:g} seconds")


@contextlib.contextmanager
def serve(model_name="default", base_path="", *, rest_port=0, grpc_port=0, host="127.0.0.1", **settings):
    """Serve in this process, on threads of its own, for the length of a `with` block; yields a `Server`.

    Port 0 is any free one; `settings` are those of `settings.Settings`, as model_config_file.  `InputError` where it
    cannot start.  The models load in the background: `wait_available` waits for them.
    """
    from serving.server.runner import Running, bracketed
    from serving.server.settings import Settings

    running = Running(
        Settings(
            model_name=model_name,
            model_base_path=str(base_path),
            host=host,
            rest_api_port=rest_port or -1,
            port=grpc_port or -1,
            **settings,
        )
    )
    started, failures = threading.Event(), []

    def body():
        try:
            running.run(started.set)
        except BaseException as error:
            failures.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=body, name="server")
    thread.start()
    started.wait()
    try:
        if failures:
            raise failures[0]
        name = bracketed(host)
        yield Server(model_name, f"http://{name}:{running.rest_port}", f"{name}:{running.grpc_port}", running.manager)
    finally:
        running.stop()
        thread.join()


@contextlib.contextmanager
def spawn(model_name="default", base_path="", *, rest_port=0, grpc_port=0, host="127.0.0.1", timeout=120, **settings):
    """`serve` in a child process, which is ended and reaped with the `with` block; yields a `ChildServer`.

    What the model does (crash, leak, hold the interpreter's lock) stays in the child.  A parent that is killed takes
    the child with it: its end of the pipe to the child's standard input closes.
    """
    flags = {
        "model_name": model_name,
        "model_base_path": str(Path(base_path).absolute()) if base_path else "",
        "host": host,
        "rest_api_port": rest_port or -1,
        "port": grpc_port or -1,
        "exit_with_parent": True,
        **settings,
    }
    command = [sys.executable, "-m", "serving.server", *(f"--{name}={value}" for name, value in flags.items())]
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, text=True, env={**os.environ, "PYTHONPATH": paths}, **pipes)
    errors, addresses = [], {}
    reading = [
        threading.Thread(target=_read, args=arguments, daemon=True)
        for arguments in ((process.stdout, [], addresses), (process.stderr, errors, {}))
    ]
    for thread in reading:
        thread.start()
    try:
        deadline = time.monotonic() + timeout
        while not {"REST", "gRPC"} <= addresses.keys():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                reading[1].join(5)
                last = errors[-1] if errors else f"no answer within {timeout} seconds"
                raise InputError(f"the server process did not start: {last.removeprefix('error: ')}")
            time.sleep(0.02)
        yield ChildServer(model_name, addresses["REST"], addresses["gRPC"], process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        for thread in reading:
            thread.join(5)
        process.stdin.close()
        process.stdout.close()
        process.stderr.close()


def _read(stream, lines, addresses):
    """Read a child's output to its end (a full pipe would stop it), keeping the last lines and its addresses."""
    for line in stream:
        lines.append(line.strip())
        del lines[:-50]
        kind, _, address = line.strip().partition(": ")
        if kind in ("REST", "gRPC"):
            addresses[kind] = address
