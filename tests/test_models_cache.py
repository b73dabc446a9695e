"""The cache of model files: what is fetched is checked, what is damaged is noticed and mended."""

from __future__ import annotations

import multiprocessing
import subprocess
import zipfile
from pathlib import Path

import pytest

from ego2robot import models
from ego2robot.errors import UserError


@pytest.fixture(scope="session")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that ``pull`` filled from PyPI."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EGO2ROBOT_CACHE", str(cache))
        said: list[str] = []
        try:
            path = models.pull(said.append)
        except UserError as error:
            pytest.skip(f"PyPI cannot be reached: {error}")
        assert path == cache / "models" / "mediapipe-hands-0.10.21"
        assert any("mediapipe==0.10.21" in text for text in said)
    return cache


@pytest.fixture
def cache(pulled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that a test may damage; the network is out of reach."""
    target = tmp_path / "cache"
    for path in pulled.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(pulled)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    monkeypatch.setenv("EGO2ROBOT_CACHE", str(target))
    _cut_network(monkeypatch)
    return target


@pytest.fixture
def wheel(pulled: Path, tmp_path: Path) -> Path:
    """A wheel file with the two networks at their places, as the real one has them."""
    folder = next((pulled / "models").iterdir())
    path = tmp_path / "mediapipe-0.10.21-cp311-cp311-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("mediapipe/__init__.py", "")
        for network in models.NETWORKS:
            archive.write(folder / network.file, network.in_wheel)
    return path


def states() -> list[str]:
    """Of the two networks that the default recipe needs."""
    return [f.state for f in models.installed() if f.needed]


def _cut_network(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    patch.setenv("PIP_EXTRA_INDEX_URL", "")
    patch.setenv("PIP_RETRIES", "0")
    patch.setenv("PIP_NO_CACHE_DIR", "1")
    patch.setenv("PIP_CONFIG_FILE", "/dev/null")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EGO2ROBOT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert models.cache_folder() == tmp_path / ".cache" / "ego2robot"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache_folder() == tmp_path / "xdg" / "ego2robot"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert models.cache_folder() == tmp_path / ".cache" / "ego2robot"
    monkeypatch.setenv("EGO2ROBOT_CACHE", str(tmp_path / "own"))
    assert models.cache_folder() == tmp_path / "own"


def test_damage_that_cannot_be_mended_is_named_with_the_ways_out(cache: Path, wheel: Path) -> None:
    folder = models.hands_folder()
    network = folder / "hand_landmark_full.tflite"
    network.write_bytes(network.read_bytes()[:-1] + b"!")
    assert states() == ["ok", "corrupt"]
    with pytest.raises(UserError, match=r"damaged.*ego2robot models pull.*--wheel") as caught:
        models.hand_networks("full")
    assert "\n" not in str(caught.value)
    models.pull(wheel=wheel)
    assert states() == ["ok", "ok"]


def test_nothing_there_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGO2ROBOT_CACHE", str(tmp_path / "empty"))
    _cut_network(monkeypatch)
    assert states() == ["missing", "missing"]
    with pytest.raises(UserError, match=r"no such model file.*ego2robot models pull.*--wheel"):
        models.hand_networks("full")
    with pytest.raises(UserError, match=r"mediapipe==0\.10\.21: cannot be downloaded.*--wheel") as caught:
        models.hand_networks("full", pull_if_missing=True)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "empty").rglob("*.tflite"))


def test_wheels_that_will_not_do(cache: Path, wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.whl: cannot be read"):
        models.pull(wheel=tmp_path / "nowhere.whl")
    text = tmp_path / "text.whl"
    text.write_text("not a zip")
    with pytest.raises(UserError, match=r"text\.whl: not a sound wheel"):
        models.pull(wheel=text)
    cut = tmp_path / "cut.whl"
    cut.write_bytes(wheel.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"cut\.whl: not a sound wheel"):
        models.pull(wheel=cut)
    new = tmp_path / "mediapipe-1.2.2.whl"
    with zipfile.ZipFile(new, "w") as archive:
        archive.writestr("mediapipe/__init__.py", "")
    with pytest.raises(UserError, match=r"has no mediapipe/modules/palm_detection.*mediapipe==0\.10\.21"):
        models.pull(wheel=new)
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        for network in models.NETWORKS:
            archive.writestr(network.in_wheel, bytes(network.size))
    with pytest.raises(UserError, match="wrong checksum"):
        models.pull(wheel=other)
    assert states() == ["ok", "ok"]


def test_a_cache_that_cannot_be_written(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EGO2ROBOT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written.*EGO2ROBOT_CACHE"):
        models.pull(wheel=wheel)


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGO2ROBOT_CACHE", str(tmp_path))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no pip.*ensurepip.*--wheel"):
        models.pull()


def test_a_download_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setenv("EGO2ROBOT_CACHE", str(tmp_path))
    monkeypatch.setattr(models.subprocess, "run", hang)
    with pytest.raises(UserError, match="no download within"):
        models.pull()


def _pull(wheel: Path, rounds: int) -> None:
    for _ in range(rounds):
        models.pull(wheel=wheel)
        assert states() == ["ok", "ok"]


def test_processes_may_pull_at_once(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EGO2ROBOT_CACHE", str(tmp_path / "shared"))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_pull, args=(wheel, 2)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    folder = models.hands_folder()
    assert sorted(p.name for p in folder.iterdir()) == sorted(n.file for n in models.NETWORKS)
