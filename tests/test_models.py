"""load_model gives the model, the transform and the hash it says, or refuses in one line.

Winnow's own.
"""

from __future__ import annotations

import logging
import socket
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from winnow.models import load_model

timm = pytest.importorskip("timm")
TINY = "timm:test_vit"  # timm's own model for tests: 160 px, two of its blocks in milliseconds
SHARED = Path(__file__).parents[2] / "shared"
VIT = SHARED / "data" / "vit_tiny_in1k" / "model.safetensors"


def refused(message: str, spec: str, kind: type[Exception] = ValueError, **settings: object) -> None:
    with pytest.raises(kind, match=message) as caught:
        load_model(spec, **settings)  # type: ignore[arg-type]
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


class TestTimm:
    def test_random(self):
        before = torch.get_rng_state()
        first, second, other = load_model(TINY), load_model(TINY), load_model(TINY, seed=1)
        assert torch.equal(before, torch.get_rng_state())
        assert same(first.model, second.model)
        assert not same(first.model, other.model)
        assert not first.model.training
        assert (first.weights_hash, first.num_classes, first.size, first.spec) == (None, 1000, (160, 160), TINY)
        pixels = first.transform(Image.new("RGB", (300, 200)))
        assert pixels.shape == (3, 160, 160)
        assert torch.allclose(pixels[:, 0, 0], -torch.tensor(first.mean) / torch.tensor(first.std))

    def test_overrides(self):
        loaded = load_model(TINY, size=96, mean=0.25, std=(0.5, 0.5, 1.0), crop_pct=1.0, num_classes=7)
        assert (loaded.size, loaded.mean, loaded.std) == ((96, 96), (0.25,) * 3, (0.5, 0.5, 1.0))
        pixels = loaded.transform(Image.new("RGB", (200, 200), "white"))
        assert torch.allclose(pixels[:, 0, 0], torch.tensor([1.5, 1.5, 0.75]))
        assert loaded.model(pixels[None]).shape == (1, 7)
        assert "Resize(size=96" in str(loaded.transform)
        assert load_model(TINY, num_classes=0).num_classes is None
        refused("crop_pct=2", TINY, crop_pct=2)
        refused("std=0", TINY, std=0)
        refused("mean=", TINY, mean=(1, 2))
        refused("size=0", TINY, size=0)
        refused("num_classes=-1", TINY, num_classes=-1)

    def test_names(self):
        refused("unknown model 'vit_tiny': write timm:NAME", "vit_tiny")
        refused("unknown model 'timm:'", "timm:")
        refused("later version", "hf:google/vit")
        refused("no 'vit_tinny_patch16_224'; close names: .*vit_tiny_patch16_224.*, .*, ", "timm:vit_tinny_patch16_224")
        refused("no pretrained tag 'nonsense' .*augreg", "timm:vit_tiny_patch16_224.nonsense")
        refused("two sources", TINY, pretrained=True, weights="x.pth")

    def test_missing_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        refused(r"pip install \"winnow-vision\[timm\]\"", TINY)
        monkeypatch.setitem(sys.modules, "open_clip", None)
        refused(r"pip install \"winnow-vision\[clip\]\"", "open_clip:ViT-B-32")

    def test_no_network(self, monkeypatch, tmp_path):
        def offline(*args, **kwargs):
            raise socket.gaierror("Name or service not known")

        from huggingface_hub import constants

        monkeypatch.setattr(socket, "getaddrinfo", offline)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        before = constants.HF_HUB_OFFLINE
        refused("cannot be downloaded; offline, --weights FILE works", "timm:vit_tiny_patch16_224", pretrained=True)
        assert before == constants.HF_HUB_OFFLINE


class TestWeights:
    @pytest.fixture
    def state(self):
        return load_model(TINY, seed=3).model.state_dict()

    @pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
    def test_round_trip(self, tmp_path, state, suffix):
        path = tmp_path / f"w{suffix}"
        if suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save(state, path)
        loaded = load_model(TINY, weights=path)
        assert same(loaded.model, load_model(TINY, seed=3).model)
        assert len(loaded.weights_hash) == 16
        assert loaded.weights_hash == load_model(TINY, weights=str(path), seed=9).weights_hash

    @pytest.mark.parametrize("key", ["model", "state_dict"])
    def test_checkpoints(self, tmp_path, state, key):
        path = tmp_path / "c.pth"
        torch.save({key: {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, path)
        assert same(load_model(TINY, weights=path).model, load_model(TINY, seed=3).model)

    def test_weights_keep_their_positions_when_the_size_changes(self, tmp_path, state):
        path = tmp_path / "w.pth"
        torch.save(state, path)
        loaded = load_model(TINY, weights=path, size=192)
        assert loaded.model.pos_embed.shape[1] > state["pos_embed"].shape[1]
        assert loaded.model(torch.zeros(1, 3, 192, 192)).shape == (1, 1000)

    def test_wrong_weights(self, tmp_path, state):
        path = tmp_path / "w.pth"
        torch.save(state, path)
        refused(
            r"2 of another shape \(head.weight \[1000, 64\] in the file, \[7, 64\]", TINY, weights=path, num_classes=7
        )
        refused("weights of another model, or num_classes=1000", TINY, weights=path, num_classes=7)
        refused(r"missing \(.*unexpected \(.*weights of another model\?", "timm:test_efficientnet", weights=path)
        torch.save(state | {"reducer.gate": torch.zeros(1)}, path)
        refused(r"1 unexpected \(reducer.gate\): .*winnow.load", TINY, weights=path)

    def test_unreadable_weights(self, tmp_path, state):
        save_file(state, tmp_path / "w.safetensors")
        torch.save(state, tmp_path / "w.pth")
        for name in ("w.safetensors", "w.pth"):
            whole = (tmp_path / name).read_bytes()
            for cut in (0, 5, len(whole) // 2):
                (tmp_path / name).write_bytes(whole[:cut])
                refused("damaged", TINY, weights=tmp_path / name)
        torch.save({"model": state, "args": Path("x")}, tmp_path / "w.pth")
        refused("not loaded for safety", TINY, weights=tmp_path / "w.pth")
        torch.save({"epoch": 3}, tmp_path / "w.pth")
        refused("holds no state dict", TINY, weights=tmp_path / "w.pth")
        (tmp_path / "w.npz").write_bytes(b"")
        refused("give .safetensors, .pth", TINY, weights=tmp_path / "w.npz")
        refused("no such weights file", TINY, FileNotFoundError, weights=tmp_path / "gone.pth")


class TestOpenClip:
    NAME = "open_clip:ViT-M-32-alt"

    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("open_clip")

    def test_random_and_weights(self, tmp_path, monkeypatch):
        monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own would hide that open_clip adds one
        loaded = load_model(self.NAME)
        assert logging.getLogger().handlers == []
        assert same(loaded.model, load_model(self.NAME).model)
        pixels = loaded.transform(Image.new("RGB", (300, 200)))
        assert (pixels.shape, loaded.num_classes, loaded.weights_hash) == ((3, *loaded.size), None, None)
        state = {f"visual.{key}": value for key, value in load_model(self.NAME, seed=5).model.state_dict().items()}
        torch.save(state | {"logit_scale": torch.zeros(())}, tmp_path / "clip.pt")
        whole = load_model(self.NAME, weights=tmp_path / "clip.pt")
        assert same(whole.model, load_model(self.NAME, seed=5).model)
        larger = load_model(self.NAME, weights=tmp_path / "clip.pt", size=256)
        assert larger.model(torch.zeros(1, 3, 256, 256)).shape[0] == 1
        refused("does not fit .*weights of another model", "open_clip:ViT-S-32", weights=tmp_path / "clip.pt")

    def test_preprocessing_is_the_tags_own(self):
        loaded = load_model("open_clip:MobileCLIP-S1")  # its tags agree on 0 and 1, open_clip's default is CLIP's
        assert (loaded.mean, loaded.std, loaded.size) == ((0.0,) * 3, (1.0,) * 3, (256, 256))

    def test_refusals(self):
        refused("open_clip has no 'ViT-B-33'; close names: .*ViT-B-3", "open_clip:ViT-B-33")
        refused("no pretrained tag 'x'; .*openai", "open_clip:ViT-B-32/x")
        refused("several pretrained tags", "open_clip:ViT-B-32", pretrained=True)
        refused("leave num_classes", self.NAME, num_classes=3)


@pytest.mark.skipif(not VIT.is_file(), reason="the shared weights are not here")
def test_real_weights_and_their_preprocessing():
    loaded = load_model("timm:vit_tiny_patch16_224", weights=VIT)
    assert (loaded.mean, loaded.std, loaded.size, loaded.num_classes) == ((0.5,) * 3, (0.5,) * 3, (224, 224), 1000)
    assert "Resize(size=248, interpolation=bicubic" in str(loaded.transform)
    refused("does not fit timm:deit_tiny", "timm:deit_tiny_distilled_patch16_224", weights=VIT)

    from winnow.data import open_images
    from winnow.data.batches import batches

    images = open_images(str(SHARED / "data" / "photos" / "photos.csv"), limit=24)
    with torch.inference_mode():
        right = sum(
            int((loaded.model(b.images).argmax(1) == b.labels).sum()) for b in batches(images, loaded.transform, 12)
        )
    assert right >= 17
