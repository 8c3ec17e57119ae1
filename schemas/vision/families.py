"""The vision families that are known: the numbers of their processors, by those of transformers.

Read against transformers 5.23. Where a family's processor (not its image processor) gives numbers
of its own to each call, these go before those of the image processor's file, as they do there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from headrace.schemas.vision.processor_files import ProcessorFiles
from headrace.schemas.vision.processor_numbers import (
    BICUBIC,
    BILINEAR,
    CLIP_MEAN,
    CLIP_STD,
    HALVES,
    LANCZOS,
    common,
    edges,
    given,
    whole,
)
from headrace.schemas.vision.processor_record import Settings


class FamilyRecord(NamedTuple):
    """One way to prepare pictures.

    Args:
        processors: names of transformers' classes, without what tells the backend.
        settings: the numbers of a model directory.
        changeable: settings that only decide sizes, which a config may change.
    """

    processors: tuple[str, ...]
    settings: Callable[[ProcessorFiles], Settings]
    changeable: frozenset[str] = frozenset()


def qwen(files: ProcessorFiles) -> Settings:
    """Return the numbers of Qwen2-VL's resizing, which Qwen2.5-VL and Qwen3-VL share."""
    size = given(files.image, "size", {})
    least = given(size, "shortest_edge", given(size, "min_pixels", 56 * 56))
    most = given(size, "longest_edge", given(size, "max_pixels", 28 * 28 * 1280))
    values = {
        "patch_size": given(files.image, "patch_size", 14),
        "temporal_patch_size": given(files.image, "temporal_patch_size", 2),
        "merge_size": given(files.image, "merge_size", 2),
        "min_pixels": given(files.image, "min_pixels", least),
        "max_pixels": given(files.image, "max_pixels", most),
    }
    token = files.token("image_token", "<|image_pad|>")
    return {
        **common(files, BICUBIC, CLIP_MEAN, CLIP_STD),
        **{name: whole(files, name, value) for name, value in values.items()},
        "tokens": {"marker": token, "placeholder": token},
    }


def internvl(files: ProcessorFiles) -> Settings:
    """Return the numbers of InternVL's tiles; its processor always cuts pictures into them."""
    context = files.token("context_image_token", "<IMG_CONTEXT>")
    return {
        **common(files, BICUBIC, CLIP_MEAN, CLIP_STD),
        "size": edges(files, "size", {"height": 384, "width": 384}),
        "crop_to_patches": True,
        "min_patches": whole(files, "min_patches", given(files.image, "min_patches", 1)),
        "max_patches": whole(files, "max_patches", given(files.image, "max_patches", 12)),
        "image_seq_length": sequence(files, "image_seq_length", 256),
        "tokens": {
            "marker": context,
            "placeholder": context,
            "start": files.token("start_image_token", "<img>"),
            "end": files.token("end_image_token", "</img>"),
        },
    }


def gemma3(files: ProcessorFiles) -> Settings:
    """Return the numbers of Gemma 3; its processor pans and scans only where it is asked to."""
    return {
        **common(files, BILINEAR, HALVES, HALVES),
        "size": edges(files, "size", {"height": 224, "width": 224}),
        "do_pan_and_scan": False,
        "pan_and_scan_min_crop_size": 256,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
        "image_seq_length": sequence(files, "image_seq_length", 256),
        "tokens": {
            "marker": files.token("boi_token", "<start_of_image>"),
            "placeholder": files.token("image_token", "<image_soft_token>"),
            "start": files.token("boi_token", "<start_of_image>"),
            "end": files.token("eoi_token", "<end_of_image>"),
        },
    }


def pixtral(files: ProcessorFiles) -> Settings:
    """Return the numbers of Pixtral, and of Mistral 3, whose patches are merged."""
    size = given(files.image, "size", {"longest_edge": 1024})
    token = given(files.processor, "image_token", "[IMG]")
    return {
        **common(files, BICUBIC, CLIP_MEAN, CLIP_STD),
        "longest_edge": whole(files, "size.longest_edge", size.get("longest_edge")),
        "patch_size": sequence(files, "patch_size", 16),
        "spatial_merge_size": sequence(files, "spatial_merge_size", 1),
        "tokens": {
            "marker": token,
            "placeholder": token,
            "break": given(files.processor, "image_break_token", "[IMG_BREAK]"),
            "end": given(files.processor, "image_end_token", "[IMG_END]"),
        },
    }


def clip_numbers(files: ProcessorFiles) -> Settings:
    """Return what LLaVA and LLaVA-NeXT have in common."""
    vision = given(files.config, "vision_config", {})
    strategy = files.config.get("vision_feature_select_strategy", "default")
    token = files.token("image_token", given(files.processor, "image_token", "<image>"))
    return {
        **common(files, BICUBIC, CLIP_MEAN, CLIP_STD),
        "size": edges(files, "size", {"shortest_edge": 224}),
        "crop_size": edges(files, "crop_size", {"height": 224, "width": 224}),
        "do_center_crop": bool(given(files.image, "do_center_crop", True)),
        "patch_size": sequence(files, "patch_size", vision.get("patch_size")),
        "vision_feature_select_strategy": given(
            files.processor, "vision_feature_select_strategy", strategy
        ),
        "num_additional_image_tokens": int(
            given(files.processor, "num_additional_image_tokens", 0)
        ),
        "tokens": {"marker": token, "placeholder": token},
    }


def llava(files: ProcessorFiles) -> Settings:
    """Return the numbers of LLaVA."""
    return {**clip_numbers(files), "do_pad": bool(given(files.image, "do_pad", False))}


def llava_next(files: ProcessorFiles) -> Settings:
    """Return the numbers of LLaVA-NeXT."""
    default = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    points = given(files.image, "image_grid_pinpoints", default)
    return {**clip_numbers(files), "image_grid_pinpoints": [list(point) for point in points]}


def idefics3(files: ProcessorFiles) -> Settings:
    """Return the numbers of Idefics 3 and SmolVLM."""
    size = given(files.image, "size", {"longest_edge": 4 * 364})
    largest = given(files.image, "max_image_size", {"longest_edge": 364})
    token = files.token("image_token", "<image>")
    return {
        **common(files, LANCZOS, HALVES, HALVES),
        "longest_edge": whole(files, "size.longest_edge", size.get("longest_edge")),
        "max_image_size": whole(files, "max_image_size.longest_edge", largest.get("longest_edge")),
        "do_image_splitting": bool(given(files.image, "do_image_splitting", True)),
        "image_seq_len": sequence(files, "image_seq_len", 169),
        "tokens": {
            "marker": token,
            "placeholder": token,
            "fake": files.token("fake_image_token", "<fake_token_around_image>"),
            "global": files.token("global_image_token", "<global-img>"),
        },
    }


def sequence(files: ProcessorFiles, name: str, default: Any) -> int:
    """Return a number of the processor's own file."""
    return whole(files, name, given(files.processor, name, default))


QWEN = FamilyRecord(
    ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL"), qwen, frozenset({"min_pixels", "max_pixels"})
)
PIXTRAL = FamilyRecord(("Pixtral",), pixtral, frozenset({"longest_edge"}))
IDEFICS3 = FamilyRecord(
    ("Idefics3", "SmolVLM"), idefics3, frozenset({"do_image_splitting", "longest_edge"})
)
FAMILIES = {
    "qwen2_vl": QWEN,
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "internvl": FamilyRecord(
        ("GotOcr2",), internvl, frozenset({"crop_to_patches", "min_patches", "max_patches"})
    ),
    "gemma3": FamilyRecord(
        ("Gemma3",),
        gemma3,
        frozenset(
            {
                "do_pan_and_scan",
                "pan_and_scan_min_crop_size",
                "pan_and_scan_max_num_crops",
                "pan_and_scan_min_ratio_to_activate",
            }
        ),
    ),
    "mistral3": PIXTRAL,
    "pixtral": PIXTRAL,
    "llava": FamilyRecord(("Llava", "CLIP"), llava, frozenset({"do_pad"})),
    "llava_next": FamilyRecord(("LlavaNext",), llava_next),
    "idefics3": IDEFICS3,
    "smolvlm": IDEFICS3,
}
OTHER_TYPES = {"qwen3_vl_moe": "qwen3_vl"}  # model types that are prepared like another
