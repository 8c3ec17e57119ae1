"""`headrace checkpoints` shows where each checkpoint stands and finds the damaged one."""

import pytest
from checkpoints import state, trained
from rich.console import Console

from headrace.jobs.commands.list_checkpoints import list_checkpoints
from headrace.schemas.errors import CheckpointError
from headrace.trainer.checkpoint.saver import Saver


@pytest.fixture
def shown():
    return Console(width=140, record=True)


def lines(console):
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


def test_each_checkpoint_is_a_line_with_its_losses(folder, layout, shown):
    saver = Saver(folder, layout, background=False)
    now = state(0)
    for step, loss in ((1, 2.75), (2, 2.5), (3, 2.6)):
        update = {"step": step, "tokens": 512 * step, "loss": 3.0}
        now = now.model_copy(update=update).after_evaluation(loss)
        saver.begin(now, *trained())
    assert list_checkpoints(folder.path.parent, shown)
    _, second, third = lines(shown)
    assert second.startswith("step-000002 1,024 3.0000 2.5000 (lowest) ")
    assert third.startswith("step-000003 1,536 3.0000 2.6000 ")
    assert third.endswith(" sound")


def test_the_lowest_loss_is_marked_once(folder, layout, shown):
    saver, now = Saver(folder, layout, background=False), state(0)
    for step, loss in ((1, 2.75), (2, 2.5)):
        now = now.model_copy(update={"step": step}).after_evaluation(loss)
        saver.begin(now, *trained())
    assert list_checkpoints(folder.path.parent, shown)
    assert ["(lowest)" in line for line in lines(shown)] == [False, False, True]


def test_a_damaged_one_is_named(folder, save, shown):
    save(1)
    file = save(2) / "stage-00.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert not list_checkpoints(folder.path.parent, shown)
    _, first, second, problem = lines(shown)
    assert first.endswith("sound")
    assert second.endswith("damaged")
    assert problem.startswith(f"{file}: damaged; remove this checkpoint")


def test_a_directory_without_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoints; name a run directory"):
        list_checkpoints(tmp_path)
