"""Arguments of transformers' Trainer without an equivalent, by the reason."""

from headrace.jobs.old_systems.axolotl_unused import (
    ACCELERATION,
    MEMORY,
    PACKING,
    SHARDING,
    STREAMING,
    TRACKING,
)
from headrace.jobs.old_systems.equivalents import Equivalent, none

REASONS = {  # reason -> keys
    SHARDING: """
        fsdp fsdp_config deepspeed accelerator_config parallelism_config ddp_backend
        ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph
        ddp_timeout fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap""",
    ACCELERATION: """
        use_liger_kernel liger_kernel_config torch_compile_backend torch_compile_mode jit_mode_eval
        use_ipex torchdynamo""",
    MEMORY: """
        auto_find_batch_size torch_empty_cache_steps eval_accumulation_steps skip_memory_metrics
        no_cuda use_cpu use_mps_device use_cache""",
    STREAMING: """
        dataloader_drop_last dataloader_num_workers dataloader_pin_memory
        dataloader_persistent_workers dataloader_prefetch_factor
        dataloader_multiprocessing_context dataloader_in_order""",
    PACKING: """
        group_by_length length_column_name remove_unused_columns label_names
        split_batches dispatch_batches""",
    "rows are always shuffled globally": "train_sampling_strategy",
    TRACKING: """
        logging_dir logging_strategy logging_first_step logging_nan_inf_filter log_on_each_node
        log_level log_level_replica disable_tqdm include_num_input_tokens_seen
        include_tokens_per_second trackio_space_id trackio_bucket_id trackio_static_space_id""",
    "losses are summed over trained tokens and divided by those of all processes": """
        average_tokens_across_devices""",
    "how layers are computed again is not a choice": """
        gradient_checkpointing_kwargs activation_checkpointing_kwargs""",
    "losses of whole sets are computed, and nothing else": """
        prediction_loss_only eval_delay eval_do_concat_batches eval_use_gather_object
        include_for_metrics include_inputs_for_metrics batch_eval_metrics bf16_full_eval
        fp16_full_eval eval_on_each_dataset""",
    "losses say which is best": "metric_for_best_model greater_is_better",
    "checkpoints are always safetensors": "save_safetensors",
    "`checkpoint.node_local` says where checkpoints lie": "save_on_each_node",
    "a signal stops a run after its step, and saves": "enable_jit_checkpoint",
    "`headrace push` sends a result to the hub": """
        push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push
        hub_revision push_to_hub_model_id push_to_hub_organization push_to_hub_token""",
    "a run resumes with its data, always": """
        ignore_data_skip restore_callback_states_from_checkpoint""",
    "an existing run directory is continued or refused": "overwrite_output_dir",
    "runs are the same bits in any case": "full_determinism",
    "PyTorch's own setting": "tf32 half_precision_backend fp16_opt_level fp16_backend",
    "set by the launcher": "local_rank tpu_num_cores ray_scope",
    "`headrace train` trains and evaluates": "do_train do_eval do_predict debug",
}
NEUTRAL: dict[str, tuple[object, ...]] = {  # values that ask for nothing
    "group_by_length": (),
    "train_sampling_strategy": ("random",),
    "use_liger_kernel": (True,),
    "liger_kernel_config": (),
    "average_tokens_across_devices": (True,),
    "save_safetensors": (True,),
    "remove_unused_columns": (True,),
    "logging_strategy": ("steps",),
    "logging_first_step": (True,),
    "logging_nan_inf_filter": (True,),
    "log_on_each_node": (True,),
    "dataloader_pin_memory": (True,),
    "dataloader_in_order": (True,),
    "do_train": (True,),
    "do_eval": (True,),
    "tf32": (True,),
    "overwrite_output_dir": (True,),
    "ddp_timeout": (1800, 180000000),
    "ddp_find_unused_parameters": (False,),
    "dataloader_num_workers": (0,),
    "skip_memory_metrics": (True,),
    "log_level": ("passive", "info"),
}


def unused_rows() -> tuple[Equivalent, ...]:
    """Return a row for each argument that has no equivalent."""
    return tuple(
        none(key, reason, *NEUTRAL.get(key, ()))
        for reason, keys in REASONS.items()
        for key in keys.split()
    )
