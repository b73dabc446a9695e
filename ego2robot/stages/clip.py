"""CLIP: one vector for what a clip shows, in the space of its text prompts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from ego2robot import config
from ego2robot.errors import UserError
from ego2robot.stages.inference import Graphed, batch_shape, compute_dtype, in_batches
from ego2robot.stages.preprocess import CLIP_PICTURE, CLIPPreprocess, read_picture
from ego2robot.stages.weights import Kind, load_model, resolve

NAME: Kind = "clip"
BATCH = {"cpu": max(32, os.cpu_count() or 1), "cuda": 256}  # clips waiting for one call


@dataclass(frozen=True)
class CLIP:
    """An :class:`~ego2robot.stages.base.Embedder`. Make one with :meth:`load`.

    A clip's vector is the mean of its frames' projected, L2-normalised image embeddings, normalised
    again. With one frame that is CLIP's own image embedding.

    Attributes:
        logit_scale: CLIP's learnt factor on cosines (its exponential, about 100).
        dtype: what the model computes in; normalising and averaging are float32.
        folder: of the tokenizer's vocabulary; None for random weights.
    """

    preprocess: CLIPPreprocess
    dim: int
    weights: str
    fingerprint: str
    random: bool
    batch_size: int
    logit_scale: float
    device: str
    dtype: torch.dtype
    model: Any
    folder: Path | None
    name: str = NAME
    graphed: Graphed = field(default_factory=Graphed, compare=False)

    @classmethod
    def load(cls, cfg: config.CLIP, device: str, seed: int, dtype: torch.dtype | None = None) -> CLIP:
        """Loads the weights that ``cfg`` names, or makes random ones of ViT-B/32 from ``seed``.

        Args:
            device: ``cpu`` or ``cuda``.
            dtype: None: bfloat16 or float16 where the device has it, else float32.

        Raises:
            UserError: the weights cannot be used, or are ``none``.
        """
        from transformers import CLIPConfig, CLIPModel

        weights = resolve(cfg.weights, NAME, seed)
        if weights is None:
            raise UserError(f"embed.{NAME}.weights=none: there is no model to load; choose weights")
        model = load_model(weights, CLIPModel, CLIPConfig)
        picture = CLIP_PICTURE if weights.folder is None else read_picture(weights.folder, CLIP_PICTURE)
        side = model.config.vision_config.image_size
        if picture.crop != (side, side):
            raise UserError(
                f"{weights.name}: pictures of {picture.crop} for a model of {side}; use other weights"
            )
        dtype = dtype or compute_dtype(device)
        return cls(
            preprocess=CLIPPreprocess(NAME, cfg.n_frames, picture),
            dim=model.config.projection_dim,
            weights=weights.name,
            fingerprint=weights.fingerprint,
            random=weights.random,
            batch_size=cfg.batch_size or BATCH[torch.device(device).type],
            logit_scale=float(model.logit_scale.detach().exp()),
            device=device,
            dtype=dtype,
            model=model.to(device, dtype),
            folder=weights.folder,
        )

    def embed(self, prepared_BTHWC: torch.Tensor) -> torch.Tensor:
        """uint8 [B, T, h, w, 3] from ``preprocess.prepare`` to float32 [B, dim] of length 1, on the CPU.

        Raises:
            FloatingPointError: a vector is not finite.
        """
        size = batch_shape(self.device, self.batch_size)
        return in_batches(self._run, prepared_BTHWC, size, self.device, self.dim, self.name, self.graphed)

    def _run(self, prepared_BTHWC: torch.Tensor) -> torch.Tensor:
        pixels_NCHW = self.preprocess.picture.normalise(prepared_BTHWC.flatten(0, 1)).to(self.dtype)
        # The towers rather than get_image_features, which returned a tensor before transformers 5.
        pooled_ND = self.model.vision_model(pixel_values=pixels_NCHW).pooler_output
        frames_ND = functional.normalize(self.model.visual_projection(pooled_ND).float(), dim=-1)
        frames_BTD = frames_ND.unflatten(0, prepared_BTHWC.shape[:2])
        return functional.normalize(frames_BTD.mean(1), dim=-1)

    def embed_text(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [len(texts), dim] of length 1, on the CPU. Texts are cut at CLIP's 77 tokens.

        Raises:
            FloatingPointError: a vector is not finite.
            UserError: the weights come without a vocabulary.
        """
        ids_PL, mask_PL = self._tokenize(texts)
        with torch.inference_mode():
            pooled_PD = self.model.text_model(
                input_ids=ids_PL.to(self.device), attention_mask=mask_PL.to(self.device)
            ).pooler_output
            vectors = functional.normalize(self.model.text_projection(pooled_PD).float(), dim=-1).cpu()
        if not torch.isfinite(vectors).all():
            raise FloatingPointError(f"{self.name}: text vectors are not finite")
        return vectors

    def _tokenize(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, int64 [P, L]."""
        text_config = self.model.config.text_config
        if self.folder is None:
            return hash_tokens(texts, text_config.bos_token_id, text_config.eos_token_id)
        if not any((self.folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise UserError(
                f"{self.folder}: no tokenizer.json, nor vocab.json and merges.txt; download the weights again"
            )
        from transformers import CLIPTokenizer

        try:
            tokenizer = CLIPTokenizer.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.folder}: no usable tokenizer ({reason}); download the weights again"
            ) from None
        tokens = tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=text_config.max_position_embeddings,
            return_tensors="pt",
        )
        return tokens["input_ids"], tokens["attention_mask"]


def hash_tokens(texts: Sequence[str], start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens for random weights, which have no vocabulary: each word's id is a hash of its bytes.

    Equal texts get equal tokens, on every machine; they mean as little as the weights do.

    Returns:
        Ids and attention mask, int64 [P, L], L at most 77.
    """

    def word_id(word: str) -> int:
        return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest()) % start

    rows = [[start, *(word_id(word) for word in text.lower().split()[:75]), end] for text in texts]
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [end] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask
