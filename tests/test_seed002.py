"""Document 002: the preset that keeps its faults, the experiment, and the page made of its rows."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import reference
from torch import nn

import winnow
from winnow import Below, NormThreshold, view
from winnow.checks import check_method
from winnow.measure import count_macs, fvcore_macs, record
from winnow.recipes import seed002
from winnow.recipes.seed002 import ARMS, Toy, Wish, ask, build

ROOT = Path(__file__).resolve().parents[1]
TINY = {"train": 24, "test": 20, "tokens": 24, "width": 64, "heads": 2, "hidden": 64, "batch": 8, "threshold": 4.6,
        "pairs": 9}  # fmt: skip


# ---- the preset


def test_spelling():
    preset = NormThreshold.seed002()
    assert repr(preset) == "NormThreshold.seed002()" == repr(NormThreshold.seed002(threshold=13.0))
    assert repr(NormThreshold.seed002(3.3)) == "NormThreshold.seed002(threshold=3.3)"
    for text in ("NormThreshold.seed002()", "NormThreshold.seed002", "NormThreshold.seed002(13)"):
        assert winnow.parse(text) == preset and hash(winnow.parse(text)) == hash(preset)
    assert winnow.parse(repr(NormThreshold.seed002(3.3))) == NormThreshold.seed002(3.3) != preset
    assert pickle.loads(pickle.dumps(preset)) == preset == copy.deepcopy(preset)
    plain = NormThreshold(below=Below(13.0), before=(0, 1))
    assert preset != plain and plain.known_failures == {}  # the faults are behind that name only


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("NormThreshold.seed003()", "has no preset 'seed003'; presets: seed002"),
        ("ToMe.seed002()", "ToMe has no preset 'seed002'; presets: none"),
        ("NormThreshold.seed002(below=3)", "has no field 'below'; fields: threshold"),
        ("NormThreshold.seed002(1, 2)", "takes at most 1 values"),
        ("NormThreshold.seed002(True)", "a number from 0"),
        ("NormThreshold.build.seed002()", "only plain names"),
        ("NormThreshold.__init__", "has no preset"),
        ("NormThreshold(below=Published(13.0))", "unknown name 'Published'"),
    ],
)
def test_spellings_refused(text, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        winnow.parse(text)


def test_contract():
    results = {result.check: result for result in check_method(NormThreshold.seed002(), all=True)}
    known = {name for name, result in results.items() if result.outcome == "known"}
    assert known == set(NormThreshold.seed002().known_failures)
    assert {result.outcome for result in results.values()} == {"ok", "skipped", "known"}


@pytest.mark.parametrize("check", ["ledger_is_sound", "survivors_in_raster_order"])
def test_more_faults_show_where_the_limit_leaves_some(check):
    (result,) = check_method(NormThreshold.seed002(5.6), only=check, all=True)
    assert result.outcome == "failed"


def test_saved_and_loaded(tmp_path):
    model = build(ARMS[1], Wish(**TINY)).eval()
    assert type(winnow.reducer_of(model.encoder).method) is NormThreshold
    vit = small_vit()
    x = torch.randn(2, 3, 32, 32)
    winnow.save(winnow.reduce(copy.deepcopy(vit), NormThreshold.seed002(5.0)), tmp_path / "reducer.safetensors")
    loaded = winnow.load(vit, tmp_path / "reducer.safetensors")
    assert repr(winnow.reducer_of(loaded).method) == "NormThreshold.seed002(threshold=5.0)"
    assert loaded(x).isfinite().all()


def small_vit():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3).eval()


# ---- against the reference, and against loops


def toy(width: int, hidden: int, heads: int, threshold: float, state: dict | None = None) -> Toy:
    model = Toy(Wish(width=width, heads=heads, hidden=hidden), batch_first=False)
    if state is not None:
        model.load_state_dict({k.replace("0.", "encoder.", 1) if k[0] == "0" else k[2:]: v for k, v in state.items()})
    winnow.reduce(model.encoder, NormThreshold.seed002(threshold), blocks="layers")
    return model.eval()


def test_reference_outputs():
    case = reference("ece1512")["small"]
    model = toy(32, 64, 4, case["threshold"], case["state"])
    with torch.no_grad(), winnow.watch(model.encoder) as run:
        out = model.encoder(case["x"])
        logits = model.fc(out)
    torch.testing.assert_close(out, case["encoder_out"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(logits, case["logits"], atol=1e-4, rtol=1e-5)
    kept = [f"Layer {i}: Active tokens per batch = {(run.ledgers[i - 1].size() > 0).sum(1).tolist()}" for i in (0, 1)]
    assert case["log"].splitlines()[:2] == kept
    assert torch.equal(run.ledgers[-1].owner >= 0, case["keep"])
    with torch.no_grad():
        torch.testing.assert_close(model(case["x"]), case["logits"].mean(1), atol=1e-4, rtol=1e-5)


def published(layers: nn.ModuleList, x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, list[list[int]]]:
    """Document 002's encoder in loops: [B, n, C], and how many tokens each sample keeps before each layer."""
    held, kept = [[True] * x.shape[1] for _ in x], []
    for layer in layers:
        chosen = [
            [i for i in range(x.shape[1]) if held[b][i] and x[b, i].square().sum().sqrt().item() > threshold]
            for b in range(x.shape[0])
        ]
        kept.append([len(one) for one in chosen])
        width = max(kept[-1])
        packed = x.new_zeros(x.shape[0], width, x.shape[2])
        for b, one in enumerate(chosen):
            for place, i in enumerate(one):
                packed[b, place] = x[b, i]
        held = [[place < len(one) for place in range(width)] for one in chosen]
        x = layer(packed)
    return x, kept


@pytest.mark.parametrize("threshold", [0.0, 5.4, 5.7])
def test_loops(threshold):
    """Gains below 1 make the second threshold act, one sample keeps nothing, and gradients are the same too."""
    model = toy(32, 48, 4, threshold)
    bare = copy.deepcopy(model)
    winnow.restore(bare.encoder)
    for one in (model, bare):
        torch.manual_seed(1)
        for layer in one.encoder.layers:
            nn.init.normal_(layer.norm2.weight, 1.0, 0.3)
    x = torch.randn(4, 9, 32)
    x[2] *= 0.01
    out, counts = ask(model, x)
    wanted, kept = published(bare.encoder.layers, x, threshold)
    assert counts[:, :2].T.tolist() == kept
    if threshold > 5:
        assert kept[0][2] == 0 and sum(kept[1]) < sum(kept[0])
    torch.testing.assert_close(out, bare.fc(wanted).mean(1), atol=1e-5, rtol=1e-5)
    model(x).square().sum().backward()
    bare.fc(wanted).mean(1).square().sum().backward()
    for ours, theirs in zip(model.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_a_batch_that_loses_everything():
    model = toy(32, 48, 4, 100.0)
    out, counts = ask(model, torch.randn(2, 9, 32))
    assert counts.eq(0).all() and out.isnan().all()  # as in the published code


def test_only_the_preset_fits_a_host_that_cannot_mask():
    model = Toy(Wish(width=32, heads=4, hidden=48), batch_first=False)
    with pytest.raises(ValueError, match="skips padding"):
        winnow.reduce(model.encoder, NormThreshold(), blocks="layers")
    with pytest.raises(ValueError, match="does not skip padding"):
        winnow.reduce(model.encoder, NormThreshold.seed002(), "masked", blocks="layers")
    assert not hasattr(model.encoder, "reducer")


# ---- what is wrong with it


def changed(corrected: bool, sample: int, token: int) -> torch.Tensor:
    """[B, N] how much each token's output of the baseline moves when one input token does."""
    model = build(seed002.Arm(corrected, pruned=False), Wish(**TINY)).eval()
    x = torch.rand(3, 5, 64)
    y = x.clone()
    y[sample, token] += 1.0
    with torch.no_grad():
        return (model.encoder(y) - model.encoder(x)).abs().amax(-1)


def test_attention_runs_across_samples_as_published():
    moved = changed(corrected=False, sample=0, token=3)
    assert moved[:, 3].min() > 1e-3 and moved[:, [0, 1, 2, 4]].max() == 0
    moved = changed(corrected=True, sample=0, token=3)
    assert moved[0].min() > 1e-3 and moved[1:].max() == 0


def test_layer_1_prunes_nothing():
    wish = Wish(width=512, heads=8, hidden=64, tokens=20, threshold=13.0)
    for arm in (ARMS[1], ARMS[3]):
        model, x = build(arm, wish).eval(), torch.rand(4, 20, 512)
        kept = ask(model, x)[1]
        assert kept[:, 0].min() > 0 and kept[:, 0].max() < 20
        assert torch.equal(kept[:, 0], kept[:, 1]) and torch.equal(kept[:, 1], kept[:, 2])
        with torch.no_grad():
            norms = winnow.restore(model.encoder).layers[0](x).norm(dim=-1)
        torch.testing.assert_close(norms, torch.full_like(norms, 512**0.5), atol=0.01, rtol=0)


def test_corrected_equals_each_sample_alone():
    model = build(ARMS[3], Wish(**TINY)).eval()
    x = torch.rand(5, 24, 64)
    bare = build(ARMS[2], Wish(**TINY)).eval()
    with torch.no_grad():
        together = model(x)
        for i, one in enumerate(x):
            kept = one[one.norm(dim=-1) > 4.6]
            torch.testing.assert_close(together[i : i + 1], bare(kept[None]), atol=1e-5, rtol=1e-5)


# ---- costs


def test_fvcore_figures_of_the_document():
    pytest.importorskip("fvcore")
    wish, found = Wish(), []
    for arm in ARMS[:2]:
        value, left_out = fvcore_macs(build(arm, wish), seed002.probe(wish))
        assert "aten::scaled_dot_product_attention" in left_out
        found.append(f"{value * wish.batch / 1e9:.3f}")
    assert found == ["12.908", "8.874"]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_macs_equal_the_closed_form(arm):
    wish = replace(Wish(), **TINY)
    model = build(arm, wish).eval()
    macs = seed002.costs(arm, model, wish)
    assert macs.counted == count_macs(model, seed002.probe(wish)) == pytest.approx(macs.closed)
    assert macs.mean <= macs.max <= macs.counted * 1.0001
    assert (macs.mean < macs.max) == arm.pruned


def test_kept_tokens_at_seed_0():
    kept = (seed002.probe(Wish()).norm(dim=-1) > 13).sum(1)
    assert kept.max() == 88 and kept.double().mean() == 77.8125


# ---- the experiment and its page


@pytest.fixture
def run(run, monkeypatch):
    """The command on a tiny experiment."""
    monkeypatch.setattr(seed002, "Wish", functools.partial(Wish, **TINY))
    return run


def test_report_seed002(run, tmp_path):
    code, out, err = run("report", "seed002", "--epochs", "1", "--steps", "2", "--out", "docs", "--json")
    assert code == 0, err
    assert json.loads(out) == ["docs/seed002.md"]
    rows = record.read(tmp_path / "results" / "seed002.jsonl")
    ours = [row for row in rows if row.macs.convention == "mac"]
    assert [(row.model[-5:], row.method) for row in ours] == [
        ("False", None), ("False", "NormThreshold.seed002(threshold=4.6)"),
        ("=True", None), ("=True", "NormThreshold(below=Below(4.6), before=(0, 1))"),
    ]  # fmt: skip
    assert {row.task for row in rows} == {"seed002, 1 epochs of 2 steps"}
    assert all(row.accuracy.low <= row.accuracy.value <= row.accuracy.high and row.memory_mib for row in ours)
    assert [row.accuracy.vs_plain is not None for row in ours] == [False, True, False, True]
    text = (tmp_path / "docs" / "seed002.md").read_text()
    assert "1 epoch of 2 steps" in text and "31.2 %" in text and "theirs" in text
    assert not list((tmp_path / "results").glob(".seed002*"))
    # again: nothing is trained, the page is the same
    before = (tmp_path / "results" / "seed002.jsonl").read_bytes()
    code, _, err = run("report", "seed002", "--epochs", "1", "--steps", "2", "--out", "docs")
    assert (code, err) == (0, "")
    assert (tmp_path / "results" / "seed002.jsonl").read_bytes() == before
    assert (tmp_path / "docs" / "seed002.md").read_text() == text
    # the rows are rows like any other
    assert "NormThreshold.seed002(threshold=4.6)" in view.markdown(rows)


def test_report_refuses(run, tmp_path):
    assert run("report", "seed002", "--epochs", "0")[0] == 2
    code, _, err = run("report", "rows.jsonl", "--epochs", "1")
    assert code == 2 and "belong to an experiment that is run: adaptive, " in err
    with pytest.raises(ValueError, match="no row of the arm baseline, as published"):
        seed002.page([], torch.zeros(3).numpy())


def test_training_goes_on_after_an_interruption(tmp_path):
    wish, said = Wish(**TINY, epochs=2, steps=2), []

    def interrupt(words: str) -> None:
        said.append(words)
        if len(said) == 2:  # the second epoch is done, but not saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        seed002.train(build(ARMS[1], wish), wish, tmp_path / "a.pt", interrupt)
    resumed, whole = build(ARMS[1], wish), build(ARMS[1], wish)
    seed002.train(resumed, wish, tmp_path / "a.pt", said.append)
    seed002.train(whole, wish, tmp_path / "b.pt", lambda words: None)
    assert [words[:16] for words in said] == ["  epoch 1 of 2: ", "  epoch 2 of 2: ", "  epoch 2 of 2: "]
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_page_is_that_of_the_rows():
    results, made = ROOT / "results" / "seed002.jsonl", ROOT / "docs" / "seed002.md"
    if not (results.is_file() and made.is_file()):
        pytest.skip("the experiment was not run here")
    rows = record.read(results)
    command = rows[-1].command
    text = seed002.page([row for row in rows if row.task == rows[-1].task], seed002.coins(Wish()))
    assert made.read_text() == text, f"run: {command}"
