"""The commands that answer with a result: `headrace sample` and `headrace serve`."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from headrace.schemas.errors import ConfigError, install_hint
from headrace.schemas.json_text import read_json_object
from headrace.schemas.train.run_state import RUN_CONFIG_NAME

if TYPE_CHECKING:
    from headrace.trainer.export.sample import Sampling

app = typer.Typer()


@dataclass(frozen=True)
class Sampled:
    """Options of `headrace sample` that all its ways share."""

    model: Path
    adapter: Path | None
    chat: bool
    system: str | None
    compare: bool
    sampling: "Sampling"


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
    from headrace.trainer.export.sample import Sampling

    if compare and adapter is None:
        raise ConfigError("--compare needs an --adapter to leave out")
    sampling = Sampling(max_new_tokens, temperature, seed)
    asked = Sampled(model, adapter, chat, system, compare, sampling)
    if prompt is not None and source is None and output is None:
        answers = picture_answers(asked, prompt, image) if image else text_answers(asked, prompt)
        names = ["without adapter: ", "with adapter:    "] if compare else [""]
        for name, answer in zip(names, answers, strict=True):
            print(f"{name}{answer}")
    elif prompt is None and source is not None and output is not None:
        if image:
            raise ConfigError("--image goes with a PROMPT; leave --input out")
        print(f"{output}: {answer_file(asked, source, output, batch_size)} lines answered")
    else:
        raise ConfigError("give either a PROMPT, or --input and --output")


def text_answers(asked: Sampled, prompt: str) -> list[str]:
    """Return the answer to a prompt; to compare, behind that of the model without its adapter."""
    from headrace.jobs.serve.chat_prompt import chat_prompt
    from headrace.trainer.export.sample import Sampler, as_messages

    sampler = Sampler(asked.model, asked.adapter, chat_prompt(asked.model))
    turn = as_messages(prompt, asked.system) if asked.chat else prompt
    return [
        sampler.answer([turn], asked.sampling, adapter=adapter)[0]
        for adapter in ([False, True] if asked.compare else [True])
    ]


def picture_answers(asked: Sampled, prompt: str, images: list[Path]) -> list[str]:
    """Return the same of a vision-language model, for a prompt with pictures."""
    from headrace.jobs.serve.chat_prompt import chat_prompt
    from headrace.jobs.serve.picture_prompt import picture_prompt
    from headrace.jobs.serve.picture_sampler import PictureSampler

    render = chat_prompt(asked.model) if asked.chat else None
    text, tiles = picture_prompt(asked.model, prompt, images, render, asked.system)
    sampler = PictureSampler(asked.model, asked.adapter)
    return [
        sampler.answer_pictures(text, tiles, asked.sampling, adapter=adapter)
        for adapter in ([False, True] if asked.compare else [True])
    ]


def answer_file(asked: Sampled, source: Path, output: Path, batch_size: int) -> int:
    """Answer the lines of a file; returns how many."""
    from headrace.jobs.console.progress import tracked
    from headrace.jobs.serve.chat_prompt import chat_prompt
    from headrace.trainer.export.sample import Sampler
    from headrace.trainer.export.sample_file import sample_file

    return sample_file(
        Sampler(asked.model, asked.adapter, chat_prompt(asked.model)),
        source,
        output,
        asked.sampling,
        chat=asked.chat,
        system=asked.system,
        compare=asked.compare,
        batch_size=batch_size,
        progress=tracked,
    )


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
    import uvicorn

    from headrace.jobs.serve.answers import Answerer
    from headrace.jobs.serve.app import LOCAL, Served, build_app
    from headrace.jobs.serve.chat_prompt import chat_prompt
    from headrace.trainer.export.sample import Sampler

    parts = parts_of(result, adapter)
    sampler = Sampler(parts.model, parts.adapter, chat_prompt(parts.model))
    names = {parts.name: parts.adapter is not None}
    names.setdefault(parts.model.resolve().name, False)
    served = Served(Answerer(sampler, sampler.positions), names)
    hosts = None if host in LOCAL else ["*"]
    print(f"http://{host}:{port}/v1 answers as {', '.join(names)}", flush=True)
    uvicorn.run(build_app(served, hosts), host=host, port=port, log_level="warning")


class Parts(NamedTuple):
    """A model directory, an adapter over it or None, and the name it goes by."""

    model: Path
    adapter: Path | None
    name: str


def parts_of(result: Path, adapter: Path | None) -> Parts:
    """Return what a run has made, or the model that a directory holds.

    Raises:
        ConfigError: neither is there.
    """
    name = result.resolve().name
    if not (result / RUN_CONFIG_NAME).is_file():
        return Parts(result, adapter, adapter.resolve().name if adapter else name)
    if (result / "model").is_dir():
        return Parts(result / "model", adapter, name)
    found = adapter or result / "adapter"
    if not found.is_dir():
        raise ConfigError(f"{result}: neither adapter/ nor model/; has the run come to its end?")
    config: dict[str, Any] = read_json_object(result / RUN_CONFIG_NAME)["config"]
    return Parts(Path(config["model"]), found, name)
