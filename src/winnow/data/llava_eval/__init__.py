"""The benchmarks of LLaVA's papers, read and scored from LLaVA's own files, without a network; one file is one benchmark.

Files as in LLaVA's docs/Evaluation.md (Liu et al., 2023-24); scorers join by what a question is, never by its line.
"""

from __future__ import annotations

from .answers import Question, Score, questions
from .gqa import score_gqa
from .llava_bench import Judge, judge_all, score_llava_bench
from .mme import score_mme
from .pope import score_pope
from .scienceqa import score_scienceqa
from .textvqa import score_textvqa

__all__ = [
    "Judge",
    "Question",
    "Score",
    "judge_all",
    "questions",
    "score_gqa",
    "score_llava_bench",
    "score_mme",
    "score_pope",
    "score_scienceqa",
    "score_textvqa",
]
