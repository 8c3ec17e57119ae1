"""A run whose datasets change goes on exactly: every row of each comes as often as it should."""

from collections import Counter
from types import SimpleNamespace

import pytest
from data_configs import make_config, make_manifest

from headrace.schemas.errors import CheckpointError, ConfigError
from headrace.trainer.order import data_history as history_module
from headrace.trainer.order.data_history import open_history, resume_history, segment_of
from headrace.trainer.order.data_plan import plan_data

SHARDS = {"a": make_manifest([4, 2], 100), "b": make_manifest([3, 1], 10)}
SHARDS |= {"c": make_manifest([5, 5], 20), "d": make_manifest([7], 30)}


@pytest.fixture(autouse=True)
def shards(monkeypatch):
    """Shard directories by name; the test may take some away."""
    there = dict(SHARDS)
    monkeypatch.setattr(history_module, "manifest_of", lambda path, config: there[path])
    return there


class Run:
    """A run's data over several starts."""

    def __init__(self, **weights):
        self.history = []
        self.next_row = 0
        self.rows = []
        self.start(**weights)

    def start(self, mixing="interleave", **weights):
        keys = {"mixing": mixing, "mixing_unit": "rows"} if mixing == "interleave" else {}
        datasets = [{"path": name, "weight": weight} for name, weight in weights.items()]
        config = make_config(*datasets, **keys)
        manifests = [SHARDS[name] for name in weights]
        inputs = SimpleNamespace(train=manifests, plan=plan_data(config, manifests))
        self.history = resume_history(self.history, config, inputs, self.next_row)
        self.data_history = open_history(config, inputs, self.history, self.next_row)
        self.names = [
            dataset.path for phase in self.data_history.phases for dataset in phase.segment.datasets
        ]

    def go(self, rows):
        """Take rows; returns them as (dataset, row group, row)."""
        taken = []
        for index in range(self.next_row, self.next_row + rows):
            group, row = self.data_history[index]
            taken.append((self.names[group.dataset], group.group, row))
        self.next_row += rows
        self.rows += taken
        return taken

    def of(self, name):
        return [row for row in self.rows if row[0] == name]


def all_rows(*names):
    return {
        (name, number, row)
        for name in names
        for number, group in enumerate(SHARDS[name].shards[0].row_groups)
        for row in range(group.rows)
    }


def test_interleaved_datasets_go_on_in_their_own_order_with_other_weights():
    changed, alone = Run(a=2.0, b=1.0), Run(a=2.0, b=1.0)
    changed.go(7)
    changed.start(a=1.0, b=3.0)
    after = changed.go(40)
    changed.start(a=5.0, b=1.0)
    changed.go(60)
    alone.go(300)
    for name in "ab":
        assert changed.of(name) == alone.of(name)[: len(changed.of(name))]
    assert Counter(row[0] for row in after) == {"a": 10, "b": 30}
    assert [segment.first_row for segment in changed.history] == [0, 7, 47]
    assert [dataset.seen for dataset in changed.history[1].datasets] == [5, 2]
    assert [dataset.seen for dataset in changed.history[2].datasets] == [15, 32]


def test_an_added_dataset_begins_at_its_start_and_one_that_is_moved_keeps_its_order():
    run, alone = Run(a=1.0, b=1.0), Run(a=1.0, b=1.0)
    run.go(10)
    run.start(b=1.0, c=2.0, a=1.0)
    run.go(80)
    alone.go(200)
    for name in "ab":
        assert run.of(name) == alone.of(name)[:25]
    assert len(run.of("c")) == 40
    assert set(run.of("c")[:10]) == all_rows("c"), "its first epoch is whole"
    run.start(c=1.0, d=1.0)
    run.go(14)
    assert set(run.of("d")) == all_rows("d")
    numbers = {dataset.path: dataset.number for s in run.history for dataset in s.datasets}
    assert numbers == {"a": 0, "b": 1, "c": 2, "d": 3}


def test_concatenated_datasets_finish_their_epoch_before_the_new_one_begins():
    run = Run(mixing="concatenate", a=1.0, b=1.0)
    plain = Run(mixing="concatenate", a=1.0, b=1.0)
    first = run.go(13)
    run.start(mixing="concatenate", a=1.0, b=1.0, c=1.0)
    rest = run.go(7)
    assert first + rest == plain.go(20)
    for _ in range(2):
        assert Counter(run.go(20)) == dict.fromkeys(all_rows("a", "b", "c"), 1)
    assert run.data_history.phases[-1].end(3) == 20 + 20
    assert [run.data_history.epoch_at(rows) for rows in (5, 20, 30, 60)] == [0.5, 2.0, 2.5, 4.0]


def test_a_change_at_the_end_of_an_epoch_begins_at_once_and_may_interleave():
    run = Run(mixing="concatenate", a=1.0, b=1.0)
    run.go(20)
    run.start(a=1.0, c=1.0)
    assert run.history[-1].first_row == 20
    assert [dataset.seen for dataset in run.history[-1].datasets] == [12, 0]
    rows = run.go(20)
    assert {row for row in rows if row[0] == "c"} == all_rows("c")


def test_a_run_stopped_before_its_change_begins_still_finishes_the_epoch(shards):
    run, straight = (Run(mixing="concatenate", a=1.0) for _ in range(2))
    for other in (run, straight):
        other.go(2)
        other.start(mixing="concatenate", c=1.0)
    run.go(1)
    run.start(mixing="concatenate", c=1.0)
    assert len(run.history) == 2
    assert run.go(13) == straight.go(14)[1:]
    del shards["a"]
    run.start(mixing="concatenate", c=1.0)
    assert len(run.data_history.phases) == 1, "what is over need not be there any more"
    run.go(5)
    straight.go(5)
    assert run.rows == straight.rows


def test_a_change_that_was_taken_back_before_it_began_leaves_no_trace():
    run, plain = (Run(mixing="concatenate", a=1.0) for _ in range(2))
    run.go(2)
    run.start(mixing="concatenate", c=1.0)
    run.start(mixing="concatenate", a=1.0)
    run.go(20)
    plain.go(22)
    assert run.rows == plain.rows
    assert run.history == plain.history


def test_rows_that_are_still_to_come_must_be_as_they_were(shards):
    run = Run(mixing="concatenate", a=1.0)
    run.go(2)
    shards["a"] = make_manifest([4, 3], 100)
    with pytest.raises(CheckpointError, match=r"^a: not as it was when the run began with it, and"):
        run.start(mixing="concatenate", c=1.0)


def test_an_interleaved_run_cannot_go_on_concatenated():
    run = Run(a=1.0, b=1.0)
    run.go(5)
    with pytest.raises(ConfigError, match='keep mixing = "interleave"'):
        run.start(mixing="concatenate", a=1.0, b=1.0)


def test_an_interleaved_run_ends_when_its_datasets_have_given_all_their_epochs():
    run = Run(a=1.0, b=1.0)
    run.go(4)
    run.start(a=1.0, b=3.0)
    end = run.data_history.phases[-1].end(2)
    run.go(end - 4)
    assert Counter(run.of("b")) == dict.fromkeys(all_rows("b"), 2)
    assert run.rows[-1][0] == "b"


def test_the_same_data_elsewhere_is_no_change():
    run = Run(a=1.0)
    config = make_config({"path": "moved"}, mixing="interleave", mixing_unit="rows")
    inputs = SimpleNamespace(train=[SHARDS["a"]], plan=None)
    assert resume_history(run.history, config, inputs, 3) == run.history
    assert segment_of(config, inputs).datasets[0].fingerprint == (
        run.history[0].datasets[0].fingerprint
    )
