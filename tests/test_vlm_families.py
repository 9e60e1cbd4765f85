"""Every family from a folder: winnow compare, measure and generate; what is counted is what the closed form says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from vlm_folders import folder
from vlms import FAMILIES, tiny

import winnow
from winnow import DivPrune, Exactly, FastV, Keep, Pool, Random, ToMe
from winnow._vlm_model import ask, load_vlm
from winnow.measure import count_macs, count_vlm_macs, record, vlm_ceiling, vlm_macs
from winnow.measure._vlm_families import towers_of
from winnow.measure.vlm_time import vlm_inputs
from winnow.view import vlm as kept

GRIDS = {"llava": None, "llava_next": (8, 4), "llava_onevision": (4, 8), "qwen2_5_vl": (4, 6), "qwen3_vl": (8, 4),
         "smolvlm": (8, 4), "internvl": (4, 8)}  # fmt: skip
"""Of an image of several tiles, where there are tiles."""
NEEDS = {"smolvlm": "num2words"}
"""What a family's processor wants beside transformers."""
METHODS = [Random(Keep(0.5), at="tower"), FastV(3, Keep(0.5))]
"""One at the tower and one in the language model that every family takes."""


def quickly(*families: str) -> list:
    """All families; those not named are slow."""
    return [one if one in families else pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family, made when it is asked for."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        wanted = NEEDS.get(family)
        if wanted and importlib.util.find_spec(wanted) is None:
            pytest.skip(f"{family}'s processor needs {wanted}")
        if family not in made:
            made[family] = folder(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_counted_equals_closed_form(family):
    """Stage by stage on the meta device, and on the model as it runs, plain and reduced."""
    config, grid = tiny(family).config, GRIDS[family]
    assert count_vlm_macs(config, None, 7, grid=grid) == vlm_macs(config, None, 7, grid=grid)
    model = tiny(family)
    inputs = vlm_inputs(model, 1, 7, grid) | {"logits_to_keep": 1}
    for method in [None, *METHODS, DivPrune(Exactly(3))]:
        said = vlm_macs(config, method, 7, grid=grid)
        if method is not None:
            winnow.reduce(model, method)
        assert count_macs(model, inputs) == pytest.approx(said.total, rel=1e-9), method
        winnow.restore(model) if method is not None else None
    assert 0 < vlm_ceiling(config, 7, grid=grid) < 1


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_what_is_saved_inside_a_tower_whose_tokens_go_back(family):
    model, grid = tiny(family), GRIDS[family]
    inputs = vlm_inputs(model, 1, 7, grid) | {"logits_to_keep": 1}
    said = vlm_macs(model.config, ToMe(r=2), 7, grid=grid, expand=True)
    with winnow.reduced(model, ToMe(r=2), expand=True):
        assert count_macs(model, inputs) == pytest.approx(said.total, rel=1e-9)
    with pytest.raises(ValueError, match="whole grid"):
        vlm_macs(model.config, ToMe(r=2), 7, grid=grid)


def test_grids_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="multiples of a tile's 4 x 4"):
        vlm_macs(tiny("internvl").config, None, 7, grid=(6, 4))
    with pytest.raises(ValueError, match="give \\(h, w\\) in patches"):
        vlm_macs(tiny("llava_next").config, None, 7)
    with pytest.raises(ValueError, match="fills its tiles"):
        vlm_macs(tiny("llava_next").config, Random(Exactly(3), at="tower"), 7, grid=(6, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_images_of_a_batch_are_told_from_what_the_processor_made(family, folders):
    """Two questions, one about one image and one about two: the features that the host makes are the towers' tokens."""
    path = folders(family)
    processor, vlm = load_vlm(f"hf:{path}")
    photos = [Image.open(path / f"{at}.png").convert("RGB") for at in range(3)]
    inputs = ask(processor, [photos[:1], photos[1:], []], ["what ?", "is this ?", "what is this ?"])
    towers = towers_of(vlm.config, inputs)
    placed = (inputs["input_ids"] == vlm.config.image_token_id).sum(1).tolist()
    assert [sum(one.tokens for one in images) for images in towers] == placed and placed[2] == 0 < placed[0]
    with torch.no_grad(), winnow.reduced(vlm, Random(Keep(0.5), at="tower")), winnow.watch(vlm) as run:
        out = vlm.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert out.shape == (3, inputs["input_ids"].shape[1] + 2) and run.columns.total[2] == 0 < run.columns.total[0]


@pytest.mark.parametrize("family", quickly("llava_next"))
def test_compare(family, folders, run):
    path = folders(family)
    methods = [word for method in METHODS for word in ("--method", repr(method))]
    words = ["compare", f"hf:{path}", "--data", path / "asked.json", *methods, "--batch", 2, "--pictures", 1, "--json"]
    code, said, wrong = run(*words)
    assert not code, wrong
    rows = {row.method: row for row in (record.Row.model_validate(one) for one in json.loads(said))}
    plain, (tower, llm) = rows[None], (rows[repr(method)] for method in METHODS)
    assert tower.macs.counted == pytest.approx(tower.macs.closed) and llm.macs.counted == pytest.approx(llm.macs.closed)
    assert max(tower.macs.mean, llm.macs.mean) < plain.macs.mean
    assert tower.vlm.image_tokens[0] < plain.vlm.image_tokens[0] == llm.vlm.image_tokens[2] > llm.vlm.image_tokens[3]
    baselines = {row.method.split("(")[0] for row in rows.values() if row.role == "baseline"}
    assert {"Random", "Grid"} <= baselines and ("Pool" in baselines) == (family != "qwen3_vl")
    page = Path("compare/report.html").read_text()
    assert "what is this ?" in page


@pytest.mark.parametrize("family", quickly("llava_next", "qwen3_vl", "smolvlm", "internvl"))
def test_generate_and_measure(family, folders, run):
    path = folders(family)
    method, _ = METHODS
    asked = ("--image", path / "0.png", "--image", path / "1.png", "--prompt", "what is this ?", "--tokens", 2)
    code, said, wrong = run("generate", "--model", f"hf:{path}", *asked, "--method", repr(method), "--json")
    assert not code, wrong
    found = json.loads(said)
    plain, reduced = (row["image_tokens"] for row in found["answers"])
    assert 0.4 * plain < reduced < 0.75 * plain and all(Image.open(file).size for file in found["pictures"])
    grid = GRIDS[family] and ("--grid", "x".join(map(str, GRIDS[family])))
    code, said, wrong = run(
        "measure", f"hf:{path}", "--text", 7, "--batch", 0, *(grid or ()), "-m", repr(method), "--json"
    )
    assert not code, wrong
    whole, less = json.loads(said)
    assert less["prefill"] < whole["prefill"] and less["vision"] == whole["vision"]


def test_pictures_show_each_image_s_own_tokens(folders):
    """In a prompt with two images the language model's ledger is one; tiles that are packed among marks are not drawn."""
    for family, drawn in {"llava": 2, "qwen2_5_vl": 2, "internvl": None, "llava_next": 2}.items():
        path = folders(family)
        processor, vlm = load_vlm(f"hf:{path}")
        photos = [Image.open(path / f"{at}.png").convert("RGB") for at in range(2)]
        inputs = ask(processor, [photos], ["what is this ?"])
        where, pictures = kept.places(vlm.config, inputs), kept.seen(processor, inputs, photos)
        assert len(where) == len(pictures)
        with torch.no_grad(), winnow.reduced(vlm, FastV(3, Keep(0.5))), winnow.watch(vlm) as run:
            vlm(**inputs)
        layers = kept.layers_of(run, FastV(3, Keep(0.5)))
        found = [kept.of(layers, at, where, one.shape[:2]) for at, one in enumerate(pictures)]
        shown = [one for one in found if one]
        assert len(shown) == (len(pictures) if drawn is None else drawn)
        owner, left = layers[0][0][1], sum(one[0][2] for one in shown)
        assert left <= len(set(owner[owner >= 0])) and (family == "llava_next" or left == len(set(owner[owner >= 0])))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_measured_as_it_runs(family, folders, run):
    path = folders(family)
    grid = GRIDS[family] and ("--grid", "x".join(map(str, GRIDS[family])))
    words = ["--text", 7, "--pairs", 9, *(grid or ()), "-m", repr(Pool(Keep(0.5), at="tower") if family != "qwen3_vl" else
             Random(Keep(0.5), at="tower")), "-m", repr(FastV(3, Keep(0.5))), "--json"]  # fmt: skip
    code, said, wrong = run("measure", f"hf:{path}", *words)
    assert not code, wrong
    rows = [record.Row.model_validate(one) for one in json.loads(said)]
    assert len(rows) == 3 and all(row.macs.counted == pytest.approx(row.macs.closed) for row in rows)
    assert all(row.latency and row.vlm.answer and row.memory_mib for row in rows[1:])
