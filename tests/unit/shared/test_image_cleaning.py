from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from concord_client.data import read_data
from concord_shared.image_cleaning import augmented, denoised, for_training, noise_share
from concord_shared.plan import load_plan
from concord_shared.plan.preparation import Augmentation
from concord_shared.preprocessing import unfitted
from datasets import needs
from federations import digits
from helpers import IMAGES, plan_of

SMOOTH = np.add.outer(np.arange(60, 200, 5), np.arange(28)).astype(np.uint8)[None, None].repeat(50, 0)


def salted(images: NDArray[np.uint8], share: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    drawn = rng.random(images.shape)
    return np.where(drawn < share / 2, 0, np.where(drawn > 1 - share / 2, 255, images)).astype(np.uint8)


def test_salt_and_pepper_is_removed(rng: np.random.Generator) -> None:
    noisy = salted(SMOOTH, 0.2, rng)
    before, after = (np.abs(each.astype(float) - SMOOTH).mean() for each in (noisy, denoised(noisy)))
    assert before > 20
    assert after < before / 10
    assert denoised(noisy).dtype == np.uint8


def test_pixels_that_are_not_extreme_stay(rng: np.random.Generator) -> None:
    noisy = salted(SMOOTH, 0.2, rng)
    changed = denoised(noisy) != noisy
    assert np.isin(noisy[changed], (0, 255)).all()


def test_a_clean_gradient_stays_as_it_is() -> None:
    assert np.array_equal(denoised(SMOOTH), SMOOTH)


@needs("fashion_mnist", "mnist")
@pytest.mark.parametrize("name", ["fashion_mnist", "mnist"])
def test_of_clean_images_less_than_one_in_500_is_touched_and_of_noisy_ones_hardly_one_is_not(
    name: str, dataset_path: Callable[[str], Path], rng: np.random.Generator
) -> None:
    real = read_data(f"idx:{dataset_path(name)}", load_plan("fashion-cnn").plan).inputs[:5000]
    touched, seen = (
        (denoised(images) != images).reshape(len(images), -1).any(1).mean() for images in (real, salted(real, 0.2, rng))
    )
    assert touched < 0.002
    assert seen > 0.998


def test_one_speck_is_no_noise() -> None:
    image = SMOOTH[:1].copy()
    image[0, 0, 5, 5] = 255
    assert np.array_equal(denoised(image), image)
    assert noise_share(image)[0] == pytest.approx(1 / 784)


def test_it_is_one_step_of_the_transform(rng: np.random.Generator) -> None:
    plan = plan_of(IMAGES, "data.shape=[1, 28, 28]", "preprocessing.denoise=median")
    noisy = salted(SMOOTH, 0.2, rng)
    assert np.allclose(unfitted(plan).transform(noisy), denoised(noisy) / 255)
    assert unfitted(plan).counts(np.concatenate([SMOOTH, noisy])) == {"denoised": 50}


def test_no_image_at_all() -> None:
    assert denoised(SMOOTH[:0]).shape == (0, 1, 28, 28)


class TestAugmentation:
    def test_moves_and_mirrors_by_the_seed(self, rng: np.random.Generator) -> None:
        images = rng.integers(1, 256, (200, 3, 6, 5)).astype(np.uint8)
        wanted = Augmentation(flip=True, shift=2)
        moved = augmented(images, wanted, 7)
        assert np.array_equal(moved, augmented(images, wanted, 7))
        assert not np.array_equal(moved, augmented(images, wanted, 8))
        assert (moved.shape, moved.dtype) == (images.shape, np.uint8)
        padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
        for before, after in zip(padded, moved, strict=True):
            places = [before[:, top : top + 6, left : left + 5] for top in range(5) for left in range(5)]
            mirror = np.pad(before[:, 2:-2, 2:-2][:, :, ::-1], ((0, 0), (2, 2), (2, 2)))
            places += [mirror[:, top : top + 6, left : left + 5] for top in range(5) for left in range(5)]
            assert any(np.array_equal(after, place) for place in places)

    def test_half_of_them_are_mirrored(self) -> None:
        images = np.zeros((1000, 1, 2, 2), np.uint8)
        images[:, :, :, 0] = 9
        mirrored = augmented(images, Augmentation(flip=True), 1)[:, 0, 0, 1] == 9
        assert 400 < mirrored.sum() < 600

    def test_each_round_and_node_has_its_own(self) -> None:
        plan = plan_of(IMAGES, "preprocessing.augment={shift=2}")
        images = digits().inputs[:50]
        rounds = [for_training(plan, images, number, node) for number, node in ((1, "a"), (2, "a"), (1, "b"), (1, "a"))]
        assert np.array_equal(rounds[0], rounds[3])
        assert not np.array_equal(rounds[0], rounds[1])
        assert not np.array_equal(rounds[0], rounds[2])
        assert for_training(plan_of(IMAGES), images, 1, "a") is images

    def test_rows_to_evaluate_are_never_moved(self) -> None:
        plan = plan_of(IMAGES, "preprocessing.augment={flip=true, shift=2}")
        images = digits().inputs[:50]
        assert np.allclose(unfitted(plan).transform(images), images / 255)
