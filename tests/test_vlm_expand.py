"""expand=True: methods inside a tower whose tokens go back to their patches before what needs the whole grid."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from vlms import prompts, tiny

import winnow
from winnow import EViT, FastV, Random, ToMe, TopK
from winnow.cli import main
from winnow.measure import vlm_macs

FAMILIES = ("llava", "llava_next", "llava_onevision")
IMAGES = (1, 0, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_merged_it_is_the_plain_model(family):
    model, inputs = tiny(family), prompts(family, IMAGES)
    words = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**inputs, **words)
    with winnow.reduced(model, ToMe(r=0), expand=True):
        ours = model.generate(**inputs, **words)
    again = model.generate(**inputs, **words)
    assert torch.equal(plain.sequences, ours.sequences) and torch.equal(plain.sequences, again.sequences)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, ours.logits, strict=True))


def _given(model, inputs):
    """The tiles that the host gives its tower."""
    found: list[torch.Tensor] = []
    embeddings = model.model.vision_tower.embeddings
    hook = embeddings.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [ToMe(r=2), ToMe(r=3, proportional=False)], ids=repr)
def test_every_patch_has_the_features_of_its_token(family, method):
    model, inputs = tiny(family), prompts(family, IMAGES)
    core = model.model
    tower, pixels = copy.deepcopy(core.vision_tower), _given(model, inputs)
    config, prefix = model.config, int(model.config.vision_feature_select_strategy == "default")
    seen: list[torch.Tensor] = []
    with torch.no_grad(), winnow.reduced(tower, method), winnow.watch(tower) as run:
        states = tower(pixels, output_hidden_states=True).hidden_states
        layer = config.vision_feature_layer % len(states)
        wanted = core.multi_modal_projector(run.ledgers[layer - 1].dense(states[layer][:, prefix:]))
    hook = core.multi_modal_projector.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad(), winnow.reduced(model, method, expand=True), winnow.watch(model) as run:
        out = model(**inputs)
    hook.remove()
    assert out.logits.shape[1] == inputs["input_ids"].shape[1], "the language model reads every column"
    assert run.ledgers[layer - 1].n < wanted.shape[1] and len(torch.unique(seen[0][0], dim=0)) < wanted.shape[1]
    torch.testing.assert_close(seen[0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "method", "reason"),
    [
        ("llava_next", TopK(layers=(1,)), "drops patches"),
        ("llava_next", FastV(), "inside the tower"),
        ("llava_onevision", Random(at="tower"), "inside the tower"),
        ("qwen2_5_vl", ToMe(r=1), "does not know the blocks"),
        ("smolvlm", ToMe(r=1), "does not know the blocks"),
    ],
)
def test_what_it_cannot_do_is_refused(family, method, reason):
    model = tiny(family)
    with pytest.raises(TypeError, match=reason):
        winnow.reduce(model, method, expand=True)
    assert not hasattr(model, "reducer")


def test_the_way_out_is_named():
    with pytest.raises(TypeError, match="expand=True"):
        winnow.reduce(tiny("llava_next"), EViT(layers=(1,)))
    with pytest.raises(TypeError, match="vision-language"):
        winnow.reduce(tiny("llava").model.vision_tower, ToMe(r=1), expand=True)


def test_the_saving_is_the_tower_s(monkeypatch, capsys, tmp_path):
    model = tiny("llava")
    plain, inside = vlm_macs(model.config, None, 5), vlm_macs(model.config, ToMe(r=2), 5, expand=True)
    assert inside.vision < plain.vision and inside.image_tokens == plain.image_tokens
    assert (inside.prefill, inside.projector, inside.kv_bytes) == (plain.prefill, plain.projector, plain.kv_bytes)
    model.save_pretrained(tmp_path / "model")
    words = ["measure", f"hf:{tmp_path / 'model'}", "--text", "5", "--method", "ToMe(r=2)", "--expand", "--json"]
    monkeypatch.setattr(sys, "argv", ["winnow", *words, "--pairs", "9", "--results", str(tmp_path / "rows.jsonl")])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    whole, ours = json.loads(capsys.readouterr().out)
    assert ours["way"] == "auto + expand" and ours["macs"]["counted"] == pytest.approx(inside.total, rel=0.02)
    assert whole["vlm"]["image_tokens"] == ours["vlm"]["image_tokens"]


def test_it_is_saved_with_the_model(tmp_path):
    model = winnow.reduce(tiny("llava"), ToMe(r=2), expand=True)
    assert model.config.winnow == {"method": "ToMe(r=2)", "way": "auto", "expand": True}
    winnow.save(model, tmp_path / "reducer.safetensors")
    inputs = prompts("llava", IMAGES)
    with torch.no_grad():
        again = winnow.load(tiny("llava"), tmp_path / "reducer.safetensors")
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
