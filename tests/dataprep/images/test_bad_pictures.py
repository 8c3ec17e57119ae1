"""Files that are no pictures, or none that can be taken: each refuses its row alone."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import draw, encoded, noise
from PIL import Image

from headrace.dataprep.images.opening import open_picture
from headrace.dataprep.shards.verify import verify
from headrace.schemas.prepare.images_config import ImagesConfig

LIMITS = {"max_pixels": 40_000, "max_bytes": 60_000, "max_ratio": 50}
GOOD = encoded(draw((40, 40), ("red", "circle")))


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png_of(width, height):
    """The header of a PNG that says it is very large, over a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def frames(kind):
    target = io.BytesIO()
    some = [draw((20, 20), (color, "circle")) for color in ("red", "green")]
    some[0].save(target, kind, save_all=True, append_images=some[1:])
    return target.getvalue()


def broken_png():
    """A PNG whose pixels do not unpack."""
    header = struct.pack(">IIBBBBB", 40, 40, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", b"\x78\x9cgarbage") + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


CONTENTS = {  # what lies in the file, and the reason
    "empty": (lambda: b"", "empty picture"),
    "truncated JPEG": (lambda: encoded(noise((90, 90)), "JPEG")[:2000], "damaged picture"),
    "truncated PNG": (lambda: encoded(noise((90, 90)))[:9000], "damaged picture"),
    "broken pixels": (broken_png, "damaged picture"),
    "a header alone": (lambda: GOOD[:12], "no picture"),
    "text": (lambda: b"not a picture at all", "no picture"),
    "SVG": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'></svg>", "no picture"),
    "HTML of a 404": (lambda: b"<!DOCTYPE html><html>404</html>", "no picture"),
    "PDF": (lambda: b"%PDF-1.7\n", "no picture"),
    "PostScript, which runs": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", "no picture"),
    "a pointer of Git LFS": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "no picture",
    ),
    "a decompression bomb": (lambda: png_of(60_000, 60_000), "too many pixels"),
    "more pixels than allowed": (lambda: encoded(Image.new("RGB", (300, 300))), "too many pixels"),
    "a larger file than allowed": (
        lambda: encoded(noise((190, 190)), "BMP"),
        "picture too large",
    ),
    "an absurd shape": (lambda: encoded(noise((600, 2))), "picture of an absurd shape"),
    "a moving GIF": (lambda: frames("GIF"), "several frames"),
    "a moving WebP": (lambda: frames("WEBP"), "several frames"),
    "pages of a TIFF": (lambda: frames("TIFF"), "several frames"),
    "floats": (
        lambda: encoded(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"),
        "pixels of 32 bits",
    ),
}


def make_fifo(path):
    os.mkfifo(path)


def link_out(path):
    outside = path.resolve().parents[1] / "outside.png"
    outside.write_bytes(GOOD)
    path.symlink_to(outside)


PLACES = {  # what lies at the path, what the row says, and the reason
    "missing": (None, "bad.png", "missing picture"),
    "a folder": (Path.mkdir, "bad.png", "no regular file"),
    "a FIFO": (make_fifo, "bad.png", "no regular file"),
    "a link that leaves the folder": (link_out, "bad.png", "path escapes the folder"),
    "a path out of the folder": (None, "../rows.jsonl", "path escapes the folder"),
    "an absolute path": (None, "/etc/hostname", "path escapes the folder"),
    "a NUL": (None, "a\0b.png", "no picture"),
    "an address that is not allowed": (None, "http://127.0.0.1:9/a.png", "address not allowed"),
    "a file URL": (None, "file:///etc/hostname", "address not allowed"),
    "a damaged data URI": (None, "data:image/png;base64,@@@", "damaged data URI"),
    "no name": (None, "", "no picture"),
}


def check_refused(name, reason, config, run, write_rows):
    asked = [{"user": ["<image> What?", name]}, {"assistant": "a red circle"}]
    good = [{"user": ["<image> What?", "good.png"]}, {"assistant": "a red circle"}]
    Path("pictures/good.png").write_bytes(GOOD)
    write_rows([good, asked, good])
    manifest = run(config(shards=1, images=LIMITS))
    (reject,) = map(json.loads, Path("out/rejects/rejects.jsonl").read_text().splitlines())
    assert (reject["line"], reject["reason"], reject["pictures"]) == (2, reason, 1)
    shown = Path(name).name if name and not name.startswith("data:") and "\0" not in name else ""
    assert shown in reject["detail"]
    ledger = manifest.images.ledger
    assert ledger.pictures_out == {"train": 2, "evaluation": 0}
    assert ledger.pictures_dropped == {f"refused: {reason}": 1}
    assert ledger.pictures_in == 3
    assert verify(Path("out")) == []


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_bad_file_refuses_its_row_alone(kind, config, run, write_rows):
    content, reason = CONTENTS[kind]
    Path("pictures/bad.png").write_bytes(content())
    check_refused("bad.png", reason, config, run, write_rows)


@pytest.mark.parametrize("kind", PLACES)
def test_a_bad_path_refuses_its_row_alone(kind, config, run, write_rows):
    place, name, reason = PLACES[kind]
    if place is not None:
        place(Path("pictures/bad.png"))
    check_refused(name, reason, config, run, write_rows)


def test_a_path_without_a_folder_is_refused(config, run, write_rows):
    write_rows(
        [[{"user": ["<image>", "0.png"]}, {"assistant": "x"}], [{"user": "a"}, {"assistant": "b"}]]
    )
    run(config(shards=1, images={"folder": None}))
    (reject,) = map(json.loads, Path("out/rejects/rejects.jsonl").read_text().splitlines())
    assert reject["reason"] == "path without a folder"


CONFIG = ImagesConfig(model="unused")
RED = [220, 30, 30]


def opened(image, kind="PNG", **options):
    return np.asarray(open_picture(encoded(image, kind, **options), CONFIG))


def test_modes_that_are_no_rgb_become_it():
    red = Image.new("RGB", (4, 4), tuple(RED))
    assert opened(red.quantize(4))[0, 0].tolist() == RED
    assert opened(Image.new("L", (4, 4), 77))[0, 0].tolist() == [77, 77, 77]
    assert opened(Image.new("1", (4, 4), 1))[0, 0].tolist() == [255, 255, 255]
    cmyk = opened(red.convert("CMYK"), "JPEG", quality=100)[0, 0]
    assert np.abs(cmyk.astype(int) - RED).max() <= 3


def test_transparent_parts_lie_on_white():
    image = Image.new("RGBA", (4, 4), (*RED, 0))
    image.putpixel((0, 0), (*RED, 255))
    found = opened(image)
    assert found[0, 0].tolist() == RED
    assert found[1, 1].tolist() == [255, 255, 255]
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([*RED, 0, 0, 0])
    assert opened(palette, transparency=0)[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bits_keep_the_higher_eight():
    values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)
    assert opened(Image.fromarray(values))[0, :, 0].tolist() == [0, 0, 1, 0x80, 0xFF]


def test_the_cameras_orientation_is_followed():
    image = draw((30, 20), ("red", "square"), ("blue", "square"))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = opened(image, exif=exif)
    assert turned.shape == (30, 20, 3)
    assert np.array_equal(turned, np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_all_that_pillow_draws_is_read_alike():
    image = draw((30, 20), ("red", "square"))
    for kind in ("PNG", "BMP", "TIFF", "PPM", "GIF"):
        assert np.array_equal(opened(image, kind), np.asarray(image)), kind
    assert np.array_equal(opened(image, "WEBP", lossless=True), np.asarray(image))


def test_random_damage_never_stops_a_run():
    """Bytes changed anywhere give a picture or a refusal."""
    from headrace.dataprep.images.picture import PictureError

    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        good = np.frombuffer(encoded(noise((24, 24)), kind), np.uint8)
        for _ in range(60):
            bad = good.copy()
            places = generator.integers(0, len(bad), 4)
            bad[places] = generator.integers(0, 256, 4)
            try:
                open_picture(bad.tobytes(), CONFIG)
            except PictureError:
                continue
