"""TensorFlow Lite networks as torch modules.

The flatbuffer is read with the ``tflite`` package (the schema's generated readers) and becomes a
``torch.fx.GraphModule``: a flat program of ordinary torch calls that runs on any device, in float32,
bfloat16 or float16, and that torch can compile, export or capture in a CUDA graph.

Layout. TensorFlow Lite counts axes as NHWC. Here tensors of four axes are NCHW in ``channels_last``
memory, which is the same order of bytes: nothing is transposed on the way in or out of a convolution.
The first axis is the batch and may have any length, whatever the file says.

Sources: the schema and the operators' reference kernels of TensorFlow Lite
(``tensorflow/lite/schema/schema.fbs``, ``tensorflow/lite/kernels/internal/reference``).
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tflite
import torch
from torch import fx, nn
from torch.nn import functional as F

from ego2robot.errors import UserError

_OPERATORS = {value: name for name, value in vars(tflite.BuiltinOperator).items() if isinstance(value, int)}
_DTYPES: dict[int, np.dtype[Any]] = {
    tflite.TensorType.FLOAT32: np.dtype("<f4"),
    tflite.TensorType.FLOAT16: np.dtype("<f2"),
    tflite.TensorType.INT32: np.dtype("<i4"),
    tflite.TensorType.INT64: np.dtype("<i8"),
}
_NCHW_AXIS = (0, 2, 3, 1)  # where an axis of NHWC lies in NCHW
_SAME = tflite.Padding.SAME
_INDEX_VECTORS = {
    tflite.SparseIndexVector.Int32Vector: tflite.Int32Vector,
    tflite.SparseIndexVector.Uint16Vector: tflite.Uint16Vector,
    tflite.SparseIndexVector.Uint8Vector: tflite.Uint8Vector,
}
_MOST_VALUES = 1 << 26  # of a sparse constant when it is dense
# What a damaged flatbuffer raises: offsets that point outside, sizes that do not fit, strides of zero.
_DAMAGED = (struct.error, LookupError, ValueError, TypeError, ArithmeticError, AttributeError)


@dataclass(frozen=True)
class Value:
    """A tensor of the network while it is being translated.

    Attributes:
        shape: as the file says (NHWC where there are four axes), with the batch as 1.
        node: what computes it, NCHW where there are four axes; None for a constant.
        constant: the numbers of a constant as the file orders them, else None.
    """

    shape: tuple[int, ...]
    node: fx.Node | None
    constant: np.ndarray | None


def load(path: str | Path) -> fx.GraphModule:
    """The network of a ``.tflite`` file, see :func:`parse`.

    Raises:
        UserError: the file cannot be read, or is not a network that can be translated.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    return parse(data, str(path))


def parse(data: bytes, name: str) -> fx.GraphModule:
    """A TensorFlow Lite network as a torch module in float32, for inference.

    Args:
        data: the bytes of the file; one subgraph, one input, float32 or float16 constants.
        name: what errors call it.

    Returns:
        A module from one tensor to a tuple of tensors in the file's order. Four axes are NCHW, both ways:
        give images as [B, 3, H, W] in ``channels_last`` memory. The other outputs are as in the file, with
        the batch first. ``module.meta["input_size"]`` is (height, width), or None where the input is no
        image.

    Raises:
        UserError: not a TensorFlow Lite file, damaged, or with an operator, an option or a type that is
            not translated; the message names it.
    """
    if not tflite.Model.ModelBufferHasIdentifier(data, 0):
        raise UserError(f"{name}: not a TensorFlow Lite network (no TFL3 mark); fetch it again")
    try:
        return _Translator(tflite.Model.GetRootAs(data, 0), name).module()
    except _DAMAGED as error:
        raise UserError(f"{name}: damaged TensorFlow Lite network ({error}); fetch it again") from None


def half(module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """A copy that computes in ``dtype``, but for the last layers; takes and gives float32.

    The last layers stay in float32: they are a small part of the work, and coordinates of hundreds of pixels
    would lose whole pixels in bfloat16.

    Args:
        module: of :func:`parse`.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
    """
    low = copy.deepcopy(module)
    heads: set[fx.Node] = set()
    behind = {node for output in low.graph.nodes if output.op == "output" for node in output.all_input_nodes}
    while behind:
        node = behind.pop()
        if node.target in _WEIGHTED:
            heads.add(node)
        else:
            behind |= set(node.all_input_nodes)
    begun, after_heads = False, set(heads)
    dtypes: dict[fx.Node, torch.dtype] = {}
    for node in list(low.graph.nodes):
        begun = begun or node.target in _WEIGHTED
        if node.op == "output" or after_heads.intersection(node.all_input_nodes):
            after_heads.add(node)
        dtypes[node] = dtype if begun and node not in after_heads else torch.float32
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                constant = getattr(low, str(source.target))
                window = node.target is F.conv2d and constant.ndim == 4 and constant.shape[2:].numel() > 1
                round_to = _carried if window and dtypes[node] == torch.bfloat16 else torch.Tensor.to
                setattr(low, str(source.target), round_to(constant, dtypes[node]))
            elif dtypes[source] != dtypes[node]:
                with low.graph.inserting_before(node):
                    cast = low.graph.call_method("to", (source, dtypes[node]))
                cast.meta.update(source.meta)
                dtypes[cast] = dtypes[node]
                node.replace_input_with(source, cast)
    low.graph.lint()
    low.recompile()
    return low


def _carried(weight_OIHW: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Weights rounded such that what one loses its neighbour gets.

    Neighbouring pixels are alike, so errors that cancel within a window cancel in the result. Measured on
    the mixer clip: rounding the windows of the landmark network to bfloat16 each for itself moves landmarks
    by 0.27 pixels on average (of 640 x 360), this way by 0.04.
    """
    taps_NO = weight_OIHW.flatten(1).t()
    rounded_NO = torch.empty_like(taps_NO, dtype=dtype)
    lost_O = torch.zeros_like(taps_NO[0])
    for i, tap_O in enumerate(taps_NO):
        wanted_O = tap_O + lost_O
        rounded_NO[i] = wanted_O
        lost_O = wanted_O - rounded_NO[i]
    return rounded_NO.t().reshape(weight_OIHW.shape)


class _Translator:
    """One pass over the operators of a file, in their order, which is the order they run in."""

    def __init__(self, model: Any, name: str) -> None:
        self.name, self.model = name, model
        if model.SubgraphsLength() != 1:
            raise self.refuse(f"{model.SubgraphsLength()} subgraphs where one is expected")
        self.subgraph = model.Subgraphs(0)
        self.root, self.graph = nn.Module(), fx.Graph()
        self.values: dict[int, Value] = {}
        self.constants = 0

    def module(self) -> fx.GraphModule:
        inputs = [int(i) for i in self.subgraph.InputsAsNumpy()]
        if len(inputs) != 1:
            raise self.refuse(f"{len(inputs)} inputs where one is expected")
        shape = self._shape(inputs[0])
        self.values[inputs[0]] = Value(shape, self.graph.placeholder("x"), None)
        for i in range(self.subgraph.OperatorsLength()):
            self._operator(self.subgraph.Operators(i))
        outputs = [self.values[int(i)].node for i in self.subgraph.OutputsAsNumpy()]
        self.graph.output(tuple(outputs))
        self.graph.eliminate_dead_code()
        self.graph.lint()
        module = fx.GraphModule(self.root, self.graph, "TFLite").eval().requires_grad_(False)
        module.meta["input_size"] = shape[1:3] if len(shape) == 4 else None
        return module

    def refuse(self, what: str) -> UserError:
        return UserError(f"{self.name}: {what}; ego2robot cannot run this network")

    def _operator(self, operator: Any) -> None:
        code = self.model.OperatorCodes(operator.OpcodeIndex())
        # Files of before 2020 have only the deprecated field, a byte; newer ones the larger of both.
        number = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        kind = _OPERATORS.get(number, f"number {number}")
        if kind == "CUSTOM":
            kind = f"CUSTOM {(code.CustomCode() or b'').decode(errors='replace')}"
        translate = TABLE.get(kind)
        if translate is None:
            raise self.refuse(f"unknown operator {kind}")
        inputs = [self._value(int(i)) if i >= 0 else None for i in operator.InputsAsNumpy()]
        outputs = [int(i) for i in operator.OutputsAsNumpy()]
        if len(outputs) != 1:
            raise self.refuse(f"operator {kind} with {len(outputs)} outputs where one is expected")
        step = _Step(self, kind, operator, inputs, self._shape(outputs[0]))
        made = translate(step)
        if isinstance(made, fx.Node):
            made.meta["shape"] = step.shape
            self.values[outputs[0]] = Value(step.shape, made, None)
        else:
            self.values[outputs[0]] = Value(step.shape, None, made)

    def _shape(self, index: int) -> tuple[int, ...]:
        tensor = self.subgraph.Tensors(index)
        return tuple(int(n) for n in tensor.ShapeAsNumpy()) if tensor.ShapeLength() else ()

    def _value(self, index: int) -> Value:
        if index not in self.values:
            tensor = self.subgraph.Tensors(index)
            dtype = _DTYPES.get(tensor.Type())
            if dtype is None:
                raise self.refuse(f"a tensor of type number {tensor.Type()} (only floating networks are run)")
            raw = self.model.Buffers(tensor.Buffer()).DataAsNumpy()
            if not isinstance(raw, np.ndarray):
                raise ValueError(f"tensor {index} has neither a value nor an operator that makes it")
            shape, sparsity = self._shape(index), tensor.Sparsity()
            flat = raw.view(dtype)
            array = flat.reshape(shape) if sparsity is None else self._dense(flat, sparsity, shape)
            self.values[index] = Value(shape, None, array)
        return self.values[index]

    def _dense(self, values: np.ndarray, sparsity: Any, shape: tuple[int, ...]) -> np.ndarray:
        """A constant of which the file has only what is not zero, row by row of its last axis (CSR)."""
        kinds = [sparsity.DimMetadata(i).Format() for i in range(sparsity.DimMetadataLength())]
        in_order = list(sparsity.TraversalOrderAsNumpy()) == list(range(len(shape)))
        rows_only = kinds == [tflite.DimensionType.DENSE] * (len(shape) - 1) + [
            tflite.DimensionType.SPARSE_CSR
        ]
        if not (in_order and rows_only and sparsity.BlockMapLength() == 0):
            raise self.refuse("a sparse constant that is not rows of its last axis")
        last = sparsity.DimMetadata(len(shape) - 1)
        ends = _index_vector(last.ArraySegments(), last.ArraySegmentsType())
        column = _index_vector(last.ArrayIndices(), last.ArrayIndicesType())
        n_rows = int(np.prod(shape[:-1]))
        if len(ends) != n_rows + 1 or n_rows * shape[-1] > _MOST_VALUES or column.min(initial=0) < 0:
            raise ValueError(f"a sparse constant of {shape} whose rows do not add up")
        dense = np.zeros((n_rows, shape[-1]), values.dtype)
        dense[np.repeat(np.arange(n_rows), np.diff(ends)), column] = values
        return dense.reshape(shape)

    def parameter(self, array: np.ndarray) -> fx.Node:
        """A constant of the program: follows ``module.to(device, dtype)``."""
        name = f"constant_{self.constants}"
        self.constants += 1
        tensor = torch.from_numpy(array.astype(np.float32))
        layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
        self.root.register_buffer(name, tensor.contiguous(memory_format=layout))
        return self.graph.get_attr(name)


def _index_vector(table: Any, kind: int) -> np.ndarray:
    found = _INDEX_VECTORS[kind]()
    found.Init(table.Bytes, table.Pos)
    return np.asarray(found.ValuesAsNumpy(), np.int64)


@dataclass
class _Step:
    """One operator: what it takes, what it may emit."""

    translator: _Translator
    kind: str
    operator: Any
    inputs: list[Value | None]
    shape: tuple[int, ...]  # of the output

    def options(self, table: Any) -> Any:
        found, raw = table(), self.operator.BuiltinOptions()
        if raw is None:
            raise ValueError(f"operator {self.kind} without options")
        found.Init(raw.Bytes, raw.Pos)
        return found

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.translator.graph.call_function(function, args, kwargs)

    def method(self, name: str, *args: Any) -> fx.Node:
        return self.translator.graph.call_method(name, args)

    def parameter(self, array: np.ndarray) -> fx.Node:
        return self.translator.parameter(array)

    def value(self, index: int) -> Value:
        found = self.inputs[index] if index < len(self.inputs) else None
        if found is None:
            raise ValueError(f"operator {self.kind} without its input {index}")
        return found

    def node(self, index: int) -> fx.Node:
        """An input that is computed, or a constant as a parameter that broadcasts against NCHW."""
        value = self.value(index)
        if value.node is not None:
            return value.node
        array = self.constant(index)
        if len(self.shape) == 4:
            array = array.reshape((1,) * (4 - array.ndim) + array.shape).transpose(0, 3, 1, 2)
        return self.parameter(array)

    def constant(self, index: int) -> np.ndarray:
        found = self.value(index).constant
        if found is None:
            raise self.translator.refuse(f"operator {self.kind} whose input {index} is not a constant")
        return found

    def axis(self, axis: int) -> int:
        rank = len(self.value(0).shape)
        axis %= rank
        return _NCHW_AXIS[axis] if rank == 4 else axis

    def activated(self, node: fx.Node, activation: int) -> fx.Node:
        kinds = tflite.ActivationFunctionType
        if activation == kinds.NONE:
            return node
        if activation == kinds.RELU:
            return self.call(F.relu, node)
        if activation == kinds.RELU6:
            return self.call(F.relu6, node)
        if activation == kinds.TANH:
            return self.call(torch.tanh, node)
        raise self.translator.refuse(f"fused activation number {activation} of operator {self.kind}")

    def padded(
        self, node: fx.Node, size: Sequence[int], stride: Sequence[int], same: bool, fill: float = 0.0
    ) -> tuple[fx.Node, tuple[int, int]]:
        """An NCHW input made ready for a window, and the even padding that is left to the window itself.

        ``SAME`` puts the odd pixel of an uneven padding at the end, which torch's windows cannot.
        """
        if not same:
            return node, (0, 0)
        before_after = []
        for length, window, step in zip(self.value(0).shape[1:3], size, stride, strict=True):
            total = max((-(-length // step) - 1) * step + window - length, 0)
            before_after.append((total // 2, total - total // 2))
        (top, bottom), (left, right) = before_after
        if (top, left) == (bottom, right):
            return node, (top, left)
        return self.call(F.pad, node, (left, right, top, bottom), value=fill), (0, 0)


def _dequantize(step: _Step) -> fx.Node | np.ndarray:
    value = step.value(0)
    # Half precision weights are stored small and used large.
    return value.constant.astype(np.float32) if value.constant is not None else step.node(0)


def _conv(step: _Step) -> fx.Node:
    options = step.options(tflite.Conv2DOptions)
    weight_OHWI = step.constant(1)
    return _convolve(step, options, weight_OHWI.transpose(0, 3, 1, 2), 1)


def _depthwise_conv(step: _Step) -> fx.Node:
    options = step.options(tflite.DepthwiseConv2DOptions)
    weight_1HWO = step.constant(1)
    return _convolve(step, options, weight_1HWO.transpose(3, 0, 1, 2), step.value(0).shape[3])


def _convolve(step: _Step, options: Any, weight_OIHW: np.ndarray, groups: int) -> fx.Node:
    stride = options.StrideH(), options.StrideW()
    dilation = options.DilationHFactor(), options.DilationWFactor()
    reach = [(n - 1) * d + 1 for n, d in zip(weight_OIHW.shape[2:], dilation, strict=True)]
    x, padding = step.padded(step.node(0), reach, stride, options.Padding() == _SAME)
    out = step.call(
        F.conv2d, x, step.parameter(weight_OIHW), _bias(step, 2), stride, padding, dilation, groups
    )
    return step.activated(out, options.FusedActivationFunction())


def _bias(step: _Step, index: int) -> fx.Node | None:
    given = index < len(step.inputs) and step.inputs[index] is not None
    return step.parameter(step.constant(index)) if given else None


def _transpose_conv(step: _Step) -> fx.Node:
    options = step.options(tflite.TransposeConvOptions)
    weight_OHWI, x = step.constant(1), step.value(2)
    if x.node is None:
        raise step.translator.refuse(f"operator {step.kind} of a constant")
    stride = options.StrideH(), options.StrideW()
    out = step.call(
        F.conv_transpose2d, x.node, step.parameter(weight_OHWI.transpose(3, 0, 1, 2)), _bias(step, 3), stride
    )
    # The full result reaches from the first to the last window; SAME cuts it where a convolution would
    # have padded, VALID asks for all of it, or for a border that no window reaches.
    pads: list[int] = []
    for i in (1, 0):
        full = (x.shape[1 + i] - 1) * stride[i] + weight_OHWI.shape[1 + i]
        cut = max(full - step.shape[1 + i], 0) // 2 if options.Padding() == _SAME else 0
        pads += [-cut, step.shape[1 + i] - full + cut]
    if any(pads):
        out = step.call(F.pad, out, tuple(pads))
    return step.activated(out, options.FusedActivationFunction())


def _fully_connected(step: _Step) -> fx.Node:
    options = step.options(tflite.FullyConnectedOptions)
    weight_OI = step.constant(1)
    x = _as_file_orders(step, step.node(0), step.value(0).shape)
    if not options.KeepNumDims():
        x = step.method("reshape", x, (-1, weight_OI.shape[1]))
    out = step.call(F.linear, x, step.parameter(weight_OI), _bias(step, 2))
    if len(step.shape) == 4:
        out = step.method("permute", out, (0, 3, 1, 2))
    return step.activated(out, options.FusedActivationFunction())


def _as_file_orders(step: _Step, node: fx.Node, shape: Sequence[int]) -> fx.Node:
    return step.method("permute", node, (0, 2, 3, 1)) if len(shape) == 4 else node


def _max_pool(step: _Step) -> fx.Node:
    options = step.options(tflite.Pool2DOptions)
    size, stride = (options.FilterHeight(), options.FilterWidth()), (options.StrideH(), options.StrideW())
    x, padding = step.padded(
        step.node(0), size, stride, options.Padding() == _SAME, fill=torch.finfo(torch.float16).min
    )
    return step.activated(
        step.call(F.max_pool2d, x, size, stride, padding), options.FusedActivationFunction()
    )


def _average_pool(step: _Step) -> fx.Node:
    options = step.options(tflite.Pool2DOptions)
    size, stride = (options.FilterHeight(), options.FilterWidth()), (options.StrideH(), options.StrideW())
    x, padding = step.padded(step.node(0), size, stride, options.Padding() == _SAME)
    if x is not step.node(0):
        raise step.translator.refuse("operator AVERAGE_POOL_2D with uneven padding")
    # Pixels of the padding do not count.
    out = step.call(F.avg_pool2d, x, size, stride, padding, False, False)
    return step.activated(out, options.FusedActivationFunction())


def _mean(step: _Step) -> fx.Node:
    keep = step.options(tflite.ReducerOptions).KeepDims()
    axes = sorted(int(a) % len(step.value(0).shape) for a in np.atleast_1d(step.constant(1)))
    if 0 in axes:
        raise step.translator.refuse("operator MEAN over the batch")
    if len(step.value(0).shape) == 4 and not keep and axes != [1, 2]:
        raise step.translator.refuse(f"operator MEAN over axes {axes}")
    return step.call(torch.mean, step.node(0), tuple(step.axis(a) for a in axes), keep)


def _pad(step: _Step) -> fx.Node:
    widths = step.constant(1).tolist()
    rank = len(step.value(0).shape)
    ordered: list[int] = []
    for axis in (2, 1, 3, 0) if rank == 4 else range(rank - 1, -1, -1):  # torch: last axis first
        ordered += widths[axis]
    if any(widths[0]):
        raise step.translator.refuse("operator PAD along the batch")
    return step.call(F.pad, step.node(0), tuple(ordered[:-2]))


def _densify(step: _Step) -> np.ndarray:
    return step.constant(0)  # made dense when it was read


def _depth_to_space(step: _Step) -> fx.Node:
    size = step.options(tflite.DepthToSpaceOptions).BlockSize()
    _, height, width, channels = step.value(0).shape
    # The channels of a pixel are its block's rows, their columns, and then the new channels;
    # torch.pixel_shuffle has the new channels first.
    blocks = step.method("reshape", step.node(0), (-1, size, size, channels // size**2, height, width))
    ordered = step.method("permute", blocks, (0, 3, 4, 1, 5, 2))
    return step.method("reshape", ordered, (-1, channels // size**2, height * size, width * size))


def _reshape(step: _Step) -> fx.Node:
    before = step.value(0).shape
    if not before or not step.shape or before[0] != step.shape[0]:
        raise step.translator.refuse(f"operator RESHAPE that moves the batch ({before} to {step.shape})")
    x = step.method("reshape", _as_file_orders(step, step.node(0), before), (-1, *step.shape[1:]))
    return step.method("permute", x, (0, 3, 1, 2)) if len(step.shape) == 4 else x


def _concatenate(step: _Step) -> fx.Node:
    options = step.options(tflite.ConcatenationOptions)
    axis = step.axis(options.Axis())
    if axis == 0:
        raise step.translator.refuse("operator CONCATENATION along the batch")
    parts = [step.value(i).node for i in range(len(step.inputs))]
    if None in parts:
        raise step.translator.refuse("operator CONCATENATION with a constant")
    return step.activated(step.call(torch.cat, parts, axis), options.FusedActivationFunction())


def _resize_bilinear(step: _Step) -> fx.Node:
    options = step.options(tflite.ResizeBilinearOptions)
    if not options.AlignCorners() and not options.HalfPixelCenters():
        raise step.translator.refuse("operator RESIZE_BILINEAR by pixel corners")
    return step.call(
        F.interpolate,
        step.node(0),
        size=step.shape[1:3],
        mode="bilinear",
        align_corners=bool(options.AlignCorners()),
    )


def _prelu(step: _Step) -> fx.Node:
    alpha = step.constant(1)
    if alpha.size != alpha.shape[-1]:
        raise step.translator.refuse("operator PRELU with a slope for each pixel")
    return step.call(F.prelu, step.node(0), step.parameter(alpha.reshape(-1)))


def _leaky_relu(step: _Step) -> fx.Node:
    return step.call(F.leaky_relu, step.node(0), step.options(tflite.LeakyReluOptions).Alpha())


def _unary(function: Callable[..., Any]) -> Callable[[_Step], fx.Node]:
    return lambda step: step.call(function, step.node(0))


def _binary(function: Callable[..., Any], table: Any) -> Callable[[_Step], fx.Node]:
    def translate(step: _Step) -> fx.Node:
        out = step.call(function, step.node(0), step.node(1))
        return step.activated(out, step.options(table).FusedActivationFunction())

    return translate


_WEIGHTED = {F.conv2d, F.conv_transpose2d, F.linear}
TABLE: dict[str, Callable[[_Step], fx.Node | np.ndarray]] = {
    "ADD": _binary(torch.add, tflite.AddOptions),
    "AVERAGE_POOL_2D": _average_pool,
    "CONCATENATION": _concatenate,
    "CONV_2D": _conv,
    "DENSIFY": _densify,
    "DEPTHWISE_CONV_2D": _depthwise_conv,
    "DEPTH_TO_SPACE": _depth_to_space,
    "DEQUANTIZE": _dequantize,
    "FULLY_CONNECTED": _fully_connected,
    "HARD_SWISH": _unary(F.hardswish),
    "LEAKY_RELU": _leaky_relu,
    "LOGISTIC": _unary(torch.sigmoid),
    "MAX_POOL_2D": _max_pool,
    "MEAN": _mean,
    "MUL": _binary(torch.mul, tflite.MulOptions),
    "PAD": _pad,
    "PRELU": _prelu,
    "RELU": _unary(F.relu),
    "RELU6": _unary(F.relu6),
    "RESHAPE": _reshape,
    "RESIZE_BILINEAR": _resize_bilinear,
    "SUB": _binary(torch.sub, tflite.SubOptions),
    "TANH": _unary(torch.tanh),
    "TRANSPOSE_CONV": _transpose_conv,
}
