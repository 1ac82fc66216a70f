"""course/core/bounds: ratios, their bounds, and what is said of one that is missed."""

import math

import pytest

from course.core import bounds
from course.core.bounds import Ratio


def test_ratios_know_their_bounds():
    assert Ratio("a", "b / c", 100, 2, 50, True).met
    assert not Ratio("a", "b / c", 99, 2, 50, True).met
    assert Ratio("a", "b / c", 6, 2, 3, False).met
    assert not Ratio("a", "b / c", 6.1, 2, 3, False).met
    assert not Ratio("a", "b / c", math.nan, 2, 3, True).met
    assert not Ratio("a", "b / c", math.nan, 2, 3, False).met
    assert not Ratio("a", "b / c", 1, 0, 3, True).met


def test_a_missed_bound_is_named_and_gives_status_1(capsys):
    good, bad = Ratio("x", "a / b", 3, 1, 2, True), Ratio("y", "c / d", 3, 1, 2, False)
    bounds.show([good, bad], unit="s")
    bounds.conclude([good])
    said = capsys.readouterr()
    assert said.out.count("met") == 1 and said.out.count("MISSED") == 1 and said.err == ""
    with pytest.raises(SystemExit) as ended:
        bounds.conclude([good, bad])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "missed: y, c / d: 3, bound <= 2\n"


def test_numbers_stand_to_the_right_in_a_table(capsys):
    bounds.table("shown", ("name", "count"), [("a", "7"), ("b", "1,000")])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "shown:"
    assert any(line.endswith("    7") for line in lines) and any(line.endswith("1,000") for line in lines)
