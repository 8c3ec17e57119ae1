"""Configs of other systems become ours; nothing of theirs is passed over in silence."""

import re
import tomllib
from pathlib import Path

import pytest
import typer

from headrace.jobs import cli
from headrace.jobs.migration import import_config as import_config_module
from headrace.jobs.migration.import_config import SYSTEMS, import_config, read_old
from headrace.jobs.migration.migration_page import QLORA_PIPE_TAGS, migration_page
from headrace.jobs.old_systems.axolotl import AXOLOTL
from headrace.jobs.old_systems.axolotl_values import module_names
from headrace.jobs.old_systems.equivalents import Equivalent, OldSystem
from headrace.jobs.old_systems.fsdp_qlora import FSDP_QLORA
from headrace.jobs.old_systems.jllm import JLLM
from headrace.jobs.old_systems.qlora_pipe import QLORA_PIPE
from headrace.jobs.old_systems.qlora_pipe_lite import QLORA_PIPE_LITE
from headrace.schemas.config_errors import table_model
from headrace.schemas.errors import ConfigError
from headrace.schemas.prepare.prepare_config import PrepareConfig
from headrace.schemas.publish import write_atomic
from headrace.schemas.toml_config import load_config
from headrace.schemas.train.train_config import TrainConfig

ROOT = Path(__file__).parents[2]
CONFIGS = {"train": TrainConfig, "prepare": PrepareConfig}
ROWS = [(system, row) for system in SYSTEMS for row in system.rows]

# keys and flags as the systems' own sources list them, in their documents' order
QLORA_PIPE_KEYS = """
model output_dir full_fine_tune lora_rank lora_alpha lora_dropout use_dora target_modules
modules_to_save layers_to_transform model_weight_dtype lora_weight_dtype save_dtype
attn_implementation epochs lr_scheduler warmup_steps force_constant_lr load_optimizer_states
micro_batch_size_per_gpu batch_size_tokens gradient_accumulation_steps
eval_gradient_accumulation_steps gradient_clipping steps_per_print pipeline_stages
use_column_major_topology group_by_length activation_checkpointing offload_mlp_to_cpu
scale_weight_norms load_balancing_loss_coef loss_type focal_loss_gamma eval_steps logging_steps
eval_before_first_step eval_after_last_step save_steps save_every_n_epochs
save_checkpoint_on_epoch_end checkpoint_every_n_minutes checkpoint_on_save keep_states
resume_from_checkpoint rejected_sampling rejected_sampling_max_new_tokens dataset_combination_mode
dataset_interleave_stopping_strategy load_in_4bit quantization.hqq.nbits quantization.hqq.group_size
quantization.hqq.view_as_float quantization.hqq.axis quantization.hqq.skip_modules
quantization.hqq.compute_dtype quantization.hqq.dynamic_config quantization.bnb.load_in_4bit
quantization.bnb.load_in_8bit optimizer.type optimizer.lr optimizer.beta1 optimizer.beta2
optimizer.weight_decay optimizer.eps optimizer.kahan_sum optimizer.lr_min optimizer.use_loraplus
optimizer.loraplus_lr_ratio rl.method rl.dpo_beta sampling.temperature sampling.min_p
sampling.temperature_last datasets[].dataset_type datasets[].dataset_path datasets[].sequence_len
datasets[].name datasets[].eval_size datasets[].subsample datasets[].num_repeats
datasets[].sample_weight eval_datasets[].dataset_path --config --local_rank --debug_dataset
--resume_from_checkpoint --no_quantiles --deepspeed --deepspeed_config
datasets[].subsample eval_datasets[].name eval_datasets[].dataset_type eval_datasets[].sequence_len
quantization.bnb.bnb_4bit_quant_type quantization.bnb.bnb_4bit_compute_dtype
quantization.bnb.bnb_4bit_use_double_quant quantization.bnb.bnb_4bit_quant_storage
quantization.bnb.llm_int8_threshold quantization.bnb.llm_int8_skip_modules
quantization.bnb.llm_int8_enable_fp32_cpu_offload quantization.bnb.llm_int8_has_fp16_weight
"""
QLORA_PIPE_LITE_KEYS = """
model_dir output_dir lr sequence_len full_fine_tune use_control_adapters load_in_4bit lora_rank
lora_dropout lora_weight_dtype lora_weight_decay control_adapter_gamma target_modules
layers_to_transform beta1 beta2 eps epochs gradient_accumulation_steps
eval_gradient_accumulation_steps pipeline_stages partition_method use_column_major_topology
eval_fraction evals_per_epoch checkpoint_interval_hours max_checkpoints max_sequences drop_tails
mix_datasets sequence_prefix document_prefix document_suffix mask_tokens datasets[].dataset_path
datasets[].control_class datasets[].max_tokens --config --local_rank --resume_from_checkpoint
--add-prefix-space --trust-remote-code --deepspeed --deepspeed_config
"""
JLLM_FLAGS = """
model from_ckpt resume_ckpt only_load_model tag init cache_model only_cache_model output_dir
no_safetensor train_data eval_data img_shm seq_len block_mask num_workers no_shuf dist_data
no_pin_memory skip_train_steps pipe_parallel_size model_parallel_size sequence_parallel_size
encoder_pipe_parallel_size attention_alpha partition_method multi_layerspec split_dlayer
num_layers_per_decoder emb_partitions async_tensor_model_parallel_allreduce zero_stage offload
timeout ds_config local_rank num_train_epochs per_device_train_batch_size global_batch_size
gradient_accumulation_steps weight_decay lr_scheduler_type num_warmup_steps learning_rate seed
checkpoint_grad_interval no_checkpoint_grad_step checkpoint steps_per_checkpoint background_executor
ckpt_step_gt best_of ckpt_epoch skip_epoch max_num_checkpoints only_ckpt_model only_ckpt_lora
early_stop steps_per_eval steps_per_print lora_dim lora_alpha lora_module_name only_optimize_lora
"""
FSDP_QLORA_FLAGS = """
world_size train_type llama_pro_path model_name precision seed verbose master_addr master_port
max_steps dataset dataset_samples context_length batch_size gradient_accumulation_steps num_epochs
sharding_strategy use_gradient_checkpointing reentrant_checkpointing use_cpu_offload
use_activation_cpu_offload low_memory no_sync loading_workers n_bits lora_rank lora_alpha
lora_dropout lora_target_modules optimizer lr wd lr_scheduler apply_gradient_clipping grad_norm
save_model output_dir log_to project_name name group entity profile_memory profile profiling_output
with_stack with_shapes export_trace export_memory_timeline wait_steps warmup_steps active_steps
repeat profiling_frequency
"""
RAW2IDS_FLAGS = """
-t -i -o -n -c --batch_size --max_len --cores --tokenizer --stack --pad --filter --image_path
--max_pixels --max_num --tmp -T -C
"""

QLORA_PIPE_TOOLS = """
merge_lora.py|merge_lora.py --no-gpu|convert_ds_checkpoint_to_lora.py --input
convert_ds_checkpoint_to_lora.py --output|convert_dpo_dataset_to_chat_format.py|test_sampling.py
"""
QLORA_PIPE_LITE_TOOLS = """
merge_lora.py --input|merge_lora.py --adapter|merge_lora.py --output|merge_lora.py --scale
merge_lora.py --no-gpu|convert_ds_checkpoint.py --input|convert_ds_checkpoint.py --config
convert_ds_checkpoint.py --output|control_adapter_to_lora.py --base
control_adapter_to_lora.py --adapter|control_adapter_to_lora.py --output
control_adapter_to_lora.py --inverse|control_adapter_to_lora.py --cohere
control_adapter_to_lora.py --mixtral|control_adapter_to_lora.py --no-gpu|lora_to_gguf.py --input
lora_to_gguf.py --output|lora_to_gguf.py --arch|lora_to_gguf.py --outtype
analyze_control_adapters.py --adapter|analyze_control_adapters.py --no-gpu
"""
JLLM_TOOLS = """
shuffle_datasets -d|shuffle_datasets -o|shuffle_datasets -n|shuffle_datasets --cores
shuffle_datasets --mem_rate|shuffle_datasets --seed|shuffle_partition|repartition -d|repartition -n
cat_index|cat2hf|server|batch_infer
"""
AXOLOTL_KEYS = """
base_model model_type tokenizer_type tokenizer_config trust_remote_code output_dir
datasets test_datasets pretraining_dataset train_on_inputs min_sample_len eot_tokens chat_template
chat_template_jinja chat_template_kwargs default_system_message rl rl_beta sequence_len
sample_packing eval_sample_packing pad_to_sequence_len excess_length_strategy val_set_size
special_tokens tokens dataset_exact_deduplication shuffle_merged_datasets dataset_prepared_path
dataset_processes dataset_num_proc tokenizer_use_mistral_common added_tokens_overrides
datasets[].path datasets[].name datasets[].split datasets[].train_on_split datasets[].ds_type
datasets[].data_files datasets[].revision datasets[].trust_remote_code datasets[].shards
datasets[].shards_idx datasets[].preprocess_shards datasets[].weight datasets[].type
datasets[].field datasets[].conversation datasets[].field_messages
datasets[].message_property_mappings datasets[].message_field_role
datasets[].message_field_content datasets[].message_field_training
datasets[].message_field_training_detail datasets[].roles datasets[].roles_to_train
datasets[].train_on_eos datasets[].train_on_eot datasets[].chat_template
datasets[].chat_template_jinja datasets[].drop_system_message datasets[].split_thinking
datasets[].field_thinking datasets[].template_thinking_key datasets[].field_tools
datasets[].step_separator datasets[].max_completion_length datasets[].train_on_last_step_only
datasets[].type.system_prompt datasets[].type.system_format datasets[].type.field_system
datasets[].type.field_instruction datasets[].type.field_input datasets[].type.field_output
datasets[].type.format datasets[].type.no_input_format datasets[].type.field_prompt
datasets[].type.field_chosen datasets[].type.field_rejected datasets[].type.prompt_format
datasets[].type.chosen_format datasets[].type.rejected_format
datasets[].type.field_completion datasets[].type.field_label
adapter lora_r lora_alpha lora_dropout lora_target_modules lora_target_linear lora_modules_to_save
peft_use_dora peft_use_rslora peft_init_lora_weights peft_layers_to_transform lora_model_dir
load_in_4bit load_in_8bit gptq bf16 fp16 tf32 gradient_checkpointing flash_attention
xformers_attention sdp_attention num_epochs max_steps micro_batch_size eval_batch_size
gradient_accumulation_steps seed learning_rate optimizer optim_args weight_decay adam_beta1
adam_beta2 adam_epsilon max_grad_norm loraplus_lr_ratio lr_scheduler lr_scheduler_kwargs
warmup_steps warmup_ratio cosine_min_lr_ratio neftune_noise_alpha relora eval_steps evals_per_epoch
save_steps saves_per_epoch save_strategy eval_strategy save_total_limit save_only_model
load_best_model_at_end early_stopping_patience logging_steps resume_from_checkpoint
auto_resume_from_checkpoints loss_watchdog_threshold loss_watchdog_patience wandb_project
wandb_entity wandb_name mlflow_tracking_uri mlflow_experiment_name use_tensorboard deepspeed fsdp
fsdp_config context_parallel_size torch_compile plugins group_by_length local_rank strict debug
"""

# of the config reference and the schema of Axolotl, and of its examples
AXOLOTL_KEYS += """
base_model_ignore_patterns base_model_config revision_of_model tokenizer_use_fast tokenizer_legacy
resize_token_embeddings_to_32x shrink_embeddings embeddings_skip_upcast mean_resizing_embeddings
overrides_of_model_config overrides_of_model_kwargs bnb_config_kwargs qat quantization bfloat16
is_falcon_derived_model is_llama_derived_model is_qwen_derived_model is_mistral_derived_model
float16 gpu_memory_limit lora_on_cpu dpo_use_weighting rpo_alpha orpo_alpha kto_desirable_weight
kto_undesirable_weight cpo_alpha simpo_gamma trl vllm reward_model process_reward_model num_labels
push_dataset_to_hub dataset_keep_in_memory hub_model_id hub_strategy hf_use_auth_token
dataset_shard_num dataset_shard_idx sample_packing_eff_est total_num_tokens total_supervised_tokens
sample_packing_group_size sample_packing_bin_size sample_packing_sequentially curriculum_sampling
sample_pack_sequentially pretraining_sample_concatenation batch_flattening device device_map
max_memory peft_layer_replication peft_layers_pattern lora_fan_in_fan_out lora_mlp_kernel
lora_qkv_kernel lora_o_kernel loraplus_lr_embedding peft relora_steps relora_warmup_steps
relora_anneal_steps relora_prune_ratio relora_prune_method relora_cpu_offload wandb_mode
wandb_watch wandb_run_id wandb_log_model use_wandb use_mlflow mlflow_run_name
hf_mlflow_log_artifacts use_comet comet_api_key comet_workspace comet_project_name
comet_experiment_key comet_mode comet_online comet_experiment_config torch_compile_backend
torch_compile_mode lr_quadratic_warmup include_tokens_per_second auto_find_batch_size
eval_table_size eval_max_new_tokens do_causal_lm_eval eval_causal_lm_metrics profiler_steps
save_safetensors gradient_checkpointing_kwargs cosine_constant_lr_ratio lr_div_factor
optim_target_modules lr_groups embedding_lr embedding_lr_scale batch_size torchdistx_path
adam_epsilon2 adam_beta3 skip_prepare_dataset dataloader_pin_memory dataloader_num_workers
dataloader_prefetch_factor dataloader_drop_last accelerator_config remove_unused_columns world_size
ddp ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters do_bench_eval
bench_dataset bench_split metric_for_best_model greater_is_better gc_steps fp8 unfrozen_parameters
max_prompt_len multipack_real_batches use_pose pose_split_on_token_ids pose_max_context_len
pose_num_chunks pretrain_multipack_buffer_size pretrain_multipack_attn s2_attention flex_attention
flex_attn_compile_kwargs flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv
flash_attn_fuse_mlp flash_optimum eager_attention unsloth_cross_entropy_loss unsloth_lora_mlp
unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope llama4_linearized_experts
fsdp_final_state_dict_type sequence_parallel_degree heads_k_stride ring_attn_func low_cpu_mem_usage
fix_untrained_tokens is_preprocess preprocess_iterable axolotl_config_path lora_target_parameters
peft_trainable_token_indices peft_ensure_weight_tying peft_autocast_adapter_dtype merge_lora
qlora_sharded_model_loading merge_method lisa_n_layers lisa_step_interval lisa_layers_attribute
gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens
gradio_temperature use_ray ray_run_name ray_num_workers resources_per_worker dpo_beta
noisy_embedding_alpha evaluation_strategy dpo_use_logits_to_keep
attn_implementation fsdp_version processor_type model_config model_quantization_config
model_quantization_config_kwargs liger_rope liger_rms_norm liger_glu_activation liger_layer_norm
liger_fused_linear_cross_entropy liger_rms_norm_gated quantize_moe_experts activation_offloading
use_kernels experimental_skip_move_to_device use_sonicmoe eta_min use_scattermoe dp_shard_size
swanlab_experiment_name swanlab_log_completions swanlab_project swanlab_mode swanlab_description
use_swanlab swanlab_completion_log_interval swanlab_completion_max_buffer tiled_mlp adam_eps
tensor_parallel_size nvfp4_merge_aware fused_attn_kernel streaming_multipack_buffer_size
log_sweep_min_lr log_sweep_max_lr max_packed_sequence_len dsv4_fp4_grouped_mode use_dsv4_kernels
"""

QLORA_PIPE_TOML = """
model = "models/big"
output_dir = "runs/old"
lora_rank = 64
lora_alpha = 32
lora_dropout = 0.05
layers_to_transform = "0:4,6:7"
use_dora = true
epochs = 2
lr_scheduler = "cosine"
warmup_steps = 0.1
batch_size_tokens = 4096
gradient_accumulation_steps = 16
gradient_clipping = 1
pipeline_stages = 2
activation_checkpointing = "unsloth"
scale_weight_norms = 8
eval_steps = 100
logging_steps = 10
save_steps = 200
checkpoint_every_n_minutes = 30
keep_states = 2
dataset_combination_mode = "interleave"
offload_mlp_to_cpu = true
epoch = 3
[optimizer]
type = "adamw8bit"
lr = 2e-5
beta2 = 0.95
lr_min = 2e-6
use_loraplus = true
loraplus_lr_ratio = 8
[[datasets]]
name = "books"
dataset_type = "textfile"
dataset_path = "books/*.txt"
sequence_len = 2048
eval_size = 0.01
sample_weight = 3
[[datasets]]
dataset_type = "doclist"
dataset_path = "web.jsonl"
sequence_len = 2048
eval_size = 0.01
num_repeats = 2
subsample = 0.5
[[eval_datasets]]
name = "held-out"
dataset_type = "doclist"
dataset_path = "held.jsonl"
sequence_len = 2048
"""
QLORA_PIPE_LITE_TOML = """
model_dir = "models/big"
output_dir = "runs/old"
lr = 1e-4
sequence_len = 4096
lora_rank = 16
lora_weight_decay = 10.0
layers_to_transform = "0:2, 5"
epochs = 1
evals_per_epoch = 4
checkpoint_interval_hours = 0.5
max_checkpoints = 5
mask_tokens = [1, 2]
mix_datasets = true
[[datasets]]
dataset_path = "raw/*.parquet"
max_tokens = 1000000
"""
AXOLOTL_YAML = """
base_model: models/big
adapter: qlora
gptq: true
lora_r: 8
lora_alpha: 16
lora_target_linear: true
datasets:
  - path: rows.jsonl
    type: alpaca
val_set_size: 0.05
sequence_len: 512
num_epochs: 3
micro_batch_size: 2
gradient_accumulation_steps: 4
learning_rate: 0.0002
optimizer: adamw_torch
lr_scheduler: cosine
cosine_min_lr_ratio: 0.1
warmup_steps: 10
bf16: true
gradient_checkpointing: true
evals_per_epoch: 4
saves_per_epoch: 1
relora: true
jagged_restart_steps: 50
neftune_noise_alpha: 5
wandb_project: mine
flash_attention: true
"""
JLLM_SCRIPT = """
python -m jllm.raw2ids --tokenizer models/big -i data/web.jsonl -t pretrain --max_len 8193 \\
  --stack -o shards/web
deepspeed -H $HOSTFILE --module jllm.train_pipe --model models/big --train_data shards/web \\
  --pipe_parallel_size 4 --global_batch_size 64 --per_device_train_batch_size 2 \\
  --num_warmup_steps 0.1 --partition_method fast --lora_dim 8 --only_optimize_lora \\
  --checkpoint_grad_interval 1 --steps_per_checkpoint 100 --background_executor process \\
  --only_ckpt_lora \\
  --steps_per_eval -1 --best_of 2
"""
FSDP_QLORA_SCRIPT = """
export CUDA_VISIBLE_DEVICES=0,1
python train.py --train_type bnb_dora --model_name models/big --batch_size 2 \\
  --context_length=1024 --use_cpu_offload True --use_activation_cpu_offload True \\
  --lr_scheduler cosine --lr 1e-4 \\
  --apply_gradient_clipping True --log_to wandb --dataset alpaca
"""


def keys_of(system: OldSystem) -> set[str]:
    return {row.old for row in system.rows}


def describe(case: tuple[OldSystem, Equivalent]) -> str:
    return f"{case[0].title} {case[1].old}"


@pytest.mark.parametrize(
    ("system", "text", "prefix"),
    [
        (QLORA_PIPE, QLORA_PIPE_KEYS, ""),
        (QLORA_PIPE_LITE, QLORA_PIPE_LITE_KEYS, ""),
        (AXOLOTL, AXOLOTL_KEYS, ""),
        (JLLM, JLLM_FLAGS, "--"),
        (JLLM, RAW2IDS_FLAGS, "raw2ids "),
        (FSDP_QLORA, FSDP_QLORA_FLAGS, "--"),
    ],
    ids=["qlora-pipe", "qlora-pipe-lite", "Axolotl", "train_pipe", "raw2ids", "fsdp_qlora"],
)
def test_every_key_of_the_old_systems_has_a_row(system, text, prefix):
    assert {prefix + key for key in text.split()} - keys_of(system) == set()


@pytest.mark.parametrize(
    ("system", "text"),
    [(QLORA_PIPE, QLORA_PIPE_TOOLS), (QLORA_PIPE_LITE, QLORA_PIPE_LITE_TOOLS), (JLLM, JLLM_TOOLS)],
    ids=["qlora-pipe", "qlora-pipe-lite", "jllm"],
)
def test_every_program_beside_the_trainers_has_a_row(system, text):
    assert set(re.split(r"[|\n]", text.strip())) - keys_of(system) == set()


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.title)
def test_every_equivalent_is_a_key_of_our_configs_or_a_command(system):
    for row in system.rows:
        assert row.new or row.note, f"{row.old}: neither an equivalent nor a reason"
        for new in row.new:
            assert exists(new), f"{row.old}: {new}"
    for new in system.fixed:
        assert exists(new), new


def exists(new: str) -> bool:
    if new.startswith("headrace "):
        _, name, *options = new.split()
        command = typer.main.get_command(cli.app).commands.get(name)
        known = {opt for p in command.params for opt in p.opts} if command else set()
        return command is not None and set(options) <= known
    config, *path = new.split(".")
    model = CONFIGS[config]
    for part in path[:-1]:
        field = model.model_fields.get(part)
        model = table_model(field.annotation) if field else None
        if model is None:
            return False
    return path[-1] in model.model_fields


def test_no_key_stands_twice():
    for system in SYSTEMS:
        old = [row.old for row in system.rows]
        assert sorted({key for key in old if old.count(key) > 1}) == []


def test_tags_of_qlora_pipe_have_tags_of_ours_that_exist():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(?:train|evaluation/NAME)/([^`]+)`", page, re.MULTILINE))
    assert {ours for _, ours, _ in QLORA_PIPE_TAGS if ours} <= listed
    assert all(ours or note for _, ours, note in QLORA_PIPE_TAGS)


def test_the_migration_page_is_generated_from_the_tables():
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    assert page == migration_page(), "run `make docs`"
    for system, row in ROWS:
        assert f"| `{row.old}` |" in page, describe((system, row))


def imported(folder: Path, name: str, text: str) -> dict[str, dict]:
    """The configs that a file becomes, read back from what was written."""
    (folder / name).write_text(text)
    import_config(folder / name, folder / "new")
    return {path.name: tomllib.loads(path.read_text()) for path in (folder / "new").iterdir()}


def test_qlora_pipe(tmp_path):
    files = imported(tmp_path, "old.toml", QLORA_PIPE_TOML)
    assert files["train.toml"] == {
        "model": "models/big",
        "output_dir": "runs/old",
        "epochs": 2,
        "gradient_accumulation_steps": 16,
        "micro_batch_size": 1,
        "pipeline_stages": 2,
        "activation_checkpointing": "full",
        "activation_offload": True,
        "weight_offload": "mlp",
        "mixing": "interleave",
        "adapter": {
            "kind": "dora",
            "rank": 64,
            "alpha": 32.0,
            "dropout": 0.05,
            "layers": "0:4,6:7",
        },
        "optimizer": {
            "type": "adamw_8bit",
            "lr": 2e-5,
            "beta2": 0.95,
            "lora_plus_ratio": 8.0,
            "gradient_clipping": 1.0,
        },
        "scheduler": {"type": "cosine", "warmup_fraction": 0.05, "min_lr": 2e-6},
        "loader": {"pack": "best_fit", "tokens_per_row": 4096},
        "regularization": {"max_product_norm": 8.0},
        "reporting": {"every_steps": 10},
        "evaluation": {"before_first_step": False, "after_last_step": False, "every_steps": 100},
        "checkpoint": {
            "every_steps": 200,
            "every_epochs": 1.0,
            "every_minutes": 30.0,
            "keep_last": 2,
        },
        "datasets": [
            {"path": "shards/books", "weight": 3.0},
            {"path": "shards/web", "repeats": 2},
        ],
        "evaluation_datasets": [
            {"path": "shards/books"},
            {"path": "shards/web"},
            {"path": "shards/held-out"},
        ],
    }
    assert files["prepare-books.toml"] == {
        "output": "shards/books",
        "tokenizer": "models/big",
        "sequence_len": 2048,
        "packing": "concatenate",
        "evaluation_fraction": 0.01,
        "sources": [{"name": "books", "type": "text", "path": "books/*.txt"}],
    }
    assert files["prepare-held-out.toml"]["sources"][0]["split"] == "evaluation"
    left = re.findall(r"not taken over: (\S+(?: \S+)?) = ", head(tmp_path))
    assert left == ["epoch"]
    assert files["prepare-web.toml"]["sources"][0]["sample_fraction"] == 0.5


@pytest.mark.parametrize(
    ("old", "new", "objective"),
    [
        (
            "epoch = 3",
            'loss_type = "focal_loss"\nfocal_loss_gamma = 2',
            {"kind": "focal", "gamma": 2},
        ),
        (
            "[optimizer]",
            '[rl]\nmethod = "dpo"\ndpo_beta = 0.2\n[optimizer]',
            {"kind": "dpo", "beta": 0.2},
        ),
    ],
)
def test_objectives_of_qlora_pipe(tmp_path, old, new, objective):
    files = imported(tmp_path, "old.toml", QLORA_PIPE_TOML.replace(old, new))
    assert files["train.toml"]["objective"] == objective


@pytest.mark.parametrize(
    ("keys", "tables", "expected"),
    [
        ("rejected_sampling = true", "", {"temperature": 1.0}),
        (
            "rejected_sampling = true\nrejected_sampling_max_new_tokens = 1000000000",
            "[sampling]\ntemperature = 0.8\nmin_p = 0.1\ntemperature_last = true",
            {"temperature": 0.8, "min_p": 0.1, "temperature_last": True},
        ),
        (
            "rejected_sampling = true\nrejected_sampling_max_new_tokens = 300",
            "",
            {"temperature": 1.0, "max_new_tokens": 300},
        ),
        ("rejected_sampling = false", "[sampling]\ntemperature = 0.8", None),
    ],
)
def test_rejected_sampling_of_qlora_pipe(tmp_path, keys, tables, expected):
    text = QLORA_PIPE_TOML.replace("epoch = 3", keys)
    text = text.replace("[optimizer]", f'[rl]\nmethod = "dpo"\n{tables}\n[optimizer]')
    train = imported(tmp_path, "old.toml", text)["train.toml"]
    assert train.get("rejected_sampling") == expected
    assert not re.findall(r"not taken over: \S*sampling", head(tmp_path))


def test_rejected_sampling_of_qlora_pipe_without_pairs_is_left_out(tmp_path):
    text = QLORA_PIPE_TOML.replace("epoch = 3", "rejected_sampling = true")
    assert "rejected_sampling" not in imported(tmp_path, "old.toml", text)["train.toml"]
    assert 'rejected_sampling = true: pairs are sampled for rl.method = "dpo"' in head(tmp_path)


def test_axolotl_sets_of_qlora_pipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (tmp_path / "set.yaml").write_text("datasets:\n  - path: rows.jsonl\n    type: alpaca\n")
    old = 'dataset_type = "textfile"\ndataset_path = "books/*.txt"'
    text = QLORA_PIPE_TOML.replace(old, 'dataset_type = "axolotl"\ndataset_path = "set.yaml"')
    old = 'dataset_type = "doclist"\ndataset_path = "held.jsonl"'
    text = text.replace(old, 'dataset_type = "axolotl"\ndataset_path = "set.yaml"')
    imported(Path(), "old.toml", text)
    books = load_config(PrepareConfig, Path("new/prepare-books.toml"))
    assert (books.sequence_len, books.packing, books.evaluation_fraction) == (2048, "none", 0.01)
    held_out = load_config(PrepareConfig, Path("new/prepare-held-out.toml"))
    assert [source.split for source in held_out.sources] == ["evaluation"]


def test_control_adapters_of_qlora_pipe_lite(tmp_path):
    text = QLORA_PIPE_LITE_TOML.replace("epochs = 1", "epochs = 1\nuse_control_adapters = true")
    text += "[[datasets]]\ndataset_path = 'other.jsonl'\ncontrol_class = -1\n"
    files = imported(tmp_path, "old.toml", text.replace("max_tokens = 1000000", ""))
    adapter = files["train.toml"]["adapter"]
    assert adapter == {"kind": "control", "rank": 16, "control_decay": 10.0, "layers": "0:2,5"}
    classes = [source["control_class"] for source in files["prepare.toml"]["sources"]]
    assert classes == [1, -1]


def head(folder: Path) -> str:
    return (folder / "new" / "train.toml").read_text()


def test_qlora_pipe_lite(tmp_path):
    files = imported(tmp_path, "old.toml", QLORA_PIPE_LITE_TOML)
    train = files["train.toml"]
    assert train["optimizer"] == {"weight_decay": 0.0, "lr": 1e-4}
    assert train["scheduler"] == {"type": "rms_ratio"}
    assert train["regularization"] == {"product_decay": 10.0}
    assert train["adapter"] == {"kind": "lora", "rank": 16, "layers": "0:2,5"}
    assert train["evaluation"] == {"every_epochs": 0.25}
    assert train["checkpoint"] == {"every_epochs": 1.0, "every_minutes": 30.0, "keep_last": 5}
    assert train["partition"] == "uniform"
    assert train["datasets"] == [{"path": "shards/data", "max_tokens": 1000000}]
    assert files["prepare.toml"] == {
        "output": "shards/data",
        "tokenizer": "models/big",
        "sequence_len": 4096,
        "packing": "concatenate",
        "evaluation_fraction": 0.01,
        "mix_sources": True,
        "sources": [
            {
                "name": "data",
                "type": "documents",
                "path": "raw/*.parquet",
                "document_prefix": "",
                "mask_tokens": [1, 2],
            }
        ],
    }
    assert "not taken over" not in head(tmp_path)


def test_axolotl(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    files = imported(Path(), "old.yaml", AXOLOTL_YAML)
    assert files["prepare.toml"] == {
        "output": "shards/old",
        "tokenizer": "models/big",
        "sources": [{"name": "old", "type": "axolotl", "path": "old.yaml"}],
    }
    train = files["train.toml"]
    assert train["optimizer"] == {
        "type": "adamw",
        "lr": 2e-4,
        "weight_decay": 0.0,
        "beta2": 0.999,
        "eps": 1e-8,
    }
    assert train["scheduler"] == {
        "type": "cosine",
        "min_lr": pytest.approx(2e-5),
        "warmup_steps": 10,
    }
    assert train["relora"] == {"every_steps": 50}
    assert train["regularization"] == {"neftune_alpha": 5.0}
    assert train["reporting"] == {"to": ["wandb"], "project": "mine"}
    assert train["evaluation"] == {"every_epochs": 0.25}
    assert train["evaluation_datasets"] == [{"path": "shards/old"}]
    assert head(Path()).count("not taken over") == 1  # gptq


def test_jllms_folder_of_pictures_becomes_a_table(tmp_path):
    options = "--image_path images --max_pixels 602112 -o"
    script = JLLM_SCRIPT.replace("-t pretrain", "-t ft").replace("-o", options, 1)
    prepare = imported(tmp_path, "run.sh", script)["prepare.toml"]
    assert prepare["images"] == {"folder": "images", "model": "models/big"}
    assert prepare["packing"] == "best_fit"


def test_jllm(tmp_path):
    files = imported(tmp_path, "run.sh", JLLM_SCRIPT)
    assert files["prepare.toml"] == {
        "output": "shards/web",
        "tokenizer": "models/big",
        "sequence_len": 8193,
        "packing": "concatenate",
        "sources": [{"name": "web", "path": "data/web.jsonl", "type": "documents"}],
    }
    train = files["train.toml"]
    assert train["gradient_accumulation_steps"] == 32
    assert train["pipeline_stages"] == 4
    assert train["adapter"] == {
        "kind": "lora",
        "rank": 8,
        "alpha": 1.0,
        "target_modules": [
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ],
    }
    assert train["optimizer"]["beta2"] == 0.95
    assert train["scheduler"] == {"type": "cosine", "warmup_fraction": 0.1}
    assert train["checkpoint"] == {"every_steps": 100, "background": True, "weights_only": True}


def test_fsdp_qlora(tmp_path):
    files = imported(tmp_path, "run.sh", FSDP_QLORA_SCRIPT)
    assert set(files) == {"train.toml"}
    train = files["train.toml"]
    assert train["adapter"] == {"kind": "dora", "rank": 64, "alpha": 16.0, "dropout": 0.1}
    assert train["optimizer"]["gradient_clipping"] == 0.3
    assert train["scheduler"]["min_lr"] == pytest.approx(1e-5)
    assert train["reporting"] == {"to": ["wandb"]}
    assert train["quantization"] == {"backend": "bnb", "type": "nf4"}
    assert train["activation_offload"]
    assert "not taken over: --dataset" in head(tmp_path)


@pytest.mark.parametrize(
    ("flags", "quantization"),
    [
        ("--train_type hqq_lora --n_bits 2", {"backend": "hqq", "bits": 2}),
        ("--train_type custom_qlora", {"backend": "bnb", "type": "nf4"}),
        ("--train_type lora", None),
    ],
)
def test_quantized_weights_of_fsdp_qlora(tmp_path, flags, quantization):
    files = imported(tmp_path, "run.sh", FSDP_QLORA_SCRIPT.replace("--train_type bnb_dora", flags))
    assert files["train.toml"].get("quantization") == quantization


def test_what_is_written_loads_as_our_configs(tmp_path):
    imported(tmp_path, "old.toml", QLORA_PIPE_TOML)
    load_config(TrainConfig, tmp_path / "new" / "train.toml")
    for path in (tmp_path / "new").glob("prepare*.toml"):
        load_config(PrepareConfig, path)


def test_a_mistyped_key_is_named(tmp_path):
    """qlora-pipe's bug 3.1.17: it ignored what it did not know."""
    (tmp_path / "old.toml").write_text(QLORA_PIPE_TOML)
    left = read_old(tmp_path / "old.toml").left_out
    assert [(item.key, item.value) for item in left if "not a key" in item.reason] == [("epoch", 3)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("old.toml", "a = 1", "neither `model`"),
        ("old.toml", "model = 'm'\n[[datasets]]\npath = 'shards'", "with a `dataset_path`"),
        ("old.toml", "a = ", "not valid TOML"),
        ("old.yaml", "a: 1", "neither base_model (Axolotl)"),
        ("old.sh", "echo hello", "command lines of jllm or fsdp_qlora"),
        ("old.toml", QLORA_PIPE_TOML.replace("lr = 2e-5", ""), '"optimizer.lr"'),
        ("old.toml", QLORA_PIPE_TOML.replace("doclist", "docs"), "sources"),
    ],
)
def test_what_cannot_be_imported_is_said_in_a_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        import_config(tmp_path / name, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "train.toml").write_text("mine")
    (tmp_path / "old.toml").write_text(QLORA_PIPE_LITE_TOML)
    with pytest.raises(ConfigError, match=r"train\.toml: exists already"):
        import_config(tmp_path / "old.toml", tmp_path)


def test_objectives_and_control_adapters(tmp_path):
    lines = 'model = "m"\noutput_dir = "o"\nepochs = 1\nloss_type = "focal_loss_star"\n'
    old = f"{lines}focal_loss_gamma = 2\n[optimizer]\ntype = 'adamw'\nlr = 1e-4\n"
    text = '[[datasets]]\ndataset_path = "*.txt"\n'
    kinds = 'dataset_type = "textfile"\nsequence_len = 64\n'
    files = imported(tmp_path, "old.toml", old + text + kinds)
    assert files["train.toml"]["objective"] == {"kind": "focal_star", "gamma": 2.0}
    rl = "[rl]\nmethod = 'dpo'\ndpo_beta = 1\n"
    (tmp_path / "rl").mkdir()
    files = imported(tmp_path / "rl", "old.toml", old + rl + text + kinds)
    assert files["train.toml"]["objective"] == {"kind": "dpo", "beta": 1.0}
    lite = 'model_dir = "m"\noutput_dir = "o"\nlr = 1e-4\nsequence_len = 64\nlora_rank = 8\n'
    lite += "use_control_adapters = true\ncontrol_adapter_gamma = 0.25\nlora_weight_decay = 5\n"
    (tmp_path / "lite").mkdir()
    files = imported(tmp_path / "lite", "old.toml", f"{lite}{text}control_class = -1\n")
    adapter = files["train.toml"]["adapter"]
    assert (adapter["kind"], adapter["gamma"], adapter["control_decay"]) == ("control", 0.25, 5.0)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "old.toml",
            "[quantization.bnb]\nload_in_4bit = true\nbnb_4bit_use_double_quant = true\n"
            'bnb_4bit_compute_dtype = "bfloat16"\n',
            {
                "backend": "bnb",
                "type": "nf4",
                "double_quantization": True,
                "compute_dtype": "bfloat16",
            },
        ),
        (
            "old.toml",
            "[quantization.bnb]\nload_in_8bit = true\n",
            {"backend": "bnb", "type": "int8", "int8_threshold": 6.0},
        ),
        (
            "old.toml",
            "[quantization.hqq]\nnbits = 3\ngroup_size = 128\nskip_modules = ['lm_head', 'v']\n",
            {"backend": "hqq", "bits": 3, "group_size": 128, "skip_modules": ["lm_head", "v"]},
        ),
        (
            "old.toml",
            "[quantization.hqq]\nnbits = 4\n[quantization.hqq.dynamic_config]\n"
            "'self_attn.v_proj' = { nbits = 8, group_size = 128, quant_zero = true }\n"
            "experts = { nbits = 2 }\n",
            {
                "backend": "hqq",
                "bits": 4,
                "dynamic_config": {
                    "self_attn.v_proj": {"bits": 8, "group_size": 128},
                    "experts": {"bits": 2},
                },
            },
        ),
        (
            "old.yaml",
            "load_in_4bit: true\n",
            {
                "backend": "bnb",
                "type": "nf4",
                "double_quantization": True,
                "storage_type": "bfloat16",
                "experts": False,
            },
        ),
    ],
)
def test_quantized_weights(tmp_path, monkeypatch, name, text, expected):
    monkeypatch.chdir(tmp_path)
    if name == "old.toml":
        rest = QLORA_PIPE_TOML.replace("full_fine_tune = true", "full_fine_tune = false")
        files = imported(tmp_path, name, rest + "\n" + text)
    else:
        (tmp_path / "rows.jsonl").write_text('{"instruction": "Add", "output": "2"}\n')
        rest = AXOLOTL_YAML.replace("gptq: true\n", text)
        rest = "\n".join(line for line in rest.splitlines() if "relora" not in line)
        files = imported(tmp_path, name, rest + "\n")
    assert files["train.toml"]["quantization"] == expected


# --- values of Axolotl ---

SHORT_YAML = """
base_model: models/big
datasets:
  - path: rows.jsonl
    type: alpaca
micro_batch_size: 2
learning_rate: 1e-4
"""
LORA_YAML = f"{SHORT_YAML}adapter: lora\nlora_r: 8\n"


@pytest.fixture
def axolotl_train(tmp_path, monkeypatch):
    """Import a YAML file with more lines in it; returns the tables of train.toml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    return lambda text: imported(Path(), "old.yaml", text)["train.toml"]


@pytest.mark.parametrize(
    ("text", "table", "expected"),
    [
        ("evals_per_epoch: 0\nsaves_per_epoch: 0\nsave_steps: 0\n", "evaluation", None),
        ("warmup_steps: 0.1\n", "scheduler", {"type": "cosine", "warmup_fraction": 0.1}),
        ("warmup_steps: 7\n", "scheduler", {"type": "cosine", "warmup_steps": 7}),
        ("warmup_ratio: 0.2\n", "scheduler", {"type": "cosine", "warmup_fraction": 0.2}),
        ("warmup_ratio: 0\n", "scheduler", {"type": "cosine"}),
        ("", "scheduler", {"type": "cosine", "warmup_fraction": 0.03}),
        ("max_steps: 1000\n", "scheduler", {"type": "cosine", "warmup_steps": 30}),
        ("max_steps: 9000\n", "scheduler", {"type": "cosine", "warmup_steps": 100}),
        (
            "warmup_steps: 0\neta_min: 1e-6\n",
            "scheduler",
            {"type": "cosine", "warmup_steps": 0, "min_lr": 1e-6},
        ),
        ("batch_size: 32\n", "gradient_accumulation_steps", 16),
        ("gradient_checkpointing: true\nactivation_offloading: true\n", "activation_offload", True),
        ("activation_offloading: true\n", "activation_offload", None),
        ("torch_compile: auto\n", "compile", True),
        ("fp16: true\nbf16: false\n", "dtype", "float16"),
        ("logging_steps: 0.1\nearly_stopping_patience: 0\nmax_steps: 0\n", "reporting", None),
        (
            "load_in_8bit: true\nquantize_moe_experts: true\n",
            "quantization",
            {"backend": "bnb", "type": "int8", "int8_threshold": 6.0, "experts": True},
        ),
    ],
)
def test_values_of_axolotl(axolotl_train, text, table, expected):
    assert axolotl_train(LORA_YAML + text).get(table) == expected


def test_a_whole_model_in_float16_is_not_taken_over(axolotl_train):
    assert "dtype" not in axolotl_train(f"{SHORT_YAML}float16: true\n")
    assert "not taken over: float16 = true: float16 is for adapters" in head(Path())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("adamw_bnb_8bit", "adamw_8bit"),
        ("paged_adamw_8bit", "adamw_8bit_paged"),
        ("paged_adamw_32bit", "adamw_paged"),
        ("lion_pytorch", "lion"),
        ("lion_8bit", "lion_8bit"),
        ("paged_lion_8bit", "lion_8bit_paged"),
        ("paged_lion_32bit", "lion_paged"),
        ("adafactor", "adafactor_unscaled"),
    ],
)
def test_optimizers_of_axolotl_with_an_equivalent(axolotl_train, theirs, ours):
    train = axolotl_train(f"{LORA_YAML}optimizer: {theirs}\nadam_eps: 1e-7\n")
    assert (train["optimizer"]["type"], train["optimizer"]["eps"]) == (ours, 1e-7)
    assert "not taken over" not in head(Path())


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("optimizer: sgd", {"type": "sgd", "momentum": 0.0, "eps": 1e-8}),
        (
            "optimizer: sgd\noptim_args: momentum=0.8, dampening=0",
            {"type": "sgd", "momentum": 0.8, "eps": 1e-8},
        ),
        ("optimizer: adagrad\nadam_epsilon: 1e-5", {"type": "adagrad", "eps": 1e-10}),
        (
            "optimizer: adagrad\noptim_args:\n  eps: 1e-6",
            {"type": "adagrad", "eps": 1e-6},
        ),
        (
            "optimizer: muon\noptim_args:\n  mu: 0.9\n  adjust_lr: rms_norm",
            {"type": "muon", "momentum": 0.9, "eps": 1e-8},
        ),
    ],
)
def test_arguments_of_optimizers_of_axolotl(axolotl_train, lines, expected):
    found = axolotl_train(f"{LORA_YAML}{lines}\n")["optimizer"]
    rest = {"lr": 1e-4, "weight_decay": 0.0, "beta2": 0.999}
    assert found == rest | expected
    assert "not taken over" not in head(Path())


@pytest.mark.parametrize(
    ("theirs", "ours", "difference"),
    [
        ("muon", "muon", "a matrix is stepped by 0.2 sqrt(its larger side) times the rate"),
        ("ao_adamw_8bit", "adamw_8bit", "bitsandbytes' 8 bits, not torchao's"),
        ("adamw_torch_4bit", "adamw_8bit", "bitsandbytes' 8 bits, not torchao's 4"),
        ("adamw_anyprecision", "adamw_kahan", "with Kahan summation"),
    ],
)
def test_optimizers_of_axolotl_that_differ_are_written_and_reported(
    axolotl_train, theirs, ours, difference
):
    train = axolotl_train(f"{LORA_YAML}optimizer: {theirs}\n")
    assert train["optimizer"]["type"] == ours
    line = f'not taken over: optimizer = "{theirs}": "{ours}" is written: {difference}'
    assert line in head(Path())


WSD = "lr_scheduler: warmup_stable_decay\nlr_scheduler_kwargs:\n  num_decay_steps: 20\n"


@pytest.mark.parametrize(
    ("lines", "lr", "expected"),
    [
        ("lr_scheduler: rex\ncosine_min_lr_ratio: 0.1", 1e-4, {"type": "rex", "min_lr": 1e-5}),
        (
            "lr_scheduler: log_sweep\nwarmup_steps: 400",
            10.0,
            {"type": "log_sweep", "min_lr": 1e-10, "warmup_steps": 400},
        ),
        (
            "lr_scheduler: log_sweep\nlog_sweep_min_lr: 1e-7\nlog_sweep_max_lr: 1e-3",
            1e-3,
            {"type": "log_sweep", "min_lr": 1e-7, "warmup_fraction": 0.03},
        ),
        (WSD, 1e-4, {"type": "warmup_stable_decay", "decay_steps": 20}),
        (
            f"{WSD}  min_lr_ratio: 0.1\n  decay_type: linear",
            1e-4,
            {
                "type": "warmup_stable_decay",
                "decay_steps": 20,
                "decay_shape": "linear",
                "min_lr": 1e-5,
            },
        ),
        (
            "lr_quadratic_warmup: true\nwarmup_steps: 5",
            1e-4,
            {"type": "cosine", "warmup_steps": 5, "warmup_shape": "quadratic"},
        ),
        (
            "cosine_min_lr_ratio: 0.1\ncosine_constant_lr_ratio: 0.8",
            1e-4,
            {"type": "cosine", "min_lr": 1e-5, "fall_fraction": 0.8},
        ),
        (
            "lr_scheduler: one_cycle\nlr_div_factor: 6\nlr_scheduler_kwargs:\n"
            "  cycle_momentum: false\n  pct_start: 0.2\n",
            1e-4,
            {"type": "one_cycle", "div_factor": 6.0, "warmup_fraction": 0.2},
        ),
        (
            "lr_scheduler: one_cycle\nlr_scheduler_kwargs:\n  cycle_momentum: false\n"
            "  div_factor: 10\n  final_div_factor: 100",
            1e-4,
            {"type": "one_cycle", "div_factor": 10.0, "min_lr": 1e-7},
        ),
        (
            "lr_scheduler: cosine_with_min_lr\nlr_scheduler_kwargs:\n  min_lr_rate: 0.2",
            1e-4,
            {"type": "cosine", "min_lr": 2e-5},
        ),
        ("lr_scheduler: constant", 1e-4, {"type": "constant"}),
        ("lr_scheduler: constant_with_warmup\nwarmup_steps: 0", 1e-4, {"type": "constant"}),
    ],
)
def test_schedules_of_axolotl(axolotl_train, lines, lr, expected):
    train = axolotl_train(f"{LORA_YAML}{lines}\n")
    found = train["scheduler"]
    assert train["optimizer"]["lr"] == lr
    if not {"warmup_steps", "warmup_fraction"} & expected.keys():
        assert found.pop("warmup_fraction", 0.03) == 0.03
        assert found.pop("warmup_steps", 0) == 0
    assert found == {
        key: pytest.approx(value) if isinstance(value, float) else value
        for key, value in expected.items()
    }
    assert "not taken over" not in head(Path())


def test_a_constant_rate_of_axolotl_has_no_warmup(axolotl_train):
    assert axolotl_train(f"{LORA_YAML}lr_scheduler: constant\n")["scheduler"] == {
        "type": "constant"
    }


@pytest.mark.parametrize(
    ("lines", "reported"),
    [
        ("lr_scheduler: one_cycle", 'lr_scheduler = "one_cycle": "one_cycle" is written: beta1'),
        ("lr_scheduler: linear\ncosine_min_lr_ratio: 0.1", "cosine_min_lr_ratio = 0.1: has no"),
        ("lr_scheduler: rex\nlr_quadratic_warmup: true", "lr_quadratic_warmup = true: has no"),
        ("cosine_constant_lr_ratio: 0.8", "cosine_constant_lr_ratio = 0.8: has no effect there"),
        ("lr_div_factor: 6", "lr_div_factor = 6: has no effect there without one_cycle"),
        ("lr_scheduler: constant\nwarmup_steps: 9", "warmup_steps = 9: `constant` has no warmup"),
        ("lr_scheduler_kwargs:\n  power: 2", 'lr_scheduler_kwargs = {"power": 2}: power: `sched'),
        ("optim_args: a=1", 'optim_args = "a=1": a: `optimizer` has keys'),
    ],
)
def test_what_has_no_effect_or_another_in_axolotl_is_reported(axolotl_train, lines, reported):
    axolotl_train(f"{LORA_YAML}{lines}\n")
    assert f"not taken over: {reported}" in head(Path())


OPTIMIZERS_WITHOUT_EQUIVALENT = "galore_adamw adopt_adamw came_pytorch dion ademamix rmsprop"
SCHEDULES_WITHOUT_EQUIVALENT = "cosine_with_restarts polynomial inverse_sqrt greedy"


@pytest.mark.parametrize(
    "line",
    [
        *(f"optimizer: {name}" for name in OPTIMIZERS_WITHOUT_EQUIVALENT.split()),
        *(f"lr_scheduler: {name}" for name in SCHEDULES_WITHOUT_EQUIVALENT.split()),
    ],
)
def test_an_optimizer_or_schedule_that_is_not_there_ends_the_import(axolotl_train, line):
    key, _, value = line.partition(": ")
    with pytest.raises(ConfigError, match=f"^{key}: '{value}': there is none here"):
        axolotl_train(f"{LORA_YAML}{line}\n")
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("optimizer: sgd\noptim_args: nesterov=True", "optim_args: nesterov = True of sgd"),
        ("optimizer: adagrad\noptim_args: lr_decay=0.1", "lr_decay = 0.1 of adagrad is not"),
        ("optimizer: muon\noptim_args: nesterov=false", "nesterov = false of muon is not"),
        ("lr_scheduler: warmup_stable_decay", "give lr_scheduler_kwargs.num_decay_steps"),
        (f"{WSD}  num_stable_steps: 9", "without num_stable_steps"),
        (f"{WSD}  warmup_type: cosine", "warmup_type = 'cosine' is not there; only 'linear' is"),
        ("lr_scheduler_kwargs:\n  num_cycles: 2", "num_cycles = 2 is not there; only 0.5 is"),
        (
            "lr_scheduler: one_cycle\nlr_scheduler_kwargs:\n  final_div_factor: 1e6",
            "final_div_factor = 1e+06: at most 10000 is there",
        ),
    ],
)
def test_arguments_that_would_train_something_else_end_the_import(axolotl_train, lines, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        axolotl_train(f"{LORA_YAML}{lines}\n")


def test_sgd_of_fsdp_qlora_has_neither_momentum_nor_decay(tmp_path):
    script = FSDP_QLORA_SCRIPT.replace("--lr 1e-4", "--lr 1e-4 --optimizer sgd --wd 0.1")
    found = imported(tmp_path, "run.sh", script)["train.toml"]["optimizer"]
    assert (found["type"], found["momentum"], found["weight_decay"]) == ("sgd", 0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "old.toml",
            QLORA_PIPE_TOML.replace('lr_scheduler = "cosine"', 'lr_scheduler = "linear"'),
            "lr_scheduler: 'linear': there is none here",
        ),
        (
            "old.toml",
            QLORA_PIPE_TOML.replace('"adamw8bit"', '"sgd"'),
            "optimizer.type: 'sgd': there is none here",
        ),
        (
            "run.sh",
            FSDP_QLORA_SCRIPT.replace("--lr 1e-4", "--optimizer adadelta"),
            "--optimizer: 'adadelta': there is none here",
        ),
        (
            "run.sh",
            FSDP_QLORA_SCRIPT.replace("--lr_scheduler cosine", "--lr_scheduler rex"),
            "--lr_scheduler: 'rex': there is none here",
        ),
        (
            "run.sh",
            JLLM_SCRIPT.replace("--num_warmup_steps 0.1", "--lr_scheduler_type polynomial"),
            "--lr_scheduler_type: 'polynomial': there is none here",
        ),
    ],
)
def test_so_it_does_in_the_other_systems(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        import_config(tmp_path / name, tmp_path / "new")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (
            r"model.layers.[\d]+.(mlp|self_attn).(up|q)_proj",
            ["mlp.up_proj", "self_attn.q_proj"],
        ),
        (
            r"model.language_model.layers.[\d]+.(mlp|cross_attn|self_attn).(up|down|gate|q|k|v|o)_proj",
            [
                *("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"),
                *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            ],
        ),
        (
            r"^model\.layers\.\d+\.(?:self_attn\.(?:q|o)_proj|mlp\.down_proj)$",
            ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"],
        ),
        (r".*\.(q_proj|k_proj)", ["q_proj", "k_proj"]),
        ("q_proj", ["q_proj"]),
        (r"model.layers.[\d]+.mlp.experts.\d+.w[1-3]", None),
        (r"(?!.*vision).*proj", None),
        (r"model.layers.(1|2).mlp.up_proj", None),
    ],
)
def test_regular_expressions_as_targets(pattern, names):
    assert module_names(pattern) == names


@pytest.mark.parametrize("names", ["[q_proj]", "'.*q_proj'"])
def test_names_beside_all_linear_layers_take_nothing_away_from_these(axolotl_train, names):
    text = f"{LORA_YAML}lora_target_linear: true\nlora_target_modules: {names}\n"
    assert axolotl_train(text)["adapter"]["target_modules"] == "all-linear"


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        (
            "lora_target_linear: true\nlora_target_modules: [lm_head]\n",
            "lm_head beside lora_target",
        ),
        ("jagged_restart_steps: 10\n", "without relora the learning rate alone would start anew"),
    ],
)
def test_what_would_be_left_out_of_an_adapter_is_reported(text, reported, axolotl_train):
    axolotl_train(f"{LORA_YAML}{text}")
    assert reported in head(Path())


@pytest.mark.parametrize("pattern", ["(?!.*vision).*proj", "model.layers.[0-9].mlp.up_proj"])
def test_targets_that_cannot_be_listed_are_matched_as_they_are(axolotl_train, pattern):
    train = axolotl_train(f"{LORA_YAML}lora_target_modules: '{pattern}'\n")
    assert train["adapter"]["target_modules"] == pattern


@pytest.mark.parametrize(
    ("text", "table", "expected"),
    [
        (
            "lora_model_dir: theirs\nlora_alpha: 4\nlora_target_linear: true\nlora_dropout: 0.1\n",
            "adapter",
            {"kind": "lora", "path": "theirs", "dropout": 0.1},
        ),
        (
            "tokens: ['<a>', '<b>']\n",
            "model_overrides",
            {"new_tokens": ["<a>", "<b>"]},
        ),
        (
            "overrides_of_model_config:\n  max_position_embeddings: 4096\n"
            "  rope_scaling: {type: yarn, factor: 4, original_max_position_embeddings: 1024}\n",
            "model_overrides",
            {
                "max_position_embeddings": 4096,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 1024,
                },
            },
        ),
        (
            "rope_scaling: {rope_type: linear, factor: 2.0}\n",
            "model_overrides",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
    ],
)
def test_what_axolotl_says_of_the_model_itself(axolotl_train, text, table, expected):
    assert axolotl_train(LORA_YAML + text)[table] == expected


def test_rows_of_tokens_of_axolotl_are_trained(axolotl_train):
    lines = "peft_trainable_token_indices: {embed_tokens: [3, 5], lm_head: [3, 5]}\n"
    assert axolotl_train(LORA_YAML + lines)["adapter"]["trainable_token_indices"] == [3, 5]


def test_unfrozen_parameters_train_these_alone(axolotl_train):
    names = "  - ^lm_head.weight$\n  - model.layers.1.mlp\n"
    adapter = axolotl_train(f"{SHORT_YAML}unfrozen_parameters:\n{names}")["adapter"]
    expected = {"kind": "none", "target_modules": ["lm_head.weight", "model.layers.1.mlp"]}
    assert adapter == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unfrozen_parameters:\n  - model.layers.2[0-9]+.mlp\n", "a regular expression; list"),
        ("process_reward_model: true\n", "process_reward_model: True: rewards of steps"),
        ("adapter: llama-adapter\n", "adapter: 'llama-adapter': only lora and qlora"),
        ("batch_size: 5\n", "batch_size: 5: not a multiple of micro_batch_size 2"),
        ("weight_decay: [1]\n", "weight_decay: [1]: cannot be converted"),
    ],
)
def test_what_would_train_something_else_is_refused(axolotl_train, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        axolotl_train(SHORT_YAML + text)


def test_another_tokenizer_library_is_reported(axolotl_train):
    axolotl_train(f"{LORA_YAML}tokenizer_use_mistral_common: true\n")
    assert "tokenizer_use_mistral_common = true: shards are made with a tokenizer" in head(Path())


def test_no_documented_key_of_axolotl_is_called_unknown(axolotl_train):
    known = [key for key in AXOLOTL_KEYS.split() if key.startswith(("liger", "swanlab", "flash"))]
    axolotl_train(LORA_YAML + "".join(f"{key}: true\n" for key in known))
    assert "not a key" not in head(Path())


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.title)
def test_no_key_has_two_rows(system):
    assert len(keys_of(system)) == len(system.rows)


# --- files ---


def test_several_limited_sets_of_qlora_pipe_lite(tmp_path):
    text = f"{QLORA_PIPE_LITE_TOML}[[datasets]]\ndataset_path = 'b.txt'\nmax_tokens = 5\n"
    files = imported(tmp_path, "old.toml", text.replace("mix_datasets = true\n", ""))
    limits = [source["max_tokens"] for source in files["prepare.toml"]["sources"]]
    assert limits == [1000000, 5]
    assert files["train.toml"]["datasets"] == [{"path": "shards/data"}]
    assert "not taken over" not in head(tmp_path)


def test_datasets_are_found_from_the_folder_of_the_old_config_upwards(tmp_path, monkeypatch):
    (tmp_path / "repository" / "examples").mkdir(parents=True)
    (tmp_path / "repository" / "web.jsonl").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    files = imported(tmp_path / "repository" / "examples", "old.toml", QLORA_PIPE_TOML)
    web = files["prepare-web.toml"]["sources"][0]["path"]
    assert web == str(tmp_path / "repository" / "web.jsonl")
    assert files["prepare-books.toml"]["sources"][0]["path"] == "books/*.txt"  # nowhere


def test_variables_of_a_script_are_put_in_or_reported(tmp_path):
    script = "SIZE=4\nexport LENGTH=512\npython train.py --train_type qlora --batch_size $SIZE"
    script += " --context_length ${LENGTH} --lora_rank ${RANK:-8} --lr $LR\n"
    train = imported(tmp_path, "run.sh", script)["train.toml"]
    assert (train["micro_batch_size"], train["adapter"]["rank"]) == (4, 8)
    assert 'not taken over: --lr = "$LR": its value is not in the script' in head(tmp_path)


def test_of_several_commands_the_last_is_taken_and_that_is_said(tmp_path):
    script = "".join(f"python train.py --train_type qlora --batch_size {n}\n" for n in (1, 2, 3))
    assert imported(tmp_path, "run.sh", script)["train.toml"]["micro_batch_size"] == 3
    assert 'not taken over: train.py = "3 commands": the last one is taken' in head(tmp_path)


def test_a_failed_import_can_be_run_again(tmp_path, monkeypatch):
    old = tmp_path / "old.toml"
    old.write_text(QLORA_PIPE_LITE_TOML)

    def fail_at_train(path, text):
        if path.name == "train.toml":
            raise OSError(28, "No space left on device")
        write_atomic(path, text)

    monkeypatch.setattr(import_config_module, "write_atomic", fail_at_train)
    with pytest.raises(OSError, match="No space"):
        import_config(old, tmp_path / "new")
    monkeypatch.undo()
    assert len(import_config(old, tmp_path / "new")) == 2
