"""Checkpoints are written while training goes on, and published when every rank has written."""

import pytest
import torch
from checkpoints import names, state, trained

from headrace.schemas.errors import CheckpointError
from headrace.trainer.checkpoint.checkpoint_folder import CheckpointFolder, load_tensors, newest
from headrace.trainer.checkpoint.saver import Saver, Written


@pytest.fixture
def saver(folder, layout):
    return Saver(folder, layout, background=True)


def test_a_checkpoint_holds_the_moment_at_which_it_was_begun(folder, saver):
    items, optimizer = trained(size=1 << 20)
    parameter = items[0].parameter
    expected = parameter.detach().clone()
    saver.begin(state(1), items, optimizer)
    with torch.no_grad():
        parameter.zero_()
        optimizer.state[parameter]["exp_avg"].zero_()
    saver.finish()
    load_tensors(newest(folder, check_files=True)[0], items, optimizer)
    assert torch.equal(parameter, expected)
    assert optimizer.state[parameter]["exp_avg"].any()


def test_nothing_is_published_before_the_last_rank_has_written(folder, saver):
    saver.begin(state(1), *trained())
    mine = saver._pending.written.result()
    assert names(folder) == []
    saver.settle([mine, None])
    assert names(folder) == []
    saver.settle([mine, Written()])
    assert names(folder) == ["step-000001"]
    assert saver.progress() is None


def test_a_second_save_waits_for_the_first(folder, saver):
    saver.begin(state(1), *trained())
    saver.begin(state(2), *trained())
    assert names(folder) == ["step-000001"]
    saver.finish()
    assert names(folder) == ["step-000001", "step-000002"]


def test_a_file_that_cannot_be_written_ends_the_run_with_its_name(folder, saver):
    folder.path.touch()
    saver.begin(state(1), *trained())
    with pytest.raises(CheckpointError, match=r"stage-00\.safetensors: cannot be written .*room"):
        saver.finish()


def test_another_ranks_problem_ends_this_one_too(saver):
    saver.begin(state(1), *trained())
    mine = saver._pending.written.result()
    with pytest.raises(CheckpointError, match="disk is full"):
        saver.settle([mine, Written(problem="disk is full")])


def test_the_best_one_is_kept_whatever_its_age(tmp_path, layout):
    folder = CheckpointFolder(tmp_path, keep_last=2, keep_best=True)
    saver = Saver(folder, layout, background=False)
    after = None
    for step, loss in enumerate((3.0, 2.0, 2.5, 2.4, 1.9, 2.1, 2.2), start=1):
        after = state(step) if after is None else after.model_copy(update={"step": step})
        after = after.after_evaluation(loss)
        saver.begin(after, *trained())
        if step == 4:
            assert names(folder) == ["step-000002", "step-000003", "step-000004"]
    assert names(folder) == ["step-000005", "step-000006", "step-000007"]
    assert newest(folder, check_files=True)[1].best_loss == 1.9
