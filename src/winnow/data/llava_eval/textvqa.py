"""TextVQA: questions about text in images; soft accuracy against the answers of ten people.

Singh et al., "Towards VQA Models That Can Read", CVPR 2019; answers are normalised as on VQA's server (Antol et al., 2015).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from .answers import Score, by_key, join, per_cent, questions, records, whole

PEOPLE = 3
"""So many of the others must have said the same for a whole point."""
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}  # fmt: skip
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
    where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
    y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
PUNCTUATION = r"""/[]"{}()=+\_-><@`,?!;"""


def _misspelt() -> dict[str, str]:
    """Each contraction by its forms that lack an apostrophe."""
    table = {}
    for right in CONTRACTIONS:
        places = [at for at, sign in enumerate(right) if sign == "'"]
        for size in range(1, len(places) + 1):
            for gone in combinations(places, size):
                table["".join(sign for at, sign in enumerate(right) if at not in gone).lower()] = right
    return table


MISSPELT = _misspelt()


def normalised(answer: str) -> str:
    """An answer as VQA's server compares it: lower case, no articles, no punctuation, digits for number words."""
    text = re.sub(r"[\n\t]", " ", answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")).strip()
    number = re.search(r"\d,\d", text) is not None
    for sign in PUNCTUATION:
        if f"{sign} " in text or f" {sign}" in text or number:
            text = text.replace(sign, "")
        else:
            text = text.replace(sign, " ")
    text = re.sub(r"(?<!\d)\.(?!\d)", "", text)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(MISSPELT.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(answer: str, people: Sequence[str]) -> float:
    """Mean over the people, each left out in turn, of min(1, others who said the same / 3)."""
    said = Counter(normalised(one) for one in people)
    ours = normalised(answer)
    same = said[ours]
    others = (same - (normalised(one) == ours) for one in people)
    return sum(min(1.0, n / PEOPLE) for n in others) / len(people)


def score_textvqa(questions_file: Path | str, answers_file: Path | str, labels: Path | str) -> Score:
    """Soft accuracy. labels: TextVQA_0.5.1_val.json; joined by (image, question), as images have several questions.

    Prompts with and without LLaVA's "Reference OCR token:" line are both read, and the note says which they were.
    """
    asked = questions(questions_file)
    given = by_key(
        records(answers_file, ("question_id", "prompt", "text")),
        lambda one: (str(one["question_id"]), question_of(one["prompt"])),
        str(answers_file),
    )
    keys = [(q.id, question_of(q.text)) for q in asked]
    told = whole(labels)
    if not isinstance(told, dict) or "data" not in told:
        raise ValueError(f'{labels}: one object with "data" is needed, as TextVQA_0.5.1_val.json')
    found = records(labels, ("image_id", "question", "answers"), told["data"])
    truth = by_key(found, lambda one: (str(one["image_id"]), one["question"].lower().strip()), str(labels))
    points = [
        soft_accuracy(answer["text"], label["answers"])
        for (_, answer), (_, label) in zip(
            join(keys, given, str(answers_file)), join(keys, truth, str(labels), "label")
        )
    ]
    hints = sum("Reference OCR token:" in q.text for q in asked)
    note = f"prompts with OCR tokens: {hints} of {len(asked)}; papers on LLaVA give them, lmms-eval does not"
    return Score("textvqa", "accuracy", {"accuracy": per_cent(sum(points), len(points))}, len(asked), notes=(note,))


def question_of(prompt: str) -> str:
    """The question in a prompt, lower case: the line that is neither OCR tokens nor the instruction at the end."""
    lines = [line.strip() for line in prompt.split("\n")]
    left = [
        line for line in lines if line and not line.startswith(("Reference OCR token:", "Answer the question using"))
    ]
    if len(left) != 1:
        raise ValueError(f"the prompt {prompt[:80]!r} has {len(left)} lines that may be the question, one is needed")
    return left[0].lower()
