"""`python -m serving.server --model_name m --model_base_path DIR`: serve until SIGTERM or Ctrl-C."""

import dataclasses
import os
import signal
import sys
import threading

from course import core
from course.core import flags
from serving.server.settings import Settings

_TRUE, _FALSE = ("true", "t", "1"), ("false", "f", "0")


def main(argv):
    """Parse the flags, serve, and drain at the end."""
    settings = flags.read(Settings(), _stock_booleans(argv), prog="python -m serving.server")
    from serving.server.runner import Running  # imports TensorFlow: not before the flags are known to be right

    running = Running(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: running.stop())
    if settings.exit_with_parent:
        threading.Thread(target=_stop_at_end_of_input, args=(running,), daemon=True).start()
    running.run(lambda: threading.Thread(target=_announce, args=(running,), daemon=True).start())


def _stock_booleans(argv):
    """Turn the stock server's --flag=true and --flag=false into --flag and --no_flag."""
    booleans = {entry.name for entry in dataclasses.fields(Settings) if entry.type is bool}
    words = []
    for word in argv:
        name, given, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in booleans and given:
            if value.lower() not in (*_TRUE, *_FALSE):
                raise core.InputError(f"--{name}={value}: give true or false")
            word = f"--{name}" if value.lower() in _TRUE else f"--no_{name}"
        words.append(word)
    return words


def _stop_at_end_of_input(running):
    """Stop the server when standard input ends, which it does when the parent is gone."""
    while os.read(sys.stdin.fileno(), 4096):  # `sys.stdin` itself holds a lock that aborts the interpreter's exit
        pass
    running.stop()


def _announce(running):
    """Print where the server listens, then each version as it begins to serve or fails."""
    host = running.settings.host
    if running.rest_port:
        print(f"REST: http://{host}:{running.rest_port}", flush=True)
    if running.grpc_port:
        print(f"gRPC: {host}:{running.grpc_port}", flush=True)
    for name, number, state, error in running.manager.changes():
        if state == "AVAILABLE":
            print(f"{name} version {number}: available", flush=True)
        elif error is not None:
            print(f"{name} version {number}: {error}", file=sys.stderr, flush=True)
        elif state == "END":
            print(f"{name} version {number}: unloaded", flush=True)


if __name__ == "__main__":
    core.cli(main)
