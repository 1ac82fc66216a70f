"""Prometheus metrics under the stock server's names, which start with a colon and carry no `_total`.

prometheus_client would append that suffix to every counter, and dashboards written for the stock server would find
nothing; the text format itself is a few lines.
"""

import asyncio
import bisect
import collections
import contextlib
import functools
import itertools
import threading
import time
import traceback

from serving.server.status import StatusError

BUCKETS = [10 * 1.8**power for power in range(33)]  # microseconds; the last is about 25 minutes
_LIMITS = [f"{limit:.6g}" for limit in BUCKETS] + ["+Inf"]
_SERVING, _SAVED_MODEL = ":tensorflow:serving:", ":tensorflow:cc:saved_model:"


class Metrics:
    """Counts and latencies of one server."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counters = collections.defaultdict(collections.Counter)  # metric name -> {labels: count}
        self._counters[_SERVING + "request_count"] = collections.Counter()  # on the page before the first request
        self._histograms = collections.defaultdict(dict)  # metric name -> {labels: (counts by bucket, sum)}

    @contextlib.contextmanager
    def call(self, model_name, api, entrypoint, *, is_served):
        """Count one call by its outcome, and time it if it is answered; `api` is the call, `entrypoint` REST or GRPC.

        Anything but a `StatusError` or a cancellation leaves as an INTERNAL `StatusError`, its trace on stderr.  A call
        for a model that is not served is not counted: a made-up name must not become a metric.
        """
        start, status = time.perf_counter(), "OK"
        try:
            yield
        except StatusError as error:
            status = error.code
            raise
        except asyncio.CancelledError:
            status = "CANCELLED"
            raise
        except Exception as error:
            status = "INTERNAL"
            traceback.print_exc()  # its client learns what, the operator where
            raise StatusError(status, f"{type(error).__name__}: {error}") from error
        finally:
            if is_served:
                microseconds = (time.perf_counter() - start) * 1e6
                self._count(_SERVING + "request_count", _labels(model_name=model_name, status=status))
                if status == "OK":
                    labels = _labels(model_name=model_name, API=api, entrypoint=entrypoint)
                    self._observe(_SERVING + "request_latency", labels, microseconds)

    def count_logged(self, model_name, status):
        """Count a request that was to be logged by what became of it: OK, or why not."""
        self._count(_SERVING + "request_log_count", _labels(model_name=model_name, status_code=status))

    def observe_run(self, model_name, runtime, microseconds):
        """Record how long a run of the model took, whatever the number of requests in it."""
        labels = _labels(model_name=model_name, API="Predict", runtime=runtime)
        self._observe(_SERVING + "runtime_latency", labels, microseconds)

    def observe_load(self, folder, microseconds, succeeded):
        """Record an attempt to load the model in a version folder."""
        self._count(
            _SAVED_MODEL + "load_attempt_count", _labels(model_path=folder, status="success" if succeeded else "fail")
        )
        if succeeded:
            self._count(_SAVED_MODEL + "load_latency", _labels(model_path=folder), round(microseconds))

    def observe_warmup(self, folder, microseconds, status):
        """Record how long the first runs of a model took, and how they ended."""
        self._observe(_SERVING + "model_warmup_latency", _labels(model_path=folder, status=status), microseconds)

    def _count(self, name, labels, by=1):
        with self._lock:
            self._counters[name][labels] += by

    def _observe(self, name, labels, microseconds):
        with self._lock:
            counts, total = self._histograms[name].get(labels) or ([0] * len(_LIMITS), 0.0)
            counts[bisect.bisect_left(BUCKETS, microseconds)] += 1
            self._histograms[name][labels] = counts, total + microseconds

    def page(self):
        """All of it in Prometheus' text format."""
        lines = []
        with self._lock:
            for name, points in sorted(self._counters.items()):
                lines.append(f"# TYPE {name} counter")
                lines += [f"{name}{{{labels}}} {count}" for labels, count in points.items()]
            for name, points in sorted(self._histograms.items()):
                lines.append(f"# TYPE {name} histogram")
                for labels, (counts, total) in points.items():
                    cumulative = list(itertools.accumulate(counts))
                    lines += [
                        f'{name}_bucket{{{labels},le="{limit}"}} {count}'
                        for limit, count in zip(_LIMITS, cumulative, strict=True)
                    ]
                    lines += [f"{name}_sum{{{labels}}} {total:.6g}", f"{name}_count{{{labels}}} {cumulative[-1]}"]
        return "\n".join(lines) + "\n"


@functools.lru_cache(maxsize=4096)
def _labels(**values):
    return ",".join(f'{name}="{_escape(str(value))}"' for name, value in values.items())


def _escape(value):
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
