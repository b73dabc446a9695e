"""Which packets no other picture is decoded from, told from their headers alone.

Leaving such a packet out changes no other picture. Nothing here decodes, and no length in a packet is
believed: what does not parse to the end is taken for a packet that is needed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import av

MAX_PARTS = 512  # NAL units or OBUs of one packet, looked through
MAX_GROUP_BYTES = 32 << 20  # of packets that wait for the end of their group of pictures
LOOKAHEAD = 24  # packets; pictures are reordered over at most 16 (H.264, HEVC: a full picture buffer)

_H264_SLICES = frozenset((1, 2, 3, 4))  # 5, an IDR slice, is always referred to
_H264_BESIDE = frozenset((6, 9, 10, 11, 12, 14, 19))  # SEI, delimiters, filler, prefix, auxiliary
Refresh = Literal["whole", "open", "led"]
_H264_REFRESH: dict[int, Refresh] = {5: "whole"}
_HEVC_REFRESH: dict[int, Refresh] = {
    **dict.fromkeys((19, 20), "whole"),  # IDR_W_RADL, IDR_N_LP
    **dict.fromkeys((16, 17, 18, 21), "open"),  # BLA, CRA
    **dict.fromkeys((6, 7), "led"),  # RADL_N, RADL_R
}
_HEVC_SLICES = frozenset((0, 2, 4, 6, 8))  # TRAIL_N, TSA_N, STSA_N, RADL_N, RASL_N
_HEVC_BESIDE = frozenset((35, 36, 37, 38, 39, 40))  # delimiters, filler, SEI
_HEVC_SPS = 33
_HEVC_SETS = frozenset((32, _HEVC_SPS, 34))
_AV1_SEQUENCE, _AV1_HEADER, _AV1_FRAME = 1, 3, 6
_AV1_BESIDE = frozenset((2, 4, 5, 7, 15))  # delimiter, tiles, metadata, repeated header, padding


def disposable(codec: str, extradata: bytes | None, packet: bytes | memoryview) -> bool:
    """Whether no other picture of the stream is decoded from this packet, see :class:`References`."""
    return References(codec, extradata).disposable(packet)


class References:
    """Knows one stream's parameter sets, those in its packets too, if it is shown them in order.

    H.264: every slice has ``nal_ref_idc`` 0. HEVC: sub-layer non-reference pictures of the highest
    temporal sub-layer. AV1: frames that are shown and refresh no slot. VP9 and everything else: never (a
    VP9 frame that refreshes nothing still leaves its motion vectors, segments and probabilities behind).

    Args:
        codec: ffmpeg's name.
        extradata: of the stream: ``avcC``, ``hvcC``, ``av1C``, or parameter sets with start codes.
    """

    def __init__(self, codec: str, extradata: bytes | None) -> None:
        self._extradata = extra = bytes(extradata or b"")
        self._length_size = 0  # bytes of a NAL unit's length; 0: start codes
        self._layers = 0  # HEVC temporal sub-layers; 0: not known yet
        self._sequence: _Sequence | None = None
        self._look: Callable[[bytes | memoryview], bool] = _never
        if codec == "h264":
            if len(extra) >= 7 and extra[0] == 1:  # ISO/IEC 14496-15, 5.3.3.1
                self._length_size = (extra[4] & 3) + 1
            self._look = self._h264
        elif codec == "hevc":
            # A record of configuration version 0 or 1; start codes begin with two zeros and a small byte.
            if len(extra) >= 23 and (extra[0] or extra[1] or extra[2] > 1):  # 14496-15, 8.3.3.1
                self._length_size = (extra[21] & 3) + 1
                self._layers = extra[21] >> 3 & 7
            self._look = self._hevc
            if not self._length_size:
                self.disposable(extra)  # for its parameter sets
        elif codec == "av1":
            self._look = self._av1
            self.disposable(extra[4:] if extra[:1] == b"\x81" else extra)  # av1C, then OBUs

    def disposable(self, packet: bytes | memoryview) -> bool:
        """Whether the rest of the stream decodes the same without ``packet``. False where in doubt."""
        try:
            return self._look(packet)
        except (IndexError, ValueError):
            return False

    def refresh(self, packet: bytes | memoryview) -> Refresh | None:
        """What kind of new start a packet is; None: none, or none that is known here.

        ``whole``: no picture from here on is decoded from what came before, or shown before that (H.264 and
        HEVC: instantaneous decoding refresh). ``open``: pictures shown before this one may still be (HEVC:
        clean random access and broken links). ``led``: such a picture that is not, after all.
        """
        hevc = self._look == self._hevc
        if not hevc and self._look != self._h264:
            return None
        found: set[Refresh | None] = set()
        try:
            for at, end in _nal_units(packet, self._length_size):
                if hevc and (end - at < 2 or packet[at] & 1 or packet[at + 1] >> 3):  # another layer's
                    return None
                kind = packet[at] >> 1 & 63 if hevc else packet[at] & 31
                if kind <= (31 if hevc else 5):
                    found.add((_HEVC_REFRESH if hevc else _H264_REFRESH).get(kind))
        except (IndexError, ValueError):
            return None
        return found.pop() if len(found) == 1 else None

    def _h264(self, data: bytes | memoryview) -> bool:
        found = False
        for at, _ in _nal_units(data, self._length_size):
            kind = data[at] & 31
            if kind in _H264_SLICES and not data[at] >> 5 & 3:
                found = True
            elif kind not in _H264_BESIDE:
                return False
        return found

    def _hevc(self, data: bytes | memoryview) -> bool:
        found = sets = False
        for at, end in _nal_units(data, self._length_size):
            if end - at < 3:
                return False
            kind, layer, temporal = (
                data[at] >> 1 & 63,
                (data[at] & 1) << 5 | data[at + 1] >> 3,
                data[at + 1] & 7,
            )
            if kind == _HEVC_SPS and not layer:
                self._layers = (data[at + 2] >> 1 & 7) + 1  # ITU-T H.265, 7.3.2.2
            if kind in _HEVC_SETS:
                sets = True
                continue
            # A picture of a lower sub-layer may be referred to by those above it.
            if kind in _HEVC_SLICES and not layer and temporal == self._layers:
                found = True
            elif kind not in _HEVC_BESIDE:
                return False
        return found and not sets

    def _av1(self, data: bytes | memoryview) -> bool:
        found = False
        for kind, at, end in _obus(data):
            if kind == _AV1_SEQUENCE:
                self._sequence = _Sequence(_Bits(data, at, end))
                return False
            if kind in (_AV1_HEADER, _AV1_FRAME):
                if self._sequence is None or not self._sequence.leaves_nothing(_Bits(data, at, end)):
                    return False
                found = True
            elif kind not in _AV1_BESIDE:
                return False
        return found


def needed(
    packets: Iterable[av.Packet[av.VideoStream] | None],
    references: References,
    due: Sequence[float],
    tick: float,
    left_out: Callable[[float], None] = lambda _: None,
) -> Iterator[av.Packet[av.VideoStream] | None]:
    """Leaves out disposable packets whose picture is on screen at no due time.

    Looks ``LOOKAHEAD`` packets ahead to know until when a picture stays on screen: the next one may come
    before it or after it in the stream. A picture whose successor is not in sight is kept.

    Args:
        packets: in the order of the stream; None (damage) goes through, and nothing before it is left out.
        due: ascending, seconds in the stream's clock. A picture is on screen at t when its time is ≤ t
            and no later picture's is.
        tick: the stream's time base, seconds.
        left_out: told the presentation time of each packet that is left out.
    """
    waiting: deque[av.Packet[av.VideoStream] | None] = deque()
    times: deque[float] = deque(maxlen=2 * LOOKAHEAD + 1)  # of packets behind and ahead

    def unseen(packet: av.Packet[av.VideoStream] | None) -> bool:
        if packet is None or None in waiting or packet.pts is None or not packet.size or packet.is_corrupt:
            return False
        if not references.disposable(memoryview(packet)):
            return False
        time_s = packet.pts * tick
        next_s = min((t for t in times if t > time_s), default=None)
        if next_s is None:
            return False
        k = bisect_left(due, time_s)
        if k < len(due) and due[k] < next_s:
            return False
        left_out(time_s)
        return True

    for packet in packets:
        waiting.append(packet)
        if packet is not None and packet.pts is not None and packet.size:
            times.append(packet.pts * tick)
        if len(waiting) > LOOKAHEAD and not unseen(first := waiting.popleft()):
            yield first
    while waiting:
        if not unseen(first := waiting.popleft()):
            yield first


def trimmed(
    packets: Iterable[av.Packet[av.VideoStream] | None],
    references: References,
    due: Sequence[float],
    tick: float,
    left_out: Callable[[float], None] = lambda _: None,
) -> Iterator[av.Packet[av.VideoStream] | None]:
    """Leaves out the end of each group of pictures, after the last packet whose picture is due.

    A group is held until the next begins, for which nothing before it is needed (:meth:`References.refresh`).
    The last group, and any with damage, stay whole.

    Args: as of :func:`needed`.
    """
    group: list[av.Packet[av.VideoStream] | None] = []
    size, whole = 0, True
    start: av.Packet[av.VideoStream] | None = None  # of the next group, where that is not sure yet
    at = 0  # its place in ``group``
    for packet in packets:
        kind = None
        if packet is not None and packet.size and packet.pts is not None:
            kind = references.refresh(memoryview(packet))
        if start is not None and (packet is None or packet.pts is None or packet.pts < start.pts):
            if kind != "led":  # it may be decoded from the group before
                start = None
        elif start is not None or kind == "whole":
            cut = at if start is not None else len(group)
            end_s = (start or packet).pts * tick  # type: ignore[union-attr]
            yield from _to_last_due(group[:cut], due, tick, end_s, left_out) if whole else group[:cut]
            group, start, whole = group[cut:], None, True
            size = sum(p.size for p in group if p is not None)
        if kind == "open" and start is None:
            start, at = packet, len(group)
        group.append(packet)
        size += packet.size if packet is not None else 0
        if size > MAX_GROUP_BYTES:
            yield from group
            group, size, start, whole = [], 0, None, False
    yield from group


def _to_last_due(
    group: list[av.Packet[av.VideoStream] | None],
    due: Sequence[float],
    tick: float,
    end_s: float,
    left_out: Callable[[float], None],
) -> list[av.Packet[av.VideoStream] | None]:
    """The packets of a group that ends at ``end_s`` up to the last one, in their order, that is due."""
    times = [
        p.pts * tick for p in group if p is not None and p.pts is not None and p.size and not p.is_corrupt
    ]
    # Who has nothing due any more stops by itself, once it sees the picture after the last that was.
    if len(times) != len(group) or bisect_left(due, end_s) == len(due):
        return group
    ascending = [*sorted(times), end_s]
    last = -1
    for k, time_s in enumerate(times):
        next_s = ascending[bisect_right(ascending, time_s)] if time_s < end_s else time_s
        if bisect_left(due, time_s) < bisect_left(due, next_s):
            last = k
    for time_s in times[last + 1 :]:
        left_out(time_s)
    return group[: last + 1]


def _never(_: bytes | memoryview) -> bool:
    return False


def _nal_units(data: bytes | memoryview, length_size: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each NAL unit. Raises ValueError where they do not fill the packet exactly."""
    size, at = len(data), 0
    for _ in range(MAX_PARTS):
        if length_size:
            if at == size:
                return
            start = at + length_size
            end = start + int.from_bytes(data[at:start], "big")
            if start >= size or end > size or end == start:
                raise ValueError("a NAL unit's length is wrong")
            yield start, end
            at = end
        else:
            # Emulation prevention keeps start codes out of the units.
            data = data if isinstance(data, bytes) else bytes(data)
            code = data.find(b"\0\0\1", at)
            if code < 0 or code + 3 >= size:
                return
            following = data.find(b"\0\0\1", code + 3)
            yield code + 3, size if following < 0 else following
            if following < 0:
                return
            at = following
    raise ValueError("too many NAL units")


def _obus(data: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Type, begin and end of each OBU's payload (AV1 specification, 5.3). Raises ValueError."""
    size, at = len(data), 0
    for _ in range(MAX_PARTS):
        if at >= size:
            return
        header = data[at]
        at += 2 if header & 4 else 1
        if header & 0x80 or not header & 2:  # forbidden bit, or a size that only the container knows
            raise ValueError("not an OBU with its size")
        length = 0
        for k in range(8):
            byte = data[at]
            at += 1
            length |= (byte & 127) << 7 * k
            if byte < 128:
                break
        else:
            raise ValueError("an OBU's length is too long")
        if at + length > size:
            raise ValueError("an OBU's length is wrong")
        yield header >> 3 & 15, at, at + length
        at += length
    raise ValueError("too many OBUs")


class _Bits:
    """Reads bits, most significant first. Raises IndexError past the end."""

    def __init__(self, data: bytes | memoryview, at: int, end: int) -> None:
        self._data, self._at, self._end = data, 8 * at, 8 * end

    def __call__(self, n: int = 1) -> int:
        if self._at + n > self._end:
            raise IndexError("header ends")
        value = 0
        for at in range(self._at, self._at + n):
            value = value << 1 | self._data[at >> 3] >> (7 - (at & 7)) & 1
        self._at += n
        return value


class _Sequence:
    """What a sequence header says that frame headers are read by (AV1 specification, 5.5.1)."""

    def __init__(self, bits: _Bits) -> None:
        bits(3)  # profile
        bits()  # still picture
        # Streams for still pictures, hypothetical decoders or broadcast are not worth their syntax here.
        self.plain = not bits()
        if not self.plain:
            return
        if bits():  # timing
            bits(64)
            if bits():
                zeros = 0
                while not bits():
                    zeros += 1
                bits(min(zeros, 32))
            if bits():  # decoder model
                self.plain = False
                return
        delay = bits()
        for _ in range(bits(5) + 1):  # operating points
            bits(12)
            if bits(5) > 7:
                bits()
            if delay and bits():
                bits(4)
        widths, heights = bits(4) + 1, bits(4) + 1
        bits(widths + heights)
        if bits():  # frame ids
            self.plain = False
            return
        bits(3 + 4)  # superblocks, intra filters; compound and warped prediction, dual filter
        ordered = bits()
        if ordered:
            bits(2)
        self.screen_tools = 2 if bits() else bits()
        self.integer_mv = 2
        if self.screen_tools:
            self.integer_mv = 2 if bits() else bits()
        self.order_bits = bits(3) + 1 if ordered else 0

    def leaves_nothing(self, bits: _Bits) -> bool:
        """Whether a frame is shown and refreshes no slot (5.9.2); a frame's whole state is in its slots."""
        if not self.plain or bits():  # an existing frame is shown: costs nothing, may refresh
            return False
        kind, shown = bits(2), bits()
        if not shown or kind in (0, 3):  # key and switch frames refresh everything
            return False
        resilient = bits()
        bits()  # cdf update
        tools = bits() if self.screen_tools == 2 else self.screen_tools
        if tools and self.integer_mv == 2:
            bits()
        bits()  # frame size override
        bits(self.order_bits)
        if kind == 1 and not resilient:
            bits(3)  # primary reference
        return bits(8) == 0
