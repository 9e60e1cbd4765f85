"""How timm's transformer blocks are taken apart: pre-norm, post-norm and parallel.

timm 1.0, vision_transformer.py and layers/attention.py; sub-modules are borrowed in the order its forwards call them.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from .._host import BlockView


def linear_macs(module: nn.Module | None) -> float:
    """MACs per token of all linear layers inside."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear)] if module is not None else []
    return float(sum(layer.weight.numel() for layer in layers))


class SelfAttention:
    """timm's Attention: q/k norm, scale norm, sigmoid gate."""

    def qkv(self, attn: Any, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        gate = attn.gate(y).sigmoid() if attn.gate is not None else None
        qkv = attn.qkv(y).reshape(*y.shape[:2], 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return attn.q_norm(q), attn.k_norm(k), v, gate

    def options(self, attn: Any) -> dict[str, Any]:
        dropout = attn.attn_drop.p if attn.training else 0.0
        return {"dropout": dropout, "path": "auto" if attn.fused_attn else "math"}

    def out(self, attn: Any, o: Tensor, gate: Tensor | None) -> Tensor:
        x = attn.norm(o.transpose(1, 2).flatten(2))
        return attn.proj_drop(attn.proj(x if gate is None else x * gate))

    def macs(self, attn: Any, n: int) -> float:
        return linear_macs(attn) * n + 2 * attn.attn_dim * n * n


class PreNorm(BlockView):
    """timm's Block: x + ls1(attn(norm1 x)), x + ls2(mlp(norm2 x))."""

    attention = SelfAttention()

    def qkv(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        return self.attention.qkv(block.attn, block.norm1(x))

    def options(self, block: Any) -> dict[str, Any]:
        return self.attention.options(block.attn)

    def out(self, block: Any, o: Tensor, extra: Any) -> Tensor:
        return block.drop_path1(block.ls1(self.attention.out(block.attn, o, extra)))

    def mlp(self, block: Any, x: Tensor) -> Tensor | None:
        return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def macs(self, block: Any, n_attn: int, n_mlp: int) -> float:
        return self.attention.macs(block.attn, n_attn) + linear_macs(block.mlp) * n_mlp


class PostNorm(PreNorm):
    """timm's ResPostBlock: the norm comes after attention and MLP."""

    def qkv(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        return self.attention.qkv(block.attn, x)

    def out(self, block: Any, o: Tensor, extra: Any) -> Tensor:
        return block.drop_path1(block.norm1(self.attention.out(block.attn, o, extra)))

    def mlp(self, block: Any, x: Tensor) -> Tensor | None:
        return block.drop_path2(block.norm2(block.mlp(x)))


class ParallelScaling(BlockView):
    """timm's ParallelScalingBlock: attention and MLP side by side, so a reduction shows from the next block on."""

    def qkv(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        hidden, q, k, v = torch.split(block.in_proj(block.in_norm(x)), block.in_split, dim=-1)
        if block.mlp_bias is not None:
            hidden = hidden + block.mlp_bias
        q, k, v = (t.unflatten(-1, (block.num_heads, block.head_dim)) for t in (q, k, v))
        return block.q_norm(q).transpose(1, 2), block.k_norm(k).transpose(1, 2), v.transpose(1, 2), hidden

    def options(self, block: Any) -> dict[str, Any]:
        dropout = block.attn_drop.p if block.training else 0.0
        return {"dropout": dropout, "path": "auto" if block.fused_attn else "math"}

    def out(self, block: Any, o: Tensor, extra: Any) -> Tensor:
        x = o.transpose(1, 2).flatten(2)
        hidden = block.mlp_drop(block.mlp_act(extra))
        if block.out_proj is not None:
            y = block.out_proj(torch.cat((x, hidden), dim=-1))
        else:
            y = block.attn_out_proj(x) + block.mlp_out_proj(hidden)
        return block.drop_path(block.ls(y))

    def mlp(self, block: Any, x: Tensor) -> Tensor | None:
        return None

    def macs(self, block: Any, n_attn: int, n_mlp: int) -> float:
        return linear_macs(block) * n_attn + 2 * block.num_heads * block.head_dim * n_attn * n_attn


class ParallelThings(BlockView):
    """timm's ParallelThingsBlock: several attentions side by side (run as more heads), then several MLPs."""

    attention = SelfAttention()

    def qkv(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        parts = [self.attention.qkv(one.attn, one.norm(x)) for one in block.attns]
        q, k, v = (torch.cat([part[i] for part in parts], 1) for i in range(3))
        return q, k, v, [part[3] for part in parts]

    def options(self, block: Any) -> dict[str, Any]:
        return self.attention.options(block.attns[0].attn)

    def out(self, block: Any, o: Tensor, extra: Any) -> Tensor:
        each = zip(block.attns, o.chunk(len(block.attns), 1), extra)
        outs = [one.drop_path(one.ls(self.attention.out(one.attn, part, gate))) for one, part, gate in each]
        return torch.stack(outs).sum(dim=0)

    def mlp(self, block: Any, x: Tensor) -> Tensor | None:
        return torch.stack([ffn(x) for ffn in block.ffns]).sum(dim=0)

    def macs(self, block: Any, n_attn: int, n_mlp: int) -> float:
        attention = sum(self.attention.macs(one.attn, n_attn) for one in block.attns)
        return attention + linear_macs(block.ffns) * n_mlp


VIEWS: dict[Any, BlockView] = {
    vit.Block.forward: PreNorm(),
    vit.ResPostBlock.forward: PostNorm(),
    vit.ParallelScalingBlock.forward: ParallelScaling(),
    vit.ParallelThingsBlock.forward: ParallelThings(),
}
"""By the forward itself, so that a subclass that changes it is refused instead of miscomputed."""


def _attentions(block: Any) -> list[Any]:
    if hasattr(block, "attns"):
        return [one.attn for one in block.attns]
    return [block.attn] if hasattr(block, "attn") else []


def view(block: nn.Module) -> BlockView:
    """The view of this kind of block; TypeError for kinds not known."""
    if "forward" in block.__dict__:
        raise TypeError(f"the forward of a {type(block).__name__} was replaced by something else: undo that first")
    odd = [a for a in _attentions(block) if type(a).forward is not Attention.forward]
    if type(block).forward not in VIEWS or odd:
        raise TypeError(f"{type(odd[0] if odd else block).__name__} is a kind of block Winnow does not know")
    return VIEWS[type(block).forward]


def heads(block: Any) -> int:
    """Attention heads of a block."""
    attentions = _attentions(block)
    return sum(a.num_heads for a in attentions) if attentions else block.num_heads
