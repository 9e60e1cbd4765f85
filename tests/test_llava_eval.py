"""LLaVA's benchmarks from LLaVA's own files: published figures, small files written here, and what is refused."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import SHARED

from winnow.cli import main
from winnow.data import llava_eval as le
from winnow.data.llava_eval import mme, pope, scienceqa, textvqa

STORED = SHARED / "data" / "llava_eval"


def stored(name: str) -> Path:
    if not (STORED / name).exists():
        pytest.skip(f"no stored answers beside the project: {name}")
    return STORED / name


def lines(path: Path, records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def test_pope_gives_the_published_figures_of_llava_13b():
    folder = stored("pope")
    score = le.score_pope(folder / "llava_pope_test.jsonl", folder / "answers_llava-v1.5-13b.jsonl", folder / "labels")
    assert score.n == 8910 and int(score.figures["f1"] * 10) / 10 == 85.9
    assert {split: round(one["f1"], 1) for split, one in score.groups.items()} == {
        "random": 87.1, "popular": 86.2, "adversarial": 84.5,
    }  # fmt: skip


def test_scienceqa_gives_the_published_figure_of_llava_13b():
    folder = stored("scienceqa")
    score = le.score_scienceqa(folder / "llava_test_CQM-A.json", folder / "output_llava-v1.5-13b.jsonl")
    assert score.n == 4241 and round(score.figures["image"], 1) == 71.6
    ours = json.loads((folder / "output_llava-v1.5-13b.jsonl").read_text())
    for right, found in ours.items():
        for one in found:
            assert (scienceqa.letter(one["pred"]) or "FAILED") == one["parsed_ans"]
            assert (scienceqa.letter(one["pred"]) == one["ground_truth"]) == (right == "correct")


def pope_files(folder: Path):
    """Two images, both splits in another order than the labels; the same question occurs in two splits."""
    asked = [
        ("adversarial", "b.jpg", "cat"),
        ("random", "a.jpg", "dog"),
        ("random", "b.jpg", "cat"),
        ("random", "a.jpg", "cat"),
    ]
    text = "Is there a {} in the image?"
    questions = [
        {"question_id": i, "image": image, "category": split, "text": f"{text.format(what)}\nAnswer with one word."}
        for i, (split, image, what) in enumerate(asked)
    ]
    says = ["No, there is not.", "Yes", "Yes, a cat.", "There is no cat, it seems"]
    answers = [{"question_id": i, "prompt": "", "text": says[i]} for i in (3, 1, 0, 2)]
    labels = {"random": [("b.jpg", "cat", "yes"), ("a.jpg", "cat", "yes"), ("a.jpg", "dog", "no")],
              "adversarial": [("b.jpg", "cat", "no")]}  # fmt: skip
    for split, found in labels.items():
        records = [{"question_id": 9, "image": i, "text": text.format(w), "label": yes} for i, w, yes in found]
        lines(folder / f"coco_pope_{split}.json", records)
    return lines(folder / "q.jsonl", questions), lines(folder / "a.jsonl", answers), folder


def test_pope_is_joined_by_split_image_and_question(tmp_path):
    score = le.score_pope(*pope_files(tmp_path))
    assert score.groups["random"] == pytest.approx(
        {"f1": 50, "accuracy": 100 / 3, "precision": 50, "recall": 50, "yes": 200 / 3}
    )
    assert score.groups["adversarial"]["accuracy"] == 100
    assert score.notes == ("no questions of the split popular",)


@pytest.mark.parametrize(
    ("answer", "yes"),
    [("Yes", True), ("No", False), ("There is not. Yes", False), ("Nothing", True), ("Yes. No", True)],
)
def test_pope_reads_the_first_sentence(answer, yes):
    assert pope.says_yes(answer) == yes


def test_both_forms_of_a_file_are_read(tmp_path):
    questions, answers, labels = pope_files(tmp_path)
    as_list = tmp_path / "a.json"
    as_list.write_text(json.dumps([json.loads(line) for line in answers.read_text().splitlines()], indent=1))
    assert le.score_pope(questions, as_list, labels) == le.score_pope(questions, answers, labels)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"question_id": 0, "text": "No"}\n{"question_id": 1, "te', ":2 is not JSON .a file that was cut off"),
        ('[{"question_id": 0,\n "text": ', ":2 is not JSON"),
        ('{"question_id": 0, "text": "No"}', "3 of 4 questions have no answer, the first is 1"),
        ('{"question_id": 0, "answer": "No"}', "record 1 lacks text .its columns: question_id, answer"),
        ('{"question_id": 0, "text": "a"}\n{"question_id": 0, "text": "b"}', "0 occurs twice"),
        ("[1]", "record 1 is a int"),
        ("3", "holds a int"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, text, message):
    questions, answers, labels = pope_files(tmp_path)
    answers.write_text(text)
    with pytest.raises(ValueError, match=message):
        le.score_pope(questions, answers, labels)


def test_labels_of_other_questions_are_refused(tmp_path):
    questions, answers, labels = pope_files(tmp_path)
    lines(
        labels / "coco_pope_adversarial.json",
        [{"image": "c.jpg", "text": "Is there a cat in the image?", "label": "no"}],
    )
    with pytest.raises(ValueError, match="1 of 4 questions have no label"):
        le.score_pope(questions, answers, labels)


def science(folder: Path):
    asked = [("1", True, "B"), ("2", False, "A"), ("3", True, "C")]
    questions = [
        {"id": i, **({"image": "x.png"} if image else {}), "conversations": [{"value": "?"}, {"value": gold}]}
        for i, image, gold in asked
    ]
    (folder / "q.json").write_text(json.dumps(questions))
    return folder / "q.json"


def test_scienceqa_from_answers(tmp_path):
    questions = science(tmp_path)
    answers = lines(
        tmp_path / "a.jsonl", [{"question_id": i, "text": t} for i, t in (("3", "c"), ("1", "B. salt"), ("2", "A"))]
    )
    score = le.score_scienceqa(questions, answers)
    assert score.figures == {"image": 50, "text": 100, "all": pytest.approx(200 / 3)}
    assert score.notes == ("1 answers name no option and count as wrong",)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("B", "B"), (" D ", "D"), ("A. a cat", "A"), ("A.", None), ("The answer is C.", "C"), ("F", None),
     ("The answer is A. The answer is B.", None)],
)  # fmt: skip
def test_letters(answer, letter):
    assert scienceqa.letter(answer) == letter


def test_textvqa(tmp_path):
    prompt = "what brand is it?\nReference OCR token: Dell, X\nAnswer the question using a single word or phrase."
    other = "Who wrote this?\nAnswer the question using a single word or phrase."
    questions = lines(tmp_path / "q.jsonl", [{"question_id": "im", "text": text} for text in (prompt, other)])
    answers = [
        {"question_id": "im", "prompt": other, "text": "nobody"},
        {"question_id": "im", "prompt": prompt, "text": "A Dell."},
    ]
    data = [{"image_id": "im", "question": "What brand is it?", "answers": ["dell"] * 2 + ["hp"] * 8},
            {"image_id": "im", "question": "who wrote this?", "answers": ["me"] * 10}]  # fmt: skip
    labels = tmp_path / "l.json"
    labels.write_text(json.dumps({"data": data}))
    score = le.score_textvqa(questions, lines(tmp_path / "a.jsonl", answers), labels)
    assert score.figures["accuracy"] == pytest.approx(100 * (2 * 1 / 3 + 8 * 2 / 3) / 10 / 2)
    assert "1 of 2" in score.notes[0]


@pytest.mark.parametrize(
    ("answer", "normal"),
    [("The Cat", "cat"), ("two dogs.", "2 dogs"), ("dont", "don't"), ("couldnt've", "couldn't've"), ("3.5", "3.5"),
     ("1,000", "1000"), ("St. John's", "st john 's"), ("x/y", "x y"), ("well-known; yes", "well known yes")],
)  # fmt: skip
def test_answers_are_compared_as_on_vqa_s_server(answer, normal):
    assert textvqa.normalised(answer) == normal


def test_gqa(tmp_path):
    questions = lines(tmp_path / "q.jsonl", [{"question_id": str(i), "text": "?"} for i in range(3)])
    answers = lines(
        tmp_path / "a.jsonl", [{"question_id": str(i), "text": t} for i, t in enumerate(["Yes.", "left", "a Dog"])]
    )
    labels = tmp_path / "l.json"
    gold = [("yes", "verify"), ("right", "choose"), ("a dog", "query")]
    labels.write_text(json.dumps({str(i): {"answer": a, "types": {"structural": t}} for i, (a, t) in enumerate(gold)}))
    score = le.score_gqa(questions, answers, labels)
    assert score.figures == {"accuracy": pytest.approx(200 / 3), "binary": 50, "open": 100}


def test_mme(tmp_path):
    release = tmp_path / "release"
    for path in ("count/1.txt", "code_reasoning/questions_answers_YN/2.txt"):
        (release / path).parent.mkdir(parents=True)
        (release / path).write_text("Is it a? Please answer yes or no.\tYes\nIs it b? Please answer yes or no.\tNo\n")
    short = "\nAnswer the question using a single word or phrase."
    says = [("count/1.jpg", "a", "Yes"), ("count/1.jpg", "b", "no."), ("code_reasoning/2.png", "b", "Yes"),
            ("code_reasoning/2.png", "a", "yes it is")]  # fmt: skip
    records = [{"question_id": i, "prompt": f"Is it {what}?{short}", "text": t} for i, what, t in says]
    score = le.score_mme(lines(tmp_path / "a.jsonl", records), release)
    assert score.figures == {"perception": 200, "cognition": 50, "total": 250}
    assert "existence" in score.notes[0]
    assert mme.verdict("It is so") is None


class FakeJudge(BaseHTTPRequestHandler):
    """Chat completions on this machine: the second answer is rated by its length; every fifth review is unreadable."""

    asked: list[dict] = []  # noqa: RUF012  filled by the server's thread, read by the test

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        self.asked.append(
            {"path": self.path, "key": self.headers.get("Authorization"), "prompt": prompt, "model": body["model"]}
        )
        ours = prompt.split("[Assistant 2]\n")[1].split("\n\n[End")[0]
        text = "hm" if len(self.asked) % 5 == 0 else f"8 {len(ours)}\nBecause."
        reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *words):
        pass


@pytest.fixture
def judge(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), FakeJudge)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    FakeJudge.asked.clear()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-secret")
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def bench_files(folder: Path):
    """Three questions about two images; files in different orders."""
    asked = [(0, "a.jpg", "conv", "long answer"), (1, "b.jpg", "detail", "abcd"), (2, "a.jpg", "conv", "ab")]
    rule = {kind: {"role": "Assistant", "prompt": f"Rate {kind}."} for kind in ("conv", "detail")}
    (folder / "rule.json").write_text(json.dumps(rule))
    context = [
        {"image": i, "captions": [f"of {i}"], "instances": [{"category": "cat", "bbox": [0, 1]}]}
        for i in ("b.jpg", "a.jpg")
    ]
    questions = [{"question_id": i, "image": image, "category": c, "text": f"?{i}"} for i, image, c, _ in asked]
    return {
        "questions": lines(folder / "q.jsonl", questions),
        "answers": lines(folder / "a.jsonl", [{"question_id": i, "text": t} for i, _, _, t in asked[::-1]]),
        "reference": lines(folder / "r.jsonl", [{"question_id": i, "text": f"ref {i}"} for i in (1, 2, 0)]),
        "context": lines(folder / "c.jsonl", context), "rules": folder / "rule.json",
        "reviews": folder / "out" / "reviews.jsonl",
    }  # fmt: skip


def test_llava_bench_with_a_judge_on_this_machine(tmp_path, judge, capsys, monkeypatch):
    files = bench_files(tmp_path)
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    monkeypatch.setattr(
        "sys.argv", ["winnow", "eval", "llava-bench", *options, "--judge", judge, "--judge-model", "m", "--json"]
    )
    for _ in range(2):  # the second time there is nothing left to ask
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        score = json.loads(capsys.readouterr().out)
        assert score["figures"] == {
            "all": pytest.approx(100 * (11 + 4 + 2) / 24),
            "conv": pytest.approx(100 * 13 / 16),
            "detail": 50,
        }
        assert len(FakeJudge.asked) == 3
    first = FakeJudge.asked[0]
    assert first["path"] == "/v1/chat/completions" and first["key"] == "Bearer not-a-secret" and first["model"] == "m"
    assert first["prompt"] == (
        "[Context]\nof a.jpg\n\ncat: [0, 1]\n\n[Question]\n?0\n\n[Assistant 1]\nref 0\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nlong answer\n\n[End of Assistant 2]\n\n[System]\nRate conv.\n\n"
    )


def test_llava_bench_in_the_wild_has_captions_and_rules_of_its_own(tmp_path, judge):
    files = bench_files(tmp_path)
    files["rules"].write_text(
        json.dumps({f"llava_bench_{c}": {"role": "Assistant", "prompt": c} for c in ("conv", "detail")})
    )
    lines(files["context"], [{"image": name, "caption": f"wild {name}"} for name in ("a.jpg", "b.jpg")])
    names = ("questions", "answers", "reference", "context", "rules")
    le.judge_all(le.Judge(judge, "m"), *(files[name] for name in names), reviews=files["reviews"])
    assert FakeJudge.asked[1]["prompt"].startswith("[Context]\nwild b.jpg\n\n[Question]\n?1")


def test_a_judge_that_is_not_there_or_makes_no_sense(tmp_path, judge):
    files = bench_files(tmp_path)
    words = [files[name] for name in ("questions", "answers", "reference", "context", "rules")]
    reviews = files["reviews"]
    with pytest.raises(ValueError, match="cannot be asked"):
        le.judge_all(le.Judge("http://127.0.0.1:9/v1", "m"), *words, reviews=reviews)
    FakeJudge.asked.extend([{}] * 4)  # the next review is unreadable, and one try is all
    with pytest.raises(ValueError, match="no two scores"):
        le.judge_all(le.Judge(judge, "m", tries=1), *words, reviews=reviews)


def test_stored_reviews_of_llava_s_own_kind(tmp_path):
    questions = lines(tmp_path / "q.jsonl", [{"question_id": i, "text": "?"} for i in range(3)])
    found = [
        {"question_id": i, "category": "llava_bench_conv", "tuple": t} for i, t in enumerate([[8, 6], [-1, -1], [8, 8]])
    ]
    score = le.score_llava_bench(lines(tmp_path / "r.jsonl", found), questions)
    assert score.figures == {"all": 87.5, "conv": 87.5}
    assert "1 reviews without two scores are left out" in score.notes


def test_stored_questions_of_llava_bench_fit_together(tmp_path, judge):
    folder = stored("llava_bench_coco")
    questions = folder / "qa90_questions.jsonl"
    reviews = tmp_path / "reviews.jsonl"
    le.judge_all(
        le.Judge(judge, "m"), questions, folder / "qa90_gpt4_answer.jsonl", folder / "qa90_gpt4_answer.jsonl",
        folder / "caps_boxes_coco2014_val_80.jsonl", folder / "rule.json", reviews=reviews,
    )  # fmt: skip
    assert le.score_llava_bench(reviews, questions).n == 90


@pytest.mark.parametrize(
    ("options", "message"),
    [(["llava-bench", "--questions", "q", "--reviews", "r", "--judge", "http://x"], "--answers and --reference"),
     (["pope", "--questions", "no.jsonl", "--answers", "a", "--labels", "l"], "no.jsonl"), (["pope"], "--answers")],
)  # fmt: skip
def test_one_line_of_complaint(options, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["winnow", "eval", *options])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and message in said and len(said.splitlines()) == 1
