"""Checkpoints are whole or not there, and one that is damaged is named, not passed over."""

import json
import os

import pytest
import torch
from checkpoints import names, state, trained
from safetensors.torch import load_file, save_file

from headrace.schemas.errors import CheckpointError
from headrace.schemas.train.run_state import read_run_state, write_run_state
from headrace.trainer.building.materializer import TrainedParameter
from headrace.trainer.checkpoint import checkpoint_folder
from headrace.trainer.checkpoint.checkpoint_folder import CheckpointFolder, load_tensors, newest
from headrace.trainer.checkpoint.saver import Saver

STAGE = "stage-00.safetensors"


def message(folder):
    """The one line with which the newest checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        newest(folder, check_files=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_saved_is_read_back_bit_by_bit(folder, save):
    path = save(3)
    items, optimizer = trained()
    expected = items[0].parameter.detach().clone()
    moments = {name: value.clone() for name, value in optimizer.state[items[0].parameter].items()}
    with torch.no_grad():
        items[0].parameter.zero_()
    optimizer.state.clear()

    found, read = newest(folder, check_files=True)
    load_tensors(found, items, optimizer)
    assert found == path
    assert (read.step, read.next_row, set(read.files)) == (3, 24, {STAGE})
    assert torch.equal(items[0].parameter, expected)
    restored = optimizer.state[items[0].parameter]
    assert all(torch.equal(restored[name], value) for name, value in moments.items())


def test_a_checkpoint_of_weights_only_is_smaller_and_leaves_the_optimizer_as_it_is(folder, layout):
    saver = Saver(folder, layout, background=False, weights_only=True)
    saver.begin(state(3), *trained())
    path, read = newest(folder, check_files=True)
    assert read.weights_only
    assert load_file(path / STAGE).keys() == {"parameter/model.norm.weight"}
    items, optimizer = trained()
    expected = items[0].parameter.detach().clone()
    optimizer.state.clear()
    with torch.no_grad():
        items[0].parameter.zero_()
    load_tensors(path, items, None)
    assert torch.equal(items[0].parameter, expected)
    assert not optimizer.state
    with pytest.raises(CheckpointError, match="no tensor step/model"):
        load_tensors(path, items, optimizer)


def test_only_the_last_ones_are_kept_by_step_and_not_by_name(folder, save):
    for step in (8, 999_999, 1_000_000, 1_000_001):
        save(step)
    assert names(folder) == ["step-1000000", "step-1000001"]


def test_checkpoints_of_earlier_sessions_count_among_the_last_that_are_kept(folder, save, layout):
    for step in (1, 2):
        save(step)
    later = CheckpointFolder(folder.path.parent, keep_last=2)
    Saver(later, layout, background=False).begin(state(3), *trained())
    assert names(later) == ["step-000002", "step-000003"]


def test_other_files_and_folders_are_never_taken_for_checkpoints(folder, save):
    save(2)
    for name in ("zzz", "latest", "step-9x", "epoch3", "step-000007.bak"):
        (folder.path / name).mkdir()
    (folder.path.parent / "zzz.txt").touch()
    assert newest(folder, check_files=True)[1].step == 2
    assert names(folder) == ["step-000002"]


def test_a_half_written_checkpoint_counts_for_nothing(folder, save):
    save(1)
    half = folder.path / ".step-000002.tmp"
    half.mkdir()
    (half / STAGE).write_bytes(b"half")
    assert newest(folder, check_files=True)[1].step == 1
    save(3)
    assert names(folder) == ["step-000001", "step-000003"]


def test_nothing_is_removed_before_the_newer_one_is_published(folder, save, monkeypatch):
    save(1)
    save(2)

    def killed(temporary, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_folder, "rename_durably", killed)
    with pytest.raises(KeyboardInterrupt):
        save(3)
    assert names(folder) == ["step-000001", "step-000002"]
    assert newest(folder, check_files=True)[1].step == 2


def test_what_a_kill_left_half_written_or_half_removed_is_cleared_away(folder, save):
    save(1)
    for name in (".step-000002.tmp", ".step-000000.removed"):
        (folder.path / name).mkdir()
        (folder.path / name / STAGE).touch()
    folder.remove_leftovers()
    assert [path.name for path in folder.path.iterdir()] == ["step-000001"]


def test_a_run_without_a_checkpoint_has_no_newest(folder):
    assert newest(folder, check_files=True) is None
    folder.remove_leftovers()


def test_a_flipped_byte_in_a_stage_file(folder, save):
    save(1)
    file = save(2) / STAGE
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    remedy = "remove this checkpoint to resume from an older one"
    assert message(folder) == f"{file}: damaged; {remedy}"
    assert newest(folder, check_files=False)[1].step == 2  # rank 0 checks for all


def test_a_missing_stage_file(folder, save):
    file = save(1) / STAGE
    file.unlink()
    remedy = "remove this checkpoint to resume from an older one"
    assert message(folder) == f"{file}: missing; {remedy}"


def test_a_missing_run_state(folder, save):
    file = save(1) / "run_state.json"
    file.unlink()
    assert message(folder) == (
        f"{file}: cannot be read ([Errno 2] No such file or directory: '{file}'); "
        "remove this checkpoint"
    )


def test_a_run_state_that_was_cut_off(folder, save):
    file = save(1) / "run_state.json"
    file.write_text("")
    reason = "Expecting value: line 1 column 1 (char 0)"
    assert message(folder) == f"{file}: cannot be read ({reason}); remove this checkpoint"


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("step", 7, "edited or damaged; remove this checkpoint"),
        ("format_version", 2, "version 2, this release reads 1"),
    ],
)
def test_an_edited_run_state(folder, save, key, value, problem):
    file = save(1) / "run_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    assert message(folder) == f"{file}: {problem}"


def test_tensors_of_another_run_are_refused_by_name(save):
    path = save(1)
    items, optimizer = trained()
    other = [TrainedParameter("model.other", items[0].parameter, owned=True)]
    with pytest.raises(CheckpointError) as caught:
        load_tensors(path, other, optimizer)
    assert str(caught.value) == (
        f"{path}: no tensor parameter/model.other; it belongs to another run"
    )


def test_tensors_of_another_shape_are_refused_by_name(save):
    path = save(1)
    items, optimizer = trained(size=5)
    with pytest.raises(CheckpointError) as caught:
        load_tensors(path, items, optimizer)
    assert str(caught.value) == f"{path}: parameter/model.norm.weight has shape [4], not [5]"


def test_a_file_that_the_state_does_not_list_is_named_and_never_read(folder, save):
    path = save(2)
    other = load_file(path / STAGE)
    name = "parameter/model.norm.weight"
    save_file({**other, name: other[name] + 1}, path / "stage-99.safetensors")
    assert message(folder) == (
        f"{path}/stage-99.safetensors: run_state.json does not list it, so it is of another run; "
        "remove it"
    )
    items, optimizer = trained()
    load_tensors(path, items, optimizer)
    assert torch.equal(items[0].parameter, other[name])


def test_a_state_that_lists_files_elsewhere_is_refused(folder, save, tmp_path):
    path = save(2)
    (path / STAGE).rename(tmp_path / STAGE)
    state = read_run_state(path, check_files=False)
    write_run_state(path, state.model_copy(update={"files": {f"../../{STAGE}": "0"}}))
    assert "lists ../../stage-00.safetensors, outside of it" in message(folder)


def test_a_rank_that_does_not_hash_names_a_file_that_it_cannot_read(folder, save):
    path = save(2)
    os.truncate(path / STAGE, 100)
    with pytest.raises(CheckpointError, match=f"{path}/{STAGE}: cannot be read .*remove this"):
        load_tensors(path, *trained())
