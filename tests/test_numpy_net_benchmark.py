"""models/numpy_net/benchmark: what it measures, and what it says of a bound that is missed.

The figures themselves are held to their bounds by the slow test, which wants the machine to itself.
"""

import os
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from course.core import InputError
from models.numpy_net import benchmark


def test_the_least_time_is_taken_of_turns():
    calls, pauses = [], iter([0.02, 0.002] * 100)

    def slow():
        calls.append("slow")
        time.sleep(next(pauses))

    times = benchmark.least_times({"slow": slow, "quick": lambda: calls.append("quick")}, rounds=2, burst=2)
    assert calls == (["slow"] * 3 + ["quick"] * 3) * 2
    assert 2 <= times["slow"] < 15 and times["quick"] < 1


def test_answers_that_differ_are_not_timed():
    with pytest.raises(AssertionError):
        benchmark._agree([np.ones(3)], [np.array([1, 1, 1.1])])


def test_a_small_convolution_is_measured_and_much_faster_than_naive():
    layers = {"small": ((4, 12, 12, 8), (3, 3, 8, 16), 1)}
    naive, keras = benchmark.convolutions(2, seed=0, layers=layers)
    assert (naive.over, keras.over) == ("naive / fast", "fast / Keras")
    assert naive.second == keras.first > 0 and keras.second > 0
    assert naive.value > 10  # on a busy machine, at a size where the fast form has little to do; the bound is 50


def test_the_naive_form_is_timed_without_the_comparison(monkeypatch):
    layers = {"tiny": ((1, 4, 4, 1), (3, 3, 1, 2), 1)}
    monkeypatch.setattr(benchmark, "_agree", lambda ours, theirs: time.sleep(2))
    naive, _ = benchmark.convolutions(1, seed=0, layers=layers)
    assert 0 < naive.first < 1_000


def test_neighbours_are_measured_in_both_precisions():
    found = benchmark.neighbours(1, seed=0, examples=200, queries=20, features=64)
    assert [ratio.what.rpartition(" ")[2] for ratio in found] == ["float32", "float64"]
    for ratio in found:
        assert ratio.first > 0 and ratio.second > 0 and ratio.bound == benchmark.KNN_BOUND and not ratio.at_least


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one thread is right on one core")
def test_both_sides_have_the_same_cores():
    count = len(os.sched_getaffinity(0))
    with threadpool_limits(count, "blas"):
        assert benchmark.cores() == count
    with threadpool_limits(1, "blas"), pytest.raises(InputError) as refused:
        benchmark.main([])
    assert str(refused.value) == f"NumPy has 1 threads, the machine {count} cores: unset OPENBLAS_NUM_THREADS"


def test_a_missed_bound_is_said_and_gives_status_1(monkeypatch, capsys):
    good = benchmark.Ratio("layer", "naive / fast", 100.0, 1.0, 50, True)
    bad = benchmark.Ratio("neighbours", "no loop / scikit-learn", 3.0, 1.0, 1.3, False)
    monkeypatch.setattr(benchmark, "cores", lambda: 2)
    monkeypatch.setattr(benchmark, "convolutions", lambda rounds, seed: [good])
    monkeypatch.setattr(benchmark, "neighbours", lambda rounds, seed: [])
    benchmark.main([])
    said = capsys.readouterr()
    assert "met" in said.out and "MISSED" not in said.out and said.err == ""
    assert "cores: 2" in said.out and "the naive form once" in said.out
    monkeypatch.setattr(benchmark, "neighbours", lambda rounds, seed: [bad])
    with pytest.raises(SystemExit) as ended:
        benchmark.main([])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "MISSED" in said.out and said.err == "missed: neighbours, no loop / scikit-learn: 3, bound <= 1.3\n"


@pytest.mark.slow
def test_the_bounds_are_met(capsys):
    benchmark.main([])  # a bound that is missed raises SystemExit
    assert "MISSED" not in capsys.readouterr().out
