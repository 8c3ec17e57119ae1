"""Parts of quantized weights hold the very numbers of the whole."""

import pytest
import torch

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.quantization_config import QuantizationConfig
from headrace.trainer.quantized.formats import format_of
from headrace.trainer.quantized.selection import Quantization
from headrace.trainer.tensor_parallel.shard import TensorShard
from headrace.trainer.tensor_parallel.weight_cut import WeightCut

NF4 = {"backend": "bnb"}
NESTED = {**NF4, "double_quantization": True}
INT8, FP8 = {**NF4, "type": "int8"}, {"backend": "fp8"}


def hqq(bits):
    return {"backend": "hqq", "bits": bits, "group_size": 64, "axis": 1}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    "settings",
    [NF4, NESTED, INT8, FP8, *map(hqq, (8, 4, 3, 2))],
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


@pytest.mark.parametrize("settings", [NF4, hqq(4), INT8, FP8])
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_multiply_in_8_bits_by_scales_of_the_whole_rows(settings, dim):
    config = QuantizationConfig.model_validate({**settings, "matmul": "fp8"})
    generator = torch.Generator().manual_seed(0)
    value = torch.randn((128, 256), generator=generator)
    x = torch.randn((5, 256), generator=generator)
    whole = Quantization(config, None).make(value, "layer", torch.float32)
    parts = [whole.part(dim, rank, 2) for rank in range(2)]
    inputs = x.chunk(2, 1) if dim else (x, x)
    found = [part.linear(own, None) for part, own in zip(parts, inputs, strict=True)]
    scales = [part.product_scales for part in parts]
    if dim == 0:
        assert torch.equal(torch.cat(found, 1), whole.linear(x, None))
        assert torch.equal(torch.cat(scales), whole.product_scales)
        return
    assert all(torch.equal(one, whole.product_scales) for one in scales)
    exact = x @ whole.dequantize(torch.float32).T
    ours, theirs = ((y - exact).norm() / exact.norm() for y in (sum(found), whole.linear(x, None)))
    assert ours < 1.1 * theirs < 0.06, "a row of inputs has a scale in each part"


def test_parts_that_matrix_units_cannot_multiply_with_are_refused():
    config = QuantizationConfig.model_validate(FP8)
    cut = WeightCut(TensorShard(0, 2), torch.Size((64, 48)), 1)
    with pytest.raises(ConfigError, match="a part of layer is 64 x 24, which are not multiples"):
        Quantization(config, None).check_part("layer", cut.shape, cut)


@pytest.mark.parametrize("settings", [NF4, NESTED, hqq(4), INT8, FP8])
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
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(settings, shape, line):
    config = QuantizationConfig.model_validate(settings)
    with pytest.raises(ConfigError, match=line):
        format_of(config).check_part("layer", torch.Size(shape), 1, 2, config)
