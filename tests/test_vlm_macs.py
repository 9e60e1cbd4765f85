"""Closed form and count of vision-language models: published tables, every stage, models that run."""

from __future__ import annotations

import json

import pytest
import torch

import winnow
from winnow import Exactly, FastV, Keep, PyramidDrop, Random, ToMe
from winnow.measure import count_vlm_macs, vlm_ceiling, vlm_macs
from winnow.measure.record import read

transformers = pytest.importorskip("transformers")

K_TABLE = {
    32: (1.248, 1.632, 18.3, 14.7), 64: (1.667, 2.051, 23.0, 19.6), 128: (2.506, 2.894, 32.5, 29.5),
    192: (3.350, 3.740, 42.0, 39.4), 256: (4.199, 4.591, 51.5, 49.4), 384: (5.908, 6.306, 70.8, 69.5),
    576: (8.504, 8.910, 100.0, 100.0),
}  # fmt: skip
"""LLaVA-1.5-7B, 64 text tokens: TFLOP of the prefill and in total, per cent of both at 576."""


def llava(width=4096, depth=32, mlp=11008, heads=32, **words):
    """LLaVA-1.5-7B's shapes, or other ones of the language model."""
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            image_size=336, patch_size=14,
        ),
        text_config=transformers.LlamaConfig(
            hidden_size=width, num_hidden_layers=depth, intermediate_size=mlp, num_attention_heads=heads,
            num_key_value_heads=heads, vocab_size=32064,
        ), **words,
    )  # fmt: skip


def qwen(**text):
    return transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 200,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}, **text,
        },
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
    )  # fmt: skip


@pytest.mark.parametrize("k", K_TABLE)
def test_the_table_of_llava(k):
    prefill, total, share, llm_share = K_TABLE[k]
    ours, full = vlm_macs(llava(), k, 64), vlm_macs(llava(), None, 64)
    assert (round(2 * ours.prefill / 1e12, 3), round(2 * ours.total / 1e12, 3)) == (prefill, total)
    assert (round(100 * ours.total / full.total, 1), round(100 * ours.prefill / full.prefill, 1)) == (share, llm_share)
    assert ours.kv_bytes == 2 * 32 * (k + 64) * 4096 * 2
    assert ours.prompt_tokens == k + 64 and ours.image_tokens == (k,) * 32


@pytest.mark.parametrize("keep", [64, 576, [576] * 2 + [288] * 30])
def test_counted_equals_closed_form(keep):
    assert count_vlm_macs(llava(), keep, 64) == vlm_macs(llava(), keep, 64)


def test_counted_equals_closed_form_with_siglip():
    config = transformers.LlavaConfig(
        vision_config=transformers.SiglipVisionConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
        ),
        text_config=transformers.LlamaConfig(
            hidden_size=48, num_hidden_layers=2, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=99,
        ),
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    assert count_vlm_macs(config, 5, 7) == vlm_macs(config, 5, 7)


@pytest.mark.parametrize("grid", [(8, 8), (12, 18), (2, 10)])
def test_counted_equals_closed_form_with_windows(grid):
    assert count_vlm_macs(qwen(), None, 9, grid=grid) == vlm_macs(qwen(), None, 9, grid=grid)
    few = vlm_macs(qwen(), 3, 9, grid=grid)
    assert count_vlm_macs(qwen(), 3, 9, grid=grid) == few
    assert few.projector == vlm_macs(qwen(), None, 9, grid=grid).projector


def test_fastv_s_convention():
    """README of FastV: 57 % at K=3, R=50 %; the paper's 45 % less on 13B; about 40 tokens of text."""

    def share(config, layer, r):
        full, n = vlm_macs(config, None, 40, convention="fastv").total, round(576 * (1 - r))
        kept = [576] * layer + [n] * (config.text_config.num_hidden_layers - layer)
        return round(100 * vlm_macs(config, kept, 40, convention="fastv").total / full, 1)

    assert share(llava(), 3, 0.5) == 56.9
    assert [share(llava(), 2, r) for r in (0.5, 0.75, 0.9)] == [55.4, 33.6, 20.8]
    assert share(llava(5120, 40, 13824, 40), 2, 0.5) == 55.0
    by_method = vlm_macs(llava(), FastV(layer=3, keep=Keep(0.5)), 40, convention="fastv").total
    assert by_method == vlm_macs(llava(), [576] * 3 + [288] * 29, 40, convention="fastv").total


def test_divprune_s_tables_follow_fastv_s_convention():
    texts = [15, 15, 23, 83, 25, 113, 15, 39, 21, 91, 57]

    def mean(config, keep):
        return sum(vlm_macs(config, keep, text, convention="fastv").total for text in texts) / len(texts) / 1e12

    assert [round(mean(llava(), keep), 4) for keep in (None, 56)] == [3.2280, 0.5122]
    assert [round(mean(llava(5120, 40, 13824, 40), keep), 4) for keep in (None, 56)] == [6.2813, 1.0020]


def test_sparsevlm_s_convention_is_the_prefill_without_the_head():
    ours, theirs = (vlm_macs(llava(), 192, 64, convention=name) for name in ("mac", "sparsevlm"))
    assert theirs.total == pytest.approx(ours.prefill - 4096 * 32064, rel=1e-12)
    assert theirs.vision == theirs.decode == 0


def test_methods_say_how_many_tokens():
    config = llava()
    assert vlm_macs(config, PyramidDrop(), 64).image_tokens == (576,) * 8 + (288,) * 8 + (144,) * 8 + (72,) * 8
    at_tower = vlm_macs(config, Random(keep=Exactly(64), at="tower"), 64)
    assert at_tower == vlm_macs(config, 64, 64)
    tome = vlm_macs(config, ToMe(r=16), 64)
    assert tome.image_tokens[0] == 576 - 23 * 16  # the projector reads the output of block 22
    assert tome.vision < at_tower.vision and tome.reducer > 0
    assert vlm_macs(config, FastV(), 64).reducer == 640 * 4096  # one row of attention
    ahead = vlm_macs(config, PyramidDrop(layers=(8,), keep=(0.5,)), 64).reducer
    assert ahead == 640 * 4096 + 640 * 4096 * 3 * 4096  # and the queries and keys made for it


def test_ceiling_is_what_no_image_token_costs():
    config = llava()
    full, floor = vlm_macs(config, None, 64), vlm_macs(config, 0, 64)
    assert vlm_ceiling(config, 64) == pytest.approx(1 - floor.total / full.total, abs=1e-12)
    assert 0.86 < vlm_ceiling(config, 64) < 0.87
    merging = vlm_ceiling(qwen(), 9, grid=(8, 8))
    full, floor = (vlm_macs(qwen(), keep, 9, grid=(8, 8)) for keep in (None, 0))
    assert merging == pytest.approx(1 - floor.total / full.total, abs=1e-12)


def test_grouped_keys_make_a_smaller_cache():
    assert vlm_macs(qwen(), None, 9, grid=(8, 8)).kv_bytes == 2 * 2 * 25 * 32 * 2
    assert vlm_macs(qwen(), None, 9, grid=(8, 8), dtype=torch.float32).kv_bytes == 2 * 2 * 25 * 32 * 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"keep": 577}, "577"),
        ({"keep": [1, 2]}, "32 blocks"),
        ({"keep": [64] * 31 + [65]}, "never more"),
        ({"keep": True}, "whole numbers"),
        ({"text": 0}, "text=0"),
        ({"convention": "macs"}, "convention"),
        ({"grid": (2, 2)}, "24 x 24"),
        ({"keep": ToMe(r=300)}, "288"),
        ({"keep": winnow.NormThreshold()}, "give the number"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(ValueError, match=message):
        vlm_macs(**({"config": llava(), "keep": 64, "text": 64} | words))


def test_unknown_models_are_refused():
    with pytest.raises(TypeError, match="LLaVA"):
        vlm_macs(transformers.LlamaConfig(), 64, 64)
    with pytest.raises(ValueError, match="multiples of 2"):
        vlm_macs(qwen(), 4, 64)
    with pytest.raises(TypeError, match="the closed form knows"):
        vlm_macs(transformers.PaliGemmaConfig(), 64, 64)


# ---- winnow measure --text


def run(capsys, monkeypatch, *words: str) -> tuple[int, str, str]:
    from winnow.cli import main

    monkeypatch.setattr("sys.argv", ["winnow", "measure", *words])
    with pytest.raises(SystemExit) as end:
        main()
    found = capsys.readouterr()
    return end.value.code, found.out, found.err


def test_measure_from_a_configuration_alone(tmp_path, capsys, monkeypatch):
    """No weights, nothing run: FastV's own convention and the ceiling line."""
    llava().save_pretrained(tmp_path)
    monkeypatch.setattr("winnow.cli._measure_vlm.count_vlm_macs", lambda *words, **more: None)  # counted above
    words = [f"hf:{tmp_path}", "--text", "40", "--batch", "0", "-m", "FastV(layer=3)", "--convention", "fastv"]
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0 and "56.9%" in out
    assert f"at most {vlm_ceiling(llava(), 40):.1%} here" in out
    code, out, _ = run(capsys, monkeypatch, *words, "--json")
    plain, fastv = json.loads(out)
    assert plain["prompt_tokens"] == 616 and fastv["image_tokens"] == [576] * 3 + [288] * 29


def test_measure_runs_and_keeps_rows(tmp_path, capsys, monkeypatch):
    from vlms import tiny

    from winnow.measure.vlm_time import per_token

    tiny().save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal folds the table
    words = [f"hf:{tmp_path / 'model'}", "--text", "6", "--batch", "2", "--pairs", "9", "--results", str(rows)]
    code, out, err = run(capsys, monkeypatch, *words, "-m", "FastV(layer=2)")
    assert code == 0, err
    assert "batch 2" in out and "can save at most" in out
    plain, fastv = read(rows)
    assert plain.macs.counted == pytest.approx(plain.macs.closed) and not plain.latency
    assert fastv.vlm.image_tokens == [16, 16, 8, 8] and fastv.macs.counted == pytest.approx(fastv.macs.closed)
    assert fastv.latency[0].batch == fastv.vlm.answer[0].batch == 2
    assert (
        fastv.vlm.answer[0].plain_ms > fastv.latency[0].plain_ms
        and min(per_token(fastv.latency[0], fastv.vlm.answer[0])) > 0
    )
    assert fastv.memory_mib > 0


def test_inputs_of_a_model_with_windows_run():
    from winnow.measure.vlm_time import answer, first_token, vlm_inputs

    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(qwen(pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()
    model.config.image_token_id = 150
    model.model.config.image_token_id = 150
    inputs = vlm_inputs(model, 2, 5, (4, 8))
    assert int((inputs["input_ids"] == 150).sum()) == 2 * 8
    with torch.no_grad():
        assert first_token(model, inputs)().logits.shape[:2] == (2, 1)
        assert answer(model, inputs, 3)().shape == (2, 13 + 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["timm:vit_tiny_patch16_224", "--text", "5"], "hf:ID_OR_PATH"), (["hf:/nowhere", "--text", "5"], "nowhere")],
)  # fmt: skip
def test_measure_refuses_in_one_line(words, message, capsys, monkeypatch):
    code, _, err = run(capsys, monkeypatch, *words)
    assert code == 2 and message in err and len(err.splitlines()) == 1
