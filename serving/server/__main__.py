"""`python -m serving.server --model_name m --model_base_path DIR`: serve until SIGTERM or Ctrl-C."""

import dataclasses
import os
import signal
import sys
import threading
from importlib import metadata

from course import core
from course.core import flags
from serving.server.settings import Settings

_TRUE, _FALSE = ("true", "t", "1"), ("false", "f", "0")
# flags of the stock server that set what does not exist here; a command line written for it starts all the same
_WITHOUT_EFFECT = {
    "enable_profiler", "flush_filesystem_caches", "grpc_max_threads", "mixed_precision",
    "num_tflite_interpreters_per_pool", "num_tflite_pools", "platform_config_file",
    "remove_unused_fields_from_bundle_metagraph", "rest_api_num_threads", "skip_initialize_tpu",
    "thread_pool_factory_config_file", "use_alts_credentials", "xla_cpu_compilation_enabled",
    "xla_gpu_compilation_enabled",
}  # fmt: skip


def main(argv):
    """Parse the flags, serve, and drain at the end."""
    if any(_flag(word) == ("version", value) for word in argv for value in ("", *_TRUE)):
        print(f"Embedded model server: TensorFlow Serving's protocol {metadata.version('tensorflow-serving-api')}")
        print(f"TensorFlow Library: {metadata.version('tensorflow')}")
        return
    settings = flags.read(Settings(), _own(argv), prog="python -m serving.server")
    from serving.server.runner import Running  # imports TensorFlow: not before the flags are known to be right

    running = Running(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: running.stop())
    if settings.exit_with_parent:
        threading.Thread(target=_stop_at_end_of_input, args=(running,), daemon=True).start()
    running.run(lambda: threading.Thread(target=_announce, args=(running,), daemon=True).start())


def _own(argv):
    """The command line as `flags.read` takes it: the stock server's spelling of booleans, and its other flags, undone.

    The stock server takes `--flag`, `--flag=true` and `--flag=false` for a boolean, `--flag=value` for anything else.
    """
    booleans = {entry.name for entry in dataclasses.fields(Settings) if entry.type is bool}
    words = []
    for word in argv:
        name, value = _flag(word)
        if name in _WITHOUT_EFFECT:
            if name == "use_alts_credentials" and value.lower() not in _FALSE:
                raise core.InputError("--use_alts_credentials: there is no ALTS here; --ssl_config_file gives gRPC TLS")
            print(f"--{name} has no effect in the embedded server", file=sys.stderr, flush=True)
            continue
        if name in booleans and "=" in word:
            if value.lower() not in (*_TRUE, *_FALSE):
                raise core.InputError(f"{word}: give true or false")
            word = f"--{name}" if value.lower() in _TRUE else f"--no_{name}"
        words.append(word)
    return words


def _flag(word):
    """(name, value) of a word of the command line; the name is empty where it is no flag."""
    name, _, value = word.partition("=")
    return (name[2:].replace("-", "_") if name.startswith("--") else "", value)


def _stop_at_end_of_input(running):
    """Stop the server when standard input ends, which it does when the parent is gone."""
    while os.read(sys.stdin.fileno(), 4096):  # `sys.stdin` itself holds a lock that aborts the interpreter's exit
        pass
    running.stop()


def _announce(running):
    """Print where the server listens, then each version as it begins to serve or fails."""
    from serving.server.runner import bracketed

    host = bracketed(running.settings.host)
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
