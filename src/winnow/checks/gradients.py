"""Gradients reach what they should, and gradient checkpointing changes none of them.

Winnow's own.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import winnow

from .case import Case, close


def gradient_reaches_the_input(case: Case) -> None:
    """Every surviving patch gets a gradient through the reducer."""
    tokens = case.tokens()
    tokens.x.requires_grad_()
    out = case.step(case.reducer().train(), tokens)
    (out.x * torch.linspace(1, 2, out.x.shape[-1])).sum().backward()
    assert tokens.x.grad is not None, "no gradient at all"
    lost = (tokens.x.grad.abs().sum(-1) == 0) & (out.ledger.owner >= 0)
    assert not bool(lost.any()), f"{int(lost.sum())} surviving patches get no gradient"


def gradient_reaches_every_weight(case: Case) -> None:
    """Every learned weight gets a gradient from the task, and from the method's own losses where it has any."""
    model = case.model().train()
    reducer = winnow.reducer_of(model)
    for name, loss in {"task": lambda: model(case.images()).square().sum(), **_own_losses(case, model)}.items():
        reducer.zero_grad()
        loss().backward()
        missing = [n for n, p in reducer.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert not missing, f"{name} loss: no gradient for {missing[0]}"


def _own_losses(case: Case, model) -> dict:
    model(case.images())

    def again(name: str):
        def loss() -> Tensor:
            model(case.images())
            return winnow.reducer_of(model).loss()[name]

        return loss

    return {name: again(name) for name in winnow.reducer_of(model).loss()}


def checkpointing_changes_nothing(case: Case) -> None:
    """Gradients with and without gradient checkpointing are the same, those of the method's own losses included."""
    images, grads = case.images(), []
    for checkpoint in (False, True):
        model = case.model().train()
        model.set_grad_checkpointing(checkpoint)  # type: ignore[operator]
        task = model(images).square().sum()
        (task + sum(winnow.reducer_of(model).loss().values())).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]), "other parameters get gradients"
    for ours, theirs in zip(*grads):
        close(ours, theirs, 1e-5, "gradients with and without checkpointing")


def copies_after_training(case: Case) -> None:
    """After a training step a deep copy works, is its own, and gives the same output."""
    model, images = case.model().train(), case.images()
    task = model(images).square().sum()
    (task + sum(winnow.reducer_of(model).loss().values())).backward()
    twin = copy.deepcopy(model).eval()
    model.eval()
    with torch.no_grad():
        output = model(images)
        assert torch.equal(output, twin(images)), "the copy gives another output"
        for parameter in model.parameters():
            parameter.mul_(0.5)
        assert torch.equal(output, twin(images)), "the copy follows the weights of the original"
        for parameter in model.parameters():
            parameter.mul_(2.0)
        winnow.restore(twin)
        assert not hasattr(twin, "reducer"), "restoring the copy left its reducer"
        assert torch.equal(output, model(images)), "restoring the copy changed the original"


CHECKS = (
    gradient_reaches_the_input,
    gradient_reaches_every_weight,
    checkpointing_changes_nothing,
    copies_after_training,
)
