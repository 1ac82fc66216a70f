"""models/scale/overhead: the two trainings are one, the ratio is what it says; that it keeps its bound is slow."""

import json

import numpy as np
import pytest

from course.core.errors import InputError
from models import report
from models.scale import overhead

SMALL = overhead.Overhead(pairs=1, images=96, width=2, batch=32, epochs=2)


def test_the_summary_is_the_median_of_the_ratios_and_its_interval():
    ratios = np.array([1.02, 1.05, 0.99, 1.0, 1.01, 9.0])  # in the last pair the machine stood still
    told = overhead.summary({"core": (2 * ratios).tolist(), "keras": [2.0] * 6})
    assert told == pytest.approx({"ratio": 1.015, "low": 0.99, "high": 9.0})  # of six, all: 1 - 2 / 2^6 = 97 %
    nine = overhead.summary({"core": [0.5, 0.9, *ratios, 1.03], "keras": [1.0] * 9})
    assert nine == pytest.approx({"ratio": 1.01, "low": 0.9, "high": 1.05})  # all but the ends: 1 - 20 / 2^9 = 96 %
    assert overhead.summary({"core": [2.0], "keras": [1.0]}) == {"ratio": 2.0, "low": None, "high": None}


def test_the_bound():
    for core, met in ((1.029, True), (1.031, False)):
        target = overhead.target({"core": [2 * core, core], "keras": [2.0, 1.0]})
        assert target.met is met and target.value == pytest.approx(core) and target.second == 1.5


def test_both_train_on_the_same_batches_and_lose_the_same():
    found = overhead.measure(SMALL)  # raises where their losses differ
    assert set(found) == {"seconds", "processor"}
    for pairs in found.values():
        assert {name: len(times) for name, times in pairs.items()} == {"core": 1, "keras": 1}
        assert all(seconds > 0 for times in pairs.values() for seconds in times)


def test_the_orders_are_those_of_core():
    from course import core

    orders = overhead.orders_of(10, overhead.Overhead(batch=4, epochs=3, seed=5))
    assert orders.shape == (6, 4)
    stream = core.data.batches((np.arange(10),), 4, seed=5, epochs=3)
    np.testing.assert_array_equal(orders, [rows for (rows,) in stream.as_numpy_iterator()])
    assert all(len(set(epoch.ravel())) == 8 for epoch in orders.reshape(3, 2, 4))


def test_a_training_on_other_batches_is_noticed(monkeypatch):
    orders_of = overhead.orders_of
    monkeypatch.setattr(overhead, "orders_of", lambda *given: (orders_of(*given) + 7) % SMALL.images)
    with pytest.raises(RuntimeError, match="did not do the same"):
        overhead.measure(SMALL)


def test_the_command_records_and_its_exit_status_is_the_bound(monkeypatch, tmp_path, capsys):
    record = tmp_path / "overhead.json"
    for core, code in ((1.01, 0), (1.2, 1)):
        pairs = {"core": [core, 2 * core], "keras": [1.0, 2.0]}
        processor = {"core": [1.04, 1.04], "keras": [1.0, 1.0]}  # has no bound
        both = {"seconds": pairs, "processor": processor}
        monkeypatch.setattr(overhead, "measure", lambda _, both=both: both)
        words = ["--pairs", "2", "--record", str(record)]
        if code:
            with pytest.raises(SystemExit) as ended:
                overhead.main(words)
            assert ended.value.code == code and "missed: a training" in capsys.readouterr().err
        else:
            overhead.main(words)
        found = json.loads(record.read_text())
        assert found["met"] is not bool(code) and found["summary"]["seconds"]["ratio"] == pytest.approx(core)
        assert found["options"]["pairs"] == 2 and found["hardware"]["cores"] >= 1
        text = report.readme_text("<!-- overhead:begin -->\n<!-- overhead:end -->", "scale", tmp_path)
        assert ("**missed**" if code else "| met |") in text and f"| {core:.3f} |" in text
        assert "| of the processor | 1.00 | 1.04 | 1.040 |" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairs", "0"], "--pairs must be at least 1"),
        (["--images", "10"], "--images 10: give from one batch, 64, to 10000"),
        (["--images", "99999"], "--images 99999: give from one batch"),
    ],
)
def test_bad_settings(words, message):
    with pytest.raises(InputError, match=message):
        overhead.main(words)


@pytest.mark.slow
def test_core_costs_at_most_three_per_cent():
    found = overhead.measure(overhead.Overhead())
    assert overhead.target(found["seconds"]).met, overhead.summary(found["seconds"])
