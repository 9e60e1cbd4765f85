"""Train the small LLaVA that ships with Winnow, `hf:scenes`, from the ViT that ships, on the questions about scenes.

Winnow's own. `python -m winnow.recipes.scenes_vlm --out src/winnow/backbones/llava_scenes.hf`: about 6 minutes on 1 core.
First the tower (scenes_tower.py), which then stays as it is. Then, as in LLaVA, the projector alone: what a patch shows
is named by the words' own embeddings. Then projector and language model on dialogues of eight questions, at first on the
40 patches that most likely show objects, where a noun may also answer by itself: without these crutches a like network
was still near chance after 150 steps (docs/log.md). At last on all patches, as it is used. What ships was made in this
order by a first form of this file, whose tower began with vit_scenes after its first 1,200 steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones.llava_scenes import WORDS, llava_scenes, save, words
from ..backbones.vit_scenes import vit_scenes
from ..data.scenes import COLOURS, SHAPES
from ..parts.choose import top
from ..parts.combine import take
from .scenes_tower import NOTHING, Drawn, Tower, accuracy, draw, fit

IGNORE = -100
LOUD = 20.0
"""Fresh embeddings are made so many times larger, so that a word is not drowned by what the first blocks add to it."""
SHAPE_IDS, COLOUR_IDS = (torch.tensor([WORDS.index(word) for word in known]) for known in (SHAPES, COLOURS))
END = WORDS.index("</s>")
QUESTION = [WORDS.index(word) for word in "USER what colour is the".split()]
ASK = [WORDS.index(word) for word in "? ASSISTANT".split()]


class Scenes:
    """What the frozen tower sees of scenes: features [n, P, C] in half precision, how likely each patch shows an object."""

    def __init__(self, module: Tower, data: Drawn) -> None:
        self.colours, self.patches = data.colours, data.patches
        found, empty = [], []
        with torch.inference_mode():
            for images in data.images.split(50):
                states = module.eval().states(images)
                found.append(states[module.layer][:, 1:].half())
                empty.append(module.dense(states[module.layer][:, 1:]).softmax(-1)[..., NOTHING])
        self.features, self.shown = torch.cat(found).clone(), 1 - torch.cat(empty)

    def pick(self, at: Tensor, most: int | None) -> Tensor:
        """[B, N, C] of scenes `at`: all patches, or the `most` that most likely show objects."""
        x = self.features[at].float()
        return x if most is None else take(x, top(self.shown[at], most))


def dialogue(colours: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and labels [B, L] of eight questions each, in an order of its own, behind `<s> USER` and the image."""
    batch, shapes = colours.shape
    order = torch.stack([torch.randperm(shapes) for _ in range(batch)])
    fixed = lambda ids: torch.tensor(ids).expand(batch, shapes, -1)  # noqa: E731
    noun, answer = SHAPE_IDS[order][..., None], COLOUR_IDS[colours.gather(1, order)][..., None]
    asked = torch.cat([fixed(QUESTION), noun, fixed(ASK)], 2)
    said = torch.cat([answer, fixed([END])], 2)
    ids = torch.cat([asked, said], 2).flatten(1)[:, 1:]  # the first USER stands in front of the image
    labels = torch.cat([torch.full_like(asked, IGNORE), said], 2).flatten(1)[:, 1:]
    return ids, labels


def embedded(model: Any, features: Tensor, ids: Tensor) -> Tensor:
    """[B, 2 + N + L, D] what the language model reads."""
    words_of = model.model.language_model.embed_tokens
    front = torch.tensor([[WORDS.index("<s>"), WORDS.index("USER")]]).expand(len(ids), -1)
    return torch.cat([words_of(front), model.model.multi_modal_projector(features), words_of(ids)], 1)


def align(model: Any, seen: Scenes, steps: int, batch: int = 32, rate: float = 3e-3) -> None:
    """The projector learns to give a patch of an object the embeddings of its shape's and its colour's word."""
    table, projector = model.model.language_model.embed_tokens.weight, model.model.multi_modal_projector
    with torch.no_grad():
        table.mul_(LOUD)
    optimizer = torch.optim.AdamW([*projector.parameters(), table], lr=rate)
    for _ in range(steps):
        at = torch.randint(len(seen.features), (batch,))
        shown = seen.patches[at] < NOTHING
        classes = seen.patches[at][shown]
        wide = table.shape[1]
        near = F.layer_norm(projector(seen.pick(at, None)[shown]), (wide,)) @ F.layer_norm(table, (wide,)).T / wide**0.5
        shape, colour = classes // len(COLOURS), classes % len(COLOURS)
        loss = F.cross_entropy(near[:, SHAPE_IDS], shape) + F.cross_entropy(near[:, COLOUR_IDS], colour)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def talk(model: Any, seen: Scenes, steps: int, batch: int, rate: float, most: int | None, nouns: float = 0.0) -> None:
    """`steps` of AdamW on dialogues; for the first `nouns` of them a noun is also asked for its answer."""
    learned = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    optimizer = torch.optim.AdamW(learned, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    start = time.monotonic()
    for step in range(steps):
        at = torch.randint(len(seen.features), (batch,))
        ids, labels = dialogue(seen.colours[at])
        state = model.model.language_model(inputs_embeds=embedded(model, seen.pick(at, most), ids)).last_hidden_state
        logits = model.lm_head(state[:, -ids.shape[1] :])
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        if step < nouns * steps:
            ahead = torch.where(torch.isin(ids, SHAPE_IDS)[:, :-3], ids[:, 3:], IGNORE)  # noun ? ASSISTANT colour
            loss = loss + F.cross_entropy(logits[:, :-3].flatten(0, 1), ahead.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        plan.step()
        if step % 20 == 0 or step == steps - 1:
            right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[torch.isin(labels[:, 1:], COLOUR_IDS)].float().mean()
            print(f"{time.monotonic() - start:5.0f} s  step {step}  loss {loss:.3f}  right {right:.3f}", flush=True)


@torch.inference_mode()
def right(model: Any, seen: Scenes) -> float:
    """Share of scenes of which one question alone is answered right, another one of scene to scene."""
    found = []
    for at in torch.arange(len(seen.features)).split(50):
        shape = at % len(SHAPES)
        asked = torch.tensor([QUESTION[1:]]).expand(len(at), -1)
        ids = torch.cat([asked, SHAPE_IDS[shape][:, None], torch.tensor([ASK]).expand(len(at), -1)], 1)
        state = model.model.language_model(inputs_embeds=embedded(model, seen.pick(at, None), ids)).last_hidden_state
        found.append(model.lm_head(state[:, -1]).argmax(-1) == COLOUR_IDS[seen.colours[at, shape]])
    return float(torch.cat(found).float().mean())


def stages(wish: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """(what was done, the model) after each part."""
    torch.manual_seed(0)
    model = llava_scenes(vit_scenes(pretrained=True))
    tower = model.model.vision_tower
    side = tower.config.image_size // tower.config.patch_size
    data, unseen = draw("train", wish.scenes, (side, side)), draw("test", 500, (side, side))
    module = Tower(tower, model.config.vision_feature_layer)
    fit(module, data, (side, side), wish.tower, wish.batch, 1e-3)
    patches, colours = accuracy(module, unseen)
    yield f"tower: {patches:.3f} of the patches of objects, {colours:.3f} of the class token's colours", model
    seen, test = (Scenes(module, one) for one in (data, unseen))
    align(model, seen, wish.align)
    talk(model.train(), seen, wish.few, wish.batch, 2e-3, wish.most, nouns=0.7)
    yield f"{wish.most} patches: {right(model.eval(), test):.3f} of 500 unseen scenes with all of them", model
    talk(model.train(), seen, wish.all, wish.batch, 1e-3, None)
    yield f"all patches: {right(model.eval(), test):.3f} of 500 unseen scenes", model


def main() -> None:
    """Train, evaluate, save after each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tower", type=int, default=350, help="steps of the tower")
    parser.add_argument("--align", type=int, default=200, help="steps of the projector alone")
    parser.add_argument("--few", type=int, default=200, help="steps on a part of the patches")
    parser.add_argument("--most", type=int, default=40, help="how many that part is")
    parser.add_argument("--all", type=int, default=100, help="steps on all patches")
    for said, model in stages(parser.parse_args()):
        print(said, flush=True)
        save(model, words(), parser.parse_args().out)


if __name__ == "__main__":
    main()
