"""LeRobot dataset v3.0 on disk: names, features, schemas. After lerobot 0.4.4, which is not needed.

Layout and names follow ``lerobot/datasets/utils.py`` and ``lerobot_dataset.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ego2robot.export import stats, video
from ego2robot.export.episode import Layout
from ego2robot.types import FrameSpec

VIDEO_KEY = "observation.images.top"
PROVENANCE = "meta/ego2robot.json"
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
GROUP_FRAMES, GROUP_EPISODES = 4096, 256  # rows of a row group
INDEX_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
# Where an episode comes from; the rest of a row is LeRobot's.
ORIGIN: list[tuple[str, pa.DataType]] = [
    ("clip_id", pa.string()),
    ("video", pa.string()),
    ("start_s", pa.float64()),
    ("end_s", pa.float64()),
    ("skill_id", pa.int64()),
    ("skill", pa.string()),
    ("motion", pa.float64()),
    ("hand_visibility", pa.float64()),
    ("label", pa.string()),
    ("label_score", pa.float64()),
]


def features(layout: Layout, spec: FrameSpec, fps: int, codec: str) -> dict[str, dict[str, Any]]:
    """``features`` of info.json, in LeRobot's order. ``units`` is ours, for people."""
    picture = {
        "dtype": "video",
        "shape": [spec.height, spec.width, 3],
        "names": ["height", "width", "channels"],
        "info": {
            "video.height": spec.height,
            "video.width": spec.width,
            "video.codec": video.CODECS[codec].name,
            "video.pix_fmt": video.PIX_FMT,
            "video.is_depth_map": False,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
        },
    }
    vectors = {
        name: {"dtype": "float32", "shape": [len(columns)], "names": list(columns), "units": layout.units}
        for name, columns in layout.vectors.items()
    }
    if "observation.known" in vectors:
        vectors["observation.known"]["units"] = "share of the columns that were known in this frame"
    scalars = {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in INDEX_FEATURES.items()}
    return {VIDEO_KEY: picture, **vectors, **scalars}


def vector_field(name: str, size: int) -> pa.Field:
    return pa.field(name, pa.list_(pa.float32(), size))


def vector_schema(layout: Layout) -> pa.Schema:
    """Of an episode's own numbers, which do not depend on where it lies in the dataset."""
    return pa.schema([vector_field(name, len(columns)) for name, columns in layout.vectors.items()])


def data_schema(described: Mapping[str, Mapping[str, Any]]) -> pa.Schema:
    """Of the data files: every feature but video, with the types that ``datasets`` should give them."""
    fields, types = [], {}
    for name, feature in described.items():
        if feature["dtype"] == "video":
            continue
        value = {"dtype": feature["dtype"], "_type": "Value"}
        if name in INDEX_FEATURES:
            fields.append(pa.field(name, getattr(pa, feature["dtype"])()))
            types[name] = value
        else:
            size = feature["shape"][0]
            fields.append(vector_field(name, size))
            types[name] = {"feature": value, "length": size, "_type": "Sequence"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": types}})})


def statistics_fields(name: str, dtype: str) -> list[tuple[str, pa.DataType]]:
    """``stats/<name>/…`` of ``meta/episodes``."""
    found = []
    for statistic in stats.NAMES:
        whole = statistic == "count" or (statistic in ("min", "max") and dtype == "int64")
        kind = pa.list_(pa.int64() if whole else pa.float64())
        if dtype == "video" and statistic != "count":
            kind = pa.list_(pa.list_(kind))
        found.append((f"stats/{name}/{statistic}", kind))
    return found


def episode_schema(described: Mapping[str, Mapping[str, Any]]) -> pa.Schema:
    """Of ``meta/episodes``: LeRobot's columns, and where each episode comes from."""
    fields: list[tuple[str, pa.DataType]] = [
        ("episode_index", pa.int64()),
        ("tasks", pa.list_(pa.string())),
        ("length", pa.int64()),
        ("data/chunk_index", pa.int64()),
        ("data/file_index", pa.int64()),
        ("dataset_from_index", pa.int64()),
        ("dataset_to_index", pa.int64()),
        (f"videos/{VIDEO_KEY}/chunk_index", pa.int64()),
        (f"videos/{VIDEO_KEY}/file_index", pa.int64()),
        (f"videos/{VIDEO_KEY}/from_timestamp", pa.float64()),
        (f"videos/{VIDEO_KEY}/to_timestamp", pa.float64()),
        *ORIGIN,
    ]
    for name, feature in described.items():
        fields += statistics_fields(name, feature["dtype"])
    fields += [("meta/episodes/chunk_index", pa.int64()), ("meta/episodes/file_index", pa.int64())]
    return pa.schema(fields)


def staged_schema(layout: Layout) -> pa.Schema:
    """Of what a unit of work says about its episodes before they have numbers.

    ``row`` is the plan's; ``part`` and ``first`` say in which of the unit's videos an episode begins, and
    at which frame.
    """
    fields = [("row", pa.int64()), ("part", pa.int64()), ("first", pa.int64())]
    fields += statistics_fields(VIDEO_KEY, "video")
    for name in layout.vectors:
        fields += statistics_fields(name, "float32")
    return pa.schema(fields)


def vectors_table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    """float32 [n, D] arrays as a table of ``schema``."""
    arrays = [
        pa.FixedSizeListArray.from_arrays(pa.array(columns[f.name].ravel(), pa.float32()), f.type.list_size)
        for f in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def tasks_table(tasks: Sequence[str]) -> pa.Table:
    """``task_index`` by task; pandas reads it with the task as index, as LeRobot expects."""
    names = (
        {"name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
        {"name": "task", "pandas_type": "unicode", "numpy_type": "object"},
    )
    heading = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object"}
    # https://pandas.pydata.org/docs/development/developer.html#storing-pandas-dataframe-objects
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [{**heading, "metadata": {"encoding": "UTF-8"}}],
        "columns": [{**column, "field_name": column["name"], "metadata": None} for column in names],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    fields = [pa.field("task_index", pa.int64()), pa.field("task", pa.string())]
    return pa.table(
        [list(range(len(tasks))), list(tasks)],
        schema=pa.schema(fields, metadata={"pandas": json.dumps(pandas)}),
    )
