"""A small convolutional network from two pictures to an action, and how it is trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

BATCH = 64
LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 1e-3, 0.05, 0.1
AVERAGE = 0.98  # of the weights that are judged, from step to step
PATIENCE = 8  # looks at the validation part without an improvement before training ends
MOST_DEVIATIONS = 4.0  # targets beyond are pulled in for training; they are judged as they are
_CHANNELS = (16, 32, 48, 64)


class Net(nn.Module):
    """Four convolutions that halve the picture, then a layer that knows where things are.

    Args:
        size: (height, width) of the pictures.
        n_out: numbers to predict.
    """

    def __init__(self, size: tuple[int, int], n_out: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, (height, width) = 6, size
        for i, out in enumerate(_CHANNELS):
            kernel = 5 if i == 0 else 3
            layers += [nn.Conv2d(channels, out, kernel, 2, kernel // 2), nn.BatchNorm2d(out), nn.ReLU()]
            channels, height, width = out, math.ceil(height / 2), math.ceil(width / 2)
        self.look = nn.Sequential(*layers)
        self.say = nn.Sequential(
            nn.Flatten(), nn.Dropout(DROPOUT), nn.Linear(channels * height * width, 128), nn.ReLU(),
            nn.Dropout(DROPOUT), nn.Linear(128, n_out),
        )  # fmt: skip

    def forward(self, now_BHWC: torch.Tensor, before_BHWC: torch.Tensor) -> torch.Tensor:
        """float32 [B, n_out] from two uint8 [B, H, W, 3]."""
        now = now_BHWC.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
        before = before_BHWC.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
        # Motion is small beside the picture; as a plane of its own it is not drowned.
        return self.say(self.look(torch.cat((now, 4 * (now - before)), 1)))


@dataclass(frozen=True)
class Look:
    """One look at the validation part while training. Losses are 1 for who always says the mean."""

    step: int
    training: float
    validation: float


@dataclass(frozen=True)
class Fitted:
    """A trained network's word on moments it was not trained on.

    Attributes:
        validation_NA, test_NA: float64, in deviations from the mean of the training part.
        looks: how training went; the weights are those of the best look.
        steps: taken.
    """

    validation_NA: np.ndarray
    test_NA: np.ndarray
    looks: tuple[Look, ...]
    steps: int


@dataclass(frozen=True)
class Table:
    """Pictures and targets. ``target_NA``: float64 in deviations from the mean of the training part."""

    pictures: np.ndarray
    now_N: np.ndarray
    before_N: np.ndarray
    target_NA: np.ndarray

    def batch(self, places: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(  # type: ignore[return-value]
            torch.from_numpy(np.ascontiguousarray(self.pictures[numbers[places]])).to(device)
            for numbers in (self.now_N, self.before_N)
        )


def fit(
    table: Table,
    train: np.ndarray,
    validation: np.ndarray,
    test: np.ndarray,
    seed: int,
    max_steps: int,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> Fitted:
    """Trains until the validation part no longer gains.

    Args:
        train, validation, test: int64, places in ``table``; nothing of ``test`` is looked at before the end.
        max_steps: batches at most.
        progress: told the steps taken.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    size = (table.pictures.shape[1], table.pictures.shape[2])
    net = Net(size, table.target_NA.shape[1]).to(device)
    if device.type == "cpu":
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    judged = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    wanted = np.clip(table.target_NA, -MOST_DEVIATIONS, MOST_DEVIATIONS).astype(np.float32)
    target = torch.from_numpy(wanted).to(device)
    every = max(20, math.ceil(len(train) / BATCH))
    best, best_state, waited = math.inf, copy.deepcopy(judged.state_dict()), 0
    looks: list[Look] = []
    step, losses = 0, []
    scale = max(1e-12, float(np.mean(wanted[validation] ** 2)))
    while step < max_steps and waited < PATIENCE:
        order = rng.permutation(train)
        for places in np.split(order, range(BATCH, len(order), BATCH)):
            if len(places) < 2:  # batch normalisation needs company
                continue
            net.train()
            loss = F.mse_loss(net(*table.batch(places, device)), target[places])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            step += 1
            _average(judged, net, min(AVERAGE, step / (step + 10)))
            losses.append(float(loss.detach()))
            if step % every == 0 or step == max_steps:
                said = predict(judged, table, validation, device)
                error = float(np.mean((said - wanted[validation]) ** 2)) / scale
                looks.append(Look(step, float(np.mean(losses)), error))
                losses = []
                waited += 1
                if error < best:
                    best, best_state, waited = error, copy.deepcopy(judged.state_dict()), 0
                if progress:
                    progress(step)
            if step >= max_steps or waited >= PATIENCE:
                break
    judged.load_state_dict(best_state)
    return Fitted(
        predict(judged, table, validation, device), predict(judged, table, test, device), tuple(looks), step
    )


def _average(judged: nn.Module, net: nn.Module, keep: float) -> None:
    with torch.no_grad():
        for mean, now in zip(judged.state_dict().values(), net.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(now, 1 - keep)
            else:
                mean.copy_(now)


@torch.inference_mode()
def predict(net: nn.Module, table: Table, places: np.ndarray, device: torch.device) -> np.ndarray:
    """float64 [N, A] of the moments at ``places``."""
    net.eval()
    parts = [
        net(*table.batch(some, device)).cpu().numpy()
        for some in np.split(places, range(4 * BATCH, len(places), 4 * BATCH))
        if len(some)
    ]
    n_out = table.target_NA.shape[1]
    return np.concatenate(parts).astype(np.float64) if parts else np.zeros((0, n_out))
