"""`run_state.json` in a checkpoint: where training and loader stand, and the files with it."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from headrace.schemas.errors import CheckpointError
from headrace.schemas.fingerprint import file_sha256, fingerprint
from headrace.schemas.publish import write_atomic

RUN_STATE_NAME = "run_state.json"
RUN_STATE_VERSION = 1


class RunState(BaseModel):
    """All there is to resume from, beside the tensors.

    Row order, initial adapter and dropout are pure functions of the seed and the position, so
    `seed`, `step`, `next_row` and `waiting` are the whole random state.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["headrace-checkpoint"] = "headrace-checkpoint"
    format_version: int = RUN_STATE_VERSION
    step: int
    next_row: int
    waiting: list[int] = []  # rows before it that a packing loader has still to place
    seed: int
    tokens: int
    seconds: float
    overlong_rows: int = 0
    overlong_tokens: int = 0
    global_batch_rows: int
    stages: int
    replicas: int
    config_fingerprint: str
    data_fingerprint: str
    files: dict[str, str]  # name -> SHA-256


def write_run_state(directory: Path, state: RunState) -> None:
    """Write the state of a checkpoint that is complete otherwise."""
    body = state.model_dump(mode="json")
    body["sha256"] = fingerprint(body)
    write_atomic(directory / RUN_STATE_NAME, json.dumps(body, indent=1) + "\n")


def read_run_state(directory: Path, *, check_files: bool = True) -> RunState:
    """Read and check a checkpoint's state and, unless told otherwise, the hashes of its files.

    Raises:
        CheckpointError: damaged, incomplete, or of another version.
    """
    path = directory / RUN_STATE_NAME
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        checksum = body.pop("sha256", None)
        version = body.get("format_version")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); remove this checkpoint") from None
    if version != RUN_STATE_VERSION:
        raise CheckpointError(f"{path}: version {version}, this release reads {RUN_STATE_VERSION}")
    if checksum != fingerprint(body):
        raise CheckpointError(f"{path}: edited or damaged; remove this checkpoint")
    try:
        state = RunState.model_validate(body)
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: {error.errors()[0]['msg']}; remove this checkpoint"
        ) from None
    for name, expected in state.files.items() if check_files else ():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(
                f"{file}: missing; remove this checkpoint to resume from an older one"
            )
        if file_sha256(file) != expected:
            raise CheckpointError(
                f"{file}: damaged; remove this checkpoint to resume from an older one"
            )
    return state
