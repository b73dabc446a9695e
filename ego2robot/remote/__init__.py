"""Bytes that lie elsewhere: anything that fsspec opens, read in ranges, through a bounded cache on disk."""

from ego2robot.remote.address import is_remote, shown
from ego2robot.remote.errors import RemoteError
from ego2robot.remote.objects import RangedFile, RemoteObject, configure

__all__ = ["RangedFile", "RemoteError", "RemoteObject", "configure", "is_remote", "shown"]
