"""Overlays against naive loops; curves and reports: complete, self-contained, escaped, written whole or not at all.

Winnow's own.
"""

import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from winnow import view
from winnow.measure.record import Accuracy, Data, Latency, Macs, Paired, Row
from winnow.view import curves, files, overlay
from winnow.view.columns import columns
from winnow.view.report import facts
from winnow.view.rows import Group, family, groups, name
from winnow.view.summary import sentences

SPELLINGS = [
    *((f"ToMe(r={r})", "method", 1 - 0.043 * r, 0.9 + 0.1 * (r == 4)) for r in (4, 8, 13, 16, 20)),
    *((f"EViT(keep=Keep({k}))", "method", 0.35 + 0.62 * k, 1.2) for k in (0.5, 0.7, 0.9)),
    *((f"TopK(keep=Keep({k}))", "method", 0.33 + 0.63 * k, 1.5) for k in (0.5, 0.7, 0.9)),
    *((f"NormThreshold(below=Below({b}, of='mean'))", "method", 1.3 - 0.5 * b, 3.0) for b in (0.8, 0.9, 1.1)),
    *((f"Random(keep=Keep({k}))", "baseline", 0.2 + 0.8 * k, 3.5) for k in (0.5, 0.7, 0.9)),
    *((f"Grid(keep=Keep({k}))", "baseline", 0.21 + 0.79 * k, 3.1) for k in (0.5, 0.7, 0.9)),
    *((f"Pool(size={k})", "baseline", 0.15 + 0.1 * k, 2.6) for k in (2, 4, 6)),
    *((f"Downsample(size={s})", "baseline", (s / 224) ** 2, 1.1) for s in (192, 160, 144, 128)),
]
ENVIRONMENT = {
    "python": "3.11.9",
    "platform": "x86_64",
    "cpu": "A CPU",
    "threads": "2",
    "torch": "2.15.0",
    "timm": "1.0.31",
}


def accuracy(value, n, paired=None):
    z = 1.96
    middle, half = value + z * z / 2 / n, z * math.sqrt(value * (1 - value) / n + z * z / 4 / n / n)
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return Accuracy(value=value, low=low, high=high, agreement=min(1.0, value + 0.1), **(paired or {}))


def latency(batch, share, wobble):
    ratio = (1 / share) ** (0.9 if batch > 1 else 0.12)
    return Latency(
        batch=batch, plain_ms=12.0 * batch, reduced_ms=12.0 * batch / ratio,
        ratio=ratio, low=ratio - wobble, high=ratio + wobble,
        null=1.002, null_low=0.984, null_high=1.021, pairs=15, reducer_share=0.031, threads=2,
    )  # fmt: skip


def fake_rows(n=1000, weights="9f86d081884c7d65", scored=True):
    """The plain model and 24 settings of 8 families, plausible, no two alike."""
    common = {
        "task": "classify", "model": "timm:vit_tiny_patch16_224", "weights": weights, "environment": ENVIRONMENT,
        "data": Data(name="photos.csv", split="val", n=n, hash="0a1b2c3d"),
        "commit": "0123456789ab+", "time": "2026-05-04T10:00:00Z",
        "command": "winnow compare timm:vit_tiny_patch16_224 --data photos.csv --method 'ToMe(r=8)'",
    }  # fmt: skip
    plain = accuracy(0.881, n).model_copy(update={"agreement": 1.0})
    rows = [
        Row(
            method=None,
            role="plain",
            macs=Macs(counted=1.258e9),
            counts=[196.0] * 13,
            memory_mib=412,
            accuracy=plain,
            **common,
        )
    ]
    for i, (spelling, role, share, pain) in enumerate(SPELLINGS):
        value = 0.881 - pain * 0.035 * (1 - share) ** 1.4 / 0.3 + 0.001 * (i % 3)
        paired = {
            "vs_plain": Paired(
                against="plain", wins=7, losses=7 + int(n * (0.881 - value)), p=0.6 if value > 0.872 else 3e-5
            )
        }
        if role == "method":
            odds = (12, 41, 4e-5) if pain > 1.3 else (25, 21, 0.66) if pain > 1 else (52, 19, 0.012)
            paired["vs_baseline"] = Paired(against="Downsample(size=192)", wins=odds[0], losses=odds[1], p=odds[2])
        times = [latency(1, share, 0.05), latency(25, share, 0.03)]
        counts = [196.0] + [196 * (1 - (1 - share) * k / 12) for k in range(12)]
        rows.append(
            Row(method=spelling, role=role, macs=Macs(counted=1.258e9 * share), counts=counts, latency=times,
                memory_mib=300 + i, accuracy=accuracy(value, n, paired if scored else None), **common)
        )  # fmt: skip
    return rows


def fake_owner(seed, h, w, drop=0.3, tokens=20):
    """Owner [h w]: random, not contiguous, some dropped."""
    random = np.random.default_rng(seed)
    owner = random.integers(0, tokens, h * w)
    owner[random.random(h * w) < drop] = -1
    return owner


@pytest.fixture(scope="module")
def rows():
    return fake_rows()


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).integers(0, 256, (61, 87, 3), dtype=np.uint8)


def grid_cases():
    return pytest.mark.parametrize(("height", "width", "grid"), [(64, 64, (4, 4)), (61, 87, (5, 7)), (33, 20, (8, 3))])


def patch_of(y, x, height, width, grid):
    """Naive: which patch a pixel lies in."""
    return (y * grid[0] // height) * grid[1] + x * grid[1] // width


@grid_cases()
def test_kept_touches_dropped_patches_only(height, width, grid):
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    owner = fake_owner(2, *grid, drop=0.5)
    out = overlay.kept(image, owner, grid)
    changed = np.zeros(owner.size, bool)
    for y in range(height):
        for x in range(width):
            p = patch_of(y, x, height, width, grid)
            changed[p] |= (out[y, x] != image[y, x]).any()
            if owner[p] < 0:
                assert len(set(out[y, x].tolist())) == 1
                assert out[y, x, 0] <= 90
    assert (changed == (owner < 0)).all()


def test_dropped_patches_of_a_dark_image_are_pale():
    image = np.random.default_rng(1).integers(0, 60, (32, 32, 3), dtype=np.uint8)
    owner = np.where(np.arange(16) % 2, -1, np.arange(16))
    out = overlay.kept(image, owner, (4, 4))
    dropped = np.kron((owner < 0).reshape(4, 4), np.ones((8, 8), bool))
    assert out[dropped].min() > image.max() + 40
    assert (out[~dropped] == image[~dropped]).all()


@grid_cases()
def test_merged_is_the_mean_colour_with_lines_between_owners_only(height, width, grid):
    image = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    owner = fake_owner(4, *grid, tokens=5)
    out = overlay.merged(image, owner, grid)
    token = np.array([[owner[patch_of(y, x, height, width, grid)] for x in range(width)] for y in range(height)])
    for y in range(height):
        for x in range(width):
            line = (y > 0 and token[y - 1, x] != token[y, x]) or (x > 0 and token[y, x - 1] != token[y, x])
            if token[y, x] < 0:
                flat = np.floor(overlay.LIFT + overlay.DIM * (image[y, x] @ [0.299, 0.587, 0.114]) + 0.5).repeat(3)
            else:
                flat = image[token == token[y, x]].mean(0)
            ink = 255 if np.median(image @ [0.299, 0.587, 0.114]) < 165 else 0
            want = 0.4 * flat + 0.6 * ink if line else flat
            assert np.abs(out[y, x] - want).max() <= 1, (y, x)


def test_detail_shows_single_patches_as_photographed(noise):
    owner = np.full(35, 0)
    owner[[3, 17]] = [1, 2]
    out = overlay.draw(noise, owner, (5, 7))
    ys, xs = np.nonzero(overlay._spread(np.arange(35).reshape(5, 7), noise) == 17)
    inside = (slice(ys.min() + 1, ys.max()), slice(xs.min() + 1, xs.max()))
    assert (out[inside] == noise[inside]).all()
    assert len(np.unique(out[5:10, 5:10].reshape(-1, 3), axis=0)) == 1


def test_draw_picks_by_content(noise):
    keep = np.where(np.arange(35) % 3 == 0, -1, np.arange(35))
    assert (overlay.draw(noise, keep, (5, 7)) == overlay.kept(noise, keep, (5, 7))).all()
    both = keep.copy()
    both[1:3] = 1
    assert (overlay.draw(noise, both, (5, 7)) == overlay.merged(noise, both, (5, 7), detail=True)).all()
    assert (overlay.draw(noise, both, (5, 7), "merged") == overlay.merged(noise, both, (5, 7))).all()
    assert (overlay.draw(noise, np.full(35, -1), (5, 7)) == overlay.kept(noise, np.full(35, -1), (5, 7))).all()


def test_thick_outlines_lie_on_boundaries():
    token = np.zeros((40, 40), int)
    token[:, 20:] = 1
    for thick in (1, 2, 3, 4):
        line = overlay._outline(token, thick)
        assert line.sum() == 40 * thick
        assert line[:, 20].all()
    assert not overlay._outline(np.zeros((9, 9), int), 3).any()


def test_overlays_refuse_what_does_not_fit(noise):
    with pytest.raises(ValueError, match="does not fill a grid of 4 x 4"):
        overlay.kept(noise, np.arange(35), (4, 4))
    with pytest.raises(TypeError, match="integers"):
        overlay.kept(noise, np.arange(35.0), (5, 7))
    with pytest.raises(ValueError, match="uint8"):
        overlay.kept(noise / 255, np.arange(35), (5, 7))
    with pytest.raises(ValueError, match="too small"):
        overlay.kept(noise[:3], np.arange(35), (5, 7))
    with pytest.raises(ValueError, match="style"):
        overlay.draw(noise, np.arange(35), (5, 7), "fancy")
    with pytest.raises(ValueError, match="-1"):
        overlay.draw(noise, np.arange(35) - 2, (5, 7))


def test_pictures_take_pil_and_scale(noise):
    strip = overlay.picture(Image.fromarray(noise), [fake_owner(1, 5, 7), fake_owner(2, 5, 7)], (5, 7), cell=122)
    assert strip.dtype == np.uint8
    assert strip.shape[0] == 122
    assert strip.shape[1] >= 3 * 174


def test_grid_is_found(noise):
    assert overlay.grid_of(np.zeros((3, 4), int), (10, 10)) == (3, 4)
    assert overlay.grid_of(np.zeros(196, int), (224, 224)) == (14, 14)
    assert overlay.grid_of(np.zeros(35, int), noise.shape[:2]) == (5, 7)
    assert overlay.grid_of(np.zeros(100, int), (224, 224), (14, 14)) == (10, 10)


def test_spaced_keeps_the_last():
    assert overlay.spaced("abc", 5) == list("abc")
    for most in (1, 2, 5):
        found = overlay.spaced(range(12), most)
        assert len(found) == most
        assert found[-1] == 11
        assert sorted(set(found)) == found


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_contact_sheet(tmp_path, noise, suffix):
    layers = [(i, fake_owner(i + 1, 5, 7), 20 - i) for i in range(-1, 7)]
    path = view.figure(
        noise,
        [("ToMe(r=2)", layers), ("a $x$ <b>", [*layers[:1], ("input", noise, 35)])],
        tmp_path / f"sheet.{suffix}",
        "photo $1",
    )
    if suffix == "png":
        assert Image.open(path).size[0] > 600
    else:
        assert path.read_text().count("<image") == 6 + 3
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_only_png_and_svg(tmp_path, noise, rows):
    for wrong in ("sheet.jpg", "sheet"):
        with pytest.raises(ValueError, match=r"\.png or \.svg"):
            view.figure(noise, [("ToMe(r=2)", [("block 0", fake_owner(0, 5, 7), 20)])], tmp_path / wrong)
        with pytest.raises(ValueError, match=r"\.png or \.svg"):
            view.save(rows, tmp_path / wrong)
    assert not list(tmp_path.iterdir())


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    files.write(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


class Page(HTMLParser):
    """Collects the tags, the text of table cells and what the page would load."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.tags, self.lines, self.open = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [
            value for key, value in attrs if key in ("src", "srcset", "poster") or (key.endswith("href") and tag != "a")
        ]
        if tag == "tr":
            self.lines.append([])
        if tag in ("td", "th"):
            self.open = True
            self.lines[-1].append("")

    def handle_endtag(self, tag):
        self.open = self.open and tag not in ("td", "th")

    def handle_data(self, data):
        if self.open:
            self.lines[-1][-1] += data


def sheets(method="ToMe(r=8)"):
    image = np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    images = [(method, 3, 172, image), (method, 11, 100, out.getvalue())]
    return [view.Sheet("cat.jpg", "Ann, CC BY 4.0, https://example.org/cat", "tabby", images, image)]


def page_of(rows, tmp_path, pictures=()):
    return view.html(rows, pictures, tmp_path / "report.html").read_text(encoding="utf-8")


def test_page_is_self_contained(tmp_path, rows):
    text = page_of(rows, tmp_path, sheets())
    loads = Page(text).loads
    assert sum(one.startswith("data:image/webp") for one in loads) == 2
    assert sum(one.startswith("data:image/png") for one in loads) == 1
    assert all(one.startswith(("data:", "#")) for one in loads)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)|fetch\(|XMLHttp", text)
    assert not re.findall(r"https?://(?!example\.org/cat)\S*", text)


def test_ids_on_the_page_are_unique(tmp_path, rows):
    ids = re.findall(r'\sid="([^"]+)"', page_of(rows, tmp_path))
    assert len(ids) == len(set(ids))


def test_every_row_is_in_every_table(tmp_path, rows):
    lines = [[cell.strip() for cell in line] for line in Page(page_of(rows, tmp_path)).lines]
    assert len(lines) == len(rows) + 1
    assert len({len(line) for line in lines}) == 1
    names = sorted(line[0] for line in lines[1:])
    assert names == sorted(row.method or "plain" for row in rows)
    text = view.markdown(rows)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(view.table(rows))
    shown = console.export_text()
    for row in rows:
        assert f"| `{name(row)}` |" in text
        assert name(row) in shown
    tome = next(line for line in lines if line[0] == "ToMe(r=8)")
    assert "0.825" in tome
    assert "0.66×" in tome


def test_numbers_are_the_rows_own(rows):
    group = groups(rows)[0]
    row = group.find("ToMe(r=8)")
    by = {column.head: column.cell(row, group).flat for column in columns([group])}
    right, late = row.accuracy, row.latency[1]
    assert by["top-1 %"] == f"{100 * right.value:.1f} ({100 * right.low:.1f}–{100 * right.high:.1f})"
    assert by["speed, batch 25"] == f"{late.ratio:.2f}× ({late.low:.2f}–{late.high:.2f})"
    assert by["best equal-cost baseline"].startswith("Downsample(size=192) (")
    assert by["p vs baseline"] == "0.012 (+52 −19)"
    assert by["reducer, batch 1"] == "3.1 %"


def test_no_speed_up_is_claimed_where_the_interval_covers_one(rows):
    group = groups(rows)[0]
    late = rows[1].latency[0].model_copy(update={"ratio": 1.3, "low": 0.98, "high": 1.6})
    row = rows[1].model_copy(update={"latency": [late]})
    column = next(c for c in columns([group]) if c.head == "speed, batch 1")
    assert column.cell(row, group).mark == "quiet"
    words = " ".join(sentences(Group((rows[0], row))))
    assert "no measurable speed-up (interval 0.98–1.60)" in words
    assert "speed 1.30" not in words


def test_findings_name_the_winner_and_the_losers(rows):
    words = " ".join(sentences(groups(rows)[0]))
    assert "right on 88.1 % of 1000 images" in words
    assert "Downsample wins against TopK ×3, NormThreshold ×3." in words
    assert "Not shown to beat Downsample: `EViT(keep=Keep(0.9))`" in words
    assert "Never on it: NormThreshold, Random, Grid, Pool." in words
    assert "cheapest method within 1 point of plain is `ToMe" in view.markdown(rows)
    near = [r for r in rows if r.role == "method" and r.accuracy.value >= 0.871]
    assert f"within 1 point of plain is `{min(near, key=lambda r: r.macs.counted).method}`" in words


def test_a_baseline_that_does_not_run_here_is_named(rows):
    """No row of Downsample though others were searched for: the page and the table say so."""
    few = [row for row in rows if family(row) != "Downsample"]
    text = view.markdown(few)
    assert "does not take it: Downsample." in text
    assert "no Downsample here" in text
    for complete in (rows, few[:1], [row for row in few if row.role != "baseline"]):
        assert "does not take it" not in view.markdown(complete)


def test_random_weights_show_agreement(tmp_path):
    rows = fake_rows(weights=None, scored=False)
    text = page_of(rows, tmp_path)
    assert "agreement with plain" in text
    assert "top-1" not in re.sub(r"<details.*?</details>", "", text, flags=re.S)
    assert "The weights are random" in text
    assert "<svg" in text
    assert "agreement with plain %" in view.markdown(rows)


def test_rows_with_next_to_nothing(tmp_path):
    bare = [
        Row(task="classify", model="m", weights=None, method=m, role=r)
        for m, r in ((None, "plain"), ("ToMe(r=8)", "method"))
    ]
    assert [line[0].strip() for line in Page(page_of(bare, tmp_path)).lines] == ["method", "plain", "ToMe(r=8)"]
    assert "| `ToMe(r=8)` |" in view.markdown(bare)
    assert view.table(bare).row_count == 2
    with pytest.raises(ValueError, match="two rows"):
        view.save(bare, tmp_path / "curve.png")
    with pytest.raises(ValueError, match="at least one row"):
        view.html([], [], tmp_path / "none.html")


def test_hostile_strings_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'`|</title>{{7*7}}"
    rows = [row.model_copy(update={"model": evil, "command": evil, "commit": evil}) for row in fake_rows()]
    rows[1] = rows[1].model_copy(update={"method": f"ToMe({evil})"})
    picture = view.Sheet(evil, evil, evil, sheets(evil)[0].images)
    page = Page(page_of(rows, tmp_path, [picture]))
    assert page.tags.count("script") == 1
    assert any(evil in line[0] for line in page.lines)
    (line,) = [line for line in view.markdown(rows).splitlines() if line.startswith("| `` ToMe(<script>")]
    assert len(re.findall(r"(?<!\\)\|", line)) == len(columns(groups(rows))) + 1


def test_groups_are_not_mixed(tmp_path, rows):
    other = [row.model_copy(update={"model": "timm:vit_small_patch16_224"}) for row in rows[:5]]
    found = groups([*rows, *other])
    assert [len(group.rows) for group in found] == [len(rows), 5]
    assert view.table([*rows, *other]).row_count == len(rows) + 5 + 2
    assert page_of([*rows, *other], tmp_path).count("<table") == 2
    assert dict(facts(found[1]))["model"] == "timm:vit_small_patch16_224"


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_curves_are_saved(tmp_path, rows, suffix):
    first = view.save(rows, tmp_path / f"a.{suffix}", "time", 25).read_bytes()
    assert first == view.save(rows, tmp_path / f"b.{suffix}", "time", 25).read_bytes()
    assert len(curves.points(rows)) == len(rows)
    with pytest.raises(ValueError, match="'macs', 'time' or 'tokens'"):
        view.save(rows, tmp_path / f"c.{suffix}", "money")
