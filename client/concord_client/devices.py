"""Which device trains, in which precision; and the two settings of a training process that cost nothing."""

import ctypes
import math
import sys

import torch

from concord_shared.errors import UsageError

__all__ = [
    "OWN_THREADS",
    "autocast_dtype",
    "choose_device",
    "describe_device",
    "is_out_of_memory",
    "prepare_process",
    "room_for_rows",
    "spread_device",
]

OWN_THREADS = torch.get_num_threads()
"""Torch's choice for this process, before anyone else's."""
GLIBC_TRIM_THRESHOLD, GLIBC_TOP_PAD, GLIBC_MMAP_THRESHOLD = -1, -2, -3


def choose_device(wanted: str = "auto") -> torch.device:
    """cuda, mps or cpu: the first that this machine has, or the one that was asked for.

    Raises:
        UsageError: the wanted device is not there.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available.get(wanted.partition(":")[0]):
        here = ", ".join(name for name, there in available.items() if there)
        raise UsageError(f"device {wanted!r} is not available to this torch {torch.__version__}; here: {here}")
    return torch.device(wanted)


def spread_device(wanted: str, place: int) -> str:
    """For the worker of this place: the GPUs that there are in turn, where any or a CUDA one was asked for."""
    count = torch.cuda.device_count() if wanted in ("auto", "cuda") else 0
    return f"cuda:{place % count}" if count > 1 else wanted


def room_for_rows(device: torch.device) -> float:
    """Bytes of a GPU's memory that rows may take: a quarter of what is free, as an epoch is a copy of them in its
    order. Elsewhere no limit: they stay where they are.
    """
    return torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else math.inf


def describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision, or None for float32. `auto` asks the hardware for fast bfloat16.

    Raises:
        UsageError: bf16 was asked for and the device cannot do it.
    """
    if precision == "fp32":
        return None
    if precision == "fp16":
        return torch.float16
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if precision == "bf16" and device.type == "mps":
        raise UsageError('training.precision = "bf16" is not available on mps; use "auto" or "fp32"')
    return torch.bfloat16 if fast or precision == "bf16" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Libraries say in many ways that memory is out."""
    text = str(error).lower()
    words = ("out of memory", "not enough memory", "allocate", "failed to map")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in text for word in words)


def prepare_process(threads: int | None) -> None:
    """Settings of a process that trains; before the first tensor of size, and again where the threads change.

    threads: intra-op threads, None for torch's own choice. glibc is told to keep freed memory: by default it
    gives the buffers of each step back to the kernel and faults every page in again, a fifth to a third of a
    small model's step.
    """
    torch.set_num_threads(threads or OWN_THREADS)
    if sys.platform == "linux":
        try:
            mallopt = ctypes.CDLL("libc.so.6").mallopt
        except (OSError, AttributeError):  # another C library: only slower
            return
        mallopt(GLIBC_MMAP_THRESHOLD, 1 << 30)
        mallopt(GLIBC_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(GLIBC_TOP_PAD, 1 << 26)
