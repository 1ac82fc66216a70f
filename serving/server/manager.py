"""Which versions of which models are served, and how one takes over from another.

One thread looks at the folders (and at the config file).  A new version is loaded and warmed up beside the one that
serves; then requests go to it, those under way finish on the old one, and the old one is unloaded.  A version that
cannot be loaded ends with its error and replaces nothing.
"""

import contextlib
import gc
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from course.core.errors import InputError
from serving.server import backends
from serving.server.batching import Batcher
from serving.server.folders import stamp, wanted_versions
from serving.server.model_config import models_of
from serving.server.request_log import RequestLog
from serving.server.settings import read_model_config
from serving.server.status import StatusError
from serving.server.warmup import warm_up

START, LOADING, AVAILABLE, UNLOADING, END = "START", "LOADING", "AVAILABLE", "UNLOADING", "END"
_DRAIN_SECONDS = 60  # how long requests under way may hold back the unloading of their version


@dataclass(eq=False)
class Version:
    """One version of one model, from the moment its folder is wanted."""

    name: str
    number: int
    folder: Path
    stamp: tuple  # of the files it was loaded from: a broken version is tried again when they change
    state: str = START
    error: StatusError | None = None
    model: object = None
    batcher: Batcher | None = None
    in_flight: int = 0
    attempts: int = 0  # to load it
    retry_at: float = 0  # on the monotonic clock, while it waits for its next attempt

    @property
    def signatures(self):
        """The model's signatures by name."""
        return self.model.signatures

    def run(self, signature, inputs, outputs):
        """Run the model (awaitable), perhaps together with other requests."""
        return self.batcher.run(signature, inputs, outputs)


class Manager:
    """The models that a server serves."""

    def __init__(self, settings, metrics):
        self.request_log = RequestLog(metrics)
        self._settings = settings
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(settings.batching.num_batch_threads, "run")
        self._loaders = ThreadPoolExecutor(max(1, settings.num_load_threads), "load")
        self._unloaders = ThreadPoolExecutor(max(1, settings.num_unload_threads), "unload")
        self.reloads = ThreadPoolExecutor(1, "reload")  # for `reload`: one at a time, as in the stock server
        self._lock = threading.Condition()  # guards what follows; notified whenever a state changes
        self._configs = {}  # model name -> ModelConfig
        self._labels = {}  # model name -> {label: version number}
        self._versions = {}  # model name -> {number: Version}, every version ever wanted
        self._look = threading.Event()  # set to have the folders looked at now
        # generations of what is asked for (a configuration, or a folder to look at again): newest, newest acted on
        self._asked = self._answered = 0
        self._stopping = self._closed = False
        self._config_stamp = self._config_fault = None
        self._thread = threading.Thread(target=self._watch, name="versions", daemon=True)

    def start(self):
        """Read the configuration and begin to load; returns at once."""
        if self._settings.model_config_file:  # the stamp before the content: what is written between is then read
            self._config_stamp = stamp(Path(self._settings.model_config_file))
        self.configure(self._settings.model_config())
        self._thread.start()

    def begin_stop(self):
        """Let nobody wait for a `reload` any longer; requests are answered on, until `close`."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()

    def close(self):
        """Stop watching and unload everything, once the requests under way have been answered."""
        with self._lock:
            if self._closed:
                return
            self._stopping = self._closed = True
            self._lock.notify_all()
        self._look.set()
        if self._thread.ident:
            self._thread.join()
        self._retire([version for versions in self._versions.values() for version in versions.values()])
        self.reloads.shutdown()
        self._unloaders.shutdown()
        self._loaders.shutdown()
        self._pool.shutdown()
        self.request_log.close()

    # --- configuration ------------------------------------------------------------------------------------------------

    def configure(self, config):
        """Serve what a `ModelServerConfig` says from now on; `StatusError` leaves everything as it was."""
        models = models_of(config, self._configs)
        logged = self.request_log.plan(models)
        with self._lock:
            labels = {name: dict(model.version_labels) for name, model in models.items()}
            for name, wanted in labels.items():
                for label, number in wanted.items():
                    self._check_label(name, label, number)
            self._configs, self._labels = models, labels
            self.request_log.follow(logged)
            self._asked += 1
        self._look.set()

    def _check_label(self, name, label, number):
        """A label moves only to a version that serves, unless the flags allow more: a new label, or any."""
        if self._settings.force_allow_any_version_labels_for_unavailable_models:
            return
        version = self._versions.get(name, {}).get(number)
        if version is not None and version.state == AVAILABLE:
            return
        is_new = self._labels.get(name, {}).get(label, number) == number
        if not (self._settings.allow_version_labels_for_unavailable_models and is_new):
            raise StatusError(
                "FAILED_PRECONDITION",
                f"Request to assign label to version {number} of model {name}, which is not "
                "currently available for inference (see --allow_version_labels_for_unavailable_models)",
            )

    def reload(self, config, timeout=300):
        """`configure`, then wait until every model that is new serves or has failed, which is an error; blocks.

        UNAVAILABLE where the server stops meanwhile.
        """
        with self._lock:
            if self._stopping:
                raise _stopping()
            added = {model.name for model in config.model_config_list.config} - self._configs.keys()
        self.configure(config)
        with self._lock:
            self._lock.wait_for(lambda: self._stopping or self._is_settled(added), timeout)
            if self._stopping and not self._is_settled(added):
                raise _stopping()
            unavailable = [
                f"{{name: {name}}}" + "".join(f" due to error: {error}" for _, error in self._errors(name))
                for name in sorted(added)
                if not self._serving(name)
            ]
        if unavailable:
            raise StatusError(
                "UNKNOWN", f"{len(unavailable)} model(s) did not become available: {{{', '.join(unavailable)}}}"
            )

    def _is_settled(self, names):
        """Whether each of these models serves, or will not without a change to its folder."""
        under_way = {START, LOADING, UNLOADING}
        return all(
            self._serving(name)
            or (
                self._answered == self._asked
                and not any(version.state in under_way for version in self._versions.get(name, {}).values())
            )
            for name in names
        )

    def _errors(self, name):
        return [(version.number, version.error) for version in self._versions.get(name, {}).values() if version.error]

    # --- requests -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lease(self, name, number=None, label=""):
        """Yield the `Version` that answers a request, which stays loaded meanwhile; `StatusError` where none does."""
        with self._lock:
            version = self._find(name, number, label)
            version.in_flight += 1
        try:
            yield version
        finally:
            with self._lock:
                version.in_flight -= 1
                if version.state == UNLOADING:
                    self._lock.notify_all()

    def _find(self, name, number, label):
        if not name:
            raise StatusError("INVALID_ARGUMENT", "ModelSpec has no name specified.")
        if label:
            number = self._labels.get(name, {}).get(label)
            if number is None:
                raise StatusError("INVALID_ARGUMENT", f"Unrecognized servable version label: {label}")
        known = self._versions.get(name, {})
        if number is not None:
            version = known.get(number)
            if version is None or version.state != AVAILABLE:
                raise StatusError("NOT_FOUND", f"Servable not found for request: Specific({name}, {number})")
            return version
        serving = self._serving(name)
        if serving:
            return known[max(serving)]
        what = f"Servable not found for request: Latest({name})"
        states = {version.state for version in known.values()}
        broken = self._errors(name)
        if name in self._configs and broken and not states & {START, LOADING}:
            newest, error = max(broken, key=lambda entry: entry[0])
            raise StatusError("FAILED_PRECONDITION", f"{what}; version {newest} could not be loaded: {error}")
        if name in self._configs and not known and self._answered == self._asked:
            raise StatusError(
                "FAILED_PRECONDITION",
                f"{what}; {self._configs[name].base_path} has no version folder with a {backends.SAVED_MODEL} or "
                f"{backends.LITE_MODEL} in it",
            )
        raise StatusError("NOT_FOUND", what)

    def _serving(self, name):
        return [number for number, version in self._versions.get(name, {}).items() if version.state == AVAILABLE]

    @property
    def models_configured(self):
        """The names of the configured models."""
        return self._configs.keys()

    def models(self):
        """The configured models: {name: the numbers of the versions that serve, newest first}."""
        with self._lock:
            return {name: sorted(self._serving(name), reverse=True) for name in self._configs}

    def statuses(self, name, number=None):
        """[(version number, state, error or None)], newest first; `StatusError` where there is none."""
        with self._lock:
            known = self._versions.get(name, {})
            if number is not None and number not in known:
                raise StatusError("NOT_FOUND", f"Could not find version {number} of model {name}")
            if not known:
                raise StatusError("NOT_FOUND", f"Could not find any versions of model {name}")
            return [
                (version.number, version.state, version.error)
                for version in sorted(known.values(), key=lambda version: -version.number)
                if number in (None, version.number)
            ]

    def wait_available(self, name, number=None, timeout=60):
        """Wait for a version (any, where `number` is None) to serve; `StatusError` with its error, or at the end."""

        def done():
            version = self._versions.get(name, {}).get(number)
            if self._closed or (version is not None and version.state == END):
                return True
            if number is None:
                versions = self._versions.get(name, {}).values()
                failed = bool(versions) and all(version.state == END for version in versions)
                return (failed and self._answered == self._asked) or bool(self._serving(name))
            return version is not None and version.state == AVAILABLE

        with self._lock:
            if not self._lock.wait_for(done, timeout):
                what = name if number is None else f"version {number} of {name}"
                why = ""
                with contextlib.suppress(KeyError):
                    why = f"; it is looked for in {self._configs[name].base_path}"
                raise StatusError("DEADLINE_EXCEEDED", f"{what} was not available after {timeout:g} seconds{why}")
            try:
                self._find(name, number, "")
            except StatusError as error:
                version = self._versions.get(name, {}).get(number)
                raise (version.error if version is not None and version.error else error) from None

    def changes(self):
        """Yield (model name, version number, state, error or None) as versions change, until the manager is closed."""
        seen = {}
        while True:
            with self._lock:
                new = [
                    version
                    for versions in self._versions.values()
                    for version in versions.values()
                    if seen.get(version) != version.state
                ]
                if not new:
                    if self._closed:
                        return
                    self._lock.wait()
                    continue
                seen.update((version, version.state) for version in new)
                entries = [(version.name, version.number, version.state, version.error) for version in new]
            yield from entries

    # --- versions -----------------------------------------------------------------------------------------------------

    def _watch(self):
        """Look at the folders, and at the config file, until closed."""
        wait = self._settings.file_system_poll_wait_seconds
        config_wait = self._settings.model_config_file_poll_wait_seconds if self._settings.model_config_file else 0
        next_config = time.monotonic() + config_wait
        while not self._closed:
            self._look.clear()
            if config_wait > 0 and time.monotonic() >= next_config:
                self._reread_config()
                next_config = time.monotonic() + config_wait
            try:
                self._update()
            except Exception:  # a defect met at one look must not end the looking
                traceback.print_exc()
            retries = [version.retry_at for versions in self._versions.values() for version in versions.values()]
            waits = [seconds for seconds in (wait, config_wait) if seconds > 0]
            waits += [max(0, at - time.monotonic()) for at in retries if at]
            self._look.wait(min(waits, default=None))

    def _reread_config(self):
        """Apply the config file where it has changed, or could not be applied before; say once why it cannot be."""
        path = Path(self._settings.model_config_file)
        found = stamp(path)
        if found == self._config_stamp:
            return
        try:
            self.configure(read_model_config(path))
            self._config_stamp, self._config_fault = found, None
        except (InputError, StatusError) as error:  # tried again at the next look: a label may become assignable
            if str(error) != self._config_fault:
                self._config_fault = str(error)
                print(f"the model config was not applied: {error}", file=sys.stderr, flush=True)

    def _update(self):
        """Bring what is loaded in line with the folders: load first, unload afterwards."""
        with self._lock:
            configs, asked = dict(self._configs), self._asked
            failed = {
                name: {number for number, version in known.items() if version.error or version.retry_at}
                for name, known in self._versions.items()
            }
            kept = {
                (name, number)
                for name, known in self._versions.items()
                for number, version in known.items()
                if version.state != END
            }
        wanted = {name: wanted_versions(config, failed.get(name, ())) for name, config in configs.items()}
        stamps = {  # not under the lock: every request takes it, and a disk may be slow
            (name, number): stamp(folder)
            for name, folders in wanted.items()
            for number, folder in (folders or {}).items()
            if (name, number) not in kept
        }
        fresh, now = [], time.monotonic()
        with self._lock:
            for name, folders in wanted.items():
                known = self._versions.setdefault(name, {})
                for number, folder in (folders or {}).items():
                    version = known.get(number)
                    if version is not None and version.state != END:
                        if version.retry_at and version.retry_at <= now:
                            fresh.append(version)
                        continue
                    found = stamps.get((name, number))
                    if found is None:  # it has ended since: that has asked for another look
                        continue
                    if version is None or not version.error or version.stamp != found:
                        known[number] = Version(name, number, folder, found)
                        fresh.append(known[number])
                if not known:
                    del self._versions[name]
        list(self._loaders.map(self._load, fresh))
        with self._lock:
            retired = []
            for name, known in self._versions.items():
                folders = wanted.get(name, {})
                if folders is None:  # the folder could not be read: keep what is loaded
                    continue
                for version in known.values():
                    if version.retry_at and version.number not in folders:  # it waits for what is no longer wanted
                        self._fail(
                            version, StatusError("CANCELLED", "it was no longer wanted when it could be retried")
                        )
                serving = set(self._serving(name))
                if not folders or serving & folders.keys():
                    retired += [known[number] for number in serving - folders.keys()]
        if fresh:
            _settle_garbage(unloaded=False)
        self._retire(retired)
        if any(version.state != AVAILABLE for version in fresh):  # an older version may have to serve in its place
            self._look.set()
            return
        with self._lock:
            self._answered = asked
            self._lock.notify_all()

    def _load(self, version):
        """Load and warm up one version; it serves from the moment its state says so."""
        version.attempts, version.retry_at = version.attempts + 1, 0
        self._enter(version, LOADING)
        model, start = None, time.perf_counter()
        try:
            model = backends.load(version.folder, self._settings)
            batching = self._settings.batching_for(version.folder)
            if self._settings.enable_model_warmup:
                self._warm_up(model, version.folder)
        except Exception as error:  # whatever it is, it is this version's end and not the server's
            if model is not None:
                _close(model)
            self._metrics.observe_load(version.folder, 0, succeeded=False)
            if stamp(version.folder) != version.stamp:  # moved or written meanwhile: what is there now has not failed
                version.stamp = ()
            if isinstance(error, InputError):
                error = StatusError("INVALID_ARGUMENT", str(error))
            if not isinstance(error, StatusError):
                error = StatusError("UNKNOWN", f"{type(error).__name__}: {error}")
            self._fail_or_retry(version, error)
            return
        self._metrics.observe_load(version.folder, (time.perf_counter() - start) * 1e6, succeeded=True)
        runtime = "TFLite" if isinstance(model, backends.LiteModel) else "TF1"
        version.model = model
        version.batcher = Batcher(
            model,
            self._pool,
            batching,
            lambda microseconds: self._metrics.observe_run(version.name, runtime, microseconds),
        )
        self._enter(version, AVAILABLE)

    def _warm_up(self, model, folder):
        start, status = time.perf_counter(), "OK"
        try:
            warm_up(model, folder, self._settings.num_request_iterations_for_warmup)
        except StatusError as error:
            status = error.code
            raise
        finally:
            self._metrics.observe_warmup(folder, (time.perf_counter() - start) * 1e6, status)

    def _fail_or_retry(self, version, error):
        """End a version that could not be loaded, or leave it LOADING until its next attempt."""
        left = self._settings.max_num_load_retries + 1 - version.attempts
        if left <= 0:
            self._fail(version, error)
            return
        wait = max(0, self._settings.load_retry_interval_micros) / 1e6
        version.retry_at = time.monotonic() + wait
        again = f"trying again in {wait:g} s, {left} attempt(s) left"
        print(f"{version.name} version {version.number}: {error}; {again}", file=sys.stderr, flush=True)

    def _fail(self, version, error):
        version.error, version.retry_at = error, 0
        self._enter(version, END)

    def _retire(self, versions):
        """Take versions out of service; threads of their own unload them, so that no request holds up the looking."""
        for version in versions:
            if version.state == AVAILABLE:
                self._enter(version, UNLOADING)
                self._unloaders.submit(self._unload, version)

    def _unload(self, version):
        """Unload a version once its requests have been answered."""
        with self._lock:
            self._lock.wait_for(lambda: not version.in_flight, _DRAIN_SECONDS)
        version.batcher.wait_idle(_DRAIN_SECONDS)
        _close(version.model)
        version.model = version.batcher = None
        _settle_garbage(unloaded=True)
        with self._lock:
            self._asked += 1  # it may be wanted again by now
            self._enter(version, END)
        self._look.set()

    def _enter(self, version, state):
        with self._lock:
            version.state = state
            self._lock.notify_all()


def _stopping():
    return StatusError("UNAVAILABLE", "the server is stopping")


def _close(model):
    """Free a model; where that fails its version ends all the same."""
    try:
        model.close()
    except Exception:
        traceback.print_exc()


def _settle_garbage(unloaded):
    """Keep the collector away from the models: a full pass over TensorFlow's objects stops every request for 0.1 s."""
    if unloaded:
        gc.unfreeze()
        gc.collect()
    gc.freeze()
