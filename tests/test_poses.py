import numpy as np
import pytest

from ego2robot import poses


def random_quats(n, seed=0):
    q = np.random.default_rng(seed).normal(size=(n, 4))
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


def random_poses(n, seed=0):
    return poses.pose(np.random.default_rng(seed + 1).normal(size=(n, 3)), random_quats(n, seed))


def test_a_quaternion_is_w_first_and_turns_as_the_right_hand_does():
    quarter_about_z = poses.quat_to_matrix(np.array([np.sqrt(0.5), 0, 0, np.sqrt(0.5)]))
    assert quarter_about_z @ [1, 0, 0] == pytest.approx([0, 1, 0])
    assert poses.quat_to_matrix(np.array([2.0, 0, 0, 0])) == pytest.approx(np.eye(3))


def test_quaternions_and_matrices_are_each_others_inverse_for_every_largest_component():
    axes = np.concatenate([np.eye(4), -np.eye(4), random_quats(500)])
    back = poses.matrix_to_quat(poses.quat_to_matrix(axes))
    assert np.abs((back * axes).sum(-1)) == pytest.approx(np.ones(len(axes)))
    assert (back[:, 0] >= 0).all()
    R = poses.quat_to_matrix(axes)
    assert R @ np.swapaxes(R, -1, -2) == pytest.approx(np.broadcast_to(np.eye(3), R.shape))
    assert np.linalg.det(R) == pytest.approx(np.ones(len(R)))


@pytest.mark.parametrize("q", [[0, 0, 0, 0], [np.nan, 0, 0, 1], [np.inf, 0, 0, 0]])
def test_what_is_no_rotation_is_nan_and_not_an_identity(q):
    assert np.isnan(poses.quat_to_matrix(np.array(q, float))).all()
    assert np.isnan(poses.pose(np.zeros(3), np.array(q, float))).all()


def test_a_pose_with_one_unknown_coordinate_is_unknown():
    T = poses.pose(np.array([[0, np.nan, 0], [1, 2, 3]]), np.array([1.0, 0, 0, 0])[None].repeat(2, 0))
    assert np.isnan(T[0]).all() and np.isfinite(T[1]).all()
    assert np.isnan(poses.inverse(T)[0]).all() and np.isnan(poses.compose(T, T)[0]).all()


def test_inverse_and_compose_take_points_there_and_back():
    T, S = random_poses(50), random_poses(50, seed=9)
    p = np.random.default_rng(3).normal(size=(50, 3))
    assert poses.transform(poses.inverse(T), poses.transform(T, p)) == pytest.approx(p)
    assert poses.transform(poses.compose(T, S), p) == pytest.approx(poses.transform(T, poses.transform(S, p)))
    assert poses.inverse(T) == pytest.approx(np.linalg.inv(T))


def test_between_two_poses_the_angle_grows_evenly_on_the_shorter_way():
    def about_y(angle):
        return [np.cos(angle / 2), 0, np.sin(angle / 2), 0]

    q = np.array([about_y(0.2), [-x for x in about_y(1.2)]])  # the same rotation with the other sign
    T = poses.pose(np.array([[0.0, 0, 0], [2, 4, 6]]), q)
    at = np.linspace(10, 20, 11)
    found = poses.interpolate(np.array([10.0, 20.0]), T, at)
    angles = np.arctan2(found[:, 0, 2], found[:, 0, 0])
    assert angles == pytest.approx(np.linspace(0.2, 1.2, 11))
    assert found[:, :3, 3] == pytest.approx(np.linspace(0, 1, 11)[:, None] * [2, 4, 6])


def test_slerp_agrees_with_scipy_on_random_rotations_near_and_far():
    from scipy.spatial.transform import Rotation, Slerp

    near = random_quats(1) + 1e-8 * random_quats(1, seed=5)
    q = np.concatenate([random_quats(20), near, near])
    t = np.arange(len(q), dtype=float)
    at = np.linspace(0, len(q) - 1, 200)
    theirs = Slerp(t, Rotation.from_quat(q[:, [1, 2, 3, 0]]))(at).as_matrix()
    ours = poses.interpolate(t, poses.pose(np.zeros((len(q), 3)), q), at)[:, :3, :3]
    assert ours == pytest.approx(theirs, abs=1e-7)


def test_outside_of_what_was_measured_in_gaps_and_beside_unknown_poses_nothing_is_made_up():
    T = random_poses(5)
    T[3] = np.nan
    times = np.array([0.0, 1.0, 5.0, 6.0, 7.0])
    found = poses.interpolate(times, T, np.array([-0.1, 0, 0.5, 1, 3, 5, 5.5, 6, 7, 7.1]), max_gap=2)
    known = np.isfinite(found).all((1, 2))
    assert known.tolist() == [False, True, True, True, False, True, False, False, True, False]
    assert (found[[1, 3, 5, 8]] == T[[0, 1, 2, 4]]).all()  # a measurement's own moment, to the last bit


def test_nanoseconds_since_1970_keep_their_digits():
    times = np.array([1_700_000_000_000_000_000, 1_700_000_000_000_000_100])
    values = poses.interpolate_values(times, np.array([0.0, 100.0]), times[:1] + 37)
    assert values == pytest.approx([37.0])


def test_values_are_interpolated_with_any_number_of_axes_and_none_at_all_gives_unknown():
    values = np.arange(12.0).reshape(3, 2, 2)
    assert poses.interpolate_values(np.arange(3), values, np.array([0.5]))[0] == pytest.approx(
        np.array([[2.0, 3], [4, 5]])
    )
    assert np.isnan(poses.interpolate(np.zeros(0), np.zeros((0, 4, 4)), np.zeros(3))).all()
    assert np.isnan(poses.interpolate_values(np.zeros(0), np.zeros((0, 7)), np.zeros(3))).shape == (3, 7)
    hands = np.stack([random_poses(3), random_poses(3, 4)], 1)  # [N, hands, 4, 4]
    assert poses.interpolate(np.arange(3.0), hands, np.array([1.5])).shape == (1, 2, 4, 4)


@pytest.mark.parametrize("times", [[0, 2, 1], [0, 1], [0, np.nan, 1]])
def test_times_that_do_not_ascend_or_are_too_few_are_refused(times):
    with pytest.raises(ValueError, match=r"ascend|3 poses"):
        poses.interpolate(np.array(times), random_poses(3), np.zeros(1))
