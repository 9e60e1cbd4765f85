"""An image's result depends on the image alone: not on its batch mates, not on the clock, not on the global generator.

Winnow's own; batch dependence is the commonest fault of the published codes (docs/log.md).
"""

from __future__ import annotations

from itertools import product

import torch

import winnow

from ..measure._evaluating import output_of
from .case import WIDTH, Case, close


def reducer_ignores_batch_mates(case: Case) -> None:
    """A reducer's answer for one image is the same alone and in a batch."""
    reducer = case.reducer()
    x = case.rand(3, 64, WIDTH) * torch.tensor([0.3, 1.0, 3.0]).view(3, 1, 1)
    together = case.step(reducer, case.tokens(x=x))
    for image in range(3):
        alone = case.step(reducer, case.tokens(x=x[image : image + 1]))
        ours, theirs = together.ledger.dense(together.x)[image], alone.ledger.dense(alone.x)[0]
        close(ours, theirs, 1e-5, f"image {image} alone and in a batch")


def model_ignores_batch_mates(case: Case) -> None:
    """The whole model's output for one image is the same alone and in a batch."""
    for cls, training in product(case.fits(), case.modes):
        # padded to the batch maximum itself: rounded up, batch mates would seldom change the width
        model, images = case.model(cls, "auto" if case.facts.static else winnow.Padded(1)), case.images()
        model.train(training)
        with torch.no_grad():
            together, alone = model(images), torch.cat([model(image[None]) for image in images])
        close(together, alone, 1e-5, "outputs alone and in a batch")


def evaluation_is_repeatable(case: Case) -> None:
    """Two forwards agree to the bit, and the global generator is where it was."""
    model, images = case.model(), case.images()
    before = torch.random.get_rng_state()
    with torch.no_grad():
        first, second = model(images), model(images)
    assert torch.equal(first, second), "two forwards of the same images differ"
    assert torch.equal(before, torch.random.get_rng_state()), "the global random generator was used"


def ways_agree(case: Case) -> None:
    """Static, masked and padded runs of one decision give the same output and the same losses."""
    for cls, training in product(case.fits(), case.modes):
        images, outputs, losses = case.images(), {}, {}
        for way in ("static", "masked", winnow.Padded(1), winnow.Padded(16)):
            if way == "static" and not case.facts.static:
                continue
            model = case.model(cls, way).train(training)
            with torch.no_grad():
                outputs[str(way)] = output_of(model(images))
            losses[str(way)] = torch.stack([*winnow.reducer_of(model).loss().values(), torch.tensor(0.0)])
        first = next(iter(outputs))
        for way, output in outputs.items():
            close(output, outputs[first], 2e-5, f"{way} against {first}")
            close(losses[way], losses[first], 2e-5, f"losses, {way} against {first}")


CHECKS = (reducer_ignores_batch_mates, model_ignores_batch_mates, evaluation_is_repeatable, ways_agree)
