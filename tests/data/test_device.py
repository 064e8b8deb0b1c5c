from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as tv

from data.augment import AugmentConfig, draw_augmentations
from data.device import DeviceTransform, color_jitter, erase
from data.randomness import KeyedRandom
from tests.data.pictures import picture

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def batch(size: int = 4, side: int = 40) -> torch.Tensor:
    images = [torch.from_numpy(np.array(picture(side, side, seed))).permute(2, 0, 1) for seed in range(size)]
    return torch.stack(images)


def draws_for(aug: AugmentConfig, count: int, side: int = 40) -> dict[str, torch.Tensor]:
    draws = [draw_augmentations(aug, (side, side), KeyedRandom(7, i)) for i in range(count)]
    return {key: torch.stack([draw[key] for draw in draws]) for key in draws[0]}


def test_without_draws_it_is_to_tensor_and_normalize() -> None:
    images = batch()
    expected = torch.stack([tv.normalize(image.float() / 255, list(MEAN), list(STD)) for image in images])
    result = DeviceTransform(MEAN, STD, AugmentConfig())(images, {})
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)


def test_it_adds_nothing_to_a_checkpoint() -> None:
    assert DeviceTransform(MEAN, STD).state_dict() == {}


def apply_torchvision(image: torch.Tensor, jitter: torch.Tensor) -> torch.Tensor:
    steps = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    for operation in jitter[4:].int().tolist():
        image = steps[operation](image, jitter[operation].item())
    return image


def test_colour_jitter_equals_torchvisions_for_each_samples_own_order() -> None:
    aug = AugmentConfig(color_jitter=(0.4, 0.4, 0.8, 0.3))
    images = batch(12).float() / 255
    jitter = draws_for(aug, 12)["jitter"]
    expected = torch.stack([apply_torchvision(image, row) for image, row in zip(images, jitter, strict=True)])
    torch.testing.assert_close(color_jitter(images, jitter), expected, rtol=0, atol=2e-3)


def test_colours_stay_when_the_draw_says_so() -> None:
    images = batch(2).float() / 255
    still = torch.tensor([[1.0, 1.0, 1.0, 0.0, 2, 0, 3, 1]] * 2)
    torch.testing.assert_close(color_jitter(images, still), images, rtol=0, atol=1e-6)


def test_grey_and_flat_pictures_survive_the_hue_shift() -> None:
    grey = torch.full((1, 3, 4, 4), 0.5)
    jitter = torch.tensor([[1.0, 1.0, 1.0, 0.4, 0, 1, 2, 3]])
    torch.testing.assert_close(color_jitter(grey, jitter), grey)


def test_grey_scale_applies_to_the_chosen_samples_only() -> None:
    images = batch(3)
    result = DeviceTransform((0, 0, 0), (1, 1, 1))(images, {"gray": torch.tensor([False, True, False])})
    torch.testing.assert_close(result[0], images[0] / 255)
    torch.testing.assert_close(result[2], images[2] / 255)
    expected = tv.rgb_to_grayscale(images[1].float() / 255, 3)
    torch.testing.assert_close(result[1], expected, rtol=0, atol=1e-3)


def test_erased_boxes_hold_normal_noise_and_the_rest_is_untouched() -> None:
    images = torch.full((3, 3, 50, 60), 9.0)
    boxes = torch.tensor(
        [[[0, 0, 0, 0], [0, 0, 0, 0]], [[5, 7, 30, 40], [0, 0, 0, 0]], [[0, 0, 10, 10], [40, 50, 10, 10]]]
    )
    torch.manual_seed(0)
    result = erase(images, boxes.to(torch.int16))
    changed = result != 9.0
    assert not changed[0].any()
    assert changed[1, :, 5:35, 7:47].all()
    assert changed[1].sum() == 3 * 30 * 40
    assert changed[2].sum() == 3 * 2 * 100
    assert changed[2, :, 45:, 55:].all()
    noise = result[1, :, 5:35, 7:47]
    assert abs(noise.mean()) < 0.06
    assert abs(noise.std() - 1) < 0.06
    assert (noise[0] != noise[1]).any()


def test_erasing_is_in_normalised_space_and_repeats_with_the_generators_state() -> None:
    aug = AugmentConfig(re_prob=1.0)
    transform, draws = DeviceTransform(MEAN, STD, aug), draws_for(aug, 4)
    torch.manual_seed(3)
    first = transform(batch(), draws)
    torch.manual_seed(3)
    assert torch.equal(first, transform(batch(), draws))
    plain = transform(batch(), {})
    top, left, height, width = draws["erase"][0, 0].tolist()
    changed = (first[0] != plain[0]).any(0)
    assert changed[top : top + height, left : left + width].all()
    assert changed.sum() == height * width


def test_each_sample_is_transformed_as_it_would_be_alone() -> None:
    aug = AugmentConfig(color_jitter=(0.4, 0.4, 0.4, 0.1), gray_scale_prob=0.5)
    transform, images, draws = DeviceTransform(MEAN, STD, aug), batch(6), draws_for(aug, 6)
    together = transform(images, draws)
    for i in range(6):
        alone = transform(images[i : i + 1], {key: value[i : i + 1] for key, value in draws.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_waits_for_no_host_and_agrees_with_the_cpu() -> None:
    aug = AugmentConfig(color_jitter=(0.4, 0.4, 0.4, 0.1), gray_scale_prob=0.5)
    transform, images, draws = DeviceTransform(MEAN, STD, aug), batch(6), draws_for(aug, 6)
    expected = transform(images, draws)
    on_device = DeviceTransform(MEAN, STD, aug).cuda()
    gpu_images, gpu_draws = images.cuda(), {key: value.cuda() for key, value in draws.items()}
    erasing = {"erase": torch.tensor([[[3, 4, 10, 12]]] * 6, dtype=torch.int16).cuda()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = on_device(gpu_images, gpu_draws)
        on_device(gpu_images, erasing)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=1e-4)
