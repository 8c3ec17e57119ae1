"""Configs and scripts for TRL, Unsloth and LLaMA-Factory become ours, key by key."""

import dataclasses
import json
import shutil
import tomllib

import pytest
from transformers import TrainingArguments

from headrace.jobs.migration.import_config import import_config
from headrace.jobs.trainer_arguments.llama_factory import LLAMA_FACTORY
from headrace.jobs.trainer_arguments.transformers_trainer import TRAINING_ROWS
from headrace.jobs.trainer_arguments.trl import TRL
from headrace.schemas.errors import ConfigError

# fields of TRL 1.16's configs and of LLaMA-Factory 0.9.5's, in the order of their sources
TRL_KEYS = """
logging_steps gradient_checkpointing bf16 lr_scheduler_kwargs use_liger_kernel
torch_empty_cache_steps learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef
chat_template_path dataset_text_field dataset_kwargs dataset_num_proc eos_token max_length
truncation_mode shuffle_dataset packing packing_strategy padding_free pad_to_multiple_of
eval_packing completion_only_loss assistant_only_loss loss_type activation_offloading pad_token
disable_dropout precompute_ref_log_probs precompute_ref_batch_size loss_weights ld_alpha
f_divergence_type f_alpha_divergence_coef label_smoothing beta use_weighting discopop_tau
sync_ref_model ref_model_mixup_alpha ref_model_sync_steps model_name_or_path model_revision
dtype attn_implementation use_peft lora_r lora_alpha lora_dropout lora_target_modules
lora_target_parameters lora_modules_to_save lora_task_type use_rslora use_dora load_in_8bit
load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage datasets streaming
test_split_size dataset_name dataset_config dataset_train_split dataset_test_split
dataset_streaming ignore_bias_buffers
"""
LLAMA_FACTORY_KEYS = """
model_name_or_path adapter_name_or_path adapter_folder cache_dir use_fast_tokenizer resize_vocab
split_special_tokens add_tokens add_special_tokens new_special_tokens_config init_special_tokens
model_revision low_cpu_mem_usage rope_scaling flash_attn shift_attn mixture_of_depths
use_unsloth use_unsloth_gc enable_liger_kernel moe_aux_loss_coef disable_gradient_checkpointing
use_reentrant_gc upcast_layernorm upcast_lmhead_output train_from_scratch infer_backend
offload_folder use_kv_cache use_v1_kernels infer_dtype hf_hub_token ms_hub_token om_hub_token
print_param_status trust_remote_code quantization_method quantization_bit quantization_type
double_quantization quantization_device_map image_max_pixels image_min_pixels
image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels video_fps video_maxlen
use_audio_in_video audio_sampling_rate export_dir export_size export_device
export_quantization_bit export_quantization_dataset export_quantization_nsamples
export_quantization_maxlen export_legacy_format export_hub_model_id vllm_maxlen vllm_gpu_util
vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen sglang_mem_fraction
sglang_tp_size sglang_config sglang_lora_backend use_kt kt_weight_path kt_expert_checkpoint_path
kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size compute_dtype device_map
model_max_length block_diag_attn template dataset eval_dataset dataset_dir media_dir cutoff_len
train_on_prompt mask_history streaming buffer_size mix_strategy interleave_probs overwrite_cache
preprocessing_batch_size preprocessing_num_workers max_samples eval_num_beams
ignore_pad_token_for_loss val_size eval_on_each_dataset packing neat_packing tool_format
default_system enable_thinking preserve_thinking tokenized_path data_shared_file_system
freeze_trainable_layers freeze_trainable_modules freeze_extra_modules additional_target
lora_alpha lora_dropout lora_rank lora_target loraplus_lr_ratio loraplus_lr_embedding use_rslora
use_dora pissa_init pissa_iter pissa_convert create_new_adapter module_dropout oft_rank
oft_block_size oft_target pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing
kto_chosen_weight kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm
ppo_target ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit
reward_model reward_model_adapters reward_model_quantization_bit reward_model_type ld_alpha
use_galore galore_target galore_rank galore_update_interval galore_scale galore_proj_type
galore_layerwise use_apollo apollo_target apollo_rank apollo_update_interval apollo_scale
apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front use_badam
badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio
badam_mask_mode badam_verbose use_swanlab swanlab_project swanlab_workspace swanlab_run_name
swanlab_mode swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret
pure_bf16 stage finetuning_type use_llama_pro use_adam_mini use_mca use_hyper_parallel
hyper_parallel_args use_muon use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha
freeze_vision_tower freeze_multi_modal_projector freeze_language_model compute_accuracy
disable_shuffling early_stopping_steps plot_loss include_effective_tokens_per_second
ray_num_workers ray_init_kwargs master_addr master_port enable_torch_profiler
profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps
profiler_repeat profiler_record_shapes profiler_profile_memory profiler_with_stack
profile_modules fp8 fp8_backend fp8_enable_fsdp_float8_all_gather overwrite_output_dir do_sample
temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty length_penalty
skip_special_tokens
"""


def test_every_argument_of_the_installed_trainer_has_a_row():
    known = {row.old for row in TRAINING_ROWS}
    assert {field.name for field in dataclasses.fields(TrainingArguments)} - known == set()


@pytest.mark.parametrize(("system", "keys"), [(TRL, TRL_KEYS), (LLAMA_FACTORY, LLAMA_FACTORY_KEYS)])
def test_every_key_has_a_row(system, keys):
    assert set(keys.split()) - system.by_key().keys() == set()


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Import a file with this text; the values of what is written, and what was left out."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, text: str):
        old = tmp_path / name
        old.write_text(text, encoding="utf-8")
        told = import_config(old, tmp_path / "out")
        files = sorted((tmp_path / "out").iterdir())
        values = {file.name: tomllib.loads(file.read_text(encoding="utf-8")) for file in files}
        return values, [line for line in told if line.startswith("not taken over")]

    return run


SFT_YAML = """
model_name_or_path: models/qwen
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,talks
template: qwen3
cutoff_len: 2048
output_dir: runs/sft
logging_steps: 10
save_steps: 500
overwrite_output_dir: true
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
eval_strategy: steps
eval_steps: 200
"""
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "person"}
DATASET_INFO = {
    "identity": {"file_name": "identity.json"},
    "talks": {
        "hf_hub_url": "someone/talks",
        "formatting": "sharegpt",
        "columns": {"messages": "turns"},
        "tags": TAGS,
    },
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "good", "rejected": "bad"},
    },
    "judged": {
        "file_name": "judged.json",
        "columns": {"prompt": "q", "response": "a", "kto_tag": "good"},
    },
    "old": {"file_name": "old.json", "columns": {"prompt": "q", "response": "a", "history": "h"}},
    "seen": {"file_name": "seen.json", "columns": {"images": "images"}},
}


@pytest.fixture
def dataset_info(tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "dataset_info.json"
    path.write_text(json.dumps(DATASET_INFO), encoding="utf-8")


@pytest.mark.usefixtures("dataset_info")
def test_llama_factory(imported):
    values, left = imported("sft.yaml", SFT_YAML)
    assert values["prepare.toml"] == {
        "output": "shards/sft",
        "tokenizer": "models/qwen",
        "sequence_len": 2048,
        "packing": "none",
        "overlong": "truncate",
        "evaluation_fraction": 0.1,
        "sources": [
            {
                "name": "identity",
                "path": "data/identity.json",
                "type": "chat",
                "chat": {
                    "prompt": "instruction",
                    "prompt_input": "input",
                    "completion": "output",
                },
            },
            {
                "name": "talks",
                "path": "hf:someone/talks::train",
                "type": "chat",
                "chat": {"field": "turns", "roles": {"person": "user"}},
            },
        ],
    }
    assert values["train.toml"] == {
        "model": "models/qwen",
        "output_dir": "runs/sft",
        "seed": 42,
        "epochs": 3,
        "dtype": "bfloat16",
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 8,
        "activation_checkpointing": "full",
        "adapter": {
            "kind": "lora",
            "rank": 8,
            "alpha": 16.0,
            "target_modules": "all-linear",
        },
        "optimizer": {"lr": 1e-4, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
        "scheduler": {"type": "cosine", "warmup_fraction": 0.1},
        "evaluation": {"every_steps": 200, "before_first_step": False, "after_last_step": False},
        "checkpoint": {"every_steps": 500, "keep_last": 1_000_000},
        "reporting": {"every_steps": 10},
        "datasets": [{"path": "shards/sft"}],
        "evaluation_datasets": [{"path": "shards/sft"}],
    }
    assert [line.split(" = ")[0] for line in left] == ["not taken over: template"]


@pytest.mark.usefixtures("dataset_info")
@pytest.mark.parametrize(
    ("lines", "table", "expected"),
    [
        ("pref_loss: sigmoid\npref_ftx: 0.2", "objective",
         {"kind": "dpo", "loss": "sigmoid", "beta": 0.1, "sft_weight": 0.2}),
        ("pref_loss: orpo\npref_beta: 0.3", "objective", {"kind": "orpo", "beta": 0.3}),
        ("pref_loss: simpo", "objective", {"kind": "simpo", "beta": 0.1, "gamma": 0.5}),
        ("finetuning_type: full", "adapter", {"kind": "none"}),
        ("lora_rank: 4\nuse_dora: true\nlora_target: q_proj, v_proj", "adapter",
         {"kind": "dora", "rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj"]}),
        ("quantization_bit: 4", "quantization",
         {"backend": "bnb", "type": "nf4", "double_quantization": True}),
        ("quantization_bit: 8", "quantization",
         {"backend": "bnb", "type": "int8", "int8_threshold": 6.0}),
        ("quantization_bit: 2\nquantization_method: hqq", "quantization",
         {"backend": "hqq", "bits": 2}),
        ("optim: adamw_8bit\nadam_beta2: 0.95\nmax_grad_norm: 0", "optimizer",
         {"type": "adamw_8bit", "lr": 1e-5, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0,
          "gradient_clipping": 0.0}),
    ],
)  # fmt: skip
def test_values_of_llama_factory(imported, lines, table, expected):
    text = "model_name_or_path: m\nstage: dpo\ndataset: pairs\nlearning_rate: 1.0e-5\n"
    values, _ = imported("dpo.yaml", text + lines + "\n")
    assert values["train.toml"][table] == expected
    assert values["prepare.toml"]["sources"][0] == {
        "name": "pairs",
        "path": "data/pairs.json",
        "type": "preference",
        "preference": {"chosen": "good", "rejected": "bad"},
        "chat": {"field": "conversations"},
    }


@pytest.mark.usefixtures("dataset_info")
def test_judged_answers_and_reward_models_of_llama_factory(imported, tmp_path):
    text = "model_name_or_path: m\nlearning_rate: 1.0e-5\n"
    values, _ = imported("kto.yaml", f"{text}stage: kto\ndataset: judged\nkto_chosen_weight: 2.0\n")
    expected = {"kind": "kto", "beta": 0.1, "desirable_weight": 2.0}
    assert values["train.toml"]["objective"] == expected
    fields = {"prompt": "q", "completion": "a", "label": "good", "as_chat": True}
    assert values["prepare.toml"]["sources"] == [
        {"name": "judged", "path": "data/judged.json", "type": "unpaired", "unpaired": fields}
    ]
    shutil.rmtree(tmp_path / "out")
    values, _ = imported("rm.yaml", f"{text}stage: rm\ndataset: pairs\n")
    assert values["train.toml"]["objective"] == {"kind": "reward"}


@pytest.mark.usefixtures("dataset_info")
def test_mixed_sets_of_llama_factory_have_directories_and_weights(imported):
    text = SFT_YAML + "mix_strategy: interleave_under\ninterleave_probs: 0.7,0.3\n"
    values, _ = imported("mix.yaml", text)
    assert values["train.toml"]["datasets"] == [
        {"path": "shards/identity", "weight": 0.7},
        {"path": "shards/talks", "weight": 0.3},
    ]
    assert [name for name in values if name.startswith("prepare")] == [
        "prepare-identity.toml",
        "prepare-talks.toml",
    ]


@pytest.mark.usefixtures("dataset_info")
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("stage: ppo", "stage: 'ppo': only sft, pt, dpo, kto, rm"),
        ("stage: dpo\npref_loss: kto_pair", "pref_loss: 'kto_pair': only sigmoid"),
        ("finetuning_type: freeze", "finetuning_type: 'freeze': only lora and full"),
        ("use_galore: true", "use_galore: True: GaLore"),
        ("dataset: nothing", "'nothing': not in data/dataset_info.json"),
        ("dataset: seen", "'seen': pictures and sound are not imported"),
        ("dataset: old", "'old': alpaca rows with a column 'h' of history"),
        ("lr_scheduler_type: polynomial", "lr_scheduler: 'polynomial'"),
        ("label_smoothing_factor: 0.1", "labels are not smoothed"),
        ("rope_scaling: yarn", "write `\\[model_overrides\\]` into train.toml"),
    ],
)
def test_what_llama_factory_would_train_otherwise_ends_the_import(imported, lines, message):
    keys = {line.split(":")[0] for line in lines.splitlines()}
    kept = [line for line in SFT_YAML.splitlines() if line.split(":")[0] not in keys]
    with pytest.raises(ConfigError, match=message):
        imported("sft.yaml", "\n".join([*kept, lines]))


TRL_YAML = """
model_name_or_path: models/qwen
dataset_name: someone/chats
learning_rate: 2.0e-4
num_train_epochs: 1
packing: true
per_device_train_batch_size: 2
eval_strategy: steps
eval_steps: 100
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, o_proj]
output_dir: runs/trl
"""


def test_trl(imported):
    values, left = imported("trl.yaml", TRL_YAML)
    chats = {"type": "chat"}
    assert values["prepare.toml"] == {
        "output": "shards/trl",
        "tokenizer": "models/qwen",
        "sequence_len": 1024,
        "packing": "best_fit",
        "overlong": "truncate",
        "evaluation_fraction": 0.0,
        "sources": [
            {"name": "data-1", "path": "hf:someone/chats::train"} | chats,
            {"name": "test", "path": "hf:someone/chats::test", "split": "evaluation"} | chats,
        ],
    }
    train = values["train.toml"]
    assert train["adapter"] == {
        "kind": "lora",
        "rank": 32,
        "alpha": 16.0,
        "dropout": 0.05,
        "target_modules": ["q_proj", "o_proj"],
    }
    assert train["optimizer"] == {"lr": 2e-4, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    assert train["scheduler"] == {"type": "linear"}
    assert train["activation_checkpointing"] == "full"
    assert train["evaluation_datasets"] == [{"path": "shards/trl"}]
    assert left == [
        "not taken over: assistant_only_loss = false: whole conversations are trained there; say "
        "more in `chat.train_on`"
    ]


@pytest.mark.parametrize(
    ("lines", "table", "expected"),
    [
        ("beta: 0.2", "objective", {"kind": "dpo", "beta": 0.2}),
        ("loss_type: [sigmoid, sft]\nloss_weights: [1.0, 0.5]", "objective",
         {"kind": "dpo", "loss": "sigmoid", "sft_weight": 0.5}),
        ("loss_type: dft", "objective", {"kind": "dft"}),
        ("optim: adamw_torch_fused\noptim_args: ''", "optimizer",
         {"type": "adamw", "lr": 2e-4, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}),
        ("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}",
         "scheduler", {"type": "cosine", "min_lr": 2e-5}),
        ("load_in_4bit: true\nuse_bnb_nested_quant: true", "quantization",
         {"backend": "bnb", "type": "nf4", "double_quantization": True}),
        ("save_strategy: epoch\nsave_total_limit: 2", "checkpoint",
         {"every_epochs": 1.0, "keep_last": 2}),
    ],
)  # fmt: skip
def test_values_of_trl(imported, lines, table, expected):
    values, _ = imported("trl.yaml", f"{TRL_YAML.replace('packing: true', '')}{lines}\n")
    assert values["train.toml"][table] == expected


def test_an_adapter_argument_without_use_peft_is_reported(imported):
    text = TRL_YAML.replace("use_peft: true\n", "")
    values, left = imported("trl.yaml", text)
    assert values["train.toml"]["adapter"] == {"kind": "none"}
    assert sum("has no effect there without `use_peft`" in line for line in left) == 3


UNSLOTH = """
from unsloth import FastLanguageModel, is_bfloat16_supported
from trl import SFTTrainer, SFTConfig
from datasets import load_dataset
max_seq_length = 2048
url = "https://example.org/chips.jsonl"
dataset = load_dataset("json", data_files = {"train" : url}, split = "train")
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = "models/oss", max_seq_length = max_seq_length, load_in_4bit = True, dtype = None)
model = FastLanguageModel.get_peft_model(
    model, r = 16, target_modules = ["q_proj", "v_proj"], lora_alpha = 16, lora_dropout = 0,
    bias = "none", use_gradient_checkpointing = "unsloth", random_state = 3407)
trainer = SFTTrainer(
    model = model, train_dataset = dataset, tokenizer = tokenizer,
    args = SFTConfig(max_steps = 60, warmup_steps = 10, bf16 = is_bfloat16_supported(),
        per_device_train_batch_size = 2, optim = "adamw_8bit", dataset_text_field = "text",
        output_dir = make_name(), push_to_hub = False))
raise SystemExit("never run")
"""


def test_an_unsloth_script_is_read_and_not_run(imported):
    values, left = imported("tune.py", UNSLOTH)
    assert values["prepare.toml"]["sources"] == [
        {
            "name": "data-1",
            "path": "https://example.org/chips.jsonl",
            "type": "documents",
            "text_field": "text",
        }
    ]
    assert values["prepare.toml"]["sequence_len"] == 2048
    train = values["train.toml"]
    assert train["model"] == "models/oss"
    assert train["max_steps"] == 60
    assert train["dtype"] == "bfloat16"
    assert train["activation_offload"]
    assert train["adapter"] == {
        "kind": "lora",
        "rank": 16,
        "alpha": 16.0,
        "dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
    }
    quantization = {"backend": "bnb", "type": "nf4", "double_quantization": True}
    assert train["quantization"] == quantization
    assert left == [
        'not taken over: output_dir = "make_name()": its value is not written in the script; '
        "write it into the new config"
    ]


def test_rows_and_arguments_that_a_scripts_own_code_makes_are_reported(imported):
    text = """
data = load_dataset("someone/chats").map(as_text)
SFTTrainer("models/qwen", args=SFTConfig(max_steps=2, **common), formatting_func=as_text)
"""
    values, left = imported("own.py", text)
    assert values["prepare.toml"]["sources"][0]["path"] == "hf:someone/chats::train"
    reported = {line.removeprefix("not taken over: ").split(" = ")[0] for line in left}
    assert reported >= {"map", "formatting_func", "SFTConfig(**...)"}


def test_a_script_with_lora_config_has_its_defaults(imported):
    text = """
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer
DPOTrainer("models/qwen", args=DPOConfig(beta=0.2, output_dir="runs/x"), train_dataset=data,
           peft_config=LoraConfig(r=4, target_modules="all-linear"))
"""
    values, _ = imported("dpo.py", text)
    train = values["train.toml"]
    assert train["objective"] == {"kind": "dpo", "beta": 0.2}
    assert train["optimizer"]["lr"] == 1e-6
    expected = {"kind": "lora", "rank": 4, "alpha": 8.0, "target_modules": "all-linear"}
    assert train["adapter"] == expected
    assert values["prepare.toml"]["sources"] == [
        {"name": "data-1", "path": "data/*.jsonl", "type": "preference"}
    ]


@pytest.mark.parametrize(
    ("call", "objective", "kind", "rate"),
    [
        ("KTOTrainer('m', args=KTOConfig(beta=0.2, desirable_weight=2.0))",
         {"kind": "kto", "beta": 0.2, "desirable_weight": 2.0}, "unpaired", 1e-6),
        ("RewardTrainer('m', args=RewardConfig(center_rewards_coefficient=0.01))",
         {"kind": "reward", "center": 0.01}, "preference", 1e-4),
        ("CPOTrainer('m', args=CPOConfig(loss_type='simpo', simpo_gamma=1.0, cpo_alpha=0.0))",
         {"kind": "simpo", "gamma": 1.0, "sft_weight": 0.0}, "preference", 1e-6),
    ],
)  # fmt: skip
def test_other_trainers(imported, call, objective, kind, rate):
    values, _ = imported("other.py", call)
    assert values["train.toml"]["objective"] == objective
    assert values["train.toml"]["optimizer"]["lr"] == rate
    assert values["prepare.toml"]["sources"][0]["type"] == kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "old.py: not a Python script"),
        ("x = 1", "no trainer of TRL is called"),
        ("GRPOTrainer('m')", "grpo: of the trainers only sft, dpo, orpo, cpo, kto, reward"),
        ("SFTTrainer('m', args=SFTConfig(loss_type='sigmoid'))", "loss_type: 'sigmoid'"),
        ("SFTTrainer(model)", "no name of a model is written in it"),
        ("SFTTrainer('m', peft_config=LoraConfig(r=8, bias='all'))", "biases are not trained"),
    ],
)
def test_what_a_script_does_not_say_ends_the_import(imported, text, message):
    with pytest.raises(ConfigError, match=message):
        imported("old.py", text)
