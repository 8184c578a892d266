"""What this machine's processor does to products of integers."""

import functools
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LARGEST = 255  # of unsigned codes
SATURATES = 2**15 - 1


@dataclass(frozen=True)
class Processor:
    """What decides how fast, and how exactly, 8-bit codes are multiplied.

    Attributes:
        vnni: pairs of products are summed in 32 bits; else x86 sums them in 16 bits, which saturates.
        avx2: kernels of integers need it on x86.
    """

    vnni: bool
    avx2: bool


@functools.cache
def this_processor() -> Processor:
    """The processor of this machine."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = _flags() if x86 else set()
    vnni = bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8"})
    return Processor(vnni=vnni or not x86, avx2="avx2" in flags or not x86)


def processor_name() -> str:
    """What the processor is called, and what it has for products of integers."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name} ({'with' if this_processor().vnni else 'without'} VNNI)"


def _flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        line = next((line for line in path.read_text().splitlines() if line.startswith("flags")), "")
        return set(line.partition(":")[2].split())
    import torch  # elsewhere than on Linux

    capability = torch.backends.cpu.get_cpu_capability()
    return {"avx2"} if capability in ("AVX2", "AVX512") else set()


def overflows(rows: np.ndarray, most: int = LARGEST) -> bool:
    """Whether signed codes can overflow a 16-bit sum of two products: a proof from the weights themselves.

    Args:
        rows: codes of a weight (K, O), int8; neighbours along K are summed.
        most: the largest code of an activation.
    """
    if len(rows) % 2:
        rows = np.concatenate([rows, np.zeros_like(rows[:1])])
    pairs = rows.reshape(-1, 2, rows.shape[1]).astype(np.int32)
    high, low = pairs.clip(min=0).sum(1).max(initial=0), pairs.clip(max=0).sum(1).min(initial=0)
    return bool(most * high > SATURATES or most * low < -SATURATES - 1)
