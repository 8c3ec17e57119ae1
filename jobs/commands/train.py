"""The commands on training runs."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from headrace.jobs.commands.machine import count_processes
from headrace.jobs.commands.nodes import SECRET_VARIABLE, TIMEOUT_SECONDS, Nodes
from headrace.jobs.commands.options import ConfigFile, Overrides, program_name
from headrace.schemas.errors import ConfigError
from headrace.schemas.process_limits import allow_open_files

PORT = 29500  # of the first machine, where several are to find it

if TYPE_CHECKING:
    from headrace.jobs.first_run.machine import Fit, Machine

app = typer.Typer()


@app.command(epilog="Example: headrace init models/smollm2-135m notes/ chats.jsonl --output mine")
def init(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model directory.")],
    data: Annotated[
        list[Path], typer.Argument(metavar="DATA...", help="Files, and folders of files.")
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for both configs, the shards and the run.")
    ] = Path("mine"),
    sequence_len: Annotated[
        int | None, typer.Option(min=8, help="Tokens of a row. Default: 2048; 512 without GPUs.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over configs that exist.")] = False,
) -> None:
    """Look at a model, your files and this machine, and write prepare.toml and train.toml."""
    from rich.console import Console

    from headrace.dataprep.dry_run import estimate
    from headrace.jobs.first_run.init import Forecasts, Wanted, init

    wanted = Wanted(model, tuple(data), output, force, sequence_len, program_name())
    console = Console(markup=False, emoji=False, highlight=False)
    init(wanted, console, Forecasts(estimate, fit_by_plans))


def fit_by_plans(values: dict[str, Any], sequence_len: int, machine: "Machine") -> "Fit":
    """Return the keys with which a run fits a machine, by the trainer's own plans."""
    from headrace.jobs.first_run.fit import Planner, fit
    from headrace.trainer.building.self_check import plan_model
    from headrace.trainer.planning.proposals import plans, propose
    from headrace.trainer.planning.run_plan import plan_run
    from headrace.trainer.planning.tiny_trials import TinyTrials

    planner = Planner(plan_model, plan_run, propose, plans, TinyTrials)
    return fit(planner, values, sequence_len, machine)


@app.command(epilog="Example: headrace train train.toml --gpus 2 --set optimizer.lr=1e-4")
def train(
    context: typer.Context,
    config: ConfigFile,
    gpus: Annotated[
        int | None,
        typer.Option(min=1, help="Processes. Default: all GPUs; without any, one replica's."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last save.")] = False,
    data_changed: Annotated[
        Literal["refuse", "continue"],
        typer.Option(help="On --resume with other datasets, weights, epochs or max_steps."),
    ] = "refuse",
    overrides: Overrides = None,
    master_port: Annotated[
        int | None,
        typer.Option(min=1, max=65534, help="Default: a free port; 29500 with several nodes."),
    ] = None,
    nodes: Annotated[
        int, typer.Option(min=1, help="Machines; start this command once on each of them.")
    ] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="Which of them this one is.")] = 0,
    master: Annotated[
        str | None, typer.Option(metavar="HOST", help="Name or address of node 0.")
    ] = None,
    node_timeout: Annotated[
        float, typer.Option(min=5, help="Seconds of silence after which a node is given up.")
    ] = TIMEOUT_SECONDS,
) -> None:
    """Fine-tune on shards, over the GPUs of one machine or several, or as processes on CPUs.

    SIGTERM, SIGHUP, SIGQUIT or Ctrl-C saves after the current step and exits with 0.
    """
    from headrace.jobs.commands.launch import launch
    from headrace.schemas.toml_config import load_config
    from headrace.schemas.train.train_config import TrainConfig
    from headrace.trainer.checkpoint.resume_record import check_run_directory
    from headrace.trainer.preflight import check

    check_libraries()
    settings = load_config(TrainConfig, config, overrides or [])
    if (master is None) == (nodes > 1):
        raise ConfigError("--nodes and --master go together; give both or neither")
    allow_open_files()
    shares = (settings.sequence_parallel, settings.tensor_parallel)
    processes = count_processes(gpus, settings.pipeline_stages, nodes, *shares)
    inputs = check(settings, processes * nodes)
    check_run_directory(settings, inputs, resume, data_changed == "continue")
    machines = None
    if master:
        secret = secret_of(f"{inputs.data_fingerprint} {inputs.weights_fingerprint}")
        machines = Nodes(nodes, node_rank, master, master_port or PORT, node_timeout, secret)
    arguments = ["--config", str(config), "--data-changed", data_changed]
    arguments += ["--resume"] if resume else []
    arguments += ["--debug"] if context.obj else []
    arguments += [f"--set={override}" for override in overrides or []]
    raise typer.Exit(launch("headrace.trainer.main", arguments, processes, master_port, machines))


def secret_of(prints: str) -> str:
    """Return what machines prove to each other with: what was set, or what they all have read."""
    return os.environ.get(SECRET_VARIABLE) or prints


def check_libraries() -> None:
    """Raise the error of a missing import here, before ranks are started that would miss it."""
    for name in ("torch", "deepspeed", "transformers", "peft"):
        if find_spec(name) is None:
            raise ModuleNotFoundError(name=name)


@app.command(epilog="Example: headrace plan train.toml --gpus 4 --memory 24GiB")
def plan(
    config: ConfigFile,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs to plan for. Default: one replica's.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory of each, such as 24GiB: what makes it fit, and the best."),
    ] = None,
    sequence_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row. Default: the first dataset's.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Predict memory, work and efficiency of each stage, without GPUs or weights."""
    from headrace.schemas.toml_config import load_config
    from headrace.schemas.train.train_config import TrainConfig
    from headrace.trainer.quiet import quiet_libraries

    settings = load_config(TrainConfig, config, overrides or [])
    quiet_libraries()
    from headrace.trainer.building.self_check import plan_model
    from headrace.trainer.planning.plan_report import parse_size, report
    from headrace.trainer.planning.proposals import proposals
    from headrace.trainer.planning.remedies import remedies
    from headrace.trainer.planning.run_plan import plan_run
    from headrace.trainer.planning.tiny_trials import TinyTrials

    limit = parse_size(memory) if memory else None
    count = gpus or settings.replica_ranks
    run = plan_run(settings, plan_model(settings), count, sequence_len)
    tried = TinyTrials(run)
    print(report(run, limit, remedies(run, count, limit, tried) if limit else ()))
    if limit and gpus:
        print(f"\n{proposals(run, gpus, limit, tried)}")


@app.command(epilog="Example: headrace checkpoints runs/demo")
def checkpoints(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory: `output_dir`.")],
) -> None:
    """List a run's checkpoints and check their hashes; non-zero exit if one is damaged."""
    from headrace.jobs.commands.list_checkpoints import list_checkpoints

    raise typer.Exit(0 if list_checkpoints(run) else 1)


@app.command(epilog="Example: headrace report runs/demo --watch 30")
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory: `output_dir`.")],
    output: Annotated[
        Path | None, typer.Option(metavar="HTML", help="Default: report.html in the run.")
    ] = None,
    watch: Annotated[
        int | None,
        typer.Option(min=1, metavar="SECONDS", help="Write it anew while the run trains."),
    ] = None,
) -> None:
    """Write one HTML page of a run: losses, speed, memory, waits, mixture, config."""
    from headrace.jobs.report import page

    for path in page.watch(run, output, watch) if watch else [page.write_report(run, output)]:
        print(f"{path}: written", flush=True)


@app.command(
    name="plan-data", epilog="Example: headrace plan-data train.toml --gpus 8 --plot mixture.png"
)
def plan_data(
    config: ConfigFile,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Processes to plan for. Default: one replica's.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the mixture over the steps.")
    ] = None,
    steps: Annotated[
        Path | None, typer.Option(metavar="JSONL", help="Write a line for each step.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Show what each step of a training run will see: sources, fill, epochs, memory."""
    from rich.console import Console

    from headrace.jobs.commands.plan_data import plan_data
    from headrace.schemas.toml_config import load_config
    from headrace.schemas.train.train_config import TrainConfig

    settings = load_config(TrainConfig, config, overrides or [])
    plan_data(
        settings, gpus or settings.replica_ranks, Console(markup=False, emoji=False), plot, steps
    )
