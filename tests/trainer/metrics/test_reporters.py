"""wandb and mlflow get the curves too, without a network, and go on with the same run."""

import json
from dataclasses import replace

import pytest
from step_metrics import STEP

from headrace.schemas.errors import ConfigError
from headrace.schemas.train.train_config import TrainConfig
from headrace.trainer import preflight
from headrace.trainer.metrics.log import MetricsLog
from headrace.trainer.metrics.reporters import open_reporters


def config(directory, *services):
    return TrainConfig.model_validate(
        {
            "model": "m",
            "output_dir": str(directory / "run"),
            "datasets": [{"path": "d"}],
            "optimizer": {"lr": 1e-4},
            "reporting": {"to": list(services), "project": "trial"},
        }
    )


def log_steps(settings, directory, resume_point, *steps):
    values = settings.model_dump(mode="json")
    reporters = open_reporters(settings.reporting, values, directory)
    log = MetricsLog(directory, resume_point, reporters)
    for step in steps:
        log.write(replace(STEP, step=step, loss=float(step)))
    log.close()


@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_every_step_in_one_run_over_a_resume(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    settings, directory = config(tmp_path, "mlflow"), tmp_path / "run"
    directory.mkdir()
    log_steps(settings, directory, -1, 1, 2)
    log_steps(settings, directory, 2, 3)
    run = json.loads((directory / "reporting.json").read_text())["mlflow"]
    history = MlflowClient().get_metric_history(run, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert MlflowClient().get_run(run).data.params["output_dir"] == json.dumps(settings.output_dir)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_a_run_on_disk_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    directory = tmp_path / "run"
    directory.mkdir()
    log_steps(config(tmp_path, "wandb"), directory, -1, 1, 2)
    files = list((directory / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 0
    assert json.loads((directory / "reporting.json").read_text())["wandb"] in files[0].name


def test_nobody_is_called_unless_asked(tmp_path):
    assert open_reporters(config(tmp_path).reporting, {}, tmp_path) == []
    assert not (tmp_path / "reporting.json").exists()


def test_a_missing_service_is_named_with_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"names wandb; run: pip install 'wandb>=0\.19'"):
        preflight.check_reporting(config(tmp_path, "wandb"))
