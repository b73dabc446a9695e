"""What `ego2robot export trajectories` is told: a YAML file and flags, with the keys of the RFM project's
own (``dataset_upload/configs/data_gen_configs/egodex.yaml``), so that its files can be used as they are."""

from __future__ import annotations

import difflib
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from ego2robot import config
from ego2robot.config import PositiveInt, section
from ego2robot.errors import UserError
from ego2robot.trajectories import MAX_FRAMES, SIZE, Choice

PUSH = "ego2robot push OUT REPO"


def _all(value: Any) -> Any:
    return None if value == -1 else value


def _must(wanted: bool, why: str) -> AfterValidator:
    def check(value: bool) -> bool:
        if value != wanted:
            raise ValueError(why)
        return value

    return AfterValidator(check)


OrAll = Annotated[PositiveInt | None, BeforeValidator(_all)]  # -1 and null: all


@section
class Dataset:
    """``dataset_name``: of the part in the folder; by default the kind and the last folder of the path, or
    with ``output.strip_metadata`` that folder's pseudonym."""

    dataset_path: str = ""
    dataset_name: str | None = None
    kind: str = "egodex"  # of the source
    annotations: str = ""  # the dataset's annotation file, where it does not lie with the videos
    frame: Literal["world", "camera"] = "world"  # of the poses that actions are made of


@section
class Output:
    output_dir: str = ""
    max_trajectories: OrAll = None
    max_frames: OrAll = MAX_FRAMES
    size: config.EvenInt = SIZE  # height and width of the frames, pixels; they are stretched
    # Pixels, instead of ``size``: keeps the form of the picture, as the project's present code does.
    shortest_edge_size: Annotated[int, Field(ge=32, le=4096)] | None = None
    center_crop: Annotated[bool, _must(False, "pictures are not cropped")] = False
    fps: Annotated[int, Field(ge=1, le=240)] = 30  # at which the few frames play; times are kept beside them
    use_video: Annotated[bool, _must(True, "frames are always the bytes of an mp4")] = True
    blur_faces: bool = False  # cover the faces that are found
    strip_metadata: bool = False  # pseudonyms for names of recordings and their folders
    num_workers: Annotated[int, Field(ge=-1, le=1024)] = -1  # processes; -1: one a core


@section
class Hub:
    push_to_hub: Annotated[bool, _must(False, f"publish afterwards: {PUSH}")] = False
    hub_repo_id: str | None = None  # not used here: it is an argument of `ego2robot push`


@section
class Settings:
    """All of it."""

    dataset: Dataset = Dataset()
    output: Output = Output()
    hub: Hub = Hub()

    @property
    def part_name(self) -> str:
        if self.dataset.dataset_name:
            return self.dataset.dataset_name.lower()
        last = re.sub(r"[^a-z0-9_.-]+", "_", Path(self.dataset.dataset_path).name.lower()).strip("._-")
        return f"{self.dataset.kind}_{last}".rstrip("_")[:96]

    def called(self, name: str) -> Settings:
        """These settings with a name for the part."""
        dataset = {**vars(self.dataset), "dataset_name": name}
        return ADAPTER.validate_python({"dataset": dataset, "output": self.output, "hub": self.hub})

    @property
    def choice(self) -> Choice:
        d, o = self.dataset, self.output
        return Choice(
            d.kind, o.max_frames, o.size, o.shortest_edge_size, d.frame, d.annotations, o.blur_faces
        )

    @property
    def workers(self) -> int:
        n = self.output.num_workers
        return len(os.sched_getaffinity(0)) if n < 0 else max(1, n)

    def frozen(self) -> dict[str, Any]:
        """What decides what comes out, but for where the source lies and how much of it is taken."""
        d, o = self.dataset, self.output
        size = [o.size, o.size] if o.shortest_edge_size is None else o.shortest_edge_size
        return {
            "kind": d.kind,
            "frame": d.frame,
            "max_frames": o.max_frames,
            "size": size,
            "fps": o.fps,
            "blur_faces": o.blur_faces or None,  # None: as before there was a choice
            "strip_metadata": o.strip_metadata or None,
        }


ADAPTER = TypeAdapter(Settings)
SECTIONS = {item.name: typing.get_type_hints(Settings)[item.name] for item in fields(Settings)}  # type: ignore[arg-type]
KEYS = [f"{name}.{item.name}" for name, cls in SECTIONS.items() for item in fields(cls)]


def load(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Reads a YAML file (None: nothing), then sets ``overrides``, such as ``output.max_frames``.

    Raises:
        UserError: no such file, not YAML, or a wrong key or value, one line each.
    """
    tree: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    if path is not None:
        for key, value in _read(Path(path)).items():
            _check(key, str(path))
            name, _, leaf = key.partition(".")
            tree[name][leaf] = value
    for key, value in (overrides or {}).items():
        _check(key, "command line")
        name, _, leaf = key.partition(".")
        tree[name][leaf] = value
    for key, words in (("dataset.dataset_path", "SOURCE"), ("output.output_dir", "OUT")):
        name, _, leaf = key.partition(".")
        if not tree[name].get(leaf):
            raise UserError(f"{key} is not set; give {words}, or --{key}=…")
        tree[name][leaf] = str(tree[name][leaf])
    try:
        return ADAPTER.validate_python(tree)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"][:2])
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{path or 'command line'}: {key}={item.get('input')!r}: {message}")
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def flags(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Tells ``--output.max_frames=16``, ``--output.max_frames 16``, ``output.max_frames=16`` from the rest.

    Returns:
        The rest in order, and the keys with their values (read as YAML).

    Raises:
        UserError: an option of no section, or one without a value.
    """
    rest: list[str] = []
    found: dict[str, Any] = {}
    waiting = list(arguments)
    while waiting:
        item = waiting.pop(0)
        dashed = item.startswith("--")
        key, equals, text = item.removeprefix("--").partition("=")
        if key.partition(".")[0] not in SECTIONS or "." not in key or not (dashed or equals):
            if item.startswith("-") and len(item) > 1:
                raise UserError(f"no option {item!r}; keys are set like --output.max_frames=32")
            rest.append(item)
            continue
        if not equals:
            if not waiting:
                raise UserError(f"{item}: a value is missing; such as --{key}=…")
            text = waiting.pop(0)
        try:
            found[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            found[key] = text
        if found[key] is None and text.strip() not in ("null", "~"):
            found[key] = text
    return rest, found


def _read(path: Path) -> dict[str, Any]:
    """``{"output.max_frames": 32}`` of a file."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict | None):
        raise UserError(f"{path}: should be a mapping of {', '.join(SECTIONS)}")
    flat: dict[str, Any] = {}
    for name, values in (tree or {}).items():
        if name in SECTIONS and values is None:
            continue
        if name not in SECTIONS or not isinstance(values, dict):
            raise UserError(f"{path}: no section {name!r} (sections: {', '.join(SECTIONS)})")
        flat |= {f"{name}.{key}": value for key, value in values.items()}
    return flat


def _check(key: str, origin: str) -> None:
    if key in KEYS:
        return
    if key.rpartition(".")[2] == "hub_token":
        raise UserError(f"{origin}: no token here; log in with `hf auth login`, then {PUSH}")
    near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.5)
    raise UserError(
        f"{origin}: no key {key!r}"
        + (f"; did you mean {near[0]!r}?" if near else f" (keys: {', '.join(KEYS)})")
    )
