import numpy as np
import pytest
import torch

from curation.errors import UserError
from evaluation import encode
from evaluation.data import open_retrieval


@pytest.fixture
def data(pairs_folder):
    return open_retrieval(pairs_folder)


@pytest.mark.parametrize("batch", [1, 7, 23, 64])
def test_any_batch_gives_the_embeddings_of_single_items(data, model, batch):
    single = torch.cat([model.embed_images(model.images([data.pictures[i]])) for i in range(23)]).numpy()
    assert np.allclose(encode.encode_images(model, data.pictures, batch=batch), single, atol=1e-6)
    texts = [captions[0] for captions in data.captions] * 2
    single = torch.cat([model.embed_texts([text]) for text in texts]).numpy()
    found = encode.encode_texts(model, texts, batch=batch)
    assert np.allclose(found, single, atol=1e-6)
    assert np.array_equal(found[:23], found[23:])


def test_batches_have_one_size_whatever_the_number_of_items(data, model):
    encode.encode_images(model, data.pictures, batch=10)
    encode.encode_texts(model, ["a b", "c", "d e f"], batch=10)
    assert model.calls == [("images", 10)] * 3 + [("texts", 10)]


def test_an_image_embeds_the_same_in_a_smaller_set(data, model):
    whole = encode.encode_images(model, data.pictures, batch=8)
    assert np.array_equal(encode.encode_images(model, data.pictures.head(11), batch=8), whole[:11])


def test_cache_is_hit_only_by_the_same_content(data, make_model, tmp_path):
    def calls(model, pictures=data.pictures, batch=64):
        encode.encode_images(model, pictures, cache=tmp_path, batch=batch)
        return len(model.calls)

    first = make_model(0)
    assert calls(first) == 1
    again = make_model(0)
    again.name = "another name of the same weights"
    assert calls(again) == 0
    stored = encode.encode_images(again, data.pictures, cache=tmp_path)
    assert np.array_equal(stored, encode.encode_images(first, data.pictures)) and not again.calls
    assert calls(make_model(1)) == 1, "other weights"
    other = make_model(0)
    other.preprocess = {"size": 8, "crop": "centre"}
    assert calls(other) == 1, "other preprocessing"
    assert calls(make_model(0), pictures=data.pictures.head(20)) == 1, "other images"
    assert calls(make_model(0), batch=32) == 1, "another batch"


def test_text_cache_knows_the_prompts(make_model, tmp_path):
    one, two = make_model(0), make_model(0)
    encode.encode_texts(one, ["a cat", "a dog"], cache=tmp_path)
    encode.encode_texts(two, ["a dog", "a cat"], cache=tmp_path)
    assert (len(one.calls), len(two.calls)) == (1, 0)
    encode.encode_texts(two, ["the dog", "the cat"], cache=tmp_path)
    assert len(two.calls) == 1


@pytest.mark.parametrize("damage", ["no manifest", "cut short"])
def test_unfinished_or_damaged_cache_is_encoded_again(data, make_model, tmp_path, damage):
    cache = tmp_path / "cache"
    expected = encode.encode_images(make_model(), data.pictures, cache=cache)
    (folder,) = cache.iterdir()
    if damage == "no manifest":
        (folder / "manifest.json").unlink()
        np.save(folder / "embeddings.npy", np.zeros((23, 16), dtype=np.float32))
    else:
        raw = (folder / "embeddings.npy").read_bytes()
        (folder / "embeddings.npy").write_bytes(raw[:-9])
    model = make_model()
    assert np.array_equal(encode.encode_images(model, data.pictures, cache=cache), expected)
    assert len(model.calls) == 1


def test_nan_is_refused_and_never_cached(data, model, tmp_path):
    healthy = model.embed_images
    model.embed_images = lambda pixels: healthy(pixels).index_fill(0, torch.tensor([2, 4]), float("nan"))
    with pytest.raises(UserError, match="small-0: 2 of 23 embeddings of images are NaN"):
        encode.encode_images(model, data.pictures, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_collapse_is_refused_but_an_untrained_model_is_not(data, model):
    encode.encode_images(model, data.pictures)
    model.embed_texts = lambda texts: torch.nn.functional.normalize(torch.ones(len(texts), 16), dim=1)
    with pytest.raises(UserError, match="30 of 30 embeddings of texts are one and the same"):
        encode.encode_texts(model, [f"text {i}" for i in range(30)])


def test_collapse_counts_rows_not_similarity():
    generator = np.random.default_rng(0)
    cone = np.ones(64) + 1e-4 * generator.standard_normal((100, 64))  # cosines of nearly 1, yet all different
    encode.refuse_broken(cone, model="m", modality="images")
    half = generator.standard_normal((100, 64))
    half[:50] = half[0]
    encode.refuse_broken(half, model="m", modality="images")
    half[50] = half[0] + 5e-7
    with pytest.raises(UserError, match="51 of 100"):
        encode.refuse_broken(half, model="m", modality="images")


def test_a_picture_that_the_model_refuses_is_a_query_that_finds_by_chance(data, make_model, tmp_path, capsys):
    model, whole = make_model(), encode.encode_images(make_model(), data.pictures)
    shown, bad = model.images, data.pictures[3].tobytes()

    def picky(pictures):
        if any(picture.tobytes() == bad for picture in pictures):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return shown(pictures)

    model.images = picky
    for batch in (1, 8, None):
        for _ in range(2):  # computed and out of the cache
            found = encode.encode_images(model, data.pictures, cache=tmp_path, batch=batch)
            assert "refuses 1 of 23 pictures" in capsys.readouterr().out
            assert not found[3].any() and np.allclose(np.delete(found, 3, 0), np.delete(whole, 3, 0), atol=1e-6)


def test_what_no_picture_is_to_blame_for_is_raised(data, model):
    def broken(pixels):
        raise RuntimeError("no such kernel")

    shown = model.images
    model.images = lambda pictures: shown(pictures) if len(pictures) == 1 else broken(pictures)
    with pytest.raises(RuntimeError, match="no such kernel"):
        encode.encode_images(model, data.pictures)


def test_few_pictures_and_many_texts_at_a_time_of_a_model_that_sees_pictures_whole(data, model):
    model.preprocess["resize_mode"] = "fit"
    encode.encode_images(model, data.pictures)
    encode.encode_texts(model, ["a", "b"])
    assert model.calls == [("images", 4)] * 6 + [("texts", 64)]
