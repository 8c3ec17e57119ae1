"""Schedules of passes, carried out on clocks alone."""

from collections import deque

from headrace.trainer.building.interleaved_schedule import Pass, Receive, Send


def carry_out(plans, *, seconds=1.0):
    """Run instructions with transfers that block both sides, each stage as soon as it can.

    Returns the passes in order of their ends, and the time of the last.
    """
    left = [deque(plan) for plan in plans]
    clocks, ready, done = [0.0] * len(plans), {}, []
    while any(left):
        before = sum(map(len, left))
        for stage, queue in enumerate(left):
            if queue and isinstance(queue[0], Pass):
                step = queue.popleft()
                clocks[stage] = max(clocks[stage], ready.get(step.before, 0.0)) + seconds
                done.append(step)
                ready[step] = clocks[stage]
            elif queue and isinstance(queue[0], Send):
                sent, other = queue[0].made_by, left[queue[0].stage]
                if other and other[0] == Receive(sent, stage):
                    queue.popleft()
                    other.popleft()
        assert sum(map(len, left)) < before, "all stages wait for each other"
    return done, max(clocks)
