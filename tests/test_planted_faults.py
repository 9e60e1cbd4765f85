"""A broken twin for every check of the contract: a check that nobody has seen fail is not a check.

Each twin is a good method (or the library) with one realistic mistake; the good one passes the same check.
"""

from __future__ import annotations

import copy
import dataclasses
from contextlib import suppress

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import winnow
from winnow import DRIP, Below, EViT, Grid, Keep, NormThreshold, Random, ToMe, TopK, _parse, _run, _save
from winnow.adapters import timm_vit
from winnow.checks import CHECKS, check_method
from winnow.measure.closed_form import check_counted
from winnow.methods import drip
from winnow.methods.drip import DRIPReducer
from winnow.methods.evit import EViTReducer
from winnow.methods.norm_threshold import NormThresholdReducer
from winnow.methods.random import RandomReducer
from winnow.methods.tome import ToMeReducer
from winnow.methods.topk import TopKReducer
from winnow.parts.choose import top
from winnow.parts.combine import drop, take, total
from winnow.reducer import Facts

FAULTS: list = []
TOPK = TopK(keep=Keep(0.5), layers=(1,))
TOME = ToMe(r=16)
EVIT = EViT(keep=Keep(0.5), layers=(1,))
NORM = NormThreshold(below=Below(1.0, of="mean"), before=(1, 2))
DRIPPED = DRIP(rate=0.25, after=1)


def fault(check: str, message: str, good):
    """Registers `plant(monkeypatch) -> broken method`; `message` is a pattern of what the check must say."""

    def register(plant):
        FAULTS.append(pytest.param(check, message, good, plant, id=f"{check}-{plant.__name__}"))
        return plant

    return register


def twin(good, reducer=None, **members):
    """The same settings under a class that differs in its reducer or in the members given."""
    cls = type(f"Broken{type(good).__name__}", (type(good),), members)
    if reducer is not None:
        cls.build = lambda self, depth, width, heads, patches, prefix: (
            reducer(self, depth, patches, prefix)
            if issubclass(reducer, ToMeReducer)
            else reducer(self, patches, prefix)
        )
    return cls(**{field.name: getattr(good, field.name) for field in dataclasses.fields(good)})


# ---- ledger


@fault("ledger_is_sound", "an owner is not a token", TOPK)
def forgets_to_renumber_the_survivors(monkeypatch):
    class Broken(TopKReducer):
        def forward(self, tokens, signals, layer):
            score = self.score(tokens, signals, layer)
            kept = top(score, self.count(tokens.n, layer))
            move = torch.full_like(score, -1, dtype=torch.long).scatter(1, kept, kept)
            return tokens.moved(take(tokens.x, kept), move, kept.shape[1])

    return twin(TOPK, Broken)


@fault("ledger_is_sound", "tokens, the ledger says", TOPK)
def removes_features_but_says_nothing(monkeypatch):
    class Broken(TopKReducer):
        def forward(self, tokens, signals, layer):
            out = super().forward(tokens, signals, layer)
            return dataclasses.replace(tokens, x=out.x)

    return twin(TOPK, Broken)


@fault("ledger_is_sound", "a merging method dropped a patch", TOME)
def drops_the_sources_instead_of_merging(monkeypatch):
    class Broken(ToMeReducer):
        def forward(self, tokens, signals, layer):
            m = self.count(tokens.n, layer)
            return drop(tokens, top(tokens.x.detach().norm(dim=-1), m)) if m < tokens.n else tokens

    return twin(TOME, Broken)


@fault("ledger_is_sound", "a real token holds no patch, or padding holds one", NORM)
def padding_keeps_its_patches(monkeypatch):
    class Broken(NormThresholdReducer):
        def forward(self, tokens, signals, layer):
            out = super().forward(tokens, signals, layer)
            return dataclasses.replace(
                out, ledger=dataclasses.replace(tokens.ledger, valid=out.ledger.valid), score=None
            )

    return twin(NORM, Broken)


@fault("ledger_is_sound", "owners are torch.int32", TOPK)
def saves_memory_on_the_owners(monkeypatch):
    class Broken(TopKReducer):
        def forward(self, tokens, signals, layer):
            out = super().forward(tokens, signals, layer)
            return dataclasses.replace(out, ledger=dataclasses.replace(out.ledger, owner=out.ledger.owner.int()))

    return twin(TOPK, Broken)


@fault("count_is_as_promised", "2 tokens became 2, promised 1", TOPK)
def keeps_one_token_too_many(monkeypatch):
    class Broken(TopKReducer):
        def forward(self, tokens, signals, layer):
            score = self.score(tokens, signals, layer)
            return drop(tokens, top(score, min(tokens.n, self.count(tokens.n, layer) + 1)))

    return twin(TOPK, Broken)


@fault("count_is_as_promised", "of 1 tokens none is left", NORM)
def may_drop_every_token(monkeypatch):
    class Broken(NormThresholdReducer):
        def forward(self, tokens, signals, layer):
            keep = self.score(tokens) > self.score(tokens).mean(1, keepdim=True) + (0 if tokens.n > 2 else 1)
            from winnow.parts.combine import mask

            return mask(tokens, keep)

    return twin(NORM, Broken)


@fault("survivors_in_raster_order", "not in the order of their first patches", TOPK)
def leaves_survivors_in_score_order(monkeypatch):
    class Broken(TopKReducer):
        def forward(self, tokens, signals, layer):
            score = self.score(tokens, signals, layer)
            return drop(tokens, score.topk(self.count(tokens.n, layer), dim=1).indices)

    return twin(TOPK, Broken)


@fault("survivors_in_raster_order", "not in the order of their first patches", EVIT)
def puts_the_fused_token_last(monkeypatch):
    class Broken(EViTReducer):
        def forward(self, tokens, signals, layer):
            kept = self.method.kept(tokens.n, layer, self.patches)
            if kept == tokens.n:
                return tokens
            score = signals.cls_row.mean(1)
            index = top(score, kept)
            place = torch.arange(kept).expand_as(index)
            move = torch.full_like(score, kept, dtype=torch.long).scatter(1, index, place)
            return tokens.moved(total(tokens.x, score, move, kept + 1), move, kept + 1)

    return twin(EVIT, Broken)


# ---- values


@fault("features_are_kept_or_averaged", 'features are not "mean"', TOME)
def forgets_sizes_in_the_mean(monkeypatch):
    class Broken(ToMeReducer):
        def forward(self, tokens, signals, layer):
            out = super().forward(tokens, signals, layer)
            # where every token of `tokens` went, from the two ledgers
            move = torch.stack([o[t.argsort(stable=True)] for o, t in zip(*self._firsts(tokens, out))])
            members = torch.zeros(move.shape[0], out.n).scatter_add(1, move, torch.ones(move.shape))
            x = total(tokens.x, torch.ones(move.shape), move, out.n) / members.unsqueeze(-1)
            return dataclasses.replace(out, x=x)

        def _firsts(self, tokens, out):
            first = tokens.ledger.first()
            return out.ledger.owner.gather(1, first), torch.arange(tokens.n).expand_as(first)

    return twin(TOME, Broken)


@fault("features_are_kept_or_averaged", 'features are not "none"', TOPK)
def weighs_survivors_by_their_score(monkeypatch):
    class Broken(TopKReducer):
        def forward(self, tokens, signals, layer):
            score = self.score(tokens, signals, layer)
            gated = dataclasses.replace(tokens, x=tokens.x * score.unsqueeze(-1) * tokens.n)
            return super().forward(gated, signals, layer)

    return twin(TOPK, Broken)


@fault("identical_tokens_stay_finite", "tokens all 1.0 become infinite or NaN", EVIT)
def standardises_scores_without_an_epsilon(monkeypatch):
    class Broken(EViTReducer):
        def forward(self, tokens, signals, layer):
            row = signals.cls_row
            row = (row - row.mean(-1, keepdim=True)) / row.std(-1, keepdim=True)
            return super().forward(tokens, dataclasses.replace(signals, cls_row=row), layer)

    return twin(EVIT, Broken)


@fault("identical_tokens_stay_finite", "tokens all 0.0 become infinite or NaN", EVIT)
def divides_by_the_norm(monkeypatch):
    class Broken(EViTReducer):
        def forward(self, tokens, signals, layer):
            row = signals.cls_row / tokens.x.detach().norm(dim=-1).unsqueeze(1)
            return super().forward(tokens, dataclasses.replace(signals, cls_row=row), layer)

    return twin(EVIT, Broken)


@fault("dtype_is_kept", "torch.bfloat16 became torch.float32", TOPK)
def leaves_float_in(monkeypatch):
    class Broken(TopKReducer):
        def forward(self, tokens, signals, layer):
            return super().forward(dataclasses.replace(tokens, x=tokens.x.float()), signals, layer)

    return twin(TOPK, Broken)


# ---- batch


@fault("reducer_ignores_batch_mates", "alone and in a batch", TOPK)
def averages_the_score_over_the_batch(monkeypatch):
    class Broken(TopKReducer):
        def score(self, tokens, signals, layer):
            score = super().score(tokens, signals, layer)
            return score.mean(0, keepdim=True).expand_as(score)

    return twin(TOPK, Broken)


@fault("reducer_ignores_batch_mates", "alone and in a batch", NORM)
def takes_the_threshold_from_the_batch(monkeypatch):
    class Broken(NormThresholdReducer):
        def _limit(self, score, valid, layer):
            return super()._limit(score.reshape(1, -1), None, layer)

    return twin(NORM, Broken)


@fault("model_ignores_batch_mates", "outputs alone and in a batch", NORM)
def the_head_averages_padding_too(monkeypatch):
    monkeypatch.setattr(timm_vit, "_pool", lambda slot, x, kind=None: type(slot.module).pool(slot.module, x, kind))
    return NORM


@fault("model_ignores_batch_mates", "outputs alone and in a batch", NORM)
def attention_sees_padding(monkeypatch):
    monkeypatch.setattr(_run, "log_sizes", lambda ledger, prefix, sizes: None)
    return NORM


@fault("evaluation_is_repeatable", "two forwards of the same images differ", Random(layers=(1,)))
def reads_torch_rand(monkeypatch):
    class Broken(RandomReducer):
        def score(self, tokens, signals, layer):
            return torch.rand_like(signals.noise)

    return twin(Random(layers=(1,)), Broken)


@fault("evaluation_is_repeatable", "the global random generator was used", TOPK)
def breaks_ties_with_the_global_generator(monkeypatch):
    class Broken(TopKReducer):
        def score(self, tokens, signals, layer):
            score = super().score(tokens, signals, layer)
            return score + 0 * torch.rand_like(score)

    return twin(TOPK, Broken)


@fault("ways_agree", r"Padded\(1\) against masked", NORM)
def takes_the_mean_over_padding(monkeypatch):
    class Broken(NormThresholdReducer):
        def _limit(self, score, valid, layer):
            return super()._limit(score, None, layer)

    return twin(NORM, Broken)


@fault("ways_agree", "masked against static", TOME)
def padding_weighs_like_a_token(monkeypatch):
    real = _run.log_sizes

    def log_sizes(ledger, prefix, sizes):
        bias = real(ledger, prefix, sizes)
        return bias if bias is None else bias.clamp_min(0)

    monkeypatch.setattr(_run, "log_sizes", log_sizes)
    return TOME


# ---- gradients


@fault("gradient_reaches_the_input", "surviving patches get no gradient", TOME)
def detaches_the_merged(monkeypatch):
    class Broken(ToMeReducer):
        def forward(self, tokens, signals, layer):
            out = super().forward(tokens, signals, layer)
            alone = (out.ledger.size() == 1).unsqueeze(-1)
            return dataclasses.replace(out, x=torch.where(alone, out.x, out.x.detach()))

    return twin(TOME, Broken)


@fault("gradient_reaches_the_input", "does not require grad", TOPK)
def decides_and_moves_under_no_grad(monkeypatch):
    class Broken(TopKReducer):
        @torch.no_grad()
        def forward(self, tokens, signals, layer):
            return super().forward(tokens, signals, layer)

    return twin(TOPK, Broken)


class Scorer(TopKReducer):
    """A sound learned method to break: survivors are gated by a learned score."""

    def __init__(self, method, patches=None, prefix=0):
        super().__init__(method, patches, prefix)
        self.gate = nn.Linear(32, 1)

    def forward(self, tokens, signals, layer):
        gated = dataclasses.replace(tokens, x=tokens.x * self.gate(tokens.x).sigmoid())
        return super().forward(gated, signals, layer)


def learned(reducer):
    facts = property(lambda self: Facts(needs=frozenset({"cls_attention"}), learned=True, combine="other"))
    return twin(TOPK, reducer, facts=facts)


LEARNED = learned(Scorer)


@fault("gradient_reaches_every_weight", "task loss: no gradient for unused", LEARNED)
def has_an_unused_weight(monkeypatch):
    class Broken(Scorer):
        def __init__(self, method, patches=None, prefix=0):
            super().__init__(method, patches, prefix)
            self.unused = nn.Parameter(torch.zeros(3))

    return learned(Broken)


@fault("gradient_reaches_every_weight", "task loss: no gradient for gate", LEARNED)
def thresholds_without_straight_through(monkeypatch):
    class Broken(Scorer):
        def forward(self, tokens, signals, layer):
            hard = (self.gate(tokens.x).sigmoid() > 0.5).float()
            return TopKReducer.forward(self, dataclasses.replace(tokens, x=tokens.x * hard), signals, layer)

    return learned(Broken)


@fault("gradient_reaches_every_weight", "rate loss: no gradient for gate", LEARNED)
def the_rate_loss_counts_hard_tokens(monkeypatch):
    class Broken(Scorer):
        def loss(self):
            return {"rate": (self.gate.weight.detach() * 0 + 1).sum() + 0 * self.gate.bias.sum()}

    return learned(Broken)


@fault("checkpointing_changes_nothing", "Recomputed values|checkpointing", ToMe(r=(16, 9, 2)))
def counts_its_own_layers(monkeypatch):
    """The layer from a counter on the module: the second run of a checkpointed block is another layer."""

    class Broken(ToMeReducer):
        calls = 0

        def forward(self, tokens, signals, layer):
            self.calls += 1
            return super().forward(tokens, signals, (self.calls - 1) % self.depth)

    return twin(ToMe(r=(16, 9, 2)), Broken)


def drips(reducer, good=DRIPPED):
    build = lambda self, depth, width, heads, patches, prefix: reducer(self, width, patches, prefix)  # noqa: E731
    return twin(good, build=build)


@fault("gradient_reaches_every_weight", "boundary loss: no gradient for predictors", DRIPPED)
def the_rate_loss_rounds_soft_counts(monkeypatch):
    """Document 000's critical bug."""

    class Broken(DRIPReducer):
        def _losses(self, logit, soft, hard, *more):
            rounded = (soft.sum(1, keepdim=True).round() / soft.shape[1]).expand_as(soft)
            return super()._losses(logit, soft, rounded, *more)

    return drips(Broken)


@fault("gradient_reaches_every_weight", "task loss: no gradient for predictors", DRIPPED)
def boundaries_are_made_whole_numbers_before_pooling(monkeypatch):
    """What the later DRIP code does: the task never reaches the predictor."""
    real = drip.segments
    monkeypatch.setattr(drip, "segments", lambda tokens, ends, *a, **k: real(tokens, ends.long().float(), *a, **k))
    return DRIPPED


@fault("model_ignores_batch_mates", "outputs alone and in a batch", DRIPPED)
def training_noise_follows_the_place_in_the_batch(monkeypatch):
    def noise(self, layer, n):
        return _run.uniform(torch.arange(len(self.run.key)), layer, n)

    monkeypatch.setattr(_run.Seat, "_noise", noise)
    return DRIPPED


@fault("ways_agree", "masked against static", DRIPPED)
def training_noise_follows_the_way(monkeypatch):
    def noise(self, layer, n):
        return _run.uniform(self.run.key, layer + 64 * (self.run.way == "masked"), n)

    monkeypatch.setattr(_run.Seat, "_noise", noise)
    return DRIPPED


@fault("ways_agree", "losses, masked against static", DRIPPED)
def the_loss_counts_padding(monkeypatch):
    class Broken(DRIPReducer):
        def loss(self):
            return {"rate": self.seat.run.valid_counts[:, -1].float().mean() / self.seat.run.counts[-1]}

    return drips(Broken)


@fault("checkpointing_changes_nothing", "gradients with and without checkpointing", DRIPPED)
def draws_by_its_own_counter(monkeypatch):
    class Broken(DRIPReducer):
        draws = 0

        def forward(self, tokens, signals, layer):
            self.draws += 1
            noise = (signals.noise + 0.37 * self.draws).remainder(1)
            return super().forward(tokens, dataclasses.replace(signals, noise=noise), layer)

    return drips(Broken)


@fault("copies_after_training", "graph leaves", DRIPPED)
def keeps_its_losses_on_the_module(monkeypatch):
    class Broken(DRIPReducer):
        def forward(self, tokens, signals, layer):
            out = super().forward(tokens, signals, layer)
            self.last = out.losses
            return out

    return drips(Broken)


@fault("copies_after_training", "graph leaves", LEARNED)
def keeps_a_graph_tensor_on_the_module(monkeypatch):
    class Broken(Scorer):
        def forward(self, tokens, signals, layer):
            out = super().forward(tokens, signals, layer)
            self.last = out.x
            return out

    return learned(Broken)


@fault("copies_after_training", "the copy gives another output", LEARNED)
def state_on_the_module_feeds_the_next_forward(monkeypatch):
    class Broken(Scorer):
        seen = 0

        def forward(self, tokens, signals, layer):
            self.seen += 1  # a moving statistic that evaluation moves too
            return super().forward(dataclasses.replace(tokens, x=tokens.x * (1 + 0.1 * self.seen)), signals, layer)

        def __deepcopy__(self, memo):
            fresh = Broken(self.method, self.patches, self.prefix)
            fresh.load_state_dict(self.state_dict())
            memo[id(self)] = fresh
            fresh.seat = copy.deepcopy(self.seat, memo)
            return fresh

    return learned(Broken)


@fault("copies_after_training", "the copy follows the weights of the original", TOPK)
def the_copy_still_calls_the_original_blocks(monkeypatch):
    """What a closure around the block would do; an EMA made this way never differs from the model."""
    monkeypatch.setattr(_run.Slot, "__deepcopy__", lambda self, memo: self, raising=False)
    return TOPK


@fault("copies_after_training", "restoring the copy changed the original", TOPK)
def the_copy_shares_its_host_with_the_original(monkeypatch):
    class Broken(winnow._run.Seat):
        def __deepcopy__(self, memo):
            fresh = copy.copy(self)
            memo[id(self)] = fresh
            return fresh

    monkeypatch.setattr(winnow._reduce, "Seat", Broken)
    return TOPK


# ---- model


def _forgets(module_name, monkeypatch):
    real = winnow.restore

    def restore(model):
        seat = winnow.reducer_of(model).seat
        seat.patched = [(m, n) for m, n in seat.patched if n != module_name]
        return real(model)

    monkeypatch.setattr(winnow, "restore", restore)
    return TOPK


@fault("restore_is_exact", "something is left behind on the model", TOPK)
def restore_forgets_a_patched_method(monkeypatch):
    return _forgets("forward_intermediates", monkeypatch)


@fault("restore_is_exact", "the restored model gives another output", TOPK)
def restore_forgets_the_blocks(monkeypatch):
    return _forgets("forward", monkeypatch)


@fault("restore_is_exact", "something is left behind on blocks.1", TOPK)
def leaves_an_attribute_on_a_block(monkeypatch):
    class Broken(TopKReducer):
        def forward(self, tokens, signals, layer):
            self.seat.host.blocks[layer].kept = tokens.n
            return super().forward(tokens, signals, layer)

    return twin(TOPK, Broken)


@fault("restore_is_exact", "the restored model gives another output", TOPK)
def scales_a_weight_in_place(monkeypatch):
    class Broken(TopKReducer):
        def forward(self, tokens, signals, layer):
            self.seat.host.blocks[layer].mlp.fc1.weight.data.mul_(1 + 1e-6)
            return super().forward(tokens, signals, layer)

    return twin(TOPK, Broken)


@fault("restore_is_exact", "reducing adds blocks.0.sizes to the state dict", TOPK)
def keeps_a_buffer_on_a_block(monkeypatch):
    class Broken(TopKReducer):
        def forward(self, tokens, signals, layer):
            block = self.seat.host.blocks[0]
            with suppress(KeyError):
                block.register_buffer("sizes", tokens.ledger.size())
            return super().forward(tokens, signals, layer)

    return twin(TOPK, Broken)


@fault("nothing_removed_changes_nothing", "with nothing removed: differs", TOPK)
def the_adapter_forgets_layer_scale(monkeypatch):
    """What made the published ToMe wrong on 5 of 18 timm families, with nothing merged."""
    mlp = lambda self, block, x: block.drop_path2(block.mlp(block.norm2(x)))  # noqa: E731
    monkeypatch.setattr("winnow.adapters.timm_blocks.PreNorm.mlp", mlp)
    return TOPK


@fault("every_site_is_reached", r"called at \[\], its sites are \[1\]", TOPK)
def a_block_is_silently_skipped(monkeypatch):
    """The blocks run, the reducer never does: what made it a no-op on 4 of 18 families."""

    def act(self, x, tokens, layer, after, *more):
        self.carry(tokens, after)
        return x, tokens

    monkeypatch.setattr(_run.Seat, "act", act)
    return TOPK


@fault("executed_tokens_are_promised", r"executed \[64, 64, 31.*promised \[64, 64, 32", TOPK)
def the_reducer_rounds_otherwise(monkeypatch):
    class Broken(TopKReducer):
        def count(self, n, layer):
            return super().count(n, layer) - 1

    return twin(TOPK, Broken)


@fault("executed_tokens_are_promised", "4 counts for 2 blocks", TOPK)
def the_schedule_forgets_the_entry(monkeypatch):
    return twin(TOPK, counts=lambda self, setting: TopK.counts(self, setting)[1:])


@fault("prefix_never_reaches_the_reducer", "the ledger covers 65 tokens, the image has 64 patches", Grid(layers=(1,)))
def counts_the_class_token_as_a_patch(monkeypatch):
    real = timm_vit.host

    def host(model):
        found = real(model)
        return dataclasses.replace(found, setting=dataclasses.replace(found.setting, prefix=found.setting.prefix - 1))

    monkeypatch.setattr(timm_vit, "host", host)
    return Grid(layers=(1,))


@fault("macs_equal_the_closed_form", "more than 2 % apart", TOPK)
def multiplies_a_matrix_and_does_not_say_so(monkeypatch):
    class Broken(TopKReducer):
        def score(self, tokens, signals, layer):
            return super().score(tokens, signals, layer) + 0 * (tokens.x @ tokens.x.transpose(1, 2)).sum(1)

    return twin(TOPK, Broken)


@fault("macs_equal_the_closed_form", "more than 2 % apart", TOPK)
def the_closed_form_counts_the_mlp_on_all_tokens(monkeypatch):
    from winnow.adapters.timm_blocks import PreNorm

    real = PreNorm.macs
    monkeypatch.setattr(PreNorm, "macs", lambda self, block, n_attn, n_mlp: real(self, block, n_attn, n_attn))
    return TOPK


@fault("spelling_round_trips", "is no spelling", TOPK)
def prints_its_class_in_lower_case(monkeypatch):
    return twin(TOPK, __repr__=lambda self: f"topk({self.keep})")


@fault("spelling_round_trips", "reads back as", TOPK)
def the_repr_forgets_a_field(monkeypatch):
    monkeypatch.setattr(TopK, "__repr__", lambda self: f"TopK(keep={self.keep!r})")
    return TOPK


@fault("unfit_models_are_refused", "VisionTransformer should have been refused", TOPK)
def accepts_layers_out_of_range(monkeypatch):
    return twin(TOPK, check=lambda self, setting: None)


@fault("unfit_models_are_refused", "a refused model was touched", TOPK)
def touches_the_model_before_it_refuses(monkeypatch):
    real = winnow.reduce

    def reduce(model, method, way="auto", blocks=None):
        model.method = method
        return real(model, method, way, blocks)

    monkeypatch.setattr(winnow, "reduce", reduce)
    return TOPK


@fault("unfit_models_are_refused", "the refusal explains nothing", TOPK)
def refuses_without_a_reason(monkeypatch):
    real = winnow.reduce

    def reduce(model, method, way="auto", blocks=None):
        try:
            return real(model, method, way, blocks)
        except (TypeError, ValueError):
            raise ValueError("unsupported") from None

    monkeypatch.setattr(winnow, "reduce", reduce)
    return TOPK


@fault("unfit_models_are_refused", "refused without need", EViT(attention="received", layers=(1,)))
def refuses_models_without_class_token(monkeypatch):
    def check(self, setting):
        EViT.check(self, setting)
        if not setting.cls:
            raise ValueError("a class token is needed, and there is none here")

    return twin(EViT(attention="received", layers=(1,)), check=check)


# ---- compiled


@fault("compiles_as_one_graph", "data-dependent", TOPK)
def branches_on_an_item(monkeypatch):
    class Broken(TopKReducer):
        def score(self, tokens, signals, layer):
            score = super().score(tokens, signals, layer)
            return -score if score.max().item() < 0 else score

    return twin(TOPK, Broken)


@fault("exports_with_a_free_batch", "Constraints violated", TOPK)
def bakes_the_batch_size_in(monkeypatch):
    class Broken(TopKReducer):
        def score(self, tokens, signals, layer):
            score = super().score(tokens, signals, layer)
            return torch.stack([score[i] for i in range(score.shape[0])])

    return twin(TOPK, Broken)


def listed(monkeypatch, method):
    """The method as if it stood in the table, so that its spelling is read."""
    cls = type(method)
    monkeypatch.setattr(winnow, "METHODS", (*winnow.METHODS, cls))
    monkeypatch.setitem(_parse._METHODS, cls.__name__, cls)
    return method


@fault("saves_and_loads", "the loaded reducer gives another output", TOPK)
def a_weight_is_no_parameter(monkeypatch):
    class Broken(TopKReducer):
        def __init__(self, method, patches=None, prefix=0):
            super().__init__(method, patches, prefix)
            self.direction = torch.randn(32)

        def score(self, tokens, signals, layer):
            return tokens.x.detach() @ self.direction

    return listed(monkeypatch, twin(TOPK, Broken))


@fault("saves_and_loads", "the loaded reducer gives another output", TOPK)
def save_writes_the_default_settings(monkeypatch):
    monkeypatch.setattr(_save, "repr", lambda method: "TopK(layers=(1,))", raising=False)
    return TOPK


@pytest.mark.parametrize(("check", "message", "good", "plant"), FAULTS)
def test_the_check_catches_the_fault(check, message, good, plant, monkeypatch):
    assert check_method(good, only=check)[0].outcome == "ok", "the good twin passes"
    broken = plant(monkeypatch)
    with pytest.raises(AssertionError, match="breaks the contract") as caught:
        check_method(broken, only=check)
    assert str(caught.value).startswith(f"{broken!r} breaks the contract: {check}: ")
    said = str(caught.value).split(f"{check}: ", 1)[1]
    caught.match(message)
    assert said.strip(), "a failure that says nothing"
    (result,) = check_method(broken, only=check, all=True)
    assert (result.check, result.outcome) == (check, "failed")


def test_no_check_is_without_a_fault():
    assert {param.values[0] for param in FAULTS} == set(CHECKS)


# ---- known failures


def averaging(**known):
    """TopK with a score averaged over the batch, which one check catches."""

    class Averages(TopKReducer):
        def score(self, tokens, signals, layer):
            score = super().score(tokens, signals, layer)
            return score.mean(0, keepdim=True).expand_as(score)

    return twin(TOPK, Averages, known_failures=known)


def test_a_declared_failure_is_known():
    method = averaging(reducer_ignores_batch_mates="as in the paper's code")
    (result,) = check_method(method, only="reducer_ignores_batch_mates")
    assert (result.outcome, result.message) == ("known", "as in the paper's code")


def test_a_declaration_covers_its_own_check_only():
    method = averaging(reducer_ignores_batch_mates="as in the paper's code")
    with pytest.raises(AssertionError, match="model_ignores_batch_mates: outputs alone"):
        check_method(method, only="model_ignores_batch_mates")


def test_a_declared_failure_that_passes_has_failed():
    method = twin(TOPK, known_failures={"ledger_is_sound": "once was"})
    with pytest.raises(AssertionError, match=r"ledger_is_sound: declared as failing \(once was\) but passes"):
        check_method(method, only="ledger_is_sound")


def test_a_declaration_of_no_check_is_refused():
    with pytest.raises(ValueError, match="known_failures names 'ledger_is_sane'"):
        check_method(twin(TOPK, known_failures={"ledger_is_sane": "misspelt"}), only="ledger_is_sound")


def test_check_method_stops_at_the_first_failure():
    with pytest.raises(AssertionError, match="breaks the contract: reducer_ignores_batch_mates"):
        check_method(averaging())


# ---- counted against closed MACs


def test_check_counted_catches_more_than_two_percent():
    check_counted(1.019e9, 1e9, "a model")
    check_counted(1e9, 1.019e9, "a model")
    check_counted(1e9, None, "a model whose closed form is unknown")
    for counted in (1.021e9, 0.979e9, 0.0):
        with pytest.raises(ValueError, match=r"a model: .* GMAC counted, 1.0000 by closed form, more than 2 % apart"):
            check_counted(counted, 1e9, "a model")


def test_check_counted_catches_a_missing_attention():
    """The hole of the published tables: the two matrix products of attention counted as nothing."""
    from winnow.measure.closed_form import plain_macs

    model = VisionTransformer(img_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=2, num_classes=5).eval()
    closed = plain_macs(model)
    attention = 2 * (2 * 48 * 65 * 65)
    check_counted(closed, closed, "vit")
    with pytest.raises(ValueError, match="more than 2 % apart"):
        check_counted(closed - attention, closed, "vit")
