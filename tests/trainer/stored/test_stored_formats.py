"""Checkpoints that are quantized already: the same numbers as transformers or the format's own
library makes of them, in every way of training and holding them.
"""

import json
import shutil
from functools import partial

import pytest
import torch
import transformers
from family_modes import loaded, lora, with_adapters
from packed_models import (
    awq,
    compressed,
    fp8_blocks,
    fp8_rows,
    fp8_whole,
    gptq,
    in_order_of_activation,
    modelopt_nvfp4,
    mxfp4,
    repack,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from saved_parts import saved_adapter, saved_model, step
from tiny_families import (
    COMMON,
    build,
    config_of,
    gradients_of,
    make_batch,
    run_stages,
    save_tiny,
)
from transformers import AutoModelForCausalLM

from headrace.schemas.errors import ConfigError, DataError
from headrace.trainer.building.parameter_slots import find_slots
from headrace.trainer.building.self_check import plan_model
from headrace.trainer.export.merge import merge
from headrace.trainer.quantized.modules import quantized_weights_of
from headrace.trainer.stored.formats import FORMATS
from headrace.trainer.stored.settings import READ

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of the formats' libraries, about what CPUs lack
]
GPT_OSS = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "head_dim": 8,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "router_aux_loss_coef": 0.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def fp8(family, block, scale_dtype=torch.float32, **settings):
    settings |= FP8 | {"weight_block_size": block}
    return lambda plain, output: repack(
        plain(family), output, fp8_blocks(block, scale_dtype), settings
    )


def compressed_tensors(family, preset, **changes):
    def make(plain, output):
        settings, pack = compressed(preset, **changes)
        return repack(plain(family), output, pack, settings)

    return make


MAKERS = {
    "FP8 in blocks": fp8("mistral", [8, 4]),
    "FP8 in blocks larger than matrices": fp8("qwen3", [128, 128]),
    "FP8 in blocks, experts one by one": fp8("qwen3_moe", [8, 8]),
    "FP8 in blocks, scales of powers of two": fp8(
        "mistral", [1, 8], torch.float8_e8m0fnu, scale_fmt="ue8m0"
    ),
    "FP8 of one scale": lambda plain, output: repack(
        plain("mistral"), output, fp8_whole, FP8 | {"weight_block_size": None}
    ),
    "FP8 by row": compressed_tensors("mistral", "FP8_DYNAMIC"),
    "FP8 by tensor": compressed_tensors("mistral", "FP8"),
    "FP8 by block": compressed_tensors("mistral", "FP8_BLOCK", block_structure=[12, 24]),
    "FP8 by row, experts": compressed_tensors("qwen3_moe", "FP8_DYNAMIC"),
    "INT8": compressed_tensors("mistral", "W8A8"),
    "4 bits, packed": compressed_tensors("mistral", "W4A16", group_size=8),
    "4 bits, packed, experts": compressed_tensors("qwen3_moe", "W4A16", group_size=8),
    "4 bits, packed, asymmetric": compressed_tensors("mistral", "W4A16_ASYM", group_size=8),
    "3 bits, packed, by row": compressed_tensors(
        "mistral", "W3A16", group_size=None, strategy="channel"
    ),
    "NVFP4": compressed_tensors("wide llama", "NVFP4A16"),
    "MXFP4 of compressed-tensors": compressed_tensors("wide llama", "MXFP4A16"),
    "MXFP8 of compressed-tensors": compressed_tensors("wide llama", "MXFP8A16"),
    "MXFP4": lambda plain, output: repack(
        plain("gpt_oss"), output, mxfp4, {"quant_method": "mxfp4"}
    ),
}


OF_DOCUMENTS = {  # libraries that need other versions of torch, or a GPU
    "GPTQ": ("mistral", gptq(4, 8), {"quant_method": "gptq", "bits": 4}),
    "GPTQ in order of activation, 3 bits": (
        "wide llama",
        gptq(3, 16, act_order=True),
        {"quant_method": "gptq", "bits": 3, "desc_act": True},
    ),
    "GPTQ, second version, 8 bits, experts": (
        "qwen3_moe",
        gptq(8, 8, first_version=False),
        {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    ),
    "AWQ": ("mistral", awq, {"quant_method": "awq", "version": "gemm", "bits": 4}),
    "4 bits of compressed-tensors in order of activation": (
        "mistral",
        in_order_of_activation,
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ),
    "ModelOpt's NVFP4": ("wide llama", modelopt_nvfp4, {"quant_method": "modelopt"}),
    "ModelOpt's FP8": (
        "mistral",
        partial(fp8_rows, rows=False),
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ),
    "fbgemm's FP8": ("mistral", fp8_rows, {"quant_method": "fbgemm_fp8"}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Makes a model of a family, once."""
    folder = tmp_path_factory.mktemp("plain")

    def make(family):
        if not (folder / family).exists():
            changes = {"intermediate_size": 64} if family.startswith("wide") else {}
            changes = GPT_OSS if family == "gpt_oss" else changes
            save_tiny(family.split()[-1], folder / family, num_hidden_layers=2, **changes)
        return folder / family

    return make


@pytest.fixture(scope="module")
def packed(plain, tmp_path_factory):
    """Makes the checkpoint of a format, once."""
    folder, made = tmp_path_factory.mktemp("packed"), {}

    def make(kind):
        if kind not in made:
            family = "gpt_oss" if kind == "MXFP4" else "model"
            made[kind] = MAKERS[kind](plain, folder / f"{len(made)}-{family}")
        return made[kind]

    return make


def held_by(built):
    """All frozen or trained weights of some stages, by name."""
    return {
        slot.name: slot.empty.detach() for part in built for slot in find_slots(part.stage.names)
    }


ADAPTED = ["FP8 in blocks", "MXFP4", "FP8 by row", "4 bits, packed, experts", "NVFP4"]


@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_over_it_give_the_loss_and_gradients_of_transformers_own_load(packed, kind):
    loss, gradient = lora(packed(kind), 2)
    assert max(loss, gradient) <= 1e-5


@pytest.mark.parametrize("kind", MAKERS)
def test_every_weight_is_bit_by_bit_the_one_that_transformers_loads(packed, kind):
    for dtype in (torch.float32, torch.bfloat16):
        settings = {"dtype": str(dtype).removeprefix("torch.")}
        (built,) = build(config_of(packed(kind), 1, {"kind": "lora", "rank": 2}, **settings))
        theirs = AutoModelForCausalLM.from_pretrained(packed(kind), dtype=dtype)
        ours = {
            name.replace("base_model.model.", "").replace(".base_layer", ""): value
            for name, value in held_by([built]).items()
        }
        for name, value in theirs.named_parameters():
            assert ours[name].dtype == dtype
            # transformers leaves weights that are not quantized in their files' type
            assert torch.equal(ours[name], value.to(dtype)), name


@pytest.mark.parametrize("kind", OF_DOCUMENTS)
def test_a_format_of_another_library_gives_what_its_documents_say(plain, kind, tmp_path):
    """And LoRA over it the loss and gradients of the model that it stands for."""
    family, pack, settings = OF_DOCUMENTS[kind]
    directory = repack(plain(family), tmp_path / "model", pack, settings)
    stored = load_file(directory / "model.safetensors")
    expected = {n: value for n, value in stored.items() if n.endswith(".expected")}
    save_file(
        {name: value for name, value in stored.items() if name not in expected},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    whole = tmp_path / "whole"
    shutil.copytree(plain(family), whole)
    values = load_file(whole / "model.safetensors")
    values |= {n.replace("expected", "weight"): v.float() for n, v in expected.items()}
    save_file(values, whole / "model.safetensors", {"format": "pt"})
    assert len(expected) >= 14
    held = [held_by(build(config_of(path, 2))) for path in (directory, whole)]
    assert held[0].keys() == held[1].keys()
    for name, value in held[0].items():
        assert torch.equal(value, held[1][name]), name
    if kind in ("GPTQ", "AWQ"):
        runs = []
        for path in (directory, whole):
            built = with_adapters(path, 2)
            runs.append((run_stages(built, make_batch())[0], gradients_of(built)))
        assert runs[0][0] == runs[1][0]
        assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


REFUSED = {
    "which packs as GPTQ's kernels want it": (
        {"quant_method": "gptq", "checkpoint_format": "marlin"},
        "in the format marlin of GPTQ, which is not read; use the model that",
    ),
    "which packs as AWQ's kernels want it": (
        {"quant_method": "awq", "version": "gemv", "bits": 4},
        'by AWQ to 4 bits as "gemv"; read are 4 as "gemm"; use the model that',
    ),
    "with half of its weights left out": (
        {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
        "and stored as sparse-24-bitmask, which is not read",
    ),
    "of 6 bits": (
        {"quant_method": "compressed-tensors", "format": "mxfp6-pack-quantized"},
        "in the format mxfp6-pack-quantized of compressed-tensors",
    ),
    "that is no object": ("fp8", "quantization_config is a string, not an object"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_variant_that_is_not_read_is_refused_by_name(plain, kind, tmp_path):
    settings, message = REFUSED[kind]
    directory = repack(plain("mistral"), tmp_path / "model", lambda n, v: {n: v}, settings)
    with pytest.raises(ConfigError, match=message):
        plan_model(config_of(directory))


def test_blocks_that_do_not_divide_a_weight_end_where_it_ends(plain, tmp_path):
    """As DeepSeek-V3's key and value projection, of 576 rows; transformers loads it at random."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    directory = fp8("mistral", [12, 24])(plain, tmp_path / "model")
    stored = load_file(directory / "model.safetensors")
    (built,) = build(config_of(directory))
    for name, value in held_by([built]).items():
        expected = stored[name]
        if expected.dtype == torch.float8_e4m3fn:
            scales = stored[f"{name}_scale_inv"]
            expected = _dequantize_fp8_weight(expected, scales, [12, 24], torch.float32)
        assert torch.equal(value, expected), name


def unquantized(directory, output):
    """The model as transformers loads it, as a checkpoint that is not quantized."""
    shutil.copytree(directory, output)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    save_file(dict(model.named_parameters()), output / "model.safetensors", {"format": "pt"})
    config = json.loads((output / "config.json").read_text())
    del config["quantization_config"]
    (output / "config.json").write_text(json.dumps(config))
    return output


HOLDINGS = {
    "NF4": {"backend": "bnb", "double_quantization": True},
    "HQQ": {"backend": "hqq", "group_size": 32},
    "FP8": {"backend": "fp8", "skip_modules": ["lm_head", "gate_proj", "up_proj", "down_proj"]},
}


@pytest.mark.parametrize("holding", HOLDINGS)
def test_it_is_held_as_the_model_that_it_stands_for_would_be(packed, plain, holding, tmp_path):
    kinds = ["FP8 in blocks"] if holding == "FP8" else ["FP8 in blocks", "MXFP4"]
    for kind in kinds:
        whole = unquantized(packed(kind), tmp_path / kind)
        held = []
        for directory in (packed(kind), whole):
            settings = {"quantization": HOLDINGS[holding]}
            built = build(config_of(directory, 2, {"kind": "lora", "rank": 2}, **settings))
            held.append({n: w for part in built for n, w in quantized_weights_of(part.stage.names)})
        assert held[0].keys() == held[1].keys() and len(held[0]) >= 8
        for name, weight in held[0].items():
            for part, value in weight.buffers_by_name.items():
                assert torch.equal(value, held[1][name].buffers_by_name[part]), (name, part)


def test_a_record_of_modelopt_beside_config_json_counts(plain, tmp_path):
    settings = {"quantization": {"quant_algo": "FP8"}}
    directory = repack(plain("mistral"), tmp_path / "model", partial(fp8_rows, rows=False), {})
    expected = held_by(build(config_of(directory, weights="random")))
    with pytest.raises(DataError, match="without the scales"):
        build(config_of(directory))
    (directory / "hf_quant_config.json").write_text(json.dumps(settings))
    held = held_by(build(config_of(directory)))
    stored = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert held.keys() == expected.keys()
    assert torch.equal(held[name], stored[name].float() * stored[f"{name}_scale"])


def test_the_text_part_of_a_quantized_multimodal_checkpoint_is_read(tmp_path):
    text = {**COMMON, "sliding_window": None, "model_type": "mistral", "num_hidden_layers": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "head_dim": 8}
    config = transformers.CONFIG_MAPPING["mistral3"](text_config=text, vision_config=vision)
    torch.manual_seed(0)
    transformers.Mistral3ForConditionalGeneration(config).save_pretrained(tmp_path / "plain")
    skip = ["vision_tower", "multi_modal_projector"]
    settings = FP8 | {"weight_block_size": [8, 4], "modules_to_not_convert": skip}
    directory = repack(
        tmp_path / "plain",
        tmp_path / "model",
        fp8_blocks([8, 4]),
        settings,
        skip=(*skip, "embed", "norm", "lm_head"),
    )
    model = transformers.Mistral3ForConditionalGeneration.from_pretrained(directory)
    expected = {n.replace(".language_model.", "."): v for n, v in model.state_dict().items()}
    built = build(config_of(directory, 2))
    for name, value in held_by(built).items():
        assert torch.equal(value, expected[name].float()), name
    saved = saved_model(built, directory, tmp_path / "saved")
    assert "quantization_config" not in (saved / "config.json").read_text()


@pytest.mark.parametrize("kind", ["FP8 in blocks, experts one by one", "MXFP4"])
def test_what_is_saved_is_not_quantized(packed, kind, tmp_path):
    """By full fine-tuning, and by merging an adapter that names the quantized model."""
    base = packed(kind)
    built = build(config_of(base, 2, {"kind": "none"}))
    step(built)
    full = saved_model(built, base, tmp_path / f"{base.name}-full")
    trained = {item.name: item.parameter for part in built for item in part.trained}
    model = loaded(full)
    assert not hasattr(model.config, "quantization_config")
    for name, value in model.named_parameters():
        assert torch.equal(value, trained[name]), name

    adapted = with_adapters(base, 2)
    adapter = saved_adapter(adapted, tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    merged = tmp_path / f"{base.name}-merged"
    merge(base, adapter, merged)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    ids = torch.arange(3, 20)[None]
    reference = PeftModel.from_pretrained(loaded(base), adapter)
    with torch.no_grad():
        expected, found = (model(ids).logits for model in (reference, loaded(merged)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_config_that_does_not_say_how_its_weights_are_quantized_is_refused(packed, tmp_path):
    shutil.copytree(packed("FP8 in blocks"), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"_proj.weight holds F8_E4M3 without the scales"):
        build(config_of(tmp_path / "model"))


def test_a_format_that_is_not_read_is_refused_by_name(packed, tmp_path):
    assert READ.keys() == FORMATS.keys()
    shutil.copytree(packed("FP8 in blocks"), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm"}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    message = r"quantized already, by aqlm, which is not read; use the model that it was made of"
    with pytest.raises(ConfigError, match=message):
        plan_model(config_of(tmp_path / "model"))
