"""VideoMAE: one vector for what happens in sixteen frames."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ego2robot import config
from ego2robot.errors import UserError
from ego2robot.stages import attention
from ego2robot.stages.inference import Graphed, batch_shape, compute_dtype, in_batches
from ego2robot.stages.preprocess import VIDEOMAE_PICTURE, VideoMAEPreprocess, read_picture
from ego2robot.stages.weights import Kind, load_model, resolve

NAME: Kind = "videomae"
BATCH = {"cpu": max(8, os.cpu_count() or 1), "cuda": 64}  # clips waiting for one call


@dataclass(frozen=True)
class VideoMAE:
    """An :class:`~ego2robot.stages.base.Embedder`. Make one with :meth:`load`.

    Attributes:
        pooling: ``mean`` over the patch tokens, or ``first_token``, which is the first patch (VideoMAE
            has no class token) and there for parity with the reference pipeline.
        dtype: what the model computes in; pooling is float32.
    """

    preprocess: VideoMAEPreprocess
    dim: int
    weights: str
    fingerprint: str
    random: bool
    batch_size: int
    pooling: Literal["mean", "first_token"]
    device: str
    dtype: torch.dtype
    model: Any
    name: str = NAME
    graphed: Graphed = field(default_factory=Graphed, compare=False)

    @classmethod
    def load(cls, cfg: config.VideoMAE, device: str, seed: int, dtype: torch.dtype | None = None) -> VideoMAE:
        """Loads the weights that ``cfg`` names, or makes random ones of VideoMAE-B from ``seed``.

        Args:
            device: ``cpu`` or ``cuda``.
            dtype: None: bfloat16 or float16 where the device has it, else float32.

        Raises:
            UserError: the weights cannot be used, or are ``none``.
        """
        from transformers import VideoMAEConfig, VideoMAEModel

        weights = resolve(cfg.weights, NAME, seed)
        if weights is None:
            raise UserError(f"embed.{NAME}.weights=none: there is no model to load; choose weights")
        model = load_model(weights, VideoMAEModel, VideoMAEConfig)
        picture = (
            VIDEOMAE_PICTURE if weights.folder is None else read_picture(weights.folder, VIDEOMAE_PICTURE)
        )
        side = model.config.image_size
        if picture.crop != ((side, side) if isinstance(side, int) else tuple(side)):
            raise UserError(
                f"{weights.name}: pictures of {picture.crop} for a model of {side}; use other weights"
            )
        dtype = dtype or compute_dtype(device)
        model = model.to(device, dtype)
        if attention.pays(device, dtype):
            attention.use_by_head(model)
        return cls(
            preprocess=VideoMAEPreprocess(NAME, model.config.num_frames, picture),
            dim=model.config.hidden_size,
            weights=weights.name,
            fingerprint=weights.fingerprint,
            random=weights.random,
            batch_size=cfg.batch_size or BATCH[torch.device(device).type],
            pooling=cfg.pooling,
            device=device,
            dtype=dtype,
            model=model,
        )

    def embed(self, prepared_BTHWC: torch.Tensor) -> torch.Tensor:
        """uint8 [B, T, h, w, 3] from ``preprocess.prepare`` to float32 [B, dim] on the CPU.

        Raises:
            FloatingPointError: a vector is not finite.
        """
        size = batch_shape(self.device, self.batch_size)
        return in_batches(self._run, prepared_BTHWC, size, self.device, self.dim, self.name, self.graphed)

    def _run(self, prepared_BTHWC: torch.Tensor) -> torch.Tensor:
        pixels_BTCHW = self.preprocess.picture.normalise(prepared_BTHWC).to(self.dtype)
        tokens_BND = self.model(pixel_values=pixels_BTCHW).last_hidden_state
        return tokens_BND[:, 0].float() if self.pooling == "first_token" else tokens_BND.float().mean(1)
