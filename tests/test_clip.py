"""CLIP and its zero-shot labels through our code are those of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ego2robot import config
from ego2robot.errors import UserError
from ego2robot.stages.clip import CLIP, hash_tokens
from ego2robot.stages.labels import PromptLabels

PROMPTS = config.REFERENCE_PROMPTS


def byte_vocabulary() -> dict[str, int]:
    """CLIP's alphabet without merges: every byte, and every byte that ends a word."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with its processor and a real tokenizer, saved as the hub has them."""
    path = tmp_path_factory.mktemp("clip")
    vocabulary = byte_vocabulary()
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(path)
    CLIPImageProcessorPil().save_pretrained(path)
    torch.manual_seed(2)
    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ends = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    tiny = CLIPConfig(
        text_config={**layers, **ends, "vocab_size": len(vocabulary)}, vision_config=layers, projection_dim=24
    )
    model = CLIPModel(tiny)
    with torch.no_grad():
        # Freshly made towers answer nearly the same to everything; larger weights tell inputs apart.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(path)
    return path


def load(weights: str | Path, n_frames: int = 1, seed: int = 0) -> CLIP:
    return CLIP.load(config.CLIP(weights=str(weights), n_frames=n_frames), "cpu", seed, torch.float32)


def clip_frames(seed: int, n: int = 36) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 9, 16, 3), dtype=np.uint8)
    return torch.from_numpy(coarse.repeat(40, 1).repeat(40, 2))


def prepared(model: CLIP, seed: int) -> torch.Tensor:
    frames = clip_frames(seed)
    return model.preprocess.prepare(frames[torch.from_numpy(model.preprocess.indices(len(frames)))])


def transformers_outputs(folder: Path, frames: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised image embeddings and label probabilities, with nothing of ours."""
    images = CLIPImageProcessorPil.from_pretrained(folder)(frames, return_tensors="pt")
    texts = CLIPTokenizer.from_pretrained(folder)(
        list(PROMPTS), padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        outputs = CLIPModel.from_pretrained(folder).eval()(**images, **texts)
    return outputs.image_embeds, outputs.logits_per_image.softmax(-1)


def test_embeddings_and_labels_of_middle_frames_are_those_of_transformers(folder: Path) -> None:
    model = load(folder)
    assert (model.name, model.dim, model.random) == ("clip", 24, False)
    vectors = model.embed(torch.stack([prepared(model, seed) for seed in range(5)]))
    expected, probabilities = transformers_outputs(folder, [clip_frames(s)[18].numpy() for s in range(5)])
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-4)

    labels = PromptLabels(model, PROMPTS, top_k=2)
    torch.testing.assert_close(labels.probabilities(vectors), probabilities, rtol=0, atol=1e-4)
    for found, row in zip(labels.labels(vectors), probabilities, strict=True):
        best = row.argsort(descending=True)[:2].tolist()
        assert [name for name, _ in found] == [PROMPTS[i] for i in best]
        assert [score for _, score in found] == pytest.approx(row[best].tolist(), abs=1e-4)
    assert probabilities.max() > 0.2, "the comparison would pass for equal scores"


def test_several_frames_are_averaged_after_normalising_each(folder: Path) -> None:
    model = load(folder, n_frames=3)
    vector = model.embed(prepared(model, 4)[None])[0]
    indices = [6, 18, 30]
    assert model.preprocess.indices(36).tolist() == indices
    frames, _ = transformers_outputs(folder, [clip_frames(4)[i].numpy() for i in indices])
    mean = frames.mean(0)
    torch.testing.assert_close(vector, mean / mean.norm(), rtol=0, atol=1e-4)
    assert (vector - frames[1]).abs().max() > 1e-3


def test_a_vector_does_not_depend_on_its_neighbours(folder: Path) -> None:
    model = load(folder, n_frames=2)
    clips = torch.stack([prepared(model, seed) for seed in range(5)])
    together = model.embed(clips)
    assert torch.equal(together, torch.cat([model.embed(clips[i : i + 1]) for i in range(5)]))
    assert torch.equal(together, model.embed(clips.flip(0)).flip(0))


def test_all_labels_come_when_fewer_prompts_than_asked_for(folder: Path) -> None:
    model = load(folder)
    found = PromptLabels(model, ("a hand", "no hand"), top_k=5).labels(model.embed(prepared(model, 1)[None]))
    assert len(found) == 1
    assert {name for name, _ in found[0]} == {"a hand", "no hand"}
    assert sum(score for _, score in found[0]) == pytest.approx(1)
    assert found[0][0][1] >= found[0][1][1]


def test_prompts_longer_than_clip_reads_are_cut(folder: Path) -> None:
    model = load(folder)
    long = "x" * 500
    vectors = model.embed_text([long, long + " and more"])
    torch.testing.assert_close(vectors[0], vectors[1])
    assert vectors.norm(dim=1).tolist() == pytest.approx([1, 1])


def test_prompts_that_cannot_be_told_apart_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"labels\.prompts"):
        PromptLabels(load(folder), ("a", "a"), 1)


def test_weights_that_are_not_numbers_are_noticed(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name in ("visual_projection.weight", "text_projection.weight"):
        tensors[name][0, 0] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path)
    with pytest.raises(FloatingPointError, match="clip: 1 of 1 vectors are not finite"):
        model.embed(prepared(model, 1)[None])
    with pytest.raises(UserError, match="text vectors are not finite; check the weights"):
        PromptLabels(model, PROMPTS, 2)


def test_weights_without_a_vocabulary_cannot_label(folder: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        PromptLabels(load(tmp_path), PROMPTS, 2)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no usable tokenizer") as error:
        PromptLabels(load(tmp_path), PROMPTS, 2)
    assert "\n" not in str(error.value)


def test_random_weights_say_so_and_repeat_themselves() -> None:
    model, again = load("random", 3, 5), load("random", 3, 5)
    assert model.random
    assert (model.weights, model.fingerprint, model.dim) == ("random", "random, seed 5", 512)
    vectors = model.embed(prepared(model, 1)[None])
    assert torch.equal(vectors, again.embed(prepared(again, 1)[None]))
    labels, same = PromptLabels(model, PROMPTS, 2), PromptLabels(again, PROMPTS, 2)
    assert labels.labels(vectors) == same.labels(vectors)
    assert labels.labels(vectors)[0][0][0] in PROMPTS


def test_tokens_of_random_weights_are_the_same_everywhere() -> None:
    ids, mask = hash_tokens(["Tightening a screw", "a  screw", "word " * 200], 49406, 49407)
    assert ids.shape == mask.shape == (3, 77)
    assert ids[0, 0] == 49406
    assert ids[0, 4:].tolist() == [49407] * 73
    assert mask.sum(1).tolist() == [5, 4, 77]
    assert ids[0, 2:4].tolist() == ids[1, 1:3].tolist()
    assert ids[0, 1] == 21030
    assert (ids[:, 1:-1].unique() < 49408).all()
