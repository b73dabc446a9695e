"""Rotations and rigid transforms in float64, and their values between the moments they were measured at.

A pose ``T_a_b`` [4, 4] takes points given in frame ``b`` to frame ``a``: ``p_a = T_a_b @ p_b``. Quaternions
are (w, x, y, z). What is not a pose (NaN, a quaternion of no length) comes out as NaN, never as an
identity that looks like a measurement.
"""

from __future__ import annotations

import numpy as np

# Where two rotations are nearer than this (1 - cos of half the angle), sin of the angle is no good divisor.
NEAR = 1e-12


def quat_to_matrix(q_wxyz: np.ndarray) -> np.ndarray:
    """Rotation matrices of quaternions.

    Args:
        q_wxyz: [..., 4], of any length but zero; q and -q are the same rotation.

    Returns:
        float64 [..., 3, 3], NaN where ``q_wxyz`` is not finite or has no length.
    """
    q = np.asarray(q_wxyz, np.float64)
    w, x, y, z = np.moveaxis(_unit(q), -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([np.stack(row, -1) for row in rows], -2)


def matrix_to_quat(rotation: np.ndarray) -> np.ndarray:
    """The quaternions of rotation matrices, with w ≥ 0.

    Of the four ways to divide (Shepperd 1978), each takes the one with the largest divisor.

    Args:
        rotation: [..., 3, 3].

    Returns:
        float64 [..., 4] of length 1, NaN where ``rotation`` is not finite.
    """
    m = np.asarray(rotation, np.float64)
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    a, b, c = m[..., 2, 1], m[..., 0, 2], m[..., 1, 0]  # the lower of each pair of mirrored elements
    d, e, f = m[..., 1, 2], m[..., 2, 0], m[..., 0, 1]
    # 4 q qᵀ, whose columns are all multiples of q.
    columns = np.stack(
        [
            np.stack([1 + xx + yy + zz, a - d, b - e, c - f], -1),
            np.stack([a - d, 1 + xx - yy - zz, c + f, b + e], -1),
            np.stack([b - e, c + f, 1 - xx + yy - zz, a + d], -1),
            np.stack([c - f, b + e, a + d, 1 - xx - yy + zz], -1),
        ],
        -2,
    )
    best = np.argmax(np.einsum("...ii->...i", np.nan_to_num(columns)), -1)
    q = _unit(np.take_along_axis(columns, best[..., None, None], -2)[..., 0, :])
    return np.where(q[..., :1] < 0, -q, q)


def pose(translation: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """Rigid transforms from their parts.

    Args:
        translation: [..., 3], metres.
        rotation: matrices [..., 3, 3], or quaternions [..., 4] (w, x, y, z).

    Returns:
        float64 [..., 4, 4]; all of a pose is NaN where any of its parts is not finite.
    """
    t, r = np.asarray(translation, np.float64), np.asarray(rotation, np.float64)
    if r.ndim == t.ndim and r.shape[-1] == 4:
        r = quat_to_matrix(r)
    T = np.zeros((*np.broadcast_shapes(t.shape[:-1], r.shape[:-2]), 4, 4))
    T[..., :3, :3], T[..., :3, 3], T[..., 3, 3] = r, t, 1
    T[~np.isfinite(T).all((-2, -1))] = np.nan
    return T


def compose(first: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """``T_a_b, T_b_c, T_c_d`` → ``T_a_d``; float64 [..., 4, 4], leading axes are broadcast."""
    T = np.asarray(first, np.float64)
    for other in others:
        T = T @ np.asarray(other, np.float64)
    return T


def inverse(T: np.ndarray) -> np.ndarray:
    """``T_a_b`` → ``T_b_a``, float64 [..., 4, 4].

    The rotation is taken for one: its transpose is its inverse.
    """
    T = np.asarray(T, np.float64)
    turned = np.swapaxes(T[..., :3, :3], -1, -2)
    back = np.zeros_like(T)
    back[..., :3, :3] = turned
    back[..., :3, 3] = -(turned @ T[..., :3, 3:])[..., 0]
    back[..., 3, 3] = 1
    back[~np.isfinite(T).all((-2, -1))] = np.nan
    return back


def transform(T: np.ndarray, points: np.ndarray) -> np.ndarray:
    """``points`` [..., 3] of frame b in frame a, for ``T_a_b`` [..., 4, 4]; leading axes are broadcast."""
    T, p = np.asarray(T, np.float64), np.asarray(points, np.float64)
    return (T[..., :3, :3] @ p[..., None])[..., 0] + T[..., :3, 3]


def slerp(q0_wxyz: np.ndarray, q1_wxyz: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Rotations on the shorter way from ``q0`` to ``q1`` at constant angular speed (Shoemake 1985).

    Args:
        q0_wxyz, q1_wxyz: [..., 4].
        share: [...], 0 for ``q0``, 1 for ``q1``.

    Returns:
        float64 [..., 4] of length 1, NaN where either is not a rotation.
    """
    q0, q1 = _unit(np.asarray(q0_wxyz, np.float64)), _unit(np.asarray(q1_wxyz, np.float64))
    t = np.asarray(share, np.float64)[..., None]
    cos = (q0 * q1).sum(-1, keepdims=True)
    q1, cos = np.where(cos < 0, -q1, q1), np.abs(cos)
    near = 1 - cos < NEAR
    angle = np.arccos(np.clip(cos, -1, 1))
    sin = np.where(near, 1.0, np.sin(angle))
    w0 = np.where(near, 1 - t, np.sin((1 - t) * angle) / sin)
    w1 = np.where(near, t, np.sin(t * angle) / sin)
    return _unit(w0 * q0 + w1 * q1)


def interpolate(times: np.ndarray, T: np.ndarray, at: np.ndarray, max_gap: float = np.inf) -> np.ndarray:
    """Poses between those that were measured: translations linearly, rotations by :func:`slerp`.

    Args:
        times: [N], ascending; any unit (integers are not rounded to floats before they are subtracted,
            so that nanoseconds since boot or since 1970 keep their digits).
        T: [N, ..., 4, 4], NaN where nothing was measured.
        at: [M], in the unit of ``times``.
        max_gap: further apart, two measurements say nothing of the time between them.

    Returns:
        float64 [M, ..., 4, 4]: NaN before the first and after the last of ``times``, in gaps, and where a
        neighbour is NaN; a measurement's own moment gives that measurement.

    Raises:
        ValueError: ``times`` does not ascend, or has not one pose each.
    """
    T = np.asarray(T, np.float64)
    left, right, share = _brackets(times, len(T), at, max_gap)
    if not len(T):
        return np.full((len(share), *T.shape[1:]), np.nan)
    w = share.reshape(-1, *(1,) * (T.ndim - 3))
    a, b = T[left], T[right]
    between = pose(
        _mix(a[..., :3, 3], b[..., :3, 3], w[..., None]),
        slerp(matrix_to_quat(a[..., :3, :3]), matrix_to_quat(b[..., :3, :3]), w),
    )
    exact = w[..., None, None]
    between = np.where(exact == 0, a, np.where(exact == 1, b, between))
    between[np.isnan(share)] = np.nan
    return between


def interpolate_values(
    times: np.ndarray, values: np.ndarray, at: np.ndarray, max_gap: float = np.inf
) -> np.ndarray:
    """As :func:`interpolate`, for numbers or positions [N, ...], linearly."""
    values = np.asarray(values, np.float64)
    left, right, share = _brackets(times, len(values), at, max_gap)
    if not len(values):
        return np.full((len(share), *values.shape[1:]), np.nan)
    w = share.reshape(-1, *(1,) * (values.ndim - 1))
    found = np.where(
        w == 0, values[left], np.where(w == 1, values[right], _mix(values[left], values[right], w))
    )
    found[np.isnan(share)] = np.nan
    return found


def _mix(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    return a + share * (b - a)


def _brackets(
    times: np.ndarray, n: int, at: np.ndarray, max_gap: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The measurements around each moment: indices [M], [M], and where between them it lies, 0 to 1 [M]
    (NaN: nowhere)."""
    t, wanted = np.asarray(times), np.asarray(at)
    if t.ndim != 1 or len(t) != n:
        raise ValueError(f"{n} poses for times of shape {t.shape}")
    if n and (np.isnan(t.astype(np.float64)).any() or (t[1:] < t[:-1]).any()):
        raise ValueError("times must ascend")
    if not n:
        return np.zeros(len(wanted), int), np.zeros(len(wanted), int), np.full(len(wanted), np.nan)
    right = np.searchsorted(t, wanted, side="right")  # of equal times the last counts
    left = np.clip(right - 1, 0, n - 1)
    right = np.clip(right, 0, n - 1)
    gap = (t[right] - t[left]).astype(np.float64)
    since = (wanted - t[left]).astype(np.float64)
    share = np.divide(since, gap, out=np.zeros(len(wanted)), where=gap > 0)
    nowhere = (wanted < t[0]) | (wanted > t[-1]) | ((gap > max_gap) & (since > 0)) | np.isnan(since)
    return left, right, np.where(nowhere, np.nan, share)


def _unit(q: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(q, axis=-1, keepdims=True)
    usable = np.isfinite(length) & (length > 0)
    return np.where(usable, q / np.where(usable, length, 1.0), np.nan)
