"""AdaptiveKeep: document 004's parts, budgets, its author's eight defects set right, and AdaLLaVA's choices to the bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from vlms import IMAGE, only, prompts, tiny

import winnow
from winnow import (
    AdaptiveKeep,
    BudgetEmbedding,
    Exactly,
    Keep,
    Random,
    VisionEncoderWithBudgetToken,
    VisionTokenController,
)
from winnow.checks.case import ready
from winnow.compare_vlm import at_budgets
from winnow.measure import count_macs, vlm_macs
from winnow.parts.asking import Question
from winnow.parts.budget import sinusoid, tokens_of
from winnow.parts.choose import (
    gumbel,
    masked_gumbel_softmax,
    masked_gumbel_softmax_topk,
    n_times_gumbel_softmax,
    n_times_gumbel_softmax_head_version,
)
from winnow.parts.diverse import OWN, likeness, unlike

N = 16
"""Patches of the tiny model."""
VALUES = [
    AdaptiveKeep(),
    AdaptiveKeep(fuse="after"),
    AdaptiveKeep(read="both"),
    AdaptiveKeep(read="both", place="first", head="dot"),
    AdaptiveKeep(position="borrowed", head="index"),
    AdaptiveKeep(fuse="after", join="concat", head="dot"),
    AdaptiveKeep(fuse="after", text=True),
    AdaptiveKeep(text=True, head="dot"),
    AdaptiveKeep(train="mask"),
    AdaptiveKeep(fuse="after", train="zero", cls=False),
    AdaptiveKeep(select="sequential"),
    AdaptiveKeep(fuse="after", cls=True),
    AdaptiveKeep(select="diverse", head="dot"),
    AdaptiveKeep(fuse="after", select="diverse"),
    AdaptiveKeep.seed004(),
]
KINDS = [AdaptiveKeep(), AdaptiveKeep(fuse="after", text=True), AdaptiveKeep.seed004()]


def made(method: AdaptiveKeep, **words: Any) -> Any:
    """A tiny LLaVA with this method, whose controller is not numb."""
    model = winnow.reduce(tiny(**words), method)
    ready(winnow.reducer_of(model))
    return model


def scores(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """[I, N] what patches are ranked by."""
    with winnow.watch(model) as run:
        logits(model, inputs)
    return run.scores[0]


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def kept(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """[I, N] bool: the patches that stay."""
    with winnow.watch(model) as run:
        logits(model, inputs)
    return run.ledger.owner >= 0


def taught(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same with labels on the last three tokens."""
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    return inputs | {"labels": labels}


# ---- document 004's parts


def test_budget_embedding_shapes():
    part = BudgetEmbedding(24)
    assert part(torch.rand(5)).shape == part(torch.rand(5, 1)).shape == (5, 24)
    assert BudgetEmbedding(8, num_freqs=4, hidden_dim=6)(torch.rand(2)).shape == (2, 8)
    with pytest.raises(ValueError, match=r"\[B\] or \[B, 1\]"):
        part(torch.rand(5, 2))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("head", ["patch", "dot", "index"])
def test_controller_shapes(head, training):
    part = VisionTokenController(12, 9, head=head).train(training)
    x = torch.randn(2, 11, 12)
    selected, mask = part(x, 4)
    assert selected.shape == (2, 5, 12) and mask.shape == (2, 9)
    assert torch.equal(mask.sum(1), torch.tensor([4.0, 4.0]))
    assert torch.equal(selected[:, 0], x[:, 0])
    index = mask.nonzero()[:, 1].view(2, 4) + 1
    assert torch.equal(selected[:, 1:], torch.take_along_dim(x, index[..., None], 1))
    selected, mask = part(x[:, :10], torch.tensor([0.25, 1.0]), torch.randn(2, 12))
    assert selected.shape == (2, 10, 12) and mask.sum(1).tolist() == [2, 9]
    assert not selected[0, 3:].any()
    assert VisionTokenController(12, 9, use_cls=False)(x, torch.tensor([3, 5]))[0].shape == (2, 5, 12)
    draws = torch.stack([part(x, torch.tensor(4))[1].detach().round() for _ in range(20)])
    assert bool((draws != draws[0]).any()) == training, "noise is drawn in training alone"


def test_encoder_with_budget_token_shape_and_layer():
    import transformers

    tower = tiny().model.vision_tower
    part = VisionEncoderWithBudgetToken(tower, BudgetEmbedding(32), 32)
    images = torch.randn(2, 3, 32, 32)
    out = part(images, torch.tensor([0.25, 1.0]))
    assert out.shape == (2, N + 2, 32)
    assert not torch.allclose(out[:, -1], part(images, torch.tensor([0.5, 0.5]))[:, -1], atol=1e-3)
    plain = tower(images, output_hidden_states=True)
    assert plain.hidden_states[-2].shape == (2, N + 1, 32), "the tower is as it was"
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    without = VisionEncoderWithBudgetToken(transformers.SiglipVisionModel(config), BudgetEmbedding(32), 32)
    with pytest.raises(ValueError, match="makes 16 tokens of 16 patches: a class token"):
        without(images, torch.tensor([0.25, 1.0]))


# ---- AdaLLaVA's choices


WEIGHTS = torch.arange(16.0)
"""What the recorded gradients are the gradients of: the sum of the outcome times these."""


def soft(logits, case):
    return masked_gumbel_softmax(logits, case["masks"], 1.0, False, True, case["gumbel"])


def hard(logits, case):
    return masked_gumbel_softmax(logits, case["masks"], 5.0, True, case["grad"] is not None, case["gumbel"])


def several(logits, case):
    noise = torch.stack(case["noise"]) if case["noise"] else None
    return n_times_gumbel_softmax(logits, len(case["noise"]), 5.0, True, True, noise)


def at_once(logits, case):
    return masked_gumbel_softmax_topk(logits, torch.zeros_like(logits), 6, 5.0, True, True, case["gumbel"])


@pytest.mark.parametrize(
    ("name", "choose"),
    [
        ("mgs_tau1_hardFalse_trainTrue", soft),
        ("mgs_tau5_hardTrue_trainTrue", hard),
        ("mgs_tau5_hardTrue_trainFalse", hard),
        ("ntimes_train_n0", several),
        ("ntimes_train_n4", several),
        ("topk6_trainTrue", at_once),
        ("ntimes_eval_n4", lambda logits, case: n_times_gumbel_softmax(logits, 4, 5.0, True, False)),
    ],
)
def test_choices_are_the_references(name, choose):
    case = reference("adallava")[name]
    logits = case["logits"].clone().requires_grad_()
    found = choose(logits, case)
    assert torch.equal(found, case["y"])
    if case.get("grad") is not None:
        (found * WEIGHTS).sum().backward()
        torch.testing.assert_close(logits.grad, case["grad"], atol=1e-7, rtol=1e-6)


def test_encoding_is_the_reference():
    case = reference("adallava")["latency_enc"]
    torch.testing.assert_close(sinusoid(case["q"], 128), case["enc"], atol=1e-6, rtol=0)


def test_head_version_buys_heads_and_groups_of_one_layer_at_a_time():
    logits = torch.randn(5, 8).requires_grad_()
    noise = gumbel(torch.rand(3, 40)), gumbel(torch.rand(3, 8))
    found = n_times_gumbel_softmax_head_version(logits, 3, 2, 5.0, True, noise)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(found[:, :4].sum(1), found[:, 4:].sum(1)), "as many groups as heads in every layer"
    assert float(found.detach().sum()) == 3 * 2 * 2
    (found * torch.randn(5, 8)).sum().backward()
    assert bool(logits.grad.any())


def test_noise_that_is_not_given_is_drawn_as_the_reference_draws_it():
    logits = torch.randn(7, requires_grad=True)
    torch.manual_seed(3)
    found = n_times_gumbel_softmax(logits, 3, tau=5.0)
    torch.manual_seed(3)
    noise = torch.stack([-torch.empty(7).exponential_().log() for _ in range(3)])
    assert torch.equal(found, n_times_gumbel_softmax(logits, 3, tau=5.0, noise=noise)) and found.sum() == 3


def test_more_than_there_are_is_refused():
    """The reference counts one of them again and says nothing."""
    with pytest.raises(ValueError, match="6 of 4 cannot be chosen"):
        n_times_gumbel_softmax(torch.randn(4), 6, training=False)
    with pytest.raises(ValueError, match="6 of 4 cannot be chosen"):
        masked_gumbel_softmax_topk(torch.randn(4), torch.zeros(4), 6)


@given(st.integers(1, 12), st.data())
@settings(max_examples=25, deadline=None)
def test_choices_keep_exactly_k(n, data):
    """Of every row its own number, in one draw as in several, and without noise those of the highest logits."""
    k = torch.tensor(data.draw(st.lists(st.integers(1, n), min_size=2, max_size=2)))
    logits = torch.randn(2, n) * 4
    for select in ("topk", "sequential"):
        part = VisionTokenController(4, n, select=select).train()
        noise = torch.rand(int(k.max()), 2, n) if select == "sequential" else torch.rand(2, n)
        assert torch.equal(part.keep(logits, k, noise).sum(1), k.float())
    for row, mine, many in zip(logits, part.eval().keep(logits, k), k.tolist()):
        assert sorted(row.topk(many).indices.tolist()) == mine.nonzero()[:, 0].tolist()


# ---- budgets


@given(st.integers(1, 2000), st.data())
@settings(max_examples=60, deadline=None)
def test_counts_are_whole_numbers_as_asked(n, data):
    k = data.draw(st.integers(1, n))
    assert tokens_of(k, n) == tokens_of(k / n, n) == k
    assert tokens_of(torch.tensor([k / n], dtype=torch.float32), n).item() == k
    assert tokens_of(0, n) == 1 and tokens_of(n + 5, n) == n and tokens_of(1.0, n) == n


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (True, TypeError),
        ("8", TypeError),
        (torch.tensor(True), TypeError),
        (torch.tensor(-3), ValueError),
        (torch.tensor([True, False]), TypeError),
        (torch.tensor([0.3], dtype=torch.bfloat16), TypeError),
        (-1, ValueError),
        (0.0, ValueError),
        (1.5, ValueError),
        (torch.tensor([0.5, 1.5]), ValueError),
        (torch.tensor([4, -4]), ValueError),
    ],
    ids=str,
)
def test_what_is_no_budget(wrong, error):
    model = winnow.reduce(tiny(), AdaptiveKeep())
    with pytest.raises(error, match=r"budget|share"), winnow.budget(model, wrong):
        pass


def test_only_methods_that_take_a_budget_are_given_one():
    model = winnow.reduce(tiny(), Random(keep=Exactly(4), at="tower"))
    with pytest.raises(ValueError, match="AdaptiveKeep"), winnow.budget(model, 4):
        pass
    assert AdaptiveKeep().facts.budgeted and not Random().facts.budgeted


def test_budgets_nest_and_end():
    model, inputs = made(AdaptiveKeep(budget_max=0.75)), prompts("llava", (1, 1))
    assert kept(model, inputs).sum(1).tolist() == [12, 12]
    with winnow.budget(model, 5):
        assert kept(model, inputs).sum(1).tolist() == [5, 5]
        with winnow.budget(model, 0.25):
            assert kept(model, inputs).sum(1).tolist() == [4, 4]
        with winnow.budget(model, 0):
            assert kept(model, inputs).sum(1).tolist() == [1, 1]
        with winnow.budget(model, torch.tensor([3, 40])):
            assert kept(model, inputs).sum(1).tolist() == [3, 16]
        with winnow.budget(model, torch.tensor([0.5, 0.125])):
            assert kept(model, inputs).sum(1).tolist() == [8, 2]
        with pytest.raises(ValueError, match="3 budgets for 2 images"), winnow.budget(model, torch.tensor([3, 4, 5])):
            logits(model, inputs)
        assert kept(model, inputs).sum(1).tolist() == [5, 5]
    assert kept(model, inputs).sum(1).tolist() == [12, 12]


def test_class_token_is_one_more():
    model, inputs = made(AdaptiveKeep.seed004()), prompts("llava", (1, 1))
    for amount, counts in ((4, [5, 5]), (torch.tensor([2, 9]), [3, 10]), (16, [16, 16]), (0, [2, 2])):
        with winnow.budget(model, amount), winnow.watch(model) as run:
            logits(model, inputs)
        assert run.ledger.counts().tolist() == counts
        assert not (run.ledger.owner == 0).any(), "the class token, in front, holds no patch"


@pytest.mark.parametrize("method", VALUES, ids=repr)
def test_each_image_its_own_budget(method):
    """A sample's logits under its budget are the same alone and beside a neighbour with another."""
    model, both = made(method), prompts("llava", (1, 1))
    with winnow.budget(model, torch.tensor([3, 11])):
        together = logits(model, both)
    for b, amount in enumerate((3, 11)):
        with winnow.budget(model, amount):
            alone = logits(model, only(both, (1, 1), b))
        torch.testing.assert_close(together[b, -4:], alone[0, -4:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", KINDS, ids=repr)
def test_training_draws_budgets_per_sample_and_step(method):
    model, both = made(method).train(), taught(prompts("llava", (1, 1)))
    reducer = winnow.reducer_of(model)

    def counts(inputs, step):
        reducer.step = step
        with winnow.watch(model) as run, torch.no_grad():
            loss = model(**inputs).loss
        return run.ledger.counts().tolist(), run.ledger.owner, loss

    found = [counts(both, step)[0] for step in range(8)]
    assert len({tuple(one) for one in found}) > 4, "steps draw anew"
    assert any(a != b for a, b in found), "and so do samples"
    assert found[3] == counts(both, 3)[0], "a step draws the same again"
    alone = [counts({k: v[b : b + 1] for k, v in both.items()}, 3) for b in range(2)]
    assert found[3] == [alone[0][0][0], alone[1][0][0]], "neighbours do not matter"
    with winnow.budget(model, 4):
        assert counts(both, 3)[0] == [4 + (method.cls is True)] * 2
    low, high = 3, 5
    model = made(AdaptiveKeep(budget_min=low, budget_max=high)).train()
    reducer = winnow.reducer_of(model)
    drawn = [n for step in range(40) for n in counts(both, step)[0]]
    assert set(drawn) == {3, 4, 5}


# ---- the eight defects of the author's code


@pytest.mark.parametrize("method", [AdaptiveKeep(), AdaptiveKeep(fuse="after", text=True)], ids=repr)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_1_the_layer_the_projector_was_trained_on(method, attention):
    """All kept: logits and generated tokens are the plain model's, to the bit; the author's read the last layer."""
    plain, model = tiny(attention=attention), made(method, attention=attention)
    inputs = prompts("llava", (1, 2, 0))
    with winnow.budget(model, 99):
        assert torch.equal(logits(model, inputs), logits(plain, inputs))
        assert torch.equal(model.generate(**inputs, max_new_tokens=5), plain.generate(**inputs, max_new_tokens=5))
    with winnow.budget(model, 6):
        assert not torch.equal(logits(model, inputs), logits(plain, inputs))


def test_1_both_ways_is_another_network():
    """Patches that read the budget token are no longer the plain model's, and they depend on the budget."""
    inputs = prompts("llava", (1,))
    found = []
    for amount in (16, 20):
        model = made(AdaptiveKeep(read="both", budget_max=amount))
        found.append(logits(model, inputs))
    assert torch.equal(*found) and not torch.allclose(found[0], logits(tiny(), inputs), atol=1e-3)


@pytest.mark.parametrize("head", ["patch", "dot"])
def test_2_any_grid(head):
    """A controller made on 4 x 4 patches ranks 6 x 6; one weight per place cannot, and says so."""
    part = VisionTokenController(12, 16, head=head).eval()
    selected, mask = part(torch.randn(1, 38, 12), 0.25)
    assert selected.shape == (1, 10, 12) and int(mask.sum()) == 9
    with pytest.raises(ValueError, match='head="patch" or "dot"'):
        VisionTokenController(12, 16, head="index")(torch.randn(1, 38, 12), 0.25)


@pytest.mark.parametrize("train", ["gather", "mask", "zero"])
def test_3_training_and_evaluation_see_the_same(train):
    """Under one budget and without noise a training forward is the evaluation's; left as zeros, it is not."""
    model, inputs = made(AdaptiveKeep(train=train, fuse="after")), taught(prompts("llava", (1, 1)))
    reducer = winnow.reducer_of(model)
    with winnow.budget(model, 6), torch.no_grad():
        wanted = model(**inputs).loss
        reducer.vision_token_controller.keep = lambda logits, k, noise=None, patches=None: type(
            reducer.vision_token_controller
        ).keep(reducer.vision_token_controller, logits, k, torch.full_like(logits, 0.5))  # the same for all: none
        model.train()
        found = model(**inputs).loss
    assert torch.allclose(found, wanted, atol=1e-5) == (train != "zero")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4_no_count_is_off_by_one(dtype):
    """Every number from 1 to N, in a half-precision model too, as tokens and as a share."""
    model, inputs = made(AdaptiveKeep(), dtype=dtype), prompts("llava", (1,), dtype)
    for k in range(1, N + 1):
        for amount in (k, k / N, torch.tensor([k / N])):
            with winnow.budget(model, amount):
                assert int(kept(model, inputs).sum()) == k


def test_5_each_sample_its_own_patches():
    model, inputs = made(AdaptiveKeep()), prompts("llava", (1, 1))
    with winnow.budget(model, 5):
        together = kept(model, inputs)
        alone = [kept(model, only(inputs, (1, 1), b))[0] for b in range(2)]
    assert torch.equal(together, torch.stack(alone)) and not torch.equal(*alone)


@pytest.mark.parametrize("method", KINDS, ids=repr)
def test_6_images_are_encoded_once(method):
    model, inputs = made(method), prompts("llava", (1, 2))
    calls = []
    model.model.vision_tower.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model.generate(**inputs, max_new_tokens=4)
    assert len(calls) == 1


@pytest.mark.parametrize("method", KINDS, ids=repr)
def test_7_sequences_start_with_the_caller_s(method):
    """A harness that cuts off the prompt by its length gets the whole answer, and decoding follows the shortened one."""
    model, inputs = made(method), prompts("llava", (1, 1))
    with winnow.budget(model, torch.tensor([4, 9])):
        out = model.generate(**inputs, max_new_tokens=6)
        steps = inputs
        for _ in range(3):
            best = logits(model, steps)[:, -1].index_fill(1, torch.tensor([IMAGE]), float("-inf")).argmax(-1)
            more = {"input_ids": best, "attention_mask": torch.ones_like(best)}
            steps = steps | {name: torch.cat([steps[name], value[:, None]], 1) for name, value in more.items()}
    width = inputs["input_ids"].shape[1]
    assert out.shape == (2, width + 6) and torch.equal(out[:, :width], inputs["input_ids"])
    if not method.text:  # a question that grows by the answer is another question
        assert torch.equal(out[:, width : width + 3], steps["input_ids"][:, width:])


@pytest.mark.parametrize("method", VALUES, ids=repr)
def test_8_costs_are_counted(method):
    """Of one sample, class and budget token, question and controller included: what is counted is the closed form."""
    inputs = prompts("llava", (1,))
    text = int((inputs["input_ids"] != IMAGE).sum())
    for amount in (1, 6, N):
        model = winnow.reduce(tiny(), method.leaving(Exactly(amount)))
        closed = vlm_macs(model.config, winnow.reducer_of(model).method, text)
        assert closed.prompt_tokens == text + min(N, amount + (method.cls is True))
        assert count_macs(model, {**inputs, "logits_to_keep": 1}) == pytest.approx(closed.total, rel=1e-9)


def test_one_training_serves_every_budget():
    method = AdaptiveKeep(fuse="after", head="dot")
    few = method.leaving(Keep(0.125))
    assert few == AdaptiveKeep(0.125, 0.125, fuse="after", head="dot") and few.trained == method.trained == method
    assert AdaptiveKeep().trained != method
    found = at_budgets([method, few, Random(at="tower")], [1, 0.5, 4])
    assert found[:3] == [method.leaving(Keep(0.5)), method.leaving(Exactly(4)), few] and len(found) == 5
    assert at_budgets([AdaptiveKeep.seed004()], [0.5]) == [AdaptiveKeep.seed004(0.5, 0.5)], "they are training's bounds"


# ---- what is kept is unlike


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_unlike_is_greedy_in_the_determinant(seed, k):
    """Each pick is the one that makes the determinant of what is picked largest, found here by trying all."""
    generator = torch.Generator().manual_seed(seed)
    logits, alike = torch.randn(1, 7, generator=generator), likeness(torch.randn(1, 7, 5, generator=generator))
    weight = (logits[0].double() / 2).exp()
    kernel = weight[:, None] * ((1 - OWN) * alike[0].double() + OWN * torch.eye(7).double()) * weight
    picked: list[int] = []
    for _ in range(k):
        free = [i for i in range(7) if i not in picked]
        picked.append(max(free, key=lambda i: torch.linalg.det(kernel[[*picked, i]][:, [*picked, i]]).item()))
    assert unlike(logits, alike, k)[0].nonzero().flatten().tolist() == sorted(picked)


def test_unlike_without_likeness_is_the_highest_logits_and_a_twin_waits():
    logits = torch.tensor([[0.0, 3.0, 2.9, 1.0], [4.0, 3.0, 2.0, 1.0]])
    apart = torch.eye(4).expand(2, 4, 4)
    assert unlike(logits, apart, torch.tensor([2, 1])).tolist() == [[False, True, True, False], [True] + [False] * 3]
    twins = apart.clone()
    twins[0, 1, 2] = twins[0, 2, 1] = 1.0
    assert unlike(logits, twins, 2)[0].tolist() == [False, True, False, True]


def test_a_patch_that_shows_a_word_of_the_prompt_is_ranked_first():
    torch.manual_seed(0)
    question, words = Question(32), torch.randn(1, 5, 32)
    old = question.state_dict() | {"gain": torch.tensor(20.0)}  # as it was saved before it could be sharded
    question.load_state_dict(old)
    patches = torch.randn(1, 9, 32)
    patches[0, 4] = words[0, 2] * 3
    real = torch.ones(1, 5, dtype=torch.bool)
    assert question(patches, words, real, None).argmax() == 4
    real[0, 2] = False
    assert question(patches, words, real, None)[0, 4] < 9  # hidden, it is no word of the prompt
    assert question(patches, words[:, :0], real[:, :0], None).abs().max() == 0


# ---- learning


@pytest.mark.parametrize("method", VALUES, ids=repr)
def test_gradient_of_the_loss_reaches_every_weight(method):
    """Embedding, position, head: from the language model's loss alone; and the tower's and the model's own."""
    model, inputs = made(method).train(), taught(prompts("llava", (1, 1)))
    reducer = winnow.reducer_of(model)
    model(**inputs).loss.backward()
    none = [name for name, p in reducer.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert none == ([] if method.conditioned else none)
    assert bool(model.model.language_model.layers[0].mlp.up_proj.weight.grad.any())
    assert bool(next(model.model.vision_tower.parameters()).grad.any())


def test_frozen_model_gives_the_controller_the_same_gradient():
    grads = []
    for frozen in (False, True):
        model, inputs = made(AdaptiveKeep(text=True)).train(), taught(prompts("llava", (1, 1)))
        torch.manual_seed(0)
        reducer = winnow.reducer_of(model)
        if frozen:
            model.requires_grad_(False)
            reducer.requires_grad_(True)
        inputs["pixel_values"] = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        inputs["input_ids"][inputs["input_ids"] != IMAGE] = 5
        model(**inputs).loss.backward()
        grads.append([p.grad for p in reducer.parameters()])
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("learns", [False, True])
def test_gradients_run_through_the_tower_only_where_something_in_it_learns(learns):
    model = made(AdaptiveKeep()).train()
    model.model.vision_tower.requires_grad_(learns)
    seen = set()
    last = model.model.vision_tower.encoder.layers[model.config.vision_feature_layer].mlp
    last.register_forward_pre_hook(lambda _, given: seen.add((given[0].shape[1] > 1, given[0].requires_grad)))
    model(**prompts("llava", (1, 1)))
    assert seen == {(True, learns), (False, True)}, "patches, and the token"


@pytest.mark.parametrize("method", [AdaptiveKeep(), AdaptiveKeep.seed004()], ids=repr)
def test_checkpointing_changes_nothing(method):
    grads = []
    for checkpoint in (False, True):
        model = made(method).train()
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(**taught(prompts("llava", (1, 1)))).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_a_linear_layer_on_patch_and_budget_could_not_rank_anew():
    """Why the patch head has two layers: in the document's `logit_head` the budget adds the same to every patch."""
    patches, budgets = torch.randn(9, 12), torch.randn(2, 12)
    line = torch.nn.Linear(24, 1)
    order = [line(torch.cat([patches, one.expand(9, -1)], 1))[:, 0].argsort() for one in budgets]
    assert torch.equal(*order)
    for head in ("patch", "dot"):
        part = VisionTokenController(12, 9, head=head)
        order = [part.logits(patches[None], 5 * one[None])[0].argsort() for one in budgets]
        assert not torch.equal(*order)


def test_other_budgets_keep_others_and_other_questions_too():
    """What patches are ranked by depends on the budget, unless they are ranked alike; and on the question."""
    inputs = prompts("llava", (1,))
    for fuse in ("encoder", "after"):
        for conditioned in (True, False):
            model = made(AdaptiveKeep(fuse=fuse, conditioned=conditioned))
            with winnow.budget(model, 3):
                few = scores(model, inputs)
            with winnow.budget(model, 9):
                assert torch.equal(few, scores(model, inputs)) != conditioned
        asking, other = made(AdaptiveKeep(fuse=fuse, text=True)), copy.deepcopy(inputs)
        other["input_ids"][0, -4:] = torch.tensor([7, 8, 9, 10])
        assert not torch.equal(scores(asking, inputs), scores(asking, other))


def test_what_is_answered_is_not_asked():
    """In training the labels are no part of the question; nor is padding, nor the image's own places."""
    model, inputs = made(AdaptiveKeep(fuse="after", text=True)), taught(prompts("llava", (1,)))
    before = scores(model, inputs)
    inputs["input_ids"][:, -3:] = torch.tensor([20, 21, 22])
    assert torch.equal(before, scores(model, inputs))
    inputs["input_ids"][:, -4] = 23
    assert not torch.equal(before, scores(model, inputs))


def test_first_or_last_is_the_same_network():
    """Positions are added before, and attention does not count: only rounding differs."""
    inputs = prompts("llava", (1, 1))
    one, other = (
        logits(made(AdaptiveKeep(read="both", place=place, budget_max=6)), inputs) for place in ("last", "first")
    )
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


# ---- keeping it


@pytest.mark.parametrize("method", KINDS, ids=repr)
def test_saved_copied_and_restored(method, tmp_path):
    model, inputs = made(method), prompts("llava", (1, 1))
    model.train()
    model(**taught(inputs)).loss.backward()
    model.eval()
    winnow.save(model, tmp_path / "reducer.safetensors")
    fresh = winnow.load(tiny(), tmp_path / "reducer.safetensors")
    assert winnow.reducer_of(fresh).method == method
    with winnow.budget(model, 6), winnow.budget(fresh, 6):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4), fresh.generate(**inputs, max_new_tokens=4))
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin, inputs), logits(model, inputs))
    plain = tiny()
    plain.generate(**inputs, max_new_tokens=1)  # transformers hooks its towers at their first call
    before = {name: set(vars(part)) for name, part in plain.named_modules()}
    winnow.restore(model)
    assert {name: set(vars(part)) for name, part in model.named_modules()} == before
    assert torch.equal(logits(model, inputs), logits(tiny(), inputs))


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_other_families(family):
    """Tiles, and towers that merge patches: budgets hold per tile or image; a token in the tower needs a tower."""
    inputs = prompts(family, (1, 1))
    model = winnow.reduce(tiny(family), AdaptiveKeep(fuse="after", budget_max=3))
    ready(winnow.reducer_of(model))
    with winnow.watch(model) as run:
        logits(model, inputs)
    assert set(run.ledger.counts().tolist()) == {3}
    if family == "llava_next":
        model = winnow.reduce(tiny(family), AdaptiveKeep(budget_max=3))
        with winnow.watch(model) as run:
            logits(model, inputs)
        assert set(run.ledger.counts().tolist()) == {3}
    else:
        with pytest.raises(ValueError, match="a token of its own in the tower"):
            winnow.reduce(tiny(family), AdaptiveKeep())
        with pytest.raises(ValueError, match="several sizes"), winnow.budget(model, torch.tensor([2, 3])):
            logits(model, inputs)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("AdaptiveKeep(budget_min=0.5, budget_max=0.25)", "above budget_max"),
        ("AdaptiveKeep(budget_max=True)", "number of tokens"),
        ("AdaptiveKeep(fuse='before')", "'encoder', 'after'"),
        ("AdaptiveKeep(cls=1)", "True, False, 'host'"),
        ("AdaptiveKeep(tau=0)", "above 0"),
        ("AdaptiveKeep(cls=True, train='zero')", "gather"),
        ("AdaptiveKeep(place='first')", 'read="both"'),
    ],
)
def test_settings_that_cannot_be(spelling, message):
    with pytest.raises((ValueError, TypeError), match=message):
        winnow.parse(spelling)


def test_a_bound_in_tokens_above_one_in_shares():
    with pytest.raises(ValueError, match="lower budget is the larger"):
        winnow.reduce(tiny(), AdaptiveKeep(budget_min=9, budget_max=0.25))
