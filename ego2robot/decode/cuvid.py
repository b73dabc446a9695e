"""Decoding on a GPU's video engines through the driver itself (NVDEC Video Decoder API, nvcuvid).

Only pictures that are due are mapped and read where they lie; the others leave the engine untouched. What
the hardware concealed is reported: the driver is asked for the status of every picture. Needs nothing but
the driver's video libraries; libav reads the packets.
"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import av
import numpy as np
import torch

from ego2robot.decode import hardware, surfaces
from ego2robot.decode.base import FrameBatch
from ego2robot.decode.bitstream import StartCodes, headers, vp9_shown
from ego2robot.decode.surfaces import DamagedPacketError, Decoded, DecoderError, EnginePool, Planes
from ego2robot.types import Blob, FrameSpec, VideoInfo

CODECS = ("h264", "hevc", "vp9", "av1")
# Beyond what the stream needs: pictures that are out but not read yet, and some to decode ahead into.
SPARE_SURFACES, DISPLAY_DELAY, MAX_SURFACES = 6, 2, 32
UNKNOWN_SURFACES = 17  # a full picture buffer of H.264 or HEVC, and the one being decoded
PACKET_END, PACKET_TIMESTAMP = 1, 2  # CUvideopacketflags
IN_PROGRESS, ERROR, CONCEALED = 1, 8, 9  # cuvidDecodeStatus
NV12, P016, WEAVE = 0, 1, 0  # cudaVideoSurfaceFormat, cudaVideoDeinterlaceMode
_pool = EnginePool()

_Int, _Uint, _Ulong, _Short, _Byte = (
    ctypes.c_int, ctypes.c_uint, ctypes.c_ulong, ctypes.c_short, ctypes.c_ubyte,
)  # fmt: skip
_Address = ctypes.c_ulonglong


class _Rect(ctypes.Structure):
    _fields_ = (("left", _Int), ("top", _Int), ("right", _Int), ("bottom", _Int))


class _ShortRect(ctypes.Structure):
    _fields_ = (("left", _Short), ("top", _Short), ("right", _Short), ("bottom", _Short))


class _Packet(ctypes.Structure):
    """CUVIDSOURCEDATAPACKET"""

    _fields_ = (
        ("flags", _Ulong),
        ("size", _Ulong),
        ("payload", ctypes.c_void_p),
        ("timestamp", ctypes.c_longlong),
    )


class _Format(ctypes.Structure):
    """CUVIDEOFORMAT"""

    _fields_ = (
        ("codec", _Int),
        ("rate", _Uint * 2),
        ("progressive", _Byte),
        ("bit_depth_minus_8", _Byte),
        ("chroma_depth_minus_8", _Byte),
        ("min_surfaces", _Byte),
        ("coded_width", _Uint),
        ("coded_height", _Uint),
        ("display", _Rect),
        ("chroma", _Int),
        ("bit_rate", _Uint),
        ("aspect", _Int * 2),
        ("signal", _Byte * 4),
        ("header_length", _Uint),
    )


class _Create(ctypes.Structure):
    """CUVIDDECODECREATEINFO"""

    _fields_ = (
        ("width", _Ulong),
        ("height", _Ulong),
        ("surfaces", _Ulong),
        ("codec", _Int),
        ("chroma", _Int),
        ("flags", _Ulong),
        ("bit_depth_minus_8", _Ulong),
        ("intra_only", _Ulong),
        ("max_width", _Ulong),
        ("max_height", _Ulong),
        ("reserved1", _Ulong),
        ("display", _ShortRect),
        ("output_format", _Int),
        ("deinterlace", _Int),
        ("target_width", _Ulong),
        ("target_height", _Ulong),
        ("output_surfaces", _Ulong),
        ("lock", ctypes.c_void_p),
        ("target", _ShortRect),
        ("histogram", _Ulong),
        ("reserved2", _Ulong * 4),
    )


class _Display(ctypes.Structure):
    """CUVIDPARSERDISPINFO"""

    _fields_ = (
        ("index", _Int),
        ("progressive", _Int),
        ("top_field_first", _Int),
        ("repeat_first_field", _Int),
        ("timestamp", ctypes.c_longlong),
    )


class _Process(ctypes.Structure):
    """CUVIDPROCPARAMS"""

    _fields_ = (
        ("progressive", _Int),
        ("second_field", _Int),
        ("top_field_first", _Int),
        ("unpaired_field", _Int),
        ("reserved_flags", _Uint),
        ("reserved_zero", _Uint),
        ("raw_input", _Address),
        ("raw_input_pitch", _Uint),
        ("raw_input_format", _Uint),
        ("raw_output", _Address),
        ("raw_output_pitch", _Uint),
        ("reserved1", _Uint),
        ("stream", ctypes.c_void_p),
        ("reserved", _Uint * 46),
        ("histogram", ctypes.c_void_p),
        ("reserved2", ctypes.c_void_p),
    )


class _Status(ctypes.Structure):
    """CUVIDGETDECODESTATUS"""

    _fields_ = (("status", _Int), ("reserved", _Uint * 31), ("pointers", ctypes.c_void_p * 8))


class _PictureHead(ctypes.Structure):
    """The beginning of CUVIDPICPARAMS; the rest is the driver's business."""

    _fields_ = (("width_blocks", _Int), ("height_blocks", _Int), ("index", _Int))


_OnSequence = ctypes.CFUNCTYPE(_Int, ctypes.c_void_p, ctypes.POINTER(_Format))
_OnDecode = ctypes.CFUNCTYPE(_Int, ctypes.c_void_p, ctypes.POINTER(_PictureHead))
_OnDisplay = ctypes.CFUNCTYPE(_Int, ctypes.c_void_p, ctypes.POINTER(_Display))


class _Parser(ctypes.Structure):
    """CUVIDPARSERPARAMS"""

    _fields_ = (
        ("codec", _Int),
        ("surfaces", _Uint),
        ("clock", _Uint),
        ("error_threshold", _Uint),
        ("display_delay", _Uint),
        ("flags", _Uint),
        ("reserved1", _Uint * 4),
        ("user", ctypes.c_void_p),
        ("on_sequence", _OnSequence),
        ("on_decode", _OnDecode),
        ("on_display", _OnDisplay),
        ("on_operating_point", ctypes.c_void_p),
        ("on_message", ctypes.c_void_p),
        ("reserved2", ctypes.c_void_p * 5),
        ("extended", ctypes.c_void_p),
    )


@cache
def _library() -> Any:
    """The driver's video library. ctypes lets other threads run while it works."""
    found = ctypes.CDLL("libnvcuvid.so.1")
    handle = ctypes.c_void_p
    found.cuvidCreateVideoParser.argtypes = (ctypes.POINTER(handle), ctypes.POINTER(_Parser))
    found.cuvidParseVideoData.argtypes = (handle, ctypes.POINTER(_Packet))
    found.cuvidDestroyVideoParser.argtypes = (handle,)
    found.cuvidCreateDecoder.argtypes = (ctypes.POINTER(handle), ctypes.POINTER(_Create))
    found.cuvidDecodePicture.argtypes = (handle, ctypes.POINTER(_PictureHead))
    found.cuvidGetDecodeStatus.argtypes = (handle, _Int, ctypes.POINTER(_Status))
    found.cuvidDestroyDecoder.argtypes = (handle,)
    found.cuvidMapVideoFrame64.argtypes = (
        handle, _Int, ctypes.POINTER(_Address), ctypes.POINTER(_Uint), ctypes.POINTER(_Process),
    )  # fmt: skip
    found.cuvidUnmapVideoFrame64.argtypes = (handle, _Address)
    return found


@cache
def _driver() -> Any:
    found = ctypes.CDLL("libcuda.so.1")
    found.cuCtxSetCurrent.argtypes = (ctypes.c_void_p,)
    return found


class CUVID:
    """See :class:`ego2robot.decode.base.Backend`."""

    name = "cuvid"
    devices: tuple[str, ...] = ("cuda",)
    planes: tuple[str, ...] = ("rgb", "nv12", "p010")

    def missing(self) -> str | None:
        return hardware.missing()

    def version(self) -> str:
        return "of the driver"

    def refuses(self, info: VideoInfo) -> str | None:
        if info.codec not in CODECS:
            return f"is only used for {', '.join(CODECS)}, not {info.codec}"
        return hardware.refuses(info)

    def read(
        self,
        name: str,
        blob: Blob,
        info: VideoInfo,
        times_s: np.ndarray,
        spec: FrameSpec,
        device: str,
        fast: bool = False,
    ) -> Iterator[FrameBatch]:
        @contextmanager
        def engine(stream: av.VideoStream) -> Iterator[DriverEngine]:
            context = stream.codec_context
            # The same headers need the same surfaces: only then may a decoder go on with another video.
            key = (device, info.codec, context.extradata, context.width, context.height, info.pix_fmt)
            made: DriverEngine | None = _pool.take(key)
            if made is None:
                made = DriverEngine(info.codec, hardware.device_index(device))
            try:
                made.follow(stream)
                yield made
                made.reset()
            except BaseException:
                made.close()
                raise
            for old in _pool.give(key, made):
                old.close()

        yield from surfaces.read_packets(name, blob, info, times_s, spec, device, engine, fast)


class _Shown:
    """A picture that the parser put out: in its decoder's surface until that is decoded into again."""

    def __init__(self, index: int, pts: int | None, process: _Process) -> None:
        self.index, self.pts, self.process = index, pts, process
        self.copy: tuple[torch.Tensor, torch.Tensor, bool] | None = None


class DriverEngine:
    """A parser and a decoder of the driver. See :class:`ego2robot.decode.surfaces.Engine`."""

    silent = True  # what is damaged beyond decoding never comes out

    def __init__(self, codec: str, device: int) -> None:
        self._codec, self._device = codec, device
        self._nvcuvid, self._context = _library(), hardware.context(device)
        self._stream = torch.cuda.Stream(device)
        self._parser, self._decoder = ctypes.c_void_p(), ctypes.c_void_p()
        self._format: _Format | None = None
        self._surfaces = 0
        self._mapped = 0  # address of the surface that is mapped
        self._begun = False
        self._damage: int | None = None  # pts of the latest picture that is damaged, until it is told
        self._unjudged: dict[int, int] = {}  # surface to pts, that was being decoded when last asked about
        self._sent = (0, 0)  # pts of the packet before, and of this one
        self._lacking = 0  # packets of which no picture was decoded
        self._lag = 0  # so many of them still may be: a picture is complete when the next begins
        self._shown: list[_Shown] = []
        self._times: deque[int | None] = deque()  # of VP9, whose parser gets times wrong
        self._error: BaseException | None = None  # from within a callback
        # The callbacks must live as long as the parser.
        self._calls = (
            _OnSequence(self._guarded(self._sequence)),
            _OnDecode(self._guarded(self._picture)),
            _OnDisplay(self._guarded(self._display)),
        )
        parameters = _Parser(
            codec=hardware.CODECS[codec],
            surfaces=1,  # until the sequence says how many
            display_delay=DISPLAY_DELAY,
            on_sequence=self._calls[0],
            on_decode=self._calls[1],
            on_display=self._calls[2],
        )
        self._enter()
        status = self._nvcuvid.cuvidCreateVideoParser(ctypes.byref(self._parser), ctypes.byref(parameters))
        if status:
            raise DecoderError(f"the driver makes no parser for {codec} (error {status})")

    @property
    def stream(self) -> torch.cuda.Stream | None:
        return self._stream

    def follow(self, stream: av.VideoStream) -> None:
        """Takes a stream whose packets come next."""
        self._start_codes = StartCodes(stream)
        self._headers = headers(self._codec, stream.codec_context.extradata)
        self._space = int(stream.codec_context.colorspace)
        self._range = int(stream.codec_context.color_range)

    def decode(self, packet: av.Packet) -> list[Decoded]:
        pts = packet.pts  # the packet is empty after the filter
        if pts is None:
            raise DecoderError("its packets have no presentation times")
        self._begin()
        first = not self._begun
        if first:
            self._begun, self._sent, self._lacking, self._lag = True, (pts, pts), 0, 0
            if self._headers:
                self._send(np.frombuffer(self._headers, np.uint8), pts)
        for part in self._start_codes(packet):
            if part.size:
                if self._codec == "vp9":  # it never reorders
                    self._times.extend([pts] * vp9_shown(memoryview(part)))
                self._send(np.frombuffer(part, np.uint8), pts)
        self._lacking += 1
        if first:
            self._lag = min(self._lacking, 1)
        elif self._lacking > self._lag and self._codec in ("h264", "hevc"):  # others show what is there
            self._found_damage(self._whose)
        self._lacking = min(self._lacking, self._lag)
        return self._found()

    def drain(self) -> list[Decoded]:
        self._begin()
        self._send(None, 0)
        self._begun = False
        return self._found()

    def reset(self) -> None:
        if self._begun:
            self.drain()
        self._begin()
        self._start_codes.reset()
        self._times.clear()
        self._unjudged.clear()
        self._damage = None

    def close(self) -> None:
        """Gives the driver's objects back; nothing of it may be used any more."""
        self._enter()
        self._stream.synchronize()
        self._unmap()
        if self._parser:
            self._nvcuvid.cuvidDestroyVideoParser(self._parser)
        if self._decoder:
            self._nvcuvid.cuvidDestroyDecoder(self._decoder)
        self._parser, self._decoder = ctypes.c_void_p(), ctypes.c_void_p()

    def __del__(self) -> None:
        # An idle one goes with its thread. At the end of the process, the driver cleans up itself.
        if getattr(self, "_parser", None) and not sys.is_finalizing():
            self.close()

    def _begin(self) -> None:
        """What was handed out before is over."""
        self._enter()
        self._unmap()
        self._shown = []

    def _enter(self) -> None:
        _driver().cuCtxSetCurrent(self._context)

    def _send(self, data: np.ndarray | None, pts: int) -> None:
        packet = _Packet(flags=PACKET_TIMESTAMP, timestamp=pts)
        if data is None:
            packet.flags = PACKET_END
            self._sent = self._sent[1], self._sent[1]
        else:
            self._sent = self._sent[1], pts
            packet.payload, packet.size = data.ctypes.data, len(data)
        status = self._nvcuvid.cuvidParseVideoData(self._parser, ctypes.byref(packet))
        error, self._error = self._error, None
        if error is not None:
            raise error
        if status:
            raise DamagedPacketError(f"the driver rejects a packet (error {status})")

    def _found(self) -> list[Decoded]:
        self._judge()
        found = []
        for shown in self._shown:
            damage, self._damage = self._damage, None
            planes = partial(self._planes, shown)
            found.append(Decoded(shown.pts, False, planes, lasts=False, damage=damage))
        return found

    # -- called by the driver while it parses ------------------------------------------------------

    def _guarded(self, call: Callable[[Any], int]) -> Callable[[Any, Any], int]:
        """A callback whose exception waits until the driver has returned; 0 tells the driver to stop."""

        def guarded(_: Any, argument: Any) -> int:
            try:
                return call(argument.contents)
            except BaseException as error:  # noqa: BLE001 - raised again by _send
                self._error = self._error or error
                return 0

        return guarded

    def _sequence(self, given: _Format) -> int:
        now = _Format.from_buffer_copy(given)
        if self._format is not None:
            known = self._format
            same = all(
                getattr(now, field) == getattr(known, field)
                for field in ("coded_width", "coded_height", "chroma", "bit_depth_minus_8")
            )
            if not same or now.min_surfaces > self._surfaces:
                raise DecoderError("its pictures change on the way")
            self._format = now
            return self._surfaces
        if now.chroma != hardware.CHROMA_420:
            raise DecoderError("its chroma is not 4:2:0")
        self._surfaces = min(MAX_SURFACES, (now.min_surfaces or UNKNOWN_SURFACES) + SPARE_SURFACES)
        whole = _ShortRect(0, 0, now.coded_width, now.coded_height)
        wanted = _Create(
            width=now.coded_width,
            height=now.coded_height,
            surfaces=self._surfaces,
            codec=now.codec,
            chroma=now.chroma,
            bit_depth_minus_8=now.bit_depth_minus_8,
            max_width=now.coded_width,
            max_height=now.coded_height,
            display=whole,
            output_format=P016 if now.bit_depth_minus_8 else NV12,
            deinterlace=WEAVE,
            target_width=now.coded_width,  # all of it: what is shown is cut out when it is read
            target_height=now.coded_height,
            output_surfaces=2,
        )
        if status := self._nvcuvid.cuvidCreateDecoder(ctypes.byref(self._decoder), ctypes.byref(wanted)):
            raise DecoderError(f"the driver makes no decoder (error {status})")
        self._format = now
        return self._surfaces

    def _picture(self, head: _PictureHead) -> int:
        if head.index in self._unjudged:
            self._judge()
            self._unjudged.pop(head.index, None)
        for shown in self._shown:  # not read yet, and about to be overwritten
            if shown.index == head.index and shown.copy is None:
                y, uv, damaged = self._map(shown)
                with torch.cuda.stream(self._stream):
                    shown.copy = y.clone(), uv.clone(), damaged
        status = self._nvcuvid.cuvidDecodePicture(self._decoder, ctypes.byref(head))
        self._lacking -= 1
        if status:
            self._found_damage(self._whose)
        else:
            self._unjudged[head.index] = self._whose
        return 1

    def _display(self, info: _Display) -> int:
        process = _Process(
            progressive=info.progressive,
            top_field_first=info.top_field_first,
            unpaired_field=info.repeat_first_field < 0,
            second_field=info.repeat_first_field + 1,
            stream=self._stream.cuda_stream,
        )
        pts = self._times.popleft() if self._times else info.timestamp
        self._shown.append(_Shown(info.index, pts, process))
        return 1

    # -- surfaces ----------------------------------------------------------------------------------

    def _judge(self) -> None:
        """Asks for the outcome of what was being decoded."""
        for index, pts in tuple(self._unjudged.items()):
            found = _Status()
            if self._nvcuvid.cuvidGetDecodeStatus(self._decoder, index, ctypes.byref(found)):
                del self._unjudged[index]  # not known for this codec
            elif found.status != IN_PROGRESS:
                del self._unjudged[index]
                if found.status in (ERROR, CONCEALED):
                    self._found_damage(pts)

    @property
    def _whose(self) -> int:
        """pts of the packet that a picture came in which is decoded now."""
        return self._sent[0] if self._lag else self._sent[1]

    def _found_damage(self, pts: int) -> None:
        self._damage = pts if self._damage is None else max(self._damage, pts)

    def _map(self, shown: _Shown) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Planes of what is shown, once it is decoded, and whether damage came to light."""
        assert self._format is not None
        self._enter()
        self._unmap()
        address, pitch = _Address(), _Uint()
        status = self._nvcuvid.cuvidMapVideoFrame64(
            self._decoder,
            shown.index,
            ctypes.byref(address),
            ctypes.byref(pitch),
            ctypes.byref(shown.process),
        )
        if status:
            raise DecoderError(f"the driver does not hand out a picture (error {status})")
        self._mapped = address.value
        self._judge()  # all that was decoded before it can be judged now
        damaged = self._damage is not None
        dtype = torch.uint16 if self._format.bit_depth_minus_8 else torch.uint8
        height, width = self._format.coded_height, self._format.coded_width
        chroma = address.value + pitch.value * (height + height % 2)
        y, uv = hardware.device_planes(
            address.value, chroma, pitch.value, height, width, dtype, self._device, self
        )
        area = self._format.display
        y = y[area.top : area.bottom, area.left : area.right]
        uv = uv[area.top // 2 : (area.bottom + 1) // 2, area.left // 2 : (area.right + 1) // 2]
        return y, uv, damaged

    def _unmap(self) -> None:
        """Work that reads the surface is on the stream that the next one is written on."""
        if self._mapped:
            self._nvcuvid.cuvidUnmapVideoFrame64(self._decoder, self._mapped)
            self._mapped = 0

    def _planes(self, shown: _Shown) -> Planes:
        y, uv, damaged = shown.copy or self._map(shown)
        found = surfaces.planes(y, uv, self._codec, self._space, self._range)
        return found._replace(damaged=damaged)
