"""The time that is left includes saves and samples; the rate is that of steps alone."""

import io

import pytest

from modules.progress_bar import RunBar


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def bar(monkeypatch):
    """Return a bar over 100 steps, a file every 10 and samples every 20, and its clock."""
    monkeypatch.setattr("sys.stderr", io.StringIO())
    clock = Clock()
    left = {"file": lambda step: 10 - step // 10, "sample": lambda step: 5 - step // 20}
    return RunBar(100, left=lambda step: {kind: count(step) for kind, count in left.items()}, clock=clock), clock


def run(bar, clock, steps, seconds):
    for _ in range(steps):
        clock.now += seconds
        bar.step()


def test_saves_and_samples_count_for_the_time_left_and_not_for_the_rate(bar):
    bar, clock = bar
    assert bar.remaining() is None and bar.format_dict["eta"] == "?"
    run(bar, clock, 20, 2.0)
    for kind, seconds in (("file", 3.0), ("sample", 60.0)):
        with bar.aside(kind):
            clock.now += seconds
    run(bar, clock, 20, 2.0)
    assert bar.format_dict["rate"] == pytest.approx(0.5)
    assert bar.remaining() == pytest.approx(60 * 2 + 6 * 3 + 3 * 60)
    assert bar.format_dict["eta"] == "05:18"
    assert "40/100" in str(bar) and "<05:18, " in str(bar) and "2.00s/it" in str(bar)


def test_the_first_step_counts_until_there_is_another(bar):
    bar, clock = bar
    run(bar, clock, 1, 300.0)
    assert bar.remaining() == pytest.approx(99 * 300)
    run(bar, clock, 1, 1.0)
    assert bar.remaining() == pytest.approx(98)


def test_steps_of_several_sizes_count_by_their_mean(bar):
    bar, clock = bar
    for seconds in (9.0, *[1.0, 3.0] * 10):
        run(bar, clock, 1, seconds)
    assert bar.remaining() == pytest.approx(79 * 2)
