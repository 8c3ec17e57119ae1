"""Axolotl's keys that have no equivalent, by the reason; harmless ones and others."""

from headrace.jobs.old_systems.equivalents import Equivalent, none, refused

SHARDING = "the model is cut into stages instead: `pipeline_stages`"
ACCELERATION = "`kernels` and `compile` choose what is faster"
ATTENTION = "attention is chosen by `kernels`, and documents never see each other"
DIRECTORY = "read from the model directory"
PACKING = "rows are packed when shards are written, or by `loader.pack`"
MEMORY = "a process holds its own stage alone; `headrace plan` says what fits"
TRACKING = "runs are reported to TensorBoard, wandb and mlflow"
STREAMING = "rows are read from shards, none are kept in memory"
ANSWERS = "`headrace sample --input` answers a file of prompts"

# reason -> keys
HARMLESS = {
    SHARDING: """
        deepspeed fsdp fsdp_config fsdp_version fsdp_final_state_dict_type
        dp_shard_size dp_replicate_size ddp ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers
        ddp_find_unused_parameters accelerator_config qlora_sharded_model_loading
        expert_parallel_size pipeline_parallel_size""",
    ACCELERATION: """
        plugins flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_qkv
        flash_attn_fuse_mlp flash_optimum unsloth_cross_entropy_loss unsloth_lora_mlp
        unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope lora_mlp_kernel
        lora_qkv_kernel lora_o_kernel lora_embedding_kernel liger_rope liger_rms_norm
        liger_layer_norm liger_swiglu liger_glu_activation liger_cross_entropy
        liger_fused_linear_cross_entropy liger_rms_norm_gated liger_use_token_scaling
        cut_cross_entropy use_kernels use_scattermoe use_sonicmoe use_dsv4_kernels
        dsv4_fp4_grouped_mode fused_attn_kernel torch_compile_backend torch_compile_mode
        llama4_linearized_experts experts_implementation chunked_cross_entropy
        chunked_cross_entropy_num_chunks tiled_mlp tiled_mlp_use_original_mlp
        tiled_mlp_num_shards""",
    "shards are made with a tokenizer.json; texts may become other tokens": """
        tokenizer_use_mistral_common""",
    ATTENTION: """
        flash_attention sdp_attention xformers_attention eager_attention flex_attention
        flex_attn_compile_kwargs sage_attention attn_implementation batch_flattening
        ring_attn_func heads_k_stride""",
    DIRECTORY: """
        model_type tokenizer_type base_model_config processor_type processor_config
        tokenizer_use_fast tokenizer_legacy tokenizer_save_jinja_files
        base_model_ignore_patterns is_llama_derived_model is_falcon_derived_model
        is_mistral_derived_model is_qwen_derived_model experimental_skip_move_to_device
        model_config_type use_eager_loading load_vision_tower""",
    PACKING: """
        group_by_length pad_to_sequence_len eval_sample_packing sample_packing_eff_est
        sample_packing_group_size sample_packing_bin_size sample_packing_sequentially
        sample_pack_sequentially sample_packing_drop_attention_mask sample_packing_mp_start_method
        multipack_real_batches pretraining_sample_concatenation pretrain_multipack_buffer_size
        pretrain_multipack_attn streaming streaming_multipack_buffer_size max_packed_sequence_len
        remove_unused_columns total_num_tokens total_supervised_tokens""",
    MEMORY: """
        device device_map max_memory gpu_memory_limit low_cpu_mem_usage world_size gc_steps
        lora_on_cpu embeddings_skip_upcast relora_cpu_offload layer_offloading
        auto_find_batch_size cpu_ram_efficient_loading""",
    STREAMING: """
        dataset_keep_in_memory dataloader_pin_memory dataloader_num_workers
        dataloader_prefetch_factor dataloader_drop_last skip_prepare_dataset is_preprocess
        preprocess_iterable dataset_shard_num dataset_shard_idx num_dataset_shards_to_save""",
    TRACKING: """
        use_wandb wandb_mode wandb_run_id wandb_watch wandb_log_model use_mlflow mlflow_run_name
        hf_mlflow_log_artifacts use_comet comet_api_key comet_workspace comet_project_name
        comet_experiment_key comet_mode comet_online comet_experiment_config use_swanlab
        swanlab_project swanlab_experiment_name swanlab_description swanlab_mode swanlab_workspace
        swanlab_api_key swanlab_run_id swanlab_web_host swanlab_api_host swanlab_log_completions
        swanlab_completion_log_interval swanlab_completion_max_buffer swanlab_log_model
        use_trackio trackio_project_name trackio_run_name trackio_space_id use_otel_metrics
        otel_metrics_host otel_metrics_port include_tokens_per_second include_tkps
        axolotl_config_path""",
    ANSWERS: """
        do_causal_lm_eval eval_causal_lm_metrics do_bench_eval
        bench_dataset bench_split gradio_title gradio_share gradio_server_name gradio_server_port
        gradio_max_new_tokens gradio_temperature generate_samples num_generation_samples
        generation_max_new_tokens generation_temperature generation_top_p generation_top_k
        generation_prompt_ratio generation_do_sample generate_samples_every lm_eval_tasks
        lm_eval_batch_size lm_eval_post_train lm_eval_model""",
    "how layers are computed again is not a choice": "gradient_checkpointing_kwargs",
    "set HF_TOKEN in the environment; nothing is sent anywhere": """
        hf_use_auth_token push_dataset_to_hub hub_model_id hub_strategy hub_revision
        resume_from_hub""",
    "embeddings keep their size": "resize_token_embeddings_to_32x shrink_embeddings",
    "new rows of the embedding are random": "mean_resizing_embeddings fix_untrained_tokens",
    "`profile.trace_step` traces a step": "profiler_steps profiler_steps_start",
    "`headrace train` starts the processes itself": """
        use_ray ray_run_name ray_num_workers resources_per_worker torchdistx_path""",
    "`headrace merge` merges layer by layer": "merge_method nvfp4_merge_aware",
    "checkpoints are always safetensors": "save_safetensors",
    "losses say which is best": "metric_for_best_model greater_is_better",
    "lengths of prompts are not limited by themselves": "max_prompt_len",
    "no answers are generated by another server": "vllm trl",
    "each follows from `objective.kind`": "dpo_use_logits_to_keep dpo_use_liger_kernel",
}
ASKS_FOR_MORE = {
    "another revision: download it, and give its directory": "revision_of_model",
    "edit config.json of the model directory": """
        overrides_of_model_kwargs model_config rope_theta""",
    "weights are computed in bfloat16 or float32": """
        fp8 fp8_enable_fsdp_float8_all_gather""",
    "training for fewer bits is not there": "qat quantization peft",
    "weights of other quantizers are not read": """
        gptq model_quantization_config model_quantization_config_kwargs""",
    "each weight has one learning rate, but for `optimizer.lora_plus_ratio`": """
        lr_groups embedding_lr embedding_lr_scale loraplus_lr_embedding""",
    "`optimizer` has keys for what it knows": """
        optim_target_modules adam_beta3 adam_epsilon2 dion_lr dion_momentum
        dion_rank_fraction dion_rank_multiple_of""",
    "all layers are trained at every step": """
        lisa_n_layers lisa_step_interval lisa_layers_attribute""",
    "every row lies at its own positions": """
        use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks""",
    "rows are always shuffled globally": "curriculum_sampling sample_packing_keep_order",
    "not among the objectives": """
        dpo_use_weighting dpo_loss_type dpo_norm_loss
        kd_trainer kd_ce_alpha kd_alpha kd_temperature
        kd_top_k_before_softmax kd_zscore_base_temp diffusion noise_schedule grpo ebft
        use_eaft eaft_alpha eaft_k num_labels""",
    "adapters are PEFT's LoRA and DoRA": """
        peft_layers_pattern peft_layer_replication peft_ensure_weight_tying""",
    "adapters are float32": "peft_autocast_adapter_dtype",
    "restarts forget the smallest moments": "relora_prune_method relora_anneal_steps",
    "the language model alone is trained": """
        image_size image_resize_algorithm freeze_mm_modules""",
    "checkpoints are written by steps, epochs and minutes": "dynamic_checkpoint",
}
# values that ask for nothing, beside false and nothing
NEUTRAL: dict[str, tuple[object, ...]] = {
    "model_type": ("AutoModelForCausalLM", "LlamaForCausalLM"),
    "tokenizer_type": ("AutoTokenizer", "LlamaTokenizer"),
    "is_llama_derived_model": (True,),
    "is_mistral_derived_model": (True,),
    "is_qwen_derived_model": (True,),
    "is_falcon_derived_model": (True,),
    "tokenizer_use_fast": (True,),
    "tokenizer_legacy": (True,),
    "eval_sample_packing": (True,),
    "pad_to_sequence_len": (True,),
    "attn_implementation": ("flash_attention_2", "sdpa"),
    "wandb_log_model": ("false",),
    "use_wandb": (True,),
    "use_mlflow": (True,),
    "save_safetensors": (True,),
    "remove_unused_columns": (True,),
    "dp_shard_size": (1,),
    "fsdp_version": (1, 2),
}
SPEED_ONLY = ("flash", "sdp", "xformers", "unsloth", "lora_", "liger", "use_kernels", "cut_cross")


def unused_rows() -> tuple[Equivalent, ...]:
    """Return a row for each key that has no equivalent."""
    rows = [
        none(key, reason, *NEUTRAL.get(key, neutral_of(key, reason)))
        for reason, keys in (HARMLESS | ASKS_FOR_MORE).items()
        for key in keys.split()
    ]
    return (
        *rows,
        refused("process_reward_model", "rewards of steps are not trained"),
    )


def neutral_of(key: str, reason: str) -> tuple[object, ...]:
    """Return the values of a key about which nothing needs to be said: a faster way is another."""
    return (True,) if reason in (ACCELERATION, ATTENTION) and key.startswith(SPEED_ONLY) else ()
