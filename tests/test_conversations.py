"""Conversations: formats, mixtures and their refusals; which tokens are learned, token by token; batches of one modality."""

from __future__ import annotations

import base64
import io
import json
import sys
import tarfile
from collections import Counter

import pytest
import torch
from instruct_vlm import SLOTS, WORDS, said

from winnow.cli import main
from winnow.data.conversations import IMAGE, Sample, mixed, open_conversations
from winnow.data.dialogue import IGNORE, SYSTEM, VICUNA, encode, spoken
from winnow.data.instruct import Grouped

# ---- which tokens are learned

SAMPLE = Sample(
    "s",
    (("human", f"what colour is this ? {IMAGE}"), ("gpt", "red"), ("human", "what is it ?"), ("gpt", "a blue image")),
    (lambda: None,),
)


def told(sample, template, processor, longest=99):
    ids, labels, images = encode(spoken(sample, template, processor), processor.tokenizer, "<image>", SLOTS, longest)
    words = processor.tokenizer.convert_ids_to_tokens(ids.tolist())
    assert torch.equal(labels[labels != IGNORE], ids[labels != IGNORE])
    return list(zip(words, (labels != IGNORE).tolist())), images


def learned(text: str) -> list[tuple[str, bool]]:
    """Words in brackets are learned."""
    return [(word.strip("[]"), word.startswith("[")) for word in text.split()]


def test_vicuna_v1_learns_the_answers_and_what_ends_them(llava):
    found, images = told(SAMPLE, "vicuna_v1", llava.processor)
    wanted = (
        f"{SYSTEM} USER: <image> <image> <image> <image> what colour is this ? ASSISTANT: [red] [</s>] "
        "USER: what is it ? ASSISTANT: [a] [blue] [image] [</s>]"
    )
    assert found == learned(wanted) and images == 1


def test_the_template_written_beside_the_weights_asks_as_was_taught(llava, monkeypatch):
    monkeypatch.setattr(llava.processor, "chat_template", VICUNA)
    pieces = spoken(SAMPLE, "vicuna_v1", llava.processor)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is this ?"}]}]
    asked = llava.processor.apply_chat_template(messages, add_generation_prompt=True)
    assert asked + " " == "".join(words for words, _ in pieces[:2])
    messages += [{"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    messages += [{"role": "user", "content": [{"type": "text", "text": "what is it ?"}]}]
    assert llava.processor.apply_chat_template(messages) + " " == "".join(words for words, _ in pieces[:4])


def test_plain_is_the_image_and_its_caption(llava):
    caption = Sample("c", (("human", f"Describe the image concisely. {IMAGE}"), ("gpt", "a red image ")), SAMPLE.images)
    found, _ = told(caption, "plain", llava.processor)
    assert found == learned("<image> <image> <image> <image> [a] [red] [image]")
    assert spoken(caption, "plain", llava.processor)[-1] == ("a red image\n", True)
    with pytest.raises(ValueError, match="s: template plain takes one question and one answer, not 4 turns"):
        spoken(SAMPLE, "plain", llava.processor)


def test_the_models_own_template_and_an_end_it_leaves_out(llava):
    found, _ = told(SAMPLE, "chat", llava.processor)
    wanted = (
        "<s> user: <image> <image> <image> <image> what colour is this ? assistant: [red] [</s>] "
        "user: what is it ? assistant: [a] [blue] [image] [</s>]"
    )
    assert found == [(word if word in WORDS else "<unk>", known) for word, known in learned(wanted)]


def test_a_template_that_ends_answers_itself_gets_no_second_end(llava, monkeypatch):
    ended = llava.processor.chat_template.replace("{% endfor %}{% endfor %}", "{% endfor %}</s> {% endfor %}")
    monkeypatch.setattr(llava.processor, "chat_template", ended)
    words = [word for word, known in told(SAMPLE, "chat", llava.processor)[0] if known]
    assert words == ["red", "</s>", "a", "blue", "image", "</s>"]


def test_interleaved_text_is_learned_whole_but_for_its_images(llava):
    sample = Sample("i", (("text", f"hello {IMAGE} there {IMAGE} red"),), SAMPLE.images * 2)
    found, images = told(sample, "plain", llava.processor)
    assert found == learned(
        "[hello] <image> <image> <image> <image> [there] <image> <image> <image> <image> [red] [</s>]"
    )
    assert images == 2


@pytest.mark.parametrize(
    ("longest", "ends", "images"),
    [(4, "hello", 0), (5, "<image>", 1), (6, "<image>", 1), (8, "<image>", 1), (9, "<image>", 2), (10, "red", 2)],
)
def test_what_is_cut_is_cut_behind_whole_images(llava, longest, ends, images):
    sample = Sample("i", (("text", f"hello {IMAGE}{IMAGE} red"),), SAMPLE.images * 2)
    found, left = told(sample, "plain", llava.processor, longest)
    assert found[-1][0] == ends and left == images and len(found) <= longest
    assert sum(word == "<image>" for word, _ in found) == images * SLOTS


def test_a_byte_pair_token_that_begins_with_the_space_before_an_answer_is_learned():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "ĠUSER", "Ġred", ":", "USER"]
    merges = [("U", "S"), ("US", "E"), ("USE", "R"), ("Ġ", "USER"), ("r", "e"), ("re", "d"), ("Ġ", "red")]
    parts = [*words, *"USERred", "Ġ", "US", "USE", "re", "red"]
    bpe = Tokenizer(models.BPE({word: at for at, word in enumerate(dict.fromkeys(parts))}, merges, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>", unk_token="<unk>")
    ids, labels, _ = encode([("USER: ", False), ("red</s>", True)], fast, "<image>", 1, 99)
    assert fast.convert_ids_to_tokens(ids[labels != IGNORE].tolist()) == ["Ġred", "</s>"]


# ---- data


def test_llavas_json_is_read_and_counted_by_kind(folder):
    found = open_conversations(str(folder / "told.json"))
    assert len(found) == 8 and found[0].pictures()[0].size == (30, 20)
    assert found.kinds() == {"question": 3, "conversation": 3, "question, text only": 2}
    assert len(open_conversations(str(folder / "told.json"), "[2:]", 3)) == 3
    asked = [("0.png", "Describe the image concisely.\n<image>"), ("0.png", "<image>\nWhat do you see happening?")]
    asked += [(["0.png", "1.png"], "<image> and <image>")]
    captions = [{"image": image, "conversations": said([("human", words), ("gpt", "a")])} for image, words in asked]
    (folder / "kinds.json").write_text(json.dumps(captions))
    kinds = open_conversations(str(folder / "kinds.json")).kinds()
    assert kinds == {"caption": 1, "detailed description": 1, "question, several images": 1}


def test_every_question_of_every_scene_is_a_sample():
    found = open_conversations("scenes", "val[:16]")
    assert len(found) == 16 and len({sample.key for sample in found.samples}) == 16
    assert found[0].turns[1][1] in found.samples[0].turns[1] and found[9].pictures()[0].size == (96, 96)
    with pytest.raises(ValueError, match="train, val, test"):
        open_conversations("scenes", "dev")


def test_scenes_are_told_in_every_way():
    asked, texts = (open_conversations(name, "val").samples for name in ("scenes", "scene_texts"))
    for sample in texts[:9]:
        told, question = sample.turns[0][1].rsplit(", ", 1)
        shape = question.removeprefix("what colour is the ").removesuffix("?")
        assert f"a {sample.turns[1][1]} {shape}" in told.split(", ") and not sample.images
    assert {one.turns[1][1] for one in texts} <= {one.turns[1][1] for one in asked} and len(texts) == len(asked)
    page = open_conversations("scene_pages", "val")[1]
    captions = [one.turns[1][1] for one in open_conversations("scene_captions", "val[2:4]").samples]
    assert page.turns[0][1] == f"{IMAGE} {captions[0]} {IMAGE} {captions[1]}" and len(page.pictures()) == 2
    assert open_conversations("scene_captions+scene_texts@0.5", "val").kinds() == {
        "question, text only": 2000, "caption": 500,
    }  # fmt: skip


def test_mixtures_repeat_and_take_shares():
    lists = {name: [Sample(f"{name}{i}", (("human", ""), ("gpt", ""))) for i in range(10)] for name in "abc"}
    found = [one.key for one in mixed("a+b*2+mine", lists.__getitem__, {"mine": "c@0.5 + a"})]
    assert (
        Counter(key[0] for key in found) == {"a": 20, "b": 20, "c": 5} and len({k for k in found if k[0] == "c"}) == 5
    )
    assert found == [one.key for one in mixed("a+b*2+mine", lists.__getitem__, {"mine": "c@0.5 + a"})]
    for wrong in ("a*", "a*0", "a@2", "a++b", "a*2@0.5", ""):
        with pytest.raises(ValueError, match=r"write NAME, NAME\*2"):
            mixed(wrong, lists.__getitem__, {})


def test_interleaved_lines_place_each_image_before_its_sentence(folder):
    png = base64.b64encode((folder / "0.png").read_bytes()).decode()
    infos = [{"image_base64": png, "matched_text_index": 2}, {"image_name": "1.png", "matched_text_index": 0}]
    last = {"image_name": "2.png", "matched_text_index": 3}
    rows = [
        {"text_list": ["one <image>", "two", "three", ""], "image_info": [last, *infos]},
        {"text_list": ["alone"], "image_info": []},
    ]
    (folder / "mmc4.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = open_conversations(str(folder / "mmc4.jsonl")).samples
    told = "<image>\none <IMAGE> two<image>\nthree"
    assert first.turns == (("text", told),) and len(first.pictures()) == 2, "nothing follows the third image"
    assert second.turns == (("text", "alone"),) and first.kind == second.kind == "interleaved"


@pytest.mark.parametrize(("row", "said_"), [
    ({"image": "0.png", "conversations": said([("human", "hm"), ("gpt", "a")])}, "1 images and 0 times <image>"),
    ({"conversations": said([("human", "<image>"), ("gpt", "a")])}, "0 images and 1 times <image>"),
    ({"image": "no.png", "conversations": said([("human", "<image>"), ("gpt", "a")])}, "no image"),
    ({"conversations": said([("human", "a"), ("human", "a")])}, "must speak in turn"),
    ({"conversations": said([("human", "a"), ("dog", "a")])}, "nobody knows who 'dog' is"),
    ({"text": "a"}, "neither conversations nor text_list"),
    ({"text_list": ["a"], "image_info": [{"image_name": "0.png"}]}, "needs a matched_text_index"),
    ({"text_list": ["a"], "image_info": [{"image_name": "0.png", "matched_text_index": 1}]}, "one of its 1 sentences"),
    ({"text_list": [""], "image_info": [{"image_name": "0.png", "matched_text_index": 0}]}, "it says nothing"),
    ({"text_list": "a"}, "must be a list of sentences"),
    ([1], "it is a list"),
])  # fmt: skip
def test_one_bad_sample_is_refused_in_one_line(folder, row, said_):
    good = {"conversations": said([("human", "a"), ("gpt", "a")])}
    (folder / "bad.json").write_text(json.dumps([good, row]))
    with pytest.raises(ValueError, match="1 of 2 samples cannot be used, the first is sample 2") as error:
        open_conversations(str(folder / "bad.json"))
    assert said_ in str(error.value) and "\n" not in str(error.value)


def test_batches_are_of_one_modality_and_each_sample_comes_once():
    words, shown = list(range(50)), [i % 3 > 0 for i in range(50)]
    seen: list[int] = []
    for rank in range(2):
        order = Grouped(words, shown, seed=1, epoch=0, batch=8, rank=rank, world=2)
        batches = list(order)
        assert len(order) == len(batches) == 6 and all(len(one) == 4 for one in batches)
        assert sum(len({shown[i] for i in one}) == 1 for one in batches) >= 5
        assert all(one == sorted(one, reverse=True) for one in batches)
        seen += [i for one in batches for i in one]
        assert list(Grouped(words, shown, seed=1, epoch=0, batch=8, rank=rank, world=2, start=2)) == batches[2:]
    assert len(set(seen)) == len(seen) == 48


# ---- the command


def cli(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["winnow", *words])
        with pytest.raises(SystemExit) as done:
            main()
    return done.value.code


def test_captions_of_every_kind_become_conversations(folder, tmp_path, capsys):
    said_ = {"0.png": "a red image", "1.png": "a blue image", "no.png": "gone"}
    rows = "".join(f"{folder / name},{caption}\n" for name, caption in said_.items())
    (tmp_path / "table.csv").write_text("file,caption\n" + rows)
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, data in (("7.png", (folder / "0.png").read_bytes()), ("7.txt", b"a red image")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    coco = {
        "images": [{"id": 3, "file_name": str(folder / "1.png")}],
        "annotations": [{"image_id": 3, "caption": "blue"}],
    }
    (tmp_path / "captions_x.json").write_text(json.dumps(coco))
    wanted = {"table.csv": ["a red image", "a blue image"], "00000.tar": ["a red image"], "captions_x.json": ["blue"]}
    for source, captions in wanted.items():
        out = tmp_path / "made" / f"{source}.json"
        assert cli("data", "captions2llava", str(tmp_path / source), str(out), "--seed", "1") == 0
        found = open_conversations(str(out))
        assert [sample.turns[1][1] for sample in found.samples] == captions and set(found.kinds()) == {"caption"}
        assert all(sample.pictures()[0].size == (30, 20) for sample in found.samples)
        assert cli("data", "captions2llava", str(tmp_path / source), str(tmp_path / "again.json"), "--seed", "1") == 0
        again = open_conversations(str(tmp_path / "again.json"))
        assert [one.turns for one in again.samples] == [one.turns for one in found.samples]
    said_out = capsys.readouterr()
    assert "2 conversations in" in said_out.out and "no.png is not there" in " ".join(said_out.err.split())
    assert (tmp_path / "made" / "00000.tar_images" / "00000" / "7.png").read_bytes() == (folder / "0.png").read_bytes()


def test_conversations_are_counted_by_kind(folder, capsys):
    assert cli("data", "count", str(folder / "told.json"), "--json") == 0
    wanted = {"question": 3, "conversation": 3, "question, text only": 2}
    assert json.loads(capsys.readouterr().out) == {"samples": 8, "kinds": wanted}
    assert cli("data", "count", f"{folder / 'told.json'}*2") == 0
    assert "16  in all" in capsys.readouterr().out
