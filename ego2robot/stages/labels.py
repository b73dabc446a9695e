"""Zero-shot labels: which of some prompts a clip looks most like."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ego2robot.errors import UserError
from ego2robot.stages.clip import CLIP


class PromptLabels:
    """Scores clips against prompts as CLIP does: softmax over the prompts of scaled cosines.

    For clips of one frame that is exactly ``softmax(CLIPModel(...).logits_per_image)``. With several
    frames the clip's vector is the average of theirs, so the scores are those of the average.
    """

    def __init__(self, clip: CLIP, prompts: Sequence[str], top_k: int) -> None:
        """Embeds ``prompts`` once.

        Raises:
            UserError: no prompts, one twice, or weights without a vocabulary or that are not finite.
        """
        self.prompts = tuple(prompts)
        self.top_k = min(top_k, len(self.prompts))
        if not self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise UserError("labels.prompts: at least one prompt, and none twice")
        self._scale = clip.logit_scale
        try:
            self._prompts_PD = clip.embed_text(self.prompts)
        except FloatingPointError as error:
            raise UserError(f"{clip.weights}: {error}; check the weights, or use others") from None

    def probabilities(self, embeddings_BD: torch.Tensor) -> torch.Tensor:
        """float32 [B, D] from ``CLIP.embed`` to float32 [B, prompts], each row adding up to 1."""
        return (self._scale * embeddings_BD.float() @ self._prompts_PD.T).softmax(-1)

    def labels(self, embeddings_BD: torch.Tensor) -> list[list[tuple[str, float]]]:
        """The ``top_k`` (prompt, probability) of each clip, best first."""
        scores, order = self.probabilities(embeddings_BD).topk(self.top_k)
        return [
            [(self.prompts[i], p) for p, i in zip(*row, strict=True)]
            for row in zip(scores.tolist(), order.tolist(), strict=True)
        ]
