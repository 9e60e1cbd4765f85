"""What goes wrong around a reduced vision-language model: calls that break off, states that stay, other ways of calling."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from vlms import FAMILIES, IMAGE, prompts, tiny

import winnow
from winnow import Exactly, FastV, Keep, PruMerge, PyramidDrop, Random
from winnow.reducer import Signals
from winnow.tokens import Ledger, Tokens

HALF = Keep(0.5)
BOTH = [Random(keep=HALF, at="tower"), FastV(layer=3, keep=HALF)]
"""A method at the tower and one in the language model that every family takes."""
SOME = ["llava", "qwen3_vl"]
"""Positions counted afresh; in rows and columns, with features added in later blocks."""


def answer(model: Any, inputs: dict[str, Any], **words: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=3, do_sample=False, **words)


def placed(mask: torch.Tensor) -> torch.Tensor:
    """Positions as generate() counts them: padding has none."""
    return (mask.cumsum(1) - 1).clamp_min(0)


class Broken(Exception):
    """Out of memory, say."""


def break_off(*args: Any) -> None:
    raise Broken


def parts_of(model: Any) -> dict[str, Any]:
    """Where a call may break off: the tower, between blocks of the language model."""
    core = model.model
    llm = getattr(core, "text_model", None) or core.language_model
    vision = next(getattr(core, name) for name in ("vision_tower", "visual", "vision_model") if hasattr(core, name))
    return {"tower": next(m for m in vision.modules() if m is not vision), "block": llm.layers[3].mlp}


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("method", BOTH, ids=repr)
@pytest.mark.parametrize("part", ["tower", "block"])
def test_a_call_that_breaks_off_leaves_nothing(family, method, part):
    """The next answers are those of a model to which nothing happened, whatever was asked in between."""
    model, images = tiny(family), prompts(family, (1, 2))
    text = prompts(family, (0,))
    winnow.reduce(model, method)
    wanted = [answer(model, one) for one in (images, text)]
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    configs = [getattr(module, "config", None) for module in model.modules()]
    kinds = [config and config._attn_implementation for config in configs]
    hook = parts_of(model)[part].register_forward_hook(break_off)
    with pytest.raises(Broken):
        answer(model, images)
    hook.remove()
    assert [config and config._attn_implementation for config in configs] == kinds
    for again in (text, images, text, images):
        assert torch.equal(answer(model, again), wanted[1 if again is text else 0])
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names


@pytest.mark.parametrize("method", [FastV(layer=1, keep=HALF), PyramidDrop((1, 3), (0.5, 0.25))], ids=repr)
def test_the_language_model_alone_after_a_call_that_broke_off(method):
    """Called by itself it knows of no images, also where the last whole call ended between its blocks."""
    model = tiny()
    llm, x = model.model.language_model, torch.randn(2, 9, 48)
    with torch.no_grad():
        wanted = llm(inputs_embeds=x).last_hidden_state
        winnow.reduce(model, method)
        hook = llm.layers[3].mlp.register_forward_hook(break_off)
        with pytest.raises(Broken):
            model(**prompts("llava", (1, 2)))
        hook.remove()
        assert torch.equal(llm(inputs_embeds=x).last_hidden_state, wanted)


@pytest.mark.parametrize("method", [PruMerge(plus=True), FastV(layer=1, keep=HALF), Random(HALF, at="tower")], ids=repr)
def test_a_reduced_model_is_pickled(method):
    """Before its first call: afterwards transformers' own hooks keep any model of theirs from being pickled."""
    model, inputs = winnow.reduce(tiny(), method), prompts("llava", (1, 2))
    other = pickle.loads(pickle.dumps(model))
    wanted, plain = answer(model, inputs), answer(tiny(), inputs)
    assert torch.equal(answer(other, inputs), wanted) and winnow.reducer_of(other).method == method
    assert torch.equal(answer(winnow.restore(other), inputs), plain)
    assert torch.equal(answer(model, inputs), wanted), "the copy shares nothing with it"


@pytest.mark.slow
@pytest.mark.parametrize("method", [Random(Exactly(5), at="tower"), FastV(layer=1, keep=Exactly(5))], ids=repr)
def test_compiled_it_answers_the_same(method):
    """Graphs break where columns are chosen; what comes out is what came out before."""
    model, inputs = tiny(), prompts("llava", (1, 2, 0))
    winnow.reduce(model, method)
    with torch.no_grad():
        wanted = model(**inputs).logits
        found = torch.compile(model, backend="eager")(**inputs).logits
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    torch._dynamo.reset()
    with pytest.raises((TypeError, ValueError), match="before it is wrapped"):
        winnow.reduce(torch.compile(tiny(), backend="eager"), method)


@pytest.mark.parametrize("method", [Random(Exactly(5), at="tower"), FastV(layer=1, keep=Exactly(5))], ids=repr)
def test_the_caller_s_own_embeddings(method):
    """Of placeholders, beside pixels: as with ids. With the features of images already in them: see the next test."""
    model, inputs = tiny(), prompts("llava", (1, 2, 0))
    embedded = {name: value for name, value in inputs.items() if name != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with torch.no_grad(), winnow.reduced(model, method):
        assert torch.equal(model(**embedded).logits, model(**inputs).logits)
        new = answer(model, embedded)
        assert torch.equal(new, answer(model, inputs)[:, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("method", BOTH, ids=repr)
def test_features_encoded_ahead(family, method):
    """transformers' own way of passing what the tower made, such as with a cache of images."""
    model, inputs = tiny(family), prompts(family, (1, 2))
    winnow.reduce(model, method)
    wanted = answer(model, inputs)
    names = [name for name in ("pixel_values", "image_grid_thw") if name in inputs]
    with torch.no_grad():
        ahead = model.get_image_features(**{name: inputs[name] for name in names}, return_dict=True)
    bare = {name: value for name, value in inputs.items() if name != "pixel_values"}
    assert torch.equal(answer(model, bare, mm_encoder_outputs={"image": ahead}), wanted)


def test_features_that_the_caller_put_among_the_embeddings():
    """Reduced ones have empty slots, which leave; a method in the language model cannot know them and says so."""
    model, inputs = tiny(), prompts("llava", (1, 2, 0))
    given = {"attention_mask": inputs["attention_mask"]}
    embed = model.get_input_embeddings()(inputs["input_ids"]).detach()
    place = (inputs["input_ids"] == IMAGE)[..., None].expand_as(embed)

    def among(features: Any) -> torch.Tensor:
        return embed.masked_scatter(place, torch.cat(list(features)))

    with torch.no_grad(), winnow.reduced(model, Random(Exactly(5), at="tower")):
        wanted = model(**inputs).logits
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        assert torch.equal(model(inputs_embeds=among(features), **given).logits, wanted)
    with torch.no_grad(), winnow.reduced(model, FastV(layer=1, keep=Exactly(5))):
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        with pytest.raises(ValueError, match="pass input_ids and pixel_values"):
            model(inputs_embeds=among(features), **given)


@pytest.mark.parametrize("method", [FastV(layer=1, keep=Exactly(5)), PyramidDrop((1, 3), (0.5, 0.25))], ids=repr)
def test_a_conversation_goes_on_from_its_cache(method):
    """generate() on the whole conversation and the cache of its first part: as feeding the rest token by token."""
    model, first = tiny(), prompts("llava", (1, 2))
    winnow.reduce(model, method)
    torch.manual_seed(7)
    more = torch.randint(3, 90, (2, 5))
    ids = torch.cat([first["input_ids"], more], 1)
    mask = torch.cat([first["attention_mask"], torch.ones_like(more)], 1)
    with torch.no_grad():
        cache = model(**first, position_ids=placed(first["attention_mask"]), use_cache=True).past_key_values
        mine, wanted = copy.deepcopy(cache), []
        for at in range(first["input_ids"].shape[1], ids.shape[1] + 3):
            step = ids[:, at : at + 1] if at < ids.shape[1] else wanted[-1]
            grown = torch.cat([mask, torch.ones(2, max(0, at + 1 - mask.shape[1]), dtype=mask.dtype)], 1)[:, : at + 1]
            place = placed(grown)[:, -1:]
            out = model(input_ids=step, attention_mask=grown, position_ids=place, past_key_values=mine)
            if at >= ids.shape[1] - 1:
                wanted.append(
                    out.logits[:, -1].index_fill(1, torch.tensor([IMAGE]), -torch.inf).argmax(1, keepdim=True)
                )
        found = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3, do_sample=False
        )
    assert torch.equal(found[:, : ids.shape[1]], ids)
    assert torch.equal(found[:, ids.shape[1] :], torch.cat(wanted[:3], 1))


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("method", BOTH, ids=repr)
def test_positions_with_gaps_are_no_packed_documents(family, method):
    """Without a mask and without a cache transformers takes a gap in the positions for the start of another document."""
    model, inputs = tiny(family), prompts(family, (2,))
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with torch.no_grad(), winnow.reduced(model, method):
        wanted = model(**inputs, use_cache=True).logits
        found = model(**bare, use_cache=False).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", BOTH, ids=repr)
def test_both_sides_of_padding_and_the_loss_by_hand(family, method):
    """Whichever side is padded, the last word sees the same; the loss is the mean over the labels that are left."""
    model, last, losses = tiny(family), [], []
    for side in ("left", "right"):
        torch.manual_seed(2)
        inputs = prompts(family, (2, 1, 0), side=side)
        ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
        first = real.cumsum(1) == 1  # which only padding on the left would predict
        labels = ids.masked_fill((ids == IMAGE) | ~real | first, -100)
        with torch.no_grad(), winnow.reduced(model, method), winnow.watch(model) as run:
            said = model(**inputs)
            end = run.columns.index.masked_fill(~run.columns.certain(), -1).argmax(1)
            last.append(said.logits[torch.arange(3), end])
            out = model(**inputs, labels=labels)
            held = run.columns.labels(labels)
            of_seven = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(7)).loss
        wanted = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), held[:, 1:].flatten())
        torch.testing.assert_close(out.loss, wanted)
        left = int((held != -100).sum())
        assert left == int((labels != -100).sum())
        torch.testing.assert_close(of_seven, wanted * left / 7)  # the first column is never a label
        losses.append(out.loss)
    torch.testing.assert_close(last[0], last[1], atol=2e-5, rtol=2e-5)
    if method.facts.where == "tower":  # with labels FastV asks the rows before the answers, which padding moves
        torch.testing.assert_close(losses[0], losses[1], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("plus", [False, True])
def test_prumerge_of_attention_without_outliers(plus):
    """All patches alike, where the authors' code divides by zero: one token and the rest, image by image."""
    x = torch.ones(2, 17, 8)
    x[1] = torch.randn(17, 8)
    signals = Signals(k=x[:, None, 1:], cls_q=x[:, None, 0], cls_k=x[:, None, 0])
    reducer = PruMerge(plus=plus).build(1, 8, 1, 16, 0)
    out = reducer(Tokens(x[:, 1:], Ledger.start(2, 16), (4, 4)), signals, 0)
    counts = out.ledger.counts().tolist()
    assert out.x.isfinite().all() and 2 <= counts[0] <= 5 and counts[1] >= 2
