"""The GPUs of a machine, and what of it would make NCCL hang or fail, found before it starts."""

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from headrace.schemas.errors import ConfigError

logger = logging.getLogger(__name__)

DRIVER = Path("/proc/driver/nvidia/gpus")
MODEL = re.compile(r"^Model:\s*(.+)$", re.MULTILINE)
# cards whose driver offers peer-to-peer transfers that do not work
WITHOUT_PEERS = re.compile(r"GeForce RTX 40[0-9]{2}\b")
NO_PEERS = {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
SHARED_MEMORY = Path("/dev/shm")
GPU_DRIVER_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
LEAST_SHARED = 256 << 20  # bytes; a container has 64 MiB unless it is told otherwise


def prepare_transfers(
    processes: int, environment: Mapping[str, str], cards: Sequence[str]
) -> dict[str, str]:
    """Return the variables that ranks on these cards need beside those that are set.

    What is set or missing is said in one line each.
    """
    if processes < 2 or not cards:
        return {}
    if problem := shared_memory_problem(SHARED_MEMORY, environment):
        logger.warning("%s", problem)
    settings = transfer_settings(cards, environment)
    if settings:
        shown = " ".join(f"{key}={value}" for key, value in settings.items())
        logger.info("%s: no peer-to-peer transfers; set %s", cards[0], shown)
    return settings


def card_names(driver: Path = DRIVER) -> list[str]:
    """Return the names of the machine's NVIDIA cards, as the driver tells them."""
    texts = [path.read_text(errors="replace") for path in sorted(driver.glob("*/information"))]
    return [found[1].strip() for text in texts if (found := MODEL.search(text))]


def transfer_settings(cards: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return what keeps NCCL from transfers that these cards lack; the user's own settings stay."""
    if not any(WITHOUT_PEERS.search(card) for card in cards):
        return {}
    return {key: value for key, value in NO_PEERS.items() if key not in environment}


def file_system_bytes(folder: Path) -> int:
    """Return the size of the file system that a folder lies on."""
    size = os.statvfs(folder)
    return size.f_blocks * size.f_frsize


def shared_memory_problem(
    folder: Path,
    environment: Mapping[str, str],
    size: Callable[[Path], int] = file_system_bytes,
) -> str | None:
    """Return what to do about shared memory that is too small for NCCL, if it is."""
    if environment.get("NCCL_SHM_DISABLE") == "1" or not folder.is_dir():
        return None
    total = size(folder)
    if total >= LEAST_SHARED:
        return None
    return (
        f"{folder} holds {total >> 20} MiB, which NCCL may find too little: start the container "
        "with --shm-size=1g, or set NCCL_SHM_DISABLE=1"
    )


def count_processes(
    gpus: int | None,
    pipeline_stages: int,
    nodes: int = 1,
    sequence_parallel: int = 1,
    tensor_parallel: int = 1,
) -> int:
    """Return the number of ranks to start here, checked against the layout and the GPUs here."""
    available = count_gpus()
    replica = pipeline_stages * sequence_parallel * tensor_parallel
    cut = f"pipeline_stages = {pipeline_stages}"
    if sequence_parallel > 1:
        cut += f" times sequence_parallel = {sequence_parallel}"
    if tensor_parallel > 1:
        cut += f" times tensor_parallel = {tensor_parallel}"
    processes = gpus or available or -(-replica // nodes)
    if available and processes > available:
        raise ConfigError(f"--gpus {processes}: this machine has {available}; ask for fewer")
    if processes * nodes % replica:
        if nodes > 1:
            raise ConfigError(
                f"{cut} does not divide the {processes * nodes} processes of {nodes} nodes; "
                "use another --gpus or pipeline_stages"
            )
        fitting = max(processes // replica, 1) * replica
        raise ConfigError(
            f"{cut} does not divide the {processes} processes; "
            f"use --gpus {fitting} or another pipeline_stages"
        )
    return processes


def count_gpus(driver_files: Sequence[str] = GPU_DRIVER_FILES) -> int:
    """GPUs that torch can use. Without a driver torch, which takes seconds, is not loaded."""
    found = [path for path in driver_files if os.path.exists(path)]  # noqa: PTH110
    if not found:
        return 0
    from headrace.trainer.devices import count_accelerators, torch_build

    count = count_accelerators()
    if not count:
        logger.warning(
            "%s is there, but %s sees no GPU, so the processors would train; install a build for "
            "this driver's version, or a newer driver",
            found[0],
            torch_build(),
        )
    return count
