"""What is exported to GGUF gives in llama.cpp the logits that transformers gives."""

import json
import shutil

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, PeftModel, get_peft_model
from saved_parts import adapter_of, saved_model, step
from tiny_families import build, config_of
from transformers import AutoConfig, AutoModelForCausalLM

from headrace.schemas.errors import ConfigError, DataError
from headrace.trainer.export.gguf_export import export_gguf
from headrace.trainer.export.gguf_family import context_length
from headrace.trainer.export.gguf_tokenizer import pre_tokenizer_name
from headrace.trainer.export.merge import merge
from headrace.trainer.stored.gguf_records import GGUF_RECORDS

pytestmark = pytest.mark.slow

IDS = [1604, 12865, 79, 7979, 24, 2692]  # "def parse_number(text"
PROMPT = "def parse_number(text):\n    "
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 384,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
}
FAMILIES = {
    "llama": {},
    "llama with llama3 rope, tied": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "mistral": {"head_dim": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
        "sliding_window": 16,
    },
    "phi3": {"sliding_window": None},
    "gemma": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma3_text": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "tie_word_embeddings": True,
        "sliding_window": 16,
        "num_hidden_layers": 7,
    },
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "norm_topk_prob": False,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "head_dim": 32,
    },
    "olmoe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "num_key_value_heads": 4,
    },
    "olmo2": {},
    "arcee": {},
    "seed_oss": {"head_dim": 32, "attention_bias": True, "attention_out_bias": False},
    "starcoder2": {"sliding_window": None},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "granitemoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "cohere": {"logit_scale": 0.5, "tie_word_embeddings": True},
    "cohere2": {
        "logit_scale": 0.5,
        "tie_word_embeddings": True,
        "num_hidden_layers": 5,
        "sliding_window": 16,
    },
    "phi": {"partial_rotary_factor": 0.5, "num_key_value_heads": 4},
    "smollm3": {"num_hidden_layers": 5},
    "stablelm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True},
    "nemotron": {"partial_rotary_factor": 0.5},
    "ernie4_5": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "glm4": {"head_dim": 32},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
        "head_dim": 32,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 32,
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gpt_oss with yarn": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 64,
        "sliding_window": 16,
        "rope_parameters": YARN,
    },
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
}


class LlamaCpp:
    """llama.cpp on a GGUF file, in float32 throughout."""

    def __init__(self, model, adapter=None):
        llama_cpp = pytest.importorskip("xllamacpp")
        settings = llama_cpp.CommonParams()
        settings.model.path = str(model)
        settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
        settings.cpuparams.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            settings.lora_adapters = [llama_cpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server = llama_cpp.Server(settings)

    def greedy(self, prompt, never):
        """The eight likeliest next tokens and, before each, log-probabilities of the top 20."""
        request = {"prompt": prompt, "n_predict": 8, "temperature": 0, "n_probs": 20}
        request["logit_bias"] = [[token, False] for token in never]
        answer = self.server.handle_completions(request)
        content = answer["choices"][0]["logprobs"]["content"]
        tops = [{top["id"]: top["logprob"] for top in token["top_logprobs"]} for token in content]
        return [token["id"] for token in content], tops


def largest_difference(llama_cpp, model, ids, prompt=None, never=()):
    """Between llama.cpp's and transformers' log-probabilities, over eight generated tokens."""
    tokens, tops = llama_cpp.greedy(ids if prompt is None else prompt, never)
    assert len(tokens) == len(tops) == 8
    with torch.no_grad():
        logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 :]
    expected = logits.log_softmax(-1)
    return max(
        abs(logprob - float(expected[place, token]))
        for place, top in enumerate(tops)
        for token, logprob in top.items()
    )


def parts_of_characters(model):
    """Ids of tokens outside ASCII, which may be part of a character: llama.cpp holds those back."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    ascii_in_byte_level = {chr(code) for code in range(33, 127)} | {"Ġ", "Ċ"}
    return [number for token, number in vocabulary.items() if set(token) - ascii_in_byte_level]


def make_tiny(name, tiny_model, directory):
    """A model of a family with random weights and the tiny tokenizer."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(name.split()[0], **SHAPE | FAMILIES[name])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += torch.randn_like(buffer)
    model.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / file, directory)
    return model


def tiny_difference(llama_cpp, model, tiny_model):
    """The largest difference after forty ids."""
    ids = torch.randint(2, 384, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    return largest_difference(llama_cpp, model, ids, never=[1, *parts_of_characters(tiny_model)])


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_gives_the_logits_of_transformers(name, tiny_model, tmp_path):
    model = make_tiny(name, tiny_model, tmp_path / "model")
    count = export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    assert count == len(GGUFReader(tmp_path / "model.gguf").tensors)
    assert tiny_difference(LlamaCpp(tmp_path / "model.gguf"), model, tiny_model) < 1e-3


ADAPTED = "cohere gemma3_text glm4 gpt_oss granite lfm2 olmo2 phi qwen3_moe".split()


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_goes_over_each_family(name, tiny_model, tmp_path):
    base = tmp_path / "base"
    model = make_tiny(name, tiny_model, base)
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj", "k_proj", "v_proj"])
    adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
    export_gguf(base, tmp_path / "adapter.gguf", "f32", adapter)
    export_gguf(base, tmp_path / "base.gguf", "f32")
    llama_cpp = LlamaCpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    assert tiny_difference(llama_cpp, adapted, tiny_model) < 1e-3


KINDS = {
    "rsLoRA": {"rslora": True, "alpha": 3.0},
    "PiSSA": {"init": "pissa"},
    "OLoRA, some layers": {"init": "olora", "layers": "1"},
    "with the head": {"target_modules": ["q_proj", "k_proj", "lm_head"]},
    "DoRA": {"kind": "dora"},
    "head saved whole": {"modules_to_save": ["lm_head"]},
    "with the embedding": {"target_modules": ["embed_tokens", "o_proj"]},
}
MERGED_FIRST = {"DoRA": "use_dora", "head saved whole": "modules_to_save"}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_adapter_gives_the_logits_of_peft_by_itself_or_merged(
    kind, tiny_model, tmp_path
):
    base = tmp_path / "base"
    model = make_tiny("llama", tiny_model, base)
    settings = {"target_modules": "all-linear"} | KINDS[kind]
    adapter = adapter_of(base, tmp_path / "adapter", **settings)
    adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
    file = tmp_path / "adapter.gguf"
    if kind in MERGED_FIRST:
        with pytest.raises(ConfigError, match=f"{MERGED_FIRST[kind]}.*; merge it instead"):
            export_gguf(base, file, "f32", adapter)
        merge(base, adapter, tmp_path / "merged")
        export_gguf(tmp_path / "merged", tmp_path / "merged.gguf", "f32")
        llama_cpp = LlamaCpp(tmp_path / "merged.gguf")
    else:
        export_gguf(base, file, "f32", adapter)
        export_gguf(base, tmp_path / "base.gguf", "f32")
        llama_cpp = LlamaCpp(tmp_path / "base.gguf", file)
    assert tiny_difference(llama_cpp, adapted, tiny_model) < 1e-3


WIDTHS = {
    "hidden": (
        {"hidden_size": 32, "head_dim": 16},
        ["q_proj"],
        r"q_proj.lora_A.weight has shape \[4, 64\], the model's weight \[64, 32\] calls for "
        r"\[4, 32\]",
    ),
    "mlp": ({"intermediate_size": 128}, ["up_proj"], r"up_proj.lora_B.weight has shape \[96, 4\]"),
    "tokens": (
        {"vocab_size": 400},
        ["embed_tokens"],
        r"embed_tokens.lora_embedding_A has shape \[4, 384\].* calls for \[4, 400\]",
    ),
    "embedding's width": (
        {"hidden_size": 32, "head_dim": 16},
        ["embed_tokens"],
        r"lora_embedding_B has shape \[64, 4\].* calls for \[32, 4\]",
    ),
    "layers": (
        {"num_hidden_layers": 1},
        ["q_proj"],
        r"layers.1.self_attn.q_proj.*: the model has no such weight; give its own model",
    ),
}


@pytest.mark.parametrize("width", WIDTHS)
def test_an_adapter_of_another_width_is_refused_by_name(width, tiny_model, tmp_path):
    changes, targets, message = WIDTHS[width]
    make_tiny("llama", tiny_model, tmp_path / "base")
    adapter = adapter_of(tmp_path / "base", tmp_path / "adapter", target_modules=targets, rank=4)
    settings = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(DataError, match=message):
        export_gguf(tmp_path / "other", tmp_path / "adapter.gguf", "f32", adapter)
    assert not (tmp_path / "adapter.gguf").exists()
    export_gguf(tmp_path / "base", tmp_path / "adapter.gguf", "f32", adapter)


def test_a_model_with_new_blocks_gives_its_logits(tiny_model, tmp_path):
    make_tiny("llama", tiny_model, tmp_path / "base")
    (built,) = build(config_of(tmp_path / "base", 1, {"kind": "blocks", "blocks": 1}))
    step([built])
    saved = saved_model([built], tmp_path / "base", tmp_path / "model")
    export_gguf(saved, tmp_path / "model.gguf", "f32")
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    assert model.config.num_hidden_layers == SHAPE["num_hidden_layers"] + 1
    assert tiny_difference(LlamaCpp(tmp_path / "model.gguf"), model, tiny_model) < 1e-3


@pytest.fixture(scope="module")
def real(real_model, tmp_path_factory):
    """The real model as transformers and as llama.cpp have it, and an adapter that matters."""
    folder = tmp_path_factory.mktemp("gguf")
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()
    export_gguf(real_model, folder / "base.gguf", "f32")
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    adapted.save_pretrained(folder / "adapter")
    return folder, adapted.eval()


def test_the_real_model_also_agrees_on_its_tokens(real, real_model):
    from tokenizers import Tokenizer

    folder, adapted = real
    ids = Tokenizer.from_file(str(real_model / "tokenizer.json")).encode(PROMPT).ids
    llama_cpp = LlamaCpp(folder / "base.gguf")
    with adapted.disable_adapter():
        assert largest_difference(llama_cpp, adapted, ids, PROMPT) < 1e-3


def test_an_adapter_over_the_base_model(real, real_model):
    """qlora-pipe-lite's bug 3.2.5: rows of Llama's query and key adapters were not permuted."""
    folder, adapted = real
    export_gguf(real_model, folder / "adapter.gguf", "f32", folder / "adapter")
    llama_cpp = LlamaCpp(folder / "base.gguf", folder / "adapter.gguf")
    assert largest_difference(llama_cpp, adapted, IDS) < 1e-3
    with adapted.disable_adapter():
        assert largest_difference(llama_cpp, adapted, IDS) > 0.1


@pytest.mark.parametrize(
    ("stored", "bits", "tolerance"), [("f16", 16, 0.02), ("bf16", 16, 0.2), ("q8_0", 8.5, 0.5)]
)
def test_types_of_less_precision_come_near(tiny_model, tmp_path, stored, bits, tolerance):
    model = make_tiny("llama", tiny_model, tmp_path / "model")
    sizes = {}
    for kind in ("f32", stored):
        export_gguf(tmp_path / "model", tmp_path / f"{kind}.gguf", kind)
        tensors = GGUFReader(tmp_path / f"{kind}.gguf").tensors
        sizes[kind] = sum(t.n_bytes for t in tensors if len(t.shape) == 2)
    assert sizes[stored] / sizes["f32"] == bits / 32
    assert tiny_difference(LlamaCpp(tmp_path / f"{stored}.gguf"), model, tiny_model) < tolerance


def test_the_chat_template_comes_along(real, real_model):
    folder, _ = real
    fields = GGUFReader(folder / "base.gguf").fields
    template = bytes(fields["tokenizer.chat_template"].parts[-1]).decode()
    assert template == (real_model / "chat_template.jinja").read_text()
    assert np.array(fields["tokenizer.ggml.eos_token_id"].parts[-1])[0] == 2


def test_what_has_no_form_in_gguf_is_refused_by_name(tiny_model, tmp_path):
    output = tmp_path / "x.gguf"
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(
        ConfigError, match=r'model_type "gpt2" cannot be exported.*: llama, mistral, '
    ):
        export_gguf(other, output)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"r": 4, "lora_alpha": 4, "use_dora": True}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"use_dora has no form in a GGUF adapter; merge it"):
        export_gguf(tiny_model, output, adapter=adapter)
    head = adapter_of(tiny_model, tmp_path / "head", target_modules=["lm_head"])
    with pytest.raises(ConfigError, match="are one weight in GGUF; merge it instead"):
        export_gguf(tiny_model, output, adapter=head)
    with pytest.raises(ConfigError, match=r"Whitespace is not one of the known ones.*with --pre"):
        pre_tokenizer_name({"type": "Whitespace"}, other / "tokenizer.json")
    assert list(tmp_path.glob("*.gguf")) == []
    assert list(tmp_path.glob(".*.gguf.tmp")) == []


REFUSED = {
    "an activation": ("qwen3", {"hidden_act": "gelu"}, r"hidden_act = 'gelu' has no form in GGUF"),
    "weights of experts": (
        "qwen3_moe",
        FAMILIES["qwen3_moe"] | {"norm_topk_prob": False},
        r"norm_topk_prob = False has no form in GGUF .*, where it is always True",
    ),
    "an order of layers": (
        "gemma3_text",
        FAMILIES["gemma3_text"] | {"layer_types": ["full_attention"] * 7},
        r"layer_types is fixed in llama.cpp: each 6th layer is 'full_attention'",
    ),
    "dense layers among experts": (
        "qwen3_moe",
        FAMILIES["qwen3_moe"] | {"mlp_only_layers": [0]},
        "layers without experts among others",
    ),
    "a type": (
        "gpt_neox",
        {},
        r'model_type "gpt_neox" cannot be exported to GGUF; supported: llama',
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(what, tiny_model, tmp_path):
    name, changes, message = REFUSED[what]
    config = AutoConfig.for_model(name, **SHAPE | changes)
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        export_gguf(tmp_path, tmp_path / "model.gguf", "f32")


def test_bounds_of_yarn_that_llama_cpp_rounds_are_told(tiny_model, tmp_path, caplog, monkeypatch):
    unrounded = FAMILIES["gpt_oss with yarn"] | {"rope_parameters": YARN | {"truncate": False}}
    monkeypatch.setitem(FAMILIES, "gpt_oss with yarn", unrounded)
    model = make_tiny("gpt_oss with yarn", tiny_model, tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    assert "rounds the bounds of YaRN's frequencies" in caplog.text
    assert tiny_difference(LlamaCpp(tmp_path / "model.gguf"), model, tiny_model) < 0.02


@pytest.mark.parametrize(("window", "context"), [(None, 256), (32, 32), (512, 256)])
def test_a_window_that_llama_cpp_lacks_bounds_the_context(window, context):
    config = AutoConfig.for_model("mistral", **SHAPE | {"sliding_window": window}).to_dict()
    assert context_length(config, GGUF_RECORDS["mistral"]) == context
