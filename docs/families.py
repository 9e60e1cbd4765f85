"""Try four methods on a small model of every family and write what works: docs/families.md.

Winnow's own. `python docs/families.py` rewrites the page (10 s, most of them imports); `table()` is the table alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import winnow
from winnow import Below, Downsample, EViT, Keep, NormThreshold, ToMe
from winnow._reduce import seat_of
from winnow.reducer import Method

PAGE = Path(__file__).with_suffix(".md")
DEPTH, WIDTH = 3, 48
TIMM = {"embed_dim": WIDTH, "num_heads": 4, "num_classes": 6, "depth": DEPTH}
WIDE = TIMM | {"embed_dim": 64, "num_heads": 1}
"""For architectures whose heads are 64 wide whatever is asked."""
HEADS = ("ToMe", "class attention (EViT)", "NormThreshold", "Downsample")


@dataclass(frozen=True)
class Try:
    """How to make a small model and what to look at."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: str = "forward"
    look: Callable[[Any], Tensor] = lambda out: out
    side: int = 0
    """Of the smaller image, pixels."""


def timm_(name: str, side: int = 96, patch: int = 16, **words: Any) -> Try:
    """A timm model of this name, three blocks deep and narrow."""
    import timm

    made = {"img_size": side} | TIMM | words
    return Try(lambda: timm.create_model(name, **made), (3, side, side), side=side // 2 // patch * patch)


def open_clip_(name: str, whole: bool = False) -> Try:
    """An open_clip image tower of this name, cut to three blocks; `whole` = the image and text model."""

    def build() -> nn.Module:
        import open_clip
        import timm
        from open_clip.model import CLIP, _build_vision_tower

        vision = dict(open_clip.get_model_config(name)["vision_cfg"])
        vision |= {} if "timm_model_name" in vision else {"layers": DEPTH, "width": 64, "head_width": 16}
        if whole:
            return CLIP(32, vision, {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1})
        small = {key: TIMM[key] for key in ("depth", "embed_dim", "num_heads")}
        with mock.patch.object(timm, "create_model", partial(timm.create_model, **small)):
            return _build_vision_tower(32, vision)

    def look(out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out

    return Try(build, (3, 224, 224), "encode_image" if whole else "forward", look, side=96)


def hf(kind: str, config: str, **more: Any) -> Try:
    """A Hugging Face vision model, three layers deep and narrow."""

    def build() -> nn.Module:
        import transformers

        words = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "image_size": 96}
        words |= {"patch_size": 16, "intermediate_size": 96, "mlp_ratio": 2, "num_labels": 6} | more
        return getattr(transformers, kind)(getattr(transformers, config)(**words))

    def look(out: Any) -> Tensor:
        return out.logits if "logits" in out else out.pooler_output

    return Try(build, (3, 96, 96), look=look, side=48)


def encoder(**words: Any) -> Try:
    """torch's own encoder; its input are tokens."""

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 96, dropout=0.0, batch_first=True, **words)
        return nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)

    return Try(build, (36, WIDTH), look=lambda out: out.mean(1), side=48)


def on_meta(build: Callable[[], nn.Module]) -> Try:
    """A model that is only looked at: no weights are made."""

    def made() -> nn.Module:
        with torch.device("meta"):
            return build()

    return Try(made, ())


def looked_at() -> dict[str, Try]:
    """The classes of adapters.REFUSED and some more."""
    import timm
    from open_clip.model import ModifiedResNet
    from transformers import SwinConfig, SwinModel, ViTConfig, ViTForMaskedImageModeling

    found = {f"timm {name}": on_meta(partial(timm.create_model, name)) for name in REFUSED_BY_TIMM}
    found["open_clip RN50 .visual"] = on_meta(lambda: ModifiedResNet((1, 1, 1, 1), 32, 4, width=8))
    found["Hugging Face ViT, masked image modelling"] = on_meta(lambda: ViTForMaskedImageModeling(ViTConfig()))
    found["Hugging Face Swin"] = on_meta(lambda: SwinModel(SwinConfig()))
    return found


def tries() -> dict[str, Try]:
    """Every model that is tried, by the name a user knows."""
    found = {
        "timm vit_tiny_patch16_224": timm_("vit_tiny_patch16_224"),
        "timm deit_tiny_patch16_224": timm_("deit_tiny_patch16_224"),
        "timm deit_tiny_distilled_patch16_224": timm_("deit_tiny_distilled_patch16_224"),
        "timm deit3_small_patch16_224": timm_("deit3_small_patch16_224"),
        "timm vit_small_patch14_dinov2": timm_("vit_small_patch14_dinov2", 84, 14),
        "timm vit_small_patch14_reg4_dinov2": timm_("vit_small_patch14_reg4_dinov2", 84, 14),
        "timm vit_so150m2_patch16_reg1_gap_256": timm_("vit_so150m2_patch16_reg1_gap_256", **WIDE),
        "timm vit_betwixt_patch16_reg4_gap_256": timm_("vit_betwixt_patch16_reg4_gap_256"),
        "timm vit_base_patch16_clip_224": timm_("vit_base_patch16_clip_224"),
        "timm vit_base_patch16_siglip_224": timm_("vit_base_patch16_siglip_224"),
        "timm vit_base_patch32_siglip_256 (SigLIP 2)": timm_("vit_base_patch32_siglip_256", 192, 32),
        "timm aimv2_large_patch14_224": timm_("aimv2_large_patch14_224", 84, 14),
        "timm vit_pwee_patch16_reg1_gap_256 (parallel)": timm_("vit_pwee_patch16_reg1_gap_256"),
        "timm beit_base_patch16_224": timm_("beit_base_patch16_224"),
        "timm eva02_tiny_patch14_224": timm_("eva02_tiny_patch14_224", 84, 14),
        "timm vit_small_patch16_dinov3": timm_("vit_small_patch16_dinov3"),
        "open_clip ViT-B-32 (model or .visual)": open_clip_("ViT-B-32", whole=True),
        "open_clip coca_ViT-B-32 .visual": open_clip_("coca_ViT-B-32"),
        "Hugging Face ViT": hf("ViTForImageClassification", "ViTConfig"),
        "Hugging Face CLIP": hf("CLIPVisionModel", "CLIPVisionConfig"),
        "Hugging Face SigLIP": hf("SiglipVisionModel", "SiglipVisionConfig"),
        "Hugging Face DINOv2": hf("Dinov2ForImageClassification", "Dinov2Config"),
        "Hugging Face DINOv2 with registers": hf(
            "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"
        ),
        "Hugging Face DINOv3": hf("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=2),
        "open_clip ViT-B-16-SigLIP .visual (a timm tower)": open_clip_("ViT-B-16-SigLIP"),
        "open_clip EVA02-B-16 .visual (a timm tower)": open_clip_("EVA02-B-16"),
        "torch nn.TransformerEncoder": encoder(),
        "torch nn.TransformerEncoder, norm_first": encoder(norm_first=True),
    }
    return found | looked_at()


REFUSED_BY_TIMM = """cait_xxs24_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 hiera_tiny_224
    levit_128s maxvit_rmlp_pico_rw_256 mvitv2_tiny pvt_v2_b0 xcit_nano_12_p8_224 naflexvit_base_patch16_gap
    tnt_s_patch16_224 vit_relpos_small_patch16_224 samvit_base_patch16 vit_dpwee_patch16_reg1_gap_256 resnet18""".split()


def table() -> str:
    """The table in Markdown: per model whether each method works, the refusal's own words where it does not."""
    lines = ["| model | family | " + " | ".join(HEADS) + " | note |", "|:--|:--|" + ":-:|" * len(HEADS) + ":--|"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more wait for each other longer than such small models take
    try:
        for name, one in tries().items():
            family, cells, note = row(one)
            lines.append(f"| {name} | {family} | {' | '.join(cells)} | {note} |")
    finally:
        torch.set_num_threads(threads)
    return "\n".join(lines) + "\n"


def row(one: Try) -> tuple[str, list[str], str]:
    """(family, a cell per method, note) of one model; AssertionError where a method does what it should not."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = one.build().eval()
        try:
            winnow.restore(winnow.reduce(model, ToMe(r=0)))
        except TypeError as error:
            return type(model).__name__, ["refused"] * len(HEADS), _words(error)
        _spread_out(model)
        images = torch.randn(2, *one.shape) * torch.tensor([0.5, 2.0]).view(2, *[1] * len(one.shape))
        with torch.inference_mode():
            return _tried(model, one, images)


def _tried(model: nn.Module, one: Try, images: Tensor) -> tuple[str, list[str], str]:
    def outcome() -> Tensor:
        return one.look(getattr(model, one.call)(images))

    def works(method: Method) -> None:
        winnow.reduce(model, method)
        with winnow.watch(model) as run:
            out = outcome()
        left = int(run.valid_counts[:, -1].min())
        assert left < (setting.patches or one.shape[0]), f"{method} removes nothing"
        assert out.shape == plain.shape and bool(out.isfinite().all()) and not torch.equal(out, plain), method
        winnow.restore(model)
        assert torch.equal(outcome(), plain), f"{method} leaves something behind"

    plain = outcome()
    with winnow.reduced(model, ToMe(r=0)):
        setting, family = seat_of(model).setting, seat_of(model).host.family
        apart = float((outcome() - plain).abs().max())
        assert apart <= 2e-5 * max(1.0, float(plain.abs().max())), f"nothing removed, but {apart} apart"
    cells, notes = [], []
    methods = (ToMe(r=4), EViT(Keep(0.7), (1,)), NormThreshold(Below(1.0, of="mean"), (1,)), Downsample(one.side))
    for method in methods:
        try:
            works(method)
            cells.append("works")
        except (TypeError, ValueError) as error:
            cells.append("refused")
            notes.append(f"{type(method).__name__} {_words(error, method)}")
    if not setting.cls:
        works(EViT(Keep(0.7), (1,), attention="received"))
    return family, cells, "; ".join(notes)


def _words(error: Exception, method: Method | None = None) -> str:
    """What a refusal says, without what it is about and without the list of what works elsewhere."""
    text = str(error).removeprefix(repr(method)).strip(" :")
    found = re.search(r"no vision transformer Winnow can reduce(?:: (.*?))?\. Works: ", text)
    if found:
        return found[1] or "not a model Winnow knows"
    return text.split("; it offers")[0].removesuffix(".")


def _spread_out(model: nn.Module) -> None:
    """Gains around 1 and every other weight away from 0: a model that is numb to its tokens hides every fault."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in (".ls1", ".ls2", ".ls_", ".ls.", "gamma")):
            nn.init.normal_(parameter, 1.0, 0.1)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, 0.0, 0.1)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)


HEADER = """# Which models work

Made by `python docs/families.py`: each model is built three blocks deep, narrow and with random weights, its gains far from
0. With nothing removed its output is the plain model's (at most 2e-5 apart); then each method runs once, removes tokens,
gives finite output, and `winnow.restore` brings the plain output back to the bit. A refusal comes before anything is
touched; the note is what the exception says. Where a model has no class token, `attention="received"` was seen to work.
Other models: name their list of blocks, as in `winnow.reduce(model, Grid(), blocks="encoder.layers")`.

"""


def page() -> str:
    """The page: how it was made, and the table."""
    return HEADER + table()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
