"""Learning curves by hand."""

import numpy as np

from models.rl import curves

NAN = float("nan")


def test_bins_pass_over_updates_in_which_nothing_ended():
    values = [NAN, NAN, 1, 3, NAN, NAN, 5, NAN]
    assert curves.binned(values, points=4) == [2, 2, 2, 5]
    assert curves.binned(values[2:4], points=4) == [1, 3]
    np.testing.assert_array_equal(curves.binned([NAN, NAN], points=2), [NAN, NAN])


def test_running_mean_begins_with_what_there_is_and_stays_at_the_end():
    np.testing.assert_allclose(curves.running([2, 4, 6, 8], 2, np.array([1, 2, 3, 4, 9])), [2, 3, 5, 7, 7])


def test_a_row_of_runs_has_their_mean_their_deviation_and_the_worst():
    row = curves.row(
        "arm", "Env-v0", 10, [{"mean": 1.0, "steps_per_second": 5.0}, {"mean": 3.0, "steps_per_second": None}]
    )
    assert (row["runs"], row["mean return"], row["deviation"], row["worst run"]) == (2, 2.0, 1.0, 1.0)
    assert np.isnan(row["steps_per_second"])  # of a run in which every update compiled, nothing is known
