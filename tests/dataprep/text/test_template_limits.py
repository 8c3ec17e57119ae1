"""Time limits of templates hold whatever runs when they are reached."""

import itertools

import pytest

from headrace.dataprep.text.template_limits import TooSlow, stop_rendering, time_limit


def work_for_ever() -> None:
    """Take processor time without end."""
    for _ in itertools.count():
        pass


class SlowToGo:
    """Work without end in a finalizer, from which Python lets no exception out."""

    def __del__(self) -> None:
        work_for_ever()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_finalizer_that_swallows_the_end_of_the_time_does_not_lift_the_limit():
    def render() -> None:
        SlowToGo()
        work_for_ever()

    with pytest.raises(TooSlow), time_limit(0.04):
        render()


def test_a_signal_that_comes_after_the_end_of_a_rendering_stops_nothing():
    with time_limit(60):
        pass
    stop_rendering(0, None)
