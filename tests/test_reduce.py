"""The public verbs: reduce, restore, reduced, watch, save, load, calibrate; what they keep, and what they refuse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import winnow
from winnow import Below, Downsample, EViT, Exactly, Grid, Keep, NormThreshold, Padded, Pool, Random, ToMe, TopK


def vit(cls=VisionTransformer, **words):
    """4 x 4 patches, 4 blocks, gains and weights far from 0 so that every part counts."""
    words = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5,
             "init_values": 1.0, **words}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = cls(**words)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model.eval()


def gap(pool="avg", **words):
    return vit(class_token=False, reg_tokens=2, no_embed_class=True, global_pool=pool, **words)


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32) * torch.tensor([0.4, 1.0, 3.0]).view(3, 1, 1, 1)


def near(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, atol=tolerance * max(1.0, float(b.abs().max())), rtol=0)


EVERY = [
    ToMe(r=3),
    EViT(layers=(1, 2)),
    EViT(layers=(1, 2), fuse=False),
    TopK(layers=(0, 2), attention="received"),
    NormThreshold(below=Below(1.0, of="mean"), before=(1, 3)),
    Random(layers=(1,)),
    Grid(at="input", keep=Keep(0.5)),
    Pool(layers=(0, 2), keep=Keep(0.5)),
    Downsample(16),
]


# ---- same call, same output, same keys


@pytest.mark.parametrize("method", EVERY, ids=repr)
def test_reduce_keeps_the_call_and_restore_keeps_the_bits(method, images):
    model = vit()
    state, attributes = copy.deepcopy(model.state_dict()), {n: set(vars(m)) for n, m in model.named_modules()}
    with torch.no_grad():
        plain, features = model(images), model.forward_features(images)
        assert winnow.reduce(model, method) is model
        out = model(images)
        assert type(out) is type(plain) and out.shape == plain.shape and out.dtype == plain.dtype
        assert not torch.equal(out, plain), "numb: the method changes nothing"
        assert torch.equal(model.forward_head(model.forward_features(images)), out)
        assert torch.equal(model(x=images), out)
        assert set(model.state_dict()) == set(state), "these methods learn nothing"
        assert winnow.reducer_of(model).method == method and not winnow.reducer_of(model).training
        assert winnow.restore(model) is model
        assert torch.equal(model(images), plain) and torch.equal(model.forward_features(images), features)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize(
    "method",
    [ToMe(r=0), EViT(keep=Keep(1.0)), Grid(keep=Exactly(16), layers=(1,)), NormThreshold(below=Below(0.0))],
    ids=repr,
)
@pytest.mark.parametrize(
    "make", [vit, gap, lambda: vit(VisionTransformerDistilled), lambda: vit(qk_norm=True, reg_tokens=3)]
)
def test_with_nothing_removed_nothing_changes(method, make, images):
    model = make()
    if "cls_attention" in method.facts.needs and not model.has_class_token:
        pytest.skip("needs a class token")
    with torch.no_grad():
        plain = model(images)
        with winnow.reduced(
            model, method if method.sites(4)[0] < 4 and max(method.sites(4)) < 4 else EViT(keep=Keep(1.0), layers=(1,))
        ):
            if method.facts.static:
                assert torch.equal(model(images), plain)
            else:
                near(model(images), plain)


def test_reducers_follow_device_dtype_and_mode():
    method = NormThreshold(below=Below(0.5, of="quantile"), before=(1,))
    model = winnow.reduce(vit().to(torch.bfloat16).train(), method)
    assert winnow.reducer_of(model).training and winnow.reducer_of(model).limits.dtype == torch.bfloat16
    assert not winnow.reducer_of(model.eval()).training
    assert "reducer.limits" in model.state_dict() and "reducer.limits" in dict(model.named_buffers())


@pytest.mark.parametrize(
    "method",
    [*EVERY, *(winnow.DRIP(rate=0.25, after=1, predictor=name) for name in ("mlp", "hnet", "entropy", "spikes"))],
    ids=repr,
)
def test_a_broken_image_spoils_itself_alone(method, images):
    model, broken = vit(), images.clone()
    broken[1] = torch.nan
    with torch.no_grad(), winnow.reduced(model, method):
        out, sound = model(broken), model(images)
    assert out[1].isnan().all()
    near(out[[0, 2]], sound[[0, 2]])


@pytest.mark.parametrize("method", [method for method in EVERY if method.facts.where != "input"], ids=repr)
def test_an_empty_batch_is_no_error(method, images):
    with torch.no_grad(), winnow.reduced(vit(), method) as model:
        assert model(images[:0]).shape == (0, 5)


# ---- watch


def test_counts_of_every_kind(images):
    model = winnow.reduce(vit(), ToMe(r=3))
    with winnow.watch(model) as run:
        for name in ("ledger", "valid_counts"):
            with pytest.raises(ValueError, match="no forward was watched yet"):
                getattr(run, name)
        with torch.no_grad():
            model(images)
    assert run.counts == [16, 13, 10, 7, 4]
    assert run.valid_counts.tolist() == [[16, 13, 10, 7, 4]] * 3
    assert sorted(run.ledgers) == [-1, 0, 1, 2, 3]
    for layer, n in zip(range(-1, 4), run.counts):
        ledger = run.ledgers[layer]
        assert ledger.n == n and ledger.owner.shape == (3, 16) and ledger.size().sum(1).tolist() == [16] * 3
    assert run.ledger is run.ledgers[3]
    assert sorted(run.scores) == [0, 1, 2, 3] and run.scores[1].shape == (3, 13)
    assert run.grid == (4, 4) and run.way == "static"


def test_counts_of_adaptive_methods(images):
    model = winnow.reduce(vit(), NormThreshold(below=Below(1.0, of="mean"), before=(1, 3)))
    seen = {}
    for way in ("auto", "masked", Padded(1), Padded(16)):
        winnow.restore(model)
        winnow.reduce(model, NormThreshold(below=Below(1.0, of="mean"), before=(1, 3)), way)
        with torch.no_grad(), winnow.watch(model) as run:
            model(images)
        seen[str(way)] = run
    valid = seen["masked"].valid_counts
    assert all(torch.equal(run.valid_counts, valid) for run in seen.values())
    assert seen["masked"].counts == [16] * 5
    assert seen["Padded(1)"].counts == valid.max(0).values.tolist()
    assert seen["Padded(16)"].counts == [16] * 5 and seen["auto"].way == Padded(16)
    assert valid[:, 0].tolist() == [16] * 3 and bool((valid.diff(dim=1) <= 0).all()) and int(valid.min()) >= 1
    for run in seen.values():
        held = run.ledger.owner >= 0
        assert torch.equal(held.sum(1), valid[:, -1])
        assert torch.equal(held, seen["masked"].ledger.owner >= 0)
    model.train()
    winnow.restore(model)
    winnow.reduce(model, NormThreshold(before=(1,)))
    with winnow.watch(model) as run:
        model(images)
    assert run.way == "masked", "auto is masked while training"


def test_sites_between_blocks_count_before_their_block(images):
    model = vit()
    for method, wanted in (
        (Grid(at="input", keep=Exactly(9)), [9] * 5),
        (Grid(layers=(0,), keep=Exactly(9)), [16, 9, 9, 9, 9]),
        (NormThreshold(below=Below(1e6), before=(0, 2)), [1] * 5),
        (NormThreshold(below=Below(1e6), before=(2,)), [16, 16, 1, 1, 1]),
    ):
        with torch.no_grad(), winnow.reduced(model, method, "auto" if method.facts.static else Padded(1)):
            with winnow.watch(model) as run:
                model(images)
            assert run.counts == wanted, method


def test_watches_nest_and_the_last_forward_wins(images):
    model = winnow.reduce(vit(dynamic_img_size=True), ToMe(r=3))
    with torch.no_grad(), winnow.watch(model) as outer:
        model(images)
        with winnow.watch(model) as inner:
            model(images[:2])
            model(images[:1])
        assert inner.ledger.owner.shape == (1, 16) and outer.ledger.owner.shape == (1, 16)
        model(torch.randn(2, 3, 48, 32))
    assert outer.ledger.owner.shape == (2, 24) and inner.ledger.owner.shape == (1, 16)
    model(images)
    assert outer.counts == [24, 21, 18, 15, 12] and inner.counts == [16, 13, 10, 7, 4], "a watch keeps its run"
    winnow.restore(model)
    assert outer.ledger.n == 12


def test_a_watch_ends_with_an_exception(images):
    model = winnow.reduce(vit(), ToMe(r=3))
    with pytest.raises(ZeroDivisionError), winnow.watch(model):
        raise ZeroDivisionError
    assert winnow.reducer_of(model).seat.watches == []
    model(images)
    assert winnow.reducer_of(model).seat.run.scores == {}, "nobody watches, nothing is kept"


def test_what_a_run_holds_carries_no_features_or_graph(images):
    model = winnow.reduce(vit().train(), ToMe(r=3))
    with winnow.watch(model) as run:
        model(images)
    tensors = [t for tokens in run.tokens.values() for t in (tokens.x, tokens.ledger.owner)] + [*run.scores.values()]
    assert all(t.grad_fn is None and not t.requires_grad for t in tensors if t.numel())
    assert all(tokens.x.numel() == 0 for tokens in run.tokens.values())


@pytest.mark.parametrize(
    "verb", [winnow.restore, winnow.reducer_of, lambda m: winnow.watch(m).__enter__(), lambda m: winnow.save(m, "x")]
)
def test_verbs_need_a_reduced_model(verb):
    with pytest.raises(
        ValueError, match=r"VisionTransformer is not reduced: call winnow.reduce\(model, method\) first"
    ):
        verb(vit())


# ---- refusals


def refuses(error, message, model, method=None, **words):
    """The refusal says so in one line and leaves no trace."""
    inner = model.module if hasattr(model, "module") else model
    before = {n: set(vars(m)) for n, m in inner.named_modules()}
    with pytest.raises(error) as caught:
        winnow.reduce(model, method or ToMe(r=3), **words)
    assert message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    assert {n: set(vars(m)) for n, m in inner.named_modules()} == before


class Wrapper(nn.Module):
    """What DistributedDataParallel and DataParallel look like."""


def test_a_reduced_model_is_refused():
    model = winnow.reduce(vit(), ToMe(r=3))
    refuses(ValueError, "already reduced with ToMe(r=3): call winnow.restore(model) first", model, Grid(layers=(1,)))
    winnow.restore(model)
    winnow.reduce(model, Grid(layers=(1,)))


def test_wrapped_models_are_refused_and_seen_through(images):
    model = vit()
    refuses(TypeError, "reduce the model before it is wrapped", torch.compile(model, backend="eager"))
    refuses(TypeError, "DataParallel is a wrapper", nn.DataParallel(model))
    winnow.reduce(model, ToMe(r=3))
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        assert winnow.reducer_of(wrapped) is model.reducer
        with winnow.watch(wrapped) as run, torch.no_grad():
            model(images)
        assert run.counts == [16, 13, 10, 7, 4]
    compiled = torch.compile(model, backend="eager")
    assert winnow.restore(compiled) is compiled and not hasattr(model, "reducer")


def test_ddp_has_a_reducer_of_its_own_and_is_seen_through(tmp_path, images):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = vit()
        refuses(TypeError, "DistributedDataParallel is a wrapper", nn.parallel.DistributedDataParallel(model))
        winnow.reduce(model, ToMe(r=3))
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert winnow.reducer_of(wrapped) is model.reducer
        with winnow.watch(wrapped) as run:
            wrapped(images).sum().backward()
        assert run.counts == [16, 13, 10, 7, 4]
    finally:
        torch.distributed.destroy_process_group()


def test_other_things_are_refused():
    model = vit()
    model.reducer = nn.Identity()
    refuses(ValueError, "has an attribute `reducer` of its own", model)
    refuses(TypeError, "Linear is no vision transformer", nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, got str"):
        winnow.reduce("vit", ToMe())
    for wrong in ("ToMe(r=8)", ToMe, None):
        with pytest.raises(TypeError, match=r"reduce\(\) needs a method such as ToMe\(r=8\)"):
            winnow.reduce(vit(), wrong)
    model = vit()
    model.blocks[2].forward = model.blocks[2].forward
    refuses(TypeError, "the forward of a Block was replaced by something else", model)
    refuses(ValueError, "the model drops patches itself (patch_drop_rate > 0)", vit(patch_drop_rate=0.3))
    refuses(ValueError, 'ways are "auto", "static", "masked" and Padded(16)', vit(), way="fast")
    refuses(ValueError, 'way="packed" is not built yet', vit(), way="packed")
    refuses(ValueError, 'use way="masked" or way=Padded(16)', vit(), NormThreshold(before=(1,)), way="static")
    wanted = (
        "needs class-token attention; VisionTransformer has no class token. "
        'Use ToMe or NormThreshold, or attention="received".'
    )
    refuses(ValueError, wanted, gap(), EViT(layers=(1,)))
    refuses(ValueError, wanted, gap(), TopK(layers=(1,)))
    refuses(
        ValueError,
        "names layer 9, the model has blocks 0 to 3: list layers within them, e.g. layers=(1, 2, 3)",
        vit(),
        EViT(layers=(1, 9)),
    )
    with torch.no_grad():
        winnow.reduce(gap(), EViT(layers=(1,), attention="received"))(torch.randn(1, 3, 32, 32))


def test_a_reduced_block_takes_only_its_tokens(images):
    model = winnow.reduce(vit(), ToMe(r=3))
    with pytest.raises(ValueError, match="it was also given attn_mask"):
        model.forward_features(images, attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"it was also given .*is_causal"):
        model.forward_features(images, is_causal=True)


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_a_head_given_foreign_features_is_refused(pool, images):
    model = winnow.reduce(gap(pool) if pool == "avg" else vit(class_token=False, global_pool="map"), ToMe(r=3))
    features = model.forward_features(images)
    model.forward_head(features)
    with pytest.raises(ValueError, match=r"the head was given \d+ tokens, the last forward left 4: pool its own"):
        model.forward_head(torch.cat([features, features[:, :1]], 1))


# ---- context manager, copies, pickles


def test_reduced_restores_after_an_exception(images):
    model = vit()
    plain = model(images)
    with winnow.reduced(model, ToMe(r=3)) as same:
        assert same is model and hasattr(model, "reducer")
    with pytest.raises(ZeroDivisionError), winnow.reduced(model, ToMe(r=3)):
        raise ZeroDivisionError
    assert not hasattr(model, "reducer") and torch.equal(model(images), plain)
    with pytest.raises(ValueError, match="at most half"):
        winnow.reduced(model, ToMe(r=9)).__enter__()
    assert torch.equal(model(images), plain)


def test_a_failed_forward_leaves_nothing_wrong(images):
    model = winnow.reduce(vit(), ToMe(r=3))
    wanted = model(images)
    with pytest.raises(AssertionError):
        model(torch.randn(1, 3, 40, 40))
    assert torch.equal(model(images), wanted)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("method", [ToMe(r=3), EViT(layers=(1,)), NormThreshold(before=(1,)), Downsample(16)], ids=repr)
def test_copies_are_their_own(how, method, images):
    model = winnow.reduce(vit().train(), method)
    with winnow.watch(model):
        model(images).sum().backward()
        twin = how(model).eval()
    model.eval()
    with torch.no_grad():
        wanted = model(images)
        assert torch.equal(twin(images), wanted)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert torch.equal(twin(images), wanted), "the copy's blocks are its own"
        with winnow.watch(twin) as run:
            model(images)
            with pytest.raises(ValueError, match="no forward"):
                _ = run.ledger
            twin(images[:1])
        assert run.ledger.owner.shape[0] == 1
        winnow.restore(twin)
        assert hasattr(model, "reducer") and not hasattr(twin, "reducer")
        assert all("forward" not in vars(module) for module in twin.modules())
        assert not torch.equal(twin(images), wanted)


def test_several_models_do_not_meet(images):
    one, two = winnow.reduce(vit(), ToMe(r=3)), winnow.reduce(vit(), ToMe(r=1))
    with winnow.watch(one) as first, winnow.watch(two) as second, torch.no_grad():
        one(images)
        two(images)
    assert first.counts[-1] == 4 and second.counts[-1] == 12


# ---- save and load


@pytest.mark.parametrize("method", [*EVERY, NormThreshold(below=Below(0.4, of="quantile"), before=(1,))], ids=repr)
def test_save_and_load(method, images, tmp_path):
    model = winnow.reduce(vit(), method, "auto" if method.facts.static else Padded(4))
    if winnow.reducer_of(model).quantiles():
        winnow.calibrate(model, [images])
    winnow.save(model, tmp_path / "reducer.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["reducer.safetensors"]
    fresh = vit()
    assert winnow.load(fresh, str(tmp_path / "reducer.safetensors")) is fresh
    assert winnow.reducer_of(fresh).method == method
    assert winnow.reducer_of(fresh).seat.way == winnow.reducer_of(model).seat.way
    with torch.no_grad():
        assert torch.equal(fresh(images), model(images))


def test_load_refuses(tmp_path):
    path, model = tmp_path / "r.safetensors", vit()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        winnow.load(model, path)
    path.write_text("hello")
    with pytest.raises(ValueError, match="not a safetensors file or is cut short"):
        winnow.load(model, path)
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"holds no method: it was not written by winnow.save\(\)"):
        winnow.load(model, path)
    winnow.save(winnow.reduce(vit(), NormThreshold(below=Below(0.4, of="quantile"), before=(1,))), path)
    whole = path.read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2, 4):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="not a safetensors file or is cut short"):
            winnow.load(model, path)
    path.write_bytes(whole)
    save_file(
        {"other": torch.zeros(1)},
        path,
        metadata={"method": "NormThreshold(below=Below(0.4, of='quantile'))", "way": "auto"},
    )
    with pytest.raises(ValueError, match=r"does not fit NormThreshold.* on this model"):
        winnow.load(model, path)
    save_file({}, path, metadata={"method": "Zoom(3)", "way": "auto"})
    with pytest.raises(ValueError, match="unknown name 'Zoom'"):
        winnow.load(model, path)
    winnow.save(winnow.reduce(vit(), EViT(layers=(3,))), path)
    with pytest.raises(ValueError, match="names layer 3, the model has blocks 0 to 1"):
        winnow.load(vit(depth=2), path)
    assert not hasattr(model, "reducer")
    assert all("forward" not in vars(module) for module in model.modules()), "a failed load leaves nothing behind"


def test_save_is_atomic(tmp_path, monkeypatch):
    path, model = tmp_path / "r.safetensors", winnow.reduce(vit(), ToMe(r=3))
    winnow.save(model, path)
    before = path.read_bytes()

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        winnow.save(model, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["r.safetensors"]


def test_saved_files_say_what_they_are(tmp_path):
    from safetensors import safe_open

    path = tmp_path / "r.safetensors"
    winnow.save(winnow.reduce(vit(), NormThreshold(below=Below(0.4, of="quantile"), before=(1,)), Padded(8)), path)
    with safe_open(path, framework="pt") as file:
        words = file.metadata()
    assert words == {
        "winnow": winnow.__version__,
        "method": "NormThreshold(below=Below(0.4, of='quantile'), before=(1,))",
        "way": "Padded(8)",
    }
    assert list(load_file(path)) == ["limits"]


# ---- heads: pooling with sizes and padding


def pooled(x, weight, kind, model):
    """[B, C] by hand: x [B, N, C] tokens without prefix, weight [B, N] patches held, 0 on padding."""
    out = []
    for tokens, w in zip(x, weight):
        real = w > 0
        mean = sum(wi * ti for wi, ti in zip(w, tokens)) / w.sum()
        most = tokens[real].amax(0)
        out.append({"avg": mean, "max": most, "avgmax": 0.5 * (mean + most)}[kind])
    return torch.stack(out)


@pytest.mark.parametrize("kind", ["avg", "max", "avgmax"])
@pytest.mark.parametrize(
    "method",
    [
        ToMe(r=3),
        ToMe(r=3, proportional=False),
        Pool(keep=Exactly(5), layers=(1,)),
        Grid(keep=Exactly(5), layers=(1,)),
        NormThreshold(below=Below(1.0, of="mean"), before=(1,)),
    ],
    ids=repr,
)
def test_pooling_by_hand(kind, method, images):
    model = gap(kind)
    for way in ("auto", "masked", Padded(1), Padded(7)):
        with torch.no_grad(), winnow.reduced(model, method, way), winnow.watch(model) as run:
            features = model.forward_features(images)
            got = model.forward_head(features, pre_logits=True)
            size = run.ledger.size()
            weight = size if method.facts.combine == "mean" else (size > 0).long()
            near(got, model.fc_norm(pooled(features[:, 2:], weight, kind, model)))
            near(model(images), model.head(got))


@pytest.mark.parametrize("make", [
    lambda: vit(), lambda: vit(global_pool="avg"), lambda: gap("avg"), lambda: gap("max"), lambda: gap("avgmax"),
    lambda: vit(class_token=False, global_pool="map"), lambda: vit(global_pool="map", reg_tokens=1),
    lambda: vit(VisionTransformerDistilled), lambda: gap("avg", qk_norm=True, fc_norm=True),
])  # fmt: skip
@pytest.mark.parametrize(
    "method",
    [
        ToMe(r=3),
        Pool(keep=(Exactly(9), Exactly(4)), layers=(0, 2)),
        Random(layers=(1, 2)),
        NormThreshold(below=Below(1.0, of="mean"), before=(1, 2)),
        TopK(keep=Exactly(6), layers=(1,), attention="received"),
    ],
    ids=repr,
)
def test_ways_agree_under_every_head(make, method, images):
    model, outputs = make(), {}
    for way in ("auto", "masked", Padded(1), Padded(5)):
        with torch.no_grad(), winnow.reduced(model, method, way):
            outputs[str(way)] = model(images)
            alone = torch.cat([model(image[None]) for image in images])
        near(alone, outputs[str(way)])
        near(outputs[str(way)], outputs["auto"])


def test_map_pooling_weighs_sizes(images):
    """Attention pooling of merged tokens is attention pooling of their copies."""
    model = vit(class_token=False, global_pool="map")
    with torch.no_grad(), winnow.reduced(model, ToMe(r=3)), winnow.watch(model) as run:
        features = model.forward_features(images)
        got = model.forward_head(features)
        copies = run.ledger.dense(features)
    with torch.no_grad():
        near(got, model.forward_head(copies))


# ---- inputs


@pytest.mark.parametrize("method", EVERY, ids=repr)
def test_other_input_sizes(method):
    model = vit(dynamic_img_size=True)
    for h, w in ((32, 32), (48, 32), (24, 64), (16, 16)):
        x = torch.randn(2, 3, h, w)
        with torch.no_grad(), winnow.reduced(model, method), winnow.watch(model) as run:
            out = model(x)
        assert out.shape == (2, 5) and torch.isfinite(out).all()
        assert run.ledger.owner.shape == (2, h // 8 * (w // 8)) and run.grid == (h // 8, w // 8)


def test_models_that_are_not_square(images):
    model = vit(img_size=(16, 48))
    x = torch.randn(2, 3, 16, 48)
    for method, end in (
        (Pool(keep=Exactly(3), layers=(1,)), 3),
        (Downsample(8), 3),
        (Grid(at="input", keep=Exactly(3)), 3),
    ):
        with torch.no_grad(), winnow.reduced(model, method), winnow.watch(model) as run:
            model(x)
        assert run.ledger.n == end, method
        assert run.ledger.owner.shape == (2, 12)
    with pytest.raises(AssertionError):
        winnow.reduce(model, ToMe(r=1))(images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", EVERY, ids=repr)
@pytest.mark.parametrize("make", [vit, gap, lambda: vit(class_token=False, global_pool="map")])
def test_other_precisions(method, dtype, make, images):
    model = make()
    if "cls_attention" in method.facts.needs and not model.has_class_token:
        pytest.skip("needs a class token")
    model = winnow.reduce(model.to(dtype), method, "auto" if method.facts.static else Padded(1))
    with torch.no_grad():
        out = model(images.to(dtype))
    assert out.dtype == dtype and torch.isfinite(out).all()


def test_autocast(images):
    model = gap()
    for method in (
        ToMe(r=3),
        NormThreshold(below=Below(1.0, of="mean"), before=(1,)),
        TopK(layers=(1,), attention="received"),
    ):
        with torch.no_grad(), winnow.reduced(model, method), torch.autocast("cpu", torch.bfloat16):
            assert torch.isfinite(model(images)).all(), method


@pytest.mark.parametrize("method", EVERY, ids=repr)
def test_training_with_dropout_drop_path_and_checkpointing(method, images):
    grads = []
    for checkpoint in (False, True):
        model = vit(drop_path_rate=0.3, proj_drop_rate=0.2, attn_drop_rate=0.2, pos_drop_rate=0.1).train()
        winnow.reduce(model, method)
        model.set_grad_checkpointing(checkpoint)
        torch.manual_seed(5)
        with winnow.watch(model) as run:
            model(images).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        assert all(g is not None and torch.isfinite(g).all() for g in grads[-1].values())
        assert len(run.counts) == 5
    for name in grads[0]:
        near(grads[1][name], grads[0][name], 1e-4)


# ---- forward_intermediates


@pytest.mark.parametrize("make", [vit, gap, lambda: vit(VisionTransformerDistilled)])
@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", ["tuple", "list", "dict", "early"])
def test_intermediates_have_the_plain_formats(make, fmt, prefix, norm, shape, images):
    model = make()
    words = {"indices": [0, 2], "output_fmt": fmt, "return_prefix_tokens": prefix, "norm": norm}
    words |= {"tuple": {}, "list": {"intermediates_only": True}, "dict": {"output_dict": True},
              "early": {"stop_early": True, "intermediates_only": True}}[shape]  # fmt: skip

    def shapes(out):
        if isinstance(out, torch.Tensor):
            return tuple(out.shape)
        if isinstance(out, dict):
            return {key: shapes(value) for key, value in out.items() if key != "image_features"}
        return [type(out), *map(shapes, out)]

    with torch.no_grad():
        plain = model.forward_intermediates(images, **words)
        with winnow.reduced(model, ToMe(r=0)):
            same = model.forward_intermediates(images, **words)
        with winnow.reduced(model, ToMe(r=3)), winnow.watch(model) as run:
            ours = model.forward_intermediates(images, **words)
    if shape == "tuple":
        plain, same, ours = plain[1], same[1], ours[1]
    assert shapes(ours) == shapes(plain) == shapes(same)

    def flat(out):
        if isinstance(out, torch.Tensor):
            return [out]
        return [t for part in (out.values() if isinstance(out, dict) else out) for t in flat(part)]

    assert all(torch.equal(a, b) for a, b in zip(flat(same), flat(plain)))
    assert len(run.counts) == (4 if shape == "early" else 5)
    # block 2 left 7 tokens: every map is constant on the patches of one token
    last = ours["image_intermediates"][-1] if isinstance(ours, dict) else ours[-1]
    last = last[0] if isinstance(last, tuple) else last
    last = last.flatten(2).transpose(1, 2) if fmt == "NCHW" else last
    owner = run.ledgers[2].owner
    for image in range(3):
        for token in range(7):
            held = last[image, owner[image] == token]
            assert torch.equal(held, held[:1].expand_as(held))
        assert len(last[image].unique(dim=0)) == 7


def test_intermediates_of_dropped_patches_are_zero(images):
    model = vit()
    for way in ("static", "masked", Padded(16)):
        with torch.no_grad(), winnow.reduced(model, Grid(keep=Exactly(4), layers=(1,)), way):
            early, late = model.forward_intermediates(images, indices=[0, 3], intermediates_only=True)
        assert early.shape == late.shape == (3, 32, 4, 4)
        assert bool((early.abs().sum(1) > 0).all())
        kept = late.abs().sum(1) > 0
        assert bool((kept == kept[0]).all()) and kept[0].nonzero().tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]
    with torch.no_grad(), winnow.reduced(model, Downsample(16)):
        (small,) = model.forward_intermediates(images, indices=[3], intermediates_only=True)
    assert small.shape == (3, 32, 4, 4) and torch.equal(small[..., 0, 0], small[..., 1, 1])


# ---- models of no known family


def encoder(**words):
    from torchvision.models import VisionTransformer as TorchVision

    torch.manual_seed(1)
    words = {
        "image_size": 32,
        "patch_size": 8,
        "num_layers": 3,
        "num_heads": 2,
        "hidden_dim": 16,
        "mlp_dim": 32,
        "num_classes": 4,
        **words,
    }
    model = TorchVision(**words).eval()
    nn.init.normal_(model.heads.head.weight)
    return model


@pytest.mark.parametrize(
    "method",
    [
        Grid(keep=Exactly(4), layers=(1,)),
        Random(keep=Keep(0.5), layers=(0, 1)),
        Random(at="input", keep=Exactly(4)),
        Pool(keep=Exactly(4), layers=(1,), proportional=False),
    ],
    ids=repr,
)
def test_named_blocks(method, images):
    model = encoder()
    with torch.no_grad():
        plain = model(images)
        winnow.reduce(model, method, blocks="encoder.layers")
        with winnow.watch(model) as run:
            out = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        assert winnow.restore(model) is model and torch.equal(model(images), plain)
    n, wanted = 16, []
    between = method.facts.where == "between"
    for layer in range(3):
        n = method.count(n, layer, 16) if between and layer in method.sites(3) else n
        wanted.append(n)
        n = method.count(n, layer, 16) if not between and layer in method.sites(3) else n
    assert run.counts == [*wanted, n]
    assert out.shape == plain.shape and not torch.equal(out, plain)
    near(alone, out)
    assert all("forward" not in vars(module) for module in model.modules())


def test_named_blocks_with_nothing_removed_change_nothing(images):
    model = encoder()
    with torch.no_grad():
        plain = model(images)
        with winnow.reduced(model, Grid(keep=Keep(1.0), layers=(1,)), blocks="encoder.layers"):
            assert torch.equal(model(images), plain)


def test_named_blocks_are_remembered(images, tmp_path):
    model = winnow.reduce(encoder(), Grid(keep=Exactly(4), layers=(1,)), blocks="encoder.layers")
    winnow.save(model, tmp_path / "grid.safetensors")
    with torch.no_grad():
        assert torch.equal(winnow.load(encoder(), tmp_path / "grid.safetensors")(images), model(images))


def test_named_blocks_refuse():
    refuses(
        TypeError,
        'or name its list of blocks, e.g. blocks="encoder.layers"',
        encoder(),
        Grid(layers=(1,)),
    )
    refuses(
        ValueError,
        "is no list of blocks of VisionTransformer; lists it has: ",
        encoder(),
        Grid(layers=(1,)),
        blocks="encoder.blocks",
    )
    refuses(ValueError, "is no list of blocks", encoder(), Grid(layers=(1,)), blocks="encoder.ln")
    wanted = "which VisionTransformer, between the blocks of 'encoder.layers' (VisionTransformer) does not offer"
    for method in (ToMe(r=2), EViT(layers=(1,)), Pool(layers=(1,)), NormThreshold(before=(1,)), Downsample(16)):
        refuses(ValueError, wanted, encoder(), method, blocks="encoder.layers")
    for way in ("masked", Padded(16)):
        refuses(
            ValueError,
            'its attention does not skip padding; use way="static"',
            encoder(),
            Grid(layers=(1,)),
            way=way,
            blocks="encoder.layers",
        )
    refuses(
        ValueError, "names layer 3, the model has blocks 0 to 2", encoder(), Grid(layers=(3,)), blocks="encoder.layers"
    )


def test_named_blocks_refuse_masks():
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x, src_key_padding_mask=torch.zeros(x.shape[:2], dtype=torch.bool))
            return x

    model = winnow.reduce(Host().eval(), Grid(keep=Exactly(3), layers=(0,)), blocks="layers")
    with pytest.raises(ValueError, match="one entry per token"):
        model(torch.randn(2, 6, 8))


def test_a_run_keeps_no_features_alive():
    """Ledgers outlive the forward; a view of the stream in them would hold every layer's features (72 MiB for ViT-Ti)."""
    from timm import create_model

    model = create_model("test_vit").eval()
    for method in (ToMe(r=4), winnow.NormThreshold(before=(0, 2)), winnow.Downsample(size=96)):
        with winnow.reduced(model, method), winnow.watch(model) as run, torch.no_grad():
            model(torch.randn(2, 3, 160, 160))
        assert all(tokens.x.untyped_storage().nbytes() == 0 for tokens in run.tokens.values())
