"""The built-in scenes, what became of their objects, and the ViT that ships with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from winnow.data import open_images
from winnow.data.scenes import COLOURS, SHAPES, SIZE, covers, patch_objects, scene
from winnow.measure.objects import objects_of, shares
from winnow.recipes import scenes_vit


def test_scenes_are_their_seed():
    first, again, other = scene(0, 5), scene(0, 5), scene(0, 6)
    assert np.array_equal(first.image, again.image)
    assert first.things == again.things
    assert not np.array_equal(first.image, other.image)
    assert not np.array_equal(first.image, scene(1, 5).image)


def test_a_scene_says_what_it_shows():
    for i in range(20):
        one = scene(3, i)
        assert one.image.shape == (SIZE, SIZE, 3)
        assert [thing.shape for thing in one.things].count("triangle") == 1
        assert {thing.shape for thing in one.things} == set(SHAPES)
        triangle = next(thing for thing in one.things if thing.shape == "triangle")
        assert list(COLOURS)[one.label] == triangle.colour
        assert ("what colour is the triangle?", triangle.colour) in one.questions
        assert one.caption.count(" a ") == len(one.things) - 1
        for number, thing in enumerate(one.things, 1):
            assert np.array_equal(one.mask == number, covers(thing)), "objects stand in cells of their own"
            inside = one.image[one.mask == number].mean(0)
            nearest = min(COLOURS, key=lambda name: np.abs(inside / inside.max() - np.array(COLOURS[name]) / 245).sum())
            assert nearest == thing.colour or inside.std() < 25  # a dim white is grey


def test_shapes_differ_and_labels_are_spread():
    sizes = {covers(thing).sum() / thing.radius**2 for thing in scene(0, 0).things}
    assert len(sizes) == len(SHAPES)
    labels = [scene(0, i).label for i in range(400)]
    assert min(np.bincount(labels, minlength=len(COLOURS))) > 20


@pytest.mark.parametrize("things", [0, 13])
def test_impossible_scenes_are_refused(things):
    with pytest.raises(ValueError, match="from 1 to 12"):
        scene(0, 0, things)


def test_scenes_as_data():
    images = open_images("scenes", limit=4)
    picture, label = images[1]
    assert picture.size == (SIZE, SIZE)
    assert images.classes[label] in COLOURS
    assert (images.mask(1) > 0).any()
    place = 1 * 500 // 4  # evenly spaced, and a subset keeps its masks
    assert np.array_equal(images.mask(1), scene(2, place).mask)
    with pytest.raises(ValueError, match="train, val, test"):
        open_images("scenes", split="dev")


def test_patch_objects_against_a_loop():
    mask = scene(0, 1).mask
    found = patch_objects(mask, (12, 12)).reshape(12, 12)
    for row in range(12):
        for column in range(12):
            cell = mask[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            counts = np.bincount(cell.ravel(), minlength=9)[1:]
            assert found[row, column] == (counts.argmax() + 1 if counts.sum() >= 6.4 else 0)


def test_objects_of_by_hand():
    objects = np.array([[0, 0, 1, 1, 2, 0]])
    whole = objects_of(np.array([[0, 0, 1, 1, 2, 3]]), objects)
    assert (whole.kept, whole.purity, whole.boundary_f1) == (1, 1, 1)
    dropped = objects_of(np.array([[0, -1, 1, -1, 2, 3]]), objects)
    assert dropped.kept == pytest.approx(2 / 3)
    assert dropped.purity == 1
    mixed = objects_of(np.array([[0, 0, 0, 1, 1, 1]]), objects)
    assert mixed.purity == 0  # both tokens hold objects and background
    assert mixed.boundary_f1 == 0  # one boundary, inside object 1, met by none of the three there are
    half = objects_of(np.array([[0, 0, 1, 1, 1, 1]]), objects)
    assert half.purity == pytest.approx(2 / 6)
    assert half.boundary_f1 == pytest.approx(2 * 1 / (1 + 3))


def test_coverage_by_hand():
    owners = np.array([[0, 0, 1, 1, 2, 3], [0, 0, 0, 1, 1, 1], [0, -1, 1, -1, 2, 3], [0, 0, 1, 2, 3, 3]])
    found = shares(owners, np.array([[0, 0, 1, 1, 2, 0]] * 4))
    assert found["coverage"][1].tolist() == found["overlap"][1].tolist() == [3] * 4
    assert found["coverage"][0].tolist() == [3, 0, 2, 2], "an object may lie in several tokens of its own"
    # the second: patches 2, 3 against 0-2 (1 of 4 either way), patch 4 against 3-5; then half of object 1 at most
    assert found["overlap"][0] == pytest.approx([3, 2 / 4 + 1 / 3, 2 / 2 + 1, 2 / 2 + 1 / 2])


def test_objects_of_does_not_mix_images():
    objects = np.array([[0, 1], [1, 0]])
    assert objects_of(np.array([[0, 0], [1, 0]]), objects).purity == pytest.approx(0.5)


def test_recipe_for_two_steps(capsys):
    model = scenes_vit.train(steps=2, batch=4, scenes=8, rate=1e-3)
    answer = scenes_vit.answer_only(model)
    assert answer(torch.randn(1, 3, 96, 96)).shape == (1, len(COLOURS))
    assert torch.equal(answer.head.weight, model.head.weight[: len(COLOURS)])
    assert "step 1" in capsys.readouterr().out


def test_recipe_stops_at_nan():
    with pytest.raises(FloatingPointError, match="lower --rate"):
        scenes_vit.train(steps=3, batch=4, scenes=8, rate=1e30)


def test_the_vit_that_ships():
    """It knows the scenes, and answers worse when averaged or halved at random: which tokens stay matters."""
    import winnow
    from winnow import Keep, Pool, Random
    from winnow.backbones import vit_scenes
    from winnow.models import load_model

    if not Path(vit_scenes.__file__).with_name("vit_scenes.safetensors").exists():
        pytest.skip("vit_scenes.safetensors is not trained yet: python -m winnow.recipes.scenes_vit")
    loaded = load_model("timm:vit_scenes", pretrained=True)
    assert loaded.mean == (0.5, 0.5, 0.5)
    assert loaded.size == (96, 96)
    images, answers = scenes_vit.draw(7, 0, 100)

    def right() -> float:
        with torch.no_grad():
            logits = loaded.model(scenes_vit.normalise(images))
        return float((logits.argmax(-1) == answers[:, 0]).float().mean())

    assert right() >= 0.95
    for method in (Pool(keep=Keep(0.25), at="input"), Random(keep=Keep(0.25), at="input")):
        with winnow.reduced(loaded.model, method):
            assert right() < 0.8, method
