"""A function in a process of its own, for readers that a damaged file can crash or hang."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ego2robot.errors import VideoError


class Aside:
    """Calls a function in a child, one call at a time; a call that crashes or hangs costs itself alone.

    The child starts with the first call, and again after it died. A context manager that ends it.

    Args:
        function: of a module, so that the child finds it; its first argument is the file's name for messages.
        timeout_s: of one call.
    """

    def __init__(self, function: Callable[..., Any], timeout_s: float) -> None:
        self._function, self._timeout_s = function, timeout_s
        self._child: Any = None
        self._connection: Connection | None = None

    def __call__(self, name: str, *more: Any) -> Any:
        """What the function returns.

        Raises:
            VideoError: that the function raised, or of kind ``crash`` or ``timeout``.
        """
        connection = self._connection or self._start()
        try:
            connection.send((name, *more))
            if not connection.poll(self._timeout_s):
                self._end()
                cause = f"reading it took more than {self._timeout_s:g} s"
                raise VideoError(name, cause, "re-download the file", "timeout")
            value = connection.recv()
        except (EOFError, OSError):
            self._end()
            raise VideoError(name, "its reader crashed", "re-download the file", "crash") from None
        if isinstance(value, VideoError):
            raise value
        return value

    def __enter__(self) -> Aside:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _start(self) -> Connection:
        # Not forked: this process may have threads.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(theirs, self._function), daemon=True)
        self._child.start()
        theirs.close()
        return self._connection

    def _end(self) -> None:
        if self._connection:
            self._connection.close()
            self._child.kill()
            self._child.join()
        self._connection = self._child = None


def _serve(connection: Connection, function: Callable[..., Any]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # some libraries talk
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            arguments = connection.recv()
            try:
                connection.send(function(*arguments))
            except VideoError as error:
                connection.send(error)
