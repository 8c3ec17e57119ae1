"""Benchmarks of a result by lm-eval, EleutherAI's harness; read against 0.4.13."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from headrace.schemas.errors import ConfigError, install_hint
from headrace.schemas.json_text import read_json_object
from headrace.schemas.publish import write_atomic, writing
from headrace.schemas.train.run_state import RUN_CONFIG_NAME

app = typer.Typer()

LIBRARY = "lm_eval"
ADAPTER_CONFIG = "adapter_config.json"


class Result(NamedTuple):
    """A model directory, and an adapter over it or None."""

    model: str
    adapter: Path | None


@app.command(
    name="lm-eval",
    epilog="Example: headrace lm-eval runs/demo --tasks hellaswag,arc_easy --limit 100",
)
def benchmark(
    result: Annotated[
        Path,
        typer.Argument(metavar="RESULT", help="Run directory, or that of an adapter or a model."),
    ],
    tasks: Annotated[str, typer.Option(help="Names of tasks, with commas between them.")],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Examples of each task. Default: all.")
    ] = None,
    few_shot: Annotated[
        int | None, typer.Option(min=0, help="Examples in each prompt. Default: the task's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests run together.")] = 8,
    chat: Annotated[
        bool, typer.Option("--chat", help="Write prompts by the model's chat template.")
    ] = False,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder with further tasks, as lm-eval's YAML.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="As in cuda:0. Default: a GPU if there is one.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File for all values. Default: lm-eval.json in RESULT.")
    ] = None,
) -> None:
    """Run lm-eval's tasks on what a run has made, and print their table."""
    check_library()
    found = result_of(result)

    import lm_eval
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    values: dict[str, Any] | None = lm_eval.simple_evaluate(
        model="hf",
        model_args=arguments_of(found),
        tasks=[name.strip() for name in tasks.split(",") if name.strip()],
        num_fewshot=few_shot,
        batch_size=batch_size,
        device=device,
        limit=limit,
        apply_chat_template=chat,
        log_samples=False,
        task_manager=TaskManager(include_path=task_folder),
    )
    assert values is not None, "this is the first rank"
    path = output or result / "lm-eval.json"
    text = json.dumps(values["results"], indent=2, default=str)
    with writing(path, "give another --output"):
        write_atomic(path, text + "\n")
    print(make_table(values))
    print(f"{path}: written")


def check_library() -> None:
    """Check that lm-eval is installed.

    Raises:
        ConfigError: with the command that installs it.
    """
    if find_spec(LIBRARY) is None:
        raise ConfigError(f"lm-eval is not installed; {install_hint('benchmark')}")


def result_of(directory: Path) -> Result:
    """Return the model and the adapter that a directory names.

    Raises:
        ConfigError: it holds neither a result nor a model, or a model that writes no text.
    """
    from headrace.trainer.architecture.config_limits import refuse_scored

    if (directory / RUN_CONFIG_NAME).is_file():
        made = [path for name in ("model", "adapter") if (path := directory / name).is_dir()]
        if not made:
            raise ConfigError(f"{directory}: neither adapter/ nor model/; has the run ended?")
        directory = made[0]
    if (directory / ADAPTER_CONFIG).is_file():
        refuse_scored(directory, ADAPTER_CONFIG)
        base = read_json_object(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
        return Result(str(base), directory)
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{directory}: no run, adapter in PEFT's format, or model directory")
    refuse_scored(directory)
    return Result(str(directory), None)


def arguments_of(result: Result) -> dict[str, str | int | float]:
    """Return how lm-eval loads a result: no code of it is run."""
    arguments: dict[str, str | int | float] = {"pretrained": result.model, "dtype": "auto"}
    if result.adapter is not None:
        arguments["peft"] = str(result.adapter)
    return arguments
