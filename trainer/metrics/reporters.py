"""wandb and mlflow: what TensorBoard gets goes there as well, if the config asks for it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from headrace.schemas.publish import write_atomic
from headrace.schemas.train.run_config import ReportingConfig
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


def open_reporters(
    reporting: ReportingConfig, settings: Mapping[str, Any], run_directory: Path
) -> list[Reporter]:
    """Open the services that a config names, continued where the run directory knows them.

    Args:
        settings: of the run, which the services show beside the curves.
    """
    if not reporting.to:
        return []
    path = run_directory / RECORD
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    reporters: dict[str, Reporter] = {}
    for name in reporting.to:
        kind = WandbReporter if name == "wandb" else MlflowReporter
        reporters[name] = kind(reporting, settings, run_directory, known.get(name))
    ids = {name: reporter.id for name, reporter in reporters.items()}
    write_atomic(path, json.dumps(known | ids) + "\n")
    return list(reporters.values())


class WandbReporter:
    """A run of wandb; `WANDB_MODE=offline` keeps it on disk."""

    def __init__(
        self,
        reporting: ReportingConfig,
        settings: Mapping[str, Any],
        run_directory: Path,
        known: str | None,
    ) -> None:
        import wandb

        self.run: Any = wandb.init(
            project=reporting.project,
            name=reporting.name or run_directory.name,
            id=known,
            resume="allow" if known else None,
            dir=str(run_directory),
            config=dict(settings),
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

    def __init__(
        self,
        reporting: ReportingConfig,
        settings: Mapping[str, Any],
        run_directory: Path,
        known: str | None,
    ) -> None:
        from mlflow import MlflowClient

        self.client: Any = MlflowClient()
        name = reporting.name or run_directory.name
        self.id = known or self._create(reporting.project, name, settings)

    def _create(self, project: str, name: str, settings: Mapping[str, Any]) -> str:
        found = self.client.get_experiment_by_name(project)
        number = found.experiment_id if found else self.client.create_experiment(project)
        run = self.client.create_run(number, run_name=name)
        for key, value in settings.items():
            self.client.log_param(run.info.run_id, key, json.dumps(value)[:6000])
        return str(run.info.run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.client.log_metric(self.id, name, value, step=step)

    def log_answers(self, answers: Sequence[PromptedAnswer], step: int) -> None:
        self.client.log_text(self.id, as_markdown(answers), f"answers/step-{step:06d}.md")

    def close(self) -> None:
        self.client.set_terminated(self.id)
