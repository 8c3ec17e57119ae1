"""wandb and mlflow: what TensorBoard gets goes there as well, if the config asks for it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from headrace.schemas.publish import write_atomic
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer.metrics.answers_log import (
    COLUMNS,
    PromptedAnswer,
    as_markdown,
    cells_of,
)

RECORD = "reporting.json"  # in the run directory: service -> id, so that a resumed run goes on


class Reporter(Protocol):
    """Takes named numbers of a step."""

    id: str

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def log_answers(self, answers: Sequence[PromptedAnswer], step: int) -> None: ...

    def close(self) -> None: ...


def open_reporters(config: TrainConfig, run_directory: Path) -> list[Reporter]:
    """The services that the config names, continued where the run directory knows them."""
    if not config.reporting.to:
        return []
    path = run_directory / RECORD
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    reporters: dict[str, Reporter] = {}
    for name in config.reporting.to:
        kind = WandbReporter if name == "wandb" else MlflowReporter
        reporters[name] = kind(config, run_directory, known.get(name))
    ids = {name: reporter.id for name, reporter in reporters.items()}
    write_atomic(path, json.dumps(known | ids) + "\n")
    return list(reporters.values())


def run_name(config: TrainConfig) -> str:
    return config.reporting.name or Path(config.output_dir).name


class WandbReporter:
    """A run of wandb; `WANDB_MODE=offline` keeps it on disk."""

    def __init__(self, config: TrainConfig, run_directory: Path, known: str | None) -> None:
        import wandb

        self.run: Any = wandb.init(
            project=config.reporting.project,
            name=run_name(config),
            id=known,
            resume="allow" if known else None,
            dir=str(run_directory),
            config=config.model_dump(mode="json"),
        )
        self.id: str = self.run.id

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def log_answers(self, answers: Sequence[PromptedAnswer], step: int) -> None:
        import wandb

        table = wandb.Table(columns=list(COLUMNS), data=cells_of(answers))
        self.run.log({"evaluation/answers": table}, step=step)

    def close(self) -> None:
        self.run.finish()


class MlflowReporter:
    """A run of mlflow, at the address in `MLFLOW_TRACKING_URI`."""

    def __init__(self, config: TrainConfig, run_directory: Path, known: str | None) -> None:
        from mlflow import MlflowClient

        self.client: Any = MlflowClient()
        self.id = known or self._create(config)

    def _create(self, config: TrainConfig) -> str:
        project = config.reporting.project
        found = self.client.get_experiment_by_name(project)
        number = found.experiment_id if found else self.client.create_experiment(project)
        run = self.client.create_run(number, run_name=run_name(config))
        for key, value in config.model_dump(mode="json").items():
            self.client.log_param(run.info.run_id, key, json.dumps(value)[:6000])
        return str(run.info.run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.id, name, value, step=step)

    def log_answers(self, answers: Sequence[PromptedAnswer], step: int) -> None:
        self.client.log_text(self.id, as_markdown(answers), f"answers/step-{step:06d}.md")

    def close(self) -> None:
        self.client.set_terminated(self.id)
