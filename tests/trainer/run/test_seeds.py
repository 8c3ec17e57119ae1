"""A run follows from its config: same seed, same adapter and dropout; and adapters alone learn."""

import torch
from built_stages import build_stage

from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.stage.stage import MicroBatch

TOKENS = 24


def build(model, **settings):
    config = {
        "model": str(model),
        "output_dir": "unused",
        "datasets": [{"path": "unused"}],
        "adapter": {"rank": 4, "dropout": 0.5, "init": "olora"},
        "optimizer": {"lr": 1e-3},
    }
    return build_stage(TrainConfig.model_validate(config | settings), 0, torch.device("cpu"))


def token_losses(built, seed):
    ids = torch.arange(2, 2 + TOKENS)[None]
    batch = MicroBatch([[TOKENS]], [TOKENS], ids.roll(-1, 1), 1 / TOKENS, 0.0, seed=seed)
    return built.stage.train()(ids, batch).token_losses.detach()


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(tiny_model):
    adapters = [
        torch.cat([item.parameter.detach().flatten() for item in built.trained])
        for built in (
            build(tiny_model, seed=seed, adapter={"rank": 4, "init": "kaiming"})
            for seed in (7, 7, 8)
        )
    ]
    assert torch.equal(adapters[0], adapters[1])
    assert not torch.equal(adapters[0], adapters[2])


def test_dropout_depends_on_the_seed_of_the_step_alone(tiny_model):
    first, second = build(tiny_model), build(tiny_model)
    torch.manual_seed(1)
    expected = token_losses(first, seed=3)
    torch.manual_seed(2)
    assert torch.equal(token_losses(second, seed=3), expected)
    assert not torch.equal(token_losses(second, seed=4), expected)


def test_with_adapters_nothing_else_is_trained(tiny_model):
    built = build(tiny_model)
    learning = {name for name, p in built.stage.canonical_parameters().items() if p.requires_grad}
    assert learning == {item.name for item in built.trained}
    assert all(".lora_" in name for name in learning) and len(learning) == 2 * 5 * 7
