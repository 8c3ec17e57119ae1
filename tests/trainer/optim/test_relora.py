"""ReLoRA: adapters are added to the weights and start anew, and every layout does it to the bit."""

import shutil

import pytest
import torch
from built_stages import build_stage
from evaluation_losses import evaluation_loss
from runs import STDLIB, checkpoint_tensors, exact_metrics, make_shards, read_metrics, source

from headrace.schemas.train.optimizer_config import ReloraConfig
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.export.convert import convert
from headrace.trainer.optim.optimizer import build_optimizer
from headrace.trainer.optim.relora import is_due, prune, rate_factor, replay, restart

RESTARTS = ReloraConfig(every_steps=4, warmup_steps=2, prune=0.75)


def test_the_rate_rises_anew_after_each_restart():
    factors = [rate_factor(RESTARTS, step) for step in range(10)]
    assert factors == [1, 1, 1, 1, 0.5, 1, 1, 1, 0.5, 1]
    assert [step for step in range(1, 13) if is_due(RESTARTS, step, 12)] == [4, 8]
    assert rate_factor(ReloraConfig(), 7) == 1


def test_the_smallest_moments_are_forgotten():
    moment = torch.tensor([[4.0, -3.0], [1.0, -2.0]])
    prune(moment, 0.5)
    assert moment.tolist() == [[4, -3], [0, 0]]
    prune(moment, 1.0)
    assert not moment.any()


def built_with(tiny_model):
    config = TrainConfig.model_validate(
        {
            "model": str(tiny_model),
            "output_dir": "unused",
            "datasets": [{"path": "unused"}],
            "adapter": {"rank": 4},
            "optimizer": {"lr": 1e-3},
        }
    )
    built = build_stage(config, 0, torch.device("cpu"))
    return built, build_optimizer(config.optimizer, built.trained)


def weights(built):
    """What each linear layer computes with: its weight and its adapter's product."""
    from headrace.trainer.adapters.names import lora_layers

    return {
        name: layer.get_base_layer().weight.double() + layer.get_delta_weight("default").double()
        for name, layer in lora_layers(built.stage.names)
    }


def learn(built, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        for item in built.trained:
            item.parameter.grad = torch.randn(item.parameter.shape, generator=generator)
        optimizer.step()


def test_a_restart_keeps_what_the_model_computes_and_is_replayed_to_the_bit(tiny_model):
    built, optimizer = built_with(tiny_model)
    for seed in range(2):
        learn(built, optimizer, seed)
        before = weights(built)
        restart(built, optimizer, RESTARTS, seed)
        for name, value in weights(built).items():
            torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-7)
    ups = [item.parameter for item in built.trained if ".lora_B." in item.name]
    assert not any(up.any() for up in ups)
    moments = optimizer.state[ups[0]]["exp_avg"]
    assert 0.7 <= float((moments == 0).float().mean()) <= 0.8
    assert built.history.width == 3

    again, _ = built_with(tiny_model)
    replay(again, built.history.merged)
    for name, layer in built.stage.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(layer, dict(again.stage.named_parameters())[name]), name


@pytest.mark.slow
def test_stages_and_resumption_change_no_bit_and_the_result_is_a_wider_lora(
    training, tiny_model, tiny_shards
):
    """Together with the other regularizers; on one process what two had begun."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = {
        "max_steps": 7,
        "relora__every_steps": 3,
        "relora__warmup_steps": 2,
        "regularization__product_decay": 0.1,
        "regularization__max_product_norm": 0.5,
        "regularization__neftune_alpha": 5.0,
        "scheduler__type": "constant",
        "checkpoint__every_steps": 4,
        "evaluation__before_first_step": False,
    }
    run = training.run("run", 2, pipeline_stages=2, **settings)
    metrics, tensors = exact_metrics(run), checkpoint_tensors(run)
    assert max(len(t) for name, t in tensors.items() if name.startswith("merged/")) == 2
    rates = [line["lr"] for line in metrics if line["kind"] == "train"]
    assert rates == pytest.approx([1e-3, 2e-3, 2e-3, 1e-3, 2e-3, 2e-3, 1e-3])
    shutil.rmtree(run / "checkpoints" / "step-000007")
    training.run("run", 1, "--resume", **settings)
    assert exact_metrics(run) == metrics
    found = checkpoint_tensors(run)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)

    convert(run, run / "converted")
    name = "adapter_model.safetensors"
    assert (run / "converted" / name).read_bytes() == (run / "adapter" / name).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    assert model.peft_config["default"].r == 12
    loss = [line for line in read_metrics(run) if line["kind"] == "evaluation"][-1]["loss"]
    assert evaluation_loss(model, tiny_shards) == pytest.approx(loss, abs=1e-5)


REAL = """
model = "{model}"
output_dir = "unused"
max_steps = 12
gradient_accumulation_steps = 4
pipeline_stages = 2
threads = 1
datasets = [{{ path = "{shards}" }}]
evaluation_datasets = [{{ path = "{shards}", max_rows = 9 }}]
optimizer = {{ lr = 1e-3 }}
relora = {{ every_steps = 4, warmup_steps = 1 }}
"""


@pytest.mark.exhaustive
def test_on_the_real_model_held_out_loss_falls_over_restarts(training, real_model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    texts = [source("json", STDLIB / "json" / "*.py"), source("small", STDLIB / "[a-c]*t.py")]
    shards = make_shards(real_model, tmp_path / "shards", sequence_len=128, sources=texts)
    training.config.write_text(REAL.format(model=real_model, shards=shards))
    run = training.run("run", 2, evaluation__every_steps=4)
    losses = [line["loss"] for line in read_metrics(run) if line["kind"] == "evaluation"]
    assert losses[-1] < losses[1] < losses[0]
    base = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    assert evaluation_loss(model, shards) == pytest.approx(losses[-1], abs=1e-3)
