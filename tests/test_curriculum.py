"""CurriculumDrop and hybrid_vit against document 003's numbers, its reference outputs, and plain loops over its formulas."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from conftest import reference
from timm.models.vision_transformer import VisionTransformer

import winnow
import winnow.backbones
from winnow import CurriculumDrop
from winnow.measure import count_macs
from winnow.measure.closed_form import closed_macs, plain_macs
from winnow.parts.gradient import MOMENTUM, ChannelGradients
from winnow.parts.schedule import SHAPES, bend, between, plateau, way
from winnow.reducer import Setting, Signals
from winnow.tokens import Ledger, Tokens

DOCUMENT = Setting(8, 384, 6, 1, True, (8, 8))


def small(**words) -> VisionTransformer:
    words = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5, **words}
    torch.manual_seed(1)
    model = VisionTransformer(**words)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model


def tokens_of(x):
    return Tokens(x, Ledger.start(*x.shape[:2]))


# ---- the schedule


def document_ratio(epoch, start, end, init, final, gamma):
    """Document 003's formula, by whole epochs."""
    if epoch < start:
        return init
    if epoch >= end:
        return final
    return init + ((epoch - start) / max(1, end - start)) ** gamma * (final - init)


@pytest.mark.parametrize("gamma", [0.5, 1, 1.5, 2, 3])
def test_ratio_is_the_documents_in_every_epoch(gamma):
    method = CurriculumDrop(gamma=gamma, start=0.05, epochs=200)
    for epoch in range(200):
        for step in (0, 390):  # the first and the last step of an epoch of 391
            share = method.share((epoch * 391 + step) / (200 * 391))
            assert method.dropped(share) == pytest.approx(document_ratio(epoch, 20, 160, 0.05, 0.35, gamma), abs=1e-15)


def test_larger_gamma_drops_less():
    means = [sum(CurriculumDrop(gamma=g).share(p / 100) for p in range(100)) for g in (0.5, 1, 1.5, 2, 3)]
    assert means == sorted(means, reverse=True)
    assert means[0] > 1.2 * means[-1]


@pytest.mark.parametrize(
    ("method", "epoch", "wanted"),
    [
        (CurriculumDrop.seed003_as_run(), 20, [64] * 9),
        (CurriculumDrop.seed003_as_run(), 90, [64, 52, 42, 34, 27, 22, 18, 14, 11]),
        (CurriculumDrop.seed003_as_run(), 160, [64, 32, 16, 8, 4, 2, 1, 1, 1]),
        (CurriculumDrop.seed003_as_run(), 200, [64, 32, 16, 8, 4, 2, 1, 1, 1]),
        (CurriculumDrop.seed003_as_coded(), 160, [64, 41, 26, 16, 10, 6, 3, 1, 1]),
        (CurriculumDrop.seed003_as_described(), 199, [64, *[41] * 8]),
    ],
)
def test_presets_execute_the_tokens_of_document_003(method, epoch, wanted):
    assert list(method.counts(DOCUMENT, epoch / 200)) == wanted
    assert winnow.parse(repr(method)) == method


def test_epoch_60_of_the_run():
    counts = CurriculumDrop.seed003_as_run().counts(DOCUMENT, 60 / 200)
    assert (counts[1], counts[-1]) == (59, 31)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    bends = [bend(shape, t / 1000, 2.0) for t in range(1001)]
    assert (bends[0], bends[-1]) == (0, 1)
    assert bends == sorted(bends)
    assert sum(bends) / 1001 == pytest.approx({"polynomial": 1 / 3}.get(shape, 0.5), abs=1e-3)


def test_way_and_plateaus():
    assert [way(p, 0.25, 0.75) for p in (0, 0.25, 0.5, 0.75, 1)] == [0, 0, 0.5, 1, 1]
    assert way(0.5, 0.5, 0.5) == 1 and way(0.49, 0.5, 0.5) == 0
    assert way(0.3 - 1e-12, 0.1, 0.8, 200) == 40 / 140, "a rounding error does not cost an epoch"
    assert way(0.3 - 1e-3, 0.1, 0.8, 200) == 39 / 140
    assert {plateau(s / 1000, 5) for s in range(1001)} == {0, 1, 2, 3, 4}
    assert between(0.1, 0.35, 1.0) == 0.35


def test_a_share_of_all_patches():
    """per="model": what the document's words say, spread over the blocks."""
    for blocks in ((0,), (1, 2, 5), "all"):
        counts = CurriculumDrop(blocks=blocks, per="model").counts(DOCUMENT)
        assert counts[-1] == int(64 * 0.65), blocks
        assert list(counts) == sorted(counts, reverse=True)
    assert CurriculumDrop(blocks=(1, 4), final=(0.5, 0.25)).counts(DOCUMENT) == (64, 64, 32, 32, 32, 24, 24, 24, 24)
    assert CurriculumDrop().counts(DOCUMENT) == (64, 64, 64, *[41] * 6)


# ---- the drop


def naive(model, x, ratios):
    """timm's blocks in plain loops: each image alone, whole attention matrices, survivors sorted by attention."""
    tokens = model._pos_embed(model.patch_embed(x))
    out = []
    for one in tokens:
        for block, ratio in zip(model.blocks, ratios):
            attn, n = block.attn, one.shape[0]
            q, k, v = attn.qkv(block.norm1(one)).view(n, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
            matrix = (q @ k.transpose(1, 2) * attn.scale).softmax(-1)
            added = attn.proj((matrix @ v).transpose(0, 1).flatten(1))
            saliency = sum(head[0, 1:] for head in matrix) / len(matrix)
            keep = max(1, int((n - 1) * (1 - ratio)))
            best = sorted(range(n - 1), key=lambda i: -float(saliency[i]))[:keep]
            index = [0, *(i + 1 for i in best)]
            one = one[index] + added[index]
            one = one + block.mlp(block.norm2(one))
        out.append(one[0])
    return model.head(model.norm(torch.stack(out)))


@pytest.mark.parametrize("progress", [0.05, 0.4, 0.6, 1.0])
def test_naive_oracle(progress):
    model, x = small().train(), torch.randn(3, 3, 32, 32)
    method = CurriculumDrop(blocks="all", final=0.5, gamma=1.2)
    t = min(1.0, max(0.0, (progress - 0.1) / 0.7))
    wanted = naive(model, x, [0.5 * t**1.2] * 4)
    winnow.reduce(model, method)
    winnow.reducer_of(model).progress = progress
    with winnow.watch(model) as run:
        logits = model(x)
    torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=1e-5)
    assert tuple(run.counts) == method.counts(Setting(4, 24, 3, 1, True, (4, 4)), progress)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("saliency", ["cls_attention", "received", "norm", "random", "entropy", "gradient"])
def test_evaluation_is_the_plain_model_at_no_cost(saliency, monkeypatch):
    model, x = small().eval(), torch.randn(2, 3, 32, 32)
    plain = model(x)
    winnow.reduce(model, CurriculumDrop(saliency=saliency))
    asked = []
    seat = winnow._reduce.seat_of(model)
    monkeypatch.setattr(type(seat), "_signals", lambda *args: asked.append(args) or Signals())
    assert torch.equal(model(x), plain)
    assert not asked, "no signal is made where nothing is dropped"
    model.train()
    winnow.reducer_of(model).progress = 0.05
    assert torch.equal(model(x), plain) and not asked
    winnow.reducer_of(model).progress = 0.5
    if saliency in ("norm", "gradient"):
        assert not torch.equal(model(x), plain) and asked


def test_at_eval():
    model, x = small().eval(), torch.randn(2, 3, 32, 32)
    with winnow.reduced(model, CurriculumDrop(at_eval=True, saliency="norm")), winnow.watch(model) as run:
        model(x)
    assert run.counts == [16, 16, 10, 10, 10]


def test_random_depends_on_step_seed_and_image_only():
    model, x = small().train(), torch.randn(3, 3, 32, 32)
    winnow.reduce(model, CurriculumDrop(saliency="random", blocks=(0,)))
    reducer = winnow.reducer_of(model)

    def kept(images, step, seed=0):
        reducer.step, reducer.seed = step, seed
        with winnow.watch(model) as run, torch.no_grad():
            model(images)
        return run.ledger.owner >= 0

    assert torch.equal(kept(x, 1), kept(x, 1))
    assert not torch.equal(kept(x, 1), kept(x, 2)) and not torch.equal(kept(x, 1), kept(x, 1, seed=1))
    assert torch.equal(kept(x, 7)[1:2], kept(x[1:2], 7))


def test_entropy_is_what_a_token_adds():
    model = CurriculumDrop(saliency="entropy", blocks=(0,), final=0.5).build(1, 6, 2, 4, 1).train()
    row = torch.tensor([[[0.9, 0.05, 0.02, 0.01], [0.02, 0.3, 0.5, 0.05]]])
    out = model(tokens_of(torch.randn(1, 4, 6)), Signals(cls_row=row, watched=True), 0)
    wanted = [sum(-a * math.log(a) for a in pair) / 2 for pair in zip(*row[0].tolist())]
    torch.testing.assert_close(out.score[0], torch.tensor(wanted))
    # token 0 has the most attention by mean, but a head that looks at nothing else learns little from it
    assert (out.ledger.owner[0] >= 0).tolist() == [False, True, True, False]


# ---- saliency by past gradients


def test_gradient_moments_are_running_means():
    gradients, draws = ChannelGradients(2, 4), [torch.randn(3, 5, 4) for _ in range(4)]
    mean, size, square = torch.zeros(4), torch.zeros(4), torch.zeros(4)
    for i, g in enumerate(draws):
        x = torch.randn(3, 5, 4, requires_grad=True)
        y = x * 1
        gradients.listen(y, 1)
        y.backward(g)
        flat, share = g.reshape(-1, 4), max(1 / (i + 1), 1 - MOMENTUM)
        mean = mean + share * (flat.mean(0) - mean)
        size = size + share * (flat.abs().mean(0) - size)
        square = square + share * (flat.square().mean(0) - square)
    for ours, wanted in ((gradients.mean, mean), (gradients.size, size), (gradients.square, square)):
        torch.testing.assert_close(ours[1], wanted)
        assert torch.equal(ours[0], torch.ones(4)), "the other site heard nothing"
    x = torch.randn(2, 3, 4)
    for kind, weight, features in (
        ("gradient", size, x.abs()), ("fisher", square, x.square()), ("gradient_snr", mean.abs() / square.sqrt(), x.abs())
    ):  # fmt: skip
        torch.testing.assert_close(gradients.score(kind, x, 1), (features * weight).sum(-1))


def test_an_infinite_gradient_teaches_nothing():
    gradients = ChannelGradients(1, 2)
    for g in (torch.ones(1, 1, 2) * 3, torch.tensor([[[float("inf"), 1.0]]]), torch.tensor([[[float("nan"), 1.0]]])):
        x = torch.zeros(1, 1, 2, requires_grad=True)
        y = x * 1
        gradients.listen(y, 0)
        y.backward(g)
    assert torch.equal(gradients.size, torch.full((1, 2), 3.0)) and gradients.visits.tolist() == [1.0]


@pytest.mark.parametrize("saliency", ["gradient", "fisher", "gradient_snr"])
def test_gradients_are_gathered_before_and_while_dropping(saliency):
    model, x = small().train(), torch.randn(2, 3, 32, 32)
    winnow.reduce(model, CurriculumDrop(saliency=saliency, blocks=(1, 2)))
    reducer = winnow.reducer_of(model)
    for visit, progress in enumerate((0.0, 0.5, 1.0), 1):
        reducer.progress = progress
        model(x).square().sum().backward()
        assert reducer.gradients.visits.tolist() == [visit, visit]
    before = reducer.gradients.square.clone()
    model.eval()(x).sum().backward()
    assert torch.equal(before, reducer.gradients.square), "evaluation is not listened to"
    winnow.restore(model)
    plain = [p.grad.clone() for p in model.parameters()]
    assert all(bool(g.isfinite().all()) for g in plain)


# ---- what can be learned


@pytest.mark.parametrize("learn", ["heads", "positions", "both"])
def test_learned_weights_change_nothing_but_get_the_gradient_of_their_tokens(learn):
    x, row = torch.randn(2, 6, 4, requires_grad=True), torch.rand(2, 3, 6)
    method = CurriculumDrop(learn=learn, blocks=(0,), final=0.5)
    reducer = method.build(1, 4, 3, 6, 1).train()
    out = reducer(tokens_of(x), Signals(cls_row=row), 0)
    plain = CurriculumDrop(blocks=(0,), final=0.5).build(1, 4, 3, 6, 1).train()(tokens_of(x), Signals(cls_row=row), 0)
    assert torch.equal(out.x, plain.x) and torch.equal(out.ledger.owner, plain.ledger.owner)
    g = torch.randn_like(out.x)
    out.x.backward(g)
    heads, positions = torch.zeros(3), torch.zeros(6)
    for b in range(2):
        for p in range(6):
            place = int(out.ledger.owner[b, p])
            if place >= 0:
                gain = float(g[b, place] @ x[b, p])
                heads += gain * row[b, :, p]
                positions[p] += gain * row[b, :, p].mean()
    if learn != "positions":
        torch.testing.assert_close(reducer.heads.grad[0], heads)
    if learn != "heads":
        torch.testing.assert_close(reducer.positions.grad[0], positions)
    with torch.no_grad():
        for weight in reducer.parameters():
            weight[0, -1] = 1e6  # the last head, the last patch
    again = reducer(tokens_of(x.detach()), Signals(cls_row=row, watched=True), 0)
    assert bool((again.ledger.owner[:, 5] >= 0).all()) if learn != "heads" else (
        torch.equal(again.ledger.owner >= 0, row[:, 2] >= row[:, 2].topk(3).values[:, -1:]))  # fmt: skip


def test_reindex_adds_the_new_place():
    x, row = torch.randn(2, 6, 4), torch.rand(2, 3, 6)
    reducer = CurriculumDrop(reindex=True, blocks=(0,), final=0.5).build(1, 4, 3, 6, 1).train()
    plain = CurriculumDrop(blocks=(0,), final=0.5).build(1, 4, 3, 6, 1).train()
    kept = plain(tokens_of(x), Signals(cls_row=row), 0).x
    assert torch.equal(reducer(tokens_of(x), Signals(cls_row=row), 0).x, kept)
    with torch.no_grad():
        reducer.places.normal_()
    torch.testing.assert_close(reducer(tokens_of(x), Signals(cls_row=row), 0).x, kept + reducer.places[:3])
    reducer.progress = 0.0
    assert torch.equal(reducer(tokens_of(x), Signals(), 0).x, x), "nothing dropped, nothing moved"


# ---- compile


def test_training_compiles_once_per_plateau():
    torch._dynamo.reset()
    model, x, made = small(), torch.randn(2, 3, 32, 32), []
    winnow.reduce(model.train(), CurriculumDrop(blocks="all", final=0.5, plateaus=3))
    reducer = winnow.reducer_of(model)

    def counted(graph, inputs):
        made.append(graph)
        return graph.forward

    compiled, seen = torch.compile(model, backend=counted, fullgraph=True), []
    with torch.no_grad():
        for step in range(40):
            reducer.progress = step / 40
            with winnow.watch(model) as run:
                compiled(x)
            seen.append(tuple(run.counts))
        assert len(made) == 3 and len(set(seen)) == 3
        assert seen[0] == (16,) * 5 and seen[-1] == (16, 8, 4, 2, 1)
        assert seen == sorted(seen, reverse=True)
        torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


# ---- refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"final": 1.0}, "from 0 to below 1"),
        ({"final": True}, "from 0 to below 1"),
        ({"final": (0.3, 0.2)}, "as many blocks="),
        ({"final": (0.3, 0.2), "blocks": (1,)}, "as many blocks="),
        ({"final": (0.3, 0.2), "blocks": (1, 2), "per": "model"}, "takes one share"),
        ({"from_": 0.9}, "from_ <= to is needed"),
        ({"to": 160}, "a number from 0 to 1"),
        ({"gamma": 0}, "above 0"),
        ({"gamma": 2.0, "schedule": "cosine"}, 'gamma belongs to schedule="polynomial"'),
        ({"blocks": "some"}, "a tuple of block numbers"),
        ({"saliency": "attention"}, "saliency is one of 'cls_attention'"),
        ({"per": "all"}, "'block', 'model'"),
        ({"schedule": "exponential"}, "'polynomial', 'linear'"),
        ({"learn": "layers"}, "None, 'heads'"),
        ({"learn": "heads", "saliency": "norm"}, "need class attention"),
        ({"epochs": 0}, "whole number from 1"),
        ({"plateaus": 1}, "whole number from 2"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(ValueError, match=message):
        CurriculumDrop(**words)


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match="needs class-token attention"):
        winnow.reduce(small(class_token=False, global_pool="avg"), CurriculumDrop())
    winnow.restore(winnow.reduce(small(class_token=False, global_pool="avg"), CurriculumDrop(saliency="received")))
    with pytest.raises(ValueError, match="names layer 7"):
        winnow.reduce(small(), CurriculumDrop(blocks=(7,)))
    reducer = CurriculumDrop(learn="positions", blocks=(0,)).build(1, 4, 1, 16, 1).train()
    with pytest.raises(ValueError, match="the image has 9: resize it"):
        reducer(tokens_of(torch.randn(1, 9, 4)), Signals(cls_row=torch.rand(1, 1, 9)), 0)
    with pytest.raises(ValueError, match="depends on the depth"):
        CurriculumDrop(blocks="all", per="model").count(64, 0)


# ---- hybrid_vit


@pytest.mark.parametrize(
    ("name", "parameters", "width"), [("hybrid_vit", 14.8e6, 384), ("hybrid_vit_small", 0.9e6, 128)]
)
def test_hybrid_vit(name, parameters, width):
    model = timm.create_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.02)
    assert model.patch_embed.grid_size == (8, 8) and model.embed_dim == width and model.num_classes == 100
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(x)
        assert plain_macs(model) == count_macs(model, x)
        keys = set(model.state_dict())
        winnow.reduce(model, winnow.ToMe(r=8))
        model(x)
        closed = closed_macs(model, torch.tensor([winnow._reduce.seat_of(model).run.counts]))
        assert float(closed) == pytest.approx(count_macs(model, x), rel=1e-6)
        winnow.restore(model)
        assert torch.equal(model(x), plain) and set(model.state_dict()) == keys


def test_hybrid_vit_takes_its_sizes():
    model = timm.create_model(
        "hybrid_vit", embed_dim=48, depth=3, num_heads=2, stem=(8,), strides=(2, 2), num_classes=7, drop_rate=0.2
    )
    drops = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    assert drops == {0.2, 0.0}, "the document's one rate everywhere but before the head"
    assert model.head_drop.p == 0.0 and model.blocks[2].drop_path1.drop_prob == pytest.approx(0.1)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert all(m.bias is None for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    assert all(b.attn.qkv.bias is None and b.norm1.eps == 1e-5 for b in model.blocks)
    with pytest.raises(ValueError, match="one stride per convolution"):
        timm.create_model("hybrid_vit", strides=(1, 2))


def test_training_costs_what_is_executed():
    """The closed form of a training forward counts the tokens that ran, and one query row per drop."""
    model = winnow.reduce(timm.create_model("hybrid_vit_small").train(), CurriculumDrop.seed003_as_run())
    with torch.no_grad(), winnow.watch(model) as run:
        model(torch.randn(2, 3, 32, 32))
    assert run.counts == [64, 32, 16, 8, 4]
    closed, host = float(closed_macs(model, torch.tensor([run.counts]))), winnow._reduce.seat_of(model).host
    blocks = sum(
        view.macs(block, before + 1, after + 1)
        for block, view, before, after in zip(host.blocks, host.views, run.counts, run.counts[1:])
    )
    rows = sum((n + 1) * 128 for n in run.counts[:-1])
    outside = float(host.outside_macs(torch.tensor(64.0), torch.tensor(5.0)))
    assert closed == pytest.approx(blocks + rows + outside)
    assert closed < 0.6 * float(closed_macs(model.eval(), torch.tensor([[64] * 5])))


# ---- the reference implementation's outputs


def test_parity():
    """The reference's later code: one drop in block 0, 256 tokens; logits and counts in training, eval without drop."""
    case = reference("ctd")["late"]
    cfg = case["cfg"]
    model = timm.create_model(
        "hybrid_vit", embed_dim=cfg["emb_dim"], depth=cfg["depth"], num_heads=cfg["num_heads"], strides=(1, 2, 1),
        num_classes=cfg["num_classes"], drop_rate=cfg["drop"], drop_path_rate=cfg["drop_path"],
    )  # fmt: skip
    model.load_state_dict(
        {k.replace("patch_embed.conv.", "patch_embed.backbone."): v for k, v in case["state"].items()}
    )
    epochs = cfg["epochs"]
    method = CurriculumDrop(
        start=cfg["ctd_initial_drop"], final=cfg["ctd_final_drop"], from_=cfg["ctd_start_epoch"] / epochs,
        to=cfg["ctd_end_epoch"] / epochs, gamma=cfg["ctd_gamma"], blocks=(cfg["ctd_block_idx"],), epochs=epochs,
    )  # fmt: skip
    assert [method.dropped(method.share(epoch / epochs)) for epoch in range(epochs)] == pytest.approx(
        case["schedule"], abs=0
    )
    winnow.reduce(model.train(), method)
    model.patch_embed.eval()
    for epoch, wanted in case["train"].items():
        winnow.reducer_of(model).progress = 0.0 if epoch is None else epoch / epochs
        with torch.no_grad(), winnow.watch(model) as run:
            logits = model(case["x"])
        assert run.counts[1:] == wanted["tokens_after_block"], epoch
        torch.testing.assert_close(logits, wanted["logits"], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(case["x"]), case["eval_epoch199"], atol=1e-4, rtol=1e-4)
