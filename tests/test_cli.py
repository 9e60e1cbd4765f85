"""The command: what it prints, what it writes, and one-line refusals with exit code 2."""

from __future__ import annotations

import json
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from winnow.cli import _together
from winnow.measure import record

MODEL = "timm:test_vit"  # 160 px, patch 16, width 64, depth 6


@pytest.fixture
def photos(tmp_path):
    """A csv of six small labelled pictures."""
    random = np.random.default_rng(0)
    lines = ["file,label"]
    for i in range(6):
        Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{i}")
    table = tmp_path / "photos.csv"
    table.write_text("\n".join(lines))
    return table


@pytest.fixture
def weights(tmp_path):
    """A weights file of the test model."""
    import timm
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), path)
    return path


def refused(result, *words):
    code, out, err = result
    assert code == 2, (code, out, err)
    assert "Traceback" not in err
    said = [line for line in err.splitlines() if not re.match(r" *\d+ s  ", line)]  # progress apart
    assert len(said) == 1, err
    assert said[0].startswith("winnow: ")
    for word in words:
        assert word in err, err


def test_list(run):
    code, out, _ = run("list", "--json")
    assert code == 0
    assert {"ToMe", "EViT", "Downsample"} <= {one["name"] for one in json.loads(out)}
    assert run("list")[0] == 0


@pytest.mark.parametrize("words", [("--help",), ()])
def test_help_names_every_verb(run, words):
    code, out, err = run(*words)
    assert (code, err) == (0, "") and out.lstrip().startswith("Usage: ")
    assert all(verb in out for verb in ("list", "show", "measure", "compare", "report"))
    assert run("data", *words) == (0, run("data", "--help")[1], "")


def test_measure(run):
    code, out, _ = run("measure", MODEL, "-m", "ToMe(r=8)", "--batch", 2, "--pairs", 9, "--json")
    assert code == 0
    rows = json.loads(out)
    assert [row["method"] for row in rows] == [None, "ToMe()"]
    assert rows[1]["macs"]["counted"] < rows[0]["macs"]["counted"]
    assert rows[1]["counts"] == [100, 92, 84, 76, 68, 60, 52]
    assert rows[1]["latency"][0]["batch"] == 2
    assert rows[1]["memory_mib"] > 0
    assert len(record.read("results/measure.jsonl")) == 2
    assert run("measure", MODEL, "-m", "ToMe()", "--batch", 1, "--pairs", 9)[0] == 0


def test_measure_fvcore_and_profile(run):
    pytest.importorskip("fvcore")
    code, out, _ = run("measure", MODEL, "--convention", "fvcore", "--json")
    assert code == 0
    assert json.loads(out)[0]["left_out"]
    code, out, _ = run("measure", MODEL, "--profile", "-m", "ToMe()", "--batch", 2)
    assert code == 0
    assert "block 0" in out
    assert re.search(
        r"ToMe\(\) spends most time in (?:block \d+|reducer) \(\d+%\) and, of the operators, in aten::\w+ \(\d+%\)", out
    )


def test_show(run, photos, weights):
    image = photos.parent / "0.png"
    for name in ("a.png", "b.svg"):
        code, out, _ = run("show", image, MODEL, "--weights", weights, "-m", "ToMe(r=8)", "-m", "TopK(layers=(1,3))",
                           "--out", photos.parent / name, "--verbose")  # fmt: skip
        assert code == 0
        assert (photos.parent / name).stat().st_size > 2000
    assert "ToMe(): tokens 100 92 84 76 68 60 52" in out
    assert "scores: lowest" in out
    assert "###" in out


def test_compare_resumes_and_keeps_rows(run, photos, weights, tmp_path):
    words = [
        "compare",
        MODEL,
        "--weights",
        weights,
        "--data",
        photos,
        "--time",
        0,
        "--pictures",
        1,
        "--mean",
        0.5,
        "--std",
        0.5,
    ]
    code, out, err = run(*words, "-m", "ToMe(r=4)")
    assert code == 0, err
    rows = record.read("results/compare.jsonl")
    kinds = {(row.method or "plain").split("(")[0] for row in rows}
    assert {"plain", "ToMe", "Random", "Grid", "Pool", "Downsample"} <= kinds
    tome = next(row for row in rows if row.method == "ToMe(r=4)")
    assert tome.accuracy.vs_plain.against == "plain"
    assert tome.accuracy.vs_baseline is not None
    assert tome.data.n == 6
    plain = next(row for row in rows if row.method is None)
    for row in rows:
        if row.role == "baseline":
            assert row.macs.counted <= 1.03 * tome.macs.counted
    assert tome.macs.counted < plain.macs.counted
    page = (tmp_path / "compare" / "report.html").read_text()
    assert "ToMe(r=4)" in page
    assert "<svg" in page

    with open("results/compare.jsonl", "a") as file:
        file.write('{"schema":1,"task":"cla')  # the run was killed in the middle of a row
    with pytest.warns(UserWarning, match="interrupted row"):
        code, out, err = run(*words, "-m", "ToMe(r=4)", "-m", "NormThreshold(before=(2,))", "--json")
    assert code == 0
    again = record.read("results/compare.jsonl")
    assert [row.method for row in again[: len(rows)]] == [row.method for row in rows]  # none was made twice
    assert sum(row.method == "ToMe(r=4)" for row in again) == 1
    norm = next(row for row in again if (row.method or "").startswith("NormThreshold"))
    assert norm.way == "Padded(16)"
    assert norm.macs.mean <= norm.macs.max
    assert json.loads(out)

    code, _, _ = run("report", "results/compare.jsonl", "--out", "again")
    assert code == 0
    assert "ToMe(r=4)" in (tmp_path / "again" / "report.md").read_text()


def test_compare_without_arguments(run, tmp_path):
    """The ViT that ships on the built-in scenes, and a page that says what comes first and who lost it."""
    code, out, err = run("compare", "-m", "TopK(keep=Keep(0.3))", "--limit", 10, "--time", 0, "--pictures", 2, "--json")
    assert code == 0, err
    rows = [record.Row.model_validate(row) for row in json.loads(out)]
    assert {(row.model, row.data.name, row.data.n) for row in rows} == {("timm:vit_scenes", "scenes", 10)}
    plain, topk = (next(row for row in rows if row.method == name) for name in (None, "TopK(keep=Keep(0.3))"))
    assert plain.weights is not None
    assert plain.accuracy.value >= 0.9
    assert 0 < topk.objects.kept < 1
    page = (tmp_path / "compare" / "report.html").read_text()
    assert "Worst drops first" in page
    assert "scene 0" in page
    assert re.search(r"lost by (1|none) of 1 method<", page)


def test_default_methods(run, photos, monkeypatch):
    asked = []

    def stop(self, methods):
        asked.extend(map(repr, methods))
        raise ValueError("enough")

    monkeypatch.setattr("winnow.compare.Comparison.run", stop)
    refused(run("compare", "timm:vit_tiny_patch16_224", "--data", photos), "enough")
    assert asked == ["ToMe(r=4)", "ToMe()", "PiToMe()", "EViT()", "TopK()", "TopK(keep=Keep(0.5))"]


def test_report_of_rows_that_have_no_curve(run, tmp_path):
    rows = [record.Row(task="t", model=name, weights=None, method=None, role="plain") for name in ("a", "b")]
    for row in rows:
        record.append(tmp_path / "rows.jsonl", row)
    code, out, _ = run("report", "rows.jsonl", "--out", "page", "--json")
    assert code == 0
    assert json.loads(out) == ["page/report.html", "page/report.md"]


@pytest.fixture
def trained(tmp_path):
    """What `winnow train` leaves of the test model with DRIP, its predictor one that no build gives."""
    import timm
    from safetensors.torch import save

    import winnow

    model = winnow.reduce(timm.create_model("test_vit"), winnow.DRIP(rate=0.25, after=1))
    with torch.no_grad():
        for weight in winnow.reducer_of(model).parameters():
            weight.normal_(generator=torch.Generator().manual_seed(1))
    words = {"winnow": winnow.__version__, "model": MODEL, "method": "DRIP(rate=0.25, after=1)", "step": "1"}
    path = tmp_path / "best.safetensors"
    path.write_bytes(save(model.state_dict(), metadata=words))
    return path, model.eval()


def test_trained_reducers_come_with_the_weights(run, photos, trained):
    import timm

    import winnow
    from winnow._save import trained_reducer
    from winnow.data import open_images
    from winnow.models import load_model

    path, model = trained
    own, likely = "DRIP(rate=0.25, after=1)", "DRIP(rate=0.25, after=1, inference='threshold')"
    base = ["compare", MODEL, "--weights", path, "--data", photos, "--time", 0, "--pictures", 1]
    code, out, _ = run(*base, "-m", "ToMe(r=8)", "-m", likely, "-m", own, "--json")
    assert code == 0
    counts = {row["method"]: row["counts"] and row["counts"][-1] for row in json.loads(out)}
    loaded, images = load_model(MODEL, weights=path, bare=True), open_images(str(photos))
    pixels = torch.stack([loaded.transform(images[i][0]) for i in range(len(images))])

    def likely_ones(reduce):
        with torch.no_grad(), winnow.watch(reduce(loaded.model, winnow.parse(likely))) as seen:
            loaded.model(pixels)
        winnow.restore(loaded.model)
        return float(seen.valid_counts[:, -1].float().mean())

    assert counts[likely] == pytest.approx(likely_ones(trained_reducer(path).reduce), abs=0.01)
    assert counts[likely] != pytest.approx(likely_ones(winnow.reduce), abs=0.5), "a fresh predictor finds other ones"
    assert counts[own] == 25
    with torch.no_grad():  # in Python, the whole checkpoint at once
        assert torch.equal(winnow.load(timm.create_model("test_vit").eval(), path)(pixels), model(pixels))


def test_trained_reducers_are_not_left_out_in_silence(run, photos, trained):
    path, _ = trained
    for verb in (["compare", "--data", photos, "--time", 0], ["measure", "--batch", 1]):
        words = [verb[0], MODEL, "--weights", path, *verb[1:]]
        refused(
            run(*words, "-m", "ToMe(r=8)"),
            "best.safetensors was trained with",
            'give --method "DRIP(rate=0.25, after=1)" too',
        )
        refused(run(*words, "-m", "DRIP(rate=0.5, after=1)"), "instead of DRIP(rate=0.5, after=1)")
    refused(run("doctor", MODEL, "--weights", path, "-m", "ToMe(r=8)"), "winnow.load")


def test_random_weights_report_agreement_only(run, photos):
    code, _, _ = run("compare", MODEL, "--data", photos, "--time", 0, "--pictures", 0, "-m", "ToMe(r=4)")
    assert code == 0
    rows = record.read("results/compare.jsonl")
    assert all(row.accuracy.value is None for row in rows)
    assert next(row for row in rows if row.method == "ToMe(r=4)").accuracy.agreement is not None


BAD = {
    "missing file": (["--data", "nowhere.csv"], ["nowhere.csv"]),
    "unknown method": (["-m", "Tome()"], ["did you mean ToMe"]),
    "unknown field": (["-m", "ToMe(q=8)"], ["no field 'q'", "r, inflect"]),
    "impossible amount": (["-m", "ToMe(r=80)"], ["r <= 50"]),
    "impossible removal": (["-m", "TopK(keep=Remove(100),layers=(1,))"], ["at most Remove(99)"]),
    "layer outside": (["-m", "EViT(layers=(9,))"], ["blocks 0 to 5"]),
    "odd size": (["-m", "Downsample(size=150)"], ["multiple of the patch size"]),
    "unknown way": (["--way", "quick"], ["Padded(16)"]),
    "too few pairs": (["--pairs", "3", "--time", "2"], ["9 pairs"]),
    "no device": (["--device", "cuda:7"], ["cpu always works"]),
    "bad mean": (["--mean", "half"], ["--mean half"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line(run, photos, weights, what):
    words, wanted = BAD[what]
    base = ["compare", MODEL, "--weights", weights, "--time", 0]
    base += [] if "--data" in words else ["--data", photos]
    base += [] if "-m" in words else ["-m", "ToMe(r=4)"]
    refused(run(*base, *words), *wanted)


def test_bad_data(run, photos, weights, tmp_path):
    def compare(data):
        return run("compare", MODEL, "--weights", weights, "--time", 0, "--data", data, "-m", "ToMe(r=4)")

    (tmp_path / "empty").mkdir()
    refused(compare(tmp_path / "empty"), "empty")
    table = tmp_path / "far.csv"
    table.write_text("file,label\n0.png,5000\n")
    refused(compare(table), "5000", "1000 classes")
    table.write_text("picture,label\n0.png,1\n")
    refused(compare(table), "label")
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:900])
    table.write_text("file,label\n0.png,1\ncut.png,1\n")
    refused(compare(table), "cut.png")
    assert not (tmp_path / "results" / "compare.jsonl").exists()


def test_bad_models(run, photos, weights, tmp_path):
    def measure(*words):
        return run("measure", *words, "-m", "ToMe(r=8)", "--batch", 1, "--pairs", 9)

    refused(measure("timm:swin_tiny_patch4_window7_224"), "SwinTransformer")
    refused(measure("timm:vit_tini_patch16_224"), "vit_tiny_patch16_224")
    refused(measure("vit_tiny_patch16_224"), "timm:")
    refused(measure("timm:vit_tiny_patch16_224", "--weights", weights), "another model")
    (tmp_path / "broken.safetensors").write_bytes(weights.read_bytes()[:1000])
    refused(measure(MODEL, "--weights", tmp_path / "broken.safetensors"), "broken.safetensors")
    refused(measure(MODEL, "--weights", tmp_path / "none.safetensors"), "none.safetensors")


def test_show_refuses_bad_pictures(run, photos, weights, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    refused(run("show", tmp_path / "text.png", MODEL, "-m", "ToMe()"), "text.png")
    refused(run("show", tmp_path / "0.png", MODEL, "-m", "ToMe()", "--out", "show.pdf"), ".png", ".svg")


def test_rows_survive_a_failure(run, photos, weights, tmp_path, monkeypatch):
    """A run that dies in its third configuration keeps the rows before it, and goes on from there."""
    import winnow.compare as module

    calls, classify = [], module.classify

    def dying(model, batches, watched=True):
        calls.append(watched)
        if len(calls) == 3:
            raise FloatingPointError("the model gives NaN")
        return classify(model, batches, watched)

    words = ["compare", MODEL, "--weights", weights, "--data", photos, "--time", 0, "--pictures", 0]
    words += ["-m", "Grid(layers=(1,))", "-m", "Random(layers=(1,))"]
    monkeypatch.setattr(module, "classify", dying)
    refused(run(*words), "NaN")
    assert [row.method for row in record.read("results/compare.jsonl")] == [None, "Grid(layers=(1,))"]
    monkeypatch.setattr(module, "classify", classify)
    assert run(*words)[0] == 0
    rows = record.read("results/compare.jsonl")
    assert [row.method for row in rows] == [None, "Grid(layers=(1,))", "Random(layers=(1,))"]


def test_report_refuses(run, tmp_path):
    refused(run("report", "nothing.jsonl"), "nothing.jsonl")
    (tmp_path / "new.jsonl").write_text('{"schema": 99}\n')
    refused(run("report", "new.jsonl"), "schema 99", "upgrade")


def test_nan_model_is_named(run, photos, tmp_path):
    import timm
    from safetensors.torch import save_file

    state = timm.create_model("test_vit").state_dict()
    state["head.bias"] = torch.full_like(state["head.bias"], float("nan"))
    save_file(state, tmp_path / "nan.safetensors")
    result = run(
        "compare", MODEL, "--weights", tmp_path / "nan.safetensors", "--data", photos, "--time", 0, "-m", "ToMe(r=4)"
    )
    refused(result, "NaN")


def test_doctor(run, monkeypatch):
    code, out, _ = run("doctor", MODEL, "-m", "ToMe(r=8)", "-m", "NormThreshold(before=(2,))", "--json")
    assert code == 0
    found = json.loads(out)
    assert {result["outcome"] for results in found.values() for result in results} == {"ok"}
    assert run("doctor", MODEL, "-m", "ToMe()")[0] == 0
    refused(run("doctor", "timm:swin_tiny_patch4_window7_224", "-m", "ToMe()"), "SwinTransformer", "Works:")
    refused(run("doctor", MODEL, "-m", "EViT(layers=(9,))"), "blocks 0 to 5")
    mlp = lambda self, block, x: 0.5 * block.mlp(block.norm2(x))  # noqa: E731
    monkeypatch.setattr("winnow.adapters.timm_blocks.PreNorm.mlp", mlp)
    code, out, _ = run("doctor", MODEL, "-m", "ToMe()")
    assert code == 1
    assert "failed" in out


@pytest.mark.parametrize("words", [["lisst"], ["list", "--nope"], ["doctor"], ["show"]])
def test_wrong_usage_is_one_line(run, words):
    refused(run(*words), "winnow --help")


@pytest.mark.parametrize(("error", "said"), [(KeyError("x"), "nobody foresaw"), (MemoryError(), "smaller --batch")])
def test_what_nobody_foresaw_is_one_line(run, monkeypatch, error, said):
    monkeypatch.setattr("winnow.cli.list_.about", lambda method: (_ for _ in ()).throw(error))
    refused(run("list", "--json"), said)


def test_budgets_stand_apart_or_with_commas(run):
    apart = ["compare", "hf:scenes", "--budgets", "64", "0.5", "-m", "FastV()"]
    assert _together(apart) == [*apart[:3], "64,0.5", *apart[5:]]
    refused(run("compare", "hf:scenes", "--budgets", "64", "1.5"), "budget 1.5: a share up to 1")
    refused(run("compare", "hf:scenes", "--budgets", "64", "--budgets", "1.5"), "budget 1.5: a share up to 1")


@pytest.mark.parametrize(("words", "said"), [
    (["compare", "hf:scenes", "--weights", "a.safetensors"], "--weights is for classifiers"),
    (["measure", "hf:scenes", "--text", "8", "--profile"], "--profile does not go with --text"),
    (["measure", MODEL, "--step", "--profile"], "one at a time"),
    (["measure", MODEL, "--grid", "4x4"], "give --text"),
    (["eval", "llava-bench", "--questions", "q", "--reviews", "r", "--answers", "a"], "give --judge too"),
    (["generate", "--model", "hf:scenes", "--image", "a.png", "--prompt", "b", "--images", "c"], "give --questions"),
])  # fmt: skip
def test_what_means_nothing_here_is_refused(run, words, said):
    refused(run(*words), said)


def test_ctrl_c_says_what_is_kept(run, monkeypatch):
    monkeypatch.setattr("winnow.cli.list_.about", lambda method: signal.raise_signal(signal.SIGINT))
    code, _, err = run("list", "--json")
    assert code == 130 and "rows already made are kept" in err
