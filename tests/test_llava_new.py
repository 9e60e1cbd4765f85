"""New LLaVAs of a tower and a language model, projectors of three kinds and two formats, LoRA, image sizes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from instruct_vlm import WORDS, changed, halves, lines, run
from safetensors.torch import load_file, save_file
from torch import nn

import winnow
from winnow._clip import load_clip
from winnow._llava import load_llava, projector_state
from winnow._llava_new import new_llava, open_clip_tower
from winnow._llava_projected import Downsample
from winnow.data.conversations import open_conversations
from winnow.data.dialogue import spoken
from winnow.data.sample import IMAGE, Sample
from winnow.measure import count_macs, count_vlm_macs, vlm_macs
from winnow.tasks.instruct import Training
from winnow.train import load_recipe
from winnow.train.task import Place

pytestmark = pytest.mark.usefixtures("no_curves")


def alone() -> Place:
    """One process on the CPU."""
    return Place(0, 1, torch.device("cpu"), lambda tensor: tensor)


def test_projector_files_of_both_formats_load(folder, tmp_path, llava):
    state = {key: value + 1 for key, value in llava.model.state_dict().items()}
    theirs = projector_state(state)
    assert set(theirs) == {f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    torch.save(theirs, tmp_path / "mm_projector.bin")
    torch.save({key: value for key, value in state.items() if "projector" in key}, tmp_path / "hf.bin")
    for name in ("mm_projector.bin", "hf.bin"):
        loaded = load_llava(f"hf:{folder}", projector=tmp_path / name).model.model.multi_modal_projector
        assert torch.equal(loaded.linear_1.bias, state["model.multi_modal_projector.linear_1.bias"])
    torch.save({"a": torch.ones(1)}, tmp_path / "none.bin")
    with pytest.raises(ValueError, match="holds no projector"):
        load_llava(f"hf:{folder}", projector=tmp_path / "none.bin")


# ---- new models, and what else may be chosen


@pytest.fixture(scope="module")
def apart(folder) -> Path:
    halves(folder)
    return folder


@pytest.mark.parametrize(("projector", "slots"), [("mlp", 4), ("linear", 4), ("downsample", 1)])
def test_a_tower_and_a_language_model_become_a_llava(apart, folder, recipe_file, tmp_path, projector, slots):
    sets = (f"model.name=hf:{apart}/llm", f"instruct.vision=hf:{apart}/tower", f"instruct.projector={projector}")
    run(recipe_file, tmp_path / "run", *sets, "instruct.train.llm=false", "batch=8")
    found = load_llava(f"hf:{tmp_path / 'run' / 'last'}")
    assert found.slots == slots and projector in ("mlp", found.model.config.to_dict().get("projector"))
    one, other = (load_llava(f"hf:{path}").model.model for path in (folder, tmp_path / "run" / "last"))
    for part in ("vision_tower", "language_model"):
        theirs = getattr(other, part).state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in getattr(one, part).state_dict().items())
    image = open_conversations(str(folder / "told.json"))[0].pictures()[0]
    asked = found.processor(images=[image], text=[f"{IMAGE} what"], return_tensors="pt")
    assert int((asked["input_ids"] == WORDS.index("<image>")).sum()) == slots, (
        "the processor counts as the projector gives"
    )
    found.model.generate(**asked, max_new_tokens=2)
    again = f"instruct.projector={tmp_path / 'run' / 'last' / 'mm_projector.bin'}"
    sets = (f"model.name=hf:{tmp_path / 'run' / 'last'}", again, "batch=8")
    run(recipe_file, tmp_path / "again", *sets)


def test_joined_patches_are_refused_what_breaks_their_grid(apart, recipe_file, tmp_path):
    sets = (f"model.name=hf:{apart}/llm", f"instruct.vision=hf:{apart}/tower", "instruct.projector=downsample")
    with pytest.raises(ValueError, match="no square grid: reduce in the language model"):
        run(recipe_file, tmp_path / "run", *sets, "method=Random(keep=Exactly(3), at='tower')")
    with pytest.raises(ValueError, match="needs the name of a tower"):
        run(recipe_file, tmp_path / "run", "instruct.projector=linear")


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("projector", ["mlp", "linear", "downsample"])
def test_every_projector_is_in_the_closed_form(apart, projector, size):
    """Of even and odd grids, plain and reduced: what is counted is the closed form."""
    found = load_llava(f"hf:{apart}/llm", vision=f"hf:{apart}/tower", projector=projector, size=size)
    image = open_conversations(str(apart / "told.json"))[0].pictures()[0]
    asked = found.processor(images=[image], text=[f"{IMAGE} what"], return_tensors="pt")
    text = int((asked["input_ids"] != WORDS.index("<image>")).sum())
    config = found.model.config
    said = vlm_macs(config, None, text).total
    assert count_vlm_macs(config, None, text).total == count_macs(found.model, {**asked, "logits_to_keep": 1}) == said
    inside = () if projector == "downsample" else ("DRIP(rate=0.5, after=1)", "ToMe(r=1)")
    for method in map(winnow.parse, ("DivPrune(keep=Exactly(1))", *inside)):
        winnow.reduce(found.model, method)
        counted = count_macs(found.model, {**asked, "logits_to_keep": 1})
        assert counted == vlm_macs(config, method, text).total
        winnow.restore(found.model)


def test_odd_grids_are_filled_up():
    features = torch.randn(2, 9, 4)
    joined = Downsample(4, 6)
    first = torch.cat([features[:, [0, 1, 3, 4]].flatten(1), features[:, [2, 5]].flatten(1)], 1)
    seen = []
    joined.norm.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    assert joined(features).shape == (2, 4, 6)
    assert torch.equal(seen[0][:, 0], first[:, :16]) and torch.equal(
        seen[0][:, 1, [0, 1, 2, 3, 8, 9, 10, 11]], first[:, 16:]
    )
    assert not seen[0][:, 1, 4:8].any() and not seen[0][:, 3, 4:].any()


SMALL_CLIP = {
    "embed_dim": 16, "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 3, "width": 32, "head_width": 16},
    "text_cfg": {"context_length": 8, "layers": 1, "width": 16, "heads": 2},
}  # fmt: skip


def test_a_tower_trained_by_contrast_goes_on_with_its_reducer(apart, recipe_file, tmp_path, monkeypatch):
    pytest.importorskip("open_clip")
    monkeypatch.setattr("winnow._clip._configured", lambda *_: SMALL_CLIP)  # no small CLIP has a name
    method = "DRIP(rate=0.5, after=1)"
    clip = load_clip("open_clip:ViT-B-32").model
    visual, images = clip.visual, torch.randn(2, 3, 16, 16)
    winnow.reduce(clip, winnow.parse(method))
    nn.init.normal_(next(winnow.reducer_of(clip).parameters()))
    file = tmp_path / "clip.safetensors"
    save_file({key: value.contiguous() for key, value in clip.state_dict().items()}, file, {"method": method})
    winnow.restore(clip)
    tower, _ = open_clip_tower("open_clip:ViT-B-32", file)
    with torch.no_grad():
        assert torch.allclose(tower(images).pooler_output @ visual.proj, visual(images), atol=1e-5)
    vision = (f"model.name=hf:{apart}/llm", "instruct.vision=open_clip:ViT-B-32", f"instruct.vision_weights={file}")
    run(recipe_file, tmp_path / "run", *vision, f"method={method}", "batch=8", "instruct.train.reducer=false")
    model = winnow.load_vlm(f"hf:{tmp_path / 'run' / 'last'}")[1]
    kept, trained = model.state_dict(), load_file(file)
    assert all(torch.equal(kept[key], trained[key]) for key in trained if key.startswith("reducer."))
    assert torch.equal(kept["model.vision_tower.embeddings.class_embedding"], trained["visual.class_embedding"])


def test_images_of_another_size(folder, recipe_file, tmp_path):
    run(recipe_file, tmp_path / "run", "instruct.size=24", "batch=8")
    found = load_llava(f"hf:{tmp_path / 'run' / 'last'}")
    assert found.size == (24, 24) and found.slots == 9
    with pytest.raises(ValueError, match="give a multiple of the patch, 8 pixels"):
        load_llava(f"hf:{folder}", size=20)


def test_lora_learns_beside_the_language_model_and_is_added_to_it(folder, recipe_file, tmp_path):
    pytest.importorskip("peft")
    sets = ("instruct.train.llm=lora", "instruct.lora_r=2", "instruct.lora_alpha=4", "instruct.train.projector=false")
    run(recipe_file, tmp_path / "run", *sets, "optim.lr=1e-2")
    assert changed(folder, tmp_path / "run" / "last") == {"llm"}
    last = load_file(tmp_path / "run" / "last.safetensors")
    assert sum(".lora_A." in key for key in last) == 14, "seven linear layers in each of two blocks"
    plain = load_llava(f"hf:{folder}").model.state_dict()
    assert all(
        torch.equal(last[key.replace(".weight", ".base_layer.weight")], plain[key])
        for key in plain
        if "q_proj" in key and "language" in key
    )
    (epoch,) = lines(tmp_path / "run", "epoch")
    training = Training(load_recipe(recipe_file, (f"model.name=hf:{tmp_path / 'run' / 'last'}",)))
    again = training.evaluate(training.module, alone())
    assert again.metrics["loss"] == pytest.approx(epoch["val"]["loss"], rel=1e-5)


def test_a_language_models_chat_template_shows_images_too(apart, tmp_path):
    shutil.copytree(apart / "llm", tmp_path / "llm")
    tokenizer = tokenizer_of(tmp_path / "llm")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] | trim }}</s>{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt else '' }}"
    )
    tokenizer.save_pretrained(tmp_path / "llm")
    processor, _ = new_llava(f"hf:{tmp_path / 'llm'}", f"hf:{apart / 'tower'}")
    sample = Sample("s", (("human", f"what {IMAGE}"), ("gpt", "red"), ("human", "it ?"), ("gpt", "a")), (lambda: None,))
    wanted = [("user: <image>\nwhat</s>assistant: ", False), ("red</s>", True), ("", False)]
    assert spoken(sample, "chat", processor) == [
        *wanted,
        ("user: it ?</s>assistant: ", False),
        ("a</s>", True),
        ("", False),
    ]
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template: use vicuna_v1"):
        spoken(sample, "chat", processor)


def tokenizer_of(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
