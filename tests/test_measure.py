"""The measuring tools against hand-computed counts, naive oracles and planted faults.

Published counts of the open_clip towers: the analytic formula N*3P^2*D + L*(12*T*D^2 + 2*T^2*D) + D*512.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from contextlib import nullcontext
from fractions import Fraction
from functools import partial
from math import comb, isclose
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import flop_registry

from winnow.measure import (
    accuracy_of,
    compare_latency,
    count_macs,
    fvcore_macs,
    latency,
    macs_by_module,
    mcnemar,
    pack,
    peak_memory,
    profile_model,
    record,
    share,
    unpack,
    verdict,
    wilson,
)
from winnow.measure._zero_cost import ZERO_COST
from winnow.measure.macs import FORMULAS
from winnow.measure.profile import table

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Lambda(nn.Module):
    def __init__(self, run, *parts):
        super().__init__()
        self.run, self.parts = run, nn.ModuleList(parts)

    def forward(self, *args, **kwargs):
        return self.run(*args, **kwargs)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


ENCODER_MACS = 2 * (7 * 4 * 32 * 32 + 2 * 7 * 7 * 32 + 2 * 7 * 32 * 64)

# ---- macs


def test_macs_of_an_mlp_by_hand():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2))
    assert count_macs(model, torch.randn(3, 5, 4)) == 5 * (4 * 8 + 8 * 2)
    assert macs_by_module(model, torch.randn(3, 5, 4)) == {"": 240, "0": 160, "3": 80}


@pytest.mark.parametrize("batch", [1, 3])
def test_macs_of_attention_see_through_the_fast_path(batch):
    model, x = encoder(), torch.randn(batch, 7, 32)
    assert count_macs(model, x) == count_macs(model.eval(), (x,)) == count_macs(model, {"src": x}) == ENCODER_MACS
    padded = {"src": x, "src_key_padding_mask": torch.zeros(batch, 7, dtype=torch.bool)}
    assert count_macs(model, padded) == ENCODER_MACS


def test_macs_of_convolutions_count_groups_and_strides():
    model = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(6, 6, 3, padding=1, groups=3))
    assert count_macs(model, torch.randn(2, 3, 16, 16)) == 16 * 6 * 3 * 16 + 16 * 6 * 2 * 9


@pytest.mark.parametrize(
    ("run", "macs"),
    [
        (lambda x: x @ x[0, 0], 5 * 4 * 3 / 3),
        (lambda x: x[0] @ x[0, 0], 5 * 4 / 3),
        (lambda x: x[0, 0] @ x[0, 0], 4 / 3),
        (lambda x: torch.cdist(x, x), 5 * 5 * 4),
        (lambda x: torch.cdist(x, x, p=1.0), 5 * 5 * 4),
        (lambda x: torch.einsum("bnc,bmc->bnm", x, x), 5 * 5 * 4),
        (lambda x: torch.zeros(5, 5).addmm_(x[0], x[0].T), 5 * 5 * 4 / 3),
        (lambda x: torch.zeros(3, 5, 5).baddbmm_(x, x.mT), 5 * 5 * 4),
        (lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None]), 2 * 5 * 5 * 4),
        (lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.zeros(5, 5)), 2 * 5 * 5 * 4),
    ],
)
def test_macs_of_every_kind_of_product(run, macs):
    assert count_macs(Lambda(run), torch.randn(3, 5, 4)) == pytest.approx(macs)


def test_reducer_operators_cost_nothing():
    def run(x):
        score, index = x.norm(dim=-1).sort(1)
        x.topk(2, 1), torch.bucketize(x, torch.tensor([0.0, 1.0])), torch.unique(index), torch.unique(index, dim=0)
        spread = index[..., None].expand_as(x)
        x.scatter_add(1, spread, x), x.scatter_reduce(1, spread, x, "mean"), x.gather(1, spread), x.cumsum(1)
        torch.searchsorted(score, score), x[index > 0], x.nonzero(), F.one_hot(index, 9), index.flatten().bincount()
        torch.rand_like(x), torch.randperm(4), x.masked_fill_(x > 3, 0), x.clamp_(0, 1), x.quantile(0.3, 1)
        index & 3, index ^ 3, index << 1, index // 2, torch.where(x > 0), x.sum().item(), x.tolist()
        F.interpolate(x[:, None], size=(3, 3), mode="bicubic", antialias=True), F.rms_norm(x, (4,)), x.softmax(-1)
        F.scaled_dot_product_attention(x[:, :0, None], x[:, :0, None], x[:, :0, None])
        return x

    assert count_macs(Lambda(run), torch.rand(3, 5, 4)) == 0.0


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "eva02_tiny_patch14_224", "cait_xxs24_224", "resnet50"]
)
def test_timm_models_are_covered(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name)
    published = {"vit_tiny_patch16_224": 1.254e9, "resnet50": 4.089e9}  # 197 tokens; He et al. with the stride in 3x3
    found = count_macs(model, torch.randn(1, *model.default_cfg["input_size"]))
    assert found == pytest.approx(published.get(name, found), rel=1e-3)


def test_parameters_passed_to_modules_are_no_obstacle():
    inner = nn.MultiheadAttention(8, 2, batch_first=True)
    query = nn.Parameter(torch.randn(1, 1, 8))
    model = Lambda(lambda x: inner(query.expand(len(x), -1, -1), x, x), inner)
    assert count_macs(model, torch.randn(2, 5, 8)) == 8 * 8 * (1 + 5 + 5 + 1) + 2 * 5 * 8


def test_unknown_operator_is_an_error_until_allowed():
    @torch.library.custom_op("winnow_test::mystery", mutates_args=())
    def mystery(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    model = Lambda(lambda x: mystery(mystery(x)) @ x.mT).train()
    with pytest.raises(ValueError, match=r'winnow_test::mystery \(2 times\).*free=\{"winnow_test::mystery"\}'):
        count_macs(model, torch.randn(2, 5, 4))
    assert model.training
    assert hooks_of(model) == 0
    assert count_macs(model, torch.randn(2, 5, 4), free={"winnow_test::mystery"}) == 100
    assert count_macs(model, torch.randn(2, 5, 4), free="winnow_test::mystery") == 100
    with pytest.raises(ValueError, match=r"aten::(mkldnn_rnn_layer|lstm)"):
        count_macs(nn.LSTM(4, 4), torch.randn(2, 5, 4))


def test_no_product_is_on_the_zero_cost_list():
    counted = {str(packet).removeprefix("aten.") for packet in [*flop_registry, *FORMULAS]}
    assert not counted & ZERO_COST
    assert not [name for name in ZERO_COST if re.search(r"mm$|mm_|bmm|matmul|conv|attention|rnn|lstm", name)]


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("count", [count_macs, macs_by_module, fvcore_macs])
def test_everything_is_put_back_even_after_an_error(on, count):
    pytest.importorskip("fvcore")
    before = torch.backends.mha.get_fastpath_enabled()

    def broken(x):
        raise RuntimeError("broken")

    model = Lambda(broken, nn.Linear(2, 2), nn.Dropout()).train()
    model.parts[0].eval()
    try:
        torch.backends.mha.set_fastpath_enabled(on)
        with pytest.raises(RuntimeError, match="broken"):
            count(model, torch.randn(1, 2))
        assert torch.backends.mha.get_fastpath_enabled() is on
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert hooks_of(model) == 0


@pytest.mark.parametrize("inputs", [(), {}, ("text",), torch.tensor(1.0), torch.zeros(0, 3)])
def test_inputs_without_images_are_refused(inputs):
    with pytest.raises(TypeError, match="first tensor"):
        count_macs(nn.Identity(), inputs)


@pytest.mark.parametrize(("name", "true", "fvcore"), [("ViT-B-32", 4.409, 2.952), ("ViT-B-16", 17.563, 11.290)])
def test_open_clip_towers(name, true, fvcore):
    open_clip = pytest.importorskip("open_clip")
    pytest.importorskip("fvcore")
    visual = open_clip.create_model(name).visual
    assert count_macs(visual, torch.randn(1, 3, 224, 224)) / 1e9 == pytest.approx(true, abs=6e-4)
    macs, left_out = fvcore_macs(visual, torch.randn(1, 3, 224, 224))
    assert macs / 1e9 == pytest.approx(fvcore, abs=6e-4)
    assert left_out["aten::_native_multi_head_attention"] == 12


def test_fvcore_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "fvcore.nn", None)
    with pytest.raises(ImportError, match=r"pip install winnow-vision\[seeds\]"):
        fvcore_macs(nn.Identity(), torch.randn(1, 2))


# ---- latency


class Clock:
    """Stands in for `seconds`: a run returns its own seconds, the machine drifts by `drift` per call."""

    def __init__(self, drift=0.0, spread=0.0):
        self.calls, self.drift, self.noise, self.spread = 0, drift, np.random.default_rng(1), spread

    def __call__(self, run, device):
        self.calls += 1
        return run() * (1 + self.drift * self.calls) * (1 + self.spread * self.noise.standard_normal())


def test_latency_finds_the_ratio_under_drift(monkeypatch):
    monkeypatch.setattr(latency, "seconds", Clock(drift=0.01, spread=0.005))
    row = compare_latency(lambda: 0.006, lambda: 0.004, batch=8, pairs=21, reducer_seconds=0.0001)
    assert row.low <= 1.5 <= row.high
    assert row.null_low <= 1 <= row.null_high
    assert row.high - row.low < 0.1
    assert (row.batch, row.pairs, row.threads) == (8, 21, torch.get_num_threads())
    assert row.reducer_share == pytest.approx(0.0001 / (row.reduced_ms / 1e3))
    assert verdict(row).endswith(f"x faster ({row.low:.2f}-{row.high:.2f})")


def test_latency_order_is_balanced(monkeypatch):
    seen = []
    monkeypatch.setattr(latency, "seconds", lambda run, device: seen.append(run()) or 1.0)
    compare_latency(lambda: "p", lambda: "r", batch=1, pairs=12, warmup=0)
    rounds = ["".join(seen[i : i + 4]) for i in range(0, 48, 4)]
    assert rounds == ["prpp", "rppp", "pppr", "pprp"] * 3


def test_latency_of_real_runs():
    small, large = torch.randn(64, 64), torch.randn(512, 512)
    row = compare_latency(lambda: large @ large, lambda: small @ small, batch=1, pairs=9)
    assert row.low > 1
    assert "faster" in verdict(row)
    with pytest.raises(ValueError, match="at least 9"):
        compare_latency(lambda: 0, lambda: 0, batch=1, pairs=8)


@pytest.mark.parametrize(
    ("ratio", "null", "text"),
    [
        ((1.42, 1.38, 1.47), (1.0, 0.99, 1.01), "1.42x faster (1.38-1.47)"),
        ((1.0, 0.97, 1.04), (1.0, 0.99, 1.01), "no measurable difference (0.97-1.04)"),
        ((0.8, 0.78, 0.82), (1.0, 0.99, 1.01), "1.25x slower (1.22-1.28)"),
        ((1.02, 1.001, 1.04), (1.0, 0.99, 1.01), "1.02x faster (1.001-1.040)"),
        (
            (1.42, 1.38, 1.47),
            (1.05, 1.02, 1.08),
            "1.42x faster (1.38-1.47); noisy: plain against itself 1.050 (1.02-1.08)",
        ),
    ],
)
def test_verdict_says_what_the_interval_allows(ratio, null, text):
    names = ["ratio", "low", "high", "null", "null_low", "null_high"]
    row = record.Latency(batch=1, plain_ms=1, reduced_ms=1, pairs=9, **dict(zip(names, [*ratio, *null])))
    assert verdict(row) == text


def test_median_interval_covers_about_as_often_as_it_says():
    noise = np.random.default_rng(0)
    spans = [latency.median_interval(noise.lognormal(0, 0.1, 15), noise, draws=300)[1:] for _ in range(300)]
    assert 0.88 <= np.mean([low <= 1 <= high for low, high in spans]) <= 0.99


def test_share_counts_time_inside_the_module(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(latency, "perf_counter", lambda: now[0])

    def spend(seconds):
        def run(x):
            now[0] += seconds
            return x

        return run

    part = Lambda(spend(1.0))
    model = Lambda(lambda x: part(part(spend(6.0)(x))), part)
    assert share(model, part, lambda: model(torch.zeros(1))) == pytest.approx(2 / 8)
    assert share(model, model, lambda: model(torch.zeros(1))) == 1
    assert hooks_of(model) == 0
    with pytest.raises(ValueError, match="no part"):
        share(part, model, lambda: None)
    with pytest.raises(ValueError, match="never called"):
        share(model, part, lambda: None)


# ---- memory


def test_peak_memory_of_known_allocations():
    held = torch.zeros(2**20)

    def run():
        first = torch.empty(16 * 2**20 // 4)
        second = torch.empty(8 * 2**20 // 4)
        del first
        return second, torch.empty(4 * 2**20 // 4), held

    assert peak_memory(run) == pytest.approx(24, abs=0.01)
    assert peak_memory(lambda: held.view(-1)) == pytest.approx(0, abs=0.01)


@needs_gpu
def test_gpu_memory_latency_and_profile():
    big = torch.randn(2048, 2048, device="cuda")
    assert peak_memory(lambda: torch.empty(2**22, device="cuda"), "cuda") == pytest.approx(16, abs=0.1)
    row = compare_latency(lambda: big @ big, lambda: big[:64] @ big[:, :64], batch=1, device="cuda")
    assert row.ratio > 1
    assert row.threads is None
    model = encoder().cuda()
    found = profile_model(model, torch.randn(64, 7, 32, device="cuda"), {"first": model.layers[0]})
    assert found.layers["first"].ms > 0
    assert found.layers["first"].mib > 0
    assert found.device == "cuda"


# ---- accuracy


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_own_equation(pair):
    correct, n = pair
    low, high = wilson(correct, n)
    share = correct / n
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):  # |share - p| = z sqrt(p (1-p) / n) at both ends
        assert isclose(
            (share - bound) ** 2, 1.959963984540054**2 * bound * (1 - bound) / n, rel_tol=1e-6, abs_tol=1e-12
        )
    assert wilson(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_wilson_of_a_textbook_case():
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    for bad in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="needs 0 <="):
            wilson(*bad)


def naive_p(wins, losses):
    n, k = wins + losses, min(wins, losses)
    return min(Fraction(1), 2 * Fraction(sum(comb(n, i) for i in range(k + 1)), 2**n))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_mcnemar_equals_the_exact_sum(pairs):
    ours, theirs = map(np.array, zip(*pairs))
    wins, losses, p = mcnemar(ours, theirs)
    assert (wins, losses) == (sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))
    assert p == pytest.approx(float(naive_p(wins, losses)), rel=1e-9)
    assert mcnemar(theirs, ours) == (losses, wins, p)


def test_mcnemar_of_a_million_images():
    ours = np.arange(10**6) < 501_000
    wins, losses, p = mcnemar(ours, ~ours)
    assert (wins, losses) == (501_000, 499_000)
    assert p == pytest.approx(0.0456, abs=2e-4)  # normal approximation with continuity correction: z = 1.999
    assert mcnemar(ours, ours) == (0, 0, 1.0)
    assert mcnemar(np.ones(10**6, bool), np.zeros(10**6, bool))[2] == 0.0
    with pytest.raises(ValueError, match="same images"):
        mcnemar(ours, ours[:-1])
    with pytest.raises(TypeError, match="bool array"):
        mcnemar(ours.astype(int), ours)


@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_pack_round_trips(hits):
    text = pack(np.array(hits))
    assert unpack(text, len(hits)).tolist() == hits
    assert len(text) == 2 * -(-len(hits) // 8)
    with pytest.raises(ValueError, match="do not hold"):
        unpack(text, len(hits) + 8)


def test_unpack_refuses_hits_after_the_last_image():
    with pytest.raises(ValueError, match="do not hold"):
        unpack("ff", 7)


def test_accuracy_of_builds_the_row():
    hits, plain = torch.tensor([True, True, False, True]), torch.tensor([True, False, False, True])
    row = accuracy_of(hits, agrees=hits == plain, plain=plain, baseline=("Random(0.5)", ~hits))
    assert (row.value, row.agreement, unpack(row.hits, 4).tolist()) == (0.75, 0.75, hits.tolist())
    assert (row.low, row.high) == wilson(3, 4)
    assert row.vs_plain == record.Paired(against="plain", wins=1, losses=0, p=1.0)
    assert row.vs_baseline.p == pytest.approx(0.625)
    assert (row.vs_baseline.against, row.vs_baseline.wins, row.vs_baseline.losses) == ("Random(0.5)", 3, 1)


# ---- profile


def test_profile_names_the_bottleneck_and_leaves_nothing():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4096), nn.Linear(4096, 8))
    before, x = hooks_of(model), torch.randn(64, 64)
    plain = profile_model(model, x, {"small": model[0], "large": model[2]})
    assert plain.bottleneck == ("large", "aten::addmm")
    assert plain.layers["small"].macs == 64 * 64
    assert plain.layers["large"].macs == 64 * 4096
    assert plain.layers["large"].mib == pytest.approx(64 * 4096 * 4 / 2**20, rel=0.05)
    assert plain.total.mib == pytest.approx(plain.layers["large"].mib, rel=0.1)
    assert 0 < plain.layers["large"].ms < plain.total.ms
    assert plain.total.macs == plain.operators["aten::addmm"].macs == 64 * 64 + 64 * 4096 + 4096 * 8
    assert hooks_of(model) == before
    assert model.training


def test_profile_table_stands_plain_beside_reduced():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(4, 4, 1)), torch.randn(2, 4, 8)
    plain = profile_model(model, x, {"a": model[0], "b": model[1]}, repeats=1)
    reduced = profile_model(model[:1], x, {"a": model[0]}, repeats=1)
    rows = table(plain, reduced)
    assert [row["name"] for row in rows if row["kind"] != "operator"] == ["", "a", "b"]
    last = next(row for row in rows if row["name"] == "b")
    assert (last["plain_macs"], last["reduced_macs"], last["reduced_ms"]) == (4 * 4 * 8, None, None)
    convolution = next(row for row in rows if row["name"] == "aten::convolution")
    assert convolution["plain_macs"] == 128
    assert convolution["plain_ms"] > 0


def test_profile_refuses_foreign_and_silent_layers_and_cleans_up():
    unused = nn.Linear(2, 2)
    model = Lambda(lambda x: x + 1, unused)
    with pytest.raises(ValueError, match="'mine' is no part"):
        profile_model(model, torch.zeros(1, 2), {"mine": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="never calls 'unused'"):
        profile_model(model, torch.zeros(1, 2), {"unused": unused})
    calls = []

    def late(x):  # counted and warmed up, then broken inside the profiler
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("broken")
        return x

    model = Lambda(late)
    with pytest.raises(RuntimeError, match="broken"):
        profile_model(model, torch.zeros(1, 2), {"all": model})
    assert hooks_of(model) == 0


# ---- record


def row(**more) -> record.Row:
    return record.Row(task="classify", model="timm:vit", weights=None, method="ToMe(r=8)", **more)


@settings(max_examples=25)
@given(name=st.text(st.characters(exclude_categories=["Cs"]), max_size=20), value=st.floats(0, 1))
def test_rows_round_trip(tmp_path_factory, name, value):
    path = tmp_path_factory.mktemp("rows") / "deep" / "rows.jsonl"
    wanted = [
        row(command=name, data=record.Data(name=name, n=3), accuracy=record.Accuracy(value=value, low=0, high=1)),
        row(counts=[196, 188.5], macs=record.Macs(counted=1e9, left_out={name: 2})),
    ]
    for one in wanted:
        record.append(path, one)
    assert record.read(path) == wanted


def test_bad_rows_are_named_by_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    record.append(path, row())
    good = path.read_text()
    for line, message in [
        ('{"schema": 1, "ta', "2 is not JSON"),
        (json.dumps(json.loads(good) | {"schema": 2}), "2: row of schema 2, this Winnow reads up to 1"),
        (json.dumps(json.loads(good) | {"speed": 2}), "2 is not a result row: speed"),
        ("[]", "2: no `schema` number"),
    ]:
        path.write_text(good + line)
        with pytest.raises(ValueError, match=f"{path}:{message}"):
            record.read(path)


@pytest.mark.parametrize("left", [1, 11, -1])
def test_what_an_interrupted_write_left_goes_before_the_next_row(tmp_path, left):
    """A kill or a full disk leaves the beginning of a row; a row that lacks but its end of line is whole."""
    path, whole = tmp_path / "rows.jsonl", tmp_path / "whole.jsonl"
    record.append(path, row())
    record.append(whole, row(seed=1))
    rows, cut = path.read_text(), whole.read_text()[:left]
    for mend in (record.ready, partial(record.append, row=row(seed=7))):
        path.write_text(rows + cut)
        with nullcontext() if left < 0 else pytest.warns(UserWarning, match=re.escape(f"which is gone: {cut}")):
            mend(path)
        seeds = [0] + [1] * (left < 0) + [7] * (mend is not record.ready)
        assert [one.seed for one in record.read(path)] == seeds


def test_a_last_line_that_no_row_begins_with_is_left(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("a line\nanother without an end")
    record.append(path, row())
    assert path.read_text().startswith("a line\nanother without an end\n{")


def test_a_full_disk_leaves_the_rows_there_were(tmp_path):
    path = tmp_path / "rows.jsonl"
    record.append(path, row())
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limit[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            record.append(path, row())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before


def test_a_place_no_row_can_go_to_is_refused_and_left_as_it_was(tmp_path):
    record.ready(tmp_path / "new" / "rows.jsonl")
    assert not list((tmp_path / "new").iterdir())
    for wrong in (tmp_path, Path("/dev/zero")):  # of which there is no end
        for use in (record.ready, record.read, partial(record.append, row=row())):
            with pytest.raises(
                ValueError, match=r"no file that rows are kept in: give a path such as results/\w+\.jsonl"
            ):
                use(wrong)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        record.ready(tmp_path / "file" / "rows.jsonl")


def test_a_row_refuses_what_it_could_not_read_back():
    with pytest.raises(ValueError, match="finite"):
        record.Accuracy(value=float("nan"), low=0, high=1)
    with pytest.raises(ValueError, match="speed"):
        row(speed=2)


def test_a_training_step_is_measured_and_leaves_nothing_behind():
    timm = pytest.importorskip("timm")
    import winnow
    from winnow.measure.step import measure_step

    model = timm.create_model("vit_tiny_patch16_224", img_size=128, depth=4, num_classes=5)
    model.blocks[0].eval()  # flags come back one by one
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    with winnow.reduced(model, winnow.DRIP(rate=0.25, after=1)):
        step = measure_step(model, torch.randn(4, 3, 128, 128), classes=5)
        assert step.tokens == [64, 20, 20, 20, 20]  # ceil(64 * 0.25 * 1.25): padded to the capacity
        assert step.macs is not None and step.promised == pytest.approx(step.plain_macs / step.macs)
        assert 0 < step.mib < step.plain_mib
        assert not model.blocks[0].training and model.blocks[1].training
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert step.plain_macs == pytest.approx(count_macs(model.eval(), torch.randn(1, 3, 128, 128)), rel=0.02)
