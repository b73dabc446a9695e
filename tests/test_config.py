import pytest
import yaml

from ego2robot import config
from ego2robot.errors import UserError


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("clips: {stride_s: 12}\ngate: {min_motion: {quantile: 0.5}}\n")
    return str(path)


def test_a_recipe_and_overrides_make_one_tree(recipe):
    cfg = config.load(recipe, ["clips.duration_s=4", "embed.videomae.weights=none", "source.path=/a b/c"])
    assert (cfg.clips.stride_s, cfg.clips.duration_s, cfg.clips.sample_fps) == (12, 4, 6)
    assert cfg.gate.min_motion == config.Quantile(quantile=0.5)
    assert cfg.embed.videomae.weights == "none" and cfg.source.path == "/a b/c"


def test_overrides_take_yaml_values_and_nested_quantiles(recipe):
    cfg = config.load(recipe, ["labels.prompts=[a, b]", "gate.min_hand_visibility.quantile=0.25"])
    assert cfg.labels.prompts == ("a", "b")
    assert cfg.gate.min_hand_visibility == config.Quantile(quantile=0.25)
    assert config.load(recipe, ["gate.min_motion=0.3"]).gate.min_motion == 0.3


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("clips.stride=3", "did you mean 'clips.stride_s'"),
        ("clip.duration_s=3", "did you mean 'clips.duration_s'"),
        ("device=cud", "did you mean 'cuda'"),
        ("export.schema=handz", "did you mean 'hands'"),
        ("gate.min_motion=2", "a number from 0 to 1, or {quantile"),
        ("gate.min_motion={quantile: 7}", "a number from 0 to 1, or {quantile"),
        ("clips.duration_s=0", "greater than 0"),
        ("clips.duration_s=.inf", "finite"),
        ("clips.duration_s=long", "valid number"),
        ("frames.height=361", "even"),
        ("skills.k=0", "greater than or equal to 1"),
        ("seed=1.5", "integer"),
        ("nonsense", "key=value"),
        ("clips.stride_s.x=3", "clips.stride_s"),
    ],
)
def test_a_wrong_key_or_value_is_refused_in_one_line(recipe, override, says):
    with pytest.raises(UserError, match=r"\S") as caught:
        config.load(recipe, [override])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_key_in_a_file_names_the_file_and_the_nearest_key(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("gate: {min_moton: 0.1}\n")
    with pytest.raises(UserError, match=r"x\.yaml: no key 'gate.min_moton'; did you mean 'gate.min_motion'"):
        config.load(str(path))


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00"])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"x\.yaml"):
        config.load(str(path))


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'egocentric10k'"):
        config.load("egocentric10")


def test_yaml_cannot_build_objects(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("seed: !!python/object/apply:os.getpid []\n")
    with pytest.raises(UserError, match="not YAML"):
        config.load(str(path))


def test_a_configuration_survives_yaml(recipe):
    cfg = config.load(recipe, ["labels.prompts=[a]", "source.limit=3"])
    again = config.build(yaml.safe_load(yaml.safe_dump(config.to_dict(cfg))))
    assert again == cfg


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["skills.embedding=videomae", "embed.videomae.weights=none"], "makes no such embedding"),
        (["skills.embedding=hand_motion", "hands.detector=none"], "makes no such embedding"),
        (["hands.detector=none", "gate.min_hand_visibility.quantile=0.5"], "looks for no hands"),
        (["clips.sample_fps=2.5"], "whole number"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(recipe, overrides, says):
    with pytest.raises(UserError, match=says):
        config.check_together(config.load(recipe, ["run_dir=r", *overrides]))


def test_differences_ignore_only_what_cannot_change_rows(recipe):
    old = config.to_dict(config.load(recipe, ["workers=1", "run_dir=a"]))
    new = config.to_dict(config.load(recipe, ["workers=8", "run_dir=b"]))
    assert config.differences(old, new) == []
    new = config.to_dict(config.load(recipe, ["clips.stride_s=7"]))
    assert config.differences(old, new) == ["clips.stride_s: 12.0 → 7.0"]


def test_every_shipped_recipe_is_valid():
    assert {"demo", "folder", "egocentric10k"} <= set(config.recipes())
    for name in config.recipes():
        config.load(name)
