"""`ego2robot check`: learnable where pictures tell actions, not where they do not, or it cannot tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ego2robot import cli
from ego2robot.check import Options, Verdict, check, data, model, picture, rule, words
from ego2robot.errors import UserError
from tests import lerobot_files

SMALL = Options(size=(32, 48), most_steps=120)
FEW = Options(size=(16, 24), most_steps=80)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def footage() -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
    return lerobot_files.ball()


@pytest.fixture(scope="module")
def told(footage: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verdict, list[Any]]:
    """A dataset whose pictures determine its actions, but for a third dimension that never moves."""
    pictures, actions, videos = footage
    actions = [np.concatenate([a, np.full((len(a), 1), 0.5)], 1) for a in actions]
    folder = lerobot_files.write(
        tmp_path_factory.mktemp("told") / "ball", pictures, actions, videos, ("x", "y<&>", "still")
    )
    shown: list[Any] = []
    torch.set_num_threads(1)
    return folder, check(folder, SMALL, shown.append), shown


def moments_of(pictures: int, action_NA: np.ndarray, episode_N: np.ndarray) -> data.Moments:
    n = np.arange(1, len(action_NA))
    frames = np.zeros((pictures, 8, 8, 3), np.uint8)
    return data.Moments(
        frames, n, n - 1, action_NA[1:], action_NA[:-1], episode_N[1:], episode_N[1:], False, (), 0
    )


# -- verdicts -------------------------------------------------------------------------------------


def test_actions_that_pictures_tell_are_learnable(told: tuple[Path, Verdict, list[Any]]) -> None:
    _, verdict, shown = told
    assert verdict.learnable and verdict.by_video and verdict.videos == 8
    assert verdict.network.against == "mean" and verdict.network.low > 0.5
    assert verdict.names == ("x", "y<&>") and verdict.constant == ("still",)
    assert np.nanmean(verdict.r2["network"]) > 0.6 > np.nanmean(verdict.r2["mean"])
    assert verdict.beside_last.holds
    assert all(episodes == 4 for episodes, _ in verdict.held_out)
    training = [p for p in shown if p.stage == "training"]
    assert training and training[-1].rate > 0 and training[0].eta_s is not None
    assert "[clip" not in str(shown) and {p.unit for p in shown} == {"pictures", "steps"}


def test_shuffled_actions_are_not_learnable(footage: Any, tmp_path: Path) -> None:
    pictures, actions, videos = footage
    mixed = np.random.default_rng(1).permutation(np.concatenate(actions))
    shuffled = np.split(mixed, np.cumsum([len(a) for a in actions])[:-1])
    verdict = check(lerobot_files.write(tmp_path / "shuffled", pictures, shuffled, videos), SMALL)
    assert not verdict.learnable and verdict.network.mean < rule.LEAST_GAIN + 0.03
    assert words.text(verdict).endswith("not learnable")


def test_what_only_the_video_tells_is_not_learnable_by_video(tmp_path: Path) -> None:
    """Each video has its own wall and its own mean action: a split by episode would call it learnt."""
    rng = np.random.default_rng(0)
    means = rng.normal(0, 1, (4, 2))
    pictures, _, videos = lerobot_files.ball(32, 10, 4, seed=5)
    walls = [np.repeat(p[:1], len(p), 0) for p in pictures]
    actions = [means[i % 4] + rng.normal(0, 0.3, (10, 2)) for i in range(32)]
    by_video = check(lerobot_files.write(tmp_path / "named", walls, actions, videos), FEW)
    unnamed = check(lerobot_files.write(tmp_path / "unnamed", walls, actions, None), FEW)
    assert by_video.by_video and not by_video.learnable
    assert not unnamed.by_video and unnamed.learnable
    assert "does not say which video" in unnamed.warnings[0]


# -- the rule, without training ---------------------------------------------------------------------


def trial_of(truth: np.ndarray, said: np.ndarray, unit: np.ndarray) -> rule.Trial:
    return rule.Trial(unit, truth, {"network": said, "mean": np.zeros_like(truth)})


def test_noise_is_called_learnable_hardly_ever_and_a_small_real_gain_mostly() -> None:
    """500 datasets of 12 held-out episodes a seed; the network says noise, or knows a tenth."""
    rng = np.random.default_rng(0)
    unit = np.repeat(np.arange(12), 20)
    wrong = right = 0
    for _ in range(500):
        noise, knows = [], []
        for _seed in range(3):
            truth = rng.normal(size=(240, 2)) + np.repeat(rng.normal(0, 0.5, (12, 2)), 20, 0)
            noise.append(trial_of(truth, 0.05 * rng.normal(size=truth.shape), unit))
            knows.append(trial_of(truth, 0.1 * truth + 0.05 * rng.normal(size=truth.shape), unit))
        wrong += rule.compare(noise, "network", "mean").holds
        right += rule.compare(knows, "network", "mean").holds
    assert wrong <= 5 and right >= 490


def test_r2_and_gain_are_what_they_are_by_hand() -> None:
    truth = np.array([[0.0], [1.0], [2.0], [3.0]])
    trial = trial_of(truth, truth + np.array([[0.5], [-0.5], [0.5], [-0.5]]), np.array([0, 0, 1, 1]))
    assert trial.r2("network")[0] == pytest.approx(1 - 1.0 / 5.0)
    assert rule.compare([trial], "network", "mean").gains[0] == pytest.approx(1 - 1.0 / 14.0)
    still = trial_of(np.ones((4, 1)), np.ones((4, 1)), np.zeros(4, int))
    assert np.isnan(still.r2("network")[0])


def test_the_line_through_the_last_action_gains_from_a_network_that_knows_more() -> None:
    rng = np.random.default_rng(0)
    last, new = rng.normal(size=(2, 400, 1))
    truth = 0.6 * last + 0.5 * new
    fitted, asked = slice(0, 200), slice(200, 400)
    found = rule.lines((truth[fitted], last[fitted], new[fitted]), (last[asked], new[asked]))
    errors = {name: float(((said - truth[asked]) ** 2).mean()) for name, said in found.items()}
    assert errors["line"] == pytest.approx(0.25, rel=0.2) and errors["line and network"] < 1e-4


@pytest.mark.parametrize("n_groups", [2, 3, 5, 20])
def test_what_is_held_out_shares_no_video_and_no_episode(n_groups: int) -> None:
    rng = np.random.default_rng(n_groups)
    episode = np.repeat(np.arange(40), rng.integers(5, 30, 40))
    group = episode % n_groups
    tests = []
    for seed in range(3):
        parts = rule.split(group, episode, seed, True)
        pieces = (parts.train, parts.validation, parts.test)
        assert sorted(np.concatenate(pieces)) == list(range(len(episode)))
        assert not set(group[parts.test]) & set(group[np.concatenate(pieces[:2])])
        assert not set(episode[parts.train]) & set(episode[parts.validation])
        assert rule.usable(episode, parts)
        tests.append(tuple(sorted(set(group[parts.test]))))
    assert len(set(tests)) == min(3, n_groups)


def test_early_stopping_keeps_the_best_weights_and_never_sees_the_held_out_part() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (120, 12, 12, 3), np.uint8)
    places = np.arange(1, 120)
    train, validation, test = np.split(places - 1, [60, 90])
    target = np.random.default_rng(1).normal(size=(119, 1))
    target[validation] -= target[validation].mean()  # nothing can be learnt that helps there
    results = []
    for garbage in (0.0, 1e9):
        target[test] = garbage
        table = model.Table(pictures, places, places - 1, target)
        results.append(model.fit(table, train, validation, test, 0, 1000, torch.device("cpu")))
    assert np.array_equal(results[0].test_NA, results[1].test_NA)
    looks = results[0].looks
    assert results[0].steps < 1000 and len(looks) >= model.PATIENCE
    scale = np.mean(np.clip(table.target_NA[validation], -4, 4) ** 2)
    best = min(look.validation for look in looks)
    got = float(np.mean((results[0].validation_NA - table.target_NA[validation]) ** 2)) / scale
    assert got == pytest.approx(best, rel=1e-4)


# -- what cannot be told ----------------------------------------------------------------------------


def small(folder: Path, n_episodes: int = 10, **changes: Any) -> Path:
    pictures, actions, videos = lerobot_files.ball(n_episodes, 14, 5)
    lerobot_files.write(folder, pictures, changes.pop("actions", actions), changes.pop("videos", videos))
    if changes:
        file = folder / "meta" / "info.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: small(d, n_episodes=6), r"cannot tell: 6 usable episodes of 6, at least 10"),
        (lambda d: small(d, actions=[np.zeros((14, 2))] * 10), "no dimension of `action` ever changes"),
        (lambda d: small(d, actions=[np.full((14, 2), np.nan)] * 10), "cannot tell: 0 usable episodes"),
        (lambda d: small(d, codebase_version="v2.1"), "LeRobot v2.1, too old; convert it"),
        (lambda d: small(d, codebase_version="v9"), "codebase_version is 'v9'"),
        (lambda d: small(d, features={}), "no pictures in videos"),
        (lambda d: small(d, fps=0), "no features or no fps"),
        (lambda d: (small(d) / "meta" / "info.json").write_text("{"), "not JSON"),
        (lambda d: (small(d) / "meta" / "info.json").unlink(), "not a LeRobot dataset"),
        (
            lambda d: (small(d) / "meta/episodes/chunk-000/file-000.parquet").write_bytes(b"PAR1"),
            r"file-000.parquet: cannot be read",
        ),
        (lambda d: (small(d) / "data/chunk-000/file-000.parquet").unlink(), "0.parquet: cannot be read"),
        (
            lambda d: (small(d) / f"videos/{lerobot_files.CAMERA}/chunk-000/file-000.mp4").write_bytes(b"x"),
            "0 usable episodes of 10.*Invalid data",
        ),
    ],
)  # fmt: skip
def test_it_says_in_one_line_why_it_cannot_tell(break_it: Any, message: str, tmp_path: Path) -> None:
    break_it(tmp_path / "dataset")
    with pytest.raises(UserError, match=message) as raised:
        check(tmp_path / "dataset", SMALL)
    assert "\n" not in str(raised.value)


def test_a_camera_whose_name_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    folder = small(tmp_path / "dataset")
    features = json.loads((folder / "meta/info.json").read_text())["features"]
    features = {"../../outside": features[lerobot_files.CAMERA], "action": features["action"]}
    file = folder / "meta" / "info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"features": features}))
    with pytest.raises(UserError, match="no pictures in videos"):
        data.open_dataset(folder)
    with pytest.raises(UserError, match="no camera '"):
        data.open_dataset(folder, "../../outside")


def test_moments_with_holes_and_episodes_that_do_not_add_up_are_left_out(tmp_path: Path) -> None:
    _, actions, _ = lerobot_files.ball(12, 14, 6)
    actions[3][5, 0] = np.nan
    pictures, _, videos = lerobot_files.ball(12, 14, 6)
    folder = lerobot_files.write(tmp_path / "d", pictures, actions, videos)
    dataset = data.open_dataset(folder)
    longer = [*dataset.episodes[:-1], data.Episode(11, 99, (0, 0), (0, 0), 0.0, "a.mp4")]
    found = data.load(
        data.Dataset(folder, dataset.fps, dataset.camera, dataset.names, tuple(longer)),
        tmp_path / "cache", (16, 24), 20_000,
    )  # fmt: skip
    assert found.holes == 2  # as the action, and as the one before
    assert found.left_out == (("episode 11", "14 rows where meta/episodes says 99"),)
    assert len(found.now_N) == 11 * 13 - 2


def test_each_moment_has_its_own_picture_and_the_one_before(tmp_path: Path) -> None:
    """Brightness tells the frame: 6 episodes of 8 frames, all in one video."""
    levels = [np.arange(8) * 4 + 33 * e for e in range(6)]
    pictures = [np.broadcast_to(v[:, None, None, None], (8, 32, 48, 3)).astype(np.uint8) for v in levels]
    actions = [np.stack([v, v], 1).astype(float) for v in levels]
    dataset = data.open_dataset(lerobot_files.write(tmp_path / "d", pictures, actions, ["a"] * 6))
    found = data.load(dataset, tmp_path / "cache", (16, 24), 20_000)
    seen = found.pictures.reshape(len(found.pictures), -1).mean(1)
    assert np.abs(seen[found.now_N] - found.action_NA[:, 0]).max() < 3
    assert np.abs(seen[found.before_N] - found.last_NA[:, 0]).max() < 3
    few = data.load(dataset, tmp_path / "few", (16, 24), 24)
    assert len(few.now_N) <= 24 + 3 and set(few.episode_N) <= set(range(6))


def test_one_source_video_is_held_out_by_episode_with_a_warning(footage: Any, tmp_path: Path) -> None:
    pictures, actions, _ = footage
    folder = lerobot_files.write(tmp_path / "d", pictures, actions, ["only.mp4"] * len(pictures))
    verdict = check(folder, Options(size=(16, 24), most_steps=20, seeds=1))
    assert not verdict.by_video and "one source video" in verdict.warnings[0]
    assert "1 seeds" in verdict.warnings[-1]


# -- what a person sees -----------------------------------------------------------------------------


def test_the_picture_is_sound_and_the_json_has_every_figure(told: tuple[Path, Verdict, list[Any]]) -> None:
    _, verdict, _ = told
    drawing = ElementTree.fromstring(picture.svg(verdict))
    titles = [t.text for t in drawing.iter("{http://www.w3.org/2000/svg}title")]
    assert any(t and t.startswith("y<&>, network: R² ") for t in titles)
    tree = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert tree["verdict"] == "learnable" and set(tree["r2"]) == {"x", "y<&>"}
    assert set(tree["r2"]["x"]) == {"network", *rule.BASELINES, "line and network"}
    assert len(tree["curves"]) == 3 and tree["constant_dimensions"] == ["still"]
    assert "learnable" in words.text(verdict) and "left out, constant: still" in words.text(verdict)


def test_exit_codes_and_files_of_the_command(footage: Any, tmp_path: Path) -> None:
    pictures, actions, videos = footage
    folder = lerobot_files.write(tmp_path / "ball", pictures, actions, videos)
    runner = CliRunner()
    options = ["--seeds", "1", "--max-steps", "20", "--device", "cpu"]
    done = runner.invoke(cli.app, ["check", str(folder), *options])
    assert done.exit_code in (0, 1), done.output
    word = "learnable" if done.exit_code == 0 else "not learnable"
    out = tmp_path / "ball-check"
    assert f"\n{word}\n" in done.stdout and str(out) in done.stdout
    assert json.loads((out / "check.json").read_text())["verdict"] == word.removesuffix(" learnable")
    assert (out / "check.svg").read_text().startswith("<svg")
    missing = runner.invoke(cli.app, ["check", str(tmp_path / "nothing")])
    assert missing.exit_code == 2 and "not a LeRobot dataset" in missing.stderr
