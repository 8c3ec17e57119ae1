"""Frozen weights held quantized: bitsandbytes' own bits, in any mode, from files and a cache."""

import json
import shutil

import pytest
import torch
from family_modes import lora, relative, with_adapters
from peft.utils.loftq_utils import _low_rank_decomposition
from runs import checkpoint_tensors, exact_metrics, read_metrics
from saved_parts import saved_model
from tiny_families import (
    build,
    config_of,
    gradients_of,
    make_batch,
    reference_loss,
    run_stages,
    save_tiny,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from headrace.schemas.errors import ConfigError, DataError
from headrace.trainer.adapters.names import base_name
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.quantized import selection as by_config
from headrace.trainer.quantized.formats import format_of
from headrace.trainer.quantized.fp8_training import Fp8TrainedLinear
from headrace.trainer.quantized.modules import quantized_weights_of

pytestmark = pytest.mark.usefixtures("one_thread")

NF4 = {"backend": "bnb", "double_quantization": True}
HQQ = {"backend": "hqq"}
LORA = {"kind": "lora", "rank": 4}
BNB_CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4, twice": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}
OURS = {
    "nf4": {"backend": "bnb"},
    "fp4, twice": {"backend": "bnb", "type": "fp4", "double_quantization": True},
    "int8": {"backend": "bnb", "type": "int8"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        family: save_tiny(family, folder / family) for family in ("mistral", "llama", "mixtral")
    }


def held_in(built):
    return {
        base_name(name): weight
        for part in built
        for name, weight in quantized_weights_of(part.stage.names)
    }


def same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, mine in ours.items():
        other = theirs[name]
        assert mine.buffers_by_name.keys() == other.buffers_by_name.keys()
        for key, part in mine.buffers_by_name.items():
            assert torch.equal(part, other.buffers_by_name[key]), (name, key)


def by_transformers(directory, kind):
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**BNB_CONFIGS[kind])
    )


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, about its own casts
@pytest.mark.parametrize("kind", BNB_CONFIGS)
def test_bitsandbytes_through_transformers_and_peft_computes_the_same(models, kind):
    from peft import get_peft_model

    built = with_adapters(models["mistral"], 2, quantization=OURS[kind])
    loss, _, _ = run_stages(built, make_batch())
    ours = gradients_of(built)
    model = get_peft_model(by_transformers(models["mistral"], kind), built[0].method.peft)
    model.train()  # in evaluation bitsandbytes on CPU packs weights again, and rounds activations
    held = held_in(built)
    assert len(held) == 4 * 7
    for name, matrix in held.items():
        path = name.removesuffix(".weight")
        parameter = model.get_submodule(f"base_model.model.{path}.base_layer").weight
        codes = getattr(parameter, "CB", None) if kind == "int8" else parameter.data
        assert torch.equal(matrix.codes, parameter.data if codes is None else codes), name
    theirs = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for part in built:
            for item in part.trained:
                theirs[item.name].copy_(item.parameter)
    expected, _ = reference_loss(model, make_batch())
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in ours.items():
        assert relative(gradient, theirs[name].grad) <= 1e-5, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BNB_CONFIGS)
def test_a_checkpoint_that_bitsandbytes_quantized_loads_as_it_is(
    models, kind, tmp_path, monkeypatch
):
    by_transformers(models["mistral"], kind).save_pretrained(tmp_path)
    expected = held_in(build(config_of(models["mistral"], 1, LORA, quantization=OURS[kind])))
    monkeypatch.setattr(by_config.Quantization, "make", None)  # nothing is quantized again
    same_bits(held_in(build(config_of(tmp_path, 2, LORA))), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BNB_CONFIGS)
def test_it_is_dequantized_for_full_fine_tuning_and_for_another_format(models, kind, tmp_path):
    theirs = by_transformers(models["mistral"], kind)
    theirs.save_pretrained(tmp_path)
    expected = dict(theirs.dequantize(torch.float32).named_parameters())
    for part in build(config_of(tmp_path, 2)):
        for item in part.trained:
            assert torch.equal(item.parameter, expected[item.name]), item.name
    held = held_in(build(config_of(tmp_path, 2, LORA, quantization=HQQ)))
    assert len(held) == 4 * 7
    settings = config_of(tmp_path, 1, LORA, quantization=HQQ).quantization
    for name, weight in held.items():
        again = format_of(settings).make(expected[name], name, settings, torch.float32)
        assert torch.equal(weight.codes, again.codes), name


MODES = {
    "FP8": ("mistral", LORA, {"backend": "fp8", "skip_modules": ["lm_head", "mlp"]}),
    "DoRA": ("mistral", {"kind": "dora", "rank": 4}, NF4),
    "PiSSA": ("mistral", {**LORA, "init": "pissa"}, NF4),
    "blocks": ("mistral", {"kind": "blocks", "blocks": 2}, NF4),
    "norms alone": ("mistral", {"kind": "none", "target_modules": ["layernorm"]}, HQQ),
    "head in full": ("mistral", {**LORA, "modules_to_save": ["lm_head"]}, HQQ),
    "adapters on experts": ("mixtral", {**LORA, "target_parameters": "experts"}, NF4),
    "embedding": ("llama", LORA, {**NF4, "embedding": True}),
    "all of it": ("mistral", LORA, {**NF4, "embedding": True, "skip_modules": []}),
    "INT8": ("llama", LORA, {"backend": "bnb", "type": "int8", "embedding": True}),
    "LLM.int8()": ("llama", LORA, {"backend": "bnb", "type": "int8", "int8_threshold": 2.0}),
    "some by other bits": (
        "mistral",
        LORA,
        {
            **HQQ,
            "dynamic_config": {
                "down_proj": {"bits": 8},
                "q_proj": {"bits": 3, "axis": 1, "group_size": 32},
            },
        },
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_the_same_bit_by_bit_over_two_stages(models, mode):
    family, adapter, settings = MODES[mode]
    runs, batch = [], make_batch()
    for stages in (1, 2):
        built = build(config_of(models[family], stages, adapter, quantization=settings))
        assert held_in(built)
        tokens = run_stages(built, batch)[1]
        runs.append((tokens, gradients_of(built)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1].keys() == runs[1][1].keys()
    assert all(torch.equal(runs[1][1][name], value) for name, value in runs[0][1].items())
    assert any(value.any() for value in runs[0][1].values())


def test_trained_weights_in_8_bit_floats_are_the_same_bit_by_bit_over_two_stages(models):
    runs, batch = [], make_batch()
    for stages in (1, 2):
        built = build(config_of(models["llama"], stages, {"kind": "none"}, trained_matmul="fp8"))
        layers = [part for b in built for part in b.stage.modules()]
        assert sum(isinstance(part, Fp8TrainedLinear) for part in layers) == 4 * 4  # not the MLPs
        tokens = run_stages(built, batch)[1]
        runs.append((tokens, gradients_of(built)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1].keys() == runs[1][1].keys()
    assert all(torch.equal(runs[1][1][name], value) for name, value in runs[0][1].items())


@pytest.mark.parametrize("settings", [NF4, HQQ], ids=["bnb", "hqq"])
def test_routers_are_never_quantized(models, settings):
    built = build(config_of(models["mixtral"], 1, LORA, quantization=settings))
    held = held_in(built)
    assert any(".experts." in name for name in held)
    assert not any("gate.weight" in name for name in held)
    routers = [p for name, p in built[0].stage.canonical_parameters().items() if "mlp.gate" in name]
    assert len(routers) == 4 and {p.dtype for p in routers} == {torch.float32}


def test_adapters_on_quantized_experts_equal_peft(models):
    loss, gradient = lora(models["mixtral"], 2, quantization=NF4, target_parameters="experts")
    assert max(loss, gradient) <= 1e-5


@pytest.mark.filterwarnings("ignore")  # of a family without a record
def test_so_do_those_of_gpt_oss_with_biases_and_inputs_first(tmp_path):
    rotary = {"rope_type": "default", "rope_theta": 10000.0}
    family = {"num_experts_per_tok": 2, "num_local_experts": 4, "head_dim": 8, "sliding_window": 5}
    family |= {"router_aux_loss_coef": 0.0, "rope_parameters": rotary}
    directory = save_tiny("gpt_oss", tmp_path / "gpt_oss", **family)
    adapter = {"target_modules": ["q_proj"], "target_parameters": "experts"}
    loss, gradient = lora(directory, 2, quantization=OURS["nf4"], **adapter)
    assert max(loss, gradient) <= 1e-5


def test_the_hqq_settings_of_the_first_name_that_matches_count(models):
    settings = {
        **HQQ,
        "dynamic_config": {"mlp.down": {"bits": 8}, "down_proj": {"bits": 2}, "0.mlp": {"bits": 2}},
    }
    held = held_in(build(config_of(models["mistral"], 1, LORA, quantization=settings)))
    bits = {name: weight.settings["bits"] for name, weight in held.items()}
    assert bits["model.layers.0.mlp.down_proj.weight"] == 8
    assert bits["model.layers.0.mlp.up_proj.weight"] == 2
    assert bits["model.layers.1.mlp.up_proj.weight"] == 4


def test_pissa_starts_from_the_weight_as_it_was_before_it_is_quantized(models):
    adapter = {**LORA, "init": "pissa"}
    (plain,) = build(config_of(models["mistral"], 1, adapter))
    (ours,) = build(config_of(models["mistral"], 1, adapter, quantization=NF4))
    assert [item.name for item in ours.trained] == [item.name for item in plain.trained]
    for mine, other in zip(ours.trained, plain.trained, strict=True):
        assert torch.equal(mine.parameter, other.parameter), mine.name
    rest = dict(plain.stage.canonical_parameters())
    settings = config_of(models["mistral"], 1, adapter, quantization=NF4).quantization
    for name, matrix in quantized_weights_of(ours.stage.names):
        again = format_of(settings).make(rest[name], name, settings, torch.float32)
        assert torch.equal(matrix.codes, again.codes)


def test_loftq_starts_from_what_a_weight_loses(models):
    """As PEFT's own decomposition; codes are those of the weight, and the sum is closer to it."""
    settings = {"quantization": NF4, "dtype": "float32"}
    plain = build(config_of(models["mistral"], 1, LORA, **settings))[0]
    ours = build(
        config_of(models["mistral"], 1, {**LORA, "init": "loftq", "alpha": 8.0}, **settings)
    )[0]
    whole = build(config_of(models["mistral"], 1, LORA, dtype="float32"))[0]
    weights, codes = (
        dict(whole.stage.canonical_parameters()),
        quantized_weights_of(plain.stage.names),
    )
    values, same = {item.name: item.parameter for item in ours.trained}, dict(codes)
    for name, matrix in quantized_weights_of(ours.stage.names):
        assert torch.equal(matrix.codes, same[name].codes)
        lost = weights[name].float() - matrix.dequantize(torch.float32)
        expected = _low_rank_decomposition(lost, LORA["rank"])
        stem = name.removesuffix("base_layer.weight")
        down, up = (values[f"{stem}lora_{part}.default.weight"] for part in "AB")
        product = 8.0 / LORA["rank"] * up @ down
        best = (lost - expected["L"] @ expected["R"]).norm()
        assert best < 0.95 * lost.norm()
        assert (lost - product).norm() <= 1.01 * best, name
    tensors = ours.history.exported(values)  # for the base model as it is stored
    down, up = (tensors[next(n for n in tensors if f".lora_{part}." in n)] for part in "AB")
    assert down.shape[0] == 2 * LORA["rank"] and (up @ down).abs().max() < 1e-6


def test_the_predicted_size_is_what_is_held(models):
    kinds = [NF4, OURS["nf4"], OURS["int8"]]
    kinds += [{**HQQ, "bits": bits} for bits in (8, 4, 3, 2, 1)]
    for settings in kinds:
        config = config_of(
            models["mixtral"], 1, LORA, quantization=settings, weights="random", dtype="bfloat16"
        )
        plan = plan_model(config)
        predicted = sum(part.quantized_bytes for part in plan.size.layers)
        held = held_in(build(config))
        found = sum(weight.nbytes for weight in held.values())
        assert predicted == pytest.approx(found, rel=0.08), settings  # rounded up in tiny matrices


SAVED = {
    "blocks": ("mistral", {"kind": "blocks", "blocks": 2}),
    "norms of a mixture": ("mixtral", {"kind": "none", "target_modules": ["layernorm"]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", SAVED)
def test_a_saved_model_has_the_weights_that_were_not_trained_as_they_were(
    models, mode, dtype, tmp_path
):
    family, adapter = SAVED[mode]
    built = build(config_of(models[family], 2, adapter, quantization=NF4))
    trained = {item.name: item.parameter for part in built for item in part.trained}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.25)
    directory = saved_model(built, models[family], tmp_path / "model", dtype)
    saved = AutoModelForCausalLM.from_pretrained(directory)
    assert saved.dtype == dtype, "config.json says so"
    base = dict(AutoModelForCausalLM.from_pretrained(models[family]).named_parameters())
    for name, value in saved.named_parameters():
        expected = trained[name] if name in trained else base[built[0].method.stored_name(name)]
        assert torch.equal(value, expected.to(dtype)), name


def cached(models, folder, stages=2, **settings):
    quantization = {**NF4, "cache": str(folder), **settings}
    return build(config_of(models["mixtral"], stages, LORA, quantization=quantization))


def test_layers_are_quantized_once_and_then_read_from_the_cache(models, tmp_path, monkeypatch):
    first = held_in(cached(models, tmp_path))
    (folder,) = tmp_path.iterdir()
    files = sorted(folder.iterdir())
    assert [file.name.split(".")[2] for file in files] == ["0", "1", "2", "3"]
    with monkeypatch.context() as context:
        context.setattr(by_config.Quantization, "make", None)
        same_bits(held_in(cached(models, tmp_path, stages=3)), first)
        adapter = {**LORA, "target_modules": ["v_proj"], "modules_to_save": ["q_proj"]}
        quantization = {**NF4, "cache": str(tmp_path)}
        build(config_of(models["mixtral"], 1, adapter, quantization=quantization))
    cached(models, tmp_path, double_quantization=False)
    assert len(list(tmp_path.iterdir())) == 2, "another setting has a folder of its own"
    copy = tmp_path / "other"
    shutil.copytree(models["mixtral"], copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    build(config_of(copy, 1, LORA, quantization={**NF4, "cache": str(tmp_path / "cache")}))
    assert (tmp_path / "cache" / folder.name).exists() is False, "other weights have one as well"
    damaged = files[2]
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(
        DataError, match=r"model\.layers\.2\.\w+\.safetensors: cannot be read .*remove"
    ):
        cached(models, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**HQQ, "group_size": 56}, "group_size = 56 does not divide the 1024 weights of model"),
        ({**NF4, "skip_modules": ["proj", "head"]}, "nothing is left to quantize"),
        ({**HQQ, "bits": 4, "axis": 1, "group_size": 512}, "1 rows of groups, which 4 bits pack"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(models, settings, message):
    with pytest.raises(ConfigError, match=message):
        plan_model(config_of(models["mistral"], 1, LORA, quantization=settings))


@pytest.mark.parametrize(
    ("settings", "adapter", "message"),
    [
        ({**HQQ, "type": "nf4"}, LORA, 'type has no meaning with backend = "hqq"'),
        ({"backend": "bnb", "bits": 4}, LORA, 'bits has no meaning with backend = "bnb"'),
        ({**OURS["int8"], "storage_type": "uint8"}, LORA, 'no meaning with type = "int8"'),
        ({**NF4, "int8_threshold": 6.0}, LORA, 'no meaning with type = "nf4"'),
        (NF4, {"kind": "none"}, "trains them all"),
        ({**NF4, "cache": "x"}, {**LORA, "init": "pissa"}, "does not go with adapter.init"),
        ({**NF4, "cache": "x"}, {**LORA, "init": "loftq"}, "does not go with adapter.init"),
        (None, {**LORA, "init": "loftq"}, "there is no .quantization."),
        ({**HQQ, "dynamic_config": {"q_proj": {}}}, LORA, "dynamic_config.q_proj sets nothing"),
    ],
)
def test_settings_that_would_mean_nothing_are_refused(settings, adapter, message):
    with pytest.raises(ValueError, match=message):
        config_of("unused", 1, adapter, quantization=settings)


def test_a_library_that_is_missing_is_named_with_the_line_that_installs_it(models, monkeypatch):
    from headrace.schemas.train import quantization_config

    monkeypatch.setattr(quantization_config, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'needs hqq: pip install "hqq>=0'):
        plan_model(config_of(models["mistral"], 1, LORA, quantization=HQQ))


def test_other_quantized_checkpoints_are_refused(models, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(models["mistral"], directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm"}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantized already, by aqlm"):
        plan_model(config_of(directory, 1, LORA))


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["bnb", "hqq"])
def test_a_resumed_run_equals_one_that_was_left_alone(training, backend):
    settings = {
        "pipeline_stages": 2,
        "quantization__backend": backend,
        "checkpoint__every_steps": 5,
        "checkpoint__keep_last": 9,
    }
    left_alone = training.run("left-alone", 2, **settings)
    resumed = training.run("resumed", 2, **settings)
    shutil.rmtree(resumed / "checkpoints" / "step-000010")
    training.run("resumed", 2, "--resume", **settings)
    assert exact_metrics(resumed) == exact_metrics(left_alone)
    ours, expected = checkpoint_tensors(resumed), checkpoint_tensors(left_alone)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    losses = [line["loss"] for line in read_metrics(resumed) if line["kind"] == "evaluation"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("model", "part", "ends"),
    [
        ("llama", "mpl", "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        ("llama", "norm", "down_proj, gate_proj"),
        ("llama", "embed_tokens", "down_proj, gate_proj"),
        ("mixtral", "layernorm", "experts, k_proj"),
        ("mixtral", "mlp.gate", "experts, k_proj"),  # the router, a module of its own
    ],
)
def test_a_name_to_skip_that_keeps_nothing_from_being_quantized_is_refused(
    models, model, part, ends
):
    settings = {**NF4, "skip_modules": ["lm_head", part]}
    message = rf'no module that would be quantized has "{part}" in its name.* some of {ends}'
    with pytest.raises(ConfigError, match=message):
        plan_model(config_of(models[model], 1, LORA, quantization=settings))


def test_a_name_with_settings_of_its_own_that_no_quantized_weight_has_is_refused(models):
    settings = {**HQQ, "dynamic_config": {"block_sparse_moe.experts": {"bits": 2}}}
    message = r'no quantized weight has "block_sparse_moe\.experts" in its name; .* experts, k_proj'
    with pytest.raises(ConfigError, match=message):
        plan_model(config_of(models["mixtral"], 1, LORA, quantization=settings))


def test_a_part_of_the_name_of_experts_is_skipped(models):
    settings = {**NF4, "skip_modules": ["lm_head", "experts"]}
    plan_model(config_of(models["mixtral"], 1, LORA, quantization=settings))


def test_a_gpu_without_matrix_units_for_8_bit_floats_is_refused_by_name(models, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    gpu = torch.device("cuda", 0)
    for config in (
        config_of(models["llama"], 1, LORA, quantization={"backend": "fp8"}),
        config_of(models["llama"], 1, {"kind": "none"}, trained_matmul="fp8"),
    ):
        with pytest.raises(ConfigError, match=r"NVIDIA A100 has no matrix units .* 8\.0, needed"):
            by_config.check_fp8_device(config, gpu)
    by_config.check_fp8_device(config_of(models["llama"], 1, LORA), gpu)
