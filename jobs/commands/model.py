"""The commands on models, adapters and old configs."""

from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from headrace.schemas.errors import ConfigError, install_hint

if TYPE_CHECKING:
    from headrace.trainer.export.sample import Sampling

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


def answer_pictures(
    model: Path,
    adapter: Path | None,
    prompt: str,
    images: list[Path],
    chat: bool,
    system: str | None,
    sampling: "Sampling",
    compare: bool,
) -> None:
    """Print a vision-language model's answer to a prompt with pictures."""
    from headrace.jobs.commands.chat_prompt import chat_prompt
    from headrace.jobs.commands.picture_prompt import picture_prompt
    from headrace.jobs.commands.picture_sampler import PictureSampler

    render = chat_prompt(model) if chat else None
    text, tiles = picture_prompt(model, prompt, images, render, system)
    sampler = PictureSampler(model, adapter)
    if compare:
        plain = sampler.answer_pictures(text, tiles, sampling, adapter=False)
        print(f"without adapter: {plain}")
        print(f"with adapter:    {sampler.answer_pictures(text, tiles, sampling)}")
    else:
        print(sampler.answer_pictures(text, tiles, sampling))


@app.command(epilog='Example: headrace sample models/merged "def parse(" --max-new-tokens 60')
def sample(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model directory.")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text to continue, or a user's turn.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter to apply.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer without the adapter as well.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Take the prompt for a user's turn: chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System text before it.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Picture for `<image>` in the prompt, or before it; once for each."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--input", metavar="JSONL", help="Lines with `prompt` or `messages`."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="JSONL", help="The same lines, answered; run again, it goes on."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Lines answered at once.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="For a temperature above 0.")] = 0,
) -> None:
    """Continue a prompt with a model, or answer a file of them."""
    from headrace.jobs.commands.chat_prompt import chat_prompt
    from headrace.trainer.export.sample import Sampler, Sampling, as_messages

    if (prompt is None) == (source is None) or (source is None) != (output is None):
        raise ConfigError("give either a PROMPT, or --input and --output")
    if compare and adapter is None:
        raise ConfigError("--compare needs an --adapter to leave out")
    sampling = Sampling(max_new_tokens, temperature, seed)
    if image:
        if prompt is None:
            raise ConfigError("--image goes with a PROMPT; leave --input out")
        answer_pictures(model, adapter, prompt, image, chat, system, sampling, compare)
        return
    sampler = Sampler(model, adapter, chat_prompt(model))
    if source is not None and output is not None:
        from headrace.jobs.console.progress import tracked
        from headrace.trainer.export.sample_file import sample_file

        count = sample_file(
            sampler,
            source,
            output,
            sampling,
            chat=chat,
            system=system,
            compare=compare,
            batch_size=batch_size,
            progress=tracked,
        )
        print(f"{output}: {count} lines answered")
        return
    assert prompt is not None
    asked = as_messages(prompt, system) if chat else prompt
    if compare:
        print(f"without adapter: {sampler.answer([asked], sampling, adapter=False)[0]}")
        print(f"with adapter:    {sampler.answer([asked], sampling)[0]}")
    else:
        print(sampler.answer([asked], sampling)[0])


@app.command(epilog="Example: headrace serve runs/demo --port 8000")
def serve(
    result: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run directory, or a model directory.")
    ],
    adapter: Annotated[Path | None, typer.Option(help="Adapter to apply to a model.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; another one lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
) -> None:
    """Answer OpenAI's chat API with a result, to try it; with and without its adapter by name."""
    for module in ("starlette", "uvicorn"):
        if find_spec(module) is None:
            raise ConfigError(f"{module} is not installed; {install_hint('serve')}")
    from headrace.jobs.commands.chat_prompt import chat_prompt
    from headrace.jobs.serve.run import parts_of, serve
    from headrace.trainer.export.sample import Sampler

    parts = parts_of(result, adapter)
    sampler = Sampler(parts.model, parts.adapter, chat_prompt(parts.model))
    serve(parts, sampler, host, port)


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
