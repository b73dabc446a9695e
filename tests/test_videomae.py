"""VideoMAE through our code is VideoMAE through transformers; weights are found, or refused in one line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEModel
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

from ego2robot import config
from ego2robot.errors import UserError
from ego2robot.stages import weights as weights_module
from ego2robot.stages.inference import Graphed, compute_dtype, in_batches
from ego2robot.stages.preprocess import VideoMAEPreprocess
from ego2robot.stages.videomae import VideoMAE
from ego2robot.stages.weights import resolve

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VideoMAE with its processor, as the hub's pre-training weights are saved."""
    path = tmp_path_factory.mktemp("videomae")
    torch.manual_seed(1)
    tiny = VideoMAEConfig(**TINY, **DECODER, use_mean_pooling=False)
    VideoMAEForPreTraining(tiny).save_pretrained(path)
    VideoMAEImageProcessorPil(image_mean=MEAN, image_std=STD).save_pretrained(path)
    return path


def load(weights: str | Path, seed: int = 0, pooling: str = "mean") -> VideoMAE:
    cfg = config.VideoMAE(weights=str(weights), pooling=pooling, batch_size=4)
    return VideoMAE.load(cfg, "cpu", seed, torch.float32)


def clip_frames(seed: int, n: int = 36) -> torch.Tensor:
    """A pattern that slides, at another pace for each seed."""
    rng = np.random.default_rng(seed)
    texture = rng.integers(0, 256, (18, 64, 3), dtype=np.uint8).repeat(20, 0).repeat(20, 1)
    steps = int(rng.integers(1, 17))
    return torch.from_numpy(np.stack([np.roll(texture, i * steps, 1)[:, :640] for i in range(n)]))


def prepared(model: VideoMAE, seed: int) -> torch.Tensor:
    frames = clip_frames(seed)
    return model.preprocess.prepare(frames[torch.from_numpy(model.preprocess.indices(len(frames)))])


@pytest.mark.parametrize("pooling", ["mean", "first_token"])
def test_vectors_are_those_of_transformers(folder: Path, pooling: str) -> None:
    ours = load(folder, pooling=pooling)
    assert (ours.name, ours.dim, ours.random, ours.batch_size) == ("videomae", 32, False, 4)
    vectors = ours.embed(torch.stack([prepared(ours, seed) for seed in (1, 2)]))
    assert vectors.shape == (2, 32)
    assert vectors.dtype == torch.float32

    processor = VideoMAEImageProcessorPil.from_pretrained(folder)
    reference = VideoMAEModel.from_pretrained(folder).eval()
    for seed, vector in zip((1, 2), vectors, strict=True):
        picked = clip_frames(seed)[np.linspace(0, 35, 16).astype(int)]
        inputs = processor(list(picked.numpy()), return_tensors="pt")
        with torch.no_grad():
            tokens = reference(**inputs).last_hidden_state[0]
        assert tokens.shape == (1568, 32)
        expected = tokens.mean(0) if pooling == "mean" else tokens[0]
        torch.testing.assert_close(vector, expected, rtol=0, atol=1e-4)
    assert (vectors[0] - vectors[1]).abs().max() > 1e-3


def test_a_vector_does_not_depend_on_its_neighbours(folder: Path) -> None:
    model = load(folder)
    clips = torch.stack([prepared(model, seed) for seed in range(6)])
    together = model.embed(clips)
    alone = torch.cat([model.embed(clips[i : i + 1]) for i in range(6)])
    backwards = model.embed(clips.flip(0)).flip(0)
    assert torch.equal(together, alone)
    assert torch.equal(together, backwards)
    assert model.embed(clips[:0]).shape == (0, 32)


def test_a_padded_batch_gives_what_a_clip_alone_gives(folder: Path) -> None:
    """Batches as a GPU gets them, here on the CPU: only rounding may differ."""
    model = load(folder)
    clips = torch.stack([prepared(model, seed) for seed in range(6)])
    shapes = []

    def run(some_BTHWC: torch.Tensor) -> torch.Tensor:
        shapes.append(len(some_BTHWC))
        return model._run(some_BTHWC)

    padded = in_batches(run, clips, 4, "cpu", model.dim, model.name, Graphed())
    assert shapes == [4, 4]
    torch.testing.assert_close(padded, model.embed(clips), rtol=0, atol=1e-5)


def test_weights_that_are_not_numbers_are_noticed(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("encoder.layer.1.output.dense.bias"))
    tensors[name][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path)
    with pytest.raises(FloatingPointError, match="videomae: 1 of 1 vectors are not finite"):
        model.embed(prepared(model, 1)[None])


def test_random_weights_say_so_and_follow_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "transformers.VideoMAEConfig", type("Tiny", (VideoMAEConfig,), {"__init__": _tiny_videomae})
    )
    state = torch.get_rng_state()
    one, again, other = load("random", 7), load("random", 7), load("random", 8)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    assert one.random
    assert one.weights == "random"
    assert one.fingerprint == again.fingerprint == "random, seed 7"
    clip = prepared(one, 1)[None]
    assert torch.equal(one.embed(clip), again.embed(clip))
    assert not torch.equal(one.embed(clip), other.embed(clip))


def _tiny_videomae(self: VideoMAEConfig, **keys: object) -> None:
    VideoMAEConfig.__init__(self, **{**TINY, **keys})


def test_random_is_the_full_base_model() -> None:
    found = resolve("random", "videomae", 3)
    assert found is not None
    assert found.random
    assert VideoMAEConfig().hidden_size == 768
    assert VideoMAEConfig().num_frames == VideoMAEPreprocess().n_frames == 16


def test_the_fingerprint_is_the_files_sha256_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    expected = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert load(folder).fingerprint == expected
    # The layout of the Hugging Face cache: files named by their sha256, and links to them.
    blob = tmp_path / "blobs" / expected
    blob.parent.mkdir()
    blob.write_bytes((folder / "model.safetensors").read_bytes())
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(blob)
    (snapshot / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert load(snapshot).fingerprint == expected


def test_shards_are_read_and_fingerprinted_together(folder: Path, tmp_path: Path) -> None:
    VideoMAEForPreTraining.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "preprocessor_config.json").write_bytes((folder / "preprocessor_config.json").read_bytes())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    whole, sharded = load(folder), load(tmp_path)
    assert len(sharded.fingerprint) == 64
    assert sharded.fingerprint != whole.fingerprint
    clip = prepared(whole, 1)[None]
    assert torch.equal(whole.embed(clip), sharded.embed(clip))
    shards[0].unlink()
    with pytest.raises(UserError, match="nor all the shards"):
        load(tmp_path)


def test_cached_weights_are_used_without_a_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Hugging Face cache as `hf download` leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--some--videomae"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = load("some/videomae")
    assert found.weights == f"some/videomae@{commit}"
    assert found.fingerprint == load(folder).fingerprint
    assert load(f"some/videomae@{commit}").weights == f"some/videomae@{commit}"


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "weights", ["nobody/nothing-here", "./no/such/folder", "/no/such/folder", "nonsense"]
)
def test_missing_weights_name_the_three_ways_out_at_once(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    # Nothing listens there: what a machine without a network sees.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="three ways out") as error:
        load(weights)
    text = one_line(error)
    for word in ("embed.videomae.weights=FOLDER", "hf download", "HF_HOME", "random", "none", weights):
        assert word in text


def test_a_pickle_is_not_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only a pickle \(pytorch_model\.bin\)") as error:
        load(tmp_path)
    assert "safetensors" in one_line(error)


def test_weights_that_cannot_be_used_are_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: missing"):
        load(tmp_path)
    with pytest.raises(UserError, match="a file; give the folder"):
        load(folder / "model.safetensors")
    with pytest.raises(UserError, match="weights=none"):
        load("none")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load(tmp_path)
    one_line(error)
    tensors = load_file(folder / "model.safetensors")
    del tensors["videomae.encoder.layer.0.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 of the model's weights") as error:
        load(tmp_path)
    one_line(error)
    tree = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree | {"model_type": "vit"}))
    with pytest.raises(UserError, match=r"weights of a 'vit' model; embed\.videomae\.weights needs"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tree | {"image_size": 112}))
    save_file(
        load_file(folder / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match="for a model of 112"):
        load(tmp_path)


def test_a_shard_index_never_leads_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (inner / "config.json").write_bytes((folder / "config.json").read_bytes())
    index = {"weight_map": {"x": "../secret.safetensors"}}
    (inner / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError):
        load(inner)


def test_half_precision_where_the_processor_has_it_stays_close(folder: Path) -> None:
    cfg = config.VideoMAE(weights=str(folder))
    native = VideoMAE.load(cfg, "cpu", 0)
    assert native.dtype == compute_dtype("cpu")
    half = VideoMAE.load(cfg, "cpu", 0, torch.bfloat16)
    clip = prepared(native, 1)[None]
    exact = load(folder).embed(clip)
    for model in (native, half):
        assert torch.nn.functional.cosine_similarity(model.embed(clip), exact).item() > 0.999


def test_a_cpu_without_the_instructions_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert compute_dtype("cpu") == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert compute_dtype("cpu") == torch.bfloat16


def test_nothing_else_is_downloaded_than_safetensors_and_text() -> None:
    assert all(p.endswith((".safetensors", ".json", ".txt")) for p in weights_module.PATTERNS)
