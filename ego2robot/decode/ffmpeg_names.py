"""Lets other packages use the FFmpeg that PyAV's wheel brings.

The wheel's libraries are renamed (``libavutil-5809ad29.so.60…``), so that a library that needs
``libavutil.so.60`` does not find them, though they are loaded. Each usual name is given to an empty
library of ours that only says that it needs the renamed one: the loader then finds both.
"""

from __future__ import annotations

import ctypes
import re
import struct
import tempfile
from pathlib import Path

import av

_LIBRARY = re.compile(r"(lib(?:av|sw)[a-z]+)-[0-9a-f]+\.so\.(\d+)\.")
_ELF64_LITTLE_ENDIAN = b"\x7fELF\x02\x01"


def share_pyav_ffmpeg() -> bool:
    """Gives PyAV's FFmpeg its usual names within this process; False where it cannot be done.

    Only for Linux wheels of PyAV; a PyAV built here uses the system's FFmpeg anyway.
    """
    names = {}
    for path in sorted((Path(av.__file__).parents[1] / "av.libs").glob("lib*.so.*")):
        if match := _LIBRARY.match(path.name):
            names[f"{match[1]}.so.{match[2]}"] = path
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name, path in names.items():
                with path.open("rb") as file:
                    header = file.read(64)
                if not header.startswith(_ELF64_LITTLE_ENDIAN):
                    return False
                alias = Path(folder) / name
                alias.write_bytes(_alias(name, path.name, header))
                ctypes.CDLL(str(alias))
    except OSError:  # no such loader, or a folder from which nothing may be loaded
        return False
    return bool(names)


def _alias(name: str, needed: str, header: bytes) -> bytes:
    """A shared library without code: its name, and one that it needs (ELF-64, System V gABI ch. 4, 5).

    Args:
        header: the ELF header of a library for this machine, for its machine and flags.
    """
    machine, flags = struct.unpack_from("<H", header, 18)[0], struct.unpack_from("<I", header, 48)[0]
    strings = b"\0" + name.encode() + b"\0" + needed.encode() + b"\0"
    dynamic_at = 64 + 3 * 56  # after the header and three program headers
    symbols_at = dynamic_at + 7 * 16
    strings_at = symbols_at + 24  # after the one symbol that must be there, undefined
    size = strings_at + len(strings)
    dynamic = {  # DT_…
        1: 2 + len(name),  # NEEDED
        14: 1,  # SONAME
        5: strings_at,  # STRTAB
        6: symbols_at,  # SYMTAB
        10: len(strings),  # STRSZ
        11: 24,  # SYMENT
        0: 0,  # NULL
    }
    elf = struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, flags, 64, 56, 3, 64, 0, 0)
    programs = (  # type, flags (4 read, 2 write), offset, address, length, alignment
        (1, 6, 0, size, 0x10000),  # PT_LOAD, all of it
        (2, 6, dynamic_at, len(dynamic) * 16, 8),  # PT_DYNAMIC
        (0x6474E551, 6, 0, 0, 16),  # PT_GNU_STACK: no executable stack
    )
    return b"".join(
        (
            header[:16],
            elf,
            *(struct.pack("<IIQQQQQQ", kind, rw, at, at, at, n, n, to) for kind, rw, at, n, to in programs),
            *(struct.pack("<QQ", tag, value) for tag, value in dynamic.items()),
            bytes(24),
            strings,
        )
    )
