"""Reward models: scores of transformers, losses of TRL, in every layout; others load them."""

import numpy as np
import pytest
import torch
from pair_cases import KINDS, RANK, make_pairs, move, save_model
from pair_rows import PAIRS
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from runs import checkpoint_tensors, exact_metrics, read_metrics
from tiny_families import build, config_of, gradients_of, run_micro_batch
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from headrace.schemas.errors import ConfigError
from headrace.schemas.shards.manifest_file import read_manifest
from headrace.trainer.architecture.read_architecture import read_architecture
from headrace.trainer.batches.pair_batch import ends_of, make_scored_batch
from headrace.trainer.building.weight_source import initial_score
from headrace.trainer.export.merge import merge
from headrace.trainer.export.sample import Sampler
from headrace.trainer.objectives.scored_model import with_score
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.shards.decoded_pairs import DecodedPairs
from headrace.trainer.shards.row_groups import RowAddress, list_row_groups
from headrace.trainer.shards.row_source import RowSource
from headrace.trainer.shards.shard_reader import ShardReader
from headrace.trainer.stage.micro_batch import MicroBatch

LENGTH = 24
CENTER = 0.3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("reward") / "model")


def step(model, kind, stages, places=None, length=LENGTH):
    """A step's output, gradients and trained parameters."""
    adapter = {"kind": kind, **({"rank": RANK} if kind == "lora" else {})}
    objective = {"kind": "reward", "center": CENTER}
    built = build(config_of(model, stages, adapter, objective=objective))
    for part in built:
        part.stage.train()
    trained = [(item.name, item.parameter) for part in built for item in part.trained]
    move(kind, trained)
    arguments = ([places or [[pair] for pair in PAIRS]], length, Position(), OverlongCount())
    batch = make_scored_batch(*arguments, padding=0)
    micro_batch = MicroBatch(
        document_lengths=batch.document_lengths[0],
        row_lengths=batch.row_lengths[0],
        labels=batch.labels[0].long(),
        loss_scale=1 / len(PAIRS),
        router_scale=1.0,
        seed=0,
        extras=batch.extras[0],
    )
    output = run_micro_batch(built, batch.input_ids[0], micro_batch)[-1]
    return output, gradients_of(built), dict(trained)


def theirs(directory, kind, trained):
    """Loss, rewards and gradients by transformers, each answer alone, and TRL's formula."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1)
    if kind == "lora":
        settings = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, **settings))
    model = model.double().train()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in trained.items():
            parameters[name].copy_(value)
    scores = [
        [model(torch.tensor([prompt + answer])).logits[0, 0] for answer in answers]
        for prompt, *answers in make_pairs()
    ]
    chosen, rejected = torch.stack([torch.stack(pair) for pair in scores]).unbind(1)
    loss = -functional.logsigmoid(chosen - rejected).mean()
    loss = loss + CENTER * torch.mean((chosen + rejected) ** 2)
    loss.backward()
    return loss.item(), chosen, rejected, {name: parameters[name].grad for name in trained}


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_losses_and_gradients_are_those_of_transformers_and_trl(model, kind):
    output, gradients, trained = step(model, kind, 2)
    assert any(name.endswith("score.modules_to_save.default.weight") for name in trained) == (
        kind == "lora"
    )
    loss, chosen, rejected, expected = theirs(model, kind, trained)
    assert output.value.item() == pytest.approx(loss, rel=1e-5)
    for ours, reference in (
        (output.pairs.chosen_reward, chosen),
        (output.pairs.rejected_reward, rejected),
    ):
        torch.testing.assert_close(ours.double(), reference.detach(), rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = max(1e-2, expected[name].norm().item())
        difference = (gradient.double() - expected[name]).norm().item()
        assert difference <= 1e-5 * scale, name


@pytest.mark.parametrize("kind", KINDS)
def test_two_stages_give_the_bits_of_one_and_packed_pairs_the_same_rewards(model, kind):
    (one, gradients, _), (two, others, _) = (step(model, kind, stages) for stages in (1, 2))
    assert torch.equal(one.value, two.value)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    packed, _, _ = step(model, kind, 2, [PAIRS[:3], PAIRS[3:]], 48)
    for value, expected in zip(vars(packed.pairs).values(), vars(one.pairs).values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_the_last_token_before_padding_counts_as_in_transformers():
    pair = PAIRS[0]
    ended = pair.chosen._replace(input_ids=np.append(pair.chosen.input_ids, [7, 7]))
    places = [[pair._replace(chosen=ended)], []]
    length = len(pair.chosen.input_ids)
    assert ends_of(places, 7)[0] == (0, length - 1)
    assert ends_of(places, None)[0] == (0, length + 1)
    assert ends_of(places, 7)[1] == (2, len(pair.rejected.input_ids) - 1)


def test_models_without_a_score_are_refused_by_name(model, tmp_path):
    architecture = read_architecture(model)

    class Unknown(type(architecture.config)):
        model_type = "llama"

    architecture.config.__class__ = Unknown
    with pytest.raises(ConfigError, match="no model of it that gives a score"):
        with_score(architecture, "here")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": {"kind": "blocks", "blocks": 1}}, '"lora", "dora" or "none"'),
        ({"adapter": {"kind": "none", "layers": "0:1"}}, "trains a head behind all layers"),
        ({"sequence_parallel": 2}, "needs the last token of every answer"),
        ({"rejected_sampling": {}}, "generates nothing"),
        ({"objective": {"kind": "reward", "beta": 0.2}}, "beta has no meaning"),
    ],
)
def test_what_does_not_go_with_it_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        config_of("unused", **({"objective": {"kind": "reward"}} | settings))


# --- whole runs ---

SETTINGS = {
    "objective__kind": "reward",
    "optimizer__lr": 1e-2,
    "scheduler__warmup_steps": 0,
    "max_steps": 6,
    "checkpoint__every_steps": 3,
}


def evaluation_pairs(shards):
    """The first pairs of an evaluation split, in order."""
    manifest = read_manifest(shards)
    rows = RowSource(
        directories=[shards], manifests=[manifest], split="evaluation", held_row_groups=9
    )
    reader = ShardReader(DecodedPairs, rows)
    groups = list_row_groups([manifest], "evaluation")
    found = [reader.row(RowAddress(g, n)) for g in groups for n in range(g.rows)]
    return found[:9]


def accuracy_of(model, pairs):
    """Share of pairs whose chosen answer is scored higher, and the mean margin."""
    with torch.no_grad():
        scores = [
            [model(torch.tensor([side.input_ids.tolist()])).logits[0, 0].item() for side in pair]
            for pair in pairs
        ]
    margins = np.array([chosen - rejected for chosen, rejected in scores])
    return (margins > 0).mean(), margins.mean()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_loaded_by_transformers_and_resumes_over_two_stages(
    kind, pair_training, pair_shards, tiny_model
):
    settings = SETTINGS | {"adapter__kind": kind, "adapter__dropout": 0.0}
    one = pair_training.run("one", 1, **settings)
    *_, last = (line for line in read_metrics(one) if line["kind"] == "evaluation")
    assert last["pairs"]["accuracy"] > 0.9

    load = AutoModelForSequenceClassification.from_pretrained
    if kind == "lora":
        found = PeftModel.from_pretrained(load(tiny_model, num_labels=1), one / "adapter")
    else:
        found = load(one / "model")
        assert found.config.num_labels == 1
    accuracy, margin = accuracy_of(found.float().eval(), evaluation_pairs(pair_shards))
    assert accuracy == last["pairs"]["accuracy"]
    assert margin == pytest.approx(last["pairs"]["margin"], rel=1e-4)

    if kind == "lora":
        assert merge(tiny_model, one / "adapter", one / "merged")
        merged = load(one / "merged").float().eval()
        assert accuracy_of(merged, evaluation_pairs(pair_shards))[1] == pytest.approx(margin, 1e-4)
        for model, adapter in ((tiny_model, one / "adapter"), (one / "merged", None)):
            with pytest.raises(ConfigError, match="gives a score and writes no text"):
                Sampler(model, adapter)

        lines, expected = exact_metrics(one), checkpoint_tensors(one)
        (one / "checkpoints" / "step-000006").rename(one / "kept")
        pair_training.run("one", 2, "--resume", **settings, pipeline_stages=2)
        assert exact_metrics(one) == lines
        resumed = checkpoint_tensors(one)
        assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_new_head_is_the_same_in_every_layout_and_of_the_models_own_spread(model):
    config = read_architecture(model).config
    first, again, other = (initial_score(config, (1, 4096), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.std().item() == pytest.approx(config.initializer_range, rel=0.1)
