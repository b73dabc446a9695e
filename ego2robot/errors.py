"""Errors a person can act on: one line with the file, the cause and the next step.

Anything else that is raised is a bug and shows its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake or a missing thing that the user can mend; the command stops with exit code 2."""


class VideoError(Exception):
    """One video (or one span of it) cannot be used; the run goes on without it.

    Args:
        name: the video as the user knows it, such as ``a/b.mp4`` or ``x.tar::key.mp4``.
        cause: what is wrong, such as ``no video stream (audio only)``.
        hint: the next step, such as ``re-download the file``.
        kind: the class it is counted under in ``quarantine/``: ``missing``, ``empty``,
            ``not_a_video``, ``no_video_stream``, ``truncated``, ``corrupt``, ``unsupported``,
            ``too_short``, ``metadata``, ``denied``, ``io``, ``crash``, ``timeout``, ``duplicate``.
    """

    def __init__(self, name: str, cause: str, hint: str = "", kind: str = "corrupt") -> None:
        self.name, self.cause, self.hint, self.kind = name, cause, hint, kind
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.name}: {self.cause}" + (f"; {self.hint}" if self.hint else "")
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)  # a name may hold a newline

    def __reduce__(self) -> tuple[type[VideoError], tuple[str, str, str, str]]:
        return VideoError, (self.name, self.cause, self.hint, self.kind)
