import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from regrow.lab.measure.images import contact_sheet, feature_distances, mean_psnr, psnr


def picture(seed: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_psnr_is_that_of_scikit_image() -> None:
    a, b = picture(0), picture(1)
    expected = peak_signal_noise_ratio(np.asarray(a), np.asarray(b), data_range=255)
    assert psnr(a, b) == pytest.approx(expected, abs=1e-6)


def test_psnr_of_equal_pictures_is_infinite() -> None:
    assert psnr(picture(0), picture(0)) == float("inf")


def test_the_mean_psnr_leaves_equal_pictures_out() -> None:
    a, b = picture(0), picture(1)
    assert mean_psnr([(a, a), (a, b)]) == psnr(a, b)
    assert mean_psnr([(a, a)]) is None


def test_psnr_refuses_pictures_of_different_sizes() -> None:
    with pytest.raises(ValueError, match=r"b: size \(10, 10\)"):
        psnr(picture(0), picture(0, (10, 10)))


def test_feature_distance_is_zero_only_for_equal_pictures() -> None:
    zero, one = picture(0), picture(1)
    (same, other), (others, again) = feature_distances([zero, zero], [zero, one], [one, zero])
    assert [same, again] == pytest.approx([0, 0], abs=1e-6)
    assert other == pytest.approx(others)
    assert other > 1e-3


def test_a_contact_sheet_holds_every_picture() -> None:
    rows = [[Image.new("RGB", (8, 4), c) for c in ("red", "lime")] for _ in range(3)]
    sheet = contact_sheet(rows, columns=["a\nb", "c"], labels=["x", "y", "z"], side=40)
    colours = {c: n for n, c in sheet.getcolors(1 << 16) or []}
    assert colours[(255, 0, 0)] == colours[(0, 255, 0)] == 3 * 40 * 20


def test_a_contact_sheet_with_a_missing_label_is_refused() -> None:
    with pytest.raises(ValueError, match="must have one label"):
        contact_sheet([[picture(0)]], columns=["a"], labels=[])
