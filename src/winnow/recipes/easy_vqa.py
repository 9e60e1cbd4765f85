"""easy-VQA in small: a LLaVA that learns its questions, and a budget controller beside it; a smoke row, not a comparison.

Zhou, "Easy Visual Question Answering", 2019 (MIT): one shape of one colour in an image. Every patch of a trained tower
knows of both, so that one random patch answers nearly all, and no method can show much.
Cost: twenty minutes on one core. Expected: docs/log.md.
Command: python -m winnow.recipes.easy_vqa easy_vqa/train runs/easy_vqa results/train.jsonl
  and then, for the controller and for random patches, winnow compare hf:runs/easy_vqa/adaptive/last
  --data runs/easy_vqa/val.json --budgets 1,0.25,0.0625,0.015625 --results results/easy-vqa.jsonl
  --method "AdaptiveKeep(budget_max=0.5, fuse='after', train='zero')" --method "Random(at='tower')"
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from ..backbones.llava_scenes import SPECIAL
from ..data.sample import IMAGE
from ..measure import record
from ..train.loop import train
from ..train.recipe import check
from .vila import start

SIDE, PATCH, DEPTH = 64, 8, 3
HELD_OUT = 10
"""Every tenth image is for validation."""
FROZEN = {"vision": False, "projector": False, "llm": False}
STAGES: dict[str, tuple[str, str | None, dict[str, bool], dict[str, Any]]] = {
    "plain": ("start", None, {"vision": True}, {"epochs": 4, "optim": {"lr": 1e-3, "weight_decay": 0.01, "clip": 1.0}}),
    "adaptive": (
        "plain", "AdaptiveKeep(budget_max=0.5, fuse='after', train='zero')", FROZEN,
        {"epochs": 1, "optim": {"lr": 1e-3, "weight_decay": 0.01, "clip": 1.0}},
    ),
}  # fmt: skip
"""By name: the stage before it, the method, what learns beside it, and more of the recipe."""


def conversations(data: Path, out: Path) -> list[str]:
    """easy-VQA's questions.json as LLaVA's train.json and val.json in `out`; the words that occur."""
    images = Path(os.path.relpath(data / "images", out)).as_posix()
    told: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
    words: set[str] = set()
    for number, (question, answer, image) in enumerate(json.loads((data / "questions.json").read_text("utf-8"))):
        turns = [{"from": "human", "value": f"{IMAGE}\n{question}"}, {"from": "gpt", "value": answer}]
        split = "train" if image % HELD_OUT else "val"
        told[split].append({"id": f"{number}", "image": f"{images}/{image}.png", "conversations": turns})
        words |= {*re.findall(r"\w+|[^\w\s]", question), answer}
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in told.items():
        (out / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return sorted(words)


def run(data: Path, out: Path, results: Path | None) -> list[record.Row]:
    """Both stages; the rows."""
    words = conversations(data, out)
    start(out / "start", (*SPECIAL, "USER", "ASSISTANT", *words), SIDE, PATCH, DEPTH)
    rows = []
    for name, (before, method, learns, more) in STAGES.items():
        source = out / before if before == "start" else out / before / "last"
        raw: dict[str, Any] = {
            "task": "instruct", "model": {"name": f"hf:{source}"}, "method": method,
            "data": {"train": {"path": str(out / "train.json"), "limit": None if method is None else 1920},
                     "val": {"path": str(out / "val.json"), "limit": 500}},
            "instruct": {"template": "chat", "train": learns, "pad": False}, "schedule": {"warmup_steps": 50},
            "eval": {"batch": 100}, "batch": 32 if method is None else 16, **more,
        }  # fmt: skip
        rows.append(train(check(raw, name), out / name, name=f"easy_vqa: {name}", device="cpu", results=results))
    return rows


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
