"""Gemma 3: the whole picture as a square, and crops of a long one if pan and scan is on."""

import math

from PIL import Image

from headrace.dataprep.images.picture import Prepared
from headrace.dataprep.images.resizing import Size, cut, resize
from headrace.schemas.vision.processor_record import Processor


class Gemma3Family:
    """Each square fills the same number of tokens, between a token before and one after."""

    def __init__(self, processor: Processor) -> None:
        settings, tokens = processor.settings, processor.tokens
        size = settings["size"]
        assert isinstance(size, dict)
        self.size: Size = (int(str(size["width"])), int(str(size["height"])))
        numbers = {k: v for k, v in settings.items() if isinstance(v, int | float)}
        self.scans = bool(settings["do_pan_and_scan"])
        self.least_crop = int(numbers["pan_and_scan_min_crop_size"])
        self.most_crops = int(numbers["pan_and_scan_max_num_crops"])
        self.least_ratio = numbers["pan_and_scan_min_ratio_to_activate"]
        self.resample = int(numbers["resample"])
        self.square_tokens = int(numbers["image_seq_length"])
        inner = tokens["placeholder"] * self.square_tokens
        self.square = f"\n\n{tokens['start']}{inner}{tokens['end']}\n\n"

    def prepare(self, image: Image.Image) -> Prepared:
        """Return the whole picture, and after it its crops."""
        crop = self.crop_size(image.size) if self.scans else None
        crops = [] if crop is None else list(cut(image, crop))
        tiles = [resize(part, self.size, self.resample) for part in (image, *crops)]
        text = self.square
        if crops:
            text = (
                f"Here is the original image {self.square} and here are some crops to help you "
                f"see better {' '.join([self.square] * len(crops))}"
            )
        return Prepared(tiles, text, self.square_tokens * len(tiles))

    def crop_size(self, size: Size) -> Size | None:
        """Return the size of crops along the longer side; None where there are none."""
        width, height = size
        long, short = max(size), min(size)
        if long / short < self.least_ratio:
            return None
        count = min(long // self.least_crop, math.floor(long / short + 0.5))
        count = min(self.most_crops, max(2, count))
        part = math.ceil(long / count)
        if min(part, short) < self.least_crop:
            return None
        return (part, height) if width >= height else (width, part)
