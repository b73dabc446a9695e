"""Files in HOT3D's layouts with known poses: a recording's folder, and the tar of a clip."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from ego2robot import poses
from tests.footage import textured_frame

# As on the glasses: f, c_x, c_y, six radial, two tangential, four thin-prism terms.
PARAMS = [60.9, 70.1, 69.3, 0.4, -0.49, 0.23, 0.99, -1.57, 0.6, -4e-4, -7e-4, -6e-4, -2e-4, 2e-4, -2e-4]
WIDTH, HEIGHT = 144, 140  # of the stored picture, which lies on its side
OBJECTS = (223371871635142, 37787722328019, 5462893327580)
BETAS = [0.1 * i for i in range(10)]


def turned(angle, axis=(0, 1, 0)):
    q = np.array([np.cos(angle / 2), *(np.sin(angle / 2) * np.asarray(axis, float))])
    return q


T_DEVICE_CAMERA = poses.pose([-0.0046, -0.0117, -0.0049], turned(0.6, (0.6, 0.8, 0)))


def headset(s):
    """T_world_device at ``s`` seconds."""
    return poses.pose([0.1 * s, 1.6, -0.2 * s], turned(0.3 * s))


def wrist(side, s):
    """T_world_wrist."""
    sign = {"left": -1, "right": 1}[side]
    return poses.pose([sign * 0.1, 1.5 + 0.1 * s, 0.5], turned(sign * 0.4 + 0.5 * s, (1, 0, 0)))


def thing(k, s):
    """T_world_object."""
    return poses.pose([0.1 * k, 1.0, -0.6 + 0.05 * s], turned(0.2 * k, (0, 0, 1)))


def xform(T):
    return {"t_xyz": T[:3, 3].tolist(), "q_wxyz": poses.matrix_to_quat(T[:3, :3]).tolist()}


def se3(T):
    return {
        "translation_xyz": T[:3, 3].tolist(),
        "quaternion_wxyz": poses.matrix_to_quat(T[:3, :3]).tolist(),
    }


def mano(side, s):
    """MANO's parameters: pose [15], translation and orientation (they are not those of the wrist joint)."""
    T = wrist(side, s).copy()
    T[0, 3] += 0.1
    return [0.01 * i + s for i in range(15)], T


def hand_rows(stamps, t0, kind):
    rows = []
    for t in stamps:
        s, hands = (t - t0) / 1e9, {}
        for key, side in (("0", "left"), ("1", "right")):
            if kind == "mano":
                pose, T = mano(side, s)
                hands[key] = {"pose": pose, "wrist_xform": xform(T), "betas": BETAS}
            else:
                hands[key] = {
                    "wrist_xform": xform(wrist(side, s)),
                    "joint_angles": [0.1] * 22,
                    "hand_confidence": 0.75,
                }
        rows.append({"timestamp_ns": int(t), "hand_poses": hands})
    return rows


def write_recording(folder: Path, stamps, headset_name="Aria") -> Path:
    """All of a recording's files but ``recording.vrs``, one row of each at every one of ``stamps`` (ns)."""
    folder.mkdir(parents=True, exist_ok=True)
    stamps, t0 = [int(t) for t in stamps], int(stamps[0])
    status = {"mano_hand_pose_gt": True, "umetrack_hand_pose_gt": True, "object_pose_gt": True}
    meta = {"gt_available_status": status, "headset": headset_name, "participant_id": "P0003"}
    (folder / "metadata.json").write_text(json.dumps(meta | {"recording_name": folder.name}, indent=4))
    for kind in ("mano", "umetrack"):
        lines = [json.dumps(row) for row in hand_rows(stamps, t0, kind)]
        (folder / f"{kind}_hand_pose_trajectory.jsonl").write_text("\n".join(lines) + "\n")
    head = "object_uid,timestamp[ns],t_wo_x[m],t_wo_y[m],t_wo_z[m],q_wo_w,q_wo_x,q_wo_y,q_wo_z"

    def row(uid, t, T):
        q = poses.matrix_to_quat(T[:3, :3])
        return ",".join([str(uid), str(t), *(repr(float(x)) for x in (*T[:3, 3], *q))])

    lines = [row(5411364721403, t, headset((t - t0) / 1e9)) for t in stamps]
    (folder / "headset_trajectory.csv").write_text("\n".join([head, *lines]) + "\n")
    lines = [row(uid, t, thing(k, (t - t0) / 1e9)) for t in stamps for k, uid in enumerate(OBJECTS)]
    (folder / "dynamic_objects.csv").write_text("\n".join([head, *lines]) + "\n")
    return folder


def jpeg(picture) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95)
    return file.getvalue()


def clip_members(times_ns, stream="214-1", annotated=True):
    """(name, bytes) of a clip's members; pictures carry their number when they are upright."""
    members, t0 = [], int(times_ns[0])
    for i, t in enumerate(int(t) for t in times_ns):
        s, key = (t - t0) / 1e9, f"{i:06d}"
        picture = textured_frame(i, HEIGHT, WIDTH) if stream == "214-1" else textured_frame(i, WIDTH, HEIGHT)
        stored = np.rot90(picture, 1) if stream == "214-1" else picture.mean(-1).astype(np.uint8)
        calibration = {
            "label": "camera-rgb", "stream_id": stream, "serial_number": "x", "image_width": WIDTH,
            "image_height": HEIGHT, "projection_model_type": "CameraModelType.FISHEYE624",
            "projection_params": PARAMS, "T_device_from_camera": se3(T_DEVICE_CAMERA), "max_solid_angle": 1.5,
        }  # fmt: skip
        T_wc = poses.compose(headset(s), T_DEVICE_CAMERA)
        cameras = {stream: {"calibration": calibration, "T_world_from_camera": se3(T_wc)}}
        info = {"sequence_id": "P0003_c701bd11", "participant_id": "P0003", "device": "Aria",
                "ref_timestamp_ns": t, "image_timestamps_ns": {stream: t}}  # fmt: skip
        members += [
            (f"{key}.image_{stream}.jpg", jpeg(np.ascontiguousarray(stored))),
            (f"{key}.cameras.json", json.dumps(cameras).encode()),
            (f"{key}.info.json", json.dumps(info).encode()),
        ]
        if annotated:
            hands = {}
            for side in ("left", "right"):
                thetas, T = mano(side, s)
                axis_angle = rotation_vector(T[:3, :3])
                hands[side] = {
                    "mano_pose": {"thetas": thetas, "wrist_xform": [*axis_angle, *T[:3, 3].tolist()]},
                    "umetrack_pose": {"joint_angles": [0.1] * 20, "T_world_from_wrist": se3(wrist(side, s))},
                    "boxes_amodal": {}, "visibilities_modeled": {},
                }  # fmt: skip
            things = {
                str(k + 1): [{"object_uid": str(uid), "T_world_from_object": se3(thing(k, s))}]
                for k, uid in enumerate(OBJECTS)
            }
            members += [
                (f"{key}.hands.json", json.dumps(hands).encode()),
                (f"{key}.objects.json", json.dumps(things).encode()),
            ]
    if annotated:
        members.append(("__hand_shapes.json__", json.dumps({"mano": BETAS, "umetrack": {}}).encode()))
    return members


def rotation_vector(R):
    q = poses.matrix_to_quat(R)
    length = np.linalg.norm(q[1:])
    return (q[1:] / max(length, 1e-12) * 2 * np.arctan2(length, q[0])).tolist()


def write_tar(path: Path, members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
