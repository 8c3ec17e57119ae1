"""The rule of each vision family, by the names that `schemas.vision` gives them."""

from collections.abc import Callable, Mapping

from headrace.dataprep.images.gemma3 import Gemma3Family
from headrace.dataprep.images.idefics3 import Idefics3Family
from headrace.dataprep.images.internvl import InternVlFamily
from headrace.dataprep.images.llava import LlavaFamily, LlavaNextFamily
from headrace.dataprep.images.picture import Family
from headrace.dataprep.images.pixtral import PixtralFamily
from headrace.dataprep.images.qwen_vl import QwenFamily
from headrace.schemas.vision.processor_record import Processor

RULES: Mapping[str, Callable[[Processor], Family]] = {
    "qwen2_vl": QwenFamily,
    "qwen2_5_vl": QwenFamily,
    "qwen3_vl": QwenFamily,
    "internvl": InternVlFamily,
    "gemma3": Gemma3Family,
    "mistral3": PixtralFamily,
    "pixtral": PixtralFamily,
    "llava": LlavaFamily,
    "llava_next": LlavaNextFamily,
    "idefics3": Idefics3Family,
    "smolvlm": Idefics3Family,
}


def family_rule(processor: Processor) -> Family:
    """Return the rule of a processor's family."""
    return RULES[processor.family](processor)
