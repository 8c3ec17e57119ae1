"""The commands on models, adapters and old configs."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer()


@app.command(
    epilog="Example: headrace merge --model models/smollm2-135m --adapter runs/demo/adapter "
    "--output models/merged"
)
def merge(
    model: Annotated[Path, typer.Option(help="Base model directory.")],
    adapter: Annotated[Path, typer.Option(help="Adapter directory, in PEFT's format.")],
    output: Annotated[Path, typer.Option(help="Model directory to write.")],
    scale: Annotated[
        float, typer.Option(min=-2, max=2, help="Factor of the change; -1 takes it away again.")
    ] = 1.0,
    device: Annotated[
        str, typer.Option(help="Where the sums are formed, as in cuda. One layer is there at once.")
    ] = "cpu",
    pickled: Annotated[
        bool,
        typer.Option("--pickled", help="Read pytorch_model.bin, by torch's unpickler of tensors."),
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run the code in the base model's directory."),
    ] = False,
) -> None:
    """Merge an adapter into its base model, one layer at a time."""
    from headrace.jobs.console.progress import tracked
    from headrace.trainer.architecture.model_files import PickledDirectory
    from headrace.trainer.export.merge import merge

    if trust_remote_code:
        from headrace.trainer.families.remote_code import run_code_of

        run_code_of(model)
    base = PickledDirectory(model) if pickled else model
    count = merge(base, adapter, output, scale, device, tracked)
    print(f"{output}: written, {count} weights changed")


class Scheme(StrEnum):
    """Formats of compressed-tensors that `quantize` writes."""

    FP8 = "fp8"
    FP8_BLOCK = "fp8-block"
    INT8 = "int8"
    INT4 = "int4"
    NVFP4 = "nvfp4"
    MXFP4 = "mxfp4"


@app.command(
    epilog="Example: headrace quantize models/merged --format fp8 --output models/merged-fp8"
)
def quantize(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Directory of whole weights.")],
    output: Annotated[Path, typer.Option(help="Model directory to write.")],
    scheme: Annotated[
        Scheme,
        typer.Option(
            "--format",
            help="fp8: scales by row, activations by token; fp8-block: by blocks of 128. int8: the "
            "same as fp8 in integers. int4, nvfp4, mxfp4: weights alone, in groups of inputs.",
        ),
    ] = Scheme.FP8,
    device: Annotated[
        str, typer.Option(help="Where weights are rounded, as in cuda. One is there at once.")
    ] = "cpu",
) -> None:
    """Write a model's linear layers in fewer bits, as vLLM and transformers load them."""
    from headrace.jobs.console.progress import tracked
    from headrace.trainer.export.quantize import describe, quantize

    result = quantize(model, output, scheme.value, device, tracked)
    print(f"{output}: written, {describe(result)}")


@app.command(epilog="Example: headrace convert runs/demo --step 200 --output models/step-200")
def convert(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory: `output_dir`.")],
    output: Annotated[Path, typer.Option(help="Directory to write.")],
    step: Annotated[
        int | None, typer.Option(min=1, help="Of the checkpoint. Default: the newest.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Base model directory, if it is elsewhere now.")
    ] = None,
) -> None:
    """Make an adapter or a model of a checkpoint, without GPUs."""
    from headrace.trainer.quiet import quiet_libraries

    quiet_libraries()
    from headrace.jobs.console.progress import tracked
    from headrace.trainer.export.convert import convert

    checkpoint = convert(run, output, step, model, tracked)
    print(f"{output}: written from {checkpoint}")


@app.command(epilog="Example: headrace control-report runs/demo/adapter --plot control.png")
def control_report(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Directory of control adapters.")
    ],
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw norms and effective rank.")
    ] = None,
) -> None:
    """Show norms, orthogonality, effective rank and condition of control adapters by layer."""
    from rich.console import Console

    from headrace.jobs.commands.control_report import control_report

    control_report(adapter, Console(markup=False, emoji=False), plot)


@app.command(
    epilog="Example: headrace control-to-lora --model models/command-r --adapter runs/demo/adapter "
    "--output adapters/demo"
)
def control_to_lora(
    model: Annotated[Path, typer.Option(help="Base model directory.")],
    adapter: Annotated[Path, typer.Option(help="Directory of control adapters.")],
    output: Annotated[Path, typer.Option(help="Adapter directory to write, in PEFT's format.")],
    inverse: Annotated[bool, typer.Option("--inverse", help="That of class -1.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write it even where it is not the same.")
    ] = False,
) -> None:
    """Turn control adapters into a LoRA, where that is exact: models of parallel blocks."""
    from headrace.jobs.console.progress import tracked
    from headrace.trainer.export.control_lora import control_to_lora
    from headrace.trainer.quiet import quiet_libraries

    quiet_libraries()
    error = control_to_lora(model, adapter, output, inverse=inverse, force=force, progress=tracked)
    print(f"{output}: written; it misses {error:.2g} of what the control adapters change")


@app.command(epilog="Example: headrace export-gguf models/merged --output merged.gguf --type q8_0")
def export_gguf(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Model directory; an adapter's base model.")
    ],
    output: Annotated[Path, typer.Option(help="File to write.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Write only this adapter, to be used over the base model.")
    ] = None,
    type: Annotated[  # noqa: A002
        Literal["f32", "f16", "bf16", "q8_0"], typer.Option(help="Type of the matrices.")
    ] = "bf16",
    pre: Annotated[
        str | None,
        typer.Option(help="llama.cpp's name of the pre-tokenizer, where it is not recognized."),
    ] = None,
) -> None:
    """Write a model, or an adapter, as a GGUF file for llama.cpp."""
    from headrace.jobs.console.progress import tracked
    from headrace.trainer.export.gguf_export import export_gguf

    count = export_gguf(model, output, type, adapter, pre, tracked)
    print(f"{output}: {count} tensors")


@app.command(epilog="Example: headrace push runs/demo me/my-adapter --dry-run")
def push(
    result: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run directory, or the directory of a result.")
    ],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="As in me/my-adapter.")],
    part: Annotated[
        Literal["adapter", "model", "checkpoint"] | None,
        typer.Option(help="Default: the model or adapter that the run made."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made if need be.")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload with Headrace",
    public: Annotated[
        bool, typer.Option("--public", help="A new repository is private without it.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files only.")] = False,
) -> None:
    """Upload a result or the newest checkpoint to the Hugging Face hub, in one commit."""
    from rich.filesize import decimal

    from headrace.jobs.commands.push import choose
    from headrace.jobs.commands.push import push as upload

    chosen = choose(result, part)
    for name, size in chosen.files.items():
        print(f"{chosen.prefix + '/' if chosen.prefix else ''}{name}: {decimal(size)}")
    if dry_run:
        print(f"{decimal(chosen.size)} for {repository}; nothing was uploaded")
    else:
        print(upload(chosen, repository, revision, message, public=public))


@app.command(
    name="import-config",
    epilog="Example: headrace import-config examples/config_7b.toml --output .",
)
def import_config(
    old: Annotated[
        Path,
        typer.Argument(
            metavar="OLD",
            help="TOML of qlora-pipe or qlora-pipe-lite, YAML of Axolotl, LLaMA-Factory or TRL, a "
            "Python script for TRL or Unsloth, or one with the commands of jllm or fsdp_qlora.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Where the configs are written.")] = Path(),
) -> None:
    """Turn the config of another system into prepare.toml and train.toml."""
    from headrace.jobs.migration.import_config import import_config

    for line in import_config(old, output):
        print(line)
