"""Our methods against recorded outputs of the reference implementations; compared through the ledger."""

from __future__ import annotations

import pytest
import torch
from conftest import reference
from timm.models.vision_transformer import VisionTransformer

import winnow
from winnow import EViT, Keep, ToMe
from winnow.methods.tome import ToMeReducer
from winnow.reducer import Signals
from winnow.tokens import Ledger, Tokens


def vit(case: dict, **words) -> VisionTransformer:
    words = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 10, **words}
    model = VisionTransformer(**words)
    model.load_state_dict(case["state"])
    return model.eval()


def test_tome_schedule():
    for key, wanted in reference("tome")["parse_r"].items():
        depth, r = eval(key)  # our own file's keys, e.g. "(12, (16, -1.0))"
        r, inflect = r if isinstance(r, tuple) else (r, 0.0)
        method = ToMe(r=tuple(r) if isinstance(r, list) else r, inflect=inflect)
        assert list(method.amounts(depth)) == wanted, key


@pytest.mark.parametrize(
    ("name", "prefix"), [("bsm_n17_ct1_dt0_r5", 1), ("bsm_n18_ct1_dt1_r4", 2), ("bsm_n16_ct0_dt0_r6", 0)]
)
def test_tome_matching(name, prefix):
    case = reference("tome")[name]
    x, size, metric = (case[key][:, prefix:] for key in ("x", "size", "metric"))
    b, n, _ = x.shape
    # sizes that are not 1 need a ledger that says so: token i holds size[i] patches
    counts = size.squeeze(-1).round().long()
    width = int(counts.sum(1).max())
    owner = torch.full((b, width), -1)
    for image in range(b):
        held = torch.arange(n).repeat_interleave(counts[image])
        owner[image, : len(held)] = held
    reducer = ToMeReducer(ToMe(r=case["r"]), 1, n, prefix)
    out = reducer(Tokens(x, Ledger(owner, n)), Signals(k=metric[:, None]), 0)
    emitted = torch.take_along_dim(out.x, out.order[..., None], 1)
    protected = {0: [], 1: [0], 2: [0, 1]}[prefix]
    rest = [i for i in range(case["wavg_x"].shape[1]) if i not in protected]
    if torch.equal(counts[..., None].float(), size):
        torch.testing.assert_close(emitted, case["wavg_x"][:, rest], atol=1e-5, rtol=1e-5)
    fresh = reducer(Tokens(x, Ledger.start(b, n)), Signals(k=metric[:, None]), 0)
    emitted = torch.take_along_dim(fresh.x, fresh.order[..., None], 1)
    torch.testing.assert_close(emitted, case["wavg_x_none"][:, rest], atol=1e-5, rtol=1e-5)
    holds = torch.nn.functional.one_hot(fresh.ledger.owner, fresh.n).transpose(1, 2)
    holds = torch.take_along_dim(holds, fresh.order[..., None], 1)
    assert torch.equal(holds, case["source"][:, rest][:, :, prefix:].long())


@pytest.mark.parametrize("name", ["vit_r8", "vit_gap"])
def test_tome_whole_model(name):
    case = reference("tome")[name]
    words = case["kw"] if isinstance(case["kw"], dict) else {}
    model = vit(case, **words)
    with torch.no_grad():
        torch.testing.assert_close(model(case["x"]), case["logits_unpatched"], atol=1e-4, rtol=1e-4)
        winnow.reduce(model, ToMe(r=case["r"], proportional=case["prop_attn"]))
        with winnow.watch(model) as run:
            features = model.forward_features(case["x"])
        prefix = model.num_prefix_tokens
        if prefix:
            logits = model.forward_head(features)
        else:  # the reference averages merged tokens unweighted, we weight them by size
            logits = model.head(model.fc_norm(features.mean(1)))
    assert [n + prefix for n in run.counts[1:]] == case["tokens"]
    torch.testing.assert_close(logits, case["logits"], atol=1e-4, rtol=1e-4)
    ours = run.ledger.size().sort(1).values
    theirs = case["size"].squeeze(-1)[:, prefix:].long().sort(1).values
    assert torch.equal(ours, theirs)


def test_evit_whole_model():
    case = reference("evit")["drop"]
    sites = tuple(i for i, rate in enumerate(case["kw"]["keep_rate"]) if rate < 1)
    model = vit(case, depth=6, mlp_ratio=2)
    for keep, suffix in ((0.7, ""), (0.9, "_keep0_9"), (1.0, "_keep1")):
        method = EViT(keep=Keep(keep), layers=sites, fuse=case["kw"]["fuse_token"])
        with torch.no_grad(), winnow.reduced(model, method), winnow.watch(model) as run:
            logits = model(case["x"])
            assert [n + 1 for n in run.counts[1:]] == case["tokens" + suffix]
        torch.testing.assert_close(logits, case["logits" + suffix], atol=1e-4, rtol=1e-4)
        if keep == 0.7:
            kept = run.ledgers[sites[0]].owner >= 0
            assert torch.equal(kept.nonzero()[:, 1].view(2, -1), case["idx"][0].sort(1).values)


def test_norms_of_document_002():
    case = reference("ece1512")["small"]
    from winnow.parts.choose import above
    from winnow.parts.score import norm

    saliency = norm(case["x"])
    torch.testing.assert_close(saliency, case["saliency"], atol=1e-5, rtol=1e-5)
    keep = above(saliency, saliency.new_full((1, 1), case["threshold"]), None)
    assert torch.equal(keep, case["keep"])


@pytest.mark.parametrize("name", ["timm_0.5_False", "timm_0.5_True", "openclip_0.5"])
def test_random_keeps_what_patchdropout_would(name):
    """Given the same noise, our random baseline keeps the tokens timm's and open_clip's PatchDropout keep."""
    from winnow import Exactly, Random

    case = reference("patchdropout")[name]
    prefix = case["x"][:, :1]
    x = case["x"][:, 1:]
    reducer = Random(keep=Exactly(case["num_keep"]), at="input").build(1, 4, 1, x.shape[1], 1)
    noise = case["randn"] if name.startswith("openclip") else -case["randn"]  # timm keeps the lowest
    out = reducer(Tokens(x, Ledger.start(3, x.shape[1])), Signals(noise=noise), 0)
    for ours, theirs in zip(out.x, case["out"][:, 1:]):
        assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))
    assert torch.equal(case["out"][:, :1], prefix)


@pytest.mark.parametrize("name", ["pitome_n17_ct1_ratio0.75_m0.5_bsm0", "pitome_n16_ct0_ratio0.6_m0.75_bsm1"])
def test_pitome(name):
    from winnow import PiToMe

    case = reference("pitome")[name]
    prefix, early = int(case["class_token"]), case["use_bsm_pitome"]
    x, keys = case["x"][:, prefix:], case["metric"][:, prefix:]
    depth, layer = (2, 0) if early else (4, 2)
    margin = case["margin"] / (1 - layer / depth)
    reducer = PiToMe(keep=Keep(case["ratio"]), margin=margin).build(depth, 6, 1, x.shape[1], prefix)
    out = reducer(Tokens(x, Ledger.start(*x.shape[:2])), Signals(k=keys[:, None], watched=True), layer)
    torch.testing.assert_close(out.score, case["energy"], atol=1e-5, rtol=1e-5)
    theirs = case["merge_mean"][:, prefix:]
    for ours, wanted in zip(out.x, theirs):  # the paper emits tokens by energy, we in raster order
        distance = torch.cdist(ours, wanted)
        assert distance.amin(0).max() < 1e-5
        assert distance.amin(1).max() < 1e-5


def test_pitome_margins():
    margins = reference("pitome")["margins_deit12"]
    assert [0.75 * (1 - layer / 12) for layer in range(12)][: len(margins)] == pytest.approx(list(margins)[:12])


@pytest.mark.parametrize("name", ["timm_0.5_False", "timm_0.5_True", "openclip_0.5"])
def test_patch_dropout(name):
    from winnow import PatchDropout

    case = reference("patchdropout")[name]
    x = case["x"][:, 1:]
    reducer = PatchDropout(rate=case["prob"]).build(1, 4, 1, x.shape[1], 1).train()
    noise = case["randn"] if name.startswith("openclip") else -case["randn"]
    out = reducer(Tokens(x, Ledger.start(3, x.shape[1])), Signals(noise=noise), 0)
    assert out.n == case["num_keep"]
    for ours, theirs in zip(out.x, case["out"][:, 1:]):
        assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.tolist()))
    assert reducer.eval()(Tokens(x, Ledger.start(3, x.shape[1])), Signals(noise=noise), 0).n == x.shape[1]
