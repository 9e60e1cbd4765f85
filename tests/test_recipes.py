"""Every shipped recipe is typed, says what it costs, what to expect and how to run it, and trains two steps in small."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import instruct_vlm
import open_clip
import pytest
import timm
from conftest import SHARED

import winnow
import winnow.backbones  # registers ours with timm
from winnow import CurriculumDrop
from winnow.models import load_model
from winnow.train import Recipe, load_recipe
from winnow.train.loop import train
from winnow.train.progress import read_log
from winnow.train.recipe import SHIPPED

NAMES = sorted(path.stem for path in Path(str(SHIPPED)).glob("*.yaml"))
STEPS, SIDE = 2, 32
SMALL = (
    *("data.train={path: scenes, split: 'train[:8]'}", "data.val={path: scenes, split: 'val[:4]'}", "data.workers=0"),
    *("batch=4", "eval.batch=4", "epochs=1", f"augment.size={SIDE}", "log.every=1"),
    *("model.pretrained=false", "model.weights=null", "model.options.embed_dim=32", "model.options.num_heads=2"),
    *("model.options.depth=4", f"model.options.img_size={SIDE}"),
)
"""The recipe's own method, schedule, augmentation, optimiser and precision, on a tiny network and eight scenes."""
SMALL_CLIP = (
    *SMALL[:8], "contrast.zeroshot={path: scenes, split: 'val[:4]'}", "contrast.classes=null",
    "contrast.templates=['a {} triangle']", "model.options.embed_dim=16",
    f"model.options.vision_cfg={{image_size: {SIDE}, patch_size: 8, layers: 4, width: 32, head_width: 16}}",
    "model.options.text_cfg={context_length: 40, layers: 1, width: 16, heads: 2}",
)  # fmt: skip

SMALL_TOWER = (
    *SMALL[:8],
    "model.weights=null",
    *(text for text in SMALL_CLIP if "embed_dim" in text or "vision" in text),
)


@pytest.fixture(scope="module")
def small_llava(tmp_path_factory) -> Callable[[Recipe], tuple[str, ...]]:
    """Settings that put a tiny LLaVA, or its two halves, and eight conversations in place of a recipe's own."""
    folder = tmp_path_factory.mktemp("llava")
    instruct_vlm.build(folder)
    instruct_vlm.halves(folder)
    told = instruct_vlm.write_json(folder, rounds=1)
    data = (f"data.train={{path: {told}}}", f"data.val={{path: {told}, split: '[4:]'}}", "instruct.images=null")

    def settings(recipe: Recipe) -> tuple[str, ...]:
        new = recipe.instruct.vision is not None
        name = (
            (f"model.name=hf:{folder}/llm", f"instruct.vision=hf:{folder}/tower")
            if new
            else (f"model.name=hf:{folder}",)
        )
        return (*data, *name, *SMALL[2:6], "log.every=1")

    return settings


@pytest.mark.parametrize("name", NAMES)
def test_two_steps(name, tmp_path, monkeypatch, request):
    monkeypatch.setattr("winnow.train.loop.save_training", lambda *args: None)  # drawn in test_train.py
    whole = load_recipe(name)
    stem = "model.options.stem=[8, 8]" if "hybrid" in whole.model.name else "model.options.patch_size=8"
    small = SMALL_CLIP if whole.task == "contrast" else (*SMALL, stem)
    if whole.task == "classify" and whole.model.name.startswith("open_clip:"):
        small = SMALL_TOWER
    if whole.task == "instruct":
        small = request.getfixturevalue("small_llava")(whole)
    row = train(load_recipe(name, small), tmp_path / "run", name=name, device="cpu")
    lines = read_log(tmp_path / "run" / "log.jsonl")
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert len(losses) == STEPS and all(math.isfinite(loss) for loss in losses)
    assert row.method == whole.method and row.train.recipe == name and row.data.n == 4
    if whole.method is not None and winnow.parse(whole.method).facts.training_only is False:
        assert row.counts[-1] < row.counts[0], "the method acts in evaluation"


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_cost_expectation_and_command(name):
    recipe = load_recipe(name)
    text = Path(str(SHIPPED / f"{name}.yaml")).read_text(encoding="utf-8")
    header = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert re.match(r"# \w", text) and "TODO" not in text
    for word in ("Cost: ", "Expected"):
        assert word in header
    assert f"Command: winnow train {name} " in f"{header} "
    host, _, known = recipe.model.name.partition(":")
    known_to = {
        "timm": lambda: timm.is_model(known.partition(".")[0]),
        "open_clip": lambda: known in open_clip.list_models(),
    }
    assert known_to.get(host, lambda: host == "hf" and recipe.task == "instruct")()
    for spelled in re.findall(r'"method=([^"]+)"', header):
        winnow.parse(spelled)
    for other in re.findall(r"winnow train (\w+)", header) + re.findall(
        r"`((?:ctd|cifar|clip|scenes|vit|drip|llava|vila)\w+)`", header
    ):
        assert other in NAMES


CONFIG_003 = {
    "image_size": 32, "patch_size": 4, "in_channels": 3, "num_classes": 100, "emb_dim": 384, "num_heads": 6, "depth": 8,
    "mlp_ratio": 4.0, "drop": 0.1, "drop_path": 0.1, "batch_size": 128, "epochs": 200, "lr": 3e-4, "weight_decay": 0.05,
    "warmup_epochs": 5, "label_smoothing": 0.1, "seed": 42, "use_token_drop": True, "initial_drop_ratio": 0.0,
    "final_drop_ratio": 0.35, "ctd_start_epoch": 20, "ctd_end_epoch": 160, "ctd_gamma": 1.5,
}  # fmt: skip
"""Document 003's configuration, whole."""


def ours() -> dict[str, object]:
    """The same keys, read off what `ctd_cifar100` builds."""
    recipe = load_recipe("ctd_cifar100")
    part, method = recipe.model, winnow.parse(recipe.method)
    made = load_model(part.name, num_classes=part.num_classes, size=recipe.augment.size,
                      options={"drop_rate": part.drop, "drop_path_rate": part.drop_path} | part.options)  # fmt: skip
    model, block = made.model, made.model.blocks[-1]
    return {
        "image_size": made.size[0], "patch_size": made.size[0] // model.patch_embed.grid_size[0],
        "in_channels": model.patch_embed.backbone[0].in_channels, "num_classes": model.head.out_features,
        "emb_dim": model.embed_dim, "num_heads": block.attn.num_heads, "depth": len(model.blocks),
        "mlp_ratio": block.mlp.fc1.out_features / model.embed_dim, "drop": block.mlp.drop1.p,
        "drop_path": block.drop_path1.drop_prob, "batch_size": recipe.batch, "epochs": recipe.epochs,
        "lr": recipe.optim.lr, "weight_decay": recipe.optim.weight_decay,
        "warmup_epochs": recipe.schedule.warmup_epochs, "label_smoothing": recipe.label_smoothing, "seed": recipe.seed,
        "use_token_drop": recipe.method is not None, "initial_drop_ratio": method.start,
        "final_drop_ratio": method.final, "ctd_start_epoch": method.from_ * recipe.epochs,
        "ctd_end_epoch": method.to * recipe.epochs, "ctd_gamma": method.gamma,
    }  # fmt: skip


def test_ctd_cifar100_has_every_key_of_document_003():
    assert ours() == pytest.approx(CONFIG_003)
    header = Path(str(SHIPPED / "ctd_cifar100.yaml")).read_text(encoding="utf-8")
    assert all(re.search(rf"^# {key} ", header, re.M) for key in CONFIG_003)
    assert winnow.parse(load_recipe("ctd_cifar100").method) == CurriculumDrop.seed003_as_described()


def test_the_configuration_is_the_documents_own():
    found = list((SHARED / "seeds").glob("003_*.txt")) if SHARED.is_dir() else []
    if not found:
        pytest.skip("document 003 is not here")
    text = found[0].read_text(encoding="utf-8")
    inside = re.search(r"config = \{(.*?)\n\}", text, re.S)[1]
    given = {key: {"True": True}.get(value) or float(value) for key, value in re.findall(r'"(\w+)": ([\w.-]+)', inside)}
    assert given == CONFIG_003


def test_the_plain_twins_differ_by_the_method_alone():
    for name in ("ctd_cifar100", "scenes_drip"):
        twin = load_recipe(f"{name}_plain" if name == "ctd_cifar100" else "scenes_plain")
        assert twin.method is None
        assert twin == load_recipe(name).model_copy(update={"method": None})


def test_half_the_batch_has_half_the_rate():
    whole, half = load_recipe("vit_b32_official"), load_recipe("vit_b32_official_2048")
    assert (whole.batch, half.batch) == (4096, 2048) and whole.optim.lr == 2 * half.optim.lr
    assert half == whole.model_copy(update={"batch": half.batch, "optim": half.optim})
