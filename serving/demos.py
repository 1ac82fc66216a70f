"""Gradio pages for the pushed models: `python -m serving.demos [unit ...]`.

Each page calls the model through its endpoint, as any client would, and shows the version that answered and how long
it took.  Without --url the embedded server is started on the exports folder and ends with the demo.
"""

import base64
import contextlib
import dataclasses
import importlib
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

from course import core
from course.core import catalogue, flags
from serving import client, pipeline

UNITS = Path(core.__file__).parents[1]


@dataclasses.dataclass
class Options:
    """Which pages, and where."""

    units: tuple[str, ...] = ()  # units whose demo is wanted; none: all that have been pushed
    exports: str = "exports"  # folder that the pipelines push to
    model: str = ""  # name of the model to show, where it is not the unit's (day25 names it after your own folder)
    url: str = ""  # REST address of a server that runs already
    host: str = "127.0.0.1"  # address to listen on
    port: int = 7860  # port of the page; 0: any free one


def command(unit, model, exports):
    """The line that opens the demo of a pushed model, for the interpreter that runs now."""
    here = Path(sys.executable)
    words = [str(here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here), "-m serving.demos", unit]
    if model != unit:
        words.append(f"--model {shlex.quote(model)}")
    if exports != Options.exports:
        words.append(f"--exports {shlex.quote(exports)}")
    return " ".join(words)


def models(options):
    """unit -> model name, for the units asked for; `InputError` where there is nothing to show."""
    exports = Path(options.exports)
    units = [catalogue.find(unit.removeprefix("course."), catalogue.units()).name for unit in options.units]
    pushed = sorted(path.name for path in exports.glob("*") if pipeline.versions(path))
    units = units or [name for name in pushed if (UNITS / f"{name}.py").exists()]
    others = [name for name in pushed if not name.endswith("_lite")]
    if not units and others:
        raise core.InputError(f"name the unit whose page is to show {' or '.join(others)}: UNIT --model {others[0]}")
    if not units:
        raise core.InputError(f"nothing has been pushed to {exports} yet: run make run, or a unit that pushes")
    if options.model and len(units) > 1:
        raise core.InputError("--model goes with one unit")
    chosen = {}
    for unit in units:
        chosen[unit] = options.model or unit
        if not options.url and not pipeline.versions(exports / chosen[unit]):
            raise core.InputError(
                f"{exports / chosen[unit]} holds no pushed version: run python -m course.{unit} first"
            )
    return chosen


def predictor(url, model):
    """`predict(bytes) -> {"probabilities": {label: p}, "version": v, "milliseconds": t}` over an endpoint's REST."""
    import gradio as gr

    names = {}  # of the classes, by version

    def predict(content):
        try:
            with client.Client(url, model=model) as connection:
                return ask(connection, content)
        except client.ServingError as error:
            raise gr.Error(str(error)) from error  # the page shows it, and goes on

    def ask(connection, content):
        version = serving(connection)
        try:
            return ask_version(connection, content, version)
        except client.ServingError as error:
            if error.status != 404 or serving(connection) == version:
                raise
            return ask_version(connection, content, serving(connection))  # another version has taken over in between

    def serving(connection):
        numbers = connection.available()
        if not numbers:
            raise client.ServingError("UNAVAILABLE", f"no version of {model} serves at {url}")
        return numbers[-1]

    def ask_version(connection, content, version):
        """The request names the version, so that the answer is known to be that version's."""
        start = time.perf_counter()
        (answer,) = connection.predict(instances=[content], version=version)
        milliseconds = 1e3 * (time.perf_counter() - start)
        if version not in names:
            places = list(range(len(answer["probabilities"])))
            names[version] = connection.predict(instances=places, signature="classes", version=version)
        probabilities = dict(zip(names[version], answer["probabilities"], strict=True))
        return {"probabilities": probabilities, "version": version, "milliseconds": milliseconds}

    return predict


def examples(exports, model, folder):
    """The pictures of the newest version's sample request, written to `folder`; paths, none where there are none."""
    have = pipeline.versions(Path(exports) / model)
    sample = Path(exports) / model / str(have[-1]) / "assets.extra" / "sample_request.json" if have else Path()
    if not sample.is_file():
        return []
    rows = json.loads(sample.read_text())["instances"]
    contents = [base64.b64decode(row["b64"]) for row in rows if isinstance(row, dict) and "b64" in row]
    paths = [Path(folder) / f"{model}-{i}.png" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def pages(chosen, url, samples):
    """One Gradio interface for several units (`chosen`: unit -> model name; `samples`: unit -> paths), a tab each."""
    import gradio as gr

    interfaces = []
    for unit, model in chosen.items():
        module = importlib.import_module(f"course.{unit}")
        if not hasattr(module, "demo"):
            raise core.InputError(f"{unit} has no demo")
        interfaces.append(module.demo(predictor(url, model), samples[unit]))
    return interfaces[0] if len(interfaces) == 1 else gr.TabbedInterface(interfaces, list(chosen))


def launch(chosen, url, samples, host="127.0.0.1", port=7860):
    """Show the pages until Ctrl-C; `InputError` for a taken port."""
    port = pipeline.free_port(port, "--port", host)
    page = pages(chosen, url, samples)
    page.launch(server_name=host, server_port=port, quiet=True, prevent_thread_lock=True, css=core.pages.CSS)
    endpoints = ", ".join(f"{url}/v1/models/{model}" for model in chosen.values())
    print(f"demo:     http://{host}:{port}\nendpoint: {endpoints}\nCtrl-C ends it", flush=True)
    try:
        page.block_thread()
    finally:
        page.close()


def main(argv=None):
    """Parse the flags, start a server where none is named, show the pages."""
    argv = [*argv] if argv is not None else []
    units = []
    while argv and not argv[0].startswith("-"):
        units.append(argv.pop(0))
    options = flags.read(Options(units=tuple(units)), argv, prog="python -m serving.demos", description=__doc__)
    chosen = models(options)
    with contextlib.ExitStack() as stack:
        url = options.url
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        samples = {unit: examples(options.exports, model, folder) for unit, model in chosen.items()}
        if not url:
            bases = {model: Path(options.exports) / model for model in chosen.values()}
            endpoint = stack.enter_context(pipeline.endpoint(bases, folder, rest_port=0, grpc_port=0))
            pipeline.wait_available(endpoint, bases)
            url = endpoint.url
        launch(chosen, url, samples, options.host, options.port)


if __name__ == "__main__":
    core.cli(main)
