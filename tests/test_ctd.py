"""The page about document 003 from rows, its claims, the experiment end to end in miniature, and the three notebooks."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import winnow
import winnow.backbones
from winnow import CurriculumDrop
from winnow.measure import accuracy_of, record
from winnow.measure.closed_form import closed_macs
from winnow.recipes import ctd
from winnow.recipes._ctd_arms import ablations, arms_of, difference
from winnow.recipes._ctd_claims import claims_of, claims_over
from winnow.recipes._ctd_page import page, table
from winnow.view import files
from winnow.view.attention import attention_maps, heat

ROOT = Path(__file__).resolve().parents[1]
RUN = CurriculumDrop.seed003_as_run(5)
TOKENS = {"plain": None, "described": [64, 50, 50, 50, 50], "run": [64, 40, 30, 20, 15]}


def row(method, seed=42, right=0.6, seconds=100.0, train=0.7, tokens=None, n=1000, **words):
    hits = np.random.default_rng(seed).random(n) < right
    last = float(hits.mean())
    part = record.Training(
        recipe="ctd", epochs=5, steps=50, batch=128, runtime_s=seconds, samples_per_s=1.0, steps_per_s=1.0, loss=1.0,
        settings={"method": method and repr(method), "seed": seed, "model.drop": 0.1, "model.num_classes": 100},
        best=last + 0.01, last=last,
        train_top1=train, gap=train - last, tokens=tokens,
    )  # fmt: skip
    return record.Row(
        task="train classify", model="timm:hybrid_vit_small", weights="0" * 16, method=method and repr(method), seed=seed,
        data=record.Data(name="cifar100", split="train[-5000:]", n=n), accuracy=accuracy_of(hits), train=part,
        counts=[64.0] * 5 if method else None, role="method" if method else "plain", **words,
    )  # fmt: skip


def step(method, progress, ratio, low, high, batch=128):
    time = record.Latency(batch=batch, plain_ms=100, reduced_ms=100 / ratio, ratio=ratio, low=low, high=high, null=1,
                          null_low=0.99, null_high=1.01, pairs=9)  # fmt: skip
    part = record.Step(latency=time, tokens=[64] * 5, progress=progress, plain_mib=2, mib=1)
    return record.Row(task="step", model="timm:hybrid_vit_small", weights=None, method=repr(method), step=part)


def rows():
    found = [step(RUN, 0.0, 1.0, 0.98, 1.02), step(RUN, 0.5, 3.0, 2.9, 3.1), step(RUN, 0.5, 9.0, 8.0, 9.5, batch=1)]
    found += [step(CurriculumDrop.seed003_as_described(5), 0.5, 1.1, 1.05, 1.2)]
    for seed in (42, 43, 44):
        found += [row(None, seed), row(RUN, seed, 0.55, 50, tokens=TOKENS["run"])]
    found.append(row(CurriculumDrop.seed003_as_described(5), right=0.8, seconds=90, tokens=TOKENS["described"]))
    for gamma, seconds in ((0.5, 45), (3.0, 70)):
        tokens = [64, *[seconds / 2] * 4]
        found.append(
            row(CurriculumDrop(final=0.5, blocks="all", epochs=5, gamma=gamma), seconds=seconds, tokens=tokens)
        )
    for seed in (42, 43):
        random = CurriculumDrop(final=0.5, blocks="all", epochs=5, saliency="random")
        found.append(row(random, seed, 0.4, 49, tokens=TOKENS["run"]))
    return found


def test_arms_are_methods_with_their_seeds():
    (arms,) = arms_of([*rows(), record.Row(task="compare", model="m", weights=None, method=None)])
    assert [len(arm.rows) for arm in arms] == [3, 3, 1, 1, 1, 2] and arms[0].method is None
    run = next(arm for arm in arms if arm.method == RUN)
    assert run.seconds == [50, 50, 50] and run.tokens == TOKENS["run"]
    assert run.drop == pytest.approx(1 - (40 + 30 + 20 + 15) / 4 / 64)
    other = row(RUN, 42).model_copy(update={"train": row(RUN).train.model_copy(update={"epochs": 9})})
    assert len(arms_of([*rows(), other])) == 2, "another number of epochs is another experiment"
    again = row(RUN, 44, seconds=7.0)
    assert next(arm for arm in arms_of([*rows(), again])[0] if arm.method == RUN).seconds == [50, 50, 7]


def test_patches_dropped_before_the_first_block_count():
    arm = arms_of([row(winnow.PatchDropout(rate=0.5), tokens=[32] * 5)])[0][0]
    assert arm.drop == 0.5


def test_a_block_executes_what_it_gets_where_the_method_acts_between_blocks():
    arm = arms_of([row(winnow.DRIP(rate=0.5), tokens=[64, 64, 40, 40, 40])])[0][0]
    assert arm.executed == [64, 64, 40, 40] and arm.drop == pytest.approx(1 - 52 / 64)


def test_differences_are_paired_and_widen_with_the_seeds():
    (arms,) = arms_of(rows())
    plain, run = arms[0], next(arm for arm in arms if arm.method == RUN)
    middle, low, high = difference(run, plain)
    assert middle == pytest.approx(np.mean(run.validation) - np.mean(plain.validation))
    assert low < middle < high
    images = (run.hits - plain.hits).std(ddof=1) / 1000**0.5
    seeds = (np.var(run.validation, ddof=1) / 3 + np.var(plain.validation, ddof=1) / 3) ** 0.5
    assert high - middle == pytest.approx(1.96 * (images**2 + seeds**2) ** 0.5, rel=1e-4)


def test_ablations_differ_in_one_field():
    (arms,) = arms_of(rows())
    (gammas,) = ablations(arms, "gamma")
    assert [arm.method and arm.method.gamma for arm in gammas] == [None, 0.5, 1.5, 3.0]
    (saliencies,) = ablations(arms, "saliency")
    assert {arm.method and arm.method.saliency for arm in saliencies} == {None, "cls_attention", "random"}
    assert ablations(arms, "schedule") == []


def test_claims_are_judged_by_the_rows():
    (arms,) = arms_of(rows())
    found = {one.words: (one.verdict, one.evidence) for one in claims_of(arms)}
    # 2 / (1 / 1 + 1 / 3) = 1.5: its interval, 1.46 to 1.53, is below 1.6
    words = "1.50 times (1.46 to 1.53), 59 % of the patch tokens not executed"
    assert found["training is 1.6 times faster, as run"] == ("refuted", words)
    words = "1.10 times (1.05 to 1.20), 22 % of the patch tokens not executed"
    assert found["training is 1.6 times faster, as described"] == ("refuted", words)
    assert found["time falls in proportion to the tokens"][0] == "refuted", "33 % of the time for 59 % of the tokens"
    assert found["gradients cost 8 % more time than attention"] == ("untested", "no such rows")
    untimed = [replace(arm, steps=()) for arm in arms]
    without = {one.words: one.verdict for one in claims_of(untimed)}
    assert without["training is 1.6 times faster, as run"] == "untested", "times of separate runs say nothing"
    assert found["at most 0.7 points are lost, as run"][0] == "refuted"
    verdict, evidence = found["at most 0.7 points are lost, as described"]
    assert verdict == "untested" and evidence.startswith("+") and evidence.endswith("over images), but one seed")
    assert found["accuracy falls as gamma grows"][1].endswith("but one seed")
    assert found["35 % of the tokens are dropped"][0] == "refuted"
    assert found["a larger gamma is more aggressive"][0] == "refuted"
    assert "0.5: 64.8 %, 1.5: 59.0 %, 3: 45.3 %" in found["a larger gamma is more aggressive"][1]
    assert found["attention is a better saliency than random"][0] == "confirmed"
    assert found["attention is a better saliency than gradient"] == ("untested", "no such rows")
    assert found["inference is unchanged: every token is used"][0] == "confirmed"
    assert found["the train-validation gap is smaller, as described"] == ("untested", "one seed")
    assert found["dropping regularises"][0] == "untested"
    turned = [arm for arm in arms if arm.method is None or arm.method.gamma == 1.5]
    assert {one.words: one.verdict for one in claims_of(turned)}["a larger gamma is more aggressive"] == "refuted"


def test_a_claim_is_judged_by_the_longest_experiment_that_has_rows_for_it():
    (whole,) = arms_of(rows())
    main = [arm for arm in whole if arm.method is None or arm.method.gamma == 1.5]
    shorter = [
        row.model_copy(update={"train": row.train.model_copy(update={"steps": 12})}) for row in rows() if row.train
    ]
    (small,) = arms_of(shorter)
    by_main, over = ({one.words: one for one in found} for found in (claims_of(main), claims_over([small, main])))
    assert list(over) == list(by_main)
    for words in ("training is 1.6 times faster, as run", "attention is a better saliency than random"):
        assert over[words] == by_main[words]
    assert "mean drop by gamma" in over["a larger gamma is more aggressive"].evidence, "the longest has no rows of it"


def test_page_and_table():
    text = page(rows())
    assert "32 16 8 4 2 1 1 1" in text and "52 42 34 27 22 18 14 11" in text and "41 26 16 10 6 3 1 1" in text
    for preset, fewer in (("described", "0.837 | 1.19"), ("coded", "0.590 | 1.69"), ("run", "0.523 | 1.90")):
        (line,) = (line for line in text.splitlines() if line.startswith(f"| `seed003_as_{preset}`"))
        assert line.endswith(f"| {fewer} |")
    line = next(line for line in text.splitlines() if line.startswith(f"| `{RUN}` | 3 |"))
    cost = winnow.reduce(timm.create_model("hybrid_vit_small", num_classes=100), RUN)
    macs = float(closed_macs(cost, torch.tensor([TOKENS["run"]])))
    assert "| 0 min 50 s | 1.50 (1.46 to 1.53) |" in line and line.endswith(
        f"| 59 % | {macs / 1e9:.4f} | 40 30 20 15 |"
    )
    assert " ± " in line and "| CTD (γ=1.5), theirs | – | 67.53 ± 0.22 |" in text
    assert "### By gamma" in text and "### By saliency" in text and "### By schedule" not in text
    read = list(csv.DictReader(io.StringIO(table(rows()))))
    assert len(read) == 11 and read[1]["method"] == repr(RUN) and float(read[1]["mean_drop"]) == pytest.approx(0.5898)
    with pytest.raises(ValueError, match="no row is of a training"):
        page([record.Row(task="compare", model="m", weights=None, method=None)])


# ---- the experiment


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two arms of the experiment on a handful of built-in scenes, of a network of a few thousand weights."""
    folder, patch = tmp_path_factory.mktemp("ctd"), pytest.MonkeyPatch()
    recipe = folder / "tiny.yaml"
    options = "{embed_dim: 16, depth: 2, num_heads: 2, stem: [4, 4]}"
    recipe.write_text(
        f"""
model: {{name: "timm:hybrid_vit_small", num_classes: 8, options: {options}}}
data: {{train: {{path: scenes, split: train}}, val: {{path: scenes, limit: 8}}}}
augment: {{size: 32}}
optim: {{lr: 0.001}}
epochs: 1
batch: 8
eval: {{batch: 8}}
"""
    )
    patch.setattr(ctd, "RECIPE", str(recipe))
    runs = ctd.runs
    patch.setattr(
        ctd, "runs", lambda wish: (one for one in runs(wish) if one.name in ("plain", "as_run") and one.seed == 42)
    )
    patch.setattr(ctd, "timed", lambda wish: (CurriculumDrop.seed003_as_run(wish.epochs),))
    results, said = folder / "results" / "ctd.jsonl", []
    wish = ctd.Wish(epochs=2, steps=2)
    paths = ctd.write(wish, results, folder / "out", said.append)
    again = list(said)
    ctd.write(wish, results, folder / "out", again.append)
    yield folder, paths, said, again
    patch.undo()


def test_experiment_end_to_end(made):
    folder, paths, said, again = made
    assert [path.name for path in paths] == ["ctd.md", "results.csv", "curves.png", "curves.svg"]
    assert len(said) == 2 + 2 and again == said, "what the rows hold is neither timed nor trained again"
    *steps, plain, run = record.read(folder / "results" / "ctd.jsonl")
    assert [(row.step.progress, row.step.tokens) for row in steps] == [(0.0, [64, 64, 64]), (0.5, [64, 52, 42])]
    found = [plain, run]
    assert [r.method for r in found] == [None, repr(CurriculumDrop.seed003_as_run(2))]
    assert found[1].train.tokens == [64, (64 + 52) / 2, (64 + 42) / 2]
    assert found[1].counts == [64, 64, 64], "nothing is dropped at validation"
    kept = np.load(folder / "results" / "ctd-logs" / "as_run-42.npz")
    assert kept["attention"].shape == (2, 4, 2, 2, 8, 8) and kept["epochs"].tolist() == [1, 2]
    assert "timm:hybrid_vit_small" in (folder / "out" / "ctd.md").read_text()


BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("book", BOOKS, ids=lambda path: path.stem)
def test_notebooks_run(book, made, monkeypatch, capsys):
    monkeypatch.chdir(made[0])
    content = json.loads(book.read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in content["cells"]), "notebooks are kept without their outputs"
    space: dict = {}
    for number, cell in enumerate(content["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{book.name} cell {number}", "exec"), space)
    if book.stem == "results_analysis":
        assert "runs of timm:hybrid_vit_small" in capsys.readouterr().out
    else:
        assert all(picture.png.startswith(b"\x89PNG") for picture in space["pictures"]) and len(space["pictures"]) == 2


def test_all_three_notebooks_are_there():
    assert [book.stem for book in BOOKS] == ["attention_visualization", "results_analysis", "saliency_analysis"]


# ---- maps


def test_attention_maps_are_the_rows_of_the_class_token():
    model = timm.create_model("hybrid_vit_small", depth=2, embed_dim=16, num_heads=2, stem=(4, 4)).train()
    x, seen = torch.randn(2, 3, 32, 32), []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda attn, args: seen.append((attn, args[0])))
    model.eval()(x)
    maps = attention_maps(winnow.reduce(model.train(), CurriculumDrop(blocks="all", final=0.5)), x)
    assert maps.shape == (2, 2, 2, 8, 8) and model.training and winnow.reducer_of(model)
    for layer, (attn, tokens) in enumerate(seen):
        q, k, _ = attn.qkv(tokens).view(2, 65, 3, 2, 8).permute(2, 0, 3, 1, 4)
        wanted = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1)[:, :, 0, 1:].view(2, 2, 8, 8)
        np.testing.assert_allclose(maps[:, layer], wanted.detach().numpy(), atol=1e-6)


def test_heat_is_checked():
    photo, maps = np.zeros((32, 32, 3), np.uint8), np.random.rand(2, 3, 8, 8)
    assert files.encode(heat(photo, maps, ["a", "b"], ["1", "2", "3"]), "svg").startswith(b"<?xml")
    with pytest.raises(ValueError, match="2 rows and 2 columns are named"):
        heat(photo, maps, ["a", "b"], ["1", "2"])
