import numpy as np
import pytest

from ego2robot import config
from ego2robot.stages import gate


def test_thresholds_keep_what_equals_them():
    g = gate.Gate(0.1, 0.3)
    assert (
        g.refuses_motion(float(np.float32(0.1))) is None and g.refuses_hands(float(np.float32(0.3))) is None
    )
    assert g.refuses_motion(0.0999) == "motion below 0.1"
    assert g.refuses_hands(0.25) == "hand visibility below 0.3"


def test_absolute_thresholds_need_no_calibration():
    cfg = config.Gate(min_motion=0.2, min_hand_visibility=0.4)
    assert not gate.needs_calibration(cfg)
    assert gate.resolve(cfg) == gate.Gate(0.2, 0.4, 0)


@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_a_quantile_keeps_that_upper_share_and_never_nothing(q):
    cfg = config.Gate(min_motion=config.Quantile(quantile=q), min_hand_visibility=0.3)
    scores = np.random.default_rng(0).random(1001).astype(np.float32)
    g = gate.resolve(cfg, {"motion": scores.tolist()})
    kept = sum(g.refuses_motion(float(s)) is None for s in scores)
    assert kept == pytest.approx((1 - q) * 1000 + 1, abs=1) and g.calibrated_on == 1001


def test_a_quantile_over_equal_scores_keeps_them_all():
    cfg = config.Gate(min_motion=config.Quantile(quantile=0.9))
    g = gate.resolve(cfg, {"motion": [0.0137] * 50, "hand_visibility": [0.5] * 50})
    assert g.refuses_motion(0.0137) is None


def test_a_quantile_over_no_clips_keeps_everything():
    g = gate.resolve(config.Gate(min_motion=config.Quantile(quantile=0.9)))
    assert g.refuses_motion(0.0) is None


def test_the_camera_gates():
    g = gate.resolve(config.Gate(min_residual_motion=0.02, max_camera_motion=0.5))
    assert g.refuses_camera(0.02, 0.5) is None
    assert g.refuses_camera(0.019, 0.0) == "residual motion below 0.02"
    assert g.refuses_camera(0.5, 0.51) == "camera motion above 0.5"
    assert gate.resolve(config.Gate()).refuses_camera(0.0, 1e9) is None


def test_a_quantile_of_the_cameras_motion_keeps_the_lower_share():
    cfg = config.Gate(max_camera_motion=config.Quantile(quantile=0.25))
    scores = np.random.default_rng(0).random(1001).astype(np.float32)
    g = gate.resolve(cfg, {"motion": scores.tolist(), "camera_motion": scores.tolist()})
    assert sum(g.refuses_camera(1.0, float(s)) is None for s in scores) == 251
    assert gate.resolve(cfg).refuses_camera(1.0, 99.0) is None
