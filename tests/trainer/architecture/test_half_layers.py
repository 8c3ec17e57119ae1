"""Stages that begin between a layer's attention and its MLP compute what whole layers do."""

import pytest
import torch
from tiny_families import (
    FAMILIES,
    build,
    config_of,
    gradients_of,
    make_batch,
    run_stages,
    save_tiny,
)

from headrace.schemas.errors import ConfigError
from headrace.trainer.architecture.families import FAMILIES as RECORDS
from headrace.trainer.architecture.half_layer import Span

IN_HALVES = sorted(name for name in FAMILIES if RECORDS[name].attention)
SIDE_BY_SIDE = sorted(set(FAMILIES) - set(IN_HALVES))


def losses_and_gradients(config, batch):
    """In evaluation mode, without dropout."""
    built = build(config)
    for number, part in enumerate(built):
        part.stage.eval()
        assert number == 0 or part.layers[0].start % 2 == (config.pipeline_stages > 1)
    loss, token_losses, _ = run_stages(built, batch)
    return loss, token_losses, gradients_of(built)


@pytest.mark.parametrize("family", IN_HALVES)
def test_losses_and_gradients_are_those_of_whole_layers(family, tmp_path):
    directory = save_tiny(family, tmp_path)
    batch = make_batch()
    for adapter in ({"kind": "none"}, {"kind": "lora", "rank": 4, "init": "olora"}):
        whole = losses_and_gradients(config_of(directory, 1, adapter), batch)
        halves = losses_and_gradients(
            config_of(directory, 3, adapter, partition=[0.5, 2, 1.5]), batch
        )
        assert halves[0] == pytest.approx(whole[0], rel=1e-6)
        assert torch.equal(halves[1], whole[1])
        assert halves[2].keys() == whole[2].keys()
        for name, gradient in whole[2].items():
            assert torch.equal(halves[2][name], gradient), name


@pytest.mark.parametrize("family", SIDE_BY_SIDE)
def test_layers_without_halves_are_refused(family, tmp_path):
    config = config_of(save_tiny(family, tmp_path), 2, half_layers=True)
    with pytest.raises(ConfigError, match="half_layers = true: the layers of this model are not"):
        build(config)


def test_dropout_is_refused(tmp_path):
    adapter = {"kind": "lora", "rank": 4, "dropout": 0.1}
    config = config_of(save_tiny("llama", tmp_path), 2, adapter, partition=[1.5, 2.5])
    with pytest.raises(ConfigError, match="half_layers does not go with dropout"):
        build(config)


def test_spans_know_their_layers_and_halves():
    span = Span(3, 8)
    assert list(span) == [1, 2, 3]
    assert span.pieces() == [(1, "mlp"), (2, None), (3, None)]
    assert [str(span), str(Span(3, 7)), str(Span.whole(range(2, 5)))] == [
        "1 (mlp)-3",
        "1 (mlp)-3 (attention)",
        "2-4",
    ]
    assert [str(Span(4, 5)), str(Span(4, 6))] == ["2 (attention)", "2"]
