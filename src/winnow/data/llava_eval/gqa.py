"""GQA: compositional questions with one-word answers; exact match.

Hudson and Manning, "GQA: A New Dataset for Real-World Visual Reasoning and Compositional Question Answering", CVPR 2019.
"""

from __future__ import annotations

from pathlib import Path

from .answers import Score, answers, join, per_cent, questions, whole


def score_gqa(questions_file: Path | str, answers_file: Path | str, labels: Path | str) -> Score:
    """Accuracy on all questions, on those answered by yes, no or a choice ("binary"), and on the others ("open").

    labels: testdev_balanced_questions.json, {question id: {answer, types: {structural}}}.
    """
    asked = [q.id for q in questions(questions_file)]
    given = answers(answers_file, asked)
    truth = whole(labels)
    if not isinstance(truth, dict):
        raise ValueError(f"{labels}: one object by question id is needed, as testdev_balanced_questions.json")
    gold = dict(join(asked, truth, str(labels), "label"))
    seen = []
    for id_ in asked:
        if "answer" not in gold[id_]:
            raise ValueError(f"{labels}: question {id_} lacks answer (the questions of a test split have none)")
        open_ = gold[id_].get("types", {}).get("structural") == "query"
        seen.append((open_, given[id_].strip().rstrip(".").lower() == gold[id_]["answer"].lower()))
    kinds = {kind: [right for open_, right in seen if open_ == (kind == "open")] for kind in ("binary", "open")}
    figures = {"accuracy": per_cent(sum(right for _, right in seen), len(seen))}
    figures |= {kind: per_cent(sum(found), len(found)) for kind, found in kinds.items() if found}
    return Score("gqa", "accuracy", figures, len(asked))
