"""winnow eval: LLaVA's benchmarks from LLaVA's own files, without a network; zero-shot and retrieval of CLIPs.

Winnow's own.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..data import llava_eval as le
from . import _options as o
from . import _zeroshot

NAME = "eval"
app = typer.Typer(rich_markup_mode=None, help="Score answers to a benchmark, or a CLIP.")

app.command("zeroshot")(_zeroshot.zeroshot)
app.command("retrieval")(_zeroshot.retrieve)

Answers = Annotated[Path, typer.Option(help="the model's answers, JSON lines with question_id, prompt, text")]
Questions = Annotated[Path, typer.Option(help="LLaVA's question file")]


@app.command("pope")
def pope(
    answers: Answers,
    questions: Questions,
    labels: Annotated[Path, typer.Option(help="folder of coco_pope_random.json and so on")],
    as_json: o.Json = False,
) -> None:
    """POPE: is there such an object? Mean F1 of the three splits."""
    _show(le.score_pope(questions, answers, labels), as_json)


@app.command("scienceqa")
def scienceqa(
    answers: Annotated[Path, typer.Option(help="answers, or LLaVA's object {correct, incorrect}")],
    questions: Annotated[Path, typer.Option(help="llava_test_CQM-A.json")],
    as_json: o.Json = False,
) -> None:
    """ScienceQA: accuracy on questions with an image, without one, and on all."""
    _show(le.score_scienceqa(questions, answers), as_json)


@app.command("textvqa")
def textvqa(
    answers: Answers,
    questions: Annotated[Path, typer.Option(help="llava_textvqa_val_v051_ocr.jsonl")],
    labels: Annotated[Path, typer.Option(help="TextVQA_0.5.1_val.json")],
    as_json: o.Json = False,
) -> None:
    """TextVQA: soft accuracy against ten people."""
    _show(le.score_textvqa(questions, answers, labels), as_json)


@app.command("gqa")
def gqa(
    answers: Answers,
    questions: Annotated[Path, typer.Option(help="llava_gqa_testdev_balanced.jsonl")],
    labels: Annotated[Path, typer.Option(help="testdev_balanced_questions.json")],
    as_json: o.Json = False,
) -> None:
    """GQA: exact match."""
    _show(le.score_gqa(questions, answers, labels), as_json)


@app.command("mme")
def mme(
    answers: Answers,
    labels: Annotated[Path, typer.Option(help="folder of the release, one folder per category")],
    as_json: o.Json = False,
) -> None:
    """MME: points for perception and cognition, named apart because papers call either MME."""
    _show(le.score_mme(answers, labels), as_json)


@app.command("llava-bench")
def llava_bench(
    questions: Annotated[Path, typer.Option(help="qa90_questions.jsonl, or questions.jsonl of in-the-wild")],
    reviews: Annotated[Path, typer.Option(help="JSON lines of the judge's reviews; with --judge they are added here")],
    answers: Annotated[Path | None, typer.Option(help="the model's answers; with --judge")] = None,
    reference: Annotated[Path | None, typer.Option(help="GPT-4's answers; with --judge")] = None,
    context: Annotated[Path | None, typer.Option(help="what the judge is told of each image; with --judge")] = None,
    rules: Annotated[Path | None, typer.Option(help="rule.json; with --judge")] = None,
    judge: Annotated[str | None, typer.Option(help="OpenAI-compatible address, e.g. http://localhost:8000/v1")] = None,
    judge_model: Annotated[
        str, typer.Option(help="its name there; scores of two judges do not compare")
    ] = "gpt-4-0314",
    as_json: o.Json = False,
) -> None:
    """LLaVA-Bench, COCO or in the wild: ours against GPT-4's, as a judge rates them; reviews are kept, a rerun goes on."""
    files = {"answers": answers, "reference": reference, "context": context, "rules": rules}
    if judge is None:
        o.refuse({f"--{name}": path for name, path in files.items()}, "is what a judge reads: give --judge too")
    else:
        given = [path for path in files.values() if path is not None]
        missing = [f"--{name}" for name, path in files.items() if path is None]
        if missing:
            raise ValueError(f"--judge needs {' and '.join(missing)} too")
        say = Console(stderr=True).print
        le.judge_all(le.Judge(judge, judge_model), questions, *given, reviews=reviews, say=say)
    _show(le.score_llava_bench(reviews, questions), as_json)


def _show(score: le.Score, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(score)))
        return
    names = list(next(iter(score.groups.values()), score.figures))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in (f"{score.benchmark}, {score.n} questions", *names):
        table.add_column(head, justify="left" if not table.columns else "right")
    for group, figures in score.groups.items():
        table.add_row(group, *(f"{figures[name]:.2f}" for name in names))
    if set(names) <= set(score.figures):
        table.add_row("all", *(f"{score.figures[name]:.2f}" for name in names))
    Console().print(table)
    print(f"{score.main}: {score.figures[score.main]:.2f}")
    for name, value in score.figures.items():
        if name not in names and name != score.main and name not in score.groups:
            print(f"{name}: {value:.2f}")
    for note in score.notes:
        print(note)
