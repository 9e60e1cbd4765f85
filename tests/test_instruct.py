"""Instruction tuning: what its stages train, exact resume, and folders that come back whole."""

from __future__ import annotations

import json
import os
import signal
from functools import partial

import pytest
import torch
from instruct_vlm import build, changed, lines, run, write_json, write_recipe
from safetensors.torch import load_file

import winnow
from winnow._llava import load_llava
from winnow.data.conversations import IMAGE, open_conversations
from winnow.tasks.instruct import Instruct, Training
from winnow.train import load_recipe
from winnow.train.step import Stepper
from winnow.train.stop import Stopped

pytestmark = pytest.mark.usefixtures("no_curves")


# ---- stages


def test_stage_one_moves_the_projector_and_stage_two_the_language_model_too(folder, recipe_file, tmp_path):
    row = run(recipe_file, tmp_path / "one", "instruct.train.llm=false")
    assert changed(folder, tmp_path / "one" / "last") == {"projector"}
    (*_, checkpoint) = sorted((tmp_path / "one" / "checkpoints").iterdir())
    assert all("projector" in key for key in load_file(checkpoint / "task.safetensors")), (
        "what is frozen is not written"
    )
    assert row.train.steps == 2 and row.data.n == 5 and row.accuracy.value == row.train.last
    again = f"model.name=hf:{tmp_path / 'one' / 'last'}"
    run(recipe_file, tmp_path / "two", again)
    assert changed(tmp_path / "one" / "last", tmp_path / "two" / "last") == {"projector", "llm"}
    (epoch,) = lines(tmp_path / "two", "epoch")
    assert {"loss", "top1", "token_top1"} <= set(epoch["val"]) and "text_loss" not in epoch["val"]
    assert {"loss", "grad_norm", "learning_rate", "lm_loss", "top1"} <= set(lines(tmp_path / "two")[0])


def test_the_loss_is_transformers_own_and_reduced_labels_follow(recipe_file):
    training = Training(load_recipe(recipe_file))
    batch = training.joined([training.set[i] for i in range(4)])
    inputs = training.inputs(batch, 0, torch.device("cpu"))
    ids, mask, labels, pixels, images = inputs[:5]
    for method in (None, "Random(keep=Exactly(2), at='tower')", "FastV(layer=1, keep=Exactly(2))"):
        if method:
            winnow.reduce(training.model, winnow.parse(method))
        module = Instruct(training.model, dict.fromkeys(("vision", "projector", "llm", "reducer"), True), 4).eval()
        theirs = training.model(
            input_ids=ids, attention_mask=mask, pixel_values=pixels[:, 0][images > 0], labels=labels
        ).loss
        assert float(module(*inputs)["loss"].detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
        if method:
            winnow.restore(training.model)


def test_text_alone_goes_through_every_layer_once_and_is_what_it_is_alone(recipe_file):
    """Sharded weights are gathered in forwards: one more than another process has would wait for ever."""
    training = Training(load_recipe(recipe_file))
    inputs = training.inputs(training.joined([training.set[i] for i in (6, 7)]), 0, torch.device("cpu"))
    calls = []
    for layer in (training.model.model.vision_tower.encoder.layers[0], training.model.model.language_model.layers[0]):
        layer.register_forward_hook(lambda *args: calls.append(1))
    loss = training.module(*inputs)["loss"].detach()
    assert calls == [1, 1]
    ids, mask, labels = inputs[:3]
    theirs = training.model(input_ids=ids, attention_mask=mask, labels=labels).loss.detach()
    assert float(loss) == pytest.approx(float(theirs), rel=1e-5)


def test_parts_of_a_batch_and_recomputed_blocks_are_the_whole(recipe_file, tmp_path):
    run(recipe_file, tmp_path / "one")
    run(recipe_file, tmp_path / "parts", "optim.accumulate=2")
    run(recipe_file, tmp_path / "again", "optim.checkpoint=true")
    for other in ("parts", "again"):
        for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / other), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def test_the_projector_may_have_a_rate_of_its_own(folder, recipe_file, tmp_path):
    """AdamW's first step moves a weight by its rate."""
    run(recipe_file, tmp_path / "run", "batch=8", "optim.lr=1e-3", "optim.mm_projector_lr=1e-5")
    before, after = (load_llava(f"hf:{path}").model.state_dict() for path in (folder, tmp_path / "run" / "last"))
    for part, rate in {"multi_modal_projector": 1e-5, "language_model.layers": 1e-3}.items():
        moved = max(float((after[key] - before[key]).abs().max()) for key in before if part in key)
        assert moved == pytest.approx(rate, rel=0.01)
    with pytest.raises(ValueError, match=r"optim\.mm_projector_lr needs task: instruct and"):
        run(recipe_file, tmp_path / "none", "optim.mm_projector_lr=1e-5", "instruct.train.projector=false")


def test_text_alone_costs_nothing_and_is_scored_apart(recipe_file, folder, tmp_path):
    sets = (
        "data.train.split='[6:]'",
        "batch=2",
        "data.val.split='[4:]'",
        "method=AdaptiveKeep(text=True)",
        "eval.before=true",
    )
    row = run(recipe_file, tmp_path / "run", *sets, "optim.lr=1e-2")
    (line,), (epoch,), (before,) = (lines(tmp_path / "run", event) for event in ("step", "epoch", "before"))
    assert line["grad_norm"] > 0 and 0 < epoch["val"]["text_loss"] < before["val"]["text_loss"]
    assert row.train.figures["before_text_loss"] == before["val"]["text_loss"]
    assert changed(folder, tmp_path / "run" / "last") == {"llm"}


def test_a_reduced_model_is_saved_and_comes_back_with_one_call(folder, recipe_file, tmp_path):
    method = "DRIP(rate=0.5, after=1)"
    run(recipe_file, tmp_path / "run", f"method={method}", "batch=8")
    processor, model = winnow.load_vlm(f"hf:{tmp_path / 'run' / 'last'}")
    assert repr(winnow.reducer_of(model).method) == method
    image = open_conversations(str(folder / "told.json"))[0].pictures()[0]
    asked = processor(images=[image], text=[f"USER: {IMAGE} what is it ? ASSISTANT:"], return_tensors="pt")
    first = model.generate(**asked, max_new_tokens=5, do_sample=False)
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    again = winnow.load_vlm(f"hf:{tmp_path / 'again'}")[1]
    assert torch.equal(again.generate(**asked, max_new_tokens=5, do_sample=False), first)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="was saved with a reducer"):
        run(recipe_file, tmp_path / "on", f"model.name=hf:{tmp_path / 'again'}", "batch=8")
    on = Training(load_recipe(recipe_file, (f"model.name=hf:{tmp_path / 'again'}", f"method={method}"))).model
    assert all(torch.equal(value, on.state_dict()[name]) for name, value in model.state_dict().items())
    plain = winnow.load_vlm(f"hf:{tmp_path / 'again'}", reduced=False)[1]
    assert not hasattr(plain, "reducer") and not hasattr(winnow.restore(again).config, "winnow")


@pytest.mark.parametrize(("text", "said_"), [
    ("instruct.max_length=9", "told: instruct.max_length=9 cuts every answer off (an image has 4 tokens, i0 "),
    ("instruct.template=plain", "takes one question and one answer, not 4 turns; use vicuna_v1 or chat"),
    ("instruct.template=llama", "'plain', 'vicuna_v1' or 'chat'"),
    ("data.train.path=told.json*two", "write NAME, NAME*2"),
    ("data.train.path=nowhere.json", "no conversations in nowhere.json"),
    ("data.train.split=train", "has no split 'train'"),
    ("batch=9", "batch=9 is more than the 8 training conversations"),
    ("label_smoothing=0.1", "label_smoothing means nothing for task: instruct"),
    ("model.name=timm:vit_tiny_patch16_224", "hf:ID_OR_PATH"),
    ("task=classify", "keys of instruct need task: instruct"),
    ("instruct.vision_weights=x", "needs the name of a tower"),
    ("instruct.projector=nowhere.bin", "no such file: nowhere.bin; instruct.projector is a file or one of mlp"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_training(recipe_file, tmp_path, text, said_):
    more = ("instruct.pad=false",) if text.startswith("task") else ()
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run(recipe_file, tmp_path / "run", text, *more)
    assert said_ in str(error.value) and "\n" not in str(error.value)
    assert not lines(tmp_path / "run")


def test_an_image_that_cannot_be_decoded_is_counted_and_a_cut_answer_is_not_right(tmp_path, capsys):
    build(tmp_path)
    write_json(tmp_path)
    (tmp_path / "0.png").write_bytes(b"junk")
    row = run(write_recipe(tmp_path), tmp_path / "run")
    assert sum(4 * line["failed"] for line in lines(tmp_path / "run")) == 1 and row.data.n == 4
    assert "left out of val: i0 cannot be decoded" in capsys.readouterr().err
    task = Training(load_recipe(tmp_path / "run" / "recipe.yaml"))
    nll, tokens, right = torch.tensor([[1.0, 1, 1, 0], [2, 2, 2, 0], [2, 2, 1, 0]])
    assert task._metrics(nll, tokens, right)["top1"] == 0.5


def test_one_dialogue_among_many_captions_is_found_before_training(folder, recipe_file, tmp_path):
    rows = json.loads((folder / "told.json").read_text())
    late = folder / "late.json"
    late.write_text(json.dumps([rows[0]] * 20 + [rows[1]]))
    sets = (f"data.train.path={late}", f"data.val={{path: {late}, split: '[:4]'}}", "instruct.template=plain")
    with pytest.raises(ValueError, match="i1: template plain takes one question"):
        Training(load_recipe(recipe_file, sets))


# ---- exactly


NOISY = (
    "method=DRIP(rate=0.5, after=1)",
    "instruct.train.vision=true",
    "instruct.group_by_modality_length=true",
    "optim.mm_projector_lr=1e-4",
    "epochs=2",
)
FROZEN = ("instruct.train.llm=false", "instruct.train.projector=false", "epochs=2")
RUNS = {
    "DRIP, everything": NOISY,
    "AdaptiveKeep, alone": ("method=AdaptiveKeep(train='zero')", *FROZEN),
    "AdaptiveKeep, jointly": ("method=AdaptiveKeep(fuse='after', text=True)", "epochs=2"),
}


def cut(monkeypatch, step: int, act) -> None:
    """A signal arrives during that step of a run, which saves and stops."""
    advance = Stepper.advance

    def advancing(self, at, *args):
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, at, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "advance", advancing)
        with pytest.raises(Stopped):
            act()


@pytest.mark.parametrize("sets", RUNS.values(), ids=RUNS)
def test_a_run_cut_in_the_middle_goes_on_to_the_bit(recipe_file, tmp_path, monkeypatch, sets):
    run(recipe_file, tmp_path / "whole", *sets)
    cut(monkeypatch, 2, partial(run, recipe_file, tmp_path / "cut", *sets))
    assert len(lines(tmp_path / "cut")) == 3
    run(recipe_file, tmp_path / "cut", *sets, resume=True)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "last.safetensors") for name in ("cut", "whole"))
    assert any(key.startswith("reducer.") for key in other)
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_a_frozen_language_model_is_there_after_a_resume(recipe_file, tmp_path, monkeypatch):
    sets = ("instruct.train.llm=false", "epochs=2")
    run(recipe_file, tmp_path / "whole", *sets)
    cut(monkeypatch, 1, partial(run, recipe_file, tmp_path / "cut", *sets))
    run(recipe_file, tmp_path / "cut", *sets, resume=True)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert not changed(tmp_path / "cut" / "last", tmp_path / "whole" / "last")
