"""Project Aria's recordings (VRS), read by Meta's ``projectaria-tools`` (extra ``aria``).

Only the RGB camera is used. Its times are the device's own clock, nanoseconds. The first generation's
camera is mounted sideways: its pictures are turned clockwise, and the calibration given here is that of
the turned, upright pictures.

What was cut off the end of a file is not missed by that package, so it is looked for here: the header and
the index say how long a file should be (github.com/facebookresearch/vrs, FileFormat.h, IndexRecord.h).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from ego2robot.blobs import open_blob
from ego2robot.decode.aside import Aside
from ego2robot.errors import VideoError
from ego2robot.fisheye624 import CLOCKWISE, Fisheye624, camera_of, describe
from ego2robot.types import Blob

CODEC = "vrs"
PACKAGE = "projectaria-tools"
MAGIC = b"VisionRe"
RGB = "camera-rgb"
HEADER = struct.Struct("<8sQIIqqq")
RECORD = struct.Struct("<IIiIdHBBI")
INFO_BYTES, SIZE_AT = 19, 8  # of an entry of the index, and where in it the size of its record stands
COMPRESSION = {1: "lz4", 2: "zstd"}
TIMEOUT_S = 120.0  # to open one recording; its index is read
REDO = "re-download the file"
# What the package raises of damaged files: its own errors, texts that are no UTF-8, sizes beyond reason.
DAMAGE = (RuntimeError, ValueError, IndexError, OverflowError, MemoryError)


def missing() -> str | None:
    """None where VRS files can be read here, else what to install."""
    if importlib.util.find_spec("projectaria_tools") is None:
        return f"{PACKAGE} is not installed; pip install 'ego2robot[aria]'"
    return None


def version() -> str:
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"


def looks_like(blob: Blob) -> bool:
    return _head(blob, len(MAGIC)) == MAGIC


def _head(blob: Blob, n: int) -> bytes:
    try:
        with open_blob(blob) as file:
            return file.read(n)
    except OSError:
        return b""


def open_vrs(name: str, blob: Blob) -> VRS:
    """Opens the RGB stream of a recording.

    Args:
        name: the recording as the user knows it, for messages.
        blob: a whole file of this machine.

    Raises:
        VideoError: the package is missing, or the file is no VRS, cut off, damaged, or has no RGB stream.
    """
    if lacking := missing():
        raise VideoError(name, "a VRS recording", lacking, "unsupported")
    path = Path(blob.path)
    if not blob.whole_file:
        raise VideoError(name, "a VRS recording inside of another file", "unpack it", "unsupported")
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            expected = expected_size(file)
    except OSError as error:
        cause = f"cannot be opened ({error.strerror or error})"
        raise VideoError(name, cause, "check the path", "missing") from None
    if expected is not None and size < expected:
        raise VideoError(name, f"truncated VRS: {expected - size:,} bytes are missing", REDO, "truncated")
    try:
        with _quiet():
            return VRS(name, path)
    except DAMAGE as error:
        raise VideoError(name, f"damaged VRS ({_line(error)})", REDO, "corrupt") from None


def read_camera(name: str, blob: Blob) -> dict[str, object] | None:
    """:meth:`VRS.camera` of a recording. Raises VideoError as :func:`open_vrs`."""
    recording = open_vrs(name, blob)
    try:
        return recording.camera()
    finally:
        recording.close()


def camera_reader() -> AbstractContextManager[Callable[[str, Blob], dict[str, object] | None]]:
    """:func:`read_camera` in a process of its own: some damaged files crash the package."""
    return Aside(read_camera, TIMEOUT_S)


def expected_size(file: BinaryIO) -> int | None:
    """How many bytes a VRS file has at least, by its header and its index; None where they do not say.

    A file whose recording ended before its index was written says nothing: what it holds is used.
    """
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(HEADER.size)
    if len(head) < HEADER.size:
        return HEADER.size
    _, _, header_bytes, record_bytes, index, _, first = HEADER.unpack(head)
    if index <= 0 or first <= 0 or record_bytes != RECORD.size or header_bytes < HEADER.size:
        return None
    if index + RECORD.size > size:
        return int(index) + RECORD.size
    file.seek(index)
    record = file.read(RECORD.size)
    n_bytes, _, _, version, _, _, _, compression, _ = RECORD.unpack(record)
    end = int(index) + n_bytes
    if index >= first:  # the last record
        return end
    if version != 2:
        return None
    if end > size:
        return end
    if n_bytes < RECORD.size + 8:
        return None
    payload = file.read(n_bytes - RECORD.size)
    streams = struct.unpack_from("<I", payload)[0]
    at = 4 + 6 * streams
    if at + 4 > len(payload):
        return None
    n_records = struct.unpack_from("<I", payload, at)[0]
    sizes = _sum_of_sizes(payload[at + 4 :], compression, n_records)
    return None if sizes is None else int(first) + sizes


def _sum_of_sizes(data: bytes, compression: int, n_records: int) -> int | None:
    source: Any = pa.BufferReader(data)
    if compression:
        if compression not in COMPRESSION:
            return None
        source = pa.CompressedInputStream(source, COMPRESSION[compression])
    total, left = 0, n_records
    try:
        while left:
            chunk = source.read(INFO_BYTES * min(left, 1 << 16))
            n = len(chunk) // INFO_BYTES
            if n == 0 or len(chunk) % INFO_BYTES:
                return None
            rows = np.frombuffer(chunk, np.uint8).reshape(n, INFO_BYTES)[:, SIZE_AT : SIZE_AT + 4]
            total += int(np.ascontiguousarray(rows).view("<u4").sum(dtype=np.int64))
            left -= n
    except (OSError, pa.ArrowException):
        return None
    return total


class VRS:
    """See :class:`ego2robot.decode.stills.Recording`; :func:`open_vrs` makes it."""

    def __init__(self, name: str, path: Path) -> None:
        from projectaria_tools.core import data_provider
        from projectaria_tools.core.sensor_data import TimeDomain

        self._domains = TimeDomain
        self._provider = data_provider.create_vrs_data_provider(str(path))
        if self._provider is None:
            raise VideoError(name, "not a VRS recording", "give the recording itself", "not_a_video")
        self._stream = self._provider.get_stream_id_from_label(RGB)
        if self._stream is None or not self._provider.get_num_data(self._stream):
            labels = [self._provider.get_label_from_stream_id(s) for s in self._provider.get_all_streams()]
            cameras = ", ".join(sorted(label for label in labels if label and "camera" in label)) or "none"
            cause = f"no RGB pictures (cameras: {cameras})"
            raise VideoError(name, cause, "record with a profile that has RGB", "no_video_stream")
        times = np.array(self._provider.get_timestamps_ns(self._stream, TimeDomain.DEVICE_TIME), np.int64)
        # A picture with a time that was there before cannot be shown in order.
        self._index = np.flatnonzero(times > np.concatenate([[-1], np.maximum.accumulate(times)[:-1]]))
        self.times_ns = times[self._index]
        configuration = self._provider.get_image_configuration(self._stream)
        self.width, self.height = int(configuration.image_width), int(configuration.image_height)
        self._calibration = self._provider.get_device_calibration()
        self.rotation = 0 if "Gen2" in str(self._device_version()) else 90

    def _device_version(self) -> object:
        return self._calibration.get_device_version() if self._calibration is not None else None

    def picture(self, index: int) -> np.ndarray | None:
        try:
            with _quiet():
                data, _ = self._provider.get_image_data_by_index(self._stream, int(self._index[index]))
                if not data.is_valid():
                    return None
                picture = data.to_numpy_array()
        except DAMAGE:
            return None
        if picture.dtype != np.uint8 or picture.shape[:2] != (self.height, self.width):
            return None
        return picture

    def camera(self) -> dict[str, object] | None:
        """The upright pictures' camera as JSON has it; None where the recording has no calibration.

        ``T_device_camera`` and ``T_device_cpf`` (the frame of the gaze, between the eyes) are [4, 4], metres.
        It is the factory's calibration; the online calibration of MPS is not applied.
        """
        try:
            return self._camera()
        except DAMAGE:
            return None

    def _camera(self) -> dict[str, object] | None:
        camera = self._calibration.get_camera_calib(RGB) if self._calibration is not None else None
        if camera is None or "FISHEYE624" not in str(camera.get_model_name()):
            return None
        width, height = (int(n) for n in camera.get_image_size())
        lens: Fisheye624 = camera_of(camera.get_projection_params(), width, height)
        T_device_camera = np.array(camera.get_transform_device_camera().to_matrix(), np.float64)
        if self.rotation == 90:
            lens = lens.clockwise()
            T_device_camera = T_device_camera.copy()
            T_device_camera[:3, :3] = T_device_camera[:3, :3] @ CLOCKWISE.T
        cpf = np.array(self._calibration.get_transform_device_cpf().to_matrix(), np.float64)
        return describe(lens, T_device_camera, T_device_cpf=cpf.tolist())

    def timecode_ns(self, device_ns: np.ndarray) -> np.ndarray | None:
        """Device times [T] in the clock that several devices shared (time code); None: there was none."""
        found = np.array(
            [self._provider.convert_from_device_time_to_timecode_ns(int(t)) for t in device_ns], np.int64
        )
        return found if (found >= 0).all() else None

    def close(self) -> None:
        self._provider = self._calibration = None


_LOCK = threading.RLock()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the package logs straight to the process's error stream; it has no setting for that."""
    with _LOCK:
        try:
            kept = os.dup(2)
        except OSError:  # no error stream at all
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
