"""MediaPipe's own face detector (mediapipe ≥ 1.2) on its official short-range network: what ours is measured
against.

The wheel that ships the network (0.10.21) also knew what its pictures look like (-1 to 1); newer releases
read that from the network's metadata, which this file lacks. So it gets them.
"""

from __future__ import annotations

import importlib.util
import tempfile
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import flatbuffers
import mediapipe
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from mediapipe.tasks.python import BaseOptions, vision


class MediaPipeFaces:
    """Faces of single frames, surest first. Runs on one thread of the CPU.

    Args:
        network: ``face_detection_short_range.tflite``.
        min_score: confidence from which a face counts, 0 to 1.
    """

    def __init__(self, network: Path, min_score: float = 0.5) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "face_detector.tflite"
            path.write_bytes(with_metadata(network.read_bytes()))
            options = vision.FaceDetectorOptions(
                base_options=BaseOptions(model_asset_path=str(path)), min_detection_confidence=min_score
            )
            self._detector: Any = vision.FaceDetector.create_from_options(options)
        self._close = weakref.finalize(self, self._detector.close)

    def detect(self, frame_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores float [N] and boxes float [N, 4] (x_min, y_min, x_max, y_max), whole pixels."""
        image = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(frame_HWC))
        found = sorted(self._detector.detect(image).detections, key=lambda d: -d.categories[0].score)
        boxes = [
            (b.origin_x, b.origin_y, b.origin_x + b.width, b.origin_y + b.height)
            for b in (d.bounding_box for d in found)
        ]
        return np.array([d.categories[0].score for d in found]), np.array(boxes, float).reshape(-1, 4)


def with_metadata(data: bytes) -> bytes:
    """The network with metadata that say: pictures are -1 to 1."""
    m = _metadata_schema()
    options = m.NormalizationOptionsT()
    options.mean, options.std = [127.5], [127.5]
    unit = m.ProcessUnitT()
    unit.optionsType, unit.options = m.ProcessUnitOptions.NormalizationOptions, options
    image = m.ImagePropertiesT()
    image.colorSpace = m.ColorSpaceType.RGB
    content = m.ContentT()
    content.contentPropertiesType, content.contentProperties = m.ContentProperties.ImageProperties, image
    taken = m.TensorMetadataT()
    taken.name, taken.content, taken.processUnits = "image", content, [unit]
    graph = m.SubGraphMetadataT()
    graph.inputTensorMetadata = [taken]
    graph.outputTensorMetadata = [m.TensorMetadataT(), m.TensorMetadataT()]
    meta = m.ModelMetadataT()
    meta.subgraphMetadata = [graph]
    packed = flatbuffers.Builder(0)
    packed.Finish(meta.Pack(packed), b"M001")
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(data, 0))
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(bytes(packed.Output()), np.uint8)
    model.buffers.append(buffer)
    entry = schema.MetadataT()
    entry.name, entry.buffer = b"TFLITE_METADATA", len(model.buffers) - 1
    model.metadata = [*(model.metadata or ()), entry]
    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _metadata_schema() -> ModuleType:
    """The generated module; its package does not import by itself."""
    folder = Path(mediapipe.__file__).parent / "tasks" / "metadata"
    spec = importlib.util.spec_from_file_location(
        "metadata_schema", folder / "metadata_schema_py_generated.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
