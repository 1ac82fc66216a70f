"""How fast the embedded server is, beside the model called in process, itself without a model, and KServe's server.

Every figure is of one run on one machine: the servers stand side by side and are asked in turns, over loopback, by a
load generator in a process of its own.  Ratios have bounds; the exit status is 1 where one is missed.

The model is an untrained MNIST network of 225,034 parameters; the request is one picture, 7.8 kB as JSON.
"""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
from rich.progress import track

from course.core import InputError, bounds, cli, files, flags, report, runtime
from course.core.bounds import Ratio
from course.core.experiment import to_json
from serving import client, load, pipeline, server

IN_PROCESS_BOUND = 1.7  # at most: p50 of one REST client / p50 of calling the SavedModel's signature in process
SAVED_MODEL_BOUND, LITE_BOUND = 0.55, 0.65  # at least: answers a second at 64 clients / those without a model
TAIL_BOUND = 2.5  # at most: p99 / p50
KSERVE_BOUND = 4  # at least: answers a second at 64 clients / those of KServe's Python server
CLIENTS = (1, 16, 64)
TAIL = "ms: p99 / p50"
SHAPE, CLASSES = (28, 28, 1), 10

PLAIN, LITE, NONE, KSERVE = "SavedModel", "TFLite", "no model", "KServe"
ONE_THREAD = "SavedModel, one thread an operation"
PICTURE, GRPC = "SavedModel, PNG as b64", "SavedModel, gRPC"


@dataclasses.dataclass
class Benchmark:
    """How long to measure, and beside what."""

    rounds: int = 5  # turns of every server; a figure is the median of them
    seconds: float = 2.0  # of load in each turn
    kserve: str = ".venv-kserve/bin/python"  # interpreter that has KServe (make kserve); "" leaves it out
    record: str = ""  # JSON file for the figures; a README.md beside it gets them between its marks


# --- the model --------------------------------------------------------------------------------------------------------


def build(folder):
    """Write the network, untrained, as `saved/1` (pixels, and PNG files as a signature of their own) and `lite/1`."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input(SHAPE, name="image"),
            *(layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D()),
            *(layers.Conv2D(64, 3, activation="relu"), layers.MaxPooling2D()),
            *(layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(CLASSES, activation="softmax")),
        ]
    )

    def decode(content):
        return tf.reshape(tf.cast(tf.io.decode_png(content, SHAPE[2]), tf.float32) / 255, SHAPE)

    archive = keras.export.ExportArchive()
    archive.track(model)
    for name, call, spec in (
        ("serving_default", model, tf.TensorSpec([None, *SHAPE], tf.float32, "image")),
        (
            "png",
            lambda content: model(tf.map_fn(decode, content, fn_output_signature=tf.float32)),
            tf.TensorSpec([None], tf.string, "png"),
        ),
    ):
        archive.add_endpoint(name, call, [spec])
    with contextlib.redirect_stdout(io.StringIO()):
        archive.write_out(str(folder / "saved" / "1"), verbose=False)
        content = tf.lite.TFLiteConverter.from_keras_model(model).convert()
    files.write_atomic(folder / "lite" / "1" / "model.tflite", content)


def picture():
    """One image as the network takes it, [1, 28, 28, 1] in 0..1 with four digits, and as the bytes of a PNG file."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(content, "png")
    return (pixels[None] / 255).round(4), content.getvalue()


def bodies():
    """The request of one picture by each way in: {"numbers", "png": JSON; "proto": a serialised PredictRequest}."""
    from tensorflow_serving.apis.predict_pb2 import PredictRequest

    from serving.server import tensors

    image, png = picture()
    request = PredictRequest()
    request.model_spec.name = "m"
    tensors.to_content(image.astype(np.float32), request.inputs["image"])
    encoded = {"signature_name": "png", "instances": [client.encode_bytes(png)]}
    return {
        "numbers": json.dumps({"instances": image.tolist()}).encode(),
        "png": json.dumps(encoded).encode(),
        "proto": request.SerializeToString(),
    }


# --- what is measured beside it ---------------------------------------------------------------------------------------


def in_process(folder, pipe):
    """In a child: answer each message on `pipe` with the p50 in milliseconds of calling the models without a server.

    "signature" is what a Python program would call, the restored SavedModel's; "session" is what the server calls.
    """
    import tensorflow as tf

    from course.core.timing import time_calls
    from serving.server import backends
    from serving.server.settings import Settings

    image = picture()[0].astype(np.float32)
    restored = tf.saved_model.load(str(folder / "saved" / "1")).signatures["serving_default"]
    loaded = {name: backends.load(folder / name / "1", Settings()) for name in ("saved", "lite")}
    calls = {"signature": lambda: restored(image=tf.constant(image))["output_0"].numpy()}
    for name, model in loaded.items():
        signature = model.signatures["serving_default"]
        calls[name] = lambda model=model, s=signature: model.run(s, {"image": image}, tuple(s.outputs))
    while pipe.recv():
        pipe.send({name: time_calls(call, calls=500)["p50_ms"] for name, call in calls.items()})


def without_model(folder, pipe):
    """In a child: the same server, but what it loads answers at once, on the event loop, without running anything."""
    from serving.server import manager
    from serving.server.runner import Running
    from serving.server.settings import Settings

    class Constant:
        """Stands where the batcher does."""

        def __init__(self, *_):
            pass

        async def run(self, signature, inputs, outputs):
            rows = len(next(iter(inputs.values())))
            return {alias: np.full((rows, CLASSES), 1 / CLASSES, np.float32) for alias in outputs}

        def wait_idle(self, timeout):
            pass

    manager.Batcher = Constant
    running = Running(Settings(model_name="m", model_base_path=str(folder / "saved"), rest_api_port=-1, port=0))
    threading.Thread(target=lambda: (pipe.recv(), running.stop()), daemon=True).start()
    running.run(lambda: pipe.send(running.rest_port))


@contextlib.contextmanager
def child(target, *arguments):
    """Run `target(*arguments, pipe)` in a fresh process for a `with` block; yields this end of the pipe."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=target, args=(*arguments, there), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        with contextlib.suppress(OSError):
            here.send(None)
        process.join(30)
        process.kill()


@contextlib.contextmanager
def kserve(python, folder):
    """KServe's Python server on the same SavedModel, in its own environment; yields its port."""
    port = pipeline.free_port(0, "--kserve")
    here = Path(__file__).parent
    process = subprocess.Popen(
        [python, here / "benchmark_kserve.py", folder / "saved" / "1", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(client.ServingError), client.Client(f"http://127.0.0.1:{port}", model="m") as ask:
                ask.predict(instances=picture()[0])
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise InputError(f"KServe did not start with {python}: make kserve builds its environment")
            time.sleep(0.2)
        yield port
    finally:
        process.kill()
        process.wait()


# --- the measurements -------------------------------------------------------------------------------------------------


def rates(folder, options, stack):
    """Every server asked in turns; the figures are the medians of the turns.

    ({server: {clients: {"rate", "p50_ms", "p99_ms"}}}, {call in process: p50 in ms}, {server: its memory}).  Raises
    `RuntimeError` where a request was not answered well: the rate of a server that refuses is no rate.
    """
    request, path = bodies(), "/v1/models/m:predict"
    saved = stack.enter_context(server.spawn("m", folder / "saved"))
    lite = stack.enter_context(server.spawn("m", folder / "lite"))
    single = stack.enter_context(server.spawn("m", folder / "saved", tensorflow_intra_op_parallelism=1))
    for running in (saved, lite, single):
        running.wait_available()
    empty = stack.enter_context(child(without_model, folder))
    called = stack.enter_context(child(in_process, folder))
    asked = {
        NONE: (empty.recv(), request["numbers"], path),
        PLAIN: (_port(saved.url), request["numbers"], path),
        ONE_THREAD: (_port(single.url), request["numbers"], path),
        LITE: (_port(lite.url), request["numbers"], path),
        PICTURE: (_port(saved.url), request["png"], path),
        GRPC: (_port(saved.grpc_target), request["proto"], ""),
    }
    if options.kserve:
        asked[KSERVE] = (stack.enter_context(kserve(options.kserve, folder)), request["numbers"], path)
    turns, raw = {}, []
    steps = [(name, clients) for _ in range(options.rounds) for clients in CLIENTS for name in asked]
    for name, clients in track(steps, "asking", transient=True):
        if (name, clients) == (NONE, CLIENTS[0]):
            called.send(True)
            raw.append(called.recv())
        port, body, where = asked[name]
        measured = load.generate(load.Load("127.0.0.1", port, body, where, clients, options.seconds))
        if measured.failed or not len(measured.latencies):
            raise RuntimeError(f"{name}, {_clients(clients)}, did not answer every request: {measured.statuses}")
        turns.setdefault(name, {}).setdefault(clients, []).append(measured)
    found = {
        name: {
            clients: {
                "rate": statistics.median(turn.rate for turn in measured),
                "p50_ms": statistics.median(turn.percentile(50) for turn in measured),
                "p99_ms": statistics.median(turn.percentile(99) for turn in measured),
            }
            for clients, measured in by_clients.items()
        }
        for name, by_clients in turns.items()
    }
    calls = {name: statistics.median(turn[name] for turn in raw) for name in raw[0]}
    return found, calls, {"SavedModel": resident(saved.process.pid), "TFLite": resident(lite.process.pid)}


def cold(folder):
    """Seconds until a fresh server process serves, milliseconds of its first and of its tenth request, with the warm-up
    and without: {"saved, warmed up": {"seconds", "first_ms", "tenth_ms"}, ...}."""
    found = {}
    for name in ("saved", "lite"):
        for warm in (True, False):
            start = time.perf_counter()
            with (
                server.spawn("m", folder / name, enable_model_warmup=warm) as running,
                client.Client(running.url, model="m") as ask,
            ):
                running.wait_available()
                seconds, image, times = time.perf_counter() - start, picture()[0].tolist(), []
                for _ in range(10):
                    begun = time.perf_counter()
                    ask.predict(instances=image)
                    times.append(1e3 * (time.perf_counter() - begun))
            found[f"{name}, {'warmed up' if warm else 'not warmed up'}"] = {
                "seconds": seconds,
                "first_ms": times[0],
                "tenth_ms": times[-1],
            }
    return found


def swaps(folder, count=4, clients=16):
    """`count` new versions pushed under the load of `clients`, one every two seconds.

    {"p50_ms", "p99_ms", "worst_second_p99_ms", "max_ms", "steady_p99_ms" (the same server before), "failed",
    "memory_mib": before, after and at its peak}
    """
    base = folder / "swapped"
    pipeline.push(folder / "saved" / "1", base)
    body, path = bodies()["numbers"], "/v1/models/m:predict"
    with server.spawn("m", base, file_system_poll_wait_seconds=0.2) as running:
        running.wait_available()
        asked = load.Load("127.0.0.1", _port(running.url), body, path, clients, seconds=2.0)
        steady, before = load.generate(asked), resident(running.process.pid)
        times, start = [], time.perf_counter() + asked.warm_up + 1.0
        with load.generating(dataclasses.replace(asked, seconds=2.0 * count + 2.0)) as finish:
            for number in range(2, count + 2):
                shutil.copytree(folder / "saved" / "1", folder / "candidate" / str(number))
                time.sleep(max(0.0, start + 2.0 * (number - 2) - time.perf_counter()))
                times.append(time.perf_counter())
                pipeline.push(folder / "candidate" / str(number), base)
                running.wait_available(number)
            times.append(time.perf_counter())
            under = finish()
        after = resident(running.process.pid)
    if not under.begin < times[0] < times[-1] < under.begin + under.seconds:
        raise RuntimeError(
            "the load did not last from before the first swap until after the last: is the machine busy?"
        )
    return {
        "swaps": count,
        "p50_ms": under.percentile(50),
        "p99_ms": under.percentile(99),
        "worst_second_p99_ms": max(
            float(np.percentile(under.latencies[under.ends.astype(int) == second], 99))
            for second in np.unique(under.ends.astype(int))
        ),
        "max_ms": float(under.latencies.max()),
        "steady_p99_ms": steady.percentile(99),
        "failed": under.failed,
        "memory_mib": {"before": before["now"], "after": after["now"], "peak": after["peak"]},
    }


def resident(pid):
    """Resident memory of a process in MiB, now and at its peak."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {"now": int(status["VmRSS"].split()[0]) / 1024, "peak": int(status["VmHWM"].split()[0]) / 1024}


def _port(address):
    return int(address.rpartition(":")[2])


def ratios(found, calls):
    """The ratios that have bounds."""
    most = max(CLIENTS)
    rate = {name: rows[most]["rate"] for name, rows in found.items()}
    at = _clients(most)
    listed = [
        Ratio(f"{PLAIN}, 1 client", "p50, ms: REST / in process", found[PLAIN][1]["p50_ms"], calls["signature"],
              IN_PROCESS_BOUND, False),
        Ratio(f"{PLAIN}, {at}", "answers/s: with / without model", rate[PLAIN], rate[NONE], SAVED_MODEL_BOUND, True),
        Ratio(f"{LITE}, {at}", "answers/s: with / without model", rate[LITE], rate[NONE], LITE_BOUND, True),
    ]  # fmt: skip
    if KSERVE in found:
        listed.append(
            Ratio(f"{PLAIN}, {at}", "answers/s: ours / KServe", rate[PLAIN], rate[KSERVE], KSERVE_BOUND, True)
        )
    return listed + [
        Ratio(f"{name}, {_clients(clients)}", TAIL, row["p99_ms"], row["p50_ms"], TAIL_BOUND, False)
        for name in (PLAIN, LITE, PICTURE, GRPC)
        for clients, row in found[name].items()
    ]


def _clients(count):
    return f"{count} client{'s' if count > 1 else ''}"


def show(found, calls, memory, first, swapped):
    """All of it as tables on the terminal."""
    columns = ("server", "clients", "answers/s", "p50 ms", "p99 ms")
    rows = [
        (name, str(clients), f"{row['rate']:,.0f}", f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}")
        for name, by_clients in found.items()
        for clients, row in by_clients.items()
    ]
    bounds.table("served over loopback, one picture a request", columns, rows)
    rows = [(name, f"{milliseconds:.3f}") for name, milliseconds in calls.items()]
    bounds.table("called in process, one picture", ("call", "p50 ms"), rows)
    rows = [
        (name, f"{row['seconds']:.1f}", f"{row['first_ms']:.1f}", f"{row['tenth_ms']:.1f}")
        for name, row in first.items()
    ]
    bounds.table("a fresh process", ("model", "serves after s", "first answer ms", "tenth ms"), rows)
    kept = ", ".join(f"{name} {row['now']:.0f} (peak {row['peak']:.0f})" for name, row in memory.items())
    during = ", ".join(f"{when} {value:.0f}" for when, value in swapped["memory_mib"].items())
    print(
        f"{swapped['swaps']} versions swapped under 16 clients: p50 {swapped['p50_ms']:.1f} ms, "
        f"p99 {swapped['p99_ms']:.1f} ms ({swapped['steady_p99_ms']:.1f} before; "
        f"{swapped['worst_second_p99_ms']:.1f} in the worst second), longest {swapped['max_ms']:.0f} ms, "
        f"{swapped['failed']} failed\nmemory after the load, MiB: {kept}; of the swaps: {during}"
    )


def markdown(record):
    """A record as the tables of a README; of the ratios of p99 to p50 the largest."""

    def cells(row):
        return f"{row['rate']:,.0f} | {row['p50_ms']:.2f} / {row['p99_ms']:.1f}"

    def line(ratio):
        bound = f"{'>=' if ratio['at_least'] else '<='} {ratio['bound']:g}{'' if ratio['met'] else ', MISSED'}"
        return f"| {ratio['what']} | {ratio['over']} | {ratio['value']:.2f} | {bound} |"

    served, options, hardware = record["served"], record["options"], record["hardware"]
    heads = " | ".join(f"{_clients(int(count))}: answers/s | p50 / p99, ms" for count in served[PLAIN])
    tails = [ratio for ratio in record["ratios"] if ratio["over"] == TAIL]
    worst = max(tails, key=lambda ratio: ratio["value"])
    worst = worst | {"what": f"largest of {len(tails)}: {worst['what']}"}
    cold = [
        f"| {name} | {row['seconds']:.1f} | {row['first_ms']:.1f} | {row['tenth_ms']:.1f} |"
        for name, row in record["cold"].items()
    ]
    swapped, calls = record["swaps"], record["in_process_ms"]
    memory = ", ".join(f"{name} {row['now']:.0f}" for name, row in record["memory_mib"].items())
    return "\n".join(
        [
            f"{hardware['cpu']}, {hardware['cores']} cores shared with the load generator; one MNIST picture a",
            f"request; medians of {options['rounds']} turns of {options['seconds']:g} s.",
            "",
            f"| server | {heads} |",
            "|---" * (1 + 2 * len(served[PLAIN])) + "|",
            *(f"| {name} | {' | '.join(map(cells, rows.values()))} |" for name, rows in served.items()),
            "",
            "| what | ratio of | ratio | bound |",
            "|---|---|---|---|",
            *(line(ratio) for ratio in record["ratios"] if ratio["over"] != TAIL),
            line(worst),
            "",
            "| a fresh process | serves after, s | first answer, ms | tenth, ms |",
            "|---|---|---|---|",
            *cold,
            "",
            f"One picture in process: the restored SavedModel's signature {calls['signature']:.2f} ms, the session",
            f"that the server runs {calls['saved']:.2f} ms, the TFLite interpreter {calls['lite']:.2f} ms.",
            f"{swapped['swaps']} versions swapped under 16 clients: p99 {swapped['p99_ms']:.1f} ms",
            f"({swapped['steady_p99_ms']:.1f} before; {swapped['worst_second_p99_ms']:.1f} in the worst second),",
            f"longest {swapped['max_ms']:.0f} ms, {swapped['failed']} failed. Memory with TensorFlow, MiB: {memory};",
            f"at most {swapped['memory_mib']['peak']:.0f} in the swaps.",
        ]
    )


def write(path, record):
    """Write a record as JSON, and as the tables of a README.md beside it that has a place for them."""
    files.write_atomic(path, to_json(record))
    readme = path.parent / "README.md"
    text = readme.read_text() if readme.is_file() else ""
    if report.BLOCK.search(text):
        tables = partial(markdown, json.loads(path.read_text()))
        files.write_atomic(readme, report.fill(text, str(readme), {"benchmark": tables}))


def main(argv):
    """Measure, show, record, and tell by the exit status whether every bound is met."""
    options = flags.read(Benchmark(), argv, prog="python -m serving.benchmark", description=__doc__)
    if options.kserve and not Path(options.kserve).exists():
        raise InputError(f"{options.kserve} is not there: make kserve builds it, --kserve '' leaves KServe out")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(build, (folder,))
        with contextlib.ExitStack() as stack:
            found, calls, memory = rates(folder, options, stack)
        first, swapped = cold(folder), swaps(folder)
    listed = ratios(found, calls)
    show(found, calls, memory, first, swapped)
    bounds.show(listed, unit="")
    if options.record:
        record = {
            "served": found,
            "in_process_ms": calls,
            "memory_mib": memory,
            "cold": first,
            "swaps": swapped,
            "ratios": [dataclasses.asdict(ratio) | {"value": ratio.value, "met": ratio.met} for ratio in listed],
            "options": dataclasses.asdict(options),
            "hardware": runtime.hardware(),
            "versions": runtime.versions(),
            "commit": runtime.commit(),
        }
        write(Path(options.record), record)
    bounds.conclude(listed)


if __name__ == "__main__":
    cli(main)
