"""Image tokenizers: nearest centroids by brute force, the same codes whatever the chunk, and bad folders named."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from curation.errors import UserError
from training.config import LoaderConfig
from training.data import Shards, Source
from training.family_config import CodebookConfig
from training.models.codebook import PatchCodebook, drawn_pictures, load_codebook, train_codebook


def pictures(n, side=64, seed=0):
    """Random blobs: large smooth areas of colour with edges between."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        yield np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def codebook():
    return train_codebook(pictures(60), 64)


def test_a_code_is_the_nearest_centroid(codebook):
    few = np.stack(list(pictures(3, seed=1)))
    codes = codebook(few, 8)
    assert codes.shape == (3, 64) and codes.dtype == torch.int64
    centres = codebook.pixels(torch.arange(codebook.vocab_size)).reshape(codebook.vocab_size, -1)
    for picture, row in zip(few, codes):
        for y, x in [(0, 0), (3, 5), (7, 7)]:
            patch = picture[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].reshape(-1) / 255
            inside = codebook.basis @ (codebook.basis.T @ (patch - codebook.mean)) + codebook.mean
            assert int(((centres - inside) ** 2).sum(1).argmin()) == int(row[8 * y + x])


def test_codes_tell_patches_apart_that_training_never_saw(codebook):
    """Decoded codes of new pictures leave a third of the error of the mean patch, and many codes are in use."""
    new = np.stack(list(pictures(40, seed=2)))
    codes = codebook(new, 8)
    patches = new.reshape(40, 8, 8, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 3) / 255
    error = ((codebook.pixels(codes.flatten()) - patches) ** 2).mean()
    assert error < 0.33 * ((patches - patches.mean(0)) ** 2).mean()
    share = np.bincount(codes.flatten().numpy(), minlength=64) / codes.numel()
    perplexity = np.exp(-(share * np.log(share + 1e-12)).sum())
    assert perplexity > 32


def test_training_again_gives_the_same_bits_and_saving_keeps_them(codebook, tmp_path):
    again = train_codebook(pictures(60), 64)
    codebook.save_pretrained(tmp_path)
    opened = PatchCodebook.from_pretrained(tmp_path)
    for other in (again, opened):
        for name in ("mean", "basis", "centroids"):
            assert np.array_equal(getattr(codebook, name), getattr(other, name))
    assert not np.array_equal(train_codebook(pictures(60), 64, seed=1).centroids, codebook.centroids)


def test_the_folder_of_a_run_is_trained_once(shards, tmp_path):
    config = CodebookConfig(vocab_size=8)
    stream = drawn_pictures([Source(name="data", samples=Shards(shards))], 4, LoaderConfig())
    first = load_codebook(config, tmp_path / "codebook", stream)
    assert load_codebook(config, tmp_path / "codebook", iter(())).vocab_size == 8
    named = load_codebook(CodebookConfig(name_or_path=str(tmp_path / "codebook"), vocab_size=8), tmp_path, iter(()))
    assert isinstance(named, PatchCodebook) and np.array_equal(named.centroids, first.centroids)


@pytest.fixture(scope="module")
def dalle(tmp_path_factory):
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dalle")
    FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, num_blocks_per_group=1, vocab_size=32)).save_pretrained(
        folder
    )
    return folder


def test_transformers_codebook_sees_what_its_own_processor_shows_it(dalle, tmp_path):
    from transformers import FlavaImageCodebook
    from transformers.models.flava.image_processing_pil_flava import FlavaImageProcessorPil

    few = np.stack(list(pictures(3, side=224, seed=3)))
    codes = load_codebook(CodebookConfig(name_or_path=str(dalle), vocab_size=32), tmp_path, iter(()))(few, 14)
    processor = FlavaImageProcessorPil()
    seen = processor([Image.fromarray(p) for p in few], return_codebook_pixels=True, return_tensors="pt")
    with torch.no_grad():
        expected = FlavaImageCodebook.from_pretrained(dalle).get_codebook_indices(seen["codebook_pixel_values"])
    assert len(expected.unique()) > 1
    assert (codes == expected.flatten(1)).float().mean() > 0.999  # the processor rounds its input once more


@pytest.mark.parametrize("kind", ["patch", "dalle"])
def test_codes_do_not_depend_on_the_chunk(kind, codebook, dalle, tmp_path):
    if kind == "dalle":
        codebook = load_codebook(CodebookConfig(name_or_path=str(dalle), vocab_size=32), tmp_path, iter(()))
    many = np.stack(list(pictures(19, seed=4)))
    whole = codebook(many, 8)
    for chunk in (1, 3, 8):
        parts = [codebook(many[i : i + chunk], 8) for i in range(0, 19, chunk)]
        assert torch.equal(torch.cat(parts), whole)


def test_bad_codebooks_are_named_in_one_line(dalle, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mmgem"}))
    cases = [
        (CodebookConfig(name_or_path=str(dalle), vocab_size=64), "has 32 codes"),
        (CodebookConfig(name_or_path=str(tmp_path)), "'mmgem', not an image tokenizer"),
        (CodebookConfig(name_or_path=str(tmp_path / "none")), "cannot be read"),
        (CodebookConfig(vocab_size=1000), "more than the 128 patches"),
    ]
    for config, named in cases:
        with pytest.raises(UserError, match=named) as error:
            load_codebook(config, tmp_path / "empty", pictures(2))
        assert "\n" not in str(error.value)
