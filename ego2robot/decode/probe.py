"""What a video is, from its headers and its first picture; the rest of it is not decoded."""

from __future__ import annotations

import struct
from fractions import Fraction

import av

from ego2robot.blobs import container_size, open_blob, read_error
from ego2robot.decode import stills
from ego2robot.decode.pyav import open_stream, pictures
from ego2robot.errors import VideoError
from ego2robot.remote import RemoteError
from ego2robot.types import Blob, VideoInfo

MAX_BOXES = 10_000  # of a fragmented file, looked through for its index
TAIL_S = 5.0  # how much of the end is looked at where the container has no index
DEFAULT_FPS = 25.0  # where the container says nothing, as FFmpeg assumes
MP4_BOXES = frozenset((b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"pnot", b"uuid"))
REDO = "re-download the file"
EBML = b"\x1a\x45\xdf\xa3"


def probe(name: str, blob: Blob) -> VideoInfo:
    """Size, rotation, rate, span and format of a video.

    Args:
        name: the video as the user knows it, for messages.

    Raises:
        VideoError: ``missing``, ``empty``, ``not_a_video``, ``no_video_stream``, ``truncated``,
            ``corrupt`` or ``unsupported``, with the cause and the next step.
    """
    _check_bytes(name, blob)
    if codec := stills.kind_of(blob):
        return stills.probe(name, blob, codec)
    try:
        with open_stream(name, blob) as (container, stream):
            return _describe(name, container, stream)
    except RemoteError as error:
        raise read_error(name, error) from None
    except av.FFmpegError as error:
        raise _explain(name, blob, error) from None
    except VideoError as error:
        boxes, whole = _mp4_boxes(blob)
        if boxes and not whole:  # what is lacking is in the part that was cut off
            raise VideoError(name, f"truncated mp4 ({error.cause})", REDO, "truncated") from None
        raise


def _describe(name: str, container: av.container.InputContainer, stream: av.VideoStream) -> VideoInfo:
    try:
        first = next(pictures(container, stream), None)
    except ValueError as error:  # PyAV's word for a codec it was built without
        raise VideoError(name, str(error), "re-encode the video", "unsupported") from None
    codec = stream.codec_context.codec.canonical_name
    if first is None:
        cause = f"none of its {codec} pictures can be decoded"
        raise VideoError(name, cause, "re-download or re-encode the file", "corrupt")
    frame = first.frame
    rotation = -round(frame.rotation / 90) * 90 % 360
    aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    width, height = max(1, round(frame.width * aspect)), frame.height
    if rotation % 180:
        width, height = height, width
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    fps = rate if 0 < rate <= 1000 else DEFAULT_FPS
    duration_s, n_frames = _span(container, stream, first.time_s, fps)
    return VideoInfo(
        width=width,
        height=height,
        rotation=rotation,
        fps=fps,
        duration_s=duration_s,
        start_s=first.time_s,
        n_frames=n_frames,
        codec=codec,
        pix_fmt=frame.format.name,
        bit_depth=max(component.bits for component in frame.format.components),
    )


def _span(
    container: av.container.InputContainer, stream: av.VideoStream, start_s: float, fps: float
) -> tuple[float, int]:
    """Seconds from the first picture to the end of the last, and how many there are.

    A whole index is believed before the header, and the header before nothing; a header that promises
    more than the file holds is believed, so that what was cut off is missed and not overlooked.
    """
    shown = [entry.timestamp for entry in stream.index_entries if not entry.is_discard]
    if stream.frames and len(shown) == len(stream.index_entries) == stream.frames:
        # The index goes by decoding time; presentation only starts later, by the same for all.
        rate = stream.average_rate or Fraction(fps)
        return float((shown[-1] - shown[0]) * (stream.time_base or 1) + 1 / rate), len(shown)
    promised = _promised(container, stream)
    video_end, any_end = _ends(container, stream, (promised or 0) - TAIL_S)
    if video_end is None:
        video_end, any_end = _ends(container, stream, None)
    found = (video_end if video_end is not None else start_s) - start_s
    # Promises count from zero or from the start, ends from zero: only a clear lack is taken for a cut.
    cut = promised is not None and any_end is not None and any_end < promised - 1
    length_s = promised - max(start_s, 0.0) if promised is not None and cut else found
    length_s = max(length_s, 1 / fps)
    return length_s, stream.frames or max(1, round(length_s * fps))


def _promised(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    """The duration that the headers give, seconds."""
    if stream.duration:
        return float(stream.duration * (stream.time_base or 1))
    if tag := stream.metadata.get("DURATION"):  # Matroska, per track: 00:01:02.345000000
        hours, _, rest = tag.partition(":")
        minutes, _, seconds = rest.partition(":")
        try:
            return 3600 * int(hours) + 60 * int(minutes) + float(seconds)
        except ValueError:
            pass
    return container.duration / av.time_base if container.duration else None


def _ends(
    container: av.container.InputContainer, stream: av.VideoStream, from_s: float | None
) -> tuple[float | None, float | None]:
    """End of the video and of any stream, read from the packets after ``from_s`` (None: from all)."""
    start = (container.start_time or 0) / av.time_base
    try:
        container.seek(int((start + max(0.0, from_s or 0.0)) * av.time_base))
    except av.FFmpegError:
        return None, None
    ends: dict[int, float] = {}
    packets = container.demux()
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            break
        if packet is None:
            break
        when = packet.pts if packet.pts is not None else packet.dts
        if when is None or not packet.size or packet.time_base is None:
            continue
        length = packet.duration or 0
        if not length and packet.stream is stream and stream.average_rate:
            length = 1 / stream.average_rate / packet.time_base
        end = float((when + length) * packet.time_base)
        ends[packet.stream_index] = max(end, ends.get(packet.stream_index, end))
    return ends.get(stream.index), max(ends.values(), default=None)


def _check_bytes(name: str, blob: Blob) -> None:
    try:
        size = container_size(blob)
        with open_blob(blob):
            pass
    except RemoteError as error:
        raise read_error(name, error) from None
    except OSError as error:
        cause = error.strerror or str(error)
        raise VideoError(name, f"cannot be opened ({cause})", "check the path", "missing") from None
    if blob.size == 0 or size == 0:
        raise VideoError(name, "empty (0 bytes)", "download or record it again", "empty")
    if blob.offset + blob.size > size:
        lacking = blob.offset + blob.size - size
        hint = REDO if blob.whole_file else "re-download the archive"
        raise VideoError(name, f"{lacking} of its {blob.size} bytes are missing", hint, "truncated")


def _explain(name: str, blob: Blob, error: av.FFmpegError) -> VideoError:
    """Why a file that is there cannot be opened as a video."""
    with open_blob(blob) as file:
        head = file.read(min(4096, blob.size))
    boxes, whole = _mp4_boxes(blob)
    if boxes:
        if b"moov" not in boxes:
            cause = "truncated mp4: its index (moov) is missing"
            return VideoError(name, cause, "re-download it, or finish the recording", "truncated")
        if not whole:
            return VideoError(name, "truncated mp4", REDO, "truncated")
    if boxes or head.startswith(EBML):
        return VideoError(name, f"damaged container ({error.strerror})", REDO, "corrupt")
    kind = "text" if _is_text(head) else "no video format that is known here"
    return VideoError(name, f"not a video ({kind})", "remove it, or give the video itself", "not_a_video")


def _mp4_boxes(blob: Blob) -> tuple[list[bytes], bool]:
    """The types of the top-level boxes (none: no mp4), and whether the last one is complete."""
    boxes: list[bytes] = []
    at = 0
    with open_blob(blob) as file:
        while at + 8 <= blob.size and len(boxes) < MAX_BOXES:
            file.seek(at)
            header = file.read(16)
            size, kind = struct.unpack(">I4s", header[:8])
            if size == 1 and len(header) == 16:
                size = struct.unpack(">Q", header[8:])[0]
            if not boxes and kind not in MP4_BOXES:
                return [], True
            boxes.append(kind)
            if size == 0:  # up to the end
                return boxes, True
            if size < 8:
                return boxes, False
            at += size
    return boxes, at <= blob.size


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # not just a character cut by the end of the excerpt
            return False
        text = head[: error.start].decode()
    return all(c.isprintable() or c in "\r\n\t\f" for c in text)
