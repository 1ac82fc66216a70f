"""Latency, measured the same way everywhere."""

import time

import numpy as np


def time_calls(call, calls=200, warm_up=20):
    """Milliseconds that `call()` takes, one after another, after a warm-up: {"p50_ms", "p90_ms", "p99_ms"}."""
    times = np.empty(calls)
    for _ in range(warm_up):
        call()
    for i in range(calls):
        start = time.perf_counter()
        call()
        times[i] = 1e3 * (time.perf_counter() - start)
    return {f"p{q}_ms": float(np.percentile(times, q)) for q in (50, 90, 99)}
