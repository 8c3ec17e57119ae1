"""The training benchmark measures the real trainer; its figures follow from known shapes."""

import json

import numpy as np
import pytest
from built_stages import build_stage
from tiny_families import CPU, config_of
from warm_command import run_warm

from headrace.dataprep.shards.verify import verify
from headrace.jobs.tools import bench_checkpoint, bench_inputs, bench_shapes, bench_train
from headrace.trainer.architecture.weight_index import stored_tensors


def test_the_operations_of_an_8b_llama_are_the_known_ones():
    shape = bench_shapes.shape_of("llama-8b")
    assert bench_shapes.matmul_weights(shape) == 7_504_658_432
    lora, full = (bench_shapes.flops_per_token(shape, mode, [[4096]]) for mode in ("lora", "full"))
    assert lora == 4 * 7_504_658_432 + 3 * 2 * 2 * 32 * 4096 * 4097 / 2
    assert full - lora == 2 * 7_504_658_432


@pytest.mark.parametrize(
    ("preset", "weights"),
    [
        ("mixtral-8x7b", 12_748_587_008),  # 12.9 billion with the embedding
        ("qwen3-30b-a3b", 3_041_656_832),  # 3.3 billion with the embedding
        ("gpt-oss-20b", 3_607_142_400),  # 3.6 billion, as its authors count them
        ("deepseek-v3-16b", 2_579_103_744),  # 2.9 billion with the embedding
        ("qwen3-next-80b-a3b", 3_562_274_816),  # 3.9 billion with the embedding
    ],
)
def test_a_token_of_a_mixture_is_multiplied_with_the_experts_that_it_is_sent_to(preset, weights):
    assert bench_shapes.matmul_weights(bench_shapes.shape_of(preset)) == weights


def test_a_window_bounds_what_a_token_attends_to():
    assert bench_shapes.attended([[4], [1, 3]]) == (10 + 1 + 6) / 8
    assert bench_shapes.attended([[4], [1, 3]], 2) == (1 + 2 + 2 + 2 + 1 + 1 + 2 + 2) / 8
    shape = bench_shapes.shape_of("gemma3-12b", layers=12)
    near, far = (bench_shapes.attended([[4096]], window) for window in (1024, None))
    weights = 4 * bench_shapes.matmul_weights(shape)
    pairs = bench_shapes.flops_per_token(shape, "lora", [[4096]]) - weights
    assert pairs == 12 * 16 * 256 * (10 * near + 2 * far)


def test_drawn_documents_fill_the_row_and_have_the_mean_asked_for():
    generator = np.random.default_rng(0)
    rows = [bench_inputs.draw_lengths(generator, 4096, 512) for _ in range(500)]
    assert all(sum(row) == 4096 for row in rows)
    assert np.mean([n for row in rows for n in row]) == pytest.approx(480, rel=0.1)  # cut at ends


MIXTURE = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
}


@pytest.mark.parametrize(("layout", "codes"), [("fp8", "F8_E4M3"), ("mxfp4", "U8")])
def test_random_files_in_a_published_layout_are_read_as_others(
    layout, codes, tmp_path, monkeypatch
):
    monkeypatch.setitem(bench_shapes.PRESETS, "mixture", MIXTURE)
    monkeypatch.setattr(bench_checkpoint, "FILE_BYTES", 20_000)  # several files
    bench_inputs.write_model(tmp_path, "tiny" if layout == "fp8" else "mixture", 2)
    size = bench_checkpoint.write_weights(tmp_path, layout)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert 0 < sum(file.stat().st_size for file in files) - size < 10_000 * len(files)
    assert {tensor.dtype for tensor in stored_tensors(tmp_path).values()} >= {codes, "BF16"}
    config = config_of(tmp_path, 1, {"kind": "lora", "rank": 2}, dtype="bfloat16")
    for name, parameter in build_stage(config, 0, CPU).stage.named_parameters():
        assert parameter.isfinite().all() and (parameter.ndim < 2 or parameter.std() < 0.2), name


@pytest.mark.slow
def test_a_line_of_figures_and_a_picture_come_out(tmp_path):
    options = [
        "--preset",
        "tiny",
        "--mode",
        "qlora",
        "--sequence",
        "64",
        "--stages",
        "2",
        "--micro-batch-size",
        "1",
    ]
    options += ["--windows", "2", "--warmup", "1", "--documents", "20", "--keep", str(tmp_path)]
    done = run_warm(options, bench_train.__file__)
    assert done.returncode == 0, done.stderr[-3000:]
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["slowest"] <= line["tokens_per_second"] <= line["fastest"]
    assert line["fill"] == 1.0
    assert len(line["peers_share"]) == 2
    assert 0 < sum(line["peers_share"]) < 2
    assert all(0 <= share < 1 for name in ("data", "optimizer") for share in line[f"{name}_share"])
    folder = next(tmp_path.iterdir())
    problems = verify(folder / "shards")
    assert [problem for problem in problems if "shard-" in problem] == []
    assert "<svg" in (folder / "timeline.svg").read_text()
