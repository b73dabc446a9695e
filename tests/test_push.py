"""`ego2robot push`: what reaches the hub, what is refused before anything does, no token shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants as hub_constants
import pytest
import yaml
from typer.testing import CliRunner

from ego2robot import cli, config
from ego2robot.errors import UserError
from ego2robot.export import card, hub
from ego2robot.export.card import Facts
from ego2robot.export.licences import LICENCES, forbids_derivatives
from tests.hub import TOKEN, Hub, XetSession, serving

REPO = "me/hands"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A stand-in for the hub that the library talks to."""
    with serving() as served:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        template = hub_constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub_constants.ENDPOINT, served.url)
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        # Before 1.0 the module that downloads keeps a copy of its own.
        downloads = "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE"
        monkeypatch.setattr(downloads, template, raising=False)
        monkeypatch.setattr(hub_constants, "ENDPOINT", served.url)
        monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield served


def facts(**changes: Any) -> Facts:
    values: dict[str, Any] = {
        "schema": "hands", "action": "compensated", "codec": "av1", "fps": 6, "height": 360, "width": 640,
        "frames": 360, "tasks": {"a": 10}, "videos": {"v.mp4": 10}, "kept": 12, "considered": 20,
        "hand_frames": 300, "skipped": 0, "ranked_by": "`hand_visibility`", "random_models": (),
        "license": None, "version": "0",
    }  # fmt: skip
    return Facts(**{**values, **changes})


def dataset(folder: Path, kind: str = "egocentric10k", seed: int = 0, **changes: Any) -> Path:
    """A folder as `export lerobot` leaves it: names and provenance real, contents small."""
    tree = config.to_dict(config.build({"source": {"kind": kind}}))
    written = {
        "data/chunk-000/file-000.parquet": b"PAR1 rows %d" % seed,
        "videos/observation.images.top/chunk-000/file-000.mp4": b"moving pictures %d" % seed,
        "meta/episodes/chunk-000/file-000.parquet": b"PAR1 episodes %d" % seed,
        "meta/info.json": b'{"codebase_version": "v3.0"}',
        "meta/stats.json": b"{}",
        "meta/ego2robot.json": json.dumps({"made_by": "ego2robot", "config": tree}).encode(),
        "README.md": card.card(facts(**changes)).encode(),
    }
    for name, data in written.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def front_of(store: Hub, name: str = "README.md") -> dict[str, Any]:
    return card.parted(store.repositories[REPO].files[name].decode())[0]


# -- what reaches the hub ---------------------------------------------------------------------------


def test_a_dataset_reaches_the_hub_whole_and_what_describes_it_comes_last(store: Hub, tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d")
    shown: list[Any] = []
    done = hub.push(hub.inspect(folder), REPO, TOKEN, show=shown.append)
    files = store.repositories[REPO].files
    local = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert set(files) == set(local) and done.files == len(local) and done.url.endswith(f"/datasets/{REPO}")
    assert all(files[name] == data for name, data in local.items() if name != "README.md")
    first, last = store.repositories[REPO].commits
    assert set(last[0]) == {"README.md", "meta/info.json", "meta/ego2robot.json"} and not last[1]
    assert not set(first[0]) & set(last[0])
    assert not store.repositories[REPO].private and shown[-1].unit == "files"
    text = files["README.md"].decode()
    assert front_of(store)["license"] == "apache-2.0"
    assert front_of(store)["configs"] == [{"config_name": "default", "data_files": "data/*/*.parquet"}]
    assert "Egocentric-10K" in text and "| episodes | 10 |" in text and "Faces were not looked for" in text


def test_again_sends_nothing_and_a_new_export_only_what_changed(store: Hub, tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d")
    hub.push(hub.inspect(folder), REPO, TOKEN)
    sent = len(store.uploads)
    hub.push(hub.inspect(folder), REPO, TOKEN)
    assert len(store.uploads) == sent == 3 and len(store.repositories[REPO].commits) == 2
    (folder / "data/chunk-000/file-000.parquet").rename(folder / "data/chunk-000/file-001.parquet")
    done = hub.push(hub.inspect(folder), REPO, TOKEN)
    names = set(store.repositories[REPO].files)
    assert done.removed == 1 and "data/chunk-000/file-000.parquet" not in names
    assert "data/chunk-000/file-001.parquet" in names and len(store.uploads) == sent


def test_an_interrupted_push_goes_on_where_it_was(store: Hub, tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d")
    store.fail, store.times = ("POST", "/commit/", 500), 1
    with pytest.raises(UserError, match=r"the hub failed \(500\).*it goes on"):
        hub.push(hub.inspect(folder), REPO, TOKEN)
    assert len(store.uploads) == 3 and not store.repositories[REPO].files
    hub.push(hub.inspect(folder), REPO, TOKEN)
    assert len(store.uploads) == 3 and "README.md" in store.repositories[REPO].files


@pytest.fixture
def xet(store: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The library as it is by default: it streams a folder through Xet, here in commits of 20 files."""
    pipeline = pytest.importorskip("huggingface_hub._upload_pipeline")
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(pipeline, "get_xet_session", lambda: XetSession(store))
    monkeypatch.setattr(pipeline, "INITIAL_COMMIT_SIZE_INDEX", 0)
    return store


def test_a_large_folder_goes_on_after_the_commit_that_an_interruption_left(xet: Hub, tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d")
    (folder / ".lock").touch()
    for i in range(46):
        (folder / f"data/chunk-000/file-{i + 1:03d}.parquet").write_bytes(b"PAR1 %d" % i)
    xet.xet_breaks_after = 1
    with pytest.raises(UserError, match=r"no connection to the hub .*the same command again: it goes on"):
        hub.push(hub.inspect(folder), REPO, TOKEN, part="one")
    repository = xet.repositories[REPO]
    before = set(repository.files)
    assert len(before) == 20 and not any(name.endswith(("README.md", "info.json")) for name in before)
    sent, xet.xet_breaks_after = len(xet.uploads), None
    hub.push(hub.inspect(folder), REPO, TOKEN, part="one")
    assert [len(added) for added, _ in repository.commits] == [20, 20, 10, 4]
    assert not before & {name for added, _ in repository.commits[1:] for name in added}
    assert sent == 20 and len(xet.uploads) == 49, "every file of bulk is sent once"
    local = {"one/" + p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(repository.files) == local - {"one/.lock"} | {"README.md"}
    assert set(repository.commits[-1][0]) == {
        "README.md", "one/README.md", "one/meta/info.json", "one/meta/ego2robot.json"
    }  # fmt: skip


def test_no_error_of_a_large_folder_shows_the_token(
    xet: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library logs that a commit of more than 20 files failed, and tries smaller ones."""
    monkeypatch.setattr("huggingface_hub._upload_pipeline.INITIAL_COMMIT_SIZE_INDEX", 1)
    folder = dataset(tmp_path / "d")
    for i in range(46):
        (folder / f"data/chunk-000/file-{i + 1:03d}.parquet").write_bytes(b"PAR1 %d" % i)
    xet.fail, xet.times = ("POST", "/commit/", 403), 100
    with pytest.raises(UserError, match="may not write there") as raised:
        hub.push(hub.inspect(folder), REPO, TOKEN)
    assert "Retrying in smaller chunks" in caplog.text
    assert TOKEN not in str(raised.value) + caplog.text


@pytest.mark.parametrize(("version", "streams"), [("0.36.2", 0), ("1.19.0", 0), ("1.20.1", 1), ("2.4.0", 1)])
def test_a_library_that_would_send_a_large_folder_in_one_commit_is_not_asked_to(
    version: str, streams: bool, xet: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(huggingface_hub, "__version__", version)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **told: asked.append(told))
    folder = dataset(tmp_path / "d")
    for path in (*folder.rglob("*.parquet"), *folder.rglob("*.mp4")):
        path.unlink()  # a commit would send them by the real Xet
    hub.push(hub.inspect(folder), REPO, TOKEN)
    assert len(asked) == streams
    assert ("meta/stats.json" in xet.repositories[REPO].files) != streams


def test_a_private_repository_is_private_and_a_public_one_is_not_taken_for_it(
    store: Hub, tmp_path: Path
) -> None:
    folder = dataset(tmp_path / "d")
    hub.push(hub.inspect(folder), "me/secret", TOKEN, private=True)
    assert store.repositories["me/secret"].private
    hub.push(hub.inspect(folder), REPO, TOKEN)
    before = dict(store.repositories[REPO].files)
    with pytest.raises(UserError, match="is there already, and public"):
        hub.push(hub.inspect(folder), REPO, TOKEN, private=True)
    assert store.repositories[REPO].files == before


def test_several_parts_are_configurations_of_one_repository(store: Hub, tmp_path: Path) -> None:
    one, two = dataset(tmp_path / "1"), dataset(tmp_path / "2", "epic_kitchens", seed=2)
    hub.push(hub.inspect(one), REPO, TOKEN, part="part1")
    hub.push(hub.inspect(two), REPO, TOKEN, part="part2")
    hub.push(hub.inspect(one), REPO, TOKEN, part="part1")
    front = front_of(store)
    assert front["configs"] == [
        {"config_name": "part1", "data_files": "part1/data/*/*.parquet"},
        {"config_name": "part2", "data_files": "part2/data/*/*.parquet"},
    ]
    assert front["license"] == "other" and front_of(store, "part2/README.md")["license"] == "cc-by-nc-4.0"
    text = store.repositories[REPO].files["README.md"].decode()
    assert text.count("part1/README.md") == 1 and text.count("part2/README.md") == 1
    with pytest.raises(UserError, match="holds several parts"):
        hub.push(hub.inspect(one), REPO, TOKEN)
    hub.push(hub.inspect(one), "me/single", TOKEN)
    with pytest.raises(UserError, match="holds one dataset without a part's name"):
        hub.push(hub.inspect(two), "me/single", TOKEN, part="part2")


def test_trajectories_of_several_sources_keep_their_configurations_and_all_licences(
    store: Hub, tmp_path: Path
) -> None:
    """The form of `export trajectories`: parts in one folder, their configurations in its card."""
    folder = tmp_path / "t"
    for part in ("kitchen", "factory"):
        (folder / part).mkdir(parents=True)
        (folder / part / "train-00000.parquet").write_bytes(b"PAR1" + part.encode())
        (folder / part / "export.json").write_text("{}")
        (folder / part / ".lock").touch()
    configs = [
        {"config_name": part, "data_files": [{"split": "train", "path": f"{part}/train-*.parquet"}]}
        for part in ("factory", "kitchen")
    ]
    (folder / "README.md").write_text(
        card.joined({"license": "other", "configs": configs}, "# Trajectories\n")
    )
    (folder / "meta").mkdir()
    about = {"made_by": "ego2robot", "sources": ["egocentric10k", "epic_kitchens"]}
    (folder / "meta" / "ego2robot.json").write_text(json.dumps(about))
    checked = hub.inspect(folder)
    hub.push(checked, REPO, TOKEN)
    text = store.repositories[REPO].files["README.md"].decode()
    assert not any(name.endswith(".lock") for name in store.repositories[REPO].files)
    assert checked.licence == "other" and front_of(store)["configs"] == configs
    assert "Egocentric-10K" in text and "EPIC-KITCHENS-100" in text
    hub.push(checked, "me/parts", TOKEN, part="first")
    front = card.parted(store.repositories["me/parts"].files["README.md"].decode())[0]
    assert front["configs"] == [
        {
            "config_name": f"first.{part}",
            "data_files": [{"split": "train", "path": f"first/{part}/train-*.parquet"}],
        }
        for part in ("factory", "kitchen")
    ]
    (folder / "meta" / "ego2robot.json").write_text(json.dumps({**about, "sources": ["egodex", "folder"]}))
    with pytest.raises(UserError, match="made of egodex"):
        hub.inspect(folder)


def test_many_files_go_in_several_commits(
    store: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "BATCH", 2)
    folder = dataset(tmp_path / "d")
    for i in range(3):
        (folder / f"data/chunk-000/file-{i + 1:03d}.parquet").write_bytes(b"PAR1 %d" % i)
    hub.push(hub.inspect(folder), REPO, TOKEN)
    assert [len(added) for added, _ in store.repositories[REPO].commits] == [2, 2, 2, 1, 3]


# -- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind, known in LICENCES.items() if not known.derivatives])
def test_what_a_licence_forbids_is_not_published_unless_its_owner_allows_it(
    kind: str, tmp_path: Path
) -> None:
    folder = dataset(tmp_path / "d", kind)
    for said in (None, "cc-by-4.0"):
        with pytest.raises(UserError, match="--i-have-permission"):
            hub.inspect(folder, said)
    assert hub.inspect(folder, permitted=True).licence == LICENCES[kind].identifier
    assert hub.inspect(folder, "cc-by-4.0", permitted=True).licence == "cc-by-4.0"


def test_a_licence_that_nobody_said_is_asked_for(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "d", "folder")
    with pytest.raises(UserError, match="ask whoever recorded it, then add --license"):
        hub.inspect(folder)
    assert hub.inspect(folder, "CC-BY-4.0").licence == "cc-by-4.0"
    with pytest.raises(UserError, match="does not allow derivatives"):
        hub.inspect(folder, "cc-by-nd-4.0")
    with pytest.raises(UserError, match="a name that the hub knows"):
        hub.inspect(folder, "mine: all mine")
    said = dataset(tmp_path / "said", "manifest", license="cc-by-nd-4.0")
    with pytest.raises(UserError, match="does not allow derivatives"):
        hub.inspect(said)
    with pytest.raises(UserError, match=r"is under Apache License 2\.0; leave --license out"):
        hub.inspect(dataset(tmp_path / "known"), "mit")


def test_licences_with_nd_are_told_from_others() -> None:
    assert forbids_derivatives("cc-by-nc-nd-4.0") and forbids_derivatives("CC_BY_ND_4.0")
    assert not any(forbids_derivatives(name) for name in ("apache-2.0", "cc-by-nc-sa-4.0", "other", "land-1"))
    for known in LICENCES.values():
        assert known.derivatives or known.identifier == "other" or forbids_derivatives(known.identifier)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "meta/ego2robot.json").unlink(), "not a dataset that ego2robot exported"),
        (
            lambda d: (d / "meta/ego2robot.json").write_text('{"made_by": "x"}'),
            "not a dataset that ego2robot",
        ),
        (lambda d: (d / "meta/ego2robot.json").write_text("{"), "damaged; export the dataset again"),
        (lambda d: (d / "README.md").unlink(), "no README.md"),
        (lambda d: (d / "README.md").write_text("---\na: [\n---\n"), "front matter is not YAML"),
        (lambda d: (d / "README.md").write_text(card.card(facts(videos={}, frames=0))), "is empty"),
        (lambda d: (d / "data/keys").symlink_to("/etc/passwd"), "a link"),
        (lambda d: (d / ".ssh").mkdir(), "does not belong to the dataset"),
    ],
)
def test_a_folder_that_is_not_a_whole_dataset_of_ours_is_not_sent(
    break_it: Any, message: str, tmp_path: Path
) -> None:
    folder = dataset(tmp_path / "d")
    break_it(folder)
    with pytest.raises(UserError, match=message) as raised:
        hub.inspect(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "repo", ["hands", "me/../you", "me/a b", "https://hub/me/hands", "me/hands/more", ""]
)
def test_a_name_that_is_no_repository_is_refused(repo: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="OWNER/NAME"):
        hub.push(hub.inspect(dataset(tmp_path / "d")), repo, TOKEN)
    with pytest.raises(UserError, match="--part"):
        hub.push(hub.inspect(tmp_path / "d"), REPO, TOKEN, part="../up")


# -- the token --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (None, "does not know this token"),
        (("POST", "/create", 403), "may not write there"),
        (("POST", "/preupload/", 418), "not pushed"),
        (("POST", "/batch", 403), "may not write there"),
        (("GET", "/api/datasets/", 404), "no such owner"),
    ],
)
def test_no_error_shows_the_token(
    fail: Any, message: str, store: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    token = TOKEN if fail else "hf_wrongWrongWrong"
    store.fail, store.times = fail, 99
    file = tmp_path / "token"
    file.write_text(f"{token}\n")
    done = CliRunner().invoke(
        cli.app, ["push", str(dataset(tmp_path / "d")), REPO, "--token-file", str(file)]
    )
    out, err = capfd.readouterr()
    everything = done.output + out + err + repr(done.exception)
    assert done.exit_code == 2 and message in done.stderr and done.stderr.count("error:") == 1
    assert token in store.tokens_seen and token not in everything and "hf_wrong" not in everything


def test_a_token_that_no_header_can_hold_is_not_shown_either(tmp_path: Path, store: Hub) -> None:
    for token in ("hf_strange\x00secret", "hf_strange secret", "sécret"):
        file = tmp_path / "token"
        file.write_text(token)
        with pytest.raises(UserError, match="should hold the token and nothing else") as raised:
            hub.read_token(file)
        assert "secret" not in str(raised.value)
    for token in ("hf_\nsecretsecret", "sécretsecret"):
        with pytest.raises(UserError, match="holds what no token can") as raised:
            hub.push(hub.inspect(dataset(tmp_path / "d")), REPO, token)
        assert "secret" not in str(raised.value)
    quoted = repr(b"Bearer abc\ndefghij") + " Bearer abc\ndefghij hf_another123"
    assert hub.scrubbed(quoted, "abc\ndefghij").count("hf_…") == 3


def test_where_the_token_comes_from(tmp_path: Path, store: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="run `hf auth login`"):
        hub.read_token(None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.read_token(None) == TOKEN
    with pytest.raises(UserError, match="No such file"):
        hub.read_token(tmp_path / "nothing")


def test_the_command_in_a_process_of_its_own(store: Hub, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": store.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
    }
    command = [sys.executable, "-m", "ego2robot.cli", "push", str(dataset(tmp_path / "d")), REPO, "--private"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"datasets/{REPO}: 7 files" in done.stdout and "apache-2.0" in done.stdout
    assert TOKEN not in done.stdout + done.stderr and store.repositories[REPO].private


# -- cards ------------------------------------------------------------------------------------------


def test_a_card_says_how_many_frames_were_changed_and_promises_nothing() -> None:
    text = card.card(facts(blurred=12, stripped=True))
    assert "in 12 of 360 frames" in text and "no promise of anonymity" in text and "pseudonyms" in text
    assert yaml.safe_load(text.split("---")[1])["license"] == "other"
