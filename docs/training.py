"""Write the table of recipe keys into docs/training.md, from the recipe's own types.

Winnow's own. `python docs/training.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

from winnow.train.recipe import describe

PAGE = Path(__file__).with_suffix(".md")


def page() -> str:
    """The page with today's keys."""
    shown = [(key, default if default == "required" else f"`{default}`", words) for key, default, words in describe()]
    rows = [f"| `{key}` | {default} | {words} |" for key, default, words in shown]
    table = "\n".join(["| key | default | what |", "|:--|:--|:--|", *rows])
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(
        r"(<!-- keys -->\n).*?(<!-- end -->)", lambda found: f"{found[1]}{table}\n{found[2]}", text, flags=re.S
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
