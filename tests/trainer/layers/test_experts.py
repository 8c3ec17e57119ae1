"""Experts of every layout, sorted and multiplied group by group, against transformers' own."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from headrace.kernels.experts import grouped_product
from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.layers.expert_adapters import AdaptedExperts, swap_expert_adapters
from headrace.trainer.layers.experts import GroupedExperts, has_known_layout, install_experts
from headrace.trainer.quantized.selection import Quantization

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
FAMILIES = {
    "mixtral": {"num_local_experts": 5},
    "qwen2_moe": {"num_experts": 5},
    "qwen3_moe": {"num_experts": 5},
    "gpt_oss": {"num_local_experts": 5, "head_dim": 8},
}
TOKENS, EACH, EXPERTS = 11, 2, 5


def experts_of(family):
    """Experts of a model of transformers, with weights that matter."""
    config = CONFIG_MAPPING[family](**SMALL | FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    (found,) = [part for part in model.modules() if has_known_layout(part)]
    generator = torch.Generator().manual_seed(0)
    for parameter in found.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    return found


def inputs():
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, SMALL["hidden_size"], generator=generator)
    scores = torch.rand(TOKENS, EXPERTS - 1, generator=generator)  # the last one is sent nothing
    weights, chosen = scores.topk(EACH, dim=-1)
    return hidden.requires_grad_(), chosen, weights.requires_grad_()


def relative(ours, exact):
    return float((ours - exact).detach().norm() / exact.detach().norm())


@pytest.mark.filterwarnings("ignore")  # of the tiny config's rotary factors
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_transformers_own(family, trained):
    theirs = experts_of(family).requires_grad_(trained)
    ours = GroupedExperts(copy.deepcopy(theirs))
    assert ours.gate is not None, "the fused gate is used"
    found, expected = [], []
    for experts, results in ((theirs, expected), (ours, found)):
        hidden, chosen, weights = inputs()
        output = experts(hidden, chosen, weights)
        wanted = [hidden, weights, *(experts.parameters() if trained else ())]
        gradients = torch.autograd.grad((output * hidden.detach().cos()).sum(), wanted)
        results += [output, *gradients]
    assert max(map(relative, found, expected)) <= 1e-5


def adapted(experts):
    """Experts with adapters that do something, by PEFT."""
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model = inject_adapter_in_model(config, torch.nn.ModuleDict({"experts": experts}))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_are_pefts_own_without_the_change_of_a_weight(family):
    theirs = experts_of(family).requires_grad_(False)
    models = [adapted(copy.deepcopy(theirs)), adapted(GroupedExperts(copy.deepcopy(theirs)))]
    swap_expert_adapters(models[1])
    assert isinstance(models[1]["experts"], AdaptedExperts)
    results = []
    for model in models:
        hidden, chosen, weights = inputs()
        output = model["experts"](hidden, chosen, weights)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        wanted = [hidden, weights, *trained.values()]
        results.append([output, *torch.autograd.grad(output.square().sum(), wanted)])
        assert len(trained) == 4 and all(".lora_" in name for name in trained)
    assert max(map(relative, *results)) <= 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_quantized_experts_are_given_back_as_the_parameters_were(family):
    theirs = experts_of(family)
    ours = GroupedExperts(copy.deepcopy(theirs))
    quantization = Quantization(QuantizationConfig(backend="bnb", type="int8"))
    for name in ours.weights:
        value = ours.as_held(getattr(theirs, name).detach())
        ours.set_quantized(name, quantization.make(value, name, torch.float32), torch.float32)
        assert ours.shape_of(name) == getattr(theirs, name).shape
        assert relative(ours.dequantized(name), getattr(theirs, name)) <= 0.02
    assert relative(ours(*inputs()), theirs(*inputs())) <= 0.05


@pytest.mark.filterwarnings("ignore")
def test_tokens_that_go_nowhere_add_nothing():
    ours = GroupedExperts(experts_of("mixtral").requires_grad_(False))
    hidden, chosen, weights = inputs()
    chosen[3] = EXPERTS  # transformers' mark
    output = ours(hidden, chosen, weights)
    assert not output[3].any()
    assert output[2].any()


@pytest.mark.filterwarnings("ignore")
def part_of(experts, start, end):
    """Some of the experts, as a rank holds them beside those of others."""
    part = GroupedExperts(copy.deepcopy(experts))
    for name, value in list(part._parameters.items()):
        part._parameters[name] = torch.nn.Parameter(value.data[start:end].clone())
    part.num_experts, part.is_part = end - start, True
    return part


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_parts_of_the_experts_multiply_their_own_rows_and_add_up(family, monkeypatch):
    experts = experts_of(family)
    hidden, chosen, weights = inputs()
    expected = GroupedExperts(copy.deepcopy(experts))(hidden, chosen, weights)
    expected_gradients = torch.autograd.grad(expected.square().sum(), [hidden, weights])
    multiplied, product = [], grouped_product.grouped_product_reference

    def product_of_garbage(x, matrices, offsets):
        """Leave rows of others' experts as a GPU does: with what was in their memory."""
        output = product(x, matrices, offsets)
        multiplied.append(int(offsets[-1]))
        output[multiplied[-1] :] = torch.nan
        return output

    monkeypatch.setattr(grouped_product, "grouped_product_reference", product_of_garbage)
    bounds = [(0, 2), (2, EXPERTS)]
    parts = [part_of(experts, *pair) for pair in bounds]
    numbers = [torch.where((chosen >= a) & (chosen < b), chosen - a, b - a) for a, b in bounds]
    total = sum(part(hidden, of, weights) for part, of in zip(parts, numbers, strict=True))
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(total.square().sum(), [hidden, weights])
    for ours, exact in zip(gradients, expected_gradients, strict=True):
        assert relative(ours, exact) < 1e-5
    assert sum(multiplied) == 2 * 2 * TOKENS * EACH, "each row once a product and direction"


def test_a_gate_of_another_kind_is_computed_by_transformers_code():
    theirs = experts_of("mixtral")
    theirs.act_fn = torch.nn.GELU()
    ours = GroupedExperts(copy.deepcopy(theirs))
    assert ours.gate is None
    torch.testing.assert_close(ours(*inputs()), theirs(*inputs()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiler_takes_experts_in_one_piece(family):
    ours = GroupedExperts(experts_of(family).requires_grad_(False))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs()), ours(*inputs()))


@pytest.mark.filterwarnings("ignore")
def test_experts_are_replaced_wherever_they_are():
    config = CONFIG_MAPPING["qwen3_moe"](**SMALL | {"num_experts": 5, "num_hidden_layers": 2})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = [name for name, _ in model.named_parameters()]
    install_experts(model)
    assert sum(isinstance(part, GroupedExperts) for part in model.modules()) == 2
    assert [name for name, _ in model.named_parameters()] == names
