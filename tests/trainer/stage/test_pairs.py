"""Training on pairs: as TRL does it, the same in every layout, with the reference where it was."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pair_cases import KINDS, LOSSES, RANK, make_pairs, move, probe, save_model
from pair_rows import PAIRS
from runs import checkpoint_tensors, exact_metrics, read_metrics
from tiny_families import build, config_of, gradients_of, run_micro_batch, run_on, save_tiny

from headrace.schemas.errors import DataError
from headrace.schemas.shards.manifest_file import read_manifest
from headrace.schemas.toml_config import load_config
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.batches.extras import Extras, pairs_of
from headrace.trainer.batches.pair_batch import make_pair_batch
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.order.row_order import RowOrder
from headrace.trainer.order.simulation import simulate
from headrace.trainer.preflight import check
from headrace.trainer.shards.decoded_pairs import DecodedPairs, PairFacts
from headrace.trainer.shards.row_groups import list_row_groups
from headrace.trainer.shards.row_source import RowSource
from headrace.trainer.shards.shard_reader import ShardReader
from headrace.trainer.stage.stage import MicroBatch

FIXTURE = Path(__file__).parents[2] / "support" / "pair_losses.json"
LENGTH = 24


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def micro_batch(places, length=LENGTH, seed=0):
    """Ids, and what a stage is told of them, of pairs in places."""
    batch = make_pair_batch([places], length, Position(), OverlongCount())
    pairs = sum(len(place) for place in places)
    return batch.input_ids[0], MicroBatch(
        document_lengths=batch.document_lengths[0],
        row_lengths=batch.row_lengths[0],
        labels=batch.labels[0].long(),
        loss_scale=1 / pairs,
        router_scale=1.0,
        seed=seed,
        extras=batch.extras[0],
        chosen_scale=1 / batch.chosen_tokens,
    )


def run(config, places, kind, **changes):
    """A step's outputs and gradients, away from the reference."""
    built = build(config)
    for part in built:
        part.stage.train()
    move(kind, [(item.name, item.parameter) for part in built for item in part.trained])
    outputs = run_micro_batch(built, *micro_batch(places, **changes))
    return outputs[-1], gradients_of(built)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("pairs") / "model")


def config_for(model, kind, stages=1, **objective):
    adapter = {"kind": kind, "rank": RANK} if kind == "lora" else {"kind": kind}
    return config_of(model, stages, adapter, objective={"kind": "dpo", **objective})


def test_chosen_answers_have_one_half_of_the_places_and_rejected_ones_the_other():
    batch = make_pair_batch([[PAIRS[:2], []], [PAIRS[2:], []]], 40, Position(), OverlongCount())
    for side, places in ((0, (0, 1)), (1, (2, 3))):
        expected = np.concatenate([pair[side].input_ids for pair in PAIRS[:2]])
        assert batch.input_ids[0, places[0], : len(expected)].tolist() == expected.tolist()
        assert (batch.labels[0, places[1]] == -100).all()
    prompt, _, rejected = make_pairs()[0]
    trained = batch.labels[0, 2, : len(prompt + rejected)]
    assert trained.tolist() == [-100] * (len(prompt) - 1) + rejected + [-100]
    assert pairs_of(batch.extras) == [[[(9, 13), (15, 10)], []], [[(3, 8), (18, 16)], []]]
    assert batch.row_lengths[0] == [24, 0, 23, 0]
    assert [row.tokens for row in batch.rows[0][0]] == [22, 25]
    assert batch.chosen_tokens == sum(len(chosen) for _, chosen, _ in make_pairs())
    assert batch.trained_tokens == sum(len(c) + len(r) for _, c, r in make_pairs())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_rewards_and_gradients_are_those_of_trl(model, name, kind):
    """qlora-pipe 3.1.13: DPO with full fine-tuning died."""
    expected = json.loads(FIXTURE.read_text())["answers"][f"{kind}, {name}"]
    config = config_for(model, kind, 2, **LOSSES[name][0])
    output, gradients = run(config, [[pair] for pair in PAIRS], kind)
    assert output.value.item() == pytest.approx(expected["loss"], rel=1e-5)
    for reward in ("chosen_reward", "rejected_reward"):
        ours = getattr(output.pairs, reward).mean().item()
        assert ours == pytest.approx(expected[reward], abs=1e-5)
    assert gradients.keys() == expected["gradients"].keys()
    for parameter, gradient in gradients.items():
        theirs = expected["gradients"][parameter]
        assert probe(gradient) == pytest.approx(theirs, abs=1e-5 * max(1e-2, theirs[0])), parameter


@pytest.mark.parametrize("kind", KINDS)
def test_two_stages_give_the_bits_of_one_and_packed_pairs_the_losses_of_single_ones(model, kind):
    apart = [[pair] for pair in PAIRS]
    one, gradients = run(config_for(model, kind), apart, kind)
    two, others = run(config_for(model, kind, 2), apart, kind)
    assert torch.equal(one.value, two.value)
    assert torch.equal(one.pairs.loss, two.pairs.loss)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)

    packed, others = run(config_for(model, kind, 2), [PAIRS[:3], PAIRS[3:]], kind, length=48)
    for value, expected in zip(vars(packed.pairs).values(), vars(one.pairs).values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in others.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "lora", "dropout": 0.1, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"kind": "dora", "modules_to_save": ["lm_head", "input_layernorm"]},
        {"kind": "blocks", "blocks": 2},
        {"kind": "none"},
    ],
    ids=lambda adapter: adapter["kind"],
)
def test_before_the_first_step_no_answer_has_a_reward(model, adapter):
    config = config_of(model, 2, adapter, objective={"kind": "dpo"})
    built = build(config)
    for part in built:
        part.stage.eval()
    with torch.no_grad():
        output = run_on(built, *micro_batch([[pair] for pair in PAIRS]))[-1]
    assert (output.pairs.chosen_reward == 0).all()
    assert (output.pairs.rejected_reward == 0).all()


def test_a_mixtures_reference_leaves_the_routers_loss_alone(tmp_path):
    directory = save_tiny("mixtral", tmp_path / "model")
    adapter = {"kind": "lora", "rank": RANK, "target_parameters": "experts"}
    places = [[pair] for pair in PAIRS]
    settings = {"router_loss": 0.3}
    dpo = build(config_of(directory, 1, adapter, objective={"kind": "dpo"}, **settings))
    orpo = build(config_of(directory, 1, adapter, objective={"kind": "orpo"}, **settings))
    losses = []
    for built in (dpo, orpo):
        move("lora", [(item.name, item.parameter) for item in built[0].trained])
        built[0].stage.train()
        losses.append(run_micro_batch(built, *micro_batch(places))[-1].router_loss)
    assert losses[0].item() == losses[1].item() > 0


def test_filling_without_a_pair_has_no_gradient(model):
    built = build(config_for(model, "lora"))
    ids, batch = micro_batch([PAIRS[:1], []])
    empty = make_pair_batch([[[]]], LENGTH, Position(), OverlongCount())
    outputs = run_micro_batch(
        built,
        empty.input_ids[0],
        MicroBatch([[LENGTH]] * 2, [0, 0], empty.labels[0].long(), 1.0, 1.0, 0, Extras([[]]), 1.0),
    )
    assert outputs[-1].value.item() == 0
    assert all(not gradient.any() for gradient in gradients_of(built).values())
    run_micro_batch(built, ids, batch)
    assert any(gradient.any() for gradient in gradients_of(built).values())


# --- whole runs ---

OBJECTIVE = {"objective__kind": "dpo", "objective__beta": 0.5}


@pytest.mark.slow
def test_a_run_learns_to_prefer_and_resumes_with_the_same_bits(pair_training):
    settings = {**OBJECTIVE, "optimizer__lr": 1e-2, "scheduler__warmup_steps": 0}
    settings |= {"loader__pack": "best_fit", "max_steps": 6}
    one = pair_training.run("one", 1, **settings, checkpoint__every_steps=3)
    first, *_, last = (line for line in read_metrics(one) if line["kind"] == "evaluation")
    assert first["pairs"]["accuracy"] == first["pairs"]["margin"] == 0
    assert last["pairs"]["accuracy"] > 0.9
    assert last["pairs"]["margin"] > 0.3
    assert last["loss"] < first["loss"]
    steps = [line for line in read_metrics(one) if line["kind"] == "train"]
    assert all(line["cross_entropy"] > 1 for line in steps)

    sets = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in settings.items()]
    config = load_config(TrainConfig, pair_training.config, sets)
    for line, plan in zip(steps, simulate(config, check(config, 1)), strict=True):
        names = ("rows_sha256", "tokens", "fill", "source_tokens", "epoch")
        assert [line[name] for name in names] == [getattr(plan, name) for name in names]

    (one / "checkpoints" / "step-000006").rename(one / "kept")
    config = ["--resume"]
    two = pair_training.directory / "one"
    lines = exact_metrics(one)
    pair_training.run("one", 2, *config, **settings, checkpoint__every_steps=3, pipeline_stages=2)
    assert exact_metrics(two) == lines
    resumed = checkpoint_tensors(two)
    (two / "checkpoints" / "step-000006").rename(two / "again")
    (two / "kept").rename(two / "checkpoints" / "step-000006")
    expected = checkpoint_tensors(two)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_what_is_known_of_pairs_without_their_tokens_agrees_with_them(pair_shards):
    manifest = read_manifest(pair_shards)
    pairs, facts = (
        ShardReader(
            decode,
            RowSource(
                directories=[pair_shards], manifests=[manifest], split="train", held_row_groups=9
            ),
        )
        for decode in (DecodedPairs, PairFacts)
    )
    order = RowOrder(list_row_groups([manifest], "train"), 0, window=1, shuffle=False)
    tokens = 0
    for index in range(manifest.sources[0].rows - manifest_rows(manifest, "evaluation")):
        (rows, number), (known, _) = pairs.locate(order[index]), facts.locate(order[index])
        pair = rows.row(number)
        sides = [len(side.input_ids) for side in pair]
        assert rows.lengths[number] == known.lengths[number] == max(sides)
        assert known.row(number) == ("pairs", pair.chosen.row_key, sum(sides))
        assert not pair.chosen.loss_mask[0] and pair.rejected.loss_mask[-1]
        tokens += sum(sides)
    assert tokens == manifest.ledger.tokens_out["train"]


def manifest_rows(manifest, split):
    return sum(shard.rows for shard in manifest.split(split))


def test_shards_without_pairs_are_refused_before_anything_starts(training):
    config = load_config(TrainConfig, training.config, ['objective.kind="dpo"'])
    with pytest.raises(DataError, match="holds no pairs"):
        check(config, 1)
    assert check(load_config(TrainConfig, training.config), 1).capacity == 64


def test_pairs_take_two_places_and_other_objectives_the_chosen_answers_only(pair_training):
    pairs = check(load_config(TrainConfig, pair_training.config, ['objective.kind="orpo"']), 1)
    chosen = check(load_config(TrainConfig, pair_training.config), 1)
    assert (pairs.capacity, chosen.capacity) == (128, 64)
