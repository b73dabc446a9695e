"""One tree of frozen dataclasses: a recipe in YAML plus ``key=value`` from the command line.

Every key that exists is here, with its unit and its default. A wrong key or value is refused before
any work starts, in one line that names the nearest right one.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as _dataclass

from ego2robot.errors import UserError

REFERENCE_PROMPTS = (
    "picking up an object",
    "placing an object down",
    "assembling components together",
    "tightening a screw",
    "inspecting quality of a part",
    "packaging items into a box",
    "moving materials between locations",
    "wiping or cleaning a surface",
    "measuring or marking",
    "operating machinery",
)
SEARCH_PATH = (Path(__file__).parent / "configs", Path(__file__).parent.parent / "configs")

section = _dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


def _even(value: int) -> int:
    if value % 2:
        raise ValueError("must be even (video encoders subsample colour by two)")
    return value


EvenInt = Annotated[int, Field(ge=32, le=4096), AfterValidator(_even)]


@section
class Quantile:
    """A threshold relative to this run's own clips: 0.7 keeps the upper 30 %."""

    quantile: Share


@section
class Source:
    """Where videos come from. ``path``: a file, a folder or a glob, here or at an address (``s3://`` …)."""

    kind: Literal[
        "folder",
        "egocentric10k",
        "egodex",
        "epic_kitchens",
        "ego4d",
        "hot3d",
        "aria",
        "lerobot",
        "manifest",
    ] = "folder"
    path: str = ""
    annotations: str = ""  # the dataset's annotation file, where it does not lie with the videos
    frame: Literal["world", "camera"] = "camera"  # that the dataset's own poses are given in
    camera: str = ""  # the video of a LeRobot dataset, such as observation.images.top; else its first
    limit: PositiveInt | None = None  # only the first so many videos, in name order
    # GiB on disk for what is read from afar, under the cache folder; what was not used for longest goes.
    cache_gib: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20.0


@section
class Clips:
    """How a video is cut. The grid has ``sample_fps`` frames a second; clips lie on it.

    ``policy``: ``windows`` of one length, the spans that the dataset has ``annotated``, or the ``whole``
    video; ``auto`` is ``annotated`` for videos of which the dataset gives spans, else ``windows``.
    """

    policy: Literal["auto", "windows", "annotated", "whole"] = "auto"
    duration_s: Positive = 6.0
    stride_s: Positive = 30.0  # from one clip's start to the next
    sample_fps: Annotated[float, Field(gt=0, le=240)] = 6.0
    min_frames: Annotated[int, Field(ge=2)] = 10  # the last clip of a video may be this short
    max_s: Positive = 60.0  # annotated spans and whole videos that last longer are cut in equal parts
    shots: bool = False  # look for cuts when planning; no clip goes across one


@section
class Frames:
    """The picture that all consumers share, pixels."""

    height: EvenInt = 360
    width: EvenInt = 640
    fit: Literal["letterbox", "stretch"] = "letterbox"
    undistort: bool = False  # exported pictures and landmarks, where the dataset gives a fisheye camera


@section
class Triage:
    """A first look at packet sizes and keyframes that rules out clips before they are decoded."""

    enabled: bool = False
    recall: Share = 0.99  # of kept clips; where less is estimated, a source is decoded in full
    audit: Share = 0.05  # of the clips that were ruled out: decoded after all, to estimate that recall
    calibrate_clips: PositiveInt = 400  # of each kind of footage: decoded in full, the rule is fitted to them
    max_keyframe_gap_s: Positive = 4.0  # footage with longer groups of pictures is decoded in full


@section
class Decode:
    backend: Literal["auto", "pyav", "nvdec", "cuvid", "torchcodec", "pynvvideocodec", "dali", "decord"] = (
        "auto"
    )
    mode: Literal["exact", "fast"] = "exact"  # fast: what no other frame refers to may be left out
    streams: Annotated[int, Field(ge=1, le=64)] = 12  # units decoded at once on each GPU
    timeout_s: Positive = 600.0  # one unit of work without a finished clip for so long is given up
    triage: Triage = Triage()


@section
class Hands:
    """``detector``: MediaPipe's networks ``full``, or ``lite`` (faster, less sure), or ``none``."""

    detector: Literal["full", "lite", "none"] = "full"
    precision: Literal["auto", "float32", "half"] = "auto"  # half where the machine is faster in it
    every: PositiveInt = 3  # visibility looks at every so many-th frame of a clip
    max_hands: Annotated[int, Field(ge=1, le=4)] = 2
    min_detection: Share = 0.5
    min_presence: Share = 0.5
    dense: bool = True  # landmarks on every frame of clips that are kept, for export
    max_gap: Annotated[int, Field(ge=0, le=60)] = (
        2  # frames without a hand: looked at again, then interpolated
    )


@section
class Gate:
    """A clip is kept when all hold; ``{quantile: q}`` sets a threshold from this run's clips.

    ``motion`` is the reference's, which a turning head raises; ``residual_motion`` is what is left of it
    after the camera's own; ``camera_motion`` is the camera's, in picture widths per second.
    """

    min_motion: Quantile | Share = 0.1
    min_residual_motion: Quantile | Share = 0.0
    max_camera_motion: Quantile | Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    min_hand_visibility: Quantile | Share = 0.3
    calibrate_clips: PositiveInt = 2000  # quantiles are taken over at most so many clips


@section
class VideoMAE:
    """``weights``: hub id, local folder, ``random`` (must be asked for) or ``none``."""

    weights: str = "MCG-NJU/videomae-base"
    pooling: Literal["mean", "first_token"] = "mean"
    batch_size: Annotated[int, Field(ge=0)] = 0  # clips; 0: what suits the device


@section
class CLIP:
    """``weights``: hub id, local folder, ``random`` (must be asked for) or ``none``."""

    weights: str = "openai/clip-vit-base-patch32"
    n_frames: Annotated[int, Field(ge=1, le=64)] = 3  # spread over the clip, embeddings averaged
    batch_size: Annotated[int, Field(ge=0)] = 0  # clips; 0: what suits the device


@section
class Embed:
    videomae: VideoMAE = VideoMAE()
    clip: CLIP = CLIP()
    hand_motion: bool = True  # needs no weights: from the landmarks


@section
class Labels:
    prompts: Annotated[tuple[str, ...], Field(min_length=1)] = REFERENCE_PROMPTS
    top_k: PositiveInt = 2


@section
class Skills:
    k: PositiveInt = 10
    embedding: Literal["auto", "videomae", "clip", "hand_motion"] = "auto"
    also_k: tuple[PositiveInt, ...] = ()  # further numbers of clusters, found in the same pass
    metric: Literal["euclidean", "cosine"] = "euclidean"  # cosine: spherical k-means
    backend: Literal["auto", "torch", "faiss", "cuml"] = "auto"
    restarts: PositiveInt = 10  # starts; one where sampled clips times k exceed 4 million
    sample_rows: Annotated[int, Field(ge=1000)] = 262_144  # centroids are found on at most so many clips
    sample_mib: PositiveInt = 512  # and at most so many MiB of their vectors
    duplicate_cosine: Annotated[float, Field(gt=0, le=1)] | None = 0.99  # null: none are looked for
    projections: tuple[Literal["tsne", "umap"], ...] = ("tsne", "umap")


@section
class Export:
    """The LeRobot dataset that ``run`` writes at the end. ``path`` defaults to RUN/dataset."""

    enabled: bool = True
    path: str = ""
    top: PositiveInt = 50  # at most so many episodes, best first
    # hands, reference: of the hands that are seen; native: the dataset's own; auto: that where it gives one
    schema: Literal["auto", "hands", "reference", "native"] = "auto"
    action: Literal["compensated", "wrist"] = "compensated"  # without or with the camera's own motion
    smooth: Literal["none", "action", "all"] = "action"  # One-Euro filter; on states it lags the picture
    codec: Literal["av1", "h264"] = "av1"
    blur_faces: bool = False  # covers the faces that are found; some are missed, see export/privacy.py
    strip_metadata: bool = False  # no names of videos, people, places; pseudonyms keep them apart


@section
class Work:
    """How the processes of a run share its work; see ``docs/scaling.md``."""

    lease_s: Positive = 60.0  # a worker who shows no sign of life for so long has died
    commit_s: Positive = 30.0  # what is complete is committed so often: the most that a crash loses
    attempts: PositiveInt = 3  # at a file that is missing or cannot be read, or where memory did not suffice
    backoff_s: Positive = 10.0  # before the second attempt; doubled before each further one


@section
class Config:
    """A whole recipe."""

    source: Source = Source()
    run_dir: str = ""
    clips: Clips = Clips()
    frames: Frames = Frames()
    decode: Decode = Decode()
    hands: Hands = Hands()
    gate: Gate = Gate()
    embed: Embed = Embed()
    labels: Labels = Labels()
    skills: Skills = Skills()
    export: Export = Export()
    work: Work = Work()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    workers: Annotated[int, Field(ge=0, le=1024)] = 0  # processes that decode on CPUs; 0: one per core
    gpus: Annotated[int, Field(ge=0, le=64)] = 0  # with device=cuda: so many; 0: all that are there


ADAPTER = TypeAdapter(Config)
# What may differ between two starts of one run: where and how fast, never what comes out.
EXECUTION_KEYS = (
    "run_dir",
    "source.cache_gib",
    "workers",
    "gpus",
    "decode.timeout_s",
    "decode.streams",
    "work.lease_s",
    "work.commit_s",
    "work.attempts",
    "work.backoff_s",
)


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of a configuration, ready for YAML or JSON."""
    return typing.cast(dict[str, Any], _plain(ADAPTER.dump_python(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"clips": {"stride_s": 6}}`` to ``{"clips.stride_s": 6}``; a quantile stays one value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and set(value) != {"quantile"}:
            flat |= flatten(value, name + ".")
        else:
            flat[name] = value
    return flat


def recipes() -> dict[str, Path]:
    """The recipes that can be named, from the installed package or the checkout."""
    found: dict[str, Path] = {}
    for folder in SEARCH_PATH:
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def load(recipe: str, overrides: Iterable[str] = ()) -> Config:
    """Reads a recipe by name or path and applies ``key=value`` overrides.

    Raises:
        UserError: no such recipe, not YAML, or a wrong key or value.
    """
    named = recipes()
    path = named.get(recipe) or Path(recipe)
    if not path.is_file():
        near = difflib.get_close_matches(recipe, named, n=1)
        raise UserError(
            f"no recipe {recipe!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f" (recipes: {', '.join(sorted(named))}, or the path of a YAML file)"
        )
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys, this is a {type(tree).__name__}")
    return build(apply(tree, overrides), str(path))


def apply(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of ``tree`` with ``a.b=value`` set; values are YAML."""
    tree = _plain(tree)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise UserError(f"{item!r}: overrides look like key=value, such as clips.stride_s=6")
        _check_key(key)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        # `weights=none` and `path=` mean the words, not YAML's null.
        if value is None and text.strip() not in ("null", "~"):
            value = text
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            child = node.get(parent)
            if not isinstance(child, dict):
                child = node[parent] = {}
            node = child
        node[leaf] = value
    return tree


def build(tree: Mapping[str, Any], origin: str = "configuration") -> Config:
    """Validates a nested mapping. Raises UserError in one line per wrong key or value."""
    for key in _keys_of(tree):
        _check_key(key, origin)
    try:
        return ADAPTER.validate_python(tree)
    except ValidationError as error:
        raise UserError("\n".join(_explain(error, tree, origin))) from None


def known_keys() -> list[str]:
    """Every key of a recipe, such as ``clips.stride_s``."""
    return list(flatten(to_dict(Config())))


def _keys_of(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys of a user's tree, as far down as the configuration has sections."""
    found = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in SECTIONS and isinstance(value, Mapping):
            found += _keys_of(value, name + ".")
        else:
            found.append(name)
    return found


def _sections(cls: Any, prefix: str = "") -> list[str]:
    hints = typing.get_type_hints(cls)
    found = []
    for item in fields(cls):
        if is_dataclass(hints[item.name]):
            found += [prefix + item.name, *_sections(hints[item.name], f"{prefix}{item.name}.")]
    return found


SECTIONS = frozenset(_sections(Config))


def _check_key(key: str, origin: str = "") -> None:
    known = known_keys()
    if key in known or key in SECTIONS:
        return
    if key.endswith(".quantile") and key.removesuffix(".quantile") in known:
        return
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or [
        k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]
    ]
    raise UserError(
        (f"{origin}: " if origin else "")
        + f"no key {key!r}"
        + (f"; did you mean {near[0]!r}?" if near else f" (keys: {', '.join(known)})")
    )


def _explain(error: ValidationError, tree: Mapping[str, Any], origin: str) -> list[str]:
    lines: dict[str, str] = {}
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        known = set(known_keys()) | SECTIONS
        while path and ".".join(path) not in known:
            path.pop()
        key = ".".join(path)
        value = flatten(tree).get(key, item.get("input"))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "literal_error" and isinstance(value, str):
            options = [o.strip("' ") for o in item["ctx"]["expected"].replace(" or ", ", ").split(",")]
            near = difflib.get_close_matches(value, options, n=1)
            message = f"should be one of {', '.join(options)}" + (
                f"; did you mean {near[0]!r}?" if near else ""
            )
        if key.startswith("gate.min_"):
            message = "should be a number from 0 to 1, or {quantile: 0 to 1}"
        if key == "gate.max_camera_motion":
            message = "should be picture widths per second, {quantile: 0 to 1}, or null for any"
        lines.setdefault(key, f"{origin}: {key}={value!r}: {message}")
    return list(lines.values())


def check_together(cfg: Config) -> None:
    """Refuses settings that are right alone and wrong together. Raises UserError."""
    if not cfg.run_dir:
        raise UserError("run_dir is not set; add run_dir=runs/NAME")
    made = {
        "videomae": cfg.embed.videomae.weights != "none",
        "clip": cfg.embed.clip.weights != "none",
        "hand_motion": cfg.embed.hand_motion and cfg.hands.detector != "none",
    }
    wanted = cfg.skills.embedding
    if wanted != "auto" and not made[wanted]:
        raise UserError(
            f"skills.embedding={wanted}: this recipe makes no such embedding "
            f"(it makes: {', '.join(name for name in made if made[name]) or 'none'})"
        )
    if cfg.export.enabled and cfg.clips.sample_fps != round(cfg.clips.sample_fps):
        raise UserError(
            f"clips.sample_fps={cfg.clips.sample_fps:g}: LeRobot datasets have whole frames/s; "
            "choose a whole number, or export.enabled=false"
        )
    if cfg.hands.detector == "none" and isinstance(cfg.gate.min_hand_visibility, Quantile):
        raise UserError("gate.min_hand_visibility is a quantile, but hands.detector=none looks for no hands")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """``key: old → new`` for every key that decides what comes out and differs."""
    a, b = flatten(old), flatten(new)
    return [
        f"{key}: {a.get(key, '(unset)')} → {b.get(key, '(unset)')}"
        for key in sorted(a.keys() | b.keys())
        if key not in EXECUTION_KEYS and a.get(key) != b.get(key)
    ]
