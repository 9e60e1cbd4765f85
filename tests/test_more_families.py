"""Every family beyond timm's VisionTransformer keeps its promises on a small model whose gains are far from 0."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import winnow
from winnow import Downsample, EViT, NormThreshold, Padded, ToMe
from winnow._reduce import seat_of
from winnow.checks.case import close
from winnow.measure import count_macs
from winnow.measure.closed_form import closed_macs, plain_macs
from winnow.parts.amount import Below, Keep
from winnow.reducer import Method, Reducer

SIDE, PATCH, WIDTH, HEADS, DEPTH = 48, 8, 32, 2, 3


@dataclass(frozen=True)
class Family:
    """How to make a small model, what to give it, and which numbers to look at."""

    build: Callable[[], nn.Module]
    look: Callable[[Any], Tensor] = lambda out: out
    images: tuple[int, ...] = (3, SIDE, SIDE)
    cls: bool = True
    call: str = "__call__"
    checkpoint: str = "set_grad_checkpointing"
    dense: bool = False
    """The output are the tokens that are left: looked at on the patch grid."""
    exact: bool = False
    """With nothing removed the same kernels run."""
    prefix: int = 0


def vit_words() -> dict[str, Any]:
    return {
        "img_size": SIDE,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "num_classes": 5,
        "mlp_ratio": 2.0,
        "init_values": 1.0,
    }


def eva(**more: Any) -> Callable[[], nn.Module]:
    from timm.models.eva import Eva

    return lambda: Eva(**vit_words() | more)


def eva_gated() -> nn.Module:
    from timm.models.eva import EvaBlock

    model = eva(**ROPE, attn_type="rope")()
    model.blocks[1] = EvaBlock(
        WIDTH, HEADS, mlp_ratio=2.0, init_values=1.0, gated_attn=True, scale_attn_inner=True, norm_layer=nn.LayerNorm
    )
    return model


def beit(**more: Any) -> Callable[[], nn.Module]:
    from timm.models.beit import Beit

    return lambda: Beit(**vit_words() | more)


def open_clip_tower(**more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from open_clip.transformer import VisionTransformer

        words = {"image_size": SIDE, "patch_size": PATCH, "width": WIDTH, "layers": DEPTH, "heads": HEADS}
        words |= {"mlp_ratio": 2.0, "output_dim": 16, "ls_init_value": 1.0}
        return VisionTransformer(**words | more)

    return build


def open_clip_model(side: int = SIDE) -> nn.Module:
    from open_clip.model import CLIP

    vision = {"layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH, "image_size": side}
    return CLIP(16, vision, {"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1})


def open_clip_timm() -> nn.Module:
    from open_clip.timm_model import TimmModel

    return TimmModel("test_vit", embed_dim=16, pool="token", proj="linear", image_size=160)


def encoder(**words: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, **words)
        return nn.TransformerEncoder(layer, DEPTH, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    return build


def hf(kind: str, config: str, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        words = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "image_size": SIDE}
        words |= {"patch_size": PATCH, "intermediate_size": 2 * WIDTH, "mlp_ratio": 2, "num_labels": 5} | more
        made = getattr(transformers, config)
        if config in ("CLIPConfig", "SiglipConfig"):
            text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
            made = made(vision_config=words, text_config=text | {"vocab_size": 32, "projection_size": 16}, num_labels=5)
        else:
            made = made(**words)
        return getattr(transformers, kind)(made)

    return build


def pooled(out: Any) -> Tensor:
    return out.pooler_output


def logits(out: Any) -> Tensor:
    return out.logits


HF = {"checkpoint": "gradient_checkpointing_enable"}
ROPE = {"use_rot_pos_emb": True, "use_abs_pos_emb": False}
FAMILIES = {
    "eva02": Family(eva(**ROPE, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, ref_feat_shape=(4, 4)), exact=True),
    "dinov3": Family(
        eva(
            **ROPE,
            rope_type="dinov3",
            rope_rotate_half=True,
            num_reg_tokens=2,
            no_embed_class=True,
            global_pool="token",
        ),
        exact=True,
    ),
    "eva-postnorm": Family(eva(use_post_norm=True, init_values=None, global_pool="token"), exact=True),
    "eva-mixed": Family(
        eva(**ROPE, rope_type="mixed", attn_type="rope", class_token=False, global_pool="map"), cls=False
    ),
    "eva-groups": Family(eva(**ROPE, attn_type="rope", num_kv_heads=1, qkv_fused=False, qk_norm=True), exact=True),
    "eva-gated": Family(eva_gated, exact=True),
    "beit": Family(beit(use_rel_pos_bias=True), exact=True),
    "beit-shared": Family(beit(use_shared_rel_pos_bias=True, use_rel_pos_bias=True, global_pool="token"), exact=True),
    "open_clip": Family(open_clip_model, call="encode_image"),
    "open_clip-avg": Family(open_clip_tower(pool_type="avg", output_tokens=True), look=lambda out: out[0]),
    "open_clip-pooler": Family(open_clip_tower(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2)),
    "open_clip-parallel": Family(
        open_clip_tower(
            attentional_pool="parallel",
            attn_pooler_queries=4,
            attn_pooler_heads=2,
            output_tokens=True,
            output_dim=WIDTH,
        ),
        look=lambda out: torch.cat(out, 1),
    ),
    "open_clip-custom": Family(open_clip_tower(qk_norm=True, scale_heads=True, scale_attn=True, scale_fc=True)),
    "open_clip-timm": Family(open_clip_timm, images=(3, 160, 160), exact=True),
    "torch": Family(encoder(batch_first=True), images=(36, WIDTH), cls=False, checkpoint="", dense=True),
    "torch-norm-first": Family(
        encoder(norm_first=True, activation="gelu"), images=(3, WIDTH), cls=False, checkpoint="", dense=True
    ),
    "hf-vit": Family(hf("ViTForImageClassification", "ViTConfig"), look=logits, exact=True, **HF),
    "hf-vit-tokens": Family(
        hf("ViTModel", "ViTConfig"), look=lambda out: out.last_hidden_state, dense=True, prefix=1, exact=True, **HF
    ),
    "hf-clip": Family(hf("CLIPModel", "CLIPConfig"), look=pooled, call="get_image_features", exact=True, **HF),
    "hf-clip-classifier": Family(hf("CLIPForImageClassification", "CLIPConfig"), look=logits, exact=True, **HF),
    "hf-siglip": Family(hf("SiglipVisionModel", "SiglipVisionConfig"), look=pooled, cls=False, exact=True, **HF),
    "hf-siglip-classifier": Family(
        hf("SiglipForImageClassification", "SiglipConfig"), look=logits, cls=False, exact=True, **HF
    ),
    "hf-dinov2": Family(
        hf("Dinov2ForImageClassification", "Dinov2Config", use_swiglu_ffn=True), look=logits, exact=True, **HF
    ),
    "hf-dinov2-registers": Family(
        hf("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig"), look=logits, exact=True, **HF
    ),
    "hf-dinov3": Family(
        hf("DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=2, use_gated_mlp=True),
        look=pooled,
        exact=True,
        **HF,
    ),
}


SAME_TO_A_COMPILER = (
    *(
        "eva-postnorm",
        "eva-groups",
        "eva-gated",
        "beit-shared",
        "open_clip-parallel",
        "open_clip-timm",
        "open_clip-avg",
    ),
    *("hf-vit-tokens", "hf-clip-classifier", "hf-siglip-classifier", "hf-dinov2-registers"),
)


def methods(family: Family) -> list[Method]:

    found: list[Method] = [ToMe(r=4), NormThreshold(Below(1.0, of="mean"), before=(1, 2))]
    return [*found, EViT(Keep(0.7), layers=(1,))] if family.cls else found


def made(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = FAMILIES[name].build()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model.eval()


def images(name: str, b: int = 3) -> Tensor:
    """b images of very different contrast; tokens first where the encoder wants them so."""
    shape = FAMILIES[name].images
    if name == "torch-norm-first":
        shape = (36, WIDTH)
    x = torch.randn(b, *shape) * torch.tensor([0.3, 1.0, 3.0])[torch.arange(b) % 3].view(b, *[1] * len(shape))
    return x.transpose(0, 1) if name == "torch-norm-first" else x


def run(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """The numbers to look at, on the patch grid where the output is the tokens themselves."""
    family = FAMILIES[name]
    reduced = isinstance(getattr(model, "reducer", None), Reducer)
    if not family.dense or not reduced:
        return family.look(getattr(model, family.call)(x))
    with winnow.watch(model) as seen:
        out = family.look(model(x))
    out = out.transpose(0, 1) if name == "torch-norm-first" else out
    dense = torch.cat([out[:, : family.prefix], seen.ledger.dense(out[:, family.prefix :])], 1)
    return dense.transpose(0, 1) if name == "torch-norm-first" else dense


def one(x: Tensor, name: str, i: int) -> Tensor:
    return x[:, i : i + 1] if name == "torch-norm-first" else x[i : i + 1]


family = pytest.mark.parametrize("name", FAMILIES)


@family
@torch.no_grad()
def test_nothing_removed_changes_nothing(name):
    model, x = made(name), images(name)
    plain = run(model, name, x)
    out = run(winnow.reduce(model, ToMe(r=0)), name, x)
    assert torch.equal(out, plain) if FAMILIES[name].exact else close(out, plain, 2e-5, "identity") is None


@family
@torch.no_grad()
def test_counts_ways_and_batches(name):
    """Promised counts; all ways agree; an image does not depend on its batch; something does change."""
    x, plain = images(name), run(made(name), name, images(name).clone())
    for method in methods(FAMILIES[name]):
        outputs = {}
        for way in ("static", "masked", Padded(1), Padded(16)):
            if way == "static" and not method.facts.static:
                continue
            model = winnow.reduce(made(name), method, way)
            with winnow.watch(model) as seen:
                outputs[str(way)] = run(model, name, x)
                counts = seen.valid_counts
            setting = seat_of(model).setting
            grid = setting.grid or (6, 6)
            wanted = torch.tensor(method.counts(dataclasses.replace(setting, grid=grid)))
            assert bool((counts == wanted).all() if method.facts.static else (counts <= wanted).all()), (
                f"{way}: {counts}"
            )
            assert int(counts[:, -1].min()) < wanted[0], "nothing was removed"
        first, *others = outputs.values()
        assert not torch.equal(first, plain)
        for way, other in zip(list(outputs)[1:], others):
            close(other, first, 2e-5, f"{method}, {way} against {next(iter(outputs))}")
        model = winnow.reduce(made(name), method)
        alone = [run(model, name, one(x, name, i)) for i in range(3)]
        together = run(model, name, x)
        close(torch.cat(alone, 1 if name == "torch-norm-first" else 0), together, 1e-5, f"{method}, alone and together")


@family
@torch.no_grad()
def test_restore_is_exact(name):
    model, x = made(name), images(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    plain = run(model, name, x)
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    for method in methods(FAMILIES[name]):
        winnow.reduce(model, method)
        run(model, name, x)
        assert {key for key in model.state_dict() if not key.startswith("reducer.")} == set(state)
        winnow.restore(model)
        assert torch.equal(run(model, name, x), plain)
        assert {path: set(vars(module)) for path, module in model.named_modules()} == before
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@family
def test_copies_and_checkpoints(name):
    """A copy made after a training step is its own; checkpointing runs blocks twice and changes no gradient."""
    x, grads, calls = images(name), [], []
    for checkpoint in (False, True):
        model = winnow.reduce(made(name), ToMe(r=4)).train()
        if checkpoint and not FAMILIES[name].checkpoint:
            return
        if checkpoint:
            getattr(model, FAMILIES[name].checkpoint)()
        seen: list[int] = []
        norm = next(m for m in seat_of(model).host.blocks[1].modules() if isinstance(m, nn.LayerNorm))
        norm.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        run(model, name, x).square().mean().backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        calls.append(len(seen))
        twin = copy.deepcopy(model).eval()
        model.eval()
        with torch.no_grad():
            assert torch.equal(run(model, name, x), run(twin, name, x))
            winnow.restore(twin)
            assert hasattr(model, "reducer") and not hasattr(twin, "reducer")
    assert calls[1] == calls[0] + 1, "checkpointing did not run the block again"
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        close(grads[1][key], grad, 1e-5, key)


@family
@torch.no_grad()
def test_compiles_as_one_graph(name):
    if name in SAME_TO_A_COMPILER:
        pytest.skip("the compiler sees what it saw in another family")
    torch._dynamo.reset()
    model, x = winnow.reduce(made(name), ToMe(r=4)), images(name)
    call = getattr(model, FAMILIES[name].call)
    eager = FAMILIES[name].look(call(x))
    compiled = torch.compile(call if FAMILIES[name].call != "__call__" else model, backend="aot_eager", fullgraph=True)
    close(FAMILIES[name].look(compiled(x)), eager, 1e-5, "compiled against eager")
    torch._dynamo.reset()


class Called(nn.Module):
    """A model called by another of its methods."""

    def __init__(self, model: nn.Module, call: str) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor) -> Any:
        return getattr(self.model, self.call)(x)


@family
def test_macs_are_the_closed_form(name):
    model, x = made(name), images(name, 2)
    if FAMILIES[name].call != "__call__":
        counter: nn.Module = Called(model, FAMILIES[name].call)
    else:
        counter = model
    per = x.shape[0] / 2  # the counter divides by the first dimension
    if seat_grid(model):
        assert abs(count_macs(counter, x) * per / plain_macs(model) - 1) < 0.02
    winnow.reduce(model, ToMe(r=4))
    counted = count_macs(counter, x) * per
    with torch.no_grad(), winnow.watch(model) as seen:
        run(model, name, x)
        closed = closed_macs(model, seen.valid_counts)
    assert closed is not None
    assert abs(counted / float(closed[0]) - 1) < 0.02, (counted, closed)


def seat_grid(model: nn.Module) -> bool:
    from winnow.adapters import host_of

    return host_of(model).setting.grid is not None


@family
def test_class_attention_needs_a_class_token(name):
    if FAMILIES[name].cls:
        pytest.skip("has one")
    with pytest.raises(ValueError, match="has no class token"):
        winnow.reduce(made(name), EViT(layers=(1,)))


@pytest.mark.parametrize("name", ["eva02", "dinov3", "eva-mixed", "beit", "hf-dinov3"])
@torch.no_grad()
def test_a_wrong_position_is_noticed(name, monkeypatch):
    """Planted fault: tokens stand where they come in the row; static and masked runs must then disagree."""
    from winnow._run import Seat

    model, x = made(name), images(name)
    outputs = [run(winnow.reduce(copy.deepcopy(model), ToMe(r=4), way), name, x) for way in ("static", "masked")]
    close(*outputs, 2e-5, "right positions")
    monkeypatch.setattr(Seat, "places", _in_row)
    outputs = [run(winnow.reduce(copy.deepcopy(model), ToMe(r=4), way), name, x) for way in ("static", "masked")]
    with pytest.raises(AssertionError):
        close(*outputs, 1e-3, "wrong positions")


def _in_row(seat, tokens):
    batch, patches = tokens.ledger.owner.shape
    return None if tokens.n == patches else torch.arange(tokens.n).expand(batch, -1)


@torch.no_grad()
def test_pruned_dinov3_is_the_full_model_with_patches_masked():
    """Dropping patches before block 1 equals attention of timm's own model that may not look at them from block 1 on."""

    model, x = made("dinov3"), images("dinov3")
    winnow.reduce(model, NormThreshold(Below(1.0, of="mean"), before=(1,)), way=Padded(1))
    with winnow.watch(model) as seen:
        out = model(x)
    kept = seen.ledger.owner >= 0
    winnow.restore(model)
    mask = torch.cat([torch.ones(3, 3, dtype=torch.bool), kept], 1)[:, None, None].expand(-1, 1, 39, -1)
    y, rope = model._pos_embed(model.patch_embed(x))
    for i, block in enumerate(model.blocks):
        y = block(y, rope=rope, attn_mask=mask if i else None)
    close(out, model.forward_head(model.norm(y)), 2e-5, "pruned against masked by hand")


@torch.no_grad()
def test_beit_bias_follows_the_tokens():
    """The same for BEiT, whose bias is per pair."""

    model, x = made("beit-shared"), images("beit-shared")
    winnow.reduce(model, NormThreshold(Below(1.0, of="mean"), before=(1,)), way=Padded(1))
    with winnow.watch(model) as seen:
        out = model(x)
    hidden = torch.cat([torch.zeros(3, 1, dtype=torch.bool), seen.ledger.owner < 0], 1)
    winnow.restore(model)
    y = torch.cat([model.cls_token.expand(3, -1, -1), model.patch_embed(x)], 1) + model.pos_embed
    far = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))[:, None, None]
    for i, block in enumerate(model.blocks):
        y = block(y, shared_rel_pos_bias=model.rel_pos_bias() + (far if i else 0.0))
    close(out, model.forward_head(model.norm(y)), 2e-5, "pruned against masked by hand")


@torch.no_grad()
def test_class_attention_knows_the_position_bias():
    """EViT's score in BEiT's block 1 is the mean over heads of the class token's attention, bias included."""
    model, x = made("beit"), images("beit")
    y = torch.cat([model.cls_token.expand(3, -1, -1), model.patch_embed(x)], 1) + model.pos_embed
    y, block = model.blocks[0](y), model.blocks[1]
    qkv = nn.functional.linear(
        block.norm1(y), block.attn.qkv.weight, torch.cat((block.attn.q_bias, block.attn.k_bias, block.attn.v_bias))
    )
    q, k, _ = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    rows = (q @ k.transpose(-2, -1) * block.attn.scale + block.attn._get_rel_pos_bias()).softmax(-1)
    winnow.reduce(model, EViT(Keep(0.5), layers=(1,)))
    with winnow.watch(model) as seen:
        model(x)
    close(seen.scores[1], rows[:, :, 0, 1:].mean(1), 1e-5, "class attention")


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("beit", "fc_norm"),
        ("open_clip-avg", ""),
        ("hf-clip-classifier", "classifier"),
        ("hf-siglip-classifier", "classifier"),
        ("hf-dinov2", "classifier"),
        ("hf-dinov2-registers", "classifier"),
    ],
)
@torch.no_grad()
def test_means_weigh_merged_tokens(name, read):
    """What the head is given is the mean over patches, each counted once, whoever holds it."""
    model, x, seen_by = winnow.reduce(made(name), ToMe(r=4)), images(name), {}
    last = {"open_clip-avg": "ln_post", "hf-siglip-classifier": "vision_model.post_layernorm"}.get(name)
    last = {"hf-dinov2": "dinov2.layernorm", "hf-dinov2-registers": "dinov2_with_registers.layernorm"}.get(name, last)
    final = model.get_submodule(last) if last else seat_of(model).host.blocks[-1]
    final.register_forward_hook(lambda *found: seen_by.update(tokens=found[2]))
    if read:
        model.get_submodule(read).register_forward_pre_hook(lambda _, given: seen_by.update(pooled=given[0]))
    with winnow.watch(model) as seen:
        out = model(x)
    mean = seen.ledger.dense(seen_by["tokens"][:, seat_of(model).setting.prefix :]).mean(1)
    given = seen_by["pooled"][:, -WIDTH:] if read else out[0]
    close(given, mean if read else mean @ model.proj, 1e-5, "the head's mean")


@pytest.mark.parametrize(
    ("name", "path"), [("hf-siglip", "head"), ("open_clip-pooler", "attn_pool"), ("eva-mixed", "attn_pool")]
)
@torch.no_grad()
def test_attention_pooling_weighs_merged_tokens(name, path):
    """A merged token weighs as many keys as patches it holds: pooling it equals pooling its patches."""
    model, x, seen_by = winnow.reduce(made(name), ToMe(r=4)), images(name), {}
    head, prefix = model.get_submodule(path), seat_of(model).setting.prefix
    head.register_forward_hook(lambda _, given, out: seen_by.update(given=given[0], out=out))
    with winnow.watch(model) as seen:
        run(model, name, x)
    tokens, ledger = seen_by["given"], seen.ledger
    every = torch.cat([tokens[:, :prefix], ledger.dense(tokens[:, prefix:])], 1)
    out = seen_by["out"]
    winnow.restore(model)
    close(out, head(every), 1e-5, "pooled tokens against pooled patches")


def test_beit_holds_no_matrix_per_image(monkeypatch):
    """After a reduction no tensor of B x H x N x N is made, also not for the backward pass."""
    from winnow import attention

    model, x = winnow.reduce(made("beit"), ToMe(r=1)).train(), images("beit", 4)
    square = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.ndim == 4 and out.shape[0] == 4 and out.shape[-1] == out.shape[-2]:
                square.append(out.shape[-1])
            return out

    def sides(chunk: int) -> set[int]:
        square.clear()
        monkeypatch.setattr(attention, "CHUNK", chunk)
        with Watch():
            model(x).sum().backward()
        return set(square)

    assert sides(64) >= {36, 35}, "the watch sees nothing"
    assert not sides(8) & {36, 35}


@torch.no_grad()
def test_maps_are_spread_back():
    """forward_intermediates of every family that has it: maps of the whole grid, zero where a patch was dropped."""

    for name in ("dinov3", "beit", "open_clip-avg"):
        model, x = winnow.reduce(made(name), EViT(Keep(0.5), layers=(0,), fuse=False)), images(name)
        out = model.forward_intermediates(x, indices=2, intermediates_only=True)
        maps = out["image_intermediates"] if isinstance(out, dict) else out
        assert [m.shape for m in maps] == [(3, WIDTH, 6, 6)] * 2
        assert int((maps[1].abs().sum(1) == 0).sum()) == 3 * 18


@torch.no_grad()
def test_hugging_face_outputs_stay_what_they_were():
    model, x = made("hf-dinov2"), images("hf-dinov2")
    kind = type(model(x))
    winnow.reduce(model, ToMe(r=4))
    out = model(x, output_hidden_states=True)
    assert type(out) is kind
    assert [h.shape[1] for h in out.hidden_states] == [37, 33, 29, 25]
    assert isinstance(model(x, return_dict=False), tuple)
    with pytest.raises(ValueError, match="no attention weights"):
        model(x, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask"):
        model(x, attention_mask=torch.ones(3, 37))
    with pytest.raises(ValueError, match="attention_mask"):
        winnow.reduce(made("hf-vit-tokens"), ToMe(r=4))(x, None, None, torch.ones(3, 37))


@torch.no_grad()
def test_hugging_face_clip_still_scores_texts():
    model, x = made("hf-clip"), images("hf-clip")
    words = {"input_ids": torch.randint(0, 32, (2, 5)), "pixel_values": x}
    plain = model(**words).logits_per_image
    winnow.reduce(model, ToMe(r=4))
    out = model(**words).logits_per_image
    assert out.shape == plain.shape and not torch.equal(out, plain)


@torch.no_grad()
def test_downsampling_where_rotary_rows_can_be_made_anew():
    model, x = winnow.reduce(made("dinov3"), Downsample(24)), images("dinov3")
    with winnow.watch(model) as seen:
        assert bool(model(x).isfinite().all())
    assert len(set(seen.counts)) == 1 and seen.counts[0] == 9
    for name in ("eva02", "beit", "torch"):
        with pytest.raises(ValueError, match='acts at "input"'):
            winnow.reduce(made(name), Downsample(24))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("hf-") and name != "hf-vit-tokens"])
@torch.no_grad()
def test_downsampling_is_the_host_on_a_smaller_image(name):
    """What comes out is what the plain model makes of the smaller image, its positions resampled by its own function."""
    model, x = made(name), images(name)
    small = Downsample(24).build(DEPTH, WIDTH, HEADS, 36, 1)(x, (PATCH, PATCH))
    assert small.shape[-1] == 24
    words = {} if "dino" in name else {"interpolate_pos_encoding": True}
    plain = FAMILIES[name].look(getattr(model, FAMILIES[name].call)(small, **words))
    close(run(winnow.reduce(model, Downsample(24)), name, x), plain, 1e-6, name)


@torch.no_grad()
def test_downsampling_open_clip():
    """As open_clip itself would load the same weights into a smaller tower."""
    from open_clip.model import resize_pos_embed

    model, x = made("open_clip"), images("open_clip")
    small = Downsample(24).build(DEPTH, WIDTH, HEADS, 36, 1)(x, (PATCH, PATCH))
    smaller = open_clip_model(24).eval()
    state = model.state_dict()
    resize_pos_embed(state, smaller)
    smaller.load_state_dict(state)
    close(run(winnow.reduce(model, Downsample(24)), "open_clip", x), smaller.encode_image(small), 1e-5, "open_clip")


@torch.no_grad()
def test_open_clip_still_scores_texts():
    model, x = made("open_clip"), images("open_clip")
    text = torch.randint(0, 32, (3, 8))
    plain = model(x, text)
    winnow.reduce(model, ToMe(r=4))
    image, words, scale = model(x, text)
    assert torch.equal(words, plain[1]) and torch.equal(scale, plain[2]) and not torch.equal(image, plain[0])
    tower = made("open_clip").visual
    close(winnow.reduce(tower, ToMe(r=4))(x), model.encode_image(x), 1e-6, "the tower alone")


def test_encoder_padding():
    """A user's padding is left out by methods that decide per image and refused by the others."""
    model, x = made("torch"), images("torch")
    padding = torch.arange(36).expand(3, -1) >= torch.tensor([[20], [30], [36]])

    method = NormThreshold(Below(1.0, of="mean"), before=(1,))
    with torch.no_grad():
        for way in ("masked", Padded(1)):
            twin = winnow.reduce(copy.deepcopy(model), method, way)
            with winnow.watch(twin) as seen:
                out = twin(x, src_key_padding_mask=padding)
            assert bool((out[~seen.ledger.valid] == 0).all())
            alone = winnow.reduce(copy.deepcopy(model), method, way)(x[:1, :20])
            real = out[0][seen.ledger.valid[0]]
            close(real, alone[alone.abs().sum(-1) > 0], 1e-5, "padded against cut")
    winnow.reduce(model, ToMe(r=4))
    with pytest.raises(ValueError, match="would count padding"):
        model(x, src_key_padding_mask=padding)
    with pytest.raises(ValueError, match="no `mask`"):
        model(x, mask=torch.zeros(36, 36))


@torch.no_grad()
def test_the_fused_path_is_never_taken(monkeypatch):
    """In evaluation torch would run whole layers as one operator, reducer left out."""
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *_: pytest.fail("fused layer"))
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        model = winnow.reduce(made("torch"), ToMe(r=4))
        with winnow.watch(model) as seen:
            assert model(images("torch")).shape == (3, 24, WIDTH)
        assert seen.counts == [36, 32, 28, 24]
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


@pytest.mark.parametrize(
    "name", ["cait_xxs24_224", "swin_tiny_patch4_window7_224", "hiera_tiny_224", "levit_128s", "resnet18"]
)
def test_others_are_refused(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(TypeError, match=r"no vision transformer Winnow can reduce: .*Works: ") as error:
        winnow.reduce(model, ToMe(r=4))
    assert "\n" not in str(error.value)


def test_changed_subclasses_are_refused():
    from timm.models.beit import Beit
    from timm.models.eva import Eva

    class Other(Eva):
        def forward_features(self, x, attn_mask=None, is_causal=False):
            return x

    class Another(Beit):
        def forward_head(self, x, pre_logits=False):
            return x

    class Layer(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return x

    odd = nn.TransformerEncoder(Layer(WIDTH, HEADS), 2, enable_nested_tensor=False)
    for model in (Other(**vit_words()), Another(**vit_words()), odd):
        with pytest.raises(TypeError, match="changes"):
            winnow.reduce(model, ToMe(r=4))
