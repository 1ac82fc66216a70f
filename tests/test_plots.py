"""core.plots: what a figure says, and that its texts keep clear of each other."""

import pytest

from course.core import plots


@pytest.fixture
def bars():
    figure = plots.bars({"much": 1966.8, "little": 0.12345, "less than nothing": -56.6}, errors={
        "much": 800.0, "little": 0.0, "less than nothing": 41.0})  # fmt: skip
    figure.canvas.draw()
    yield figure.axes[0]
    plots.close(figure)


def test_bars_have_three_digits_or_the_whole_number(bars):
    assert {text.get_text() for text in bars.texts} == {"1,967", "0.123", "-56.6"}


def test_the_value_of_a_negative_bar_keeps_clear_of_the_names(bars):
    (value,) = (text for text in bars.texts if text.get_text() == "-56.6")
    assert value.get_window_extent().x0 > max(name.get_window_extent().x1 for name in bars.get_yticklabels())


def test_bars_take_a_form():
    figure = plots.bars({"a": 1234.5}, form="{:.1f}")
    assert [text.get_text() for text in figure.axes[0].texts] == ["1234.5"]
    plots.close(figure)
