"""The stages of a pipeline generate what transformers generates, with whatever is trained."""

import pytest
import torch
from model_types import architecture_for
from peft import get_peft_model
from stage_threads import generate
from tiny_families import FAMILIES, VOCABULARY, build, config_of, save_tiny
from transformers import AutoModelForCausalLM
from variants import variant

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.objective_config import RejectedSamplingConfig
from headrace.trainer.architecture.families_state import STATE_LAYERS
from headrace.trainer.architecture.read_architecture import read_architecture
from headrace.trainer.building.make_plan import make_plan
from headrace.trainer.building.model_builder import build_stage
from headrace.trainer.building.self_check import save_tiny as save_tiny_type
from headrace.trainer.pipeline.answers import Prompt
from headrace.trainer.stage.cached_stage import check_generates

LENGTHS = (5, 3, 11, 7, 1)
LIMITS = (12, 4, 9, 1, 15)
STOPS = list(range(3, VOCABULARY, 9))  # a ninth of all tokens, so that chance ends some answers
LORA = {"kind": "lora", "rank": 4, "dropout": 0.1}
# the longest text of PROMPTS, up to which the model's rotary frequencies stay the same
STEADY = {"phi3": {"original_max_position_embeddings": 20}}
DEFAULT = ("llama", "gemma2", "phi3")
EXHAUSTIVE = pytest.mark.exhaustive
STAGES_OF = {"partition": 2, "weight_offload": 1}  # the only number that the change is made with


def make_prompts():
    generator = torch.Generator().manual_seed(5)
    return [
        Prompt(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist(), limit, seed)
        for seed, (length, limit) in enumerate(zip(LENGTHS, LIMITS, strict=True))
    ]


PROMPTS = make_prompts()


def settings(**values):
    return RejectedSamplingConfig.model_validate({"batch_size": 3, **values})


@torch.no_grad()
def move(built):
    """Adapters away from zero, so that they say something."""
    for part in built:
        for item in part.trained:
            seed = torch.Generator().manual_seed(len(item.name))
            item.parameter.add_(torch.randn(item.parameter.shape, generator=seed) * 0.2)


@torch.no_grad()
def as_transformers(directory, built):
    """The same model and adapter, put together by transformers and PEFT."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    if built[0].method.peft is not None:
        model = get_peft_model(model, built[0].method.peft)
    found = dict(model.named_parameters())
    for part in built:
        for item in part.trained:
            found[item.name].copy_(item.parameter)
    return model.eval()


def greedy(model, prompt, stop_tokens):
    """Tokens of transformers' answer to one prompt."""
    output = model.generate(
        input_ids=torch.tensor([prompt.ids]),
        attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.int64),
        max_new_tokens=prompt.limit,
        do_sample=False,
        eos_token_id=stop_tokens or None,
        pad_token_id=0,
    )
    return output[0, len(prompt.ids) :].tolist()


def rotary_changes(family):
    changes = STEADY.get(family, {})
    if "rope_parameters" in FAMILIES[family]:
        changes = changes | {"rope_parameters": FAMILIES[family]["rope_parameters"] | changes}
    return changes


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.exhaustive])
        for name in FAMILIES
    ],
)
def test_greedy_answers_are_transformers_own_at_any_number_of_stages(tmp_path, family):
    directory = save_tiny(family, tmp_path / "model", **rotary_changes(family))
    for stages in (1, 2, 3):
        built = build(config_of(directory, stages, LORA, router_loss=0.0))
        move(built)
        if stages == 1:
            model = as_transformers(directory, built)
            stops = [greedy(model, PROMPTS[0], [])[2]]  # ends the first answer, and some others
            expected = [greedy(model, prompt, stops) for prompt in PROMPTS]
        answers = generate(built, PROMPTS, settings(temperature=0), stops)
        assert [answer.ids for answer in answers] == expected
        assert [answer.ended for answer in answers] == [ids[-1] in stops for ids in expected]
    assert answers[0].ended
    assert len(answers[0].ids) < LIMITS[0]


@pytest.mark.parametrize(
    "name",
    [
        *("mpt-6-heads", "gemma-3n", "gemma-4-e2b"),
        pytest.param("bloom-6-heads", marks=EXHAUSTIVE),
        pytest.param("falcon-alibi", marks=EXHAUSTIVE),
        pytest.param("falcon-rw", marks=EXHAUSTIVE),
    ],
)
def test_biases_by_distance_and_shared_keys_are_kept_from_token_to_token(tmp_path, name):
    directory = variant(name, tmp_path / "model")
    for stages in (1, 3):
        built = build(config_of(directory, stages, {"kind": "lora", "rank": 4}, router_loss=0.0))
        move(built)
        if stages == 1:
            model = as_transformers(directory, built)
            expected = [greedy(model, prompt, []) for prompt in PROMPTS]
            check_generates(built[0].stage, built[0].architecture, 20)
        answers = generate(built, PROMPTS, settings(temperature=0), [])
        assert [answer.ids for answer in answers] == expected
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)


@pytest.mark.parametrize(
    ("adapter", "changes"),
    [
        ({"kind": "dora", "rank": 4, "target_modules": ["q_proj", "lm_head"]}, {}),
        ({"kind": "none"}, {"dtype": "bfloat16"}),
        (LORA, {"quantization": {"backend": "bnb"}}),
        (LORA, {"partition": [1.5, 2.5], "adapter": {**LORA, "dropout": 0.0}}),
        (LORA, {"weight_offload": "mlp"}),
    ],
    ids=["dora", "full in bfloat16", "quantized", "half layers", "offloaded"],
)
def test_one_stage_and_two_draw_the_same_tokens(tmp_path, adapter, changes):
    directory = save_tiny("llama", tmp_path / "model", tie_word_embeddings=False)
    drawn = []
    for stages in (1, 2):
        values = {
            key: value for key, value in changes.items() if STAGES_OF.get(key, stages) == stages
        }
        built = build(config_of(directory, stages, **{"adapter": adapter, **values}))
        move(built)
        drawn.append(generate(built, PROMPTS, settings(min_p=0.02), STOPS))
    assert drawn[0] == drawn[1]
    assert len({tuple(answer.ids) for answer in drawn[0]}) == len(PROMPTS)


def test_what_is_drawn_goes_by_the_seed_and_not_by_who_is_answered_beside(tmp_path):
    built = build(config_of(save_tiny("llama", tmp_path / "model"), 1, LORA))
    together = generate(built, PROMPTS, settings(), STOPS)
    alone = generate(built, PROMPTS[::-1], settings(batch_size=1), STOPS)[::-1]
    assert alone == together
    other = [Prompt(prompt.ids, prompt.limit, prompt.seed + 100) for prompt in PROMPTS]
    assert generate(built, other, settings(), STOPS) != together


def test_an_answer_that_is_over_does_not_change_the_rotary_frequencies_of_another(tmp_path):
    changes = rotary_changes("phi3")
    built = build(config_of(save_tiny("phi3", tmp_path / "model", **changes), 1, LORA))
    prompts = [Prompt([5] * 18, 2, 1), Prompt([7], 19, 2)]
    together = generate(built, prompts, settings(), [])
    assert together == [generate(built, [prompt], settings(), [])[0] for prompt in prompts]
    assert [len(answer.ids) for answer in together] == [2, 19]


def test_what_cannot_be_generated_is_refused(tmp_path):
    built = build(config_of(save_tiny("phi3", tmp_path / "model"), 1, LORA))[0]
    check_generates(built.stage, built.architecture, 10)
    with pytest.raises(ConfigError, match=r"texts of up to 11 tokens, but .* change beyond 10"):
        check_generates(built.stage, built.architecture, 11)
    built.stage.layers[0].forward = lambda hidden: hidden
    with pytest.raises(ConfigError, match="Phi3DecoderLayer keeps no keys and values"):
        check_generates(built.stage, built.architecture, 10)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in ("falcon_h1", "qwen3_next") else [EXHAUSTIVE])
        for name, states in STATE_LAYERS.items()
        if states.cached
    ],
)
def test_states_are_kept_from_token_to_token(tmp_path, family):
    save_tiny_type(architecture_for(family, tiny=True), tmp_path)
    config = config_of(tmp_path, 2, {"kind": "lora", "rank": 4}, router_loss=0.0)
    plan = make_plan(config, read_architecture(tmp_path))
    built = [build_stage(config, stage, torch.device("cpu"), plan) for stage in range(2)]
    move(built)
    model = as_transformers(tmp_path, built)
    expected = [greedy(model, prompt, []) for prompt in PROMPTS]
    answers = generate(built, PROMPTS, settings(temperature=0), [])
    assert [answer.ids for answer in answers] == expected


@pytest.mark.parametrize("family", ["minimax", "recurrent_gemma"])
def test_states_outside_of_the_cache_are_refused(tmp_path, family):
    save_tiny_type(architecture_for(family, tiny=True), tmp_path)
    config = config_of(tmp_path, 1, LORA, router_loss=0.0)
    plan = make_plan(config, read_architecture(tmp_path))
    built = build_stage(config, 0, torch.device("cpu"), plan)
    with pytest.raises(ConfigError, match=f"{family} keeps the states of its layers outside"):
        check_generates(built.stage, plan.architecture, 20)
