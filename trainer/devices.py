"""The accelerator of this process: all that depends on whose it is stands here.

Everything else asks by a `torch.device`. The functions are those of torch's module for the device
(`torch.cuda` for NVIDIA's and AMD's), so that another maker's needs a line in `COLLECTIVES` and
whatever its backend of torch lacks. A CPU has neither streams nor events, and copies at once.
"""

import contextlib
import datetime
import mmap
import weakref
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CPU = "cpu"
# accelerators that a run takes, and the library by which their processes talk. Run so far: cuda
COLLECTIVES = {"cuda": "nccl", "xpu": "xccl", "npu": "hccl", CPU: "gloo"}
PLANNED = torch.device("cuda")  # what `headrace plan` plans for, on any machine


def compute_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the type of frozen weights and of the computation, as config key `dtype` has it."""
    if wanted == "auto":
        return torch.bfloat16 if is_accelerator(device) else torch.float32
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def device_type() -> str:
    """Return the type of this machine's accelerator; that of the CPU without one."""
    found = torch.accelerator.current_accelerator()
    if found is None or found.type not in COLLECTIVES:
        return CPU
    return found.type if torch.get_device_module(found).is_available() else CPU


def is_accelerator(device: torch.device | str) -> bool:
    """Return whether a device has memory and streams of its own."""
    return torch.device(device).type not in (CPU, "meta")


def torch_build() -> str:
    """Return PyTorch's version and what it was built for."""
    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    target = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPUs alone"
    return f"PyTorch {torch.__version__} (built for {target})"


def count_accelerators() -> int:
    """Return how many accelerators this machine has."""
    kind = device_type()
    return 0 if kind == CPU else int(torch.get_device_module(kind).device_count())


def take_device(local_rank: int) -> torch.device:
    """Return the device of a process by its number on this machine, and make it the current one."""
    kind = device_type()
    if kind == CPU:
        return torch.device(CPU)
    device = torch.device(kind, local_rank)
    torch.get_device_module(device).set_device(device)
    return device


def new_stream(device: torch.device) -> Any:
    """Return a stream beside the current one; None on CPU."""
    return torch.get_device_module(device).Stream(device) if is_accelerator(device) else None


def current_stream(device: torch.device) -> Any:
    """Return the stream that an accelerator computes on."""
    return torch.get_device_module(device).current_stream(device)


def on_stream(stream: Any) -> AbstractContextManager[Any]:
    """Return the context in which work is queued on a stream; None is the current one."""
    if stream is None:
        return contextlib.nullcontext()
    context: AbstractContextManager[Any] = torch.get_device_module(stream.device).stream(stream)
    return context


def record_event(device: torch.device, *, timed: bool = False) -> Any:
    """Return an event of the current stream at this moment; None on CPU."""
    if not is_accelerator(device):
        return None
    event = torch.get_device_module(device).Event(enable_timing=timed)
    event.record()
    return event


def synchronize(device: torch.device) -> None:
    """Wait for all that was queued."""
    if is_accelerator(device):
        torch.get_device_module(device).synchronize(device)


def peak_memory() -> int | None:
    """Return the most bytes allocated so far on this process's accelerator; None on CPU."""
    kind = device_type()
    return None if kind == CPU else int(torch.get_device_module(kind).max_memory_allocated())


def limit_memory(device: torch.device, limit: int) -> None:
    """Let this process take at most so many bytes of an accelerator, for trials of smaller ones."""
    if is_accelerator(device):
        module = torch.get_device_module(device)
        total = int(module.get_device_properties(device).total_memory)
        module.set_per_process_memory_fraction(min(1.0, limit / total), device)


def free_unused(device: torch.device) -> None:
    """Give memory that holds nothing back to the device."""
    if is_accelerator(device):
        torch.get_device_module(device).empty_cache()


def device_name(device: torch.device | None = None) -> str:
    """Return the product name of an accelerator, by default this process's."""
    kind = device_type() if device is None else device.type
    return CPU if kind == CPU else str(torch.get_device_module(kind).get_device_name(device))


def smallest_memory() -> tuple[int, str]:
    """Return the bytes and the name of the accelerator that has the least memory here."""
    module = torch.get_device_module(device_type())
    found = [module.get_device_properties(index) for index in range(count_accelerators())]
    smallest = min(found, key=lambda one: int(one.total_memory))
    return int(smallest.total_memory), str(smallest.name)


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Return what generation of GPU a device is, as NVIDIA counts; None for others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def pin(tensor: Tensor) -> Tensor:
    """Return a tensor in memory that an accelerator reads from while the process goes on."""
    return tensor if device_type() == CPU else tensor.pin_memory()


def registered_memory(size: int, device: torch.device) -> Tensor:
    """[size] bytes of host memory that a device copies from without waiting.

    Pages of its own, given back unregistered: memory of malloc shares pages with others and comes
    back at the same address, which CUDA refuses to register twice (seen). torch's own pinned
    memory comes in powers of two.
    """
    if device.type != "cuda":
        return torch.empty(size, dtype=torch.uint8, pin_memory=is_accelerator(device))
    cudart = torch.cuda.cudart()
    pages = mmap.mmap(-1, size)
    host = torch.frombuffer(pages, dtype=torch.uint8)
    torch.cuda.check_error(cudart.cudaHostRegister(host.data_ptr(), size, 0))
    weakref.finalize(host, cudart.cudaHostUnregister, host.data_ptr())
    return host


def group_options(kind: str, timeout: datetime.timedelta, ctas: int | None = None) -> Any:
    """Return the options of a process group; None where its library has none of ours.

    Args:
        ctas: how many multiprocessors a transfer may use; None leaves it to the library.
    """
    if COLLECTIVES[kind] != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    if ctas is not None:
        options.config.max_ctas = ctas
    return options
