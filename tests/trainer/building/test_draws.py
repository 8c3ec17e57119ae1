"""Random weights of a trial: rounding may spoil the gradients of one draw, never its losses."""

import pytest

from headrace.trainer.building import self_check

GOOD, BAD = 1e-7, 1e-2


@pytest.mark.parametrize(
    ("draws", "used", "result"),
    [
        ([(GOOD, GOOD)], 1, (GOOD, GOOD)),
        ([(GOOD, BAD), (GOOD, GOOD)], 2, (GOOD, GOOD)),
        ([(BAD, GOOD), (GOOD, GOOD)], 1, (BAD, GOOD)),
        ([(GOOD, BAD), (BAD, BAD), (GOOD, GOOD)], 2, (BAD, BAD)),
        ([(GOOD, 0.3), (GOOD, 0.1), (GOOD, 0.2)], 3, (GOOD, 0.1)),
    ],
)
def test_gradients_may_agree_with_one_draw_losses_must_with_each(draws, used, result, monkeypatch):
    tried = []

    def try_out(architecture, kind, draw):
        tried.append(draw)
        return draws[draw]

    monkeypatch.setattr(self_check, "try_out", try_out)
    assert self_check.best_of_draws(None, "none") == result
    assert tried == list(range(used))
