"""Document 001's GMAC column: as its script counted, beside every multiply-add counted, and why the two differ.

Document 001 (DRIP), 2025. `winnow report seed001-flops --out docs`: under a minute; expected 2.96/2.69/1.83/1.26 and
11.33/10.22/6.62/4.53 as published, 4.409/2.741/1.884/1.315 and 17.563/10.428/6.840/4.752 in truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import winnow

from ..adapters import host_of
from ..measure import count_macs, fvcore_macs, record
from ..measure.closed_form import closed_macs, plain_macs
from ..methods.drip import DRIP
from ..view import files
from ..view.curves import COLOURS, INK, MUTED

Say = Callable[[str], object]
TASK = "seed001-flops"
RATES = {"2x": 0.5, "4x": 0.25, "10x": 0.1}
THEIRS = {32: ("2.96", "2.69", "1.83", "1.26"), 16: ("11.33", "10.22", "6.62", "4.53")}
"""Document 001's own figures, plain first: quoted, not measured."""
WIDTH, HEADS, DEPTH, SIDE = 768, 12, 12, 224
TICKS = (1, 2, 5, 10, 20, 50)
HALO = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}


@dataclass(frozen=True)
class Wish:
    """Nothing to choose."""


def write(wish: Wish, results: Path, out: Path, say: Say = lambda words: None) -> list[Path]:
    """Count what the rows file lacks; write OUT/seed001-flops.md and the figure, SVG and PNG."""
    rows = run(results, say)
    say("figure")
    chart = figure()
    made = [files.write(out / f"seed001-flops.{form}", files.encode(chart, form)) for form in ("svg", "png")]
    return [files.write(out / "seed001-flops.md", page(rows).encode()), *made]


def run(results: Path, say: Say) -> list[record.Row]:
    """Two rows per model of the document's column, and one for ours: as its script counted, and in full."""
    known = {(r.model, r.method, r.macs.convention): r for r in _read(results) if r.task == TASK and r.macs}
    for patch in THEIRS:
        for rate in (None, *RATES.values()):
            name, method = _names(patch, rate)
            if (name, method, "seed001") not in known:
                say(f"{name} {method or ''}")
                for row in _counted(patch, rate):
                    record.append(results, row)
                    known[row.model, row.method, row.macs.convention] = row  # type: ignore[union-attr]
    return list(known.values())


def _read(results: Path) -> list[record.Row]:
    return record.read(results) if results.exists() else []


def _names(patch: int, rate: float | None) -> tuple[str, str | None]:
    if rate is None:
        return f"open_clip:ViT-B-{patch}", None
    return f"timm:drip_seed001_base_patch{patch}_224", f"DRIP.seed001(rate={rate})"


def _counted(patch: int, rate: float | None) -> list[record.Row]:
    image = torch.zeros(1, 3, SIDE, SIDE)
    name, method = _names(patch, rate)
    if rate is None:
        tower = _tower(patch)
        theirs, left_out = fvcore_macs(tower, image)
        theirs += DEPTH * handler((SIDE // patch) ** 2 + 1)
        return [
            _row(name, None, theirs, "seed001", left_out),
            _row(name, None, count_macs(tower, image), "mac"),
        ]
    published = _seed(patch, rate)
    theirs, left_out = fvcore_macs(published, image)
    # its script leaves the predictor out; the truth has it in
    own = (SIDE // patch) ** 2 * sum(p.numel() for p in published.boundary_predictor.parameters() if p.ndim > 1)
    ours = _model(f"drip_vit_base_patch{patch}_224", rate=rate, num_classes=WIDTH)
    return [
        _row(name, method, theirs, "seed001", left_out),
        _row(name, method, count_macs(published, image) + own, "mac"),
        _row(f"timm:drip_vit_base_patch{patch}_224", repr(DRIP(rate=rate)), count_macs(ours, image), "mac"),
    ]


def handler(tokens: int) -> int:
    """MACs per layer that the script's own handler gives to the fused attention of one image.

    It reads (sequence, batch, width) off a tensor [batch, sequence, width]: for one image the sequence is 1 long.
    """
    n, b = 1, tokens
    return 2 * b * HEADS * n * n + 2 * b * HEADS * n * WIDTH


def _tower(patch: int) -> nn.Module:
    import open_clip

    return open_clip.create_model(f"ViT-B-{patch}").visual.eval()


def _model(name: str, **words: Any) -> Any:
    import timm

    from .. import backbones  # noqa: F401  registers our own with timm

    return timm.create_model(name, **words).eval()


def _seed(patch: int, rate: float) -> Any:
    return _model(f"drip_seed001_base_patch{patch}_224", rate=rate, predicted=False)


def _row(model: str, method: str | None, macs: float, convention: str, left_out: dict[str, int] | None = None):
    return record.Row(
        task=TASK, model=model, weights=None, method=method, role="plain" if method is None else "method",
        macs=record.Macs(counted=macs, convention=convention, left_out=left_out or {}), device="cpu",
        environment=record.environment(), commit=record.commit(), command=record.command(), time=record.now(),
    )  # fmt: skip


def page(rows: list[record.Row]) -> str:
    """Markdown: the column as published and as counted, and why they differ."""
    gmac = {(row.model, row.method, row.macs.convention): row.macs.counted / 1e9 for row in rows if row.macs}
    lines = []
    for patch, theirs in THEIRS.items():
        whole = gmac[(*_names(patch, None), "mac")]
        for (label, rate), said in zip({"plain": None, **RATES}.items(), theirs):
            name = _names(patch, rate)
            true, again = gmac[(*name, "mac")], gmac[(*name, "seed001")]
            ours = None if rate is None else gmac[f"timm:drip_vit_base_patch{patch}_224", repr(DRIP(rate=rate)), "mac"]
            apparent = float(theirs[0]) / float(said)
            less = ("", "") if rate is None else (f"{apparent:.2f}x", f"{whole / true:.2f}x (−{1 - true / whole:.1%})")
            cells = (f"B/{patch} {label}", said, f"{again:.2f}", f"{true:.3f}", f"{ours:.3f}" if ours else "", *less)
            lines.append(f"| {' | '.join(cells)} |")
    return PAGE.format(table="\n".join(lines), command=rows[0].command, **_reasons(gmac))


def _reasons(gmac: dict) -> dict[str, str]:
    """Figures of the paragraph under the table, from the rows and from shapes."""
    said, true = (gmac[(*_names(32, None), kind)] for kind in ("seed001", "mac"))
    t, extra = (SIDE // 32) ** 2 + 1, DEPTH * handler((SIDE // 32) ** 2 + 1) / 1e9
    lost = DEPTH * (4 * t * WIDTH**2 + 2 * t * t * WIDTH) / 1e9
    predictor = (t - 1) * (2 * WIDTH**2 + 2 * WIDTH) / 1e9
    return {"said": f"{said:.3f}", "true": f"{true:.3f}", "share": f"{1 - said / true:.0%}", "lost": f"{lost:.3f}",
            "extra": f"{extra:.3f}", "predictor": f"{predictor:.3f}"}  # fmt: skip


PAGE = """# Document 001's GMAC column, as published and in full

Made by `{command}` from its rows. "Published" is document 001's own figure, quoted; every other one is computed.

| ViT | published | its convention, computed | true GMAC | ours (`drip_vit_*`) | reduction as published | true reduction |
|:--|--:|--:|--:|--:|--:|:--|
{table}

**Why they differ.** The plain ViT's attention is `nn.MultiheadAttention` with one tensor for query, key and value: in
evaluation PyTorch runs it as a single fused operator, for which fvcore has no formula, so {lost} GMAC of ViT-B/32
(projections and both products of attention) counted as nothing. The script's own formula for that operator reads the batch
as the sequence and gives {extra} GMAC back: {said} instead of {true}, {share} too little. DRIP's block normalises query, key
and value one by one, which disables the fused operator, so DRIP was counted almost in full (only its boundary predictor,
{predictor} GMAC for B/32, was skipped). The baseline was under-counted and the method was not: DRIP saves far more than its
own table says. "True" counts every matrix product and convolution and no norm or softmax, with the reference's pooling as a
dense matrix product; ours pools by index, which multiplies nothing, and is a little lower.

![GMAC against rate, patch 32, 16 and 8](seed001-flops.svg)

GMAC of one image against DRIP's rate; dashed: the plain ViT.
"""


def curve(patch: int, rates: list[float]) -> tuple[float, list[float]]:
    """GMAC of plain ViT-B and of DRIP at each rate, by closed form: no weights are made, nothing runs."""
    import timm

    meta = torch.device("meta")
    with meta:
        model = timm.create_model(f"vit_base_patch{patch}_224")
    setting, plain, found = host_of(model).setting, plain_macs(model), []
    for rate in rates:
        with meta:
            winnow.reduce(model, DRIP(rate=rate))
        found.append(closed_macs(model, torch.tensor([DRIP(rate=rate).counts(setting)])))
        winnow.restore(model)
    assert plain is not None
    return plain / 1e9, [float(one) / 1e9 for one in found if one is not None]


def figure() -> Any:
    """The matplotlib figure: a line per patch size on a logarithmic scale, its plain ViT dashed."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(7, 4.6), layout="constrained", facecolor="white")
    axes = sheet.add_subplot()
    rates = [i / 20 for i in range(1, 20)]
    for patch, colour in zip((8, 16, 32), COLOURS):
        plain, found = curve(patch, rates)
        axes.axhline(plain, color=colour, linestyle=(0, (4, 3)), linewidth=1.1)
        axes.plot(rates, found, color=colour, linewidth=2, label=f"patch {patch}, plain {plain:.1f} (dashed)")
        for rate in RATES.values():
            gmac = found[rates.index(rate)]
            axes.plot(rate, gmac, "o", color=colour, markersize=5)
            axes.annotate(
                f"{gmac:.2f}", (rate, gmac), (4, -11), textcoords="offset points", fontsize=8, color=INK, bbox=HALO
            )
    axes.set(yscale="log", xlabel="rate: segments per patch", ylabel="GMAC per image", xlim=(0, 1))
    axes.set_yticks(TICKS, [str(tick) for tick in TICKS])
    axes.set_title("DRIP in ViT-B, 224 pixels, after 2 of 12 blocks (1 MAC = 2 FLOP)", fontsize=10, color=INK)
    axes.minorticks_off()
    axes.grid(True, which="major", color=MUTED, alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return sheet
