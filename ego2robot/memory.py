"""How the C library keeps memory, for work that takes and frees large arrays all the time."""

from __future__ import annotations

import ctypes
import platform


def return_large_blocks(least: int = 1 << 22) -> None:
    """Has glibc give freed blocks of so many bytes back to the system at once; elsewhere does nothing.

    Otherwise the limit rises with what was freed, up to 32 MiB, and blocks below it stay in arenas that
    fragment: clustering 100,000 vectors held 0.7 GiB more (mallopt(3), M_MMAP_THRESHOLD).
    """
    if platform.libc_ver()[0] == "glibc":
        m_mmap_threshold, m_arena_max = -3, -8
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, least)
        libc.mallopt(m_arena_max, 2)
