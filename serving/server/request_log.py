"""A sample of the requests and of what was answered, kept as `PredictionLog`s in TFRecord files.

A model's `logging_config` in models.config asks for it, as in the stock server's configuration:

    logging_config { log_collector_config { type: "tfrecord" filename_prefix: "/logs/mnist" }
                     sampling_config { sampling_rate: 0.1 } }

The request path only puts references into a bounded queue; one thread turns them into records and writes them.  What
the queue has no room for, or the disk refuses, is counted and dropped: a log never holds up or fails a request.
`read` gives the records back; `write_warmup` makes a version's warm-up file of them, which is in the same format.
"""

import collections
import contextlib
import functools
import random
import re
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from course.core import files
from course.core.errors import InputError
from serving.server import backends, messages, tensors, warmup
from serving.server.signatures import REGRESS
from serving.server.status import StatusError, invalid

COLLECTOR = "tfrecord"  # the `type` of log collector that there is
MIB = 2**20
WAITING_RECORDS, WAITING_BYTES = 4096, 64 * MIB  # in the queue
SHARD_BYTES, TOTAL_BYTES = 64 * MIB, 1024 * MIB  # of a file, and of a prefix: beyond it the oldest files go
_GATHER_SECONDS = 0.05  # that records wait for company: each waking of the thread interrupts the event loop
_CLOSE_SECONDS = 10  # for what is still in the queue when the server ends
_MOVED = ("moved",)  # in the queue: the models logged, or where to, have changed


@dataclass(frozen=True)
class _Wanted:
    """What a model's `logging_config` asks for."""

    prefix: Path
    rate: float
    sampling: object  # the `SamplingConfig`, which every record repeats


class RequestLog:
    """The log of one server; `samples` and the three methods after it may be called from any thread."""

    def __init__(self, metrics):
        self._metrics = metrics
        self._models = {}  # model name -> _Wanted
        self._shards = {}  # prefix -> Shards
        # (model name, bytes, seconds since 1970, function that makes the record), and _MOVED after a new config
        self._queue = collections.deque()
        self._bytes = 0
        self._lock = threading.Condition()  # guards the queue; notified when it is no longer empty, and at the end
        self._closed = False
        self._thread = None
        self._in_trouble = False  # and that has been printed

    @staticmethod
    def plan(configs):
        """What the `ModelConfig`s (by model name) want logged, for `follow`; `StatusError` for what cannot be done."""
        models = {}
        for name, config in configs.items():
            if not config.HasField("logging_config"):
                continue
            collector, sampling = config.logging_config.log_collector_config, config.logging_config.sampling_config
            if collector.type not in ("", COLLECTOR):
                text = f"Cannot find LogCollector::Factory for type: {collector.type} (there is {COLLECTOR!r})"
                raise StatusError("NOT_FOUND", f"{text}; model {name}")
            if not collector.filename_prefix:
                raise invalid(f"the logging_config of model {name} has no filename_prefix")
            if not 0 <= sampling.sampling_rate <= 1:
                raise invalid(f"the sampling_rate of model {name} is {sampling.sampling_rate}: give 0 to 1")
            prefix = Path(collector.filename_prefix).absolute()
            try:
                files.make_folder(prefix.parent)
            except InputError as error:
                raise StatusError("FAILED_PRECONDITION", f"the request log of model {name}: {error}") from error
            models[name] = _Wanted(prefix, sampling.sampling_rate, sampling)
        return models

    def follow(self, models):
        """Log what `plan` has found from now on."""
        with self._lock:
            self._models = models
            if self._thread is not None:
                self._queue.append(_MOVED)
                self._lock.notify()

    def samples(self, name):
        """Whether this request for a model is one of those to be logged."""
        wanted = self._models.get(name)
        return wanted is not None and random.random() < wanted.rate

    def predict(self, version, signature, inputs, outputs):
        """Log a Predict call that came as arrays, by alias."""
        size = sum(map(_size, inputs.values())) + sum(map(_size, outputs.values()))
        self._put(version, size, functools.partial(_predict_record, version, signature, inputs, outputs))

    def examine(self, version, signature, method, examples, outputs):
        """Log a Classify or Regress call (`method`) that came as serialised tf.Examples [n]."""
        record = functools.partial(_examine_record, version, signature, method, examples, outputs)
        self._put(version, _size(examples) + sum(map(_size, outputs.values())), record)

    def messages(self, version, kind, request, response):
        """Log a call that came and was answered as messages; `kind` is a field of `PredictionLog`."""

        def record():
            log = _record(version)
            getattr(log, kind).request.CopyFrom(request)
            getattr(log, kind).response.CopyFrom(response)
            return log

        self._put(version, request.ByteSize() + response.ByteSize(), record)

    def close(self):
        """Write what waits, and end."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)

    def _put(self, version, size, record):
        now = int(time.time())
        with self._lock:
            fits = len(self._queue) < WAITING_RECORDS and self._bytes + size <= WAITING_BYTES
            if fits and not self._closed:
                self._queue.append((version.name, size, now, record))
                self._bytes += size
                if self._thread is None:
                    self._thread = threading.Thread(target=self._write, name="request log", daemon=True)
                    self._thread.start()
                if len(self._queue) == 1:
                    self._lock.notify()
                return
        self._metrics.count_logged(version.name, "RESOURCE_EXHAUSTED")

    # --- the writing thread -------------------------------------------------------------------------------------------

    def _write(self):
        while entry := self._next():
            if entry is _MOVED:
                self._forget()
                continue
            name, size, now, record = entry
            self._metrics.count_logged(name, self._write_one(name, now, record))
            with self._lock:
                self._bytes -= size
        for shards in self._shards.values():
            shards.close()

    def _next(self):
        """The next entry; None at the end.  What has been written is made readable before there is a wait."""
        if not self._queue:
            for shards in self._shards.values():
                with self._tolerated(shards):
                    shards.flush()
        with self._lock:
            if not self._queue:
                self._lock.wait_for(lambda: self._queue or self._closed)
                self._lock.wait_for(lambda: self._closed, _GATHER_SECONDS)
            return self._queue.popleft() if self._queue else None

    def _forget(self):
        """End the files of prefixes at which nothing is logged any more."""
        for prefix in self._shards.keys() - {wanted.prefix for wanted in self._models.values()}:
            self._shards.pop(prefix).close()

    def _write_one(self, name, now, record):
        """The outcome of writing one record, as the name of a status."""
        wanted = self._models.get(name)
        if wanted is None:  # no longer asked for
            return "CANCELLED"
        shards = self._shards.setdefault(wanted.prefix, Shards(wanted.prefix))
        with self._tolerated(shards):
            log = record()
            log.log_metadata.timestamp_secs = now
            log.log_metadata.sampling_config.CopyFrom(wanted.sampling)
            shards.write(log.SerializeToString())
            self._in_trouble = False
            return "OK"
        return "UNKNOWN"

    @contextlib.contextmanager
    def _tolerated(self, shards):
        """Tell of the first error of a row, and begin another file: this one may end in half a record."""
        try:
            yield
        except Exception as error:  # a full disk, a folder that has gone
            shards.close()
            if not self._in_trouble:
                self._in_trouble = True
                print(f"a request could not be logged: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


class Shards:
    """The files of one prefix, `<prefix>-<UTC time>.tfrecord`, each new one under a name that sorts after the last."""

    def __init__(self, prefix):
        self._prefix = prefix
        self._writer = None
        self._written = 0

    def write(self, record):
        """Append a record; readers see it after `flush`."""
        import tensorflow as tf

        if self._written >= SHARD_BYTES:
            self.close()
        if self._writer is None:
            self._prefix.parent.mkdir(parents=True, exist_ok=True)
            self._writer = tf.io.TFRecordWriter(str(_new_shard(self._prefix)))
            self._written = 0
            _keep_newest(self._prefix)
        self._writer.write(record)
        self._written += len(record) + 16  # length, and two checksums

    def flush(self):
        """Hand what has been written to the operating system: it then outlives the process."""
        if self._writer is not None:
            self._writer.flush()

    def close(self):
        """End the file."""
        writer, self._writer, self._written = self._writer, None, 0
        if writer is not None:
            with contextlib.suppress(Exception):
                writer.close()


def _new_shard(prefix):
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))
    return prefix.with_name(f"{prefix.name}-{stamp}-{nanoseconds:09d}.tfrecord")


def _keep_newest(prefix):
    """Remove the oldest files of a prefix until what is left is small enough."""
    total = 0
    for path in reversed(shards(prefix)):
        total += path.stat().st_size
        if total > TOTAL_BYTES:
            path.unlink(missing_ok=True)


def _size(array):
    """Bytes that an array holds on to."""
    return sum(map(len, array.reshape(-1))) if array.dtype == object else array.nbytes


# --- records ---------------------------------------------------------------------------------------------------------


def _record(version):
    """An empty record that tells who has answered."""
    log = PredictionLog()
    spec = log.log_metadata.model_spec
    spec.name, spec.version.value = version.name, version.number
    return log


def _predict_record(version, signature, inputs, outputs):
    log = _record(version)
    request, response = log.predict_log.request, log.predict_log.response
    request.model_spec.name, request.model_spec.signature_name = version.name, signature.name
    messages.describe(response.model_spec, version, signature)
    for arrays, fields in ((inputs, request.inputs), (outputs, response.outputs)):
        for alias, value in arrays.items():
            tensors.to_content(value, fields[alias])
    return log


def _examine_record(version, signature, method, examples, outputs):
    log = _record(version)
    entry = log.regress_log if method == REGRESS else log.classify_log
    entry.request.model_spec.name, entry.request.model_spec.signature_name = version.name, signature.name
    for content in examples:
        entry.request.input.example_list.examples.add().MergeFromString(content)
    messages.describe(entry.response.model_spec, version, signature)
    messages.fill_result(entry.response.result, method, outputs, len(examples))
    return log


# --- reading ---------------------------------------------------------------------------------------------------------


def shards(prefix):
    """The files of a prefix, oldest first."""
    prefix = Path(prefix)
    name = re.compile(re.escape(prefix.name) + r"-\d{8}T\d{6}-\d{9}\.tfrecord")
    found = prefix.parent.iterdir() if prefix.parent.is_dir() else ()
    return sorted(path for path in found if name.fullmatch(path.name))


def read(prefix, seen=None):
    """Yield the `PredictionLog`s of a prefix, oldest first; a server may be writing meanwhile.

    Of a file whose end is torn (its server was killed while it wrote) or damaged, what stands before is read.
    `seen`, at first {}, keeps how far this call has read, for another one to go on from there.
    """
    seen = {} if seen is None else seen
    for path in shards(prefix):
        try:
            size, done = path.stat().st_size, seen.get(path, (0, 0))
        except FileNotFoundError:  # removed meanwhile, as the oldest
            continue
        if size > done[0]:
            for number, record in enumerate(_records(path), 1):
                if number > done[1]:
                    seen[path] = size, number
                    yield PredictionLog.FromString(record)


def _records(path):
    import tensorflow as tf

    try:
        yield from tf.data.TFRecordDataset(str(path)).as_numpy_iterator()
    except tf.errors.NotFoundError:
        return  # removed meanwhile, as the oldest
    except tf.errors.DataLossError:
        print(f"{path}: the end is torn or damaged (or being written): passed over", file=sys.stderr)


def write_warmup(prefix, version, model="", limit=warmup.MAX_RECORDS):
    """Make the newest distinct requests of a log (of one `model`, where named) a version folder's warm-up file.

    At most `limit` of them, oldest first; returns how many.  A server plays them before it calls the version available.
    """
    import tensorflow as tf

    if not 1 <= limit <= warmup.MAX_RECORDS:
        raise InputError(f"a warm-up file holds 1 to {warmup.MAX_RECORDS} requests, not {limit}")
    if not backends.is_complete(version):
        names = f"neither {backends.SAVED_MODEL} nor {backends.LITE_MODEL}"
        raise InputError(f"{version} is no version folder: it holds {names}")
    kept = {}
    for log in read(prefix):
        if model in ("", log.log_metadata.model_spec.name):
            content = request_only(log).SerializeToString(deterministic=True)
            kept.pop(content, None)
            kept[content] = None  # the newest last
            if len(kept) > limit:
                del kept[next(iter(kept))]
    if not kept:
        raise InputError(f"no request{f' to {model}' if model else ''} is logged at {prefix}-*.tfrecord")
    with files.atomic_path(Path(version) / warmup.FILE) as path, tf.io.TFRecordWriter(str(path)) as writer:
        for content in kept:
            writer.write(content)
        writer.flush()  # before the file is synced and renamed
    return len(kept)


def request_only(log):
    """A record without its answer and without the version that was asked: another one will play it."""
    kind = log.WhichOneof("log_type")
    stripped = type(log)()
    request = getattr(stripped, kind).request
    request.CopyFrom(getattr(log, kind).request)
    for spec in [task.model_spec for task in request.tasks] if kind == "multi_inference_log" else [request.model_spec]:
        spec.ClearField("version_choice")
    return stripped
