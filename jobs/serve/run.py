"""Parts of a run or model directory that are served, and the server itself."""

from pathlib import Path
from typing import Any, NamedTuple

import uvicorn

from headrace.jobs.serve.answers import Answerer
from headrace.jobs.serve.app import LOCAL, Served, build_app
from headrace.schemas.errors import ConfigError
from headrace.schemas.json_text import read_json_object
from headrace.schemas.train.run_state import RUN_CONFIG_NAME
from headrace.trainer.export.sample import Sampler


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


def serve(parts: Parts, sampler: Sampler, host: str, port: int) -> None:
    """Answer requests until a signal ends it."""
    names = {parts.name: parts.adapter is not None}
    names.setdefault(parts.model.resolve().name, False)
    answerer = Answerer(sampler, sampler.positions)
    hosts = None if host in LOCAL else ["*"]
    print(f"http://{host}:{port}/v1 answers as {', '.join(names)}", flush=True)
    uvicorn.run(
        build_app(Served(answerer, names), hosts), host=host, port=port, log_level="warning"
    )
