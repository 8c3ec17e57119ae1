"""Processor files of vision families, as their models have them, and transformers' processors."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

MODELS = "transformers.models"
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@dataclass(frozen=True)
class VisionModel:
    """A family's files, and the classes of transformers that read them.

    Args:
        image: what `preprocessor_config.json` holds; `small` are numbers for quick tests in place
            of its own.
        call: what its processor gives to each call of the image processor.
        owner: the module's folder of the image processor, and of the processor.
    """

    kind: str
    image: Mapping[str, Any]
    image_class: str
    owner: tuple[str, str]
    processor_class: str
    processor: Mapping[str, Any] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    small: Mapping[str, Any] = field(default_factory=dict)
    family: str | None = None

    def write(self, folder: Path, small: bool = False) -> Path:
        """Write the model directory's files, but for weights and tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        image = {**self.image, **(self.small if small else {})}
        image["image_processor_type"] = self.image_class.removesuffix("Pil") + "Fast"
        config = {"model_type": self.kind, **self.config}
        files = {
            "preprocessor_config.json": image,
            "processor_config.json": dict(self.processor),
            "config.json": config,
        }
        for name, values in files.items():
            (folder / name).write_text(json.dumps(values))
        return folder

    def reference(self, image: Image.Image, small: bool, **call: Any) -> tuple[list[Any], str]:
        """What transformers makes of an image: its tiles' values, and the text in its place."""
        own = load(f"{self.owner[0]}.image_processing_pil_{self.owner[0]}", self.image_class)(
            **{**self.image, **(self.small if small else {})}
        )
        wrapped = [[image]] if self.owner[0] in ("idefics3", "smolvlm") else image
        found = own(wrapped, **{**self.call, **call}, return_tensors=None)
        processor = load(f"{self.owner[1]}.processing_{self.owner[1]}", self.processor_class)
        text = processor.replace_image_token(self.holder(own, processor), found, 0)
        return self.tiles(found), text

    def holder(self, own: Any, processor: Any) -> SimpleNamespace:
        """A stand-in for the processor, which needs a tokenizer to be made."""
        holder = SimpleNamespace(image_processor=own, **{**self.processor, **self.tokens})
        for name in ("_get_number_of_features", "_get_unpadded_features"):
            if hasattr(processor, name):
                setattr(holder, name, getattr(processor, name).__get__(holder))
        return holder

    def tiles(self, found: Any) -> list[Any]:
        """The values of each tile, of shape [channels, height, width]."""
        values = found["pixel_values"]
        if "image_grid_thw" in found:
            return [unpatched(np.asarray(values), np.asarray(found["image_grid_thw"])[0])]
        values = np.asarray(values)
        return list(values.reshape(-1, *values.shape[-3:]))


def unpatched(patches: Any, grid: Any) -> Any:
    """Qwen's patches as the image that they were cut from, its two frames being equal."""
    _, rows, columns = grid.tolist()
    side = round((patches.shape[1] / 6) ** 0.5)
    shape = (rows // 2, columns // 2, 2, 2, 3, 2, side, side)
    frames = patches.reshape(shape).transpose(5, 4, 0, 2, 6, 1, 3, 7)
    frames = frames.reshape(2, 3, rows * side, columns * side)
    assert np.array_equal(frames[0], frames[1])
    return frames[0]


def load(module: str, name: str) -> Any:
    """A class of transformers. Pixtral's processor asks for torchvision to be imported at all, for
    a function that its Pillow module has as well.
    """
    path, needs = f"{MODELS}.{module}", f"{MODELS}.pixtral.image_processing_pixtral"
    if "processing_pixtral" not in module or importlib.util.find_spec("torchvision"):
        return getattr(importlib.import_module(path), name)
    if path not in sys.modules:
        own = importlib.import_module(f"{MODELS}.pixtral.image_processing_pil_pixtral")
        stand_in = ModuleType(needs)
        stand_in.__dict__["get_resize_output_image_size"] = own.get_resize_output_image_size
        sys.modules[needs] = stand_in
        try:
            importlib.import_module(path)
        finally:
            del sys.modules[needs]
    return getattr(sys.modules[path], name)


QWEN = {
    "image_class": "Qwen2VLImageProcessorPil",
    "owner": ("qwen2_vl", "qwen2_vl"),
    "processor_class": "Qwen2VLProcessor",
    "tokens": {"image_token": "<|image_pad|>"},
}
IDEFICS_TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_tag": "<global-img>",
    "global_image_token": "<global-img>",
}
PIXTRAL_TOKENS = {
    "image_token": "[IMG]",
    "image_break_token": "[IMG_BREAK]",
    "image_end_token": "[IMG_END]",
}
MISTRAL_PATCH = {"height": 14, "width": 14}
PIXTRAL = {
    "image_class": "PixtralImageProcessorPil",
    "owner": ("pixtral", "pixtral"),
    "processor_class": "PixtralProcessor",
    "tokens": PIXTRAL_TOKENS,
}
VISION_MODELS = {
    "qwen2_vl": VisionModel(
        kind="qwen2_vl",
        image=CLIP | {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14}
        | {"temporal_patch_size": 2, "merge_size": 2},
        small={"max_pixels": 28 * 28 * 40},
        **QWEN,
    ),
    "qwen2_5_vl": VisionModel(
        kind="qwen2_5_vl",
        image=CLIP | {"size": {"shortest_edge": 3136, "longest_edge": 1003520}, "patch_size": 14},
        small={"size": {"shortest_edge": 28 * 28 * 9, "longest_edge": 28 * 28 * 60}},
        **QWEN,
    ),
    "qwen3_vl": VisionModel(
        kind="qwen3_vl",
        image=HALVES | {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}
        | {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2},
        small={"size": {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 50}},
        **QWEN,
    ),
    "internvl": VisionModel(
        kind="internvl",
        image={"size": {"height": 448, "width": 448}, "crop_to_patches": False}
        | {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
        | {"min_patches": 1, "max_patches": 12, "resample": 3},
        image_class="GotOcr2ImageProcessorPil",
        owner=("got_ocr2", "internvl"),
        processor_class="InternVLProcessor",
        processor={"image_seq_length": 256},
        tokens={"image_token": "<IMG_CONTEXT>", "start_image_token": "<img>"}
        | {"end_image_token": "</img>"},
        call={"crop_to_patches": True},
        small={"size": {"height": 48, "width": 48}},
    ),
    "gemma3": VisionModel(
        kind="gemma3",
        image=HALVES | {"size": {"height": 896, "width": 896}, "resample": 2},
        image_class="Gemma3ImageProcessorPil",
        owner=("gemma3", "gemma3"),
        processor_class="Gemma3Processor",
        processor={"image_seq_length": 256},
        tokens={
            "full_image_sequence": "\n\n<start_of_image>"
            + "<image_soft_token>" * 256
            + "<end_of_image>\n\n"
        },
        call={"do_pan_and_scan": False, "pan_and_scan_min_crop_size": 256}
        | {"pan_and_scan_max_num_crops": 4, "pan_and_scan_min_ratio_to_activate": 1.2},
        small={"size": {"height": 56, "width": 56}},
    ),
    "mistral3": VisionModel(
        kind="mistral3",
        image=CLIP | {"size": {"longest_edge": 1540}, "patch_size": {"height": 14, "width": 14}},
        processor={"patch_size": 14, "spatial_merge_size": 2, **PIXTRAL_TOKENS},
        call={"patch_size": 28},
        small={"size": {"longest_edge": 196}},
        **PIXTRAL | {"tokens": {}},
    ),
    "pixtral": VisionModel(
        kind="llava",
        image=CLIP | {"size": {"longest_edge": 1024}, "patch_size": {"height": 16, "width": 16}},
        processor={"patch_size": 16, "spatial_merge_size": 1},
        call={"patch_size": 16},
        small={"size": {"longest_edge": 160}},
        family="pixtral",
        **PIXTRAL,
    ),
    "llava": VisionModel(
        kind="llava",
        image=CLIP | {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}},
        image_class="LlavaImageProcessorPil",
        owner=("llava", "llava"),
        processor_class="LlavaProcessor",
        processor={"patch_size": 14, "vision_feature_select_strategy": "default"}
        | {"num_additional_image_tokens": 1},
        tokens={"image_token": "<image>"},
        small={"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
    ),
    "llava_next": VisionModel(
        kind="llava_next",
        image=CLIP
        | {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
        | {
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        },
        image_class="LlavaNextImageProcessorPil",
        owner=("llava_next", "llava_next"),
        processor_class="LlavaNextProcessor",
        processor={"patch_size": 14, "vision_feature_select_strategy": "default"}
        | {"num_additional_image_tokens": 1},
        tokens={"image_token": "<image>"},
        small={"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
        | {"image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]},
    ),
    "idefics3": VisionModel(
        kind="idefics3",
        image=HALVES | {"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}}
        | {"do_image_splitting": True, "resample": 1},
        image_class="Idefics3ImageProcessorPil",
        owner=("idefics3", "idefics3"),
        processor_class="Idefics3Processor",
        processor={"image_seq_len": 169},
        tokens=IDEFICS_TOKENS,
        call={"return_row_col_info": True},
        small={"size": {"longest_edge": 160}, "max_image_size": {"longest_edge": 40}},
    ),
    "smolvlm": VisionModel(
        kind="smolvlm",
        image=HALVES | {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
        | {"do_image_splitting": True, "resample": 1},
        image_class="SmolVLMImageProcessorPil",
        owner=("smolvlm", "smolvlm"),
        processor_class="SmolVLMProcessor",
        processor={"image_seq_len": 64},
        tokens=IDEFICS_TOKENS,
        call={"return_row_col_info": True},
        small={"size": {"longest_edge": 130}, "max_image_size": {"longest_edge": 32}},
    ),
}  # fmt: skip

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}MARK{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_vision_model(folder: Path, name: str = "qwen2_vl") -> Path:
    """Write a small model directory: processor files, a tokenizer over bytes with the family's
    tokens, and a chat template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    from headrace.schemas.vision.processor import read_processor

    VISION_MODELS[name].write(folder, small=True)
    tokens = read_processor(folder).tokens
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a red circle left of a blue square\n\n"] * 8, trainer)
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", *dict.fromkeys(tokens.values())]
    rows = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in [*names, *rows]])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    settings["chat_template"] = CHAT.replace("MARK", tokens["marker"])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
