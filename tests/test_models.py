"""load_model gives the model, the transform and the hash it says, or refuses in one line.

Winnow's own.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import winnow
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
        refused("leave crop_pct out", self.NAME, crop_pct=0.9)
        refused("has no drop_path_rate", self.NAME, options={"drop_path_rate": 0.1})


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory):
    """Tiny models saved as people save them: a classifier, a CLIP of both towers, a DINOv2 shown smaller images."""
    t = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = small | {"vocab_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = {
            "vit": t.ViTForImageClassification(t.ViTConfig(**small, image_size=32, patch_size=8, num_labels=5)),
            "clip": t.CLIPModel(
                t.CLIPConfig(vision_config=small | {"image_size": 32, "patch_size": 8}, text_config=text)
            ),
            "dino": t.Dinov2Model(t.Dinov2Config(**small, mlp_ratio=2, image_size=56, patch_size=8)),
        }
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    processors = {
        "vit": t.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.2, 0.3, 0.4], image_std=[0.5] * 3),
        "clip": t.CLIPImageProcessor(**crop),
        "dino": t.BitImageProcessor(**crop),
    }
    root = tmp_path_factory.mktemp("hf")
    for name, model in made.items():
        model.save_pretrained(root / name)
        processors[name].save_pretrained(root / name)
    return root, {name: model.eval() for name, model in made.items()}


class TestHuggingFace:
    IMAGE = Image.linear_gradient("L").convert("RGB").resize((60, 40))

    def test_classifier(self, hf_folders):
        root, made = hf_folders
        loaded = load_model(f"hf:{root / 'vit'}")
        assert same(loaded.model, made["vit"])
        assert (loaded.num_classes, loaded.size, len(loaded.weights_hash)) == (5, (32, 32), 16)
        assert loaded.mean == (0.2, 0.3, 0.4)
        processor = pytest.importorskip("transformers").AutoImageProcessor.from_pretrained(root / "vit")
        wanted = processor(images=self.IMAGE, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(loaded.transform(self.IMAGE), wanted)
        grey = load_model(f"hf:{root / 'vit'}", mean=0.0, std=1.0).transform(Image.new("RGB", (60, 40), "white"))
        assert torch.allclose(grey, torch.ones(3, 32, 32))

    def test_vision_tower_of_clip(self, hf_folders):
        root, made = hf_folders
        loaded = load_model(f"hf:{root / 'clip'}")
        assert loaded.num_classes is None
        pixels = loaded.transform(self.IMAGE)[None]
        with torch.no_grad():
            theirs = made["clip"].vision_model(pixels).pooler_output
            assert torch.equal(loaded.model(pixels).pooler_output, theirs)

    def test_a_model_shown_smaller_images_takes_their_size_as_its_own(self, hf_folders):
        from winnow.measure import count_macs
        from winnow.measure.closed_form import plain_macs

        root, made = hf_folders
        loaded = load_model(f"hf:{root / 'dino'}")
        assert loaded.size == (32, 32) != made["dino"].config.image_size
        pixels = loaded.transform(self.IMAGE)[None]
        with torch.no_grad():
            apart = loaded.model(pixels).pooler_output - made["dino"](pixels).pooler_output
        assert float(apart.abs().max()) < 1e-5
        assert count_macs(loaded.model, pixels) == pytest.approx(plain_macs(loaded.model), rel=0.02)

    def test_weights_of_a_file(self, hf_folders, tmp_path):
        root, made = hf_folders
        for name, part in (("vit", made["vit"]), ("clip", made["clip"].vision_model)):
            torch.save(made[name].state_dict(), tmp_path / "all.pt")
            assert same(load_model(f"hf:{root / name}", weights=tmp_path / "all.pt").model, part)
        bare = tmp_path / "bare"
        bare.mkdir()
        for file in ("config.json", "preprocessor_config.json"):
            (bare / file).write_bytes((root / "vit" / file).read_bytes())
        assert load_model(f"hf:{bare}").weights_hash is None
        assert same(load_model(f"hf:{bare}", seed=1).model, load_model(f"hf:{bare}", seed=1).model)

    def test_a_folder_saved_while_reduced_gives_its_reducer_back(self, hf_folders, tmp_path):
        root, _ = hf_folders
        transformers = pytest.importorskip("transformers")
        kind, images = transformers.ViTForImageClassification, torch.randn(2, 3, 32, 32)
        model = winnow.reduce(kind.from_pretrained(root / "vit"), winnow.DRIP(rate=0.25, after=1))
        for weight in winnow.reducer_of(model).parameters():
            torch.nn.init.normal_(weight)
        model.save_pretrained(tmp_path / "drip")
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "drip")
        again = winnow.load(kind.from_pretrained(tmp_path / "drip"), tmp_path / "drip")
        with torch.no_grad():
            assert torch.equal(again(images).logits, model(images).logits)
        refused(r"winnow.load\(model, FOLDER\)", f"hf:{tmp_path / 'drip'}")
        with pytest.raises(ValueError, match="holds no reduced model"):
            winnow.load(kind.from_pretrained(root / "vit"), root / "vit")

    def test_refusals(self, hf_folders, tmp_path):
        root, made = hf_folders
        refused("no such folder", f"hf:{tmp_path / 'gone'}", FileNotFoundError)
        refused("leave size", f"hf:{root / 'vit'}", size=64)
        refused("is a vision-language model", "hf:scenes")
        refused("has 5 classes: leave num_classes out", f"hf:{root / 'vit'}", num_classes=3)
        refused("no classes: leave num_classes out", f"hf:{root / 'clip'}", num_classes=3)
        made["vit"].save_pretrained(tmp_path / "alone")
        refused("no image processor configuration", f"hf:{tmp_path / 'alone'}")
        transformers = pytest.importorskip("transformers")
        transformers.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "alone")
        refused("takes images of 32 pixels", f"hf:{tmp_path / 'alone'}")
        transformers.CLIPImageProcessor(do_center_crop=False).save_pretrained(tmp_path / "alone")
        refused("it must crop", f"hf:{tmp_path / 'alone'}")
        state = {key: value for key, value in made["vit"].state_dict().items() if "classifier" not in key}
        (tmp_path / "part").mkdir()
        for file in ("config.json", "preprocessor_config.json"):
            (tmp_path / "part" / file).write_bytes((root / "vit" / file).read_bytes())
        save_file(state, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
        refused("2 weights are missing .* classifier.bias", f"hf:{tmp_path / 'part'}")

    def test_on_the_command_line(self, hf_folders, tmp_path, monkeypatch, capsys):
        """compare takes the classifier's `.logits`, measure a tower's features."""
        from winnow.cli import main
        from winnow.measure import record

        root, _ = hf_folders
        monkeypatch.chdir(tmp_path)
        self.IMAGE.save("a.png")
        Path("a.csv").write_text("file,label\na.png,1\n")
        common = ["--results", "rows.jsonl", "-m", "ToMe(r=2)"]
        for words in (
            ["compare", f"hf:{root / 'vit'}", "--data", "a.csv", "--time", "0", *common],
            ["measure", f"hf:{root / 'clip'}", "--batch", "1", "--pairs", "9", *common],
            ["doctor", f"hf:{root / 'clip'}", "-m", "ToMe(r=2)"],
        ):
            monkeypatch.setattr(sys, "argv", ["winnow", *words])
            with pytest.raises(SystemExit) as stop:
                main()
            assert not stop.value.code, capsys.readouterr().err
        rows = record.read(Path("rows.jsonl"))
        assert {"ToMe(r=2)", "Downsample(size=24)"} <= {row.method for row in rows}


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


def test_timm_knows_ours_once_winnow_is_imported():
    code = "import timm, winnow; assert timm.is_model('hybrid_vit') and timm.is_model('drip_vit_base_patch32_224')"
    subprocess.run([sys.executable, "-c", code], check=True)
