"""On GPUs: the losses of the CPU to rounding, the same over NCCL, resumed as left alone."""

import pytest
import torch
from built_stages import build_stage
from runs import checkpoint_tensors, exact_metrics, read_metrics
from transformers import LlamaConfig

from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.layers.device import to_device
from headrace.trainer.metrics.step_values import StepValues
from headrace.trainer.planning.run_plan import plan_run
from headrace.trainer.sequence_slice import WHOLE
from headrace.trainer.stage.micro_batch import MicroBatch

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="no CUDA device")]
two_gpus = pytest.mark.skipif(GPUS < 2, reason="one CUDA device")


def losses(run):
    return [line["loss"] for line in read_metrics(run)]


@pytest.fixture(params=["lora", "none"], ids=["LoRA", "full"])
def kind(request):
    return request.param


def on_cpu(training, monkeypatch, **settings):
    with monkeypatch.context() as context:
        context.setenv("CUDA_VISIBLE_DEVICES", "")
        return training.run("cpu", 1, adapter__dropout=0.0, **settings)


def test_float32_on_one_gpu_equals_the_cpu_to_rounding(training, kind, monkeypatch):
    expected = losses(on_cpu(training, monkeypatch, adapter__kind=kind))
    run = training.run("gpu", 1, adapter__kind=kind, adapter__dropout=0.0, dtype="float32")
    assert losses(run) == pytest.approx(expected, rel=2e-5)


def test_bfloat16_on_one_gpu_equals_the_cpu_to_its_noise(training, kind, monkeypatch):
    expected = losses(on_cpu(training, monkeypatch, adapter__kind=kind))
    run = training.run("gpu", 1, adapter__kind=kind, adapter__dropout=0.0)
    assert losses(run) == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("stages", [1, pytest.param(2, marks=two_gpus)])
@pytest.mark.parametrize(
    "settings", [{}, {"activation_checkpointing": "full"}, {"tiles": 4}], ids=str
)
def test_rows_in_slices_equal_whole_ones(training, stages, settings):
    settings = {"adapter__dropout": 0.0, "pipeline_stages": stages, **settings}
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 5e-3)):
        whole = training.run(f"whole-{dtype}", stages, dtype=dtype, **settings)
        sliced = training.run(f"sliced-{dtype}", stages, dtype=dtype, sequence_slices=4, **settings)
        assert losses(sliced) == pytest.approx(losses(whole), rel=tolerance)


@two_gpus
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_stages_over_nccl_equal_one_gpu(training, kind, dtype):
    settings = {"adapter__kind": kind, "adapter__dropout": 0.0, "dtype": dtype}
    one = training.run("one", 1, **settings)
    two = training.run("two", 2, pipeline_stages=2, **settings)
    assert losses(two) == pytest.approx(losses(one), rel=1e-6 if dtype == "float32" else 1e-3)
    rows = [line["rows_sha256"] for line in exact_metrics(one)]
    assert [line["rows_sha256"] for line in exact_metrics(two)] == rows


@two_gpus
def test_two_replicas_equal_one_gpu_to_rounding(training):
    one = training.run("one", 1, dtype="float32")
    settings = {"dtype": "float32", "gradient_accumulation_steps": 2}
    two = training.run("two", 2, **settings)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"adapter__kind": "none", "optimizer__type": "adamw_kahan"}],
    ids=["LoRA", "full, AdamW-Kahan"],
)
def test_a_resumed_run_equals_one_that_was_left_alone(training, changes):
    settings = {"checkpoint__every_steps": 5, "checkpoint__keep_last": 9, **changes}
    left_alone = training.run("left-alone", 1, **settings)
    resumed = training.run("resumed", 1, **settings)
    for path in (resumed / "checkpoints").glob("step-000010"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    training.run("resumed", 1, "--resume", **settings)
    assert exact_metrics(resumed) == exact_metrics(left_alone)
    ours, expected = checkpoint_tensors(resumed), checkpoint_tensors(left_alone)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stages", [1, pytest.param(2, marks=two_gpus)])
def test_answers_drawn_on_gpus_are_those_drawn_on_the_cpu(pair_training, monkeypatch, stages):
    settings = {
        "objective__kind": "dpo",
        "optimizer__lr": 1e-2,
        "loader__pack": "best_fit",
        "max_steps": 4,
        "dtype": "float32",
        "rejected_sampling__batch_size": 2,
        "rejected_sampling__min_p": 0.01,
    }
    cpu = read_metrics(on_cpu(pair_training, monkeypatch, **settings))
    run = pair_training.run("gpu", stages, pipeline_stages=stages, adapter__dropout=0.0, **settings)
    for line, expected in zip(read_metrics(run), cpu, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        if line["kind"] == "train":
            for name in ("tokens", "ended"):
                assert line["answers"][name] == expected["answers"][name]


def build_on_gpu(model, **settings):
    config = TrainConfig.model_validate(
        {
            "model": str(model),
            "output_dir": "unused",
            "datasets": [{"path": "unused"}],
            "adapter": {"rank": 4},
            "optimizer": {"lr": 1e-3},
            **settings,
        }
    )
    return build_stage(config, 0, torch.device("cuda")).stage.train()


@pytest.mark.parametrize("kernels", ["auto", "triton", "torch"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_micro_batches_never_wait_for_the_device(tiny_model, kernels, checkpointing):
    stage = build_on_gpu(tiny_model, kernels=kernels, activation_checkpointing=checkpointing)
    stage.embedding.noise_alpha = 5.0
    device = torch.device("cuda")

    def run_micro_batches():
        outputs = []
        if stage.before_step is not None:
            stage.before_step()
        for lengths in ([100, 28], [128], [1] * 128):
            ids = torch.arange(128, dtype=torch.int32)[None]
            labels = to_device(ids.roll(-1, 1), device).long()
            side = MicroBatch([lengths], [128], labels, 1 / 128, 0.0, seed=0)
            outputs.append(stage(to_device(ids, device).long(), side))
            outputs[-1].value.backward()
        return StepValues(outputs, [], WHOLE)

    run_micro_batches()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = run_micro_batches()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert values.tokens().losses.shape == (3, 1, 128)
    assert (values.tokens().losses > 0).mean() > 0.9


def test_micro_batches_in_flight_do_not_disturb_each_other(tiny_model):
    stage = build_on_gpu(tiny_model)
    assert any(getattr(part, "joined", None) is not None for part in stage.modules())
    for name, weight in stage.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(0, 0.05, generator=torch.Generator("cuda").manual_seed(1))
    ids = [torch.arange(128, device="cuda").roll(-shift)[None] for shift in range(3)]
    sides = [
        MicroBatch([lengths], [128], rows.roll(-1, 1), 1 / 128, 0.0, seed=0)
        for lengths, rows in zip(([100, 28], [128], [1] * 128), ids, strict=True)
    ]

    def gradients(in_flight):
        stage.zero_grad()
        stage.before_step()
        waiting = []
        for rows, side in zip(ids, sides, strict=True):
            waiting.append(stage(rows, side).value)
            while len(waiting) >= in_flight:
                waiting.pop(0).backward()
        for loss in waiting:
            loss.backward()
        return [weight.grad for weight in stage.parameters() if weight.requires_grad]

    for ours, expected in zip(gradients(3), gradients(1), strict=True):
        assert expected.any()
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_offloaded_weights_change_no_loss_and_free_what_is_predicted(checkpointing, tmp_path):
    """A Llama whose MLPs are most of it, two micro-batches in flight, twice."""
    settings = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 8}
    settings |= {"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 1024}
    LlamaConfig(**settings, tie_word_embeddings=False).save_pretrained(tmp_path)

    def train(where):
        config = TrainConfig.model_validate(
            {
                "model": str(tmp_path),
                "weights": "random",
                "output_dir": "unused",
                "datasets": [{"path": "unused"}],
                "adapter": {"rank": 4},
                "optimizer": {"lr": 1e-3},
                "activation_checkpointing": checkpointing,
                "kernels": "torch",
                "weight_offload": where,
            }
        )
        stage = build_stage(config, 0, torch.device("cuda")).stage.train()
        torch.cuda.reset_peak_memory_stats()
        ids = torch.arange(256, device="cuda")[None]
        losses = []
        for _ in range(2):
            side = MicroBatch([[100, 156]], [256], ids.roll(-1, 1), 1 / 256, 0.0, seed=0)
            waiting = [stage(ids.roll(shift, 1), side).value for shift in (1, 2)]
            losses += [loss.item() for loss in waiting]
            for loss in waiting:
                loss.backward()
        gradients = [p.grad.clone() for p in stage.parameters() if p.requires_grad]
        peak = torch.cuda.max_memory_allocated()
        planned = plan_run(config, plan_model(config), 1, 256)
        return losses, gradients, peak, planned.stages[0].memory.weights

    losses, gradients, peak, weights = train("mlp")
    torch.cuda.empty_cache()
    plain_losses, plain_gradients, plain_peak, plain_weights = train("none")
    assert losses == plain_losses
    for ours, expected in zip(gradients, plain_gradients, strict=True):
        assert torch.equal(ours, expected)
    assert plain_peak - peak == pytest.approx(plain_weights - weights, rel=0.1)
