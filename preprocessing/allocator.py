"""Keeping large buffers between batches: a network on the CPU need not fetch the same memory for each of them."""

import ctypes
import platform

# Names and numbers of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4

_LARGEST_INT = 2**31 - 1
_TOP_PAD_BYTES = 64 << 20


def keep_large_buffers() -> bool:
    """Make malloc keep freed large buffers for the next batch; has its effect from this call on.

    glibc maps a large buffer anew at each allocation and gives it back at each free. Every layer of a network
    allocates its output, tens of MB in a batch of tiles, and the kernel then fills it with zeros, page by page, as it
    is written: a large part of the time on a CPU (`docs/experiments.md`). So: no buffer is mapped by itself (the limit
    on their size, M_MMAP_THRESHOLD, goes up to 32 MiB only in some versions of glibc), and the heap is not cut at its
    end when buffers are freed. The price is that the process keeps the memory of its largest batch.

    Returns:
        True if the allocator took the settings; False where it is not glibc's.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST_INT), (_M_TOP_PAD, _TOP_PAD_BYTES))
    taken = [libc.mallopt(name, value) == 1 for name, value in settings]
    return all(taken)
