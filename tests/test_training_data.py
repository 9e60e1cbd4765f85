"""Training images are a function of (seed, epoch, image), batches of (seed, step), whoever asks and in whatever order."""

from __future__ import annotations

import random
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.utils.data import DataLoader

from winnow.data import Images, open_images
from winnow.data.training import Augment, Order, TrainSet, drawing, mixer

HALF = (0.5, 0.5, 0.5)
STRONG = Augment(scale=(0.3, 1), flip=0.5, randaugment="rand-m9-mstd0.5", random_erasing=0.5)


def noise(n: int, size: int = 24) -> Images:
    """n images of noise, each its own; the last one is smaller than the others."""
    sizes = [size] * (n - 1) + [size // 2]
    made = [np.random.default_rng(i).integers(0, 256, (sizes[i], sizes[i], 3), np.uint8) for i in range(n)]
    opened: list[int] = []

    def read(i: int) -> Image.Image:
        opened.append(i)
        return Image.fromarray(made[i])

    images = Images("noise", [str(i) for i in range(n)], read, lengths=[1] * n, labels=[i % 5 for i in range(n)])
    images.opened = opened
    return images


def train_set(images: Images, augment: Augment = STRONG, seed: int = 0, size: int = 24, **words) -> TrainSet:
    return TrainSet(images, augment, (size, size), HALF, HALF, seed, **words)


def states() -> tuple:
    numbers = np.random.get_state()
    return random.getstate(), numbers[1].tolist(), numbers[2:], torch.get_rng_state().tolist()


# ---- one image


def test_an_image_follows_from_seed_epoch_and_place_and_leaves_the_generators_alone():
    images = noise(8)
    one, two = train_set(images), train_set(images)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    np.random.randn(1)  # NumPy keeps the second of a pair of normal numbers
    before = states()
    there = [one[i][0] for i in range(8)]
    assert states() == before
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    back = [two[i][0] for i in reversed(range(8))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(there, back))
    for other in (train_set(images, seed=1), train_set(images)):
        other.set_epoch(0 if other.seed else 1)
        assert sum(torch.equal(a, other[i][0]) for i, a in enumerate(there)) == 0
    pixels, label, index = one[3 + 8]
    assert (label, index) == (3, 3) and not torch.equal(pixels, there[3]), "another copy, another augmentation"
    assert pixels.shape == (3, 24, 24) and pixels.dtype == torch.float32


@pytest.mark.parametrize("augment", [
    STRONG,
    Augment(crop_padding=4, flip=0.5, autoaugment="cifar10", random_erasing=1.0, interpolation="bilinear"),
    Augment(autoaugment="imagenet"),
])  # fmt: skip
def test_workers_give_what_one_process_gives(augment):
    images = noise(12)
    order = Order(12, seed=3, epoch=1, batch=4, repeats=2)
    found = []
    for workers in (0, 2):
        made = train_set(images, augment, seed=3)
        made.set_epoch(1)
        found.append(list(DataLoader(made, batch_sampler=order, num_workers=workers, generator=torch.Generator())))
    for alone, shared in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(alone, shared))


def test_nothing_is_changed_unless_asked_for():
    image = open_images("scenes", split="test[:1]")
    pixels, _, _ = train_set(image, Augment(), size=96)[0]
    expected = torch.from_numpy(np.array(image[0][0])).permute(2, 0, 1) / 255
    assert torch.allclose(pixels, (expected - 0.5) / 0.5, atol=1e-6)
    assert train_set(image, Augment(), size=48)[0][0].shape == (3, 48, 48)


def test_the_crop_pads_with_black_and_keeps_the_pixels():
    image = noise(2)
    plain = train_set(image, Augment())[0][0]
    cropped = train_set(image, Augment(crop_padding=3))
    seen = set()
    for epoch in range(20):
        cropped.set_epoch(epoch)
        pixels = cropped[0][0]
        padded = torch.nn.functional.pad(plain, (3, 3, 3, 3), value=-1)
        places = [(y, x) for y in range(7) for x in range(7) if torch.equal(padded[:, y : y + 24, x : x + 24], pixels)]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) > 10


def test_an_image_is_decoded_once_where_all_fit():
    images = noise(6)
    kept, never = train_set(images), train_set(images, cache_mib=0)
    images.opened.clear()
    first = [kept[i] for i in range(6)]
    again = [kept[i] for i in range(6)]
    assert sorted(images.opened) == [0, 1, 2, 3, 4, 5, 5], "the one of another size is decoded anew"
    assert all(torch.equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(first, again))
    assert all(torch.equal(never[i][0], first[i][0]) and never[i][1:] == first[i][1:] for i in range(6))
    images.opened.clear()
    list(DataLoader(train_set(images), batch_size=2, num_workers=2))
    shared = train_set(images)
    list(DataLoader(shared, batch_size=5, num_workers=1))
    images.opened.clear()
    shared[2]
    assert images.opened == [], "a loader process decoded it"


# ---- the order of an epoch


def test_processes_share_the_batches_of_one():
    alone = list(Order(50, seed=1, epoch=2, batch=12))
    assert [len(keys) for keys in alone] == [12] * 4 and len({key for keys in alone for key in keys}) == 48
    for world in (2, 3, 4):
        shares = [list(Order(50, seed=1, epoch=2, batch=12, rank=rank, world=world)) for rank in range(world)]
        assert [list(chain(*parts)) for parts in zip(*shares)] == alone
    late = Order(50, seed=1, epoch=2, batch=12, start=3)
    assert list(late) == alone[3:] and len(late) == 1
    for other in (Order(50, seed=2, epoch=2, batch=12), Order(50, seed=1, epoch=3, batch=12)):
        assert list(other) != alone


@pytest.mark.parametrize(("batch", "repeats"), [(12, 3), (12, 2), (10, 3)])
def test_copies_of_an_image_are_apart_in_one_batch(batch, repeats):
    n = 40
    keys = list(Order(n, seed=0, epoch=0, batch=batch, repeats=repeats))
    assert len(keys) == n // batch and all(len(part) == batch for part in keys)
    flat = list(chain(*keys))
    assert len(set(flat)) == len(flat), "no copy comes twice"
    counts = np.bincount([key % n for key in flat])
    assert set(counts[counts > 0]) <= ({repeats} if batch % repeats == 0 else set(range(1, repeats + 1)))
    for part in keys:
        rolled = np.roll(np.array(part) % n, 1)
        assert not (rolled == np.array(part) % n).any(), "Mixup mixes neighbours"


@pytest.mark.parametrize("words", [{"batch": 51}, {"batch": 0}, {"batch": 10, "world": 3}, {"batch": 10, "repeats": 0}])
def test_an_order_that_cannot_be_is_refused(words):
    with pytest.raises(ValueError, match="give a batch"):
        Order(50, seed=0, epoch=0, **words)


# ---- a batch


@pytest.mark.parametrize("augment", [Augment(mixup=0.8), Augment(cutmix=1.0), Augment(mixup=0.8, cutmix=1.0)])
def test_a_mixed_batch_follows_from_seed_and_step(augment):
    images, labels = torch.rand(6, 3, 16, 16), torch.arange(6) % 4
    mix, before = mixer(augment, 4, seed=7), states()
    found = [mix(images, labels, step) for step in range(8)]
    assert states() == before
    torch.manual_seed(5)
    again = mixer(augment, 4, seed=7)(images, labels, 3)
    assert torch.equal(found[3][0], again[0]) and torch.equal(found[3][1], again[1])
    assert len({targets[0, 0].item() for _, targets in found}) > 4
    onehot = torch.eye(4)[labels]
    for pixels, targets in found:
        assert targets.shape == (6, 4) and torch.allclose(targets.sum(1), torch.ones(6))
        shares = [(targets[i] @ onehot[i]).item() for i in range(6) if labels[i] != labels[i - 1]]
        assert max(shares) - min(shares) < 1e-6, "one share for the batch"
        assert pixels.shape == images.shape
    assert not torch.equal(mixer(augment, 4, seed=8)(images, labels, 3)[0], again[0])


def test_mixup_mixes_pixels_as_it_mixes_targets_and_cutmix_cuts_as_much_as_it_says():
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    pixels, targets = mixer(Augment(mixup=0.8), 4, 0)(images, labels, 0)
    share = targets[0, 0]
    assert torch.allclose(pixels, share * images + (1 - share) * images.roll(1, 0), atol=1e-6)
    pixels, targets = mixer(Augment(cutmix=1.0), 4, 0)(images, labels, 0)
    kept = (pixels == images).all(1).float().mean((1, 2))
    assert torch.allclose(kept, targets.diagonal(), atol=1e-6) and 0 < kept[0] < 1


def test_without_mixing_labels_stay_classes():
    images, labels = torch.rand(2, 3, 8, 8), torch.tensor([1, 0])
    found = mixer(Augment(), 4, 0)(images, labels, 0)
    assert found[0] is images and found[1] is labels


def test_generators_are_restored_where_drawing_fails():
    before = states()

    def failing():
        with drawing(1, 2):
            random.random(), np.random.rand(), torch.rand(1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert states() == before


# ---- refusals


@pytest.mark.parametrize(("words", "said"), [
    ({"scale": (0.5, 1), "crop_padding": 4}, "not both"),
    ({"randaugment": "rand-m9", "autoaugment": "cifar10"}, "not both"),
    ({"randaugment": "9"}, "rand-m9-mstd0.5"),
    ({"randaugment": "rand-q9"}, "rand-m9-mstd0.5"),
    ({"scale": (1, 0.5)}, "smaller one first"),
    ({"scale": (0, 1)}, "smaller one first"),
    ({"flip": 1.5}, "less than or equal to 1"),
    ({"colour": 0.4}, "Extra inputs"),
])  # fmt: skip
def test_wrong_settings_are_refused(words, said):
    with pytest.raises(ValidationError, match=said):
        Augment(**words)
