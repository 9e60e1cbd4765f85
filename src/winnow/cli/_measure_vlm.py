"""winnow measure --text: a whole vision-language model, by stage, plain beside reduced.

Winnow's own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import winnow

from .._vlm_model import place
from ..measure import VlmMacs, count_macs, count_vlm_macs, peak_memory, record, verdict, vlm_ceiling, vlm_macs
from ..measure.closed_form import check_counted
from ..measure.vlm_time import compare_vlm_latency, first_token, per_token, vlm_inputs
from ..models import one_line, quiet, reachable_hub
from ..reducer import Method
from ..twin import twin
from ._printed import print_rows, table_of

STAGES = ("vision", "reducer", "projector", "prefill", "decode")
WEIGHTS = "*.safetensors"


def measure_vlm(
    spec: str, methods: Sequence[Method], text: int, grid: str | None, sizes: Sequence[int], *, pairs: int, way: Any,
    convention: str, results: Path, seed: int, device: torch.device, pretrained: bool, as_json: bool,
    expand: bool = False,
) -> None:  # fmt: skip
    """Print what each method costs; with batch sizes the model is built, run and timed, and rows are appended."""
    if not spec.startswith("hf:"):
        raise ValueError(f"--text is for vision-language models, hf:ID_OR_PATH; {spec} has no text")
    from transformers import AutoConfig

    name = place(spec)
    with quiet(), reachable_hub():
        config = one_line(spec, "has no configuration that can be read", lambda: AutoConfig.from_pretrained(name))
    patches = _grid(grid)
    said = [
        vlm_macs(config, method, text, grid=patches, convention=convention, expand=expand and method is not None)
        for method in (None, *methods)
    ]
    sizes, rows = [size for size in sizes if size], list[record.Row]()
    if sizes:
        net = _model(spec, name, config, pretrained, seed, device)
        for method, one in zip((None, *methods), said):
            row = _row(spec, net, method, one, text, patches, sizes, pairs, way, device, expand)
            record.append(results, row)
            rows.append(row)
    else:
        count_vlm_macs(config, None, text, grid=patches)  # an error where count and closed form differ
    if as_json:
        print_rows(rows) if rows else print("[" + ",\n ".join(json.dumps(asdict(one)) for one in said) + "]")
        return
    Console().print(_table((None, *methods), said, rows))
    if expand:
        print("expand: tokens go back to their patches behind the tower, so all that is saved is saved inside it")
    share = vlm_ceiling(config, text, grid=patches)
    print(f"a reducer after the encoder can save at most {share:.1%} here, where {text} other tokens stay")


def _grid(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"--grid {text}: patches as HEIGHTxWIDTH, e.g. 48x48")
    return int(parts[0]), int(parts[1])


def _model(spec: str, name: str, config: Any, pretrained: bool, seed: int, device: torch.device) -> Any:
    """The model in evaluation mode; random weights, from `seed`, where none are wanted or there."""
    from transformers import AutoModelForImageTextToText

    stored = pretrained or (Path(name).expanduser().is_dir() and any(Path(name).expanduser().glob(WEIGHTS)))
    with quiet(), reachable_hub(), torch.random.fork_rng(devices=[]), device:
        torch.manual_seed(seed)
        kind, dtype = AutoModelForImageTextToText, torch.float32 if device.type == "cpu" else torch.bfloat16
        if stored:
            return one_line(spec, "cannot be loaded", lambda: kind.from_pretrained(name, dtype=dtype)).to(device).eval()
        return one_line(spec, "is no vision-language model", lambda: kind.from_config(config, dtype=dtype)).eval()


def _row(
    spec: str, net: Any, method: Method | None, said: VlmMacs, text: int, grid: Any, sizes: Sequence[int], pairs: int,
    way: Any, device: torch.device, expand: bool,
) -> record.Row:  # fmt: skip
    """Counted on the running model, timed against the plain one."""
    exact = vlm_macs(net.config, method, text, grid=grid, expand=expand and method is not None).total
    one = vlm_inputs(net, 1, text, grid)
    first, whole = [], []
    ran = f"{way} + expand" if expand and method else str(way)
    with winnow.reduced(twin(net), method, way, expand=expand) if method else nullcontext(net) as reduced:
        counted = count_macs(reduced, {**one, "logits_to_keep": 1})
        check_counted(counted, exact, repr(method) if method else "plain")
        memory = peak_memory(first_token(reduced, one), device)
        for size in sizes if method else ():
            pair = compare_vlm_latency(net, reduced, vlm_inputs(net, size, text, grid), pairs=pairs, device=device)
            first.append(pair[0])
            whole.append(pair[1])
    return record.Row(
        task="measure-vlm", model=spec, weights=None, method=repr(method) if method else None,
        role="method" if method else "plain", way=ran, memory_mib=memory, latency=first,
        macs=record.Macs(counted=counted, closed=exact),
        vlm=record.Vlm(
            stages={stage: getattr(said, stage) for stage in STAGES}, image_tokens=list(said.image_tokens),
            prompt_tokens=said.prompt_tokens, kv_bytes=said.kv_bytes, answer=whole,
        ),
        dtype=str(net.dtype).removeprefix("torch."), device=str(device), environment=record.environment(),
        commit=record.commit(), command=record.command(), time=record.now(),
    )  # fmt: skip


def _table(methods: Sequence[Method | None], said: Sequence[VlmMacs], rows: Sequence[record.Row]) -> Table:
    stages, more = (f"{stage} GMAC" for stage in STAGES), ("counted", "peak MiB", "first token", "ms per token")
    heads = [
        "method",
        "image tokens",
        "prompt",
        *stages,
        "total GMAC",
        "of plain",
        "cache MiB",
        *(more if rows else ()),
    ]
    table = table_of(heads, left=("method", "first token"))
    for at, (method, one) in enumerate(zip(methods, said)):
        kept = dict.fromkeys(one.image_tokens)
        cells = [repr(method) if method else "plain", " ".join(map(str, kept)), str(one.prompt_tokens)]
        cells += [f"{getattr(one, stage) / 1e9:.3f}" for stage in STAGES]
        cells += [f"{one.total / 1e9:.3f}", f"{one.total / said[0].total:.1%}", f"{one.kv_bytes / 2**20:.1f}"]
        table.add_row(*cells, *(_measured(rows[at]) if rows else ()))
    return table


def _measured(row: record.Row) -> list[str]:
    assert row.macs is not None and row.vlm is not None
    firsts = [f"batch {t.batch}: {t.plain_ms:.0f} -> {t.reduced_ms:.0f} ms, {verdict(t)}" for t in row.latency]
    tokens = ["{:.1f} -> {:.1f}".format(*per_token(first, whole)) for first, whole in zip(row.latency, row.vlm.answer)]
    return [f"{row.macs.counted / 1e9:.3f}", f"{row.memory_mib:.0f}", "\n".join(firsts), "\n".join(tokens)]
