"""InternVL: a grid of square tiles that is nearest to the picture's shape, and the whole small."""

from PIL import Image

from headrace.dataprep.images.picture import Prepared
from headrace.dataprep.images.resizing import Size, cut, resize
from headrace.schemas.vision.processor_record import Processor


class InternVlFamily:
    """Each tile fills the same number of tokens."""

    def __init__(self, processor: Processor) -> None:
        settings, self.tokens = processor.settings, processor.tokens
        size = settings["size"]
        assert isinstance(size, dict)
        self.tile: Size = (int(str(size["width"])), int(str(size["height"])))
        numbers = {k: v for k, v in settings.items() if isinstance(v, int)}
        self.cuts = bool(settings["crop_to_patches"]) and numbers["max_patches"] > 1
        self.least, self.most = numbers["min_patches"], numbers["max_patches"]
        self.tile_tokens, self.resample = numbers["image_seq_length"], numbers["resample"]

    def prepare(self, image: Image.Image) -> Prepared:
        """Return the tiles, and last the whole picture in the size of one."""
        columns, rows = self.grid(image.size)
        tiles = []
        if columns * rows > 1:
            size = self.tile[0] * columns, self.tile[1] * rows
            tiles = list(cut(resize(image, size, self.resample), self.tile))
        tiles.append(resize(image, self.tile, self.resample))
        count = self.tile_tokens * len(tiles)
        inner = self.tokens["placeholder"] * count
        return Prepared(tiles, f"{self.tokens['start']}{inner}{self.tokens['end']}", count)

    def grid(self, size: Size) -> tuple[int, int]:
        """Return the columns and rows of the grid that is nearest in shape; of equally near ones
        the largest that is not more than twice the picture.
        """
        if not self.cuts:
            return 1, 1
        width, height = size
        sides = range(1, self.most + 1)
        grids = [(c, r) for c in sides for r in sides if self.least <= c * r <= self.most]
        best, nearest = (1, 1), float("inf")
        for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            distance = abs(width / height - columns / rows)
            covered = self.tile[0] * self.tile[1] * columns * rows
            larger = distance == nearest and width * height > 0.5 * covered
            if distance < nearest or larger:
                best, nearest = (columns, rows), distance
        return best
