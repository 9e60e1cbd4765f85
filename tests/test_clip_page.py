"""The experiment of contrastive pretraining: made once, written up from rows; a pair's step timed."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import winnow
from winnow import DRIP
from winnow.cli import main
from winnow.measure import pack, record
from winnow.measure.step import measure_pair_step
from winnow.recipes import _clip_boundaries as boundaries
from winnow.recipes import _clip_document as document
from winnow.recipes import _clip_page as page
from winnow.recipes import clip
from winnow.train import load_recipe

pytest.importorskip("open_clip")
SMALL = {
    "embed_dim": 16, "vision_cfg": {"image_size": 96, "patch_size": 32, "layers": 2, "width": 16, "head_width": 8},
    "text_cfg": {"context_length": 48, "layers": 1, "width": 16, "heads": 2},
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """Every recipe of the experiment with a tiny network, four scenes to judge by, two arms and one seed."""

    def recipe(name, sets):
        made = load_recipe(name, sets)
        made.model.options = (
            SMALL if made.task == "contrast" else {key: SMALL[key] for key in ("embed_dim", "vision_cfg")}
        )
        made.batch = made.eval.batch = 4
        made.data.val.limit = 4
        if made.contrast.zeroshot is not None:
            made.contrast.zeroshot.limit = 4
        return made

    monkeypatch.setattr(clip, "load_recipe", recipe)
    monkeypatch.setattr(clip, "SEEDS", (0,))
    arms = {"plain": None, "drip_2x": DRIP(rate=0.5, after=1), "last": DRIP(rate=0.3, after=1)}
    monkeypatch.setattr(clip, "ARMS", arms)
    monkeypatch.setattr(clip, "TOWERS", ("drip_2x",))
    monkeypatch.setattr("winnow.train.loop.save_training", lambda *args: None)  # drawn in test_train.py


def test_what_is_missing_is_trained_once(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results" / "clip.jsonl"
    wish = clip.Wish(epochs=1, steps=1)
    rows = clip.run(wish, results)
    tasks = [row.task for row in rows]
    assert tasks.count("train contrast") == 3 and tasks.count("train classify") == 2 and tasks.count("boundaries") == 2
    judged = next(row for row in rows if row.task == "boundaries")
    low, mid, high = judged.objects.boundaries["learned"]["boundary_f1"]
    assert low <= mid == judged.objects.boundary_f1 <= high
    assert set(judged.objects.boundaries) == {"learned", "untrained", "random", "even"}
    assert f"]({boundaries.PICTURE})" in boundaries.section(rows)
    shown = np.asarray(Image.open(io.BytesIO(boundaries.drawn(rows))))
    segments = judged.objects.segments[0]
    columns = 1 + 2 + 1  # the scene, two methods, random ones
    assert shown.shape[0] // boundaries.CELL == 4 and shown.shape[1] // boundaries.CELL == columns
    assert len(segments) == 9 and segments == sorted(segments), "runs along the raster"
    assert len(clip.run(wish, results)) == len(rows), "a second time nothing is trained"


def trained(method: str | None, seed: int, hits: list[bool]) -> record.Row:
    share = sum(hits) / len(hits)
    run = record.Training(
        recipe="clip_scenes", settings={"seed": seed}, epochs=6, steps=468, batch=64, runtime_s=1, samples_per_s=1,
        steps_per_s=1, loss=1, last=share, best=share, top5=0.9, tokens=None if method is None else [36, 9, 9, 9, 9],
        figures={"image_to_text_r1": 0.5, "text_to_image_r1": 0.4},
    )  # fmt: skip
    accuracy = record.Accuracy(value=share, low=share, high=share, hits=pack(hits))
    return record.Row(
        task="train contrast", model="open_clip:ViT-B-32", weights=None, method=method, seed=seed, train=run,
        data=record.Data(name="scenes", split="val", n=len(hits)), accuracy=accuracy, counts=run.tokens,
    )  # fmt: skip


def test_arms_beside_the_plain_one_and_towers_with_their_zero_shot():
    hits = [True] * 30 + [False] * 10
    less = [True] * 20 + [False] * 20
    drip = "DRIP(rate=0.25, after=1)"
    rows = [trained(method, seed, one) for seed in (0, 1) for method, one in ((None, hits), (drip, less))]
    (arms,) = page.contrasts(rows)
    text = page.table(arms)
    plain, ours = (line for line in text.splitlines() if line.startswith(("| plain", "| `DRIP")))
    assert "75.0 ± 0.0 (61.6 to 88.4)" in plain and "50.0 ± 0.0 (34.5 to 65.5)" in ours and "-25.0 (" in ours
    assert "| 36 9 9 9 |" in ours and page.macs_of(arms[1]) < page.macs_of(arms[0])
    tuned = rows[2].model_copy(update={"task": "train classify", "method": drip, "seed": 0})
    settings = {"model.weights": "x.safetensors", "freeze": "probe"}
    tuned = tuned.model_copy(update={"train": tuned.train.model_copy(update={"settings": settings})})
    line = next(line for line in page._towers([*rows, tuned]).splitlines() if line.startswith("| `DRIP"))
    assert "| 50.0 % | yes | 6 | 75.0 %" in line
    assert page.figure(rows) is not None and page.figure(rows[:1]) is None
    assert page.spread([], 10) == "–"


def test_boundaries_are_counted_training_by_training():
    def row(seed: int, learned: float) -> record.Row:
        kinds = {"learned": learned, "untrained": 0.3, "random": 0.2, "even": 0.0}
        each = {
            kind: dict.fromkeys(boundaries.FOLLOWED, (value - 0.05, value, value + 0.05))
            for kind, value in kinds.items()
        }
        objects = record.Objects(kept=1, purity=1, boundary_f1=learned, boundaries=each)
        return record.Row(task="boundaries", model="m", weights=None, method="DRIP()", seed=seed, objects=objects)

    text = boundaries.section([row(0, 0.1), row(0, 0.5), row(1, 0.36)])
    assert "| `DRIP()` | 2 | 0.430 (0.310 to 0.550) | 0.300 (0.250 to 0.350) |" in text, "a seed's last row counts"
    assert "| `DRIP()` | 1 of 2 | 2 of 2 | 2 of 2 |" in text, "above untrained, random, even ones"
    assert boundaries.PICTURE not in text and boundaries.drawn([]) is None and boundaries.section([]) == ""


def test_document_001s_table_names_recipes_where_nobody_measured(monkeypatch):
    monkeypatch.setattr(document, "TABLE", document.TABLE[:4])
    pair = document.macs_of("open_clip:ViT-B-32")
    assert pair.text == pytest.approx(2.98e9, rel=0.01) and pair.ideal("DRIP()") == pytest.approx(1.72, abs=0.01)
    text = document.document_table([])
    ten = next(line for line in text.splitlines() if line.startswith("| 10x comp"))
    assert "| 21.70 % | 44.30 % | 15.0 | 0.365 | 1.315 | 1.72x | `clip_b32_drip10` |" in ten
    time = record.Latency(batch=8, plain_ms=150, reduced_ms=100, ratio=1.5, low=1.4, high=1.6, null=1, null_low=0.9,
                          null_high=1.1, pairs=9)  # fmt: skip
    step = record.Step(latency=time, tokens=[49, 7], plain_mib=10, mib=5, parts_ms={"image tower": (75, 25)})
    row = record.Row(task="step contrast", model="open_clip:ViT-B-32", weights=None, method="DRIP()", step=step)
    text = document.document_table([row])
    assert "| 1.50 (1.40 to 1.60) | 0.87 | 0.50 |" in text and "1 of 1 timed rows reach 0.85" in text
    assert "| `clip_b32_drip10` | 50% -> 25% | 50% -> 75% | 49 -> 7 |" in document.parts_table([row])
    slow = replace_step(row, ratio=1.2)
    assert "short of it: `clip_b32_drip10` 0.70" in document.document_table([slow])


def replace_step(row: record.Row, **words) -> record.Row:
    step = row.step.model_copy(update={"latency": row.step.latency.model_copy(update=words)})
    return row.model_copy(update={"step": step})


def test_a_pairs_step_is_measured_and_leaves_nothing_behind():
    from winnow._clip import load_clip

    model = load_clip("open_clip:ViT-B-32", options=SMALL).model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    texts = torch.randint(1, 99, (4, 48))
    with winnow.reduced(model, DRIP(rate=0.3, after=1)):
        step = measure_pair_step(model, torch.randn(4, 3, 96, 96), texts)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert set(step.parts_ms) == {"image tower", "text tower", "optimiser"} and step.tokens[-1] < step.tokens[0]
    image = winnow.measure.closed_form.plain_macs(model)
    assert step.plain_macs > image and 1 < step.promised < image / (step.macs - (step.plain_macs - image))


def test_a_pairs_step_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("winnow._clip._configured", lambda *_: SMALL)  # no small CLIP has a name
    monkeypatch.setitem(SMALL["vision_cfg"], "layers", 3)
    rows = tmp_path / "rows.jsonl"
    words = [
        "winnow",
        "measure",
        "open_clip:ViT-B-32",
        "--pair",
        "--batch",
        "2",
        "--results",
        str(rows),
        "-m",
        "DRIP()",
    ]
    for more, code in (([], 2), (["--step"], 0)):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as done:
            main()
        said = capsys.readouterr()
        assert done.value.code == code and (
            "of the step: image tower" in said.out if more else "add --step" in said.err
        )
    assert set(document.step_rows(record.read(rows))) == {"clip_b32_drip10"}
