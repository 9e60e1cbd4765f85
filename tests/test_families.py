"""timm VisionTransformers of every kind, cut to three blocks: nothing removed changes nothing; the rest is counted."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import timm
import torch
from timm.layers import Attention
from timm.models import vision_transformer as vits
from torch import nn

import winnow
from winnow import EViT, Keep, NormThreshold, Padded, ToMe, TopK

SMALL = {"embed_dim": 48, "num_heads": 4, "num_classes": 6}
MODELS = {
    "vit_tiny_patch16_224": {"img_size": 96},
    "deit_tiny_distilled_patch16_224": {"img_size": 96},
    "deit3_small_patch16_224": {"img_size": 96},
    "vit_small_patch14_dinov2": {"img_size": 84},
    "vit_small_patch14_reg4_dinov2": {"img_size": 84},
    "vit_so150m2_patch16_reg1_gap_256": {"img_size": 96},
    "vit_betwixt_patch16_reg4_gap_256": {"img_size": 96},
    "vit_base_patch32_clip_224": {},
    "vit_base_patch16_siglip_224": {"img_size": 96},
    "aimv2_large_patch14_224": {"img_size": 84},
    "vit_small_patch16_18x2_224": {"img_size": 96},
    "vit_pwee_patch16_reg1_gap_256": {"img_size": 96},
    "vit_base_patch16_rpn_224": {"img_size": 96},
    "vit_so150m_patch16_reg4_map_256": {"img_size": 96},
    "vit_base_patch16_224_miil": {"img_size": 96},
}


@cache
def _built(name):
    torch.manual_seed(0)
    words = {key: value for key, value in SMALL.items() if not (key == "num_heads" and "so150m" in name)}
    if "so150m" in name:
        words |= {"embed_dim": 64, "num_heads": 1}
    model = timm.create_model(name, **words, **MODELS[name])
    model.blocks = model.blocks[:3]
    for key, parameter in model.named_parameters():
        if any(part in key for part in (".ls1", ".ls2", ".ls.", "gamma")):
            nn.init.normal_(parameter, 1.0, 0.1)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, 0.0, 0.1)
        else:  # biases start at 0 and norms at 1, which hides what forgets them
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def build(name):
    return copy.deepcopy(_built(name))


def inputs(model, b=2):
    return torch.randn(b, 3, *model.patch_embed.img_size)


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


def test_nothing_removed_changes_nothing(model):
    x = inputs(model)
    with torch.no_grad():
        plain, features = model(x), model.forward_features(x)
        assert float(plain.std()) > 1e-3, "numb"
        for method in (ToMe(r=0), EViT(keep=Keep(1.0), layers=(1,), attention="received")):
            with winnow.reduced(model, method), winnow.watch(model) as run:
                assert torch.equal(model(x), plain) and torch.equal(model.forward_features(x), features)
            assert len(set(run.counts)) == 1


def test_masking_nothing_changes_nothing(model):
    """The same through the mask and the padded kernels: another path, the same numbers."""
    x = inputs(model)
    with torch.no_grad():
        plain = model(x)
        for way in ("masked", Padded(11)):
            with winnow.reduced(model, ToMe(r=0), way):
                torch.testing.assert_close(model(x), plain, atol=2e-5 * max(1, float(plain.abs().max())), rtol=0)


def test_four_fewer_per_block_and_back(model):
    x, keys = inputs(model), set(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        plain = model(x)
        winnow.reduce(model, ToMe(r=4))
        with winnow.watch(model) as run:
            out = model(x)
        assert set(model.state_dict()) == keys
        patches = model.patch_embed.num_patches
        assert run.counts == [patches - 4 * i for i in range(4)]
        assert run.ledger.owner.shape == (2, patches)
        assert out.shape == plain.shape and torch.isfinite(out).all() and not torch.equal(out, plain)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), out)
        alone = torch.cat([model(image[None]) for image in x])
        torch.testing.assert_close(alone, out, atol=1e-4, rtol=1e-4)
        winnow.restore(model)
        assert torch.equal(model(x), plain) and set(model.state_dict()) == keys
        assert torch.equal(twin(x), out), "restoring one leaves the copy reduced"
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_ways_agree(model):
    x = inputs(model)
    for method in (ToMe(r=4), NormThreshold(before=(1, 2)), TopK(keep=Keep(0.5), layers=(1,), attention="received")):
        outputs = []
        for way in ("auto", "masked", Padded(1)):
            with torch.no_grad(), winnow.reduced(model, method, way):
                outputs.append(model(x))
        for output in outputs[1:]:
            torch.testing.assert_close(output, outputs[0], atol=2e-5 * max(1, float(output.abs().max())), rtol=0)


def test_class_attention_or_its_refusal(model):
    method = EViT(keep=Keep(0.5), layers=(1,))
    if not model.has_class_token:
        with pytest.raises(
            ValueError, match=r'has no class token\. Use ToMe or NormThreshold, or attention="received"'
        ):
            winnow.reduce(model, method)
        assert not hasattr(model, "reducer")
        return
    winnow.reduce(model, method)
    patches = model.patch_embed.num_patches
    with torch.no_grad(), winnow.watch(model) as run:
        model(inputs(model))
    assert run.counts == [patches, patches, -(-patches // 2) + 1, -(-patches // 2) + 1]
    assert run.scores[1].shape == (2, patches)


def test_class_attention_is_the_hosts_own():
    """The one extra query row equals the first row of the attention matrix the unfused host computes."""
    for name in ("vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "deit_tiny_distilled_patch16_224"):
        model = build(name)
        x, seen = inputs(model), []
        for block in model.blocks:
            block.attn.fused_attn = False
        hook = model.blocks[1].attn.attn_drop.register_forward_hook(
            lambda m, args, out, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            model(x)
        hook.remove()
        prefix = model.num_prefix_tokens
        with torch.no_grad(), winnow.reduced(model, EViT(layers=(1,))), winnow.watch(model) as run:
            model(x)
        wanted = seen[0][:, :, 0, prefix:].mean(1)
        torch.testing.assert_close(run.scores[1], wanted, atol=1e-6, rtol=1e-4)


def test_gradients_with_and_without_checkpointing(model):
    x, grads = inputs(model), []
    for checkpoint in (False, True):
        one = copy.deepcopy(model).train()
        winnow.reduce(one, ToMe(r=4))
        one.set_grad_checkpointing(checkpoint)
        torch.manual_seed(1)
        one(x).square().mean().backward()
        grads.append({name: p.grad for name, p in one.named_parameters()})
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None), name
        if grad is not None:
            torch.testing.assert_close(grads[1][name], grad, atol=1e-5 * max(1, float(grad.abs().max())), rtol=1e-4)


def test_merging_copies_is_exact(model):
    """An image of one repeated patch, positions removed: merged tokens stand for their copies exactly, in any family.

    This is what proportional attention and size-weighted pooling promise; it fails where a family forgets either.
    """
    if model.pos_embed is not None:
        model.pos_embed.data[:, -model.patch_embed.num_patches :] = 0.3
    h, w = model.patch_embed.patch_size
    gh, gw = model.patch_embed.grid_size
    kinds = torch.randn(2, 3, 3, h, w)
    rows = torch.cat([kinds[:, i % 3] for i in range(gw)], -1)  # columns of three kinds
    x = torch.cat([rows] * gh, -2)
    with torch.no_grad():
        plain = model(x)
        with winnow.reduced(model, ToMe(r=6)), winnow.watch(model) as run:
            out = model(x)
    assert run.counts[-1] == gh * gw - 18
    torch.testing.assert_close(out, plain, atol=5e-4 * max(1, float(plain.abs().max())), rtol=0)


# ---- refusals


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "hiera_tiny_224", "levit_128s", "resnet18", "naflexvit_base_patch16_gap"]
)
def test_other_architectures_are_refused(name):
    model = timm.create_model(name)
    before = set(vars(model))
    with pytest.raises((TypeError, ValueError)) as caught:
        winnow.reduce(model, ToMe(r=4))
    message = str(caught.value)
    assert type(model).__name__ in message and "\n" not in message
    assert "timm VisionTransformer" in message and 'blocks="encoder.layers"' in message, message
    assert set(vars(model)) == before


class OtherFeatures(vits.VisionTransformer):
    def forward_features(self, x, attn_mask=None, is_causal=False):
        return super().forward_features(x) * 2


class OtherPool(vits.VisionTransformer):
    def pool(self, x, pool_type=None):
        return x.median(1).values


class OtherHead(vits.VisionTransformer):
    def forward_head(self, x, pre_logits=False):
        return self.head(x[:, 1:].mean(1))


class OtherBlock(vits.Block):
    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x) + x


class OtherAttention(Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x) * 2


class QuietBlock(vits.Block):
    """Adds nothing to the forward: fine."""

    extra = 3


def tiny(cls=vits.VisionTransformer, **words):
    return cls(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=3, **words).eval()


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (OtherFeatures, "OtherFeatures changes forward_features of timm's VisionTransformer"),
        (OtherPool, "OtherPool changes pool of timm's VisionTransformer"),
        (OtherHead, "OtherHead changes forward_head of timm's VisionTransformer"),
    ],
)
def test_subclasses_that_change_a_forward_are_refused(cls, message):
    with pytest.raises(TypeError, match=message):
        winnow.reduce(tiny(cls), ToMe(r=2))


def test_blocks_that_change_their_forward_are_refused():
    with pytest.raises(TypeError, match="OtherBlock is a kind of block Winnow does not know"):
        winnow.reduce(tiny(block_fn=OtherBlock), ToMe(r=2))
    model = tiny()
    model.blocks[1].attn = OtherAttention(24, 2)
    with pytest.raises(TypeError, match="OtherAttention is a kind of block Winnow does not know"):
        winnow.reduce(model, ToMe(r=2))
    assert all("forward" not in vars(module) for module in model.modules())
    x = torch.randn(1, 3, 32, 32)
    model = tiny(block_fn=QuietBlock)
    with torch.no_grad():
        plain = model(x)
        assert torch.equal(winnow.reduce(model, ToMe(r=0))(x), plain)


def test_differential_attention_is_refused():
    """Two softmaxes per head: not taken apart yet."""
    model = timm.create_model("vit_dpwee_patch16_reg1_gap_256", num_classes=3)
    with pytest.raises(TypeError, match="DiffParallelScalingBlock is a kind of block Winnow does not know"):
        winnow.reduce(model, ToMe(r=4))


def test_a_pooling_head_that_knows_places_is_refused():
    from timm.layers import AttentionPoolLatent

    model = tiny(class_token=False, global_pool="map")
    model.attn_pool = AttentionPoolLatent(24, num_heads=2, pos_embed="abs", feat_size=16)
    with pytest.raises(TypeError, match="mixes all tokens by place: use global_pool='avg' or 'token'"):
        winnow.reduce(model, ToMe(r=2))
