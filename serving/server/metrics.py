"""Prometheus metrics under the stock server's names, which start with a colon and carry no `_total`.

prometheus_client would append that suffix to every counter, and dashboards written for the stock server would find
nothing; the text format itself is a few lines.
"""

import bisect
import itertools
import threading

BUCKETS = [10 * 1.8**power for power in range(33)]  # microseconds; the last is about 25 minutes
_LIMITS = [f"{limit:.6g}" for limit in BUCKETS] + ["+Inf"]


class Metrics:
    """Counts and latencies of one server."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counters = {}  # labels -> count
        self._histograms = {":tensorflow:serving:request_latency": {}, ":tensorflow:serving:runtime_latency": {}}

    def count_request(self, model_name, status):
        """Count a request by its outcome."""
        labels = f'model_name="{_escape(model_name)}",status="{status}"'
        with self._lock:
            self._counters[labels] = self._counters.get(labels, 0) + 1

    def observe_request(self, model_name, api, entrypoint, microseconds):
        """Record how long a request took; `api` is the call, `entrypoint` REST or GRPC."""
        labels = f'model_name="{_escape(model_name)}",API="{api}",entrypoint="{entrypoint}"'
        self._observe(":tensorflow:serving:request_latency", labels, microseconds)

    def observe_run(self, model_name, runtime, microseconds):
        """Record how long a run of the model took, whatever the number of requests in it."""
        labels = f'model_name="{_escape(model_name)}",API="Predict",runtime="{runtime}"'
        self._observe(":tensorflow:serving:runtime_latency", labels, microseconds)

    def _observe(self, name, labels, microseconds):
        with self._lock:
            counts, total = self._histograms[name].get(labels) or ([0] * len(_LIMITS), 0.0)
            counts[bisect.bisect_left(BUCKETS, microseconds)] += 1
            self._histograms[name][labels] = counts, total + microseconds

    def page(self):
        """All of it in Prometheus' text format."""
        name = ":tensorflow:serving:request_count"
        lines = [f"# TYPE {name} counter"]
        with self._lock:
            lines += [f"{name}{{{labels}}} {count}" for labels, count in self._counters.items()]
            for name, points in self._histograms.items():
                lines.append(f"# TYPE {name} histogram")
                for labels, (counts, total) in points.items():
                    cumulative = list(itertools.accumulate(counts))
                    lines += [
                        f'{name}_bucket{{{labels},le="{limit}"}} {count}'
                        for limit, count in zip(_LIMITS, cumulative, strict=True)
                    ]
                    lines += [f"{name}_sum{{{labels}}} {total:.6g}", f"{name}_count{{{labels}}} {cumulative[-1]}"]
        return "\n".join(lines) + "\n"


def _escape(value):
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
