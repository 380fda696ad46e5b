"""Regions as weights of patches: RoIAlign by torchvision's own kernel, masks by counting pixels; what is refused."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import roi_align

from curation.errors import UserError
from tests.training.conftest import tiny_config, write_shards
from training.data import Loader, Shards, Source
from training.data.images import ImageSpec
from training.regions import REASONS, Region, Unseen, read_region, region_weights


@pytest.mark.parametrize("grid", [(7, 7), (4, 4), (16, 16), (24, 24)])
def test_boxes_are_pooled_as_roi_align_pools_them(grid):
    rng = np.random.default_rng(grid[0])
    features = torch.randn(1, 5, *grid, dtype=torch.float64)
    for _ in range(20):
        (x0, x1), (y0, y1) = (np.sort(rng.uniform(0, side, 2)) for side in (640, 360))
        box = torch.tensor([[0, x0 / 640 * grid[1], y0 / 360 * grid[0], x1 / 640 * grid[1], y1 / 360 * grid[0]]])
        expected = roi_align(features, box, (1, 1), sampling_ratio=grid[0], aligned=True).flatten()
        weights = region_weights(Region("x", (x0, y0, x1, y1)), (640, 360), grid, "squash")
        found = features.flatten(2)[0] @ torch.from_numpy(weights).double()
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("grid", [(7, 7), (8, 8), (3, 5)])
@pytest.mark.parametrize("resize_mode", ["squash", "shortest"])
def test_the_whole_picture_is_the_plain_mean(grid, resize_mode):
    """Every weight is the same number, and that number is 1 / N to the last bit of fp32."""
    n = grid[0] * grid[1]
    for region in (Region("x", (0.0, 0.0, 640.0, 360.0)), Region("x", (0, 0, 640, 360), np.ones((360, 640), bool))):
        weights = region_weights(region, (640, 360), grid, resize_mode)
        assert np.unique(weights).tolist() == [np.float32(1) / np.float32(n)]


def test_masks_weigh_a_patch_by_their_area_in_it():
    """Counted pixel by pixel on a picture drawn eight times as large, whose patches begin at whole pixels."""
    rng = np.random.default_rng(1)
    mask = rng.random((30, 46)) < 0.4
    for resize_mode, (left, width) in {"squash": (0, 46), "shortest": (8, 30)}.items():
        large = mask.repeat(8, 0).repeat(8, 1)[:, left * 8 : (left + width) * 8]
        high, wide = large.shape[0] // 4, large.shape[1] // 4
        counted = large.reshape(4, high, 4, wide).sum((1, 3))
        found = region_weights(Region("x", (0, 0, 46, 30), mask), (46, 30), (4, 4), resize_mode)
        np.testing.assert_allclose(found, (counted / counted.sum()).ravel(), rtol=1e-6)


def test_a_region_moves_with_the_picture():
    """The weights of what is seen are those of the picture that is really flipped, or really cropped."""
    mask = np.zeros((30, 50), bool)
    mask[4:20, 12:40] = True
    for region, mirrored, cropped in (
        (Region("x", (12, 4, 40, 20)), Region("x", (10, 4, 38, 20)), Region("x", (2, 4, 30, 20))),
        (
            Region("x", (12, 4, 40, 20), mask),
            Region("x", (10, 4, 38, 20), mask[:, ::-1]),
            Region("x", (2, 4, 30, 20), mask[:, 10:40]),
        ),
    ):
        flipped = region_weights(region, (50, 30), (6, 6), "squash", flipped=True)
        np.testing.assert_allclose(flipped, region_weights(mirrored, (50, 30), (6, 6), "squash"), atol=1e-7)
        centre = region_weights(region, (50, 30), (6, 6), "shortest")
        np.testing.assert_allclose(centre, region_weights(cropped, (30, 30), (6, 6), "squash"), atol=1e-7)


POLYGON = {"name": "a", "segmentation": [[5, 5, 20, 5, 20, 15, 5, 15]]}
RLE = {"name": "a", "segmentation": {"size": [40, 48], "counts": [3, 2, 40 * 48 - 5]}}


def test_polygons_and_run_lengths_become_masks():
    square = read_region(POLYGON, 48, 40)
    expected = np.zeros((40, 48), bool)
    expected[5:15, 5:20] = True
    assert square.mask is not None and (square.mask == expected).all() and square.box == (5, 5, 20, 15)
    column = read_region(RLE, 48, 40)
    assert column.mask is not None and np.argwhere(column.mask).tolist() == [[3, 0], [4, 0]], "column by column"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"name": "a", "bbox_xywh": [50, 5, 10, 10]}, "region_outside"),
        ({"name": "a", "bbox_xywh": [5, -20, 10, 10]}, "region_outside"),
        ({"name": "a", "bbox_xywh": [5, 5, 0, 10]}, "region_broken"),
        ({"name": "a", "bbox_xywh": [5, 5, float("nan"), 10]}, "region_broken"),
        ({"name": "a", "bbox_xywh": [5, 5, 10]}, "region_broken"),
        ({"name": "a"}, "region_broken"),
        ({"name": " ", "bbox_xywh": [5, 5, 10, 10]}, "region_broken"),
        ({"bbox_xywh": [5, 5, 10, 10]}, "region_broken"),
        ({"name": "a \ud800", "bbox_xywh": [5, 5, 10, 10]}, "region_broken"),
        ("a", "region_broken"),
        ({"name": "a", "segmentation": []}, "region_broken"),
        ({"name": "a", "segmentation": [[1, 2, 3, 4]]}, "region_broken"),
        ({"name": "a", "segmentation": {"size": [4, 4], "counts": [16]}}, "region_broken"),
        ({"name": "a", "segmentation": {"size": [40, 48], "counts": [40 * 48]}}, "mask_empty"),
    ],
)
def test_what_cannot_be_used_is_named(entry, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        read_region(entry, 48, 40)
    assert reason in REASONS


def test_boxes_are_clipped_to_the_picture():
    assert read_region({"name": "a", "bbox_xywh": [-5, 30, 20, 40]}, 48, 40).box == (0, 30, 15, 40)


@pytest.mark.parametrize(
    ("box", "mask", "named"),
    [
        (
            (0, 0, 3, 40),
            None,
            r"box: \(0, 0, 3, 40\) shows nothing .* pixels 4 to 44 across and 0 to 40 down; give one",
        ),
        ((60, 0, 70, 40), None, "box: .* shows nothing of what the model sees"),
        ((0, 0, 3, 40), np.zeros((40, 48), bool), "mask: shows nothing of what the model sees"),
        ((5, 5, 5, 10), None, r"box: \(5, 5, 5, 10\) is no box; give \(left, top, right, bottom\) in pixels"),
        ((float("nan"), 0, 9, 9), None, r"box: \(nan, 0, 9, 9\) is no box"),
        ((0, 0, float("inf"), 9), None, r"box: \(0, 0, inf, 9\) is no box"),
        ((0, 0, 3, 40), np.ones((48, 40), bool), r"mask: is \(48, 40\), not \(40, 48\); give \[height, width\]"),
    ],
)
def test_a_region_of_a_caller_that_cannot_be_is_one_clear_line(box, mask, named):
    with pytest.raises(UserError, match=f"^region.{named}") as error:
        region_weights(Region("", box, mask), (48, 40), (4, 4), "shortest")
    assert "\n" not in str(error.value)
    assert isinstance(error.value, Unseen) == ("nothing" in named), "what the loader counts as region_outside"


def two(number):
    """Two regions, of which the second of every tenth picture lies outside; every seventh picture has none."""
    if number % 7 == 6:
        return []
    far = 500 if number % 10 == 9 else 0
    return [
        {"name": f"left of {number}", "bbox_xywh": [0, 0, 24, 40]},
        {"name": f"right of {number}", "bbox_xywh": [24 + far, 0, 24, 40]},
    ]


def rows_of(folder, config, *, flip=False, chunk=8):
    import dataclasses

    loader = Loader(
        [Source(name="regions", samples=Shards(folder), kind="regions")],
        dataclasses.replace(config.loader, batch=40, chunk=chunk, flip=flip),
        ImageSpec(size=32, mean=(0.5,) * 3, std=(0.5,) * 3, grid=(4, 4)),
        lambda texts: {"input_ids": torch.zeros(len(texts), 1)},
        seed=3,
        rank=0,
        world_size=1,
    )
    pool_rows, chunks = [], []
    for batch in range(2):
        pool_rows += [loader.row("regions", (0, own)) for _, _, own in loader._drawn(batch)]
    for made in loader.batches(0, 2):
        chunks += made
    return loader, pool_rows, chunks


def test_the_loader_draws_one_region_a_sample_and_epoch(tmp_path):
    folder = write_shards(tmp_path / "s", [20, 20], regions=two)
    loader, rows, chunks = rows_of(folder, tiny_config())
    first, second = rows[:40], rows[40:]
    sides = np.repeat(np.eye(2), 2, axis=1)  # the four columns of patches under the left and the right box
    for row, weights in zip(rows, torch.cat([c["regions"] for c in chunks])):
        if row.reason:
            assert torch.equal(weights, torch.full((16,), 1 / 16))
            continue
        side = sides[int(row.fields["text"].startswith("right"))]
        columns = weights.view(4, 4).sum(0).double().numpy()
        assert columns @ side > 0.8 and row.fields["text"].split()[-1].isdigit()
    number = {row.fields["text"].split()[-1]: row.fields["text"] for row in first if not row.reason}
    again = {row.fields["text"].split()[-1]: row.fields["text"] for row in second if not row.reason}
    both = number.keys() & again.keys()
    assert 0 < sum(number[n] != again[n] for n in both) < len(both), "another draw in another epoch"
    assert loader.holes["region_none"] == 10 and 0 < loader.holes["region_outside"] <= 8
    assert loader.holes.total() == sum(r.reason != "" for r in rows)
    other = rows_of(folder, tiny_config(), chunk=13)[2]
    assert torch.equal(torch.cat([c["regions"] for c in chunks]), torch.cat([c["regions"] for c in other]))
    valid = torch.cat([c["valid"] for c in chunks])
    assert valid.tolist() == [row.reason == "" for row in rows]


def test_flips_take_the_region_along(tmp_path):
    """On pictures with one dark half, the weights always find the half that their phrase names."""

    def halves(number):
        buffer = io.BytesIO()
        pixels = np.full((40, 48, 3), 255, np.uint8)
        pixels[:, :24] = 0
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    import tarfile

    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for n in range(40):
            record = {
                "uid": f"{n:032x}",
                "caption": "halves",
                "regions": [{"name": "dark", "bbox_xywh": [0, 0, 24, 40]}],
            }
            for name, payload in {"png": halves(n), "json": json.dumps(record).encode(), "txt": b"halves"}.items():
                info = tarfile.TarInfo(f"{n:06d}.{name}")
                info.size = len(payload)
                tar.addfile(info, io.BytesIO(payload))
    _, rows, _ = rows_of(tmp_path, tiny_config(), flip=True)
    flipped = 0
    for row in rows:
        pixels = row.fields["pixels"][:, :, 0].astype(float)  # [32, 32]
        seen = pixels.reshape(4, 8, 4, 8).mean((1, 3)).ravel() @ row.fields["region"]
        assert seen < 60, "mostly the dark half; RoIAlign reads half a patch beyond its edge"
        flipped += pixels[0, 0] > 128
    assert 20 < flipped < 60
