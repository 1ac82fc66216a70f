"""Canary: a new version served beside the stable one, compared on the same requests, then promoted or rolled back.

Both are served under labels, `stable` and `canary`, which models.config maps to versions.  Each step is one atomic
rewrite of that file, and the next one waits until the server (the embedded one or the stock container) does what the
last one says.  A version is loaded before a label names it, and loses its labels before it is unloaded, so a request
to either label is answered at every moment:

    step                 versions   stable  canary
    begin                S, C       S       -        C loads; where it cannot, it is withdrawn and nothing has changed
    both labelled        S, C       S       C        the comparison
    promoted             S, C  C    C       C        first the labels, then S is unloaded; its folder stays
    rolled back          S, C  S    S       S        first the labels, then C is unloaded, and its folder withdrawn

A killed canary is taken up by the same command.  What a label does not name is not kept from requests: those without a
label go to the highest version that is loaded, so clients that are to be spared the canary ask for the label `stable`.
"""

import collections
import dataclasses
import json
import time
from pathlib import Path

import numpy as np

from course.core import files, flags
from course.core.errors import InputError
from course.core.experiment import to_json
from serving.client import Client, ServingError

STABLE, CANARY = "stable", "canary"
PROMOTED, ROLLED_BACK, TOO_FEW = "PROMOTED", "ROLLED_BACK", "TOO_FEW_REQUESTS"


@dataclasses.dataclass
class Place:
    """A running server, and the models.config it reads; the file may be shared with it by a mounted folder."""

    config: str  # path of the file
    url: str  # REST address
    grpc: str = ""  # gRPC address, to have the file read at once; without it the server must poll the file
    model: str = ""  # the model's name, where neither its base_path nor its folder's name tells
    timeout: float = 120.0  # seconds that the server may take for one step


# --- steps -----------------------------------------------------------------------------------------------------------


def entry_of(config, base, model=""):
    """The entry of a `ModelServerConfig` for the model in the folder `base`, or of that name."""
    base, entries = Path(base).resolve(), config.model_config_list.config
    tests = (
        lambda entry: entry.name == model,
        lambda entry: Path(entry.base_path).resolve() == base,
        lambda entry: entry.name == base.name,  # a container sees the folder under another path
    )
    for test in tests[:1] if model else tests[1:]:
        found = [entry for entry in entries if test(entry)]
        if len(found) == 1:
            return found[0]
    names = ", ".join(entry.name for entry in entries) or "no model"
    raise InputError(f"models.config has no entry for {model or base} (but {names}): name one with --model")


def _read(place, base):
    from serving.server.settings import read_model_config

    config = read_model_config(place.config)
    return config, entry_of(config, base, place.model)


def apply(place, base, numbers, labels):
    """Have the model serve the versions `numbers` under `labels` (name -> version); returns once the server does.

    Everything else in the file stays as it is (but for comments).  `ServingError` where the server refuses it, a
    version cannot be loaded, or the time is up.
    """
    from google.protobuf import text_format

    config, entry = _read(place, base)
    entry.model_version_policy.Clear()
    entry.model_version_policy.specific.versions.extend(sorted(numbers))
    entry.version_labels.clear()
    entry.version_labels.update(labels)
    files.write_atomic(place.config, text_format.MessageToString(config))
    deadline = time.monotonic() + place.timeout
    if place.grpc:
        _reload(place, config)
    with Client(place.url, model=entry.name) as client:
        while waits := _differs(client, set(numbers), labels):
            if time.monotonic() > deadline:
                hint = "" if place.grpc else " (does it poll models.config? else give --grpc)"
                raise ServingError("DEADLINE_EXCEEDED", f"after {place.timeout:g} s {waits}{hint}")
            time.sleep(0.05)


def _reload(place, config):
    import grpc
    from tensorflow_serving.apis.model_management_pb2 import ReloadConfigRequest
    from tensorflow_serving.apis.model_service_pb2_grpc import ModelServiceStub

    with grpc.insecure_channel(place.grpc) as channel:
        try:
            answer = ModelServiceStub(channel).HandleReloadConfigRequest(
                ReloadConfigRequest(config=config), timeout=place.timeout
            )
        except grpc.RpcError as error:
            raise ServingError(error.code().name, error.details()) from error
    if answer.status.error_code:
        raise ServingError(answer.status.error_code, answer.status.error_message)


def _differs(client, numbers, labels):
    """How the server is not yet as asked, in words; "" where it is.  `ServingError` for a version that is broken."""
    try:
        states = {int(entry["version"]): entry for entry in client.status()}
    except ServingError as error:
        if error.status in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
            raise
        return str(error)
    for number in sorted(numbers):
        state = states.get(number, {"state": "missing"})
        broken = state["state"] == "END" and state["status"].get("error_message")
        if broken:
            raise ServingError(state["status"]["error_code"], f"version {number} could not be loaded: {broken}")
        if state["state"] != "AVAILABLE":
            return f"version {number} is {state['state']}"
    for number in sorted(states.keys() - numbers):
        if states[number]["state"] == "AVAILABLE":
            return f"version {number} is still served"
    for label, number in labels.items():
        try:
            serving = client.version_of(label)
        except ServingError as error:
            return f"label {label} is not assigned: {error.message}"
        if serving != number:
            return f"label {label} is still version {serving}'s"
    return ""


def begin(place, base, candidate, stable=0):
    """Serve both versions under their labels; returns the stable one.

    Where it is not named it is what the label says, or what the file pins, or the last one pushed before the candidate.
    Raises `Broken` where the server cannot load the candidate, which then is withdrawn; `InputError` for anything else
    that is in the way.  Both leave the file as it was.
    """
    from serving import pipeline

    text = Path(place.config).read_text() if Path(place.config).is_file() else ""
    entry, have = _read(place, base)[1], pipeline.pushed([base])[base]
    labels, numbers = _labels(entry, have), _pinned(entry, have)
    older = [number for number in have if number < candidate]
    stable = stable or labels.get(STABLE) or max(numbers - {labels.get(CANARY)}, default=older[-1] if older else 0)
    for number in (stable, candidate):
        if number not in have:
            raise InputError(f"{base} holds no version {number or 'before ' + str(candidate)}: it holds {have}")
    if stable == candidate:
        raise InputError(f"version {stable} of {base} is the stable one already: push a newer one, or name --candidate")
    numbers |= {stable, candidate}
    try:
        apply(place, base, numbers, labels)
        apply(place, base, numbers, labels | {STABLE: stable, CANARY: candidate})
    except ServingError as error:
        broken = _only_lacks(place, entry.name, numbers, candidate)
        files.write_atomic(place.config, text)
        if not broken:
            raise InputError(f"{place.config} is as it was: {error}") from error
        if place.grpc:
            _reload(place, _read(place, base)[0])
        pipeline.withdraw(base, candidate)
        slow = f"version {candidate} has not been loaded within {place.timeout:g} s"
        raise Broken(error.status, slow if error.status == "DEADLINE_EXCEEDED" else error.message) from error
    return stable


class Broken(ServingError):
    """The server has tried to load the candidate, in vain, or for longer than it may."""


def _labels(entry, have):
    return {label: number for label, number in entry.version_labels.items() if number in have}


def _pinned(entry, have):
    return {*entry.model_version_policy.specific.versions, *entry.version_labels.values()} & {*have}


def _only_lacks(place, name, numbers, number):
    """Whether a server has found a version (so it has read the file) and serves every other one of `numbers`.

    Then the failure is that version's own, and neither another one's nor a label's.
    """
    with Client(place.url, model=name) as client:
        try:
            return bool(client.status(number)) and numbers - {*client.available()} == {number}
        except ServingError:
            return False


def finish(place, base, serving, retired):
    """Move both labels to the version `serving`, then have `retired` unloaded, unless another label names it."""
    from serving import pipeline

    entry, have = _read(place, base)[1], pipeline.versions(base)
    labels = _labels(entry, have) | {STABLE: serving, CANARY: serving}
    numbers = _pinned(entry, have) | {serving}
    apply(place, base, numbers, labels)
    apply(place, base, numbers - {retired} | {*labels.values()}, labels)


def roll_back(base, place):
    """Take the newest version of a model that models.config pins out of service; returns (withdrawn, now serving)."""
    from serving import pipeline

    entry, have = _read(place, base)[1], pipeline.pushed([base])[base]
    if len(have) < 2:
        raise InputError(f"{base} holds {len(have)} version(s): there is none to roll back to")
    previous, newest = have[-2:]
    labels = _labels(entry, have)
    others = [label for label, number in labels.items() if number == newest and label not in (STABLE, CANARY)]
    if others:
        raise InputError(f"the label {others[0]} names version {newest}: move it first, in {place.config}")
    try:
        apply(place, base, _pinned(entry, have) | {previous, newest}, labels)
        finish(place, base, previous, newest)
    except ServingError as error:
        raise InputError(f"version {newest} is not withdrawn: {error}") from error
    pipeline.withdraw(base, newest)
    return newest, previous


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(ask, requests, options):
    """Send each request to both labels and judge: {"verdict", "reasons", "says", "stable", "canary", "disagreement"}.

    What the candidate may differ by is in `options`; the limits of answers and latency have to be passed beyond the
    chance of the sample, `max_errors` as it is.

    `ask(request, label)` gives the outputs by name, as arrays, and raises `ServingError` for a refusal.  Which label is
    asked first alternates, so that neither profits from what the other has warmed up.
    """
    found = {label: {"errors": 0, "milliseconds": []} for label in (STABLE, CANARY)}
    pairs = broken = differing = 0
    first_error = ""
    for i, request in enumerate(requests):
        answers = {}
        for label in (STABLE, CANARY) if i % 2 else (CANARY, STABLE):
            start = time.perf_counter()
            try:
                answers[label] = ask(request, label)
                found[label]["milliseconds"].append(1e3 * (time.perf_counter() - start))
            except ServingError as error:
                if error.status == "UNAVAILABLE" and label == STABLE:
                    raise
                found[label]["errors"] += 1
                first_error = first_error or (str(error) if label == CANARY else "")
        if STABLE in answers:
            pairs += 1
            broken += CANARY not in answers
            differing += CANARY in answers and not agree(answers[STABLE], answers[CANARY])
        if pairs >= options.least and broken > options.max_errors * pairs:
            break  # no need to have clients' requests fail for longer
    return _judge(found, pairs, broken, differing, first_error, options)


def _judge(found, pairs, broken, differing, first_error, options):
    from serving.pipeline import wilson

    both = pairs - broken
    reasons, summary = [], {}
    for label, part in found.items():
        times = part.pop("milliseconds")
        quantiles = {f"p{q}_ms": float(np.percentile(times, q)) for q in (50, 99)} if times else {}
        summary[label] = {"requests": len(times) + part["errors"], **part, **quantiles}
        part["times"] = np.array(times)
    if broken > options.max_errors * pairs:
        what = f"{broken} of {pairs} requests that {STABLE} answers fail ({options.max_errors:g} may)"
        reasons.append(f"{what}: {' '.join(first_error.split())[:200]}")
    if both and wilson(differing, both)[0] > options.max_disagreement:
        share = f"{differing / both:.3f} of {both} answers differ"
        reasons.append(f"{share} ({options.max_disagreement:g} may)")
    for quantile, limit, least in ((50, options.max_slowdown, 1), (99, options.max_tail, 200)):
        if both >= least:
            ratio, low = _ratio(found[CANARY]["times"], found[STABLE]["times"], quantile)
            summary[CANARY][f"p{quantile}_ratio"] = ratio
            if low > limit:
                reasons.append(f"its p{quantile} latency is {ratio:.2f} times {STABLE}'s ({limit:g} is allowed)")
    verdict = ROLLED_BACK if reasons and pairs >= options.least else PROMOTED
    if pairs < options.least:
        verdict, reasons = TOO_FEW, [f"{pairs} of {options.least} requests", *reasons]
    measured = f"{both} pairs of answers, {broken} failed, {differing} differ"
    says = f"{verdict}: {'; '.join(reasons) or measured}"
    shares = {"pairs": pairs, "disagreement": differing / both if both else None}
    return {"verdict": verdict, "reasons": reasons, "says": says, **summary, **shares}


def _ratio(times, base, quantile, draws=1000):
    """Ratio of two samples' quantiles, and the bound that it exceeds with a confidence of 99 % (bootstrap)."""
    rng = np.random.default_rng(0)

    def drawn(sample):
        return np.percentile(rng.choice(sample, (draws, len(sample))), quantile, axis=1)

    ratio = np.percentile(times, quantile) / np.percentile(base, quantile)
    return float(ratio), float(np.quantile(drawn(times) / drawn(base), 0.01))


def agree(a, b):
    """Whether two answers decide alike: the same text, where they have text; else the same place of the largest score,
    where an output is one of scores [N, >1]; else numbers that are equal to a thousandth."""
    if a.keys() != b.keys() or any(a[name].shape != b[name].shape for name in a):
        return False
    texts = [name for name in a if a[name].dtype.kind in "OSU"]
    scores = [name for name in a if a[name].dtype.kind == "f" and a[name].ndim == 2 and a[name].shape[1] > 1]
    if texts:
        return all((a[name] == b[name]).all() for name in texts)
    if scores:
        return all((a[name].argmax(axis=1) == b[name].argmax(axis=1)).all() for name in scores)
    return all(np.allclose(a[name], b[name], rtol=1e-3, atol=1e-6, equal_nan=True) for name in a)


def ask_rest(client):
    """`ask` for bodies of REST predict requests."""

    def ask(body, label):
        rows = client.predict(body.get("instances"), body.get("inputs"), body.get("signature_name"), label=label)
        if isinstance(rows, dict):  # column format
            return {name: np.array(values) for name, values in rows.items()}
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            return {name: np.array([row[name] for row in rows]) for name in rows[0]}
        return {"": np.array(rows)}

    return ask


def ask_grpc(client):
    """`ask` for `PredictionLog`s with a Predict call."""
    from serving.server import tensors

    def ask(log, label):
        request = log.predict_log.request
        inputs = {alias: tensors.from_proto(value) for alias, value in request.inputs.items()}
        return client.predict_grpc(inputs, tuple(request.output_filter), request.model_spec.signature_name, label=label)

    return ask


# --- the command -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Options:
    """Serve a new version beside the stable one, compare the two, then promote it or roll it back."""

    config: str = ""  # the models.config that the server reads
    url: str = ""  # REST address of the server
    grpc: str = ""  # gRPC address: the config is read at once, and logged requests can be sent
    model: str = ""  # the model's name in the config, where it is not the folder's
    candidate: int = 0  # the new version; 0: the newest pushed one
    stable: int = 0  # the version it is held against; 0: the one labelled so, or pinned, or the one before
    requests: str = ""  # file of requests to compare on: predict bodies in JSON, one a line, or a sample_request.json
    log: str = ""  # filename_prefix of the request log: compare on what clients have asked, and are asking
    last: int = 1000  # of the logged requests, the newest so many
    seconds: float = 0.0  # with --log: go on for so long with the requests that arrive
    output: str = ""  # the JSON verdict; default: canary-<model>-<candidate>.json beside the config
    timeout: float = 120.0  # seconds that the server may take for one step
    least: int = 100  # pairs of answers that a verdict needs
    max_errors: float = 0.0  # share of the requests answered by the stable version that may fail with the candidate
    max_disagreement: float = 0.1  # share of answers in which the two may decide differently
    max_slowdown: float = 1.5  # how many times the stable one's median latency the candidate's may be
    max_tail: float = 2.0  # the same of the 99th percentile, from 200 pairs on


def command(bases, words, prog):
    """`python -m serving.pipeline canary exports/<model> --config models.config --url URL, --requests or --log`."""
    from serving import pipeline

    options, base = flags.read(Options(), words, prog=prog, description=Options.__doc__), pipeline.only(bases)
    for name, what in {"config": "the models.config that the server reads", "url": "the server's REST address"}.items():
        if not getattr(options, name):
            raise InputError(f"give --{name}, {what}")
    if bool(options.requests) == bool(options.log):
        raise InputError("give --requests FILE or --log PREFIX: what the versions are to be compared on")
    if min(options.least, options.last) < 1:
        raise InputError("--least and --last must be at least 1")
    if options.log and not options.grpc:
        raise InputError("--log goes with --grpc, the server's gRPC address: logged requests are sent there")
    place = Place(options.config, options.url, options.grpc, options.model, options.timeout)
    name, candidate = _read(place, base)[1].name, options.candidate or pipeline.pushed([base])[base][-1]
    target = Path(options.output or Path(options.config).with_name(f"canary-{name}-{candidate}.json"))
    try:
        verdict = run(place, base, name, candidate, options, target)
    except ServingError as error:
        raise InputError(
            "the canary has stopped half-way, both versions serve: run it again or, where the candidate ends the "
            f"server, take it back with roll-back --config: {error}"
        ) from error
    for label in {STABLE, CANARY} & verdict.keys():
        print(f"  {label}: version {verdict['versions'][label]}, {_line(verdict[label])}")
    print(f"{verdict['says']} ({target})")


def run(place, base, name, candidate, options, target):
    """The whole canary: both labelled, compared, promoted or rolled back; returns the verdict.

    It is written to the file `target` before the versions change: a server that is gone by then does not lose it.
    """
    from serving import pipeline

    bodies = _bodies(options.requests) if options.requests else None
    try:
        stable = begin(place, base, candidate, options.stable)
    except Broken as error:
        verdict = {"verdict": ROLLED_BACK, "reasons": [str(error)], "says": f"{ROLLED_BACK}: it does not load: {error}"}
        files.write_atomic(target, to_json(verdict))
        return verdict
    with Client(place.url, place.grpc or None, model=name) as client:
        if bodies is None:
            verdict = compare(ask_grpc(client), _logged(options, name), options)
        else:
            verdict = compare(ask_rest(client), bodies, options)
    verdict |= {"versions": {STABLE: stable, CANARY: candidate}}
    files.write_atomic(target, to_json(verdict))
    if verdict["verdict"] == PROMOTED:
        finish(place, base, candidate, stable)
    elif verdict["verdict"] == ROLLED_BACK:
        finish(place, base, stable, candidate)
        pipeline.withdraw(base, candidate)
    return verdict


def _logged(options, name):
    """The distinct Predict calls to a model in the log, and those that arrive: each once, so that what the comparison
    itself sends, which is logged like any request, is not sent again."""
    from serving.server import request_log

    def new():
        for log in request_log.read(options.log, seen):
            if log.HasField("predict_log") and log.log_metadata.model_spec.name == name:
                content = request_log.request_only(log).SerializeToString(deterministic=True)
                if content not in sent:
                    sent.add(content)
                    yield log

    seen, sent = {}, set()
    end = time.monotonic() + options.seconds
    yield from collections.deque(new(), maxlen=options.last)
    while time.monotonic() < end:
        yield from new()
        time.sleep(0.1)


def _bodies(path):
    """The predict bodies in a file: JSON, one a line, or one whose instances are taken one at a time."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the requests in {path}: {error}") from error
    try:
        one = json.loads(text)
        bodies = [one | {"instances": [row]} for row in one["instances"]] if "instances" in one else [one]
    except (ValueError, TypeError):
        try:
            bodies = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise InputError(f"{path} does not hold predict bodies in JSON, one a line: {error}") from error
    for body in bodies:
        if not isinstance(body, dict) or ("instances" in body) == ("inputs" in body):
            raise InputError(f"{path}: each body must be an object with instances or inputs")
    if not bodies:
        raise InputError(f"{path} holds no request")
    return bodies


def _line(part):
    latency = f", p50 {part['p50_ms']:.1f} ms, p99 {part['p99_ms']:.1f} ms" if "p50_ms" in part else ""
    return f"{part['requests']} requests, {part['errors']} errors{latency}"
