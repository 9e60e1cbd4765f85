"""Reduced vision-language models: nothing removed changes no bit, and what is removed matches a recomputation by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import reference
from torch import Tensor
from vlms import FAMILIES, IMAGE, llava, only, prompts, tiny

import winnow
from winnow import (
    CDPruner,
    DivPrune,
    Downsample,
    EViT,
    Exactly,
    FastV,
    Grid,
    Keep,
    NormThreshold,
    Pool,
    PruMerge,
    PyramidDrop,
    Random,
    SparseVLM,
    ToMe,
    VisPruner,
)
from winnow.reducer import Signals
from winnow.tokens import Ledger, Tokens

NEW = 4
HALF = Keep(0.5)
KEEP_ALL = [
    Random(keep=Keep(1.0), at="tower"),
    Grid(keep=Exactly(16), at="tower"),
    Pool(keep=Keep(1.0), at="tower"),
    PruMerge(keep=Keep(1.0)),
    FastV(layer=2, keep=Keep(1.0)),
    PyramidDrop(layers=(1, 3), keep=(1.0, 1.0)),
    ToMe(r=0),
    Random(keep=Keep(1.0), layers=(1,)),
]
EVERY = [
    *KEEP_ALL,
    DivPrune(keep=Keep(1.0)),
    CDPruner(keep=Keep(1.0)),
    VisPruner(keep=Keep(1.0)),
    SparseVLM(keep=Keep(1.0), layers=(1, 3)),
]
LATER = {
    FastV: FastV(layer=3, keep=Keep(1.0)),
    PyramidDrop: PyramidDrop((2, 3), (1.0, 1.0)),
    SparseVLM: SparseVLM(keep=Keep(1.0), layers=(2, 3)),
}
"""The same behind the blocks that add features to image tokens."""
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
}


def generate(model, inputs: dict[str, Any], **words: Any):
    torch.manual_seed(5)
    return model.generate(**inputs, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, **words)


def same(a, b) -> bool:
    return torch.equal(a.sequences, b.sequences) and all(torch.equal(x, y) for x, y in zip(a.logits, b.logits))


def check_nothing_changes(
    family: str, attention: str, dtype: torch.dtype, images: tuple[int, ...], mode: str, methods=KEEP_ALL
) -> None:
    model = tiny(family, attention, dtype)
    inputs = prompts(family, images, dtype)
    plain = generate(model, inputs, **MODES[mode])
    full = model(**inputs).logits
    for method in methods:
        if method.facts.needs & {"keys", "cls_attention"} and not FAMILIES[family].signals:
            with pytest.raises((TypeError, ValueError)):
                winnow.reduce(model, method)
            continue
        if (method.facts.where == "block" and family != "llava") or _combines_under_deepstack(family, method):
            with pytest.raises(TypeError):
                winnow.reduce(model, method)
            continue
        if family == "qwen3_vl" and method.facts.where == "llm":
            method = LATER[type(method)]
        winnow.reduce(model, method)
        assert same(generate(model, inputs, **MODES[mode]), plain), f"{method} changes generate()"
        assert torch.equal(model(**inputs).logits, full), f"{method} changes forward()"
        winnow.restore(model)
    assert same(generate(model, inputs, **MODES[mode]), plain), "restore left something behind"


def _combines_under_deepstack(family: str, method) -> bool:
    return family == "qwen3_vl" and method.facts.where == "tower" and method.facts.combine != "none"


COVER = [
    ("sdpa", torch.float32, (1, 2, 0), "greedy"),
    ("eager", torch.float32, (1, 2), "beams"),
    ("sdpa", torch.bfloat16, (2,), "sampling"),
    ("eager", torch.bfloat16, (1, 0, 1), "no cache"),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("attention", "dtype", "images", "mode"), COVER)
def test_nothing_removed_changes_no_bit(family, attention, dtype, images, mode):
    check_nothing_changes(family, attention, dtype, images, mode)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images", [(1,), (2, 1), (0, 1, 2)])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_removed_changes_no_bit_anywhere(family, attention, dtype, images, mode):
    check_nothing_changes(family, attention, dtype, images, mode, EVERY)


# -- by hand: no cache, one sample at a time, the shortened sequence built from the plain model's own parts


def by_hand(
    model, inputs: dict[str, Any], features: list[Tensor], kept: dict[int, Tensor] | None = None, renumber: bool = False
) -> Tensor:
    """[NEW, V] logits of greedy decoding of one sample; features: of each image, spliced in for its placeholders.

    kept: by block of the language model, the columns of the prompt that it and those after it see.
    """
    core, ids = model.model, inputs["input_ids"][0]
    embed = core.get_input_embeddings()
    parts, images, at = [], iter(features), 0
    while at < len(ids):
        if ids[at] == IMAGE:
            found = next(images)
            parts.append(found)
            at += int((ids[at:] != IMAGE).int().argmax())
            assert ids[at] != IMAGE
        else:
            parts.append(embed(ids[at : at + 1]))
            at += 1
    x, logits = torch.cat(parts)[None], []
    for _ in range(NEW):
        step = model.lm_head(through(core.language_model, x, kept or {}, renumber))[0, -1]
        logits.append(step)
        choice = step.masked_fill(torch.arange(len(step)) == IMAGE, -torch.inf).argmax()
        x = torch.cat([x, embed(choice)[None, None]], 1)
    return torch.stack(logits)


def through(llm, x: Tensor, kept: dict[int, Tensor], renumber: bool) -> Tensor:
    """The language model block by block, with what each stage keeps of the prompt and all that was generated."""
    place = columns = torch.arange(x.shape[1])
    total = x.shape[1]
    for index, layer in enumerate(llm.layers):
        if index in kept:
            new = torch.arange(int(kept[index].max()) + 1, total)
            stay = torch.isin(columns, torch.cat([kept[index], new]))
            x, columns = x[:, stay], columns[stay]
            place = torch.arange(len(columns)) if renumber else columns
        n = x.shape[1]
        mask = torch.full((n, n), torch.finfo(x.dtype).min).triu(1)[None, None]
        x = layer(x, attention_mask=mask, position_embeddings=llm.rotary_emb(x, place[None]))
    return llm.norm(x)


def plain_features(model, inputs: dict[str, Any], tower: Any = None) -> list[Tensor]:
    return list(model.get_image_features(inputs["pixel_values"]).pooler_output)


def reduced_by_hand(model, method, inputs) -> list[Tensor]:
    """Image features after a method, from the tower alone and the ledger."""
    core = model.model
    if method.facts.where != "tower":  # inside the tower: the reduced tower on its own
        layer = model.config.vision_feature_layer
        with winnow.reduced(core.vision_tower, method), winnow.watch(core.vision_tower) as run:
            hidden = core.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[layer]
        found = core.multi_modal_projector(hidden[:, 1:])
        valid = run.ledgers[model.config.vision_config.num_hidden_layers + layer].valid
        return [one if valid is None else one[valid[i]] for i, one in enumerate(found)]
    with winnow.reduced(model, method), winnow.watch(model) as run:
        model.get_image_features(inputs["pixel_values"])
    hidden = core.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    owner = run.ledger.owner
    tokens = []
    for image in range(len(hidden)):
        held = [hidden[image][owner[image] == token] for token in range(int(owner[image].max()) + 1)]
        tokens.append(core.multi_modal_projector(torch.stack([one.mean(0) for one in held if len(one)])))
    return tokens


AT_TOWER = [
    Random(keep=Exactly(5), at="tower"),
    Grid(keep=Keep(0.25), at="tower"),
    Pool(keep=Exactly(6), at="tower"),
    ToMe(r=4),
    EViT(keep=HALF, layers=(0, 1)),
    NormThreshold(before=(1,)),
    Downsample(16),
]


@pytest.mark.parametrize("method", AT_TOWER, ids=repr)
def test_what_the_tower_keeps_matches_a_recomputation(method):
    model, images = tiny(), (1, 2, 0)
    inputs = prompts("llava", images)
    with torch.no_grad(), winnow.reduced(model, method), winnow.watch(model) as run:
        out = generate(model, inputs)
        beams = generate(model, inputs, num_beams=2, num_return_sequences=2)
    ids = inputs["input_ids"]
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids) and out.sequences.shape[1] == ids.shape[1] + NEW
    assert torch.equal(beams.sequences[::2, : ids.shape[1]], ids)
    counts = run.ledger.counts().tolist() if method.facts.where == "tower" else run.ledgers[1].counts().tolist()
    shortened = max(
        int(row.sum()) - 16 * n + sum(counts[sum(images[:b]) :][:n])
        for b, (row, n) in enumerate(zip(inputs["attention_mask"], images))
    )
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [shortened + NEW - 1] * 4
    for b in range(3):
        alone = only(inputs, images, b)
        with torch.no_grad():
            features = reduced_by_hand(model, method, alone) if images[b] else []
            wanted = by_hand(model, alone, features)
        torch.testing.assert_close(torch.stack(out.logits, 1)[b], wanted, atol=2e-5, rtol=2e-5)


def attention_of_last(llm, x: Tensor, block: int, kept: dict[int, Tensor], renumber: bool) -> tuple[Tensor, Tensor]:
    """[H, n] attention of the last row in a block, from its own projections, and the columns it is over."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    seen: dict[str, Tensor] = {}
    before = {site: columns for site, columns in kept.items() if site <= block}
    hook = llm.layers[block].register_forward_pre_hook(
        lambda _, args, words: seen.update(x=args[0], words=words), with_kwargs=True
    )
    through(llm, x, before, renumber)
    hook.remove()
    layer, (cos, sin) = llm.layers[block], seen["words"]["position_embeddings"]
    h, attn = layer.input_layernorm(seen["x"]), layer.self_attn
    q, k = (p(h).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    k = k.repeat_interleave(attn.num_key_value_groups, 1)
    row = (q[0, :, -1:] @ k[0].transpose(1, 2) * attn.scaling).softmax(-1)[:, 0]
    columns = before[max(before)] if before else torch.arange(x.shape[1])
    return row, columns


def kept_by_hand(model, inputs, method) -> dict[int, Tensor]:
    """By site, the columns of the prompt that stay."""
    core = model.model
    x = core.get_input_embeddings()(inputs["input_ids"])
    images = inputs["input_ids"][0] == IMAGE
    if images.any():
        x[:, images] = torch.cat(plain_features(model, inputs))
    kept: dict[int, Tensor] = {}
    for site in method.sites(4):
        row, columns = attention_of_last(
            core.language_model, x, site - 1 + method.facts.ahead, kept, method.facts.renumber
        )
        score = row.mean(0).masked_fill(~images[columns], -1.0)
        m = method.count(int(images[columns].sum()), site, int(images.sum())) if images.any() else 0
        chosen = columns[score.topk(m).indices]
        kept[site] = torch.cat([columns[~images[columns]], chosen]).sort().values
    return kept


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "method", [FastV(layer=1, keep=Exactly(5)), FastV(layer=2), PyramidDrop(layers=(1, 3), keep=(0.5, 0.25))], ids=repr
)
def test_what_the_language_model_keeps_matches_a_recomputation(method, attention):
    model, images = tiny(attention=attention), (1, 2, 0)
    inputs = prompts("llava", images)
    with torch.no_grad(), winnow.reduced(model, method), winnow.watch(model) as run:
        out = generate(model, inputs)
    lengths = []
    for b in range(3):
        alone = only(inputs, images, b)
        with torch.no_grad():
            kept = kept_by_hand(model, alone, method)
            features = plain_features(model, alone) if images[b] else []
            wanted = by_hand(model, alone, features, kept, method.facts.renumber)
        torch.testing.assert_close(torch.stack(out.logits, 1)[b], wanted, atol=5e-5, rtol=5e-5)
        stages = [alone["input_ids"].shape[1]] * 4
        for site, columns in kept.items():
            stages[site:] = [len(columns)] * (4 - site)
        lengths.append(stages)
        image = inputs["input_ids"][b].eq(IMAGE).nonzero()[:, 0]
        start = int((inputs["attention_mask"][b] == 0).sum())
        for site, columns in kept.items():
            owner = run.ledgers[site].owner[b][: len(image)]
            assert (image[owner >= 0] - start).tolist() == [
                c for c in columns.tolist() if alone["input_ids"][0, c] == IMAGE
            ]
    predicted = torch.tensor(lengths).amax(0) + NEW - 1
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == predicted.tolist()


def test_fastv_and_the_reference_implementation(monkeypatch):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    case = reference("fastv_inplace")["seed0_rank288"]
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=16
    )
    state = {name: value for name, value in case["state_dict"].items() if "rotary" not in name}
    cfg = {name: value for name, value in case["cfg"].items() if name != "_attn_implementation"}
    text = LlamaConfig(**cfg | {"vocab_size": len(state["embed_tokens.weight"])})
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=text.vocab_size - 1, vision_feature_layer=-1
    )
    model = LlavaForConditionalGeneration(config).eval()
    core, x, start, n = model.model, case["inputs_embeds"], case["sys"], case["n_img"]
    core.language_model.load_state_dict(state)
    features = BaseModelOutputWithPooling(pooler_output=[x[0, start : start + n]])
    monkeypatch.setattr(core, "get_image_features", lambda *args, **words: features)
    marked = x.clone()
    marked[:, start : start + n] = core.get_input_embeddings().weight[model.config.image_token_id]
    winnow.reduce(model, FastV(layer=case["K"], keep=Exactly(case["rank"])))
    with torch.no_grad(), winnow.watch(model) as run:
        out = core(inputs_embeds=marked, pixel_values=torch.empty(1, 3, 1, 1))
    assert run.columns.index[0].tolist() == case["keep"].tolist()
    torch.testing.assert_close(run.scores[case["K"]][0], case["attn_row"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out.last_hidden_state, case["last_hidden_inplace"], atol=2e-5, rtol=2e-5)


def prumerge(case: dict[str, Any], method: PruMerge, rows: slice = slice(None)):
    x = case["hidden"][rows]
    signals = Signals(
        q=case["q"][rows, None, 1:],
        k=case["k"][rows, None, 1:],
        cls_q=case["q"][rows, None, 0],
        cls_k=case["k"][rows, None, 0],
        watched=True,
    )
    reducer = method.build(1, 64, 1, 576, 0)
    return reducer(Tokens(x[:, 1:], Ledger.start(len(x), 576), (24, 24)), signals, 0)


@pytest.mark.parametrize("name", ["B1_seed0", "B2_seed2"])
def test_prumerge_and_the_reference_implementation(name):
    case = reference("prumerge")[name]
    adaptive = prumerge(case, PruMerge(compat="reference"))
    torch.testing.assert_close(adaptive.score, case["cls_attn"])
    wanted = {"prumerge": adaptive, "prumerge_fixed_1_8": prumerge(case, PruMerge(keep=Exactly(73)))}
    for key, out in wanted.items():
        emitted = torch.take_along_dim(out.x, out.order[..., None], 1)[:, : case[key].shape[1]]
        assert out.ledger.counts().tolist() == [case[key].shape[1]] * len(case["hidden"])
        torch.testing.assert_close(emitted, case[key], atol=2e-6, rtol=1e-5)
    if case["plus"] is not None:
        out = prumerge(case, PruMerge(plus=True, compat="reference"))
        valid = out.ledger.valid[0]
        ours, theirs = out.x[0, valid], case["plus"][0]
        assert len(ours) == len(theirs)
        nearest = torch.cdist(ours.double(), theirs.double()).min(1)
        assert sorted(nearest.indices.tolist()) == list(range(len(theirs))) and nearest.values.max() < 1e-5


def test_corrected_prumerge_does_not_couple_images():
    case = reference("prumerge")["B2_seed2"]
    together = prumerge(case, PruMerge(plus=True))
    for image in range(2):
        alone = prumerge(case, PruMerge(plus=True), slice(image, image + 1))
        assert torch.equal(together.ledger.owner[image], alone.ledger.owner[0])
        torch.testing.assert_close(together.x[image], alone.x[0], atol=1e-6, rtol=1e-6)


def test_prumerge_adds_what_is_alike_and_sums_the_rest():
    torch.manual_seed(2)
    x, q, k = (torch.randn(1, 17, 8) for _ in range(3))
    case = {"hidden": x, "q": q, "k": k}
    signals = Signals(k=k[:, None, 1:], cls_q=q[:, None, 0], cls_k=k[:, None, 0])
    out = PruMerge(keep=Exactly(4)).build(1, 8, 1, 16, 0)(Tokens(x[:, 1:], Ledger.start(1, 16), (4, 4)), signals, 0)
    a = (case["q"][0, 0] @ k[0].T * 8**-0.5).softmax(-1)[1:]
    kept = a.topk(3).indices.tolist()
    unit, x = torch.nn.functional.normalize(k[0, 1:], dim=-1), x[0, 1:]
    rest = [i for i in range(16) if i not in kept]
    for i in kept:  # fewer than 32 others: all of them are near
        wanted = x[i] + sum(a[j] * x[j] for j in range(16) if j != i)
        torch.testing.assert_close(out.x[0, out.ledger.owner[0, i]], wanted)
    extra = int(out.ledger.owner[0, rest[0]])
    torch.testing.assert_close(out.x[0, extra], sum(a[j] * x[j] for j in rest))
    assert out.n == 4 and {int(out.ledger.owner[0, j]) for j in rest} == {extra} and unit.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "method", [Random(keep=Exactly(5), at="tower"), PruMerge(), FastV(1, HALF), ToMe(r=4)], ids=repr
)
def test_the_loss_is_that_of_the_shortened_labels(method, side):
    model, images = tiny().train(), (1, 2, 0)
    inputs = prompts("llava", images, side=side)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    labels = ids.masked_fill((ids == IMAGE) | ~real, -100)
    labels[:, : int((real.int().argmax(1)).max()) + 3] = -100
    winnow.reduce(model, method)
    with winnow.watch(model) as run:
        out = model(**inputs, labels=labels)
    held = run.columns
    ours = held.labels(labels)
    assert out.logits.shape[:2] == held.index.shape and (ours != -100).sum() == (labels != -100).sum()
    wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ours[:, 1:].flatten())
    torch.testing.assert_close(out.loss, wanted)
    assert next(iter(out)) == "loss" and torch.equal(model(**inputs, labels=labels, return_dict=False)[0], out.loss)
    out.loss.backward()
    for name in (
        "vision_tower.embeddings.patch_embedding",
        "multi_modal_projector.linear_1",
        "language_model.layers.3.mlp.up_proj",
    ):
        grad = model.model.get_submodule(name).weight.grad
        assert grad is not None and grad.isfinite().all() and grad.any(), f"no gradient in {name}"


@pytest.mark.parametrize("method", [Random(keep=Exactly(5), at="tower"), PyramidDrop((1, 3), (0.5, 0.25))], ids=repr)
def test_both_sides_of_padding_give_the_same_loss(method):
    torch.manual_seed(0)
    model, losses = tiny(), []
    for side in ("left", "right"):
        torch.manual_seed(1)
        inputs = prompts("llava", (1, 2, 0), side=side)
        ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
        inputs["position_ids"] = (real.cumsum(1) - 1).clamp_min(0)
        first = real.cumsum(1) == 1  # which only padding on the left would predict
        labels = ids.masked_fill((ids == IMAGE) | ~real | first, -100)
        labels[ids.roll(1, 1) == IMAGE] = -100
        with torch.no_grad(), winnow.reduced(model, method):
            losses.append(model(**inputs, labels=labels).loss)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "method",
    [PruMerge(), PruMerge(plus=True), FastV(2, HALF), PyramidDrop((1, 3), (0.5, 0.25)), NormThreshold(before=(1,))],
    ids=repr,
)
def test_a_sample_does_not_depend_on_its_neighbours(method):
    model, images = tiny(), (2, 1, 0)
    inputs = prompts("llava", images)
    winnow.reduce(model, method)
    together = torch.stack(generate(model, inputs).logits, 1)
    for b in range(3):
        alone = torch.stack(generate(model, only(inputs, images, b)).logits, 1)
        torch.testing.assert_close(together[b], alone[0], atol=1e-5, rtol=1e-5)


def test_prumerge_in_a_model_sees_the_next_blocks_attention():
    model, inputs = tiny(), prompts("llava", (1, 1))
    tower = model.model.vision_tower
    with winnow.reduced(model, PruMerge(keep=Exactly(5))), winnow.watch(model) as run, torch.no_grad():
        model.get_image_features(inputs["pixel_values"])
    with torch.no_grad():
        x = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
        block = tower.encoder.layers[-1]
        q, k = (p(block.layer_norm1(x)) for p in (block.self_attn.q_proj, block.self_attn.k_proj))
    wanted = (q[:, :1] @ k.transpose(1, 2) * 32**-0.5).softmax(-1)[:, 0, 1:]
    torch.testing.assert_close(run.scores[0], wanted)
    top = wanted.topk(4).indices
    assert all((run.ledger.owner[i] == run.ledger.owner[i, j]).sum() == 1 for i in range(2) for j in top[i])


@pytest.mark.parametrize("method", [PruMerge(), FastV(1, HALF), ToMe(r=4)], ids=repr)
def test_copies_checkpointing_and_restoring(method):
    model, inputs = tiny(), prompts("llava", (1, 2))
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    plain = model(**inputs).logits
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    winnow.reduce(model, method)
    grads = []
    for checkpoint in (False, True):
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    model.gradient_checkpointing_disable()
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    other = copy.deepcopy(model).eval()
    model.eval()
    ours = model(**inputs).logits
    assert torch.equal(other(**inputs).logits, ours)
    winnow.restore(other)
    assert torch.equal(other(**inputs).logits, plain) and torch.equal(model(**inputs).logits, ours)
    assert same(generate(copy.deepcopy(model), inputs), generate(model, inputs))
    winnow.restore(model)
    after = {name: set(vars(module)) for name, module in model.named_modules()}
    assert torch.equal(model(**inputs).logits, plain)
    assert {name: after[name] - before[name] for name in after if after[name] - before[name]} == {}


@pytest.mark.parametrize(
    "method", [Random(keep=Exactly(5), at="tower"), FastV(1, Exactly(5)), PyramidDrop((1, 2), (0.5, 0.25))], ids=repr
)
def test_a_second_image_in_a_conversation(method):
    """Two calls with one cache give what the two prompts give at once, where the second's choice does not see the first."""
    model = tiny()
    first, second = prompts("llava", (1, 1)), prompts("llava", (1, 1))
    winnow.reduce(model, method)
    with torch.no_grad():
        cached = model(**first, use_cache=True)
        length = first["input_ids"].shape[1] + second["input_ids"].shape[1]
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
        out = model(**{**second, "attention_mask": mask}, past_key_values=cached.past_key_values)
        more = model(
            input_ids=torch.tensor([[7], [8]]),
            attention_mask=torch.cat([mask, mask[:, :1] * 0 + 1], 1),
            past_key_values=out.past_key_values,
        )
    held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert more.logits.isfinite().all()
    if method.facts.where == "tower":
        both = {
            "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1),
            "attention_mask": mask,
            "pixel_values": torch.stack([first["pixel_values"], second["pixel_values"]], 1).flatten(0, 1),
        }
        with torch.no_grad():
            once = model(**both)
        assert held == [length - 22 + 1] * 4
        torch.testing.assert_close(out.logits[:, -1], once.logits[:, -1], atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="whole conversation"):
            model.generate(**second, past_key_values=cached.past_key_values, max_new_tokens=2)
    else:
        assert held[0] == length + 1 and held[3] < held[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"cache_implementation": "static"}, "room"),
        ({"prefill_chunk_size": 8}, "chunked prefill"),
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding"),
        ({"assistant_model": "a model"}, "assisted decoding"),
    ],
)
@pytest.mark.parametrize("method", [Grid(at="tower"), FastV(1)], ids=repr)
def test_what_counts_columns_of_the_prompt_is_refused(method, words, says):
    model, inputs = tiny(), prompts("llava", (1,))
    winnow.reduce(model, method)
    with pytest.raises(ValueError, match=says):
        model.generate(**inputs, max_new_tokens=2, **words)


def test_refusals_say_what_would_work():
    from transformers import StaticCache

    model, inputs = tiny(), prompts("llava", (1,))
    with pytest.raises(ValueError, match="block 0"):
        FastV(layer=0)
    with pytest.raises(ValueError, match="blocks 0 to 3"):
        winnow.reduce(model, FastV(layer=9))
    winnow.reduce(model, Grid(at="tower"))
    with pytest.raises(ValueError, match="DynamicCache"):
        model(**inputs, past_key_values=StaticCache(config=model.config, max_cache_len=64))
    with pytest.raises(ValueError, match=r"shape \[B, L\]"):
        model(**inputs | {"attention_mask": torch.ones(1, 1, 25, 25)})
    with pytest.raises(ValueError, match="config"):
        model(**inputs, vision_feature_layer=-1)
    winnow.restore(model)
    siglip = tiny(vision="siglip", layer=-1)
    with pytest.raises(ValueError, match='attention="received"'):
        winnow.reduce(siglip, PruMerge())
    winnow.reduce(siglip, PruMerge(attention="received"))
    assert generate(siglip, prompts("llava", (1, 0))).sequences.shape[1] == 25 + NEW
    broken = tiny()
    broken.model.language_model.forward = broken.model.language_model.forward
    with pytest.raises(TypeError, match="accelerate"):
        winnow.reduce(broken, Grid(at="tower"))
    broken = llava()
    broken.config.vision_feature_select_strategy = "full"
    with pytest.raises(TypeError, match="class token"):
        winnow.reduce(broken, Grid(at="tower"))


# -- every family: what its door and its stages leave, against the plain model's own blocks, without a cache


def pixels_of(inputs: dict[str, Any]) -> dict[str, Any]:
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    return {name: inputs[name] for name in names if name in inputs}


def recompute(
    model, inputs: dict[str, Any], b: int, rows: Tensor, deep: list[Tensor], door: Tensor, kept: dict[int, Tensor]
) -> Tensor:
    """[NEW, V] greedy logits of sample b; rows, deep: of all placeholders; door [n]: columns the model is given."""
    core, real = model.model, inputs["attention_mask"][b].bool()
    llm, ids = getattr(core, "text_model", None) or core.language_model, inputs["input_ids"]
    image, start = ids == IMAGE, int((ids[:b] == IMAGE).sum())
    mine = slice(start, start + int(image[b].sum()))
    x = core.get_input_embeddings()(ids[b, real])[None]
    x[:, image[b, real]] = rows[mine]
    if hasattr(core, "get_rope_index"):
        words = {name: inputs[name] for name in ("mm_token_type_ids", "image_grid_thw") if name in inputs}
        place = core.get_rope_index(ids, attention_mask=inputs["attention_mask"], **words)[0][:, b : b + 1, real]
    else:  # counted afresh behind the door
        place = torch.arange(x.shape[1])[None] - (~door).cumsum(0)
    added = [torch.zeros_like(x[0]).index_put((image[b, real].nonzero()[:, 0],), one[mine]) for one in deep]
    columns, logits = torch.arange(x.shape[1])[door], []
    x, place, added = x[:, door], place[..., door], [one[door] for one in added]
    for _ in range(NEW):
        h, at, held = x, place, columns
        for index, layer in enumerate(llm.layers):
            if index in kept:
                stay = torch.isin(held, kept[index]) | (held >= len(door))
                h, at, held = h[:, stay], at[..., stay], held[stay]
            mask = torch.full((h.shape[1],) * 2, torch.finfo(h.dtype).min).triu(1)[None, None]
            h = layer(h, attention_mask=mask, position_embeddings=llm.rotary_emb(h, at))
            if index < len(added):
                h = h + added[index]
        step = model.lm_head(llm.norm(h))[0, -1]
        logits.append(step)
        choice = step.masked_fill(torch.arange(len(step)) == IMAGE, -torch.inf).argmax()
        x = torch.cat([x, core.get_input_embeddings()(choice)[None, None]], 1)
        place = torch.cat([place, place[..., -1:] + 1], -1)
        columns = torch.cat([columns, columns.new_tensor([len(door) + len(logits)])])
        added = [torch.cat([one, torch.zeros_like(one[:1])]) for one in added]
    return torch.stack(logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [Random(keep=HALF, at="tower"), FastV(layer=3, keep=HALF)], ids=repr)
def test_every_family_matches_a_recomputation(family, method):
    model, images = tiny(family, "eager"), (2, 1, 0)
    inputs = prompts(family, images)
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    with torch.no_grad():
        plain = model.get_image_features(**pixels_of(inputs))
        rows, deep = (
            torch.cat(list(plain.pooler_output)).flatten(0, -2),
            getattr(plain, "deepstack_features", None) or [],
        )
        deep = [torch.cat(list(one)) for one in deep]
        attention = model(**inputs, output_attentions=True).attentions[2].mean(1)[:, -1]
        winnow.reduce(model, method)
        with winnow.watch(model) as run:
            out = generate(model, inputs)
        left = torch.cat(list(model.get_image_features(**pixels_of(inputs)).pooler_output)).flatten(0, -2)
    stays = ~(left == float("-inf")).all(-1)
    if family == "llava" and method.facts.where == "tower":  # tokens stand in front, whichever they are
        stays = (run.ledger.owner >= 0).flatten()
    elif method.facts.where == "tower":
        assert torch.equal(left[stays], rows[stays]), "a token is not in its own slot"
        assert 0.4 < stays.float().mean() < 0.75
    else:
        assert stays.all()
    lengths = []
    for b in range(3):
        image = (ids[b] == IMAGE)[real[b]]
        door, kept = torch.ones_like(image), {}
        start = int((ids[:b] == IMAGE).sum())
        door[image] = stays[start : start + int(image.sum())]
        if method.facts.where == "llm":
            score = attention[b, real[b]].masked_fill(~image, -1)
            best = score.topk(method.count(int(image.sum()), 3)).indices if image.any() else []
            kept[3] = torch.cat([torch.arange(len(image))[~image], torch.as_tensor(best, dtype=torch.long)])
        lengths.append([int(door.sum())] * 3 + [len(kept.get(3, door.nonzero()))])
        with torch.no_grad():
            wanted = recompute(model, inputs, b, rows, deep, door, kept)
        torch.testing.assert_close(torch.stack(out.logits, 1)[b], wanted, atol=5e-5, rtol=5e-5)
    predicted = torch.tensor(lengths).amax(0) + NEW - 1
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == predicted.tolist()
    assert run.columns.seen == ids.shape[1] and torch.equal(out.sequences[:, : ids.shape[1]], ids)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_a_token_cut_off_with_the_padding_moves_to_a_patch_that_stays(family):
    """One token per tile, the mean of all its patches: it stays if any patch of the tile does."""
    model, inputs = tiny(family), prompts(family, (1, 1, 1))
    core, words = model.model, pixels_of(inputs)
    winnow.reduce(model, Pool(keep=Exactly(1), at="tower"))
    with torch.no_grad(), winnow.watch(model) as run:
        left = model.get_image_features(**words).pooler_output
    tiles = len(run.ledger.owner)
    newline = core.image_newline
    found = sum(int(((one != float("-inf")).all(-1) & (one != newline).any(-1)).sum()) for one in left)
    assert found == tiles
    winnow.restore(model)


def test_methods_that_need_the_whole_grid_or_attention_are_refused_elsewhere():
    for family, says in {"llava_next": "packing", "qwen2_5_vl": "windows", "internvl": "shuffle"}.items():
        with pytest.raises(TypeError, match=says):
            winnow.reduce(tiny(family), ToMe(r=2))
    with pytest.raises(ValueError, match="Use Random, Grid or Pool"):
        winnow.reduce(tiny("qwen2_5_vl"), PruMerge())
    with pytest.raises(ValueError, match="block 2 at the earliest"):
        winnow.reduce(tiny("qwen3_vl"), FastV(layer=1))
    with pytest.raises(TypeError, match="only drop work"):
        winnow.reduce(tiny("qwen3_vl"), Pool(at="tower"))


def test_positions_go_on_in_a_loop_of_ones_own():
    """Without generate(): Qwen counts on from the length of its cache, which is shorter than the caller's sequence."""
    for family in ("llava", "qwen2_5_vl", "qwen3_vl"):
        model, inputs = tiny(family), prompts(family, (1,))
        winnow.reduce(model, Random(keep=HALF, at="tower"))
        wanted = generate(model, inputs)
        out, logits = model(**inputs, use_cache=True), []
        for _ in range(NEW):
            logits.append(out.logits[:, -1])
            best = logits[-1].masked_fill(torch.arange(99) == IMAGE, -torch.inf).argmax(-1, keepdim=True)
            out = model(input_ids=best, past_key_values=out.past_key_values)
        torch.testing.assert_close(torch.stack(logits), torch.stack(wanted.logits), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [PruMerge(), FastV(1, Exactly(5)), PyramidDrop((1, 3), (0.5, 0.25))], ids=repr)
def test_beams_and_samples_of_one_prompt_go_their_own_ways(method):
    """A beam's score is that of its tokens fed one by one; two samples of a prompt are those of the prompt given twice."""
    model, images = tiny(), (2, 1)
    inputs = prompts("llava", images)
    winnow.reduce(model, method)
    beams = generate(model, inputs, num_beams=3, output_scores=True)
    start = inputs["input_ids"].shape[1]
    for b in range(2):
        out, total = model(**only(inputs, images, b), use_cache=True), 0.0
        for token in beams.sequences[b, start:]:
            total += float(out.logits[0, -1].log_softmax(-1)[token])
            out = model(input_ids=token.view(1, 1), past_key_values=out.past_key_values)
        assert abs(total / NEW - float(beams.sequences_scores[b])) < 1e-4
    once = generate(model, inputs, do_sample=True, num_return_sequences=2)
    again = {name: inputs[name].repeat_interleave(2, 0) for name in ("input_ids", "attention_mask")}
    first, second = inputs["pixel_values"].split([2, 1])
    twice = generate(model, again | {"pixel_values": torch.cat([first, first, second, second])}, do_sample=True)
    assert torch.equal(once.sequences, twice.sequences)


def test_in_training_adaptive_methods_run_masked():
    model, inputs = tiny().train(), prompts("llava", (1, 2))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    winnow.reduce(model, NormThreshold(before=(1,)))
    with winnow.watch(model) as run:
        out = model(**inputs, labels=labels)
    assert run.way == "masked" and out.logits.shape[1] < inputs["input_ids"].shape[1]
    out.loss.backward()
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad.any()


def test_saving_and_loading(tmp_path):
    model, inputs = tiny(), prompts("llava", (1, 2))
    wanted = generate(winnow.reduce(model, PruMerge(plus=True)), inputs)
    winnow.save(model, tmp_path / "reducer.safetensors")
    assert same(generate(winnow.load(tiny(), tmp_path / "reducer.safetensors"), inputs), wanted)
