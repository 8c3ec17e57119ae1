"""Programs beside the trainers: merging, converting, exporting, sampling."""

from headrace.jobs.migration.equivalents import elsewhere, none

FROM_CONFIG = "known from the model's config.json"
NO_GPU = "the CPU, unless `--device` names a GPU"
RUN = "the run directory; its config is in it"

QLORA_PIPE_TOOLS = (
    elsewhere("merge_lora.py", "headrace merge", "base model, adapter and output are options"),
    elsewhere("merge_lora.py --no-gpu", "headrace merge --device", NO_GPU),
    elsewhere("convert_ds_checkpoint_to_lora.py --input", "headrace convert", RUN),
    elsewhere("convert_ds_checkpoint_to_lora.py --output", "headrace convert --output"),
    elsewhere(
        "convert_dpo_dataset_to_chat_format.py",
        "prepare.sources.type",
        "`preference` reads pairs as they are",
    ),
    elsewhere("test_sampling.py", "headrace sample"),
)
QLORA_PIPE_LITE_TOOLS = (
    elsewhere("merge_lora.py --input", "headrace merge --model"),
    elsewhere("merge_lora.py --adapter", "headrace merge --adapter"),
    elsewhere("merge_lora.py --output", "headrace merge --output"),
    elsewhere("merge_lora.py --scale", "headrace merge --scale"),
    elsewhere("merge_lora.py --no-gpu", "headrace merge --device", NO_GPU),
    elsewhere("convert_ds_checkpoint.py --input", "headrace convert", RUN),
    none("convert_ds_checkpoint.py --config", RUN),
    elsewhere("convert_ds_checkpoint.py --output", "headrace convert --output"),
    elsewhere("control_adapter_to_lora.py --base", "headrace control-to-lora --model"),
    elsewhere("control_adapter_to_lora.py --adapter", "headrace control-to-lora --adapter"),
    elsewhere("control_adapter_to_lora.py --output", "headrace control-to-lora --output"),
    elsewhere("control_adapter_to_lora.py --inverse", "headrace control-to-lora --inverse"),
    none("control_adapter_to_lora.py --cohere", FROM_CONFIG),
    none("control_adapter_to_lora.py --mixtral", "not the same there, so it is refused"),
    none("control_adapter_to_lora.py --no-gpu", "runs on the CPU"),
    elsewhere("lora_to_gguf.py --input", "headrace export-gguf --adapter"),
    elsewhere("lora_to_gguf.py --output", "headrace export-gguf --output"),
    none("lora_to_gguf.py --arch", FROM_CONFIG),
    elsewhere("lora_to_gguf.py --outtype", "headrace export-gguf --type"),
    elsewhere("analyze_control_adapters.py --adapter", "headrace control-report"),
    none("analyze_control_adapters.py --no-gpu", "runs on the CPU, on `rank` x `rank` matrices"),
)
JLLM_TOOLS = (
    elsewhere("shuffle_datasets -d", "headrace repartition", "`prepare` shuffles already"),
    elsewhere("shuffle_datasets -o", "headrace repartition --out"),
    elsewhere("shuffle_datasets -n", "headrace repartition --shards"),
    elsewhere("shuffle_datasets --cores", "headrace repartition --workers"),
    none("shuffle_datasets --mem_rate", "memory is bounded whatever the size"),
    elsewhere("shuffle_datasets --seed", "headrace repartition --seed"),
    elsewhere("shuffle_partition", "headrace repartition"),
    elsewhere("repartition -d", "headrace repartition"),
    elsewhere("repartition -n", "headrace repartition --shards"),
    none("cat_index", "a model is written with its index, from all machines"),
    none("cat2hf", "a model is written under the hub's names"),
    elsewhere("batch_infer", "headrace sample --input"),
    none("server", "vLLM and llama.cpp serve the result: see [serving](serving.md)"),
)
FSDP_QLORA_TOOLS = (
    elsewhere(
        "block_expansion.py", "train.adapter.blocks", "new blocks are made when training starts"
    ),
)
