"""Methods at the tower and in the language model: reference outputs, naive oracles, counts, costs, what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import reference
from vlms import prompts, tiny

import winnow
from winnow import CDPruner, DivPrune, Exactly, FastV, Keep, PyramidDrop, Random, SparseVLM, ToMe, VisionZip, VisPruner
from winnow.measure import count_macs, vlm_macs
from winnow.parts.cluster import density_peaks
from winnow.parts.diverse import determinantal, distinct, farthest, likeness
from winnow.reducer import Signals
from winnow.tokens import Ledger, Tokens


def at_tower(method, x, **signals):
    """What the method makes of features [B, N, C]."""
    reducer = method.build(1, x.shape[-1], 4, x.shape[1], 0)
    return reducer(Tokens(x, Ledger.start(*x.shape[:2])), Signals(**signals), 0)


# ---- reference outputs


def test_vision_zip_reference():
    case = reference("post_encoder")["visionzip_54_10"]
    hidden, keys = case["hidden"], case["metric"][:, None, 1:]
    out = at_tower(VisionZip(keep=Exactly(64)), hidden[:, 1:], cls_row=case["attn"][..., 1:], k=keys, cls=hidden[:, 0])
    emitted = torch.take_along_dim(out.x, out.order[..., None], 1)
    torch.testing.assert_close(emitted, case["out"], atol=2e-6, rtol=1e-5)
    chosen = case["all_indices"].sort(1).values[:, 1:] - 1  # without the class token
    places = out.ledger.owner.gather(1, chosen)
    assert torch.equal(places.sort(1).values, out.order[:, 1:54])


def test_div_prune_reference():
    case = reference("post_encoder")["divprune_64"]
    assert torch.equal(farthest(1 - likeness(case["x"][None]), 64)[0], case["idx"])
    out = at_tower(DivPrune(keep=Exactly(64)), case["x"][None])
    assert torch.equal(out.x[0], case["x"][case["idx"].sort().values])


def test_vis_pruner_reference():
    case = reference("post_encoder")["vispruner_64_0.5"]
    out = at_tower(VisPruner(keep=Exactly(64)), case["f"], cls_row=case["attn"])
    assert torch.equal(out.ledger.owner >= 0, case["mask"])


def test_cd_pruner_reference(question):
    case = reference("post_encoder")["cdpruner_64"]
    text, image = F.normalize(case["txt"], dim=-1), case["img"]
    question.clip.visual_projection = torch.nn.Identity()
    question.clip.vision_model.post_layernorm = torch.nn.Identity()
    relevance = question.relevance(image, text.mean(0, keepdim=True))
    kernel = relevance[:, :, None] * likeness(case["proj"]) * relevance[:, None]
    kept = torch.zeros(576, dtype=torch.bool).index_fill(0, determinantal(kernel, 64)[0], True)
    assert torch.equal(kept, case["mask"][0])


def test_sparse_vlm_reference():
    case = reference("post_encoder")["sparsevlm_score"]
    row = case["attn_mean"][:, case["text_idx"]].mean(1)[:, None]  # the mean over heads is taken in the recorded rows
    method = SparseVLM(layers=(3,), keep=Exactly(int(case["mask"].sum())), recycle=False)
    out = method.build(4, 8, 1, 576, 0)(Tokens(torch.randn(1, 576, 8), Ledger.start(1, 576)), Signals(text_row=row), 3)
    assert torch.equal(out.ledger.owner >= 0, case["mask"])


# ---- naive oracles, one image and one pick at a time


@pytest.mark.parametrize(("n", "m"), [(17, 5), (9, 9), (2, 1)])
def test_farthest(n, m):
    x = torch.randn(3, n, 6)
    for row, mine in zip(x, farthest(1 - likeness(x), m)):
        far = lambda i, j, row=row: 1 - float(F.cosine_similarity(row[i], row[j], dim=0))  # noqa: E731
        left = set(range(n))
        picked = [max(left, key=lambda i: min(far(i, j) for j in range(n) if j != i))]
        while len(picked) < m:
            picked.append(max(left - set(picked), key=lambda i: min(far(i, j) for j in picked)))
        assert mine.tolist() == picked


def test_farthest_of_identical_tokens_are_different_ones():
    picked = farthest(1 - likeness(torch.ones(2, 12, 4)), 7)
    assert all(len(set(row)) == 7 for row in picked.tolist())


def test_determinantal():
    x = torch.randn(3, 12, 16, dtype=torch.float64)
    kernel = x @ x.transpose(1, 2)
    for matrix, mine in zip(kernel, determinantal(kernel, 6).tolist()):
        picked: list[int] = []
        for _ in range(6):
            left = [i for i in range(12) if i not in picked]
            picked.append(max(left, key=lambda i: float(torch.det(matrix[[*picked, i]][:, [*picked, i]]))))
        assert mine == picked


def test_determinantal_beyond_the_rank_picks_no_token_twice():
    x = torch.randn(2, 40, 4)
    assert all(len(set(row)) == 30 for row in determinantal(x @ x.transpose(1, 2), 30).tolist())


@pytest.mark.parametrize(("n", "m"), [(40, 21), (41, 6), (30, 2)])
def test_distinct(n, m):
    x = torch.randn(2, n, 5)
    alike, order = likeness(x), torch.stack([torch.randperm(n), torch.randperm(n)])
    for matrix, start, mine in zip(alike, order, distinct(alike, order, m)):
        left = start.tolist()
        while len(left) > m:
            even, odd = left[::2], left[1::2]
            best = {i: max(float(matrix[i, j]) for j in odd) for i in even}
            even = sorted(even, key=lambda i: -best[i])[min(8, len(left) - m, len(odd)) :]
            left = even + odd
        assert mine.tolist() == left


def test_density_peaks():
    x = torch.randn(2, 20, 3)
    for row, mine in zip(x, density_peaks(x, 4)):
        d = torch.cdist(row, row) / 3**0.5
        density = [math.exp(-float(d[i].topk(4, largest=False).values.square().mean())) for i in range(20)]
        apart = [
            min((float(d[i, j]) for j in range(20) if density[j] > density[i]), default=float(d.max()))
            for i in range(20)
        ]
        centres = sorted(range(20), key=lambda i: -density[i] * apart[i])[:4]
        wanted = [min(range(4), key=lambda c: float(d[i, centres[c]])) for i in range(20)]
        groups = {tuple(i for i in range(20) if wanted[i] == c) for c in range(4)}
        assert {tuple((mine == c).nonzero()[:, 0].tolist()) for c in range(4)} == groups


def test_density_peaks_of_identical_tokens_use_every_cluster():
    assert set(density_peaks(torch.ones(1, 9, 2), 4)[0].tolist()) == {0, 1, 2, 3}


def test_vision_zip_sums():
    x, keys, row, cls = torch.randn(2, 20, 6), torch.randn(2, 3, 20, 4), torch.rand(2, 3, 20), torch.randn(2, 6)
    out = at_tower(VisionZip(keep=Exactly(9), contextual=3), x, k=keys, cls_row=row, cls=cls)
    unit = F.normalize(keys.mean(1), dim=-1)
    for b in range(2):
        top = sorted(row[b].mean(0).topk(5).indices.tolist())
        rest = [i for i in range(20) if i not in top]
        targets = rest[::5][:3]
        joins = {t: [] for t in targets}
        for i in rest:
            if i not in targets:
                joins[max(targets, key=lambda t: float(unit[b, i] @ unit[b, t]))].append(i)
        tokens = {i: x[b, i] for i in top}  # by the first patch each holds
        tokens |= {min(t, *found, t): x[b, t] + (x[b, found].mean(0) if found else 0) for t, found in joins.items()}
        wanted = torch.stack([cls[b], *(tokens[i] for i in sorted(tokens))])
        torch.testing.assert_close(out.x[b], wanted, atol=1e-5, rtol=1e-5)
        assert out.ledger.size()[b].tolist()[0] == 0 and int(out.ledger.size()[b].sum()) == 20


def test_sparse_vlm_recycles():
    x, row = torch.randn(2, 40, 6), torch.rand(2, 3, 40)
    method = SparseVLM(layers=(1,), keep=Exactly(20))
    out = method.build(4, 6, 1, 40, 0)(Tokens(x, Ledger.start(2, 40)), Signals(text_row=row), 1)
    assert method.recycled(20) == (7, 1) and out.n == 21 == method.count(40, 1, 40)
    for b in range(2):
        rank = row[b].mean(0).argsort(descending=True).tolist()
        again = sorted(rank[20:27])
        tokens = {i: x[b, i] for i in rank[:20]} | {again[0]: x[b, again].mean(0)}
        torch.testing.assert_close(out.x[b], torch.stack([tokens[i] for i in sorted(tokens)]))
        assert [i for i in range(40) if out.ledger.owner[b, i] < 0] == sorted(rank[27:])


def test_sparse_vlm_s_raters():
    x = torch.randn(2, 12, 5)
    image, text = torch.zeros(2, 12, dtype=torch.bool), torch.ones(2, 12, dtype=torch.bool)
    image[:, 2:6] = True
    text[:, 2:6] = False
    text[1, 0] = False  # padding
    mine = SparseVLM().build(20, 5, 1, None, 0).raters(x, image, text)
    for b in range(2):
        share = (x[b, 2:6] @ x[b, 6:].T).softmax(1).mean(0)
        assert mine[b].nonzero()[:, 0].tolist() == [6 + i for i in range(6) if share[i] > share.mean()]


# ---- counts and settings


def test_counts_of_the_papers():
    assert (
        VisionZip().count(576, 0)
        == DivPrune().count(576, 0)
        == CDPruner().count(576, 0)
        == VisPruner().count(576, 0)
        == 64
    )
    parts = [VisionZip(keep=Exactly(m)).build(1, 8, 1, 576, 0)._parts(m) for m in (64, 128, 192)]
    assert parts == [(10, 1), (20, 1), (30, 1)]
    method, n, counts = SparseVLM(), 576, []
    for layer in method.layers:
        n = method.count(n, layer, 576)
        counts.append(n)
    assert counts == [300 + 9, 200 + 4, 110 + 3]
    plain = SparseVLM(keep=(Exactly(66), Exactly(30), Exactly(17)), recycle=False)
    assert [plain.count(576, layer, 576) for layer in plain.layers] == [66, 30, 17]


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("VisionZip(contextual=0)", "contextual"),
        ("VisionZip(keep=(Exactly(3), Exactly(2)))", "2 values|one amount"),
        ("VisPruner(important=1.5)", "from 0 to 1"),
        ('VisPruner(attention="text")', "attention"),
        ("SparseVLM(layers=(0,), keep=Exactly(3))", "block 1"),
        ("DivPrune(keep=0.5)", "Keep"),
    ],
)
def test_settings_that_cannot_be(spelling, message):
    with pytest.raises((ValueError, TypeError), match=message):
        winnow.parse(spelling)


def test_more_contextual_tokens_than_tokens():
    with pytest.raises(ValueError, match="at most 4"):
        winnow.reduce(tiny(), VisionZip(keep=Exactly(4), contextual=5))


# ---- on a model


METHODS = [
    VisionZip(keep=Exactly(6), contextual=2),
    DivPrune(keep=Exactly(5)),
    CDPruner(keep=Exactly(5)),
    VisPruner(keep=Exactly(5)),
    SparseVLM(layers=(1, 2), keep=(Exactly(9), Exactly(4))),
]


def kept_of(run):
    return [int(n) for n in run.ledger.counts()]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_generate_and_neighbours(method):
    """Sequences start with the caller's ids; alone or beside a neighbour, a sample gives the same logits."""
    model, both = tiny(), prompts("llava", (1, 1))
    winnow.reduce(model, method)
    with torch.no_grad():
        out = model.generate(
            **both, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        assert torch.equal(out.sequences[:, : both["input_ids"].shape[1]], both["input_ids"])
        for b in range(2):
            alone = {name: value[b : b + 1] for name, value in both.items()}
            one = model.generate(
                **alone, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            torch.testing.assert_close(one.logits[0][0], out.logits[0][b], atol=1e-4, rtol=1e-4)
            assert torch.equal(one.sequences[0], out.sequences[b])
    winnow.restore(model)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("method", [DivPrune(keep=Exactly(16)), CDPruner(keep=Keep(1.0)), VisPruner(keep=Exactly(16)),
                                    SparseVLM(layers=(1, 2), keep=Keep(1.0))], ids=repr)  # fmt: skip
def test_keeping_all_changes_nothing(method):
    model, given = tiny(), prompts("llava", (1, 2))
    with torch.no_grad():
        plain = model(**given).logits
        with winnow.reduced(model, method):
            assert torch.equal(model(**given).logits, plain)


def test_div_prune_acts_on_what_is_projected():
    model, given = tiny(), prompts("llava", (1,))
    with torch.no_grad():
        features = model.model.get_image_features(given["pixel_values"]).pooler_output[0]
        with winnow.reduced(model, DivPrune(keep=Exactly(5))), winnow.watch(model) as run:
            model(**given)
    wanted = farthest(1 - likeness(features[None]), 5)[0].sort().values
    assert (run.ledger.owner[0] >= 0).nonzero()[:, 0].tolist() == wanted.tolist()


COSTED = [*METHODS[:4], FastV(layer=2, keep=Exactly(7)), PyramidDrop(layers=(1, 2), keep=(0.5, 0.25)),
          Random(keep=Exactly(5), at="tower"), ToMe(r=2)]  # fmt: skip


@pytest.mark.parametrize("method", COSTED, ids=repr)
def test_a_model_that_runs_costs_what_the_closed_form_says(method):
    model, given = tiny(), prompts("llava", (1,))
    text = given["input_ids"].shape[1] - 16
    said = vlm_macs(model.config, method, text)
    winnow.reduce(model, method)
    counted = count_macs(model, {**given, "logits_to_keep": 1})
    assert counted == pytest.approx(said.total, rel=1e-9)


# ---- CDPruner's question


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP of the tiny tower's width, with a tokenizer that knows letters."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(97, 123)]
    pieces = [*letters, *(f"{one}</w>" for one in letters), "?</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    size = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 16, "vocab_size": len(pieces), "max_position_embeddings": 12,
                     "eos_token_id": len(pieces) - 1, **size},
        vision_config={"hidden_size": 32, "image_size": 32, "patch_size": 8, **size}, projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def question(clip):
    from winnow._question import Question

    return Question(clip, 32)


def test_a_question_in_pieces(question):
    """Longer than the text tower reads: the mean of its pieces, each a unit vector."""
    long, short = "what is on the table?", "a cat"
    both = question.embed([long, short])
    ids = question.tokenizer(long, return_tensors="pt").input_ids
    assert ids.shape[1] > 12
    pieces = []
    for piece in ids[0].split(12):
        padded = F.pad(piece, (0, 12 - len(piece)))[None]
        real = (torch.arange(12) < len(piece)).long()[None]
        pieces.append(F.normalize(question.clip.get_text_features(padded, real).pooler_output, dim=-1))
    torch.testing.assert_close(both[0], torch.cat(pieces).mean(0))
    torch.testing.assert_close(both[1], question.embed([short])[0])


def test_relevance_is_that_of_each_image(question):
    features, asked = torch.randn(3, 7, 32), torch.randn(3, 8)
    found = question.relevance(features, asked)
    torch.testing.assert_close(found[1:2], question.relevance(features[1:2], asked[1:2]))
    assert found.amin() > 0
    seen = question.clip.visual_projection(question.clip.vision_model.post_layernorm(features))
    cosine = F.cosine_similarity(seen, asked[:, None], dim=-1)
    assert torch.equal(found.argsort(1), cosine.argsort(1, descending=True))


def test_cd_pruner_asks(clip):
    model, given = tiny(), prompts("llava", (1, 1))
    winnow.reduce(model, CDPruner(keep=Exactly(5), clip=clip))
    reducer = winnow.reducer_of(model)
    assert not any("clip" in name for name in model.state_dict())
    with torch.no_grad(), winnow.watch(model) as run:
        with pytest.raises(ValueError, match="reducer_of"):
            model(**given)
        kept = []
        for questions in (["a cat", "dogs"], ["dogs"], "dogs"):
            reducer.ask(questions)
            model.generate(**given, max_new_tokens=2, num_beams=2, do_sample=False)
            kept.append(run.ledger.owner >= 0)
        reducer.ask(["a", "b", "c"])
        with pytest.raises(ValueError, match="3 questions"):
            model(**given)
    assert torch.equal(kept[0][1], kept[1][1]) and torch.equal(kept[1], kept[2])
    assert not torch.equal(kept[0][0], kept[1][0])
    with pytest.raises(ValueError, match="diversity alone"):
        CDPruner().build(1, 32, 2, 16, 0).ask(["a cat"])


def test_clip_models_that_do_not_fit(clip, tmp_path):
    with pytest.raises(ValueError, match="no CLIP model"):
        CDPruner(clip=str(tmp_path)).build(1, 32, 2, 16, 0)
    with pytest.raises(ValueError, match="sees 32 channels, the vision tower has 48"):
        CDPruner(clip=clip).build(1, 48, 2, 16, 0)
