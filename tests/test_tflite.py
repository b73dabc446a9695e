"""TensorFlow Lite networks as torch modules, held against TensorFlow Lite's own interpreter."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
import tflite
import torch

from ego2robot import models
from ego2robot.errors import UserError
from ego2robot.hands_net import onednn, staged
from ego2robot.hands_net import tflite as loader

FILES = [network.file for network in models.NETWORKS + models.OTHER_NETWORKS]


@pytest.fixture(scope="session")
def networks() -> dict[str, Path]:
    try:
        return {file: models.network_path(file, pull_if_missing=True) for file in FILES}
    except UserError as error:
        pytest.skip(f"the networks cannot be had: {error}")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def interpret(data: bytes, x_BHWC: np.ndarray) -> list[np.ndarray]:
    """Outputs of the interpreter in the file's order, one picture at a time."""
    interpreter_of = pytest.importorskip("ai_edge_litert.interpreter").Interpreter
    interpreter = interpreter_of(model_content=data, num_threads=1)
    interpreter.allocate_tensors()
    rows = []
    for x in x_BHWC:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x[None])
        interpreter.invoke()
        rows.append([interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()])
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def run(module: torch.nn.Module, x_BHWC: np.ndarray) -> list[np.ndarray]:
    x = torch.from_numpy(x_BHWC)
    with torch.inference_mode():
        outputs = module(x.permute(0, 3, 1, 2) if x.ndim == 4 else x)
    return [(o.permute(0, 2, 3, 1) if o.ndim == 4 else o).numpy() for o in outputs]


def smooth(size: tuple[int, int], n: int = 3) -> np.ndarray:
    """float32 [n, h, w, 3] of 0 to 1 with blobs, edges and noise, such that detectors answer strongly."""
    rng = np.random.default_rng(1)
    coarse = torch.from_numpy(rng.random((n, 3, 6, 6), np.float32))
    picture = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").permute(0, 2, 3, 1).numpy()
    return np.ascontiguousarray((picture + 0.05 * rng.random(picture.shape)).clip(0, 1), np.float32)


@pytest.mark.parametrize("file", FILES)
def test_networks_give_what_the_interpreter_gives(networks: dict[str, Path], file: str) -> None:
    module = loader.load(networks[file])
    x = smooth(module.meta["input_size"])
    wanted = interpret(networks[file].read_bytes(), x)
    versions = {"plain": module}
    if onednn.available(torch.float32):
        versions["fused"] = onednn.fuse(module)
        versions["staged"] = staged.Staged(versions["fused"], torch.zeros(1, 3, *module.meta["input_size"]))
    for name, version in versions.items():
        found = run(version, x)
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_picture_does_not_depend_on_the_rest_of_its_batch(
    networks: dict[str, Path], file: str, dtype: torch.dtype
) -> None:
    module = loader.load(networks[file])
    size = module.meta["input_size"]
    x = smooth(size, 11)
    if not onednn.available(dtype):  # matrix products add up in another order for another batch
        for together, alone in zip(run(module, x), run(module, x[3:4]), strict=True):
            np.testing.assert_allclose(together[3:4], alone, atol=1e-3)
        return
    low = module if dtype == torch.float32 else loader.half(module, dtype)
    network = staged.Staged(onednn.fuse(low), torch.zeros(1, 3, *size))
    wanted = run(network, x)
    for some in ([3], [0, 1], [9, 4, 5, 6, 7], list(range(10, -1, -1))):
        for together, alone in zip(wanted, run(network, x[some]), strict=True):
            np.testing.assert_array_equal(together[some], alone)


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 0.04), (torch.float16, 0.005)])
def test_half_precision_stays_near(networks: dict[str, Path], dtype: torch.dtype, share: float) -> None:
    module = loader.load(networks["hand_landmark_lite.tflite"])
    low = loader.half(module, dtype)
    x = smooth(module.meta["input_size"], 1)
    wanted, found = run(module, x), run(low, x)
    assert {a.dtype for a in found} == {np.dtype(np.float32)}
    assert any(buffer.dtype == dtype for buffer in low.buffers())
    assert all(buffer.dtype == torch.float32 for buffer in module.buffers()), "the original was changed"
    for a, b in zip(found, wanted, strict=True):
        assert np.abs(a - b).max() <= share * max(1.0, np.abs(b).max())
    assert any(not np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_windows_lose_nothing_in_sum_when_they_are_rounded(networks: dict[str, Path]) -> None:
    module = loader.load(networks["hand_landmark_lite.tflite"])
    low = dict(loader.half(module, torch.bfloat16).named_buffers())
    windows = {n: b for n, b in module.named_buffers() if b.ndim == 4 and b.shape[2] > 1 and b.shape[1] == 1}
    assert len(windows) > 10
    for name, window_OIHW in windows.items():
        assert low[name].dtype == torch.bfloat16
        lost_OIHW = low[name].float() - window_OIHW
        assert 0 < lost_OIHW.abs().max() <= window_OIHW.abs().max() / 64
        # No more is lost by a whole window than by its last weight.
        most_O = window_OIHW.flatten(1).abs().amax(1) / 128
        assert (lost_OIHW.flatten(1).sum(1).abs() <= most_O).all()
    carried = sum(float((low[n].float() - w).flatten(1).sum(1).abs().mean()) for n, w in windows.items())
    alone = sum(float((w.bfloat16().float() - w).flatten(1).sum(1).abs().mean()) for w in windows.values())
    assert carried < alone / 2


def test_torch_compiles_a_network_without_a_break(networks: dict[str, Path]) -> None:
    module = loader.load(networks["face_detection_short_range.tflite"])
    x = smooth(module.meta["input_size"], 2)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for a, b in zip(run(compiled, x), run(module, x), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


# -- operators one by one, in files written here ----------------------------------------------------

Fields = dict[str, Any]


def network(
    kind: str,
    inputs: Sequence[tuple[int, ...] | np.ndarray],
    output: tuple[int, ...],
    table: str | None = None,
    fields: Fields | None = None,
) -> bytes:
    """A file with one operator. ``inputs``: the shape of what is computed, arrays for constants."""
    b = flatbuffers.Builder(0)

    def vector(start: Callable[..., Any], items: Sequence[int], add: Callable[[int], Any]) -> int:
        start(b, len(items))
        for item in reversed(items):
            add(item)
        return int(b.EndVector())

    buffers = [b""] + [a.tobytes() if isinstance(a, np.ndarray) else b"" for a in inputs] + [b""]
    offsets = []
    for data in buffers:
        raw = b.CreateByteVector(data) if data else None
        tflite.BufferStart(b)
        if raw is not None:
            tflite.BufferAddData(b, raw)
        offsets.append(tflite.BufferEnd(b))
    types = {np.dtype("f4"): 0, np.dtype("f2"): 1, np.dtype("i4"): 2, np.dtype("i1"): 9}
    tensors = []
    for i, item in enumerate([*inputs, output]):
        shape = item.shape if isinstance(item, np.ndarray) else item
        kind_of = types[item.dtype] if isinstance(item, np.ndarray) else 0
        dims = vector(tflite.TensorStartShapeVector, shape, b.PrependInt32)
        name = b.CreateString(f"t{i}")
        tflite.TensorStart(b)
        tflite.TensorAddShape(b, dims)
        tflite.TensorAddType(b, kind_of)
        tflite.TensorAddBuffer(b, i + 1)
        tflite.TensorAddName(b, name)
        tensors.append(tflite.TensorEnd(b))
    options = None
    if table:
        getattr(tflite, f"{table}Start")(b)
        for field, value in (fields or {}).items():
            getattr(tflite, f"{table}Add{field}")(b, value)
        options = getattr(tflite, f"{table}End")(b)
    taken = vector(tflite.OperatorStartInputsVector, range(len(inputs)), b.PrependInt32)
    made = vector(tflite.OperatorStartOutputsVector, [len(inputs)], b.PrependInt32)
    tflite.OperatorStart(b)
    tflite.OperatorAddOpcodeIndex(b, 0)
    tflite.OperatorAddInputs(b, taken)
    tflite.OperatorAddOutputs(b, made)
    if options is not None and table is not None:
        tflite.OperatorAddBuiltinOptionsType(b, getattr(tflite.BuiltinOptions, table))
        tflite.OperatorAddBuiltinOptions(b, options)
    operator = tflite.OperatorEnd(b)
    all_tensors = vector(tflite.SubGraphStartTensorsVector, tensors, b.PrependUOffsetTRelative)
    computed = [i for i, item in enumerate(inputs) if not isinstance(item, np.ndarray)]
    ins = vector(tflite.SubGraphStartInputsVector, computed, b.PrependInt32)
    outs = vector(tflite.SubGraphStartOutputsVector, [len(inputs)], b.PrependInt32)
    operators = vector(tflite.SubGraphStartOperatorsVector, [operator], b.PrependUOffsetTRelative)
    tflite.SubGraphStart(b)
    tflite.SubGraphAddTensors(b, all_tensors)
    tflite.SubGraphAddInputs(b, ins)
    tflite.SubGraphAddOutputs(b, outs)
    tflite.SubGraphAddOperators(b, operators)
    subgraph = tflite.SubGraphEnd(b)
    number = getattr(tflite.BuiltinOperator, kind)
    custom = b.CreateString("TheirOwn") if kind == "CUSTOM" else None
    tflite.OperatorCodeStart(b)
    tflite.OperatorCodeAddDeprecatedBuiltinCode(b, min(number, 127))
    tflite.OperatorCodeAddBuiltinCode(b, number)
    tflite.OperatorCodeAddVersion(b, 1)
    if custom is not None:
        tflite.OperatorCodeAddCustomCode(b, custom)
    code = tflite.OperatorCodeEnd(b)
    codes = vector(tflite.ModelStartOperatorCodesVector, [code], b.PrependUOffsetTRelative)
    subgraphs = vector(tflite.ModelStartSubgraphsVector, [subgraph], b.PrependUOffsetTRelative)
    all_buffers = vector(tflite.ModelStartBuffersVector, offsets, b.PrependUOffsetTRelative)
    tflite.ModelStart(b)
    tflite.ModelAddVersion(b, 3)
    tflite.ModelAddOperatorCodes(b, codes)
    tflite.ModelAddSubgraphs(b, subgraphs)
    tflite.ModelAddBuffers(b, all_buffers)
    b.Finish(tflite.ModelEnd(b), file_identifier=b"TFL3")
    return bytes(b.Output())


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def ints(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


WINDOW = {"StrideH": 2, "StrideW": 2, "Padding": 0}
CASES: dict[str, tuple[Any, ...]] = {
    "conv same, even": (
        "CONV_2D", [(1, 10, 12, 3), numbers(8, 5, 5, 3), numbers(8)], (1, 5, 6, 8),
        "Conv2DOptions", {**WINDOW, "FusedActivationFunction": 1},
    ),
    "conv same, odd": (
        "CONV_2D", [(1, 9, 11, 3), numbers(8, 3, 3, 3), numbers(8)], (1, 5, 6, 8), "Conv2DOptions", WINDOW,
    ),
    "conv valid, dilated": (
        "CONV_2D", [(1, 9, 11, 3), numbers(4, 3, 3, 3), numbers(4)], (1, 5, 7, 4),
        "Conv2DOptions",
        {"StrideH": 1, "StrideW": 1, "Padding": 1, "DilationHFactor": 2, "DilationWFactor": 2,
         "FusedActivationFunction": 3},
    ),
    "depthwise": (
        "DEPTHWISE_CONV_2D", [(1, 10, 10, 6), numbers(1, 5, 5, 6), numbers(6)], (1, 5, 5, 6),
        "DepthwiseConv2DOptions", {**WINDOW, "DepthMultiplier": 1},
    ),
    "depthwise, two of each": (
        "DEPTHWISE_CONV_2D", [(1, 7, 7, 3), numbers(1, 3, 3, 6), numbers(6)], (1, 7, 7, 6),
        "DepthwiseConv2DOptions", {"StrideH": 1, "StrideW": 1, "Padding": 0, "DepthMultiplier": 2},
    ),
    "transposed, same": (
        "TRANSPOSE_CONV", [ints(1, 10, 12, 4), numbers(4, 3, 3, 6), (1, 5, 6, 6)], (1, 10, 12, 4),
        "TransposeConvOptions", WINDOW,
    ),
    "transposed, valid": (
        "TRANSPOSE_CONV", [ints(1, 11, 13, 4), numbers(4, 3, 3, 6), (1, 5, 6, 6)], (1, 11, 13, 4),
        "TransposeConvOptions", {**WINDOW, "Padding": 1},
    ),
    "transposed, no overlap": (
        "TRANSPOSE_CONV", [ints(1, 10, 12, 4), numbers(4, 2, 2, 6), (1, 5, 6, 6)], (1, 10, 12, 4),
        "TransposeConvOptions", {**WINDOW, "Padding": 1},
    ),
    "bilinear, pixel centres": (
        "RESIZE_BILINEAR", [(1, 5, 6, 3), ints(10, 12)], (1, 10, 12, 3),
        "ResizeBilinearOptions", {"HalfPixelCenters": True},
    ),
    "bilinear, corners": (
        "RESIZE_BILINEAR", [(1, 5, 6, 3), ints(10, 12)], (1, 10, 12, 3),
        "ResizeBilinearOptions", {"AlignCorners": True},
    ),
    "max pool, uneven": (
        "MAX_POOL_2D", [(1, 9, 10, 3)], (1, 5, 5, 3), "Pool2DOptions",
        {**WINDOW, "FilterHeight": 2, "FilterWidth": 2},
    ),
    "average pool": (
        "AVERAGE_POOL_2D", [(1, 9, 9, 3)], (1, 9, 9, 3), "Pool2DOptions",
        {"StrideH": 1, "StrideW": 1, "Padding": 0, "FilterHeight": 3, "FilterWidth": 3},
    ),
    "fully connected": (
        "FULLY_CONNECTED", [(1, 2, 2, 5), numbers(7, 20), numbers(7)], (1, 7),
        "FullyConnectedOptions", {"FusedActivationFunction": 3},
    ),
    "mean": ("MEAN", [(1, 4, 5, 6), ints(1, 2)], (1, 6), "ReducerOptions", {"KeepDims": False}),
    "mean, kept": ("MEAN", [(1, 4, 5, 6), ints(1, 2)], (1, 1, 1, 6), "ReducerOptions", {"KeepDims": True}),
    "pad channels": ("PAD", [(1, 4, 5, 6), ints([0, 0], [0, 0], [0, 0], [0, 3])], (1, 4, 5, 9), "PadOptions"),
    "pad pixels": ("PAD", [(1, 4, 5, 6), ints([0, 0], [1, 2], [3, 0], [0, 0])], (1, 7, 8, 6), "PadOptions"),
    "reshape": ("RESHAPE", [(1, 4, 5, 6), ints(1, 40, 3)], (1, 40, 3), "ReshapeOptions"),
    "reshape to four axes": ("RESHAPE", [(1, 40, 3), ints(1, 4, 5, 6)], (1, 4, 5, 6), "ReshapeOptions"),
    "slopes": ("PRELU", [(1, 4, 5, 6), numbers(1, 1, 6)], (1, 4, 5, 6)),
    "add a constant": (
        "ADD", [(1, 4, 5, 6), numbers(6)], (1, 4, 5, 6), "AddOptions", {"FusedActivationFunction": 1},
    ),
    "subtract a map": ("SUB", [(1, 4, 5, 6), numbers(1, 4, 5, 1)], (1, 4, 5, 6), "SubOptions", {}),
    "multiply": ("MUL", [(1, 4, 5, 6), numbers(6)], (1, 4, 5, 6), "MulOptions", {}),
    "relu": ("RELU", [(1, 4, 5, 6)], (1, 4, 5, 6)),
    "relu6": ("RELU6", [(1, 4, 5, 6)], (1, 4, 5, 6)),
    "leaky": ("LEAKY_RELU", [(1, 4, 5, 6)], (1, 4, 5, 6), "LeakyReluOptions", {"Alpha": 0.1}),
    "hard swish": ("HARD_SWISH", [(1, 4, 5, 6)], (1, 4, 5, 6)),
    "sigmoid": ("LOGISTIC", [(1, 4, 5, 6)], (1, 4, 5, 6)),
    "tanh": ("TANH", [(1, 4, 5, 6)], (1, 4, 5, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operators_give_what_the_interpreter_gives(name: str) -> None:
    data = network(*CASES[name])
    shape = next(item for item in CASES[name][1] if not isinstance(item, np.ndarray))
    x = 4 * numbers(3, *shape[1:])
    module = loader.parse(data, name)
    (wanted,), (found,) = interpret(data, x), run(module, x)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    if onednn.available(torch.float32):
        (fused,) = run(onednn.fuse(module), x)
        np.testing.assert_allclose(fused, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "not a TensorFlow Lite network"),
        (b"PK\x03\x04 not a network at all", "not a TensorFlow Lite network"),
        (network("SPACE_TO_DEPTH", [(1, 4, 4, 1)], (1, 2, 2, 4)), "unknown operator SPACE_TO_DEPTH"),
        (network("CUSTOM", [(1, 4)], (1, 4)), "unknown operator CUSTOM TheirOwn"),
        (
            network("ADD", [(1, 4), np.zeros(4, np.int8)], (1, 4), "AddOptions", {}),
            "tensor of type number 9",
        ),
        (
            network(
                "RESIZE_BILINEAR", [(1, 5, 6, 3), ints(9, 12)], (1, 9, 12, 3), "ResizeBilinearOptions", {}
            ),
            "RESIZE_BILINEAR by pixel corners",
        ),
        (network("RESHAPE", [(1, 4), ints(2, 2)], (2, 2), "ReshapeOptions"), "moves the batch"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(data: bytes, cause: str) -> None:
    with pytest.raises(UserError, match=cause) as caught:
        loader.parse(data, "some.tflite")
    assert str(caught.value).startswith("some.tflite: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"nowhere\.tflite: cannot be read"):
        loader.load("nowhere.tflite")


def test_damage_is_an_error_and_never_a_crash(networks: dict[str, Path]) -> None:
    good = networks["face_detection_short_range.tflite"].read_bytes()
    for length in (8, 100, 5_000, 100_000, len(good) - 40_000):
        with pytest.raises(UserError, match="damaged"):
            loader.parse(good[:length], "cut.tflite")
    dice = random.Random(0)
    # The structure lies outside the weights; flips there reach every reader.
    refused = 0
    for _ in range(100):
        flipped = bytearray(good)
        for _ in range(20):
            place = dice.choice((dice.randrange(8, 2_000), dice.randrange(len(good) - 25_000, len(good))))
            flipped[place] = dice.randrange(256)
        try:
            loader.parse(bytes(flipped), "flipped.tflite")
        except UserError:
            refused += 1
    assert refused > 10


def test_a_network_of_the_cache_is_checked(
    networks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EGO2ROBOT_CACHE", str(tmp_path))
    file = "face_detection_short_range.tflite"
    with pytest.raises(UserError, match=rf"{file}: no such model file.*ego2robot models pull"):
        models.network_path(file)
    models.hands_folder().mkdir(parents=True)
    good = networks[file].read_bytes()
    (models.hands_folder() / file).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{file}: the model file is damaged"):
        models.network_path(file)
    (models.hands_folder() / file).write_bytes(good)
    assert models.network_path(file) == models.hands_folder() / file
