"""The benchmark of precisions: its rows, its counting, its refusals; one setting measured in a process."""

import dataclasses
import json

import keras
import pytest

from course.core import InputError, runtime
from models import costs
from models.scale import benchmark

TINY = benchmark.Setting("day10", "mixed_float16", False, 4, 8, 8, 4, 2, 3)


@pytest.mark.parametrize("network", benchmark.NETWORKS)
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_flops_from_the_shapes_are_those_of_the_graph(network, policy):
    with runtime.policy(policy):
        model = benchmark.build(dataclasses.replace(TINY, network=network, side=32))
    assert benchmark.flops(model) == costs.flops(model) > 0
    assert model.output.dtype == "float32" and model.output.shape == (None, 10)


def test_what_is_asked_for_is_measured_in_order():
    options = benchmark.Benchmark(networks=("day10",), widths=(16, 15), policies=("float32", "mixed_bfloat16"))
    found = [(s.width, s.policy, s.xla) for s in benchmark.settings(options)]
    assert found[:4] == [(16, "float32", False), (16, "float32", True), (16, "mixed_bfloat16", False),
                         (16, "mixed_bfloat16", True)]  # fmt: skip
    assert len(found) == 8 and len(benchmark.settings(benchmark.Benchmark())) == 36
    assert {s.xla for s in benchmark.settings(benchmark.Benchmark(backend="jax"))} == {True}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"networks": ("day05",)}, "--networks day05: choose from day04, day10"),
        ({"policies": ("float8",)}, "--policies float8: choose from"),
        ({"backend": "torch"}, "--backend torch is not known"),
        ({"rounds": 0}, "--rounds 0 cannot be used"),
        ({"widths": (0,)}, "--widths"),
        ({"widths": ()}, "--widths"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, says):
    with pytest.raises(InputError, match=says):
        benchmark.settings(benchmark.Benchmark(**changes))


def row(policy, ms, memory, **changes):
    base = dict(network="day10", width=16, xla=False, backend="tensorflow", batch=8, side=32, depth=8)
    return base | {"policy": policy, "ms": ms, "memory_mib": memory} | changes


def test_gains_are_against_float32_of_the_same_setting():
    rows = benchmark.gains([row("float32", 10.0, 100.0), row("mixed_float16", 4.0, 60.0),
                            row("mixed_float16", 4.0, 60.0, width=15)])  # fmt: skip
    assert [r["speed_up"] for r in rows] == [1.0, 2.5, None]
    assert [r["memory_share"] for r in rows] == [1.0, 0.6, None]


def test_a_setting_is_measured_in_a_process_of_its_own(tmp_path, capsys):
    path = tmp_path / "rows.json"
    words = "--networks day10 --policies mixed_float16 --xla False --widths 4 --depth 8 --side 8 --batch 4 --steps 2"
    benchmark.main([*words.split(), "--rounds", "3", "--record", str(path)])
    found = json.loads(path.read_text())
    (measured,) = found["rows"]
    assert measured["ms_least"] <= measured["ms"] <= measured["ms_most"] and measured["ms"] > 0
    assert measured["images_per_second"] == pytest.approx(4e3 / measured["ms"])
    assert measured["memory_mib"] > 0 and measured["speed_up"] is None and measured["device"] in found["devices"]
    assert found["versions"]["keras"] == keras.__version__ and "| day10 | 4 |" in benchmark.markdown(found)
    assert "mixed_float16" in capsys.readouterr().out


def test_a_record_becomes_a_table():
    rows = [row(policy, ms, memory, network="day10", images_per_second=8e3 / ms, tflops=0.0123, memory_of="peak")
            for policy, ms, memory in (("float32", 10.0, 100.0), ("mixed_float16", 4.0, None))]  # fmt: skip
    record = {"rows": benchmark.gains(rows), "versions": {"keras": "3", "tensorflow": "2"}, "backend": "tensorflow",
              "devices": ["a processor"], "command": "python -m it"}  # fmt: skip
    lines = benchmark.markdown(record).splitlines()
    assert lines[:2] == ["a processor; Keras 3 on tensorflow 2; 8 images of 32 x 32 a step.", "`python -m it`"]
    assert lines[5:7] == ["| day10 | 16 | float32 | no | 10.0 | 800 | 0.0123 | 100 | 1.00 | 100% |",
                          "| day10 | 16 | mixed_float16 | no | 4.0 | 2,000 | 0.0123 |  | 2.50 |  |"]  # fmt: skip
    assert lines[-1] == "Memory is the peak."


def test_a_process_that_fails_says_why_in_a_line():
    with pytest.raises(InputError, match=r"day10, mixed_float16, width 4 on tensorflow: .*depth of 9"):
        benchmark.in_a_process(dataclasses.replace(TINY, depth=9))
