"""winnow compare with the vision-language model that ships: what it is, what rows say, what questions are asked."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import winnow
from winnow import (
    CDPruner,
    DivPrune,
    Downsample,
    EViT,
    Exactly,
    FastV,
    Keep,
    Pool,
    PruMerge,
    PyramidDrop,
    Random,
    SparseVLM,
    ToMe,
    VisionZip,
)  # fmt: skip
from winnow._question import tell
from winnow.compare_vlm import at_budgets
from winnow.data.conversations import open_conversations
from winnow.data.scenes import patch_objects
from winnow.measure import count_macs, record, vlm_macs
from winnow.view import curves
from winnow.view.columns import columns
from winnow.view.rows import groups
from winnow.view.summary import sentences

pytest.importorskip("transformers")

from winnow._vlm_model import is_vlm, load_vlm
from winnow.backbones.llava_scenes import STORED, llava_scenes
from winnow.backbones.vit_scenes import vit_scenes
from winnow.tasks.answer import Prompts, answer


@pytest.fixture(scope="module")
def shipped():
    return load_vlm("hf:scenes")


@pytest.fixture(scope="module")
def prompts(shipped):
    return Prompts(shipped[0], open_conversations("scenes", "test[:64]"), 16)


def test_the_tower_is_the_vit_that_ships():
    vit = vit_scenes(pretrained=True).eval()
    tower = llava_scenes(vit).model.vision_tower
    seen: list[torch.Tensor] = []
    hook = vit.blocks[len(tower.layers) - 1].register_forward_hook(lambda block, args, out: seen.append(out))
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        vit(images)
        ours = tower(images, output_hidden_states=True).hidden_states[-1]
    hook.remove()
    assert torch.equal(seen[0], ours)


def test_what_ships_answers_and_needs_its_tokens(shipped, prompts):
    assert sum(file.stat().st_size for file in STORED.iterdir()) < 3 * 2**20
    model = shipped[1]
    assert model.dtype == torch.float32
    right = (answer(model, prompts, watched=False).top == prompts.answers).mean()
    with winnow.reduced(model, Pool(Exactly(9), at="tower")):
        pooled = answer(model, prompts)
    assert right >= 0.9 and (pooled.top == prompts.answers).mean() <= right - 0.1
    assert set(pooled.tokens.flatten().tolist()) == {9}


@pytest.mark.parametrize(
    ("method", "entering"),
    [
        (FastV(2, Exactly(9)), (144, 144, 9, 9)),
        (PyramidDrop((1, 2, 3), (0.5, 0.25, 0.125)), (144, 72, 36, 18)),
        (ToMe(r=8), (104,) * 4),
        (VisionZip(Exactly(20)), (20,) * 4),
        (Downsample(48), (36,) * 4),
    ],
)
def test_tokens_are_counted_where_they_enter(shipped, prompts, method, entering):
    model, inputs = shipped[1], prompts.batch_of([prompts.samples[0]]).inputs
    with winnow.reduced(model, method):
        said = answer(model, Prompts(shipped[0], open_conversations("scenes", "test[:4]"), 4))
        counted = count_macs(model, {**inputs, "logits_to_keep": 1})
    assert tuple(said.tokens[0].tolist()) == entering and said.owners.shape == (4, 144) and said.grid == (12, 12)
    text = inputs["input_ids"].shape[1] - 144
    assert counted == pytest.approx(vlm_macs(model.config, method, text).total, rel=1e-9)


@pytest.mark.parametrize(
    "method",
    [FastV(2, Keep(1.0)), Random(Keep(1.0), at="tower"), PruMerge(Keep(1.0)), DivPrune(Keep(1.0)), ToMe(r=0)],
    ids=repr,
)
def test_a_vit_tower_with_nothing_removed_changes_no_bit(shipped, prompts, method):
    model, inputs = shipped[1], prompts.batch_of([prompts.samples[0], prompts.samples[1]]).inputs
    plain = model(**inputs).logits
    with winnow.reduced(model, method):
        assert torch.equal(model(**inputs).logits, plain)


def test_a_count_that_the_image_says_is_told(shipped):
    config = shipped[1].config
    with pytest.raises(ValueError, match="what the image asks for"):
        vlm_macs(config, PruMerge(), 9)
    adaptive, fixed = vlm_macs(config, PruMerge(), 9, kept=9), vlm_macs(config, PruMerge(Exactly(9)), 9)
    assert (adaptive.prefill, adaptive.image_tokens) == (fixed.prefill, fixed.image_tokens)


def test_amounts_for_those_that_have_none():
    found = at_budgets(
        [VisionZip(), EViT(layers=(1, 2)), Random(at="tower"), ToMe(r=8), FastV(keep=Exactly(3))], [1, 0.25, 36]
    )
    assert found[:2] == [VisionZip(Keep(0.25)), VisionZip(Exactly(36))]
    assert found[2:4] == [EViT(Keep(0.5), (1, 2)), EViT(Exactly(36), (1, 2))]
    assert found[4:] == [
        Random(Keep(0.25), at="tower"),
        Random(Exactly(36), at="tower"),
        ToMe(r=8),
        FastV(keep=Exactly(3)),
    ]
    assert at_budgets([PyramidDrop((1, 2, 3))], [0.125]) == [PyramidDrop((1, 2, 3), (0.5, 0.25, 0.125))]
    assert at_budgets([SparseVLM(layers=(1, 2, 3))], [0.125])[0].keep == Keep(0.5)
    some, all_ = (
        at_budgets([VisionZip(), ToMe(r=8)], [36, 64, 576], 64),
        at_budgets([VisionZip(), ToMe(r=8)], [1, 576], 64),
    )
    assert (some, all_) == ([VisionZip(Exactly(36)), ToMe(r=8)], [ToMe(r=8)]), "nothing is removed: the plain row"
    with pytest.raises(TypeError, match="shares"):
        at_budgets([PyramidDrop((1, 2, 3))], [36])
    with pytest.raises(ValueError, match="whole number"):
        at_budgets([VisionZip()], [2.5])


def test_the_command_compares_and_goes_on(run, tmp_path):
    rows_file, out = tmp_path / "rows.jsonl", tmp_path / "page"
    words = [
        *("compare", "hf:scenes", "--split", "test[:24]", "--method", "VisPruner()", "--method", "PruMerge()"),
        *("--budgets", "1,0.25", "--pictures", "2", "--results", str(rows_file), "--out", str(out), "--json"),
    ]
    for _ in range(2):
        code, said, wrong = run(*words)
        assert not code, wrong
        rows = [record.Row.model_validate(row) for row in json.loads(said)]
    by = {row.method: row for row in rows}
    assert len(record.read(rows_file)) == len(rows), "the second run made nothing again"
    plain, merged = by[None], by["PruMerge(keep=Keep(0.25))"]
    assert {row.role for row in rows} == {"plain", "method", "baseline"}
    assert merged.vlm.image_tokens == [36] * 4 and plain.vlm.image_tokens == [144] * 4
    assert merged.accuracy.vs_baseline.against.split("(")[0] in ("Random", "Grid", "Pool", "Downsample")
    assert merged.macs.counted < plain.macs.counted and sum(merged.vlm.stages.values()) > merged.macs.counted
    assert 0 <= merged.objects.kept <= 1
    kinds = {row.method.split("(")[0] for row in rows if row.role == "baseline"}
    assert kinds == {"Random", "Grid", "Pool", "Downsample"}
    page = (out / "report.html").read_text()
    assert "what colour is the" in page and "after the tower" in page and (out / "accuracy-tokens.svg").exists()
    (group,) = groups(rows)
    heads = [column.head for column in columns([group])]
    assert "right %" in heads and "asked kept" in heads
    assert any("24 questions" in words for words in sentences(group)) and curves.points(rows, "tokens")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["timm:vit_scenes", "--budgets", "0.5"], "vision-language models"),
        (["hf:scenes", "--budgets", "half"], "shares up to 1"),
        (["hf:scenes", "--data", "scene_dialogues", "--limit", "2"], "a question about an image"),
        (["hf:scenes", "--method", "NormThreshold(before=(1,))"], "what the image asks for"),
        (["hf:/nowhere/at/all"], "no such folder"),
    ],
)
def test_what_cannot_be_compared_is_refused(run, words, reason):
    code, _, said = run("compare", *words)
    assert code == 2 and reason in " ".join(said.split())


def test_every_scene_is_asked_once_before_any_is_asked_twice():
    found = open_conversations("scenes", "test")
    keys = [sample.key for sample in found.samples]
    assert len({key.split(":")[0] for key in keys[:500]}) == 500 and len(set(keys)) == 4000
    assert 40 < sum("triangle" in key for key in keys[:500]) < 90
    sample = found[9]
    asked = patch_objects(sample.mask(), (12, 12)).reshape(12, 12)
    rows, columns = np.nonzero(asked)
    assert len(rows) and np.ptp(rows) <= 2 and np.ptp(columns) <= 2, "one object, and it is small"


def test_one_conversation_holds_all_questions_of_a_scene():
    one, alone = open_conversations("scene_dialogues", "val[:3]")[2], open_conversations("scenes", "val")
    pairs = {(one.turns[at][1].removeprefix("<image>\n"), one.turns[at + 1][1]) for at in range(0, 16, 2)}
    mine = {
        (s.turns[0][1].removeprefix("<image>\n"), s.turns[1][1]) for s in alone.samples if s.key.startswith("scene 2:")
    }
    assert pairs == mine and len(pairs) == 8
    assert sum(words.count("<image>") for _, words in one.turns) == 1


def test_questions_reach_methods_that_go_by_them(shipped):
    model, told = shipped[1], []
    with winnow.reduced(model, CDPruner(Exactly(9))):
        tell(model, ["what?"])  # looks at diversity alone
        reducer = winnow.reducer_of(model)
        reducer.asked, reducer.ask = (True,), told.append
        tell(model, ["what?"])
    assert told == [["what?"]]


def test_what_is_a_vision_language_model(tmp_path):
    assert is_vlm("hf:scenes") and not is_vlm("timm:vit_scenes")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        is_vlm(f"hf:{tmp_path / 'nothing'}")
    assert Path(STORED).name == "llava_scenes.hf"


def test_the_page_says_what_the_rows_say():
    path = Path(__file__).parents[1] / "docs" / "vlm.py"
    spec = importlib.util.spec_from_file_location("docs_vlm", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.page() == made.PAGE.read_text(encoding="utf-8"), "run: python docs/vlm.py"
    assert made.share_of(VisionZip(Keep(0.25))) == 0.25 and made.share_of(ToMe(r=8)) is None
