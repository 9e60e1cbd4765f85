"""Fill the generated parts of README.md: tables from the registry and from result rows, and the picture.

Winnow's own. `python docs/readme.py` rewrites the tables; `--weights FILE` also draws the picture.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from winnow import view
from winnow.cli.list_ import about
from winnow.compare import paired
from winnow.measure import record
from winnow.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]


def methods() -> str:
    """The methods table, from the registry."""
    lines = ["| method | what it does | tokens | needs | source |", "|:--|:--|:--|:--|:--|"]
    for method in METHODS:
        one = about(method)
        needs = ", ".join(one["needs"]) or "nothing"
        lines.append(f"| `{one['spelling']}` | {one['does']} | {one['tokens']} | {needs} | {one['source']} |")
    return "\n".join(lines) + "\n"


def photos() -> str:
    """The table of the photograph run, from its rows; baselines that only stand in for a cost are left out."""
    rows = paired(record.read(ROOT / "results" / "photos.jsonl"))
    return view.markdown([row for row in rows if row.latency or row.role == "plain"], brief=True)


def findings() -> str:
    """What the photograph run says, in sentences made from all its rows."""
    from winnow.view.rows import groups
    from winnow.view.summary import sentences

    found = groups(paired(record.read(ROOT / "results" / "photos.jsonl")))
    return "\n".join(f"- {words}" for words in sentences(found[0])) + "\n"


def families() -> str:
    """The table of docs/families.md."""
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    return "\n".join(line for line in text.splitlines() if line.startswith("|")) + "\n"


BLOCKS = {"methods": methods, "photos": photos, "findings": findings, "families": families}


def fill(text: str) -> str:
    """README text with every generated block made anew."""

    def block(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{BLOCKS[found[1]]()}<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", block, text, flags=re.S)


def picture(weights: Path) -> Path:
    """Kept and merged patches of one photograph (scikit-image's cat, CC0) at three budgets."""
    from skimage import data

    from winnow import Keep, ToMe, TopK
    from winnow.models import load_model
    from winnow.view.sheets import layers_of, photograph

    loaded = load_model("timm:vit_tiny_patch16_224", weights=weights)
    from PIL import Image

    pixels = loaded.transform(Image.fromarray(data.cat()))[None]
    rows = []
    for title, budgets in (
        ("kept patches: TopK", {f"keep {share}": TopK(keep=Keep(share)) for share in (0.9, 0.7, 0.5)}),
        ("merged patches: ToMe", {f"r = {r}": ToMe(r=r) for r in (8, 13, 16)}),
    ):
        last = [(name, *layers_of(loaded.model, method, pixels)[0][-1][1:]) for name, method in budgets.items()]
        rows.append((title, last))
    return view.figure(photograph(pixels, loaded.mean, loaded.std)[0], rows, ROOT / "docs" / "cat.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, help="ViT-Ti/16 ImageNet-1k weights for the picture")
    wish = parser.parse_args()
    if wish.weights:
        print(picture(wish.weights))
    readme = ROOT / "README.md"
    view.files.write(readme, fill(readme.read_text(encoding="utf-8")).encode())
