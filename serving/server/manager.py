"""Which versions of which models are served, and how one takes over from another.

One thread looks at the folders (and at the config file).  A new version is loaded and warmed up beside the one that
serves; then requests go to it, those under way finish on the old one, and the old one is unloaded.  A version that
cannot be loaded ends with its error and replaces nothing.
"""

import contextlib
import gc
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from course.core.errors import InputError
from serving.server import backends
from serving.server.batching import Batcher
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
        self._settings = settings
        self._metrics = metrics
        self._pool = ThreadPoolExecutor(settings.batching.num_batch_threads, "run")
        self._loaders = ThreadPoolExecutor(settings.num_load_threads, "load")
        self._lock = threading.Condition()  # guards what follows; notified whenever a state changes
        self._configs = {}  # model name -> ModelConfig
        self._labels = {}  # model name -> {label: version number}
        self._versions = {}  # model name -> {number: Version}, every version ever wanted
        self._look = threading.Event()  # set to have the folders looked at now
        self._asked = self._answered = 0  # generations of the configuration: the newest, and the newest acted on
        self._closed = False
        self._config_stamp = None
        self._thread = threading.Thread(target=self._watch, name="versions", daemon=True)

    def start(self):
        """Read the configuration and begin to load; returns at once."""
        self.configure(self._settings.model_config())
        if self._settings.model_config_file:
            self._config_stamp = _stamp(Path(self._settings.model_config_file))
        self._thread.start()

    def close(self):
        """Stop watching and unload everything, once the requests under way have been answered."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._lock.notify_all()
        self._look.set()
        if self._thread.ident:
            self._thread.join()
        self._retire([version for versions in self._versions.values() for version in versions.values()])
        self._loaders.shutdown()
        self._pool.shutdown()

    # --- configuration ------------------------------------------------------------------------------------------------

    def configure(self, config):
        """Serve what a `ModelServerConfig` says from now on; `StatusError` leaves everything as it was."""
        if config.WhichOneof("config") == "custom_model_config":
            raise StatusError("FAILED_PRECONDITION", "custom_model_config is not supported: use model_config_list")
        models = {model.name: model for model in config.model_config_list.config}
        for model in config.model_config_list.config:
            if not model.name or not model.base_path:
                raise StatusError("INVALID_ARGUMENT", "every model in the config needs a name and a base_path")
            if model.model_platform not in ("", "tensorflow"):
                raise StatusError(
                    "INVALID_ARGUMENT", f"Model {model.name} requests unsupported platform {model.model_platform}"
                )
            if list(config.model_config_list.config).count(model) > 1 or models[model.name] != model:
                raise StatusError(
                    "INVALID_ARGUMENT", f"Illegal to list model {model.name} multiple times in config list"
                )
        with self._lock:
            labels = {name: dict(model.version_labels) for name, model in models.items()}
            for name, wanted in labels.items():
                for label, number in wanted.items():
                    self._check_label(name, label, number)
            self._configs, self._labels = models, labels
            self._asked += 1
        self._look.set()

    def _check_label(self, name, label, number):
        """A label moves only to a version that serves; a new one may wait for its version where the flag allows."""
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
        """`configure`, then wait until every model that is new has a version serving; blocks."""
        with self._lock:
            added = {model.name for model in config.model_config_list.config} - self._configs.keys()
        self.configure(config)
        with self._lock:
            asked = self._asked
            self._lock.wait_for(lambda: self._answered >= asked, timeout)
            unavailable = sorted(name for name in added if not self._serving(name))
        if unavailable:
            raise StatusError(
                "UNKNOWN", f"{len(unavailable)} model(s) did not become available: {{{', '.join(unavailable)}}}"
            )

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
        broken = [version for version in known.values() if version.error]
        if name in self._configs and broken and not states & {START, LOADING}:
            newest = max(broken, key=lambda version: version.number)
            raise StatusError(
                "FAILED_PRECONDITION", f"{what}; version {newest.number} could not be loaded: {newest.error}"
            )
        if name in self._configs and not known and self._answered == self._asked:
            raise StatusError(
                "FAILED_PRECONDITION",
                f"{what}; {self._configs[name].base_path} has no version folder with a {backends.SAVED_MODEL} in it",
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
                return failed or bool(self._serving(name))
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
        config_wait = self._settings.model_config_file_poll_wait_seconds
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
            waits = [seconds for seconds in (wait, config_wait) if seconds > 0]
            self._look.wait(min(waits, default=None))

    def _reread_config(self):
        path = Path(self._settings.model_config_file)
        stamp = _stamp(path)
        if stamp == self._config_stamp:
            return
        try:
            self.configure(read_model_config(path))
            self._config_stamp = stamp
        except (InputError, StatusError) as error:  # tried again at the next look: a label may become assignable
            print(f"the model config was not applied: {error}", flush=True)

    def _update(self):
        """Bring what is loaded in line with the folders: load first, unload afterwards."""
        with self._lock:
            configs, asked = dict(self._configs), self._asked
        wanted = {name: _wanted_versions(config) for name, config in configs.items()}
        fresh = []
        with self._lock:
            for name, folders in wanted.items():
                known = self._versions.setdefault(name, {})
                for number, folder in (folders or {}).items():
                    version = known.get(number)
                    if version is not None and version.state != END:
                        continue
                    stamp = _stamp(folder)
                    if version is None or not version.error or version.stamp != stamp:
                        known[number] = Version(name, number, folder, stamp)
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
                serving = set(self._serving(name))
                if not folders or serving & folders.keys():
                    retired += [known[number] for number in serving - folders.keys()]
        self._retire(retired)
        if fresh or retired:
            _settle_garbage(retired)
        with self._lock:
            self._answered = asked
            self._lock.notify_all()

    def _load(self, version):
        """Load and warm up one version; it serves from the moment its state says so."""
        self._enter(version, LOADING)
        model = None
        try:
            model = backends.load(version.folder, self._settings)
            if self._settings.enable_model_warmup:
                warm_up(model, version.folder)
        except Exception as error:  # whatever it is, it is this version's end and not the server's
            if model is not None:
                model.close()
            version.error = (
                error if isinstance(error, StatusError) else StatusError("UNKNOWN", f"{type(error).__name__}: {error}")
            )
            self._enter(version, END)
            return
        runtime = "TFLite" if isinstance(model, backends.LiteModel) else "TF1"
        version.model = model
        version.batcher = Batcher(
            model,
            self._pool,
            self._settings.batching,
            lambda microseconds: self._metrics.observe_run(version.name, runtime, microseconds),
        )
        self._enter(version, AVAILABLE)

    def _retire(self, versions):
        """Unload versions once their requests have been answered."""
        versions = [version for version in versions if version.state == AVAILABLE]
        for version in versions:
            self._enter(version, UNLOADING)
        for version in versions:
            with self._lock:
                self._lock.wait_for(lambda version=version: not version.in_flight, _DRAIN_SECONDS)
            version.batcher.wait_idle(_DRAIN_SECONDS)
            version.model.close()
            version.model = version.batcher = None
            self._enter(version, END)

    def _enter(self, version, state):
        with self._lock:
            version.state = state
            self._lock.notify_all()


def _wanted_versions(config):
    """{number: folder} of the versions that a model's policy wants; None where its folder cannot be read."""
    found = {}
    try:
        for folder in sorted(Path(config.base_path).iterdir()):
            if folder.name.isascii() and folder.name.isdecimal() and backends.is_complete(folder):
                found.setdefault(int(folder.name), folder)
    except OSError:
        return None
    policy = config.model_version_policy
    kind = policy.WhichOneof("policy_choice")
    if kind == "all":
        return found
    if kind == "specific":
        return {number: found[number] for number in policy.specific.versions if number in found}
    return {number: found[number] for number in sorted(found)[-(policy.latest.num_versions or 1) :]}


def _stamp(path):
    """What changes when a file, or the files directly in a folder, are written again."""
    try:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        return tuple((file.name, stat.st_mtime_ns, stat.st_size) for file in files for stat in (file.stat(),))
    except OSError:
        return ()


def _settle_garbage(unloaded):
    """Keep the collector away from the models: a full pass over TensorFlow's objects stops every request for 0.1 s."""
    if unloaded:
        gc.unfreeze()
        gc.collect()
    gc.freeze()
