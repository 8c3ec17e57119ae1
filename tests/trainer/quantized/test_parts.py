"""Parts of quantized weights hold the very numbers of the whole."""

import pytest
import torch

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.quantized.formats import format_of

NF4 = {"backend": "bnb"}
NESTED = {**NF4, "double_quantization": True}


def hqq(bits):
    return {"backend": "hqq", "bits": bits, "group_size": 64, "axis": 1}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    "settings",
    [NF4, NESTED, *map(hqq, (8, 4, 3, 2))],
    ids=lambda value: " ".join(map(str, value.values())),
)
def test_ranks_hold_the_numbers_of_the_whole(settings, dim, ranks):
    config = QuantizationConfig.model_validate({**NF4, **settings})
    kind, shape = format_of(config), (256, 512)
    kind.check_part("layer", torch.Size(shape), dim, ranks, config)
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = kind.make(value, "layer", config, torch.float32)
    expected = whole.dequantize(torch.float32).chunk(ranks, dim)
    for rank in range(ranks):
        part = whole.part(dim, rank, ranks)
        assert torch.equal(part.dequantize(torch.float32), expected[rank])
        assert part.nbytes <= 1.05 * whole.nbytes / ranks + 3000, "a table, and scales spelled out"


@pytest.mark.parametrize("settings", [NF4, NESTED, hqq(4)])
def test_ranks_hold_whole_experts_of_a_stack(settings):
    config = QuantizationConfig.model_validate({**NF4, **settings})
    value = torch.randn((4, 64, 128), generator=torch.Generator().manual_seed(0))
    whole = format_of(config).make_stack(value, "experts", config, torch.float32)
    expected = whole.dequantize(torch.float32).chunk(2)
    for rank in range(2):
        assert torch.equal(whole.part(0, rank, 2).dequantize(torch.float32), expected[rank])


@pytest.mark.parametrize(
    ("settings", "shape", "line"),
    [
        (NF4, (64, 160), "parts of layer have 80 inputs, which are no multiple of the 64"),
        (hqq(4), (64, 160), "parts of layer have 80 weights, no multiple of 64"),
        ({"backend": "hqq", "axis": 0}, (64, 128), "groups of layer reach over all of it"),
        ({**NF4, "type": "int8"}, (64, 128), "held as int8 are multiplied by scales of whole rows"),
        ({"backend": "fp8"}, (64, 128), "held as fp8 are multiplied by scales of whole rows"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(settings, shape, line):
    config = QuantizationConfig.model_validate(settings)
    with pytest.raises(ConfigError, match=line):
        format_of(config).check_part("layer", torch.Size(shape), 1, 2, config)
