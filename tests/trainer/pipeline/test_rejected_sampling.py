"""Rejected answers give way to the model's own; prompts and chosen answers stay as they are."""

import json
import shutil

import pytest
import torch
from pair_rows import PAIRS, as_pair
from runs import checkpoint_tensors, exact_metrics, read_metrics

from headrace.schemas.errors import CheckpointError, ConfigError
from headrace.schemas.shards.manifest_file import read_manifest
from headrace.schemas.toml_config import load_config
from headrace.schemas.train.objective_config import RejectedSamplingConfig
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.architecture.stop_tokens import stop_tokens
from headrace.trainer.batches.extras import pairs_of
from headrace.trainer.batches.pair_batch import make_pair_batch
from headrace.trainer.checkpoint.resume_record import check_run_directory, resume_record
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.pipeline.answers import Answer
from headrace.trainer.pipeline.rejected_answers import Room, prompts_of, with_answers
from headrace.trainer.preflight import check

LENGTH = 48
ROOM = Room(sequence_tokens=LENGTH, row_tokens=30)
PLACES = [[PAIRS[:2], []], [PAIRS[2:3], PAIRS[3:]]]


def batch_of(places, length=LENGTH):
    return make_pair_batch(places, length, Position(next_row=4), OverlongCount(rows=2, tokens=9))


def prompts(places, room=ROOM, **settings):
    config = RejectedSamplingConfig.model_validate(settings)
    return list(prompts_of(batch_of(places, room.sequence_tokens), room, config, seed=7))


def test_a_prompt_is_what_stands_before_the_answer_and_has_a_seed_of_its_own():
    found = prompts(PLACES)
    lengths = [4, 7, 2, 5]
    for prompt, pair, length in zip(found, PAIRS, lengths, strict=True):
        assert prompt.ids == pair.rejected.input_ids[:length].tolist()
    assert len({prompt.seed for prompt in found}) == 4
    assert [prompt.seed for prompt in prompts([[PAIRS[3:]]])] == [found[3].seed]


def test_an_answer_has_the_room_of_its_row_and_its_share_of_what_the_place_has_left():
    # longer sides of 13 and 15 tokens, prompts of 4 and 7: 10 tokens are left for each
    assert [prompt.limit for prompt in prompts(PLACES)] == [13 + 10 - 4, 15 + 10 - 7, 28, 25]
    tight = Room(sequence_tokens=28, row_tokens=28)
    assert [prompt.limit for prompt in prompts([[PAIRS[:2]]], tight)] == [9, 8]


def test_limits_are_tokens_and_lengths_of_the_chosen_answer():
    assert [p.limit for p in prompts(PLACES, max_new_tokens=12)] == [12, 12, 12, 12]
    # chosen answers of 5, 8, 1 and 13 tokens
    assert [p.limit for p in prompts(PLACES, max_answer_ratio=1.5)] == [8, 12, 2, 20]
    assert [p.limit for p in prompts(PLACES, max_answer_ratio=0.1)] == [1, 1, 1, 2]
    both = prompts(PLACES, max_answer_ratio=1.5, max_new_tokens=10)
    assert [p.limit for p in both] == [8, 10, 2, 10]


def test_answers_take_the_place_of_rejected_ones_and_nothing_else_changes():
    batch = batch_of(PLACES)
    answers = [Answer(list(range(50, 50 + count)), ended=False) for count in (19, 3, 28, 1)]
    new = with_answers(batch, answers, ROOM)
    fresh = [
        as_pair(pair.chosen.input_ids[:n].tolist(), pair.chosen.input_ids[n:].tolist(), a.ids, key)
        for key, (pair, n, a) in enumerate(zip(PAIRS, (4, 7, 2, 5), answers, strict=True))
    ]
    expected = batch_of([[fresh[:2], []], [fresh[2:3], fresh[3:]]])
    assert torch.equal(new.input_ids, expected.input_ids)
    assert torch.equal(new.labels, expected.labels)
    assert torch.equal(new.input_ids[:, :2], batch.input_ids[:, :2])
    assert torch.equal(new.labels[:, :2], batch.labels[:, :2])
    assert new.document_lengths == expected.document_lengths
    assert pairs_of(new.extras) == [[[(9, 23), (15, 10)], []], [[(3, 30)], [(18, 6)]]]
    assert new.trained_tokens == new.chosen_tokens + sum(len(answer.ids) for answer in answers)
    assert (new.chosen_tokens, new.position) == (batch.chosen_tokens, batch.position)
    assert new.overlong == batch.overlong
    keys = [row.row_key for place in new.rows for rows in place for row in rows]
    assert keys == [0, 1, 2, 3]


def test_a_side_without_a_mask_is_answered_after_its_first_token():
    pair = PAIRS[0]
    plain = pair._replace(rejected=pair.rejected._replace(loss_mask=None))
    found = prompts([[[plain]]])
    assert found[0].ids == pair.rejected.input_ids[:1].tolist()
    new = with_answers(batch_of([[[plain]]]), [Answer([60, 61], ended=True)], ROOM)
    assert new.labels[0, 1, :3].tolist() == [60, 61, -100]


def test_an_answer_ends_where_the_model_the_shards_or_the_config_say(tmp_path, pair_shards):
    manifests, config = [read_manifest(pair_shards)], RejectedSamplingConfig()
    silent = manifests[0].model_copy(
        update={"tokenizer": manifests[0].tokenizer.model_copy(update={"special_tokens": {}})}
    )
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 7}}))
    assert stop_tokens(config, tmp_path, manifests) == {1, 7}
    assert stop_tokens(config, tmp_path, [silent]) == {7}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert stop_tokens(config, tmp_path, manifests) == {1, 8, 9}
    named = RejectedSamplingConfig(stop_tokens=[3])
    assert stop_tokens(named, tmp_path, manifests) == {3}
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=r"has an EOS; name the ids .* rejected_sampling.stop"):
        stop_tokens(config, tmp_path, [silent])


# --- whole runs ---

SETTINGS = {
    "objective__kind": "dpo",
    "objective__beta": 0.5,
    "optimizer__lr": 1e-2,
    "loader__pack": "best_fit",
    "max_steps": 4,
    "checkpoint__every_steps": 2,
    "rejected_sampling__max_answer_ratio": 1.5,
    "rejected_sampling__batch_size": 2,
    "rejected_sampling__min_p": 0.01,
}


def answers_of(run):
    """What does not depend on the clock."""
    steps = [line for line in read_metrics(run) if line["kind"] == "train"]
    return [(line["answers"]["tokens"], line["answers"]["ended"]) for line in steps]


@pytest.mark.slow
def test_two_stages_and_a_resumed_run_are_trained_on_the_same_answers(pair_training):
    one = pair_training.run("one", 1, **SETTINGS)
    shutil.copytree(one, pair_training.directory / "two")
    shutil.rmtree(pair_training.directory / "two" / "checkpoints" / "step-000004")
    two = pair_training.run("two", 2, "--resume", pipeline_stages=2, **SETTINGS)
    assert exact_metrics(two) == exact_metrics(one)
    assert answers_of(two) == answers_of(one)
    assert len({tokens for tokens, _ in answers_of(one)}) > 1
    found, expected = checkpoint_tensors(two), checkpoint_tensors(one)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.exhaustive
def test_replicas_draw_the_answers_of_one_process_and_the_shards_own_are_others(pair_training):
    settings = SETTINGS | {"gradient_accumulation_steps": 2}
    one = pair_training.run("one", 1, **SETTINGS)
    both = pair_training.run("both", 4, pipeline_stages=2, **settings)
    assert answers_of(both) == answers_of(one)
    losses = [
        [line["loss"] for line in read_metrics(run) if line["kind"] == "train"]
        for run in (one, both)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    kept = {key: value for key, value in SETTINGS.items() if "sampling" not in key}
    stored = pair_training.run("stored", 1, **kept)
    first, other = (read_metrics(run)[1] for run in (one, stored))
    assert first["tokens"] != other["tokens"]
    assert first["rows_sha256"] == other["rows_sha256"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.kind": "cross_entropy"}, "has no meaning with objective.kind"),
        ({"rejected_sampling.temperature": 0, "rejected_sampling.min_p": 0.1}, "takes the likel"),
    ],
)
def test_settings_without_a_meaning_are_refused(pair_training, changes, message):
    sets = {"objective.kind": "dpo", "rejected_sampling.batch_size": 2} | changes
    options = [f"{key}={json.dumps(value)}" for key, value in sets.items()]
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, pair_training.config, options)


def test_a_resumed_run_keeps_drawing_or_keeps_from_it(pair_training):
    def config(*sets):
        return load_config(TrainConfig, pair_training.config, ['objective.kind="dpo"', *sets])

    off, on = config(), config("rejected_sampling.temperature=1.0")
    inputs = check(off, 1)
    assert resume_record(on, inputs)["rejected_sampling"] == "on"
    for before, now in ((off, on), (on, off)):
        folder = pair_training.directory / ("was-off" if before is off else "was-on")
        folder.mkdir()
        now = now.model_copy(update={"output_dir": str(folder)})
        (folder / "train.json").write_text(json.dumps(resume_record(before, inputs)))
        with pytest.raises(CheckpointError, match="rejected_sampling was"):
            check_run_directory(now, inputs, resume=True)
        check_run_directory(
            before.model_copy(update={"output_dir": str(folder)}), inputs, resume=True
        )
