import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from ego2robot import blobs, decode
from ego2robot.blobs import local_blob, open_blob
from ego2robot.decode.pyav import PyAV
from ego2robot.errors import UserError, VideoError
from ego2robot.remote import RemoteError, objects, shown
from ego2robot.remote import cache as cache_module
from ego2robot.remote.address import is_remote, joined, local_path
from ego2robot.remote.cache import DiskCache
from ego2robot.remote.errors import explain
from ego2robot.sources import SOURCES
from ego2robot.sources.base import identity
from ego2robot.types import Blob, Clip, FrameSpec
from tests.footage import frame_number, write_video
from tests.store_server import serving

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")
SPEC = FrameSpec(96, 160)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EGO2ROBOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(objects, "FIRST_WAIT_S", 0.01)
    objects._stats.clear()
    objects.configure(1.0)
    yield
    objects.configure(1.0)


@pytest.fixture
def store(tmp_path):
    (tmp_path / "files").mkdir()
    with serving(tmp_path / "files") as found:
        yield found


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A video of some blocks: noise makes it large."""
    noise = np.random.default_rng(0).integers(0, 80, (96, 640, 640, 3), np.uint8)

    def picture(i, width, height):
        from tests.footage import textured_frame

        frame = textured_frame(i, width, height)
        frame[height // 6 :] = frame[height // 6 :] // 2 + noise[i % 96][: height - height // 6, :width]
        return frame

    path = tmp_path_factory.mktemp("video") / "noise.mp4"
    return write_video(path, 90, 640, 360, gop=15, crf=14, picture=picture)


def random_file(path, size):
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return data


def numbers(blob, times):
    info = decode.probe("v", blob)
    batches = PyAV().read("v", blob, info, np.asarray(times), FrameSpec(360, 640), "cpu")
    return [frame_number(frame) for batch in batches for frame in batch.frames_THWC.numpy()]


# -- reading --------------------------------------------------------------------------------------


def test_any_range_of_a_remote_file_is_what_the_file_holds(store):
    data = random_file(store.root / "a.bin", 5 * objects.BLOCK + 1234)
    file = open_blob(Blob(f"{store.url}/a.bin", 0, len(data)))
    random = np.random.default_rng(1)
    for _ in range(30):
        at, n = int(random.integers(0, len(data) + 10)), int(random.integers(0, 2 * objects.BLOCK))
        file.seek(at)
        assert file.read(n) == data[at : at + n]
    part = open_blob(Blob(f"{store.url}/a.bin", 1000, 5000, False))
    part.seek(-10, 2)
    assert part.read() == data[5990:6000] and part.read(1) == b""


def test_a_file_that_is_read_in_order_is_fetched_ahead_in_growing_requests_and_each_byte_once(store):
    data = random_file(store.root / "a.bin", 20 * objects.BLOCK)
    file = open_blob(Blob(f"{store.url}/a.bin", 0, len(data)))
    assert b"".join(iter(lambda: file.read(1 << 18), b"")) == data
    assert store.bytes_asked() == len(data)
    assert len(store.gets()) <= 7


def test_blocks_are_kept_on_disk_and_not_asked_for_again_by_the_next_reader(store):
    data = random_file(store.root / "a.bin", 3 * objects.BLOCK)
    blob = Blob(f"{store.url}/a.bin", 0, len(data))
    assert open_blob(blob).read() == data
    asked = store.bytes_asked()
    assert open_blob(blob).read() == data and store.bytes_asked() == asked


def test_a_file_that_was_replaced_is_not_mixed_with_what_was_kept_of_the_old_one(store, monkeypatch):
    monkeypatch.setattr(objects, "STAT_S", 0.0)
    old = random_file(store.root / "a.bin", 2 * objects.BLOCK)
    blob = Blob(f"{store.url}/a.bin", 0, len(old))
    assert open_blob(blob).read(10) == old[:10]
    new = old[::-1]
    (store.root / "a.bin").write_bytes(new)
    assert open_blob(blob).read() == new


def test_a_video_far_away_gives_the_frames_of_the_local_file_and_is_not_fetched_whole(store, video):
    (store.root / "v.mp4").write_bytes(video.read_bytes())
    size = video.stat().st_size
    assert size > 5 * objects.BLOCK
    remote, local = Blob(f"{store.url}/v.mp4", 0, size), Blob(str(video), 0, size)
    assert decode.probe("v", remote) == decode.probe("v", local)
    assert identity(remote) == identity(local)  # a web server has no checksum that could be believed
    times = [0.0, 0.1, 2.8]
    assert numbers(remote, times) == numbers(local, times) == [0, 3, 84]


def test_a_member_of_a_remote_tar_is_read_in_place(store, video):
    data = video.read_bytes()
    with tarfile.open(store.root / "a.tar", "w") as tar:
        for name, body in [("x.bin", b"x" * 999), ("k.mp4", data), ("y.bin", b"y" * 4_000_000)]:
            member = tarfile.TarInfo(name)
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))
    (found,) = [c for c in SOURCES["egocentric10k"].candidates(f"{store.url}/a.tar", None) if c.blob]
    assert identity(found.blob) == identity(Blob(str(video), 0, len(data)))
    assert numbers(found.blob, [0.5, 1.0]) == [15, 30]


def test_decoders_that_only_open_files_get_one_from_the_cache(store, video):
    from ego2robot.decode.torchcodec import TorchCodec

    (store.root / "v.mp4").write_bytes(video.read_bytes())
    blob = Blob(f"{store.url}/v.mp4", 0, video.stat().st_size)
    here = local_blob(blob)
    assert Path(here.path).read_bytes() == video.read_bytes() and here.whole_file
    assert str(cache_module.__name__) and Path(here.path).is_relative_to(os.environ["EGO2ROBOT_CACHE"])
    Path(here.path).write_bytes(b"?" * here.size)  # damaged: fetched again
    assert Path(local_blob(blob).path).read_bytes() == video.read_bytes()
    if TorchCodec().missing() is None:
        info = decode.probe("v", blob)
        (batch,) = TorchCodec().read("v", blob, info, np.array([1.0]), FrameSpec(360, 640), "cpu")
        assert frame_number(batch.frames_THWC[0].numpy()) == 30


# -- trouble --------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [500, 503, 429, "cut"])
def test_what_fails_for_a_while_is_fetched_again(store, video, trouble):
    (store.root / "v.mp4").write_bytes(video.read_bytes())
    store.trouble = lambda path, n: trouble if n % 2 == 0 else None
    blob = Blob(f"{store.url}/v.mp4", 0, video.stat().st_size)
    assert numbers(blob, [0.0, 1.5, 2.9]) == [0, 45, 87]


def test_a_connection_that_stalls_is_given_up_and_made_again(store, monkeypatch):
    monkeypatch.setattr(objects, "STALL_S", 0.3)
    data = random_file(store.root / "a.bin", objects.BLOCK)
    store.trouble = lambda path, n: "stall" if n == 0 else None
    assert open_blob(Blob(f"{store.url}/a.bin", 0, len(data))).read() == data


def test_a_connection_lost_for_good_in_mid_video_is_one_error_and_no_damaged_clip(store, video):
    (store.root / "v.mp4").write_bytes(video.read_bytes())
    blob = Blob(f"{store.url}/v.mp4", 0, video.stat().st_size)
    info = decode.probe("v", blob)
    first = objects.RemoteObject(blob.path).key
    store.trouble = lambda path, n: 503
    for part in (Path(os.environ["EGO2ROBOT_CACHE"]) / "remote" / first[:2] / first).glob("[2-4]"):
        part.unlink()
    clips = [Clip(f"{i}", "v", 6 * i, 6, 10.0) for i in range(5)]
    whole = []
    with pytest.raises(VideoError, match="the store answers 503") as caught:
        for found in decode.read_clips("v", blob, info, clips, SPEC, PyAV(), "cpu"):
            assert not isinstance(found, decode.ClipFailure)
            whole.append(found)
    assert caught.value.kind == "io" and len(whole) < len(clips)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "kind"), [(404, "missing"), (410, "missing"), (401, "denied"), (403, "denied")]
)
def test_what_will_not_change_is_not_tried_again(store, status, kind):
    random_file(store.root / "a.bin", 100)
    blob = Blob(f"{store.url}/a.bin", 0, 100)
    open_blob(blob)
    store.trouble = lambda path, n: status
    with pytest.raises(RemoteError) as caught:
        open_blob(blob).read()
    assert caught.value.kind == kind and len(store.gets()) == 1
    assert blobs.read_error("v", caught.value).kind == kind


def test_a_server_without_ranges_is_refused_before_it_sends_everything(store):
    data = random_file(store.root / "a.bin", 3 * objects.BLOCK)
    store.ranges = False
    file = open_blob(Blob(f"{store.url}/a.bin", 0, len(data)))
    file.seek(2 * objects.BLOCK)
    with pytest.raises(RemoteError, match="no byte ranges"):
        file.read(10)


def test_a_missing_remote_video_is_one_line_with_the_next_step(store):
    with pytest.raises(VideoError) as caught:
        decode.probe("gone.mp4", Blob(f"{store.url}/gone.mp4", 0, 1000))
    assert caught.value.kind == "missing" and "check the address" in str(caught.value)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("nope://a/b.mp4", "no protocol nope://"),
        ("memory://a::b", "chained"),
        ("sftp://host/b.mp4", "paramiko"),
    ],
)
def test_an_address_that_nothing_here_opens_says_what_to_install(address, says):
    with pytest.raises(UserError, match=says) as caught:
        list(SOURCES["folder"].candidates(address, None))
    assert "\n" not in str(caught.value)


class BotoError(Exception):
    """As botocore's ClientError is made."""

    def __init__(self, status):
        super().__init__("An error occurred")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": str(status)}}


class GoogleError(Exception):
    """As gcsfs's HttpError is made."""

    def __init__(self, status):
        super().__init__("no")
        self.code = status


class NoCredentialsError(Exception):
    """As botocore says that there are none."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BotoError(403), "denied"),
        (BotoError(404), "missing"),
        (BotoError(503), "io"),
        (GoogleError(401), "denied"),
        (GoogleError(429), "io"),
        (NoCredentialsError(), "denied"),
        (PermissionError("no"), "denied"),
        (FileNotFoundError("no"), "missing"),
        (ConnectionResetError("no"), "io"),
        (TimeoutError(), "io"),
        (OSError("something else"), "io"),
        (ValueError("no such thing"), "unsupported"),
    ],
)
def test_what_a_store_raises_is_told_apart(error, kind):
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("wrapped") from cause
    except RuntimeError as wrapped:
        found = explain(wrapped, "s3://bucket/a.mp4")
    assert found.kind in (kind, "unsupported") and explain(error, "s3://bucket/a.mp4").kind == kind
    assert found.hint and "\n" not in str(found)


@pytest.mark.parametrize(
    "secret",
    [
        "https://me:hunter2@host/a.mp4",
        "https://host/a.mp4?X-Amz-Signature=hunter2",
        "Authorization: Bearer hunter2",
        "token=hunter2",
        "hf_hunter2",
    ],
)
def test_no_message_holds_what_may_be_a_secret(secret):
    error = explain(RuntimeError(f"could not get {secret} today"), "https://host/a.mp4")
    assert ("hunter2" not in str(error) and "today" in str(error)) or "?" in secret
    assert "hunter2" not in shown("https://me:hunter2@host/a.mp4?token=hunter2#hunter2")


# -- listing --------------------------------------------------------------------------------------


def test_a_remote_folder_a_glob_and_a_file_are_listed_like_local_ones(store):
    for name in ["b.mp4", "a/x.MKV", "a/.hidden.mp4", ".git/c.mp4", "notes.txt"]:
        random_file(store.root / name, 10)
    folder = SOURCES["folder"]
    found = list(folder.candidates(f"{store.url}/", None))
    assert [c.name for c in found] == ["a/x.MKV", "b.mp4"]
    assert [c.name for c in folder.candidates(f"{store.url}/*.mp4", None)] == ["b.mp4"]
    (one,) = folder.candidates(f"{store.url}/b.mp4", None)
    assert one.name == "b.mp4" and blobs.sized(one.blob).size == 10
    with pytest.raises(UserError, match="no videos there"):
        list(folder.candidates(f"{store.url}/nothing/*.mp4", None))


def test_any_fsspec_store_is_listed_and_decoded(video):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/day/v.mp4", video.read_bytes())
    memory.pipe("/bucket/day/n.txt", b"x")
    try:
        (found,) = SOURCES["folder"].candidates("memory://bucket", None)
        assert found.name == "day/v.mp4" and found.blob.size == video.stat().st_size
        assert numbers(found.blob, [1.0]) == [30]
        assert identity(found.blob) == identity(Blob(str(video), 0, video.stat().st_size))
    finally:
        memory.rm("/bucket", recursive=True)


def test_relative_addresses_stay_in_their_store():
    assert joined("s3://b/x/m.csv", "../y/a.mp4") == "s3://b/y/a.mp4"
    assert joined("s3://b/x/m.csv?v=1", "./a.mp4") == "s3://b/x/a.mp4"
    assert joined("s3://b/m.csv", "../../a.mp4") is None
    assert not is_remote("file:///a b") and local_path("file:///a%20b") == "/a b"
    assert not is_remote("/a/b") and not is_remote("C:/x") and is_remote("hf://datasets/a/b")


# -- the cache ------------------------------------------------------------------------------------


def test_the_cache_stays_below_its_limit_and_loses_what_was_used_least_recently(tmp_path):
    cache = DiskCache(tmp_path, 1_000_000)
    for i in range(200):
        cache.put("ab" * 16, i, bytes([i]) * 10_000)
        path = tmp_path / "ab" / ("ab" * 16) / str(i)
        if path.exists():
            os.utime(path, (i, i))
        if (kept := tmp_path / "ab" / ("ab" * 16) / "0").exists():
            os.utime(kept)  # in use all the time
    total = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    assert total <= 1_000_000 * (1 + 1 / 64)
    assert cache.get("ab" * 16, 0) == bytes(10_000)
    assert cache.get("ab" * 16, 199) is not None and cache.get("ab" * 16, 5) is None


def test_a_damaged_entry_is_not_used(tmp_path):
    cache = DiskCache(tmp_path, 1 << 20)
    cache.put("cd" * 16, 7, b"right" * 100)
    path = tmp_path / "cd" / ("cd" * 16) / "7"
    for damage in (path.read_bytes()[:-1], b"", path.read_bytes().replace(b"right", b"wrong", 1)):
        path.write_bytes(damage)
        assert cache.get("cd" * 16, 7) is None and not path.exists()
    cache.put("cd" * 16, 7, b"right")
    other = path.with_name("8")
    path.rename(other)  # another's bytes under this name
    assert cache.get("cd" * 16, 8) is None


def test_a_cache_that_cannot_be_written_costs_no_reading(store, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("EGO2ROBOT_CACHE", str(tmp_path / "file"))
    objects.configure(1.0)
    data = random_file(store.root / "a.bin", 1000)
    assert open_blob(Blob(f"{store.url}/a.bin", 0, 1000)).read() == data


SHARE = """
import sys
from pathlib import Path
from ego2robot.remote.cache import DiskCache
cache = DiskCache(Path(sys.argv[1]), 2_000_000)
wrong = 0
for turn in range(3):
    for i in range(150):
        key = f"{i:032x}"
        data = bytes([i % 256]) * 20_000
        found = cache.get(key, 0)
        wrong += found is not None and found != data
        if found is None:
            cache.put(key, 0, data)
print(wrong)
"""


def test_processes_share_a_cache(tmp_path):
    command = [sys.executable, "-c", SHARE, str(tmp_path / "shared")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate(timeout=60)[0].strip() for p in both] == ["0", "0"]
    files = [f for f in (tmp_path / "shared").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 2_000_000 * (1 + 2 / 64)
    assert not [f for f in files if f.name.startswith(".tmp-")]


# -- the hub --------------------------------------------------------------------------------------

HUB = """
import json, sys
from ego2robot.blobs import open_blob
from ego2robot.errors import UserError, VideoError
from ego2robot.remote import RemoteError, objects
from ego2robot.sources import SOURCES
from ego2robot.sources.base import identity
objects.FIRST_WAIT_S = 0.01
try:
    found = list(SOURCES["egocentric10k"].candidates("hf://datasets/builddotai/Egocentric-10K", None))
    rows = []
    for one in found:
        if isinstance(one, VideoError):
            rows.append(["problem", str(one), one.kind])
        else:
            start = open_blob(one.blob).read()[:20].decode()
            rows.append([one.name, start, one.meta.get("intrinsics"), identity(one.blob)])
    print(json.dumps(rows))
except UserError as error:
    print(json.dumps(["refused", str(error)]))
"""


def ask_hub(store, tmp_path, token=None):
    environment = {
        **os.environ,
        "HF_ENDPOINT": store.url,
        "HF_HOME": str(tmp_path / "hf"),
        "EGO2ROBOT_CACHE": str(tmp_path / "hub-cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **({"HF_TOKEN": token} if token else {}),
    }
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", HUB], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), done.stdout + done.stderr


def test_a_gated_hub_repository_is_streamed_with_a_token_and_says_how_to_log_in_without(store, tmp_path):
    worker = store.root / "factory_001" / "workers" / "worker_001"
    worker.mkdir(parents=True)
    (worker / "intrinsics.json").write_text('{"fx": 2.5}')
    with tarfile.open(worker / "factory001_worker001_part00.tar", "w") as tar:
        for name, data in [
            ("a.mp4", b"video a" + bytes(3_000_000)),
            ("a.json", b'{"fps": 30}'),
            ("b.mp4", b"video b"),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    store.gated, store.tokens = True, ("hf_sesame",)
    rows, said = ask_hub(store, tmp_path, "hf_sesame")
    assert [row[0].rpartition("::")[2] for row in rows] == ["a.mp4", "b.mp4"]
    assert rows[0][1].startswith("video a") and json.loads(rows[0][2]) == {"fx": 2.5}
    assert rows[0][3] != rows[1][3] and "hf_sesame" not in said
    rows, said = ask_hub(store, tmp_path / "other", "hf_wrong")
    assert [row[2] for row in rows] == ["metadata", "denied"] and "hf_wrong" not in said
    assert "hf auth login" in rows[1][1] and "datasets/builddotai/Egocentric-10K" in rows[1][1]
