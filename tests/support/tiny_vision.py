"""Tiny random vision-language models of every family, with their processors' files, and rows."""

import json
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from pictures import encoded, noise
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoImageProcessor, AutoModelForImageTextToText

from headrace.dataprep.images.families import family_rule
from headrace.schemas.vision import families as schema_families
from headrace.schemas.vision.processor import Processor
from headrace.schemas.vision.processor_files import ProcessorFiles
from headrace.trainer.architecture.read_architecture import read_architecture
from headrace.trainer.batches.vision_batch import make_vision_batch
from headrace.trainer.order.position import OverlongCount, Position
from headrace.trainer.shards.decoded_rows import Row
from headrace.trainer.vision.processor import open_processor
from headrace.trainer.vision.tile import Tile

VOCABULARY = 97
LAYERS = 4
PLACEHOLDER = 7
START, END = 8, 9

WORDS = [f"w{number}" for number in range(VOCABULARY)]
WORDS[PLACEHOLDER : END + 1] = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWEN_IDS = {
    "image_token_id": PLACEHOLDER,
    "video_token_id": 6,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": False,
}
PATCHES = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 4096},
}
IDS = {"image_token_id": PLACEHOLDER, "tie_word_embeddings": False}
ENCODER = {  # of SigLIP, CLIP and Idefics 3
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_3 = {
    "depth": 3,
    "hidden_size": 24,
    "out_hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
QWEN_PROCESSOR = {"image_processor_type": "Qwen2VLImageProcessor", **PATCHES}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SQUARE = {"size": {"height": 16, "width": 16}}
PIXTRAL_TOWER = {
    "model_type": "pixtral",
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
CLIP = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, **SQUARE}
LLAVA_NEXT = {
    "image_processor_type": "LlavaNextImageProcessor",
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
    "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
    "do_center_crop": False,
}
# family -> (config, processor)
FAMILIES = {
    "qwen2_vl": (
        {
            **QWEN_IDS,
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {
                "depth": 2,
                "embed_dim": 24,
                "hidden_size": 32,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        QWEN_PROCESSOR,
    ),
    "qwen2_5_vl": (
        {
            **QWEN_IDS,
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {
                **{key: QWEN_3[key] for key in QWEN_3 if "deep" not in key and "pos" not in key},
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
        },
        QWEN_PROCESSOR,
    ),
    "qwen3_vl": (
        {
            **QWEN_IDS,
            "text_config": {**TEXT, "head_dim": 8, "rope_parameters": MROPE},
            "vision_config": QWEN_3,
        },
        QWEN_PROCESSOR,
    ),
    "gemma3": (
        {
            "image_token_index": PLACEHOLDER,
            "mm_tokens_per_image": 4,
            "text_config": {
                **TEXT,
                "head_dim": 8,
                "sliding_window": 7,
                "query_pre_attn_scalar": 8,
                "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
                "tie_word_embeddings": True,
            },
            "vision_config": {**ENCODER, "vision_use_head": False},
        },
        {"image_processor_type": "Gemma3ImageProcessor", **SQUARE},
    ),
    "internvl": (
        {
            **IDS,
            "image_seq_length": 4,
            "text_config": {"model_type": "qwen2", **TEXT},
            "vision_config": {
                **ENCODER,
                "image_size": [16, 16],
                "patch_size": [4, 4],
                "use_qk_norm": True,
            },
        },
        {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": False, **SQUARE},
    ),
    "llava": (
        {
            **IDS,
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **ENCODER},
        },
        CLIP,
    ),
    "pixtral": (
        {
            **IDS,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "text_config": {"model_type": "mistral", **TEXT},
            "vision_config": PIXTRAL_TOWER,
        },
        {"image_processor_type": "PixtralImageProcessor", "patch_size": 4},
    ),
    "llava_next": (
        {
            **IDS,
            "image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]],
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **ENCODER},
        },
        LLAVA_NEXT,
    ),
    "mistral3": (
        {
            **IDS,
            "spatial_merge_size": 2,
            "text_config": {"model_type": "mistral", **TEXT},
            "vision_config": PIXTRAL_TOWER,
        },
        {"image_processor_type": "PixtralImageProcessor", "patch_size": 4},
    ),
    "idefics3": (
        {
            **IDS,
            "scale_factor": 2,
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": ENCODER,
        },
        {
            "image_processor_type": "Idefics3ImageProcessor",
            "do_image_splitting": False,
            "max_image_size": {"longest_edge": 16},
            "size": {"longest_edge": 16},
        },
    ),
    "smolvlm": (
        {
            **IDS,
            "scale_factor": 2,
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": ENCODER,
        },
        {
            "image_processor_type": "SmolVLMImageProcessor",
            "do_image_splitting": False,
            "max_image_size": {"longest_edge": 16},
            "size": {"longest_edge": 16},
        },
    ),
    "qwen3_vl_moe": (
        {
            **QWEN_IDS,
            "text_config": {**TEXT, **MIXTURE, "head_dim": 8, "rope_parameters": MROPE},
            "vision_config": QWEN_3,
        },
        QWEN_PROCESSOR,
    ),
}
TYPES = {"pixtral": "llava"}  # family -> model_type, where they differ
ANY_SIZE = [(16, 8), (8, 8), (24, 16), (16, 16)]
OF_ANY_SIZE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "mistral3", "pixtral")


WHOLE = {}  # a picture by its first tile


def save_tiny(family, directory, scale=0.15, **changes):
    """A model directory with random weights, norms and biases included, and its processor.

    Args:
        scale: of random weights.
    """
    settings, processor = FAMILIES[family]
    config = CONFIG_MAPPING[TYPES.get(family, family)](**settings | changes)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.copy_(torch.randn_like(parameter) * scale)
    model.save_pretrained(directory)
    normal = {
        "do_resize": True,  # which pictures of shards have behind them
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.48, 0.45, 0.40],
        "image_std": [0.26, 0.26, 0.27],
        "rescale_factor": 1 / 255,
    }
    text = json.dumps(normal | processor)
    (directory / "preprocessor_config.json").write_text(text)
    tokenizer = Tokenizer(WordLevel({word: n for n, word in enumerate(WORDS)}, "w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([WORDS[number] for number in (PLACEHOLDER, START, END)])
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"eos_token": "w2", "pad_token": "w0", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    return directory


def sizes_of(family):
    """Sizes (width, height) of the pictures of a family."""
    if family in OF_ANY_SIZE:
        return ANY_SIZE
    return [(32, 16), (20, 30), (16, 16)] if family == "llava_next" else [(16, 16)]


def tokens_of(family, size):
    """Placeholders of one picture."""
    width, height = size
    if family == "pixtral":
        return (width // 4) * (height // 4)
    return 16 if family == "llava" else (width // 8) * (height // 8)


def tiles_of(family, picture):
    """The tiles of one picture, and the placeholders that it fills."""
    if family != "llava_next":
        return [picture], tokens_of(family, picture.size)
    config, processor = FAMILIES[family]
    vision = {"vision_config": config["vision_config"]}
    table = {"patch_size": 4, "num_additional_image_tokens": 1}
    files = ProcessorFiles(Path("tiny"), processor, table, vision, {})
    own = Processor(family, schema_families.FAMILIES[family].settings(files))
    prepared = family_rule(own).prepare(picture)
    return prepared.tiles, prepared.tokens


def make_rows(family, documents=((2, 0), (1, 4, 0), (3,)), seed=0):
    """Rows of documents with these many pictures each."""
    chance = np.random.default_rng(seed)
    rows = []
    for number, counts in enumerate(documents):
        ids, lengths, images = [], [], []
        for count in counts:
            document = chance.integers(10, VOCABULARY, chance.integers(3, 7)).tolist()
            for _ in range(count):
                size = sizes_of(family)[int(chance.integers(len(sizes_of(family))))]
                picture = noise(size, int(chance.integers(1 << 20)))
                tiles, tokens = tiles_of(family, picture)
                number = images[-1].picture + 1 if images else 0
                images += [Tile(encoded(tile), number, tokens, *size) for tile in tiles]
                WHOLE[images[-len(tiles)].bytes] = picture
                document += [START, *[PLACEHOLDER] * tokens, END]
                document += chance.integers(10, VOCABULARY, chance.integers(1, 5)).tolist()
            ids += document
            lengths.append(len(document))
        ids = np.array(ids, np.int32)
        mask = ids != PLACEHOLDER
        lengths = np.array(lengths, np.int32)
        rows.append(Row(ids, mask, lengths, "drawn", number, images=tuple(images)))
    return rows


def batch_of(model, rows, length=None):
    """One micro-batch of all rows, as the loader makes it."""
    architecture = read_architecture(model, vision=True)
    processor = open_processor(model, architecture.vision, architecture.whole)
    length = length or max(len(row.input_ids) for row in rows) + 3
    return make_vision_batch(
        [[[row] for row in rows]], length, Position(), OverlongCount(), processor=processor
    )


def documents_of(rows):
    """Each document alone: ids, and the images that it has, in order."""
    for row in rows:
        pictures = [list(group) for _, group in groupby(row.images, lambda tile: tile.picture)]
        start = 0
        for length in row.document_lengths:
            ids = row.input_ids[start : start + length]
            filled, own = int((ids == PLACEHOLDER).sum()), []
            while filled:
                own += pictures.pop(0)
                filled -= own[-1].tokens
            yield ids, row.loss_mask[start : start + length], own
            start += length


def their_arguments(model, family, tiles):
    """What transformers' own processor makes of pictures."""
    import io

    resizes = family == "llava_next"  # whose tiles it makes of whole pictures
    first = [t for n, t in enumerate(tiles) if not n or t.picture != tiles[n - 1].picture]
    images = [WHOLE.get(t.bytes) or Image.open(io.BytesIO(t.bytes)) for t in first]
    processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    return dict(processor(images=images, return_tensors="pt", do_resize=resizes))


def reference_losses(model, theirs, family, rows):
    """transformers' losses of each document alone; the sum, and how many tokens are trained."""
    total, count = 0.0, 0
    for ids, mask, tiles in documents_of(rows):
        inputs = torch.tensor(ids[None]).long()
        arguments = their_arguments(model, family, tiles) if tiles else {}
        if tiles:
            kinds = (inputs == PLACEHOLDER).int()
            arguments |= extra_arguments(family, kinds)
        logits = theirs(input_ids=inputs, use_cache=False, **arguments).logits
        labels = inputs[0, 1:].clone()
        labels[~torch.from_numpy(mask[1:])] = -100
        total = total + functional.cross_entropy(logits[0, :-1].float(), labels, reduction="sum")
        count += int((labels >= 0).sum())
    return total, count


def extra_arguments(family, kinds):
    """What a family's model asks for beside pixels."""
    if family.startswith("qwen"):
        return {"mm_token_type_ids": kinds}
    return {"token_type_ids": kinds} if family == "gemma3" else {}
