"""The tables of a run directory. Units are in the column's name or in its field metadata."""

from __future__ import annotations

import pyarrow as pa

from ego2robot.types import N_LANDMARKS


def _field(name: str, kind: pa.DataType, note: str = "", nullable: bool = True) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"description": note} if note else None)


META = pa.map_(pa.string(), pa.string())
LABELS = pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))

UNITS = pa.schema(
    [
        _field("unit_id", pa.string(), "16 hex digits, from the video's bytes and the span", False),
        _field("video_id", pa.string(), "16 hex digits, from the video's bytes", False),
        _field("name", pa.string(), "the video as a person knows it", False),
        _field("source", pa.string(), "", False),
        _field("path", pa.string(), "file that holds the bytes", False),
        _field("offset", pa.int64(), "bytes", False),
        _field("size", pa.int64(), "bytes", False),
        _field("whole_file", pa.bool_(), "false: a byte range, such as a tar member", False),
        _field("width", pa.int32(), "pixels as displayed", False),
        _field("height", pa.int32(), "pixels as displayed", False),
        _field("rotation", pa.int32(), "degrees clockwise", False),
        _field("fps", pa.float64(), "average frames/s", False),
        _field("duration_s", pa.float64(), "", False),
        _field("video_start_s", pa.float64(), "presentation time of the first frame", False),
        _field("n_frames", pa.int64(), "in the whole video", False),
        _field("codec", pa.string(), "", False),
        _field("pix_fmt", pa.string(), "", False),
        _field("bit_depth", pa.int32(), "bits", False),
        _field("first", pa.list_(pa.int64()), "grid index of each clip's first frame", False),
        _field("length", pa.list_(pa.int32()), "frames of each clip", False),
        _field("sample_fps", pa.float64(), "grid frames/s", False),
        _field("cost_s", pa.float64(), "estimated seconds of decoding", False),
        _field("meta", META, "the source's own fields", False),
        _field("clip_meta", pa.list_(META), "of each clip's annotation; null: there is none"),
    ]
)

CLIPS = pa.schema(
    [
        _field("clip_id", pa.string(), "16 hex digits, from the video's bytes and the span", False),
        _field("video_id", pa.string(), "", False),
        _field("source", pa.string(), "", False),
        _field("name", pa.string(), "the video as a person knows it", False),
        _field("start_s", pa.float64(), "seconds from the video's first frame", False),
        _field("end_s", pa.float64(), "seconds from the video's first frame", False),
        _field("n_frames", pa.int32(), "sampled frames", False),
        _field("fps", pa.float64(), "the video's average frames/s", False),
        _field("width", pa.int32(), "pixels as displayed", False),
        _field("height", pa.int32(), "pixels as displayed", False),
        _field("codec", pa.string(), "", False),
        _field("motion", pa.float32(), "mean absolute grey difference, share of full scale"),
        _field(
            "residual_motion", pa.float32(), "motion after the camera's is taken out, share of full scale"
        ),
        _field("camera_motion", pa.float32(), "speed of the picture as a whole, picture widths per second"),
        _field("camera_confidence", pa.float32(), "of the estimate of the camera's motion, 0 to 1"),
        _field("hand_visibility", pa.float32(), "share of looked-at frames with a hand; null: not looked"),
        _field("decision", pa.string(), "kept, dropped or failed", False),
        _field("reason", pa.string(), "null when kept"),
        _field("label", pa.string(), "best prompt"),
        _field("label_score", pa.float32(), "probability among the prompts"),
        _field("labels", LABELS, "top prompts, best first"),
        _field("meta", META, "the source's own fields", False),
    ]
)

HANDS = pa.schema(
    [
        _field("clip_id", pa.string(), "", False),
        _field("frame", pa.int32(), "index within the clip's sampled frames", False),
        _field("time_s", pa.float64(), "real presentation time, from the video's first frame", False),
        _field("side", pa.string(), "left or right, the person's own", False),
        _field("score", pa.float32(), "of the side", False),
        _field("presence", pa.float32(), "score of the network that there is a hand", False),
        _field("box", pa.list_(pa.float32(), 4), "x_min, y_min, x_max, y_max; share of the frame", False),
        _field(
            "landmarks",
            pa.list_(pa.float32(), 3 * N_LANDMARKS),
            "21 x (x, y, z): x, y share of the frame, z relative to the wrist in units of x",
            False,
        ),
        _field("world", pa.list_(pa.float32(), 3 * N_LANDMARKS), "21 x (x, y, z), metres", False),
    ]
)

QUARANTINE = pa.schema(
    [
        _field("unit_id", pa.string(), "null: refused before it became work"),
        _field("video_id", pa.string()),
        _field("name", pa.string(), "", False),
        _field("stage", pa.string(), "plan, decode, hands, embed …", False),
        _field("error_class", pa.string(), "", False),
        _field("message", pa.string(), "", False),
        _field("attempts", pa.int32(), "", False),
    ]
)


def embedding(dim: int, model: str, weights: str, random: bool) -> pa.Schema:
    """One table of ``embeddings/<model>/``: clip_id and float16 [dim].

    The model, its weights and whether they are random are in the schema's metadata.
    """
    return pa.schema(
        [
            _field("clip_id", pa.string(), "", False),
            _field("embedding", pa.list_(pa.float16(), dim), "", False),
        ],
        metadata={"model": model, "weights": weights, "random": str(random).lower()},
    )
