"""Training: the gradient-cached step against those of open_clip and sentence-transformers, on one CLIP and one batch.

Both peers run by their own code: open_clip's `train_one_epoch` with
`accum_freq`, over an epoch of one batch, and sentence-transformers'
`CachedMultipleNegativesRankingLoss` in both directions, with one column of
images and one of texts. No side ever holds more than one chunk's graph: the
first chunk's, which ours keeps from the first pass, is gone before the second
chunk is run again. Every side begins from the same weights and ends with
a step of the same AdamW, whose rate is 0 so that the weights stay: the
gradients of the towers are first compared with the plain full-batch step's. The
temperature is learned by us and by open_clip (which counts its gradient once
a chunk, so it is not compared); sentence-transformers holds it fixed.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.case import Bench, Case, Measure

ROOT = Path(__file__).resolve().parent.parent
TEMPERATURE = 0.07


def step_peers(bench: Bench) -> Iterator[Case]:
    from training.train import tune_for_cpu

    tune_for_cpu("fp32")
    for chunk, batch, calls in ((8, 64, 8), (32, 256, 3)):
        subject = Subject.of(chunk, batch // 4 if bench.quick else batch)
        ours, *peers = (_side(make, subject) for make in (_ours, _open_clip, _sentence_transformers))
        names = ("open_clip", "sentence_transformers")
        says = ("open_clip's train_one_epoch, accum_freq", "sentence-transformers' cached ranking loss, mini-batches")
        for name, words, peer in zip(names, says, peers):
            yield Case(
                name=f"step_{name}_{chunk}_of_{batch}",
                area="training",
                unit="s",
                better="lower",
                reach=1.0,
                peer_name=f"{words} of {chunk}, the same CLIP and batch",
                ours=ours,
                peer=peer,
                calls=1 if bench.quick else calls,
            )


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The tiny CLIP of the recipe as open_clip builds it, and one batch: images [B, 3, S, S], texts [B, T]."""

    model_cfg: dict[str, Any]
    weights: dict[str, Any]
    images: Any
    texts: Any
    chunk: int

    @classmethod
    def of(cls, chunk: int, batch: int) -> "Subject":
        import torch
        import yaml
        from open_clip.model import CLIP

        cfg = yaml.safe_load((ROOT / "recipes/train/tiny_clip.yaml").read_text())["clip"]["model_cfg"]
        del cfg["vision_cfg"]["patch_dropout"]  # every side sees the same patches
        torch.manual_seed(0)
        weights = CLIP(**cfg).state_dict()
        side, vocab = cfg["vision_cfg"]["image_size"], cfg["text_cfg"]["vocab_size"]
        texts = torch.randint(1, vocab - 1, (batch, cfg["text_cfg"]["context_length"]))
        texts[:, -1] = vocab - 1  # the end of a text is the highest number
        return cls(model_cfg=cfg, weights=weights, images=torch.randn(batch, 3, side, side), texts=texts, chunk=chunk)

    def towers(self) -> Any:
        """open_clip's own model, whose temperature is ours."""
        import torch
        from open_clip.model import CLIP

        model = CLIP(**self.model_cfg, output_dict=True)
        model.load_state_dict(self.weights)
        with torch.no_grad():
            model.logit_scale.fill_(-torch.tensor(TEMPERATURE).log())
        return model


Side = tuple[Any, Callable[[Any], None]]
"""(a model, one step of it with an optimiser)"""


def _side(make: Callable[[Subject], Side], subject: Subject) -> Measure:
    """Seconds of one step, once its gradients are known to be right."""
    import torch

    model, step = make(subject)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def once() -> float:
        began = time.perf_counter()
        step(optimizer)
        return time.perf_counter() - began

    once()
    found = _gradient(model)
    expected = _gradient_of_whole_batch(subject)
    assert (found - expected).norm() < 1e-5 * expected.norm(), make.__name__
    return once


def _gradient(model: Any) -> Any:
    """Of the towers, the temperature left out: one vector, by name."""
    import torch

    towers = getattr(model, "towers", model)
    named = {n: p.grad.flatten().double() for n, p in towers.named_parameters() if p.grad is not None}
    return torch.cat([named[n] for n in sorted(named) if n != "logit_scale"])


def _gradient_of_whole_batch(subject: Subject) -> Any:
    """By the textbook: one forward, one backward."""
    from open_clip.loss import ClipLoss

    model = subject.towers()
    ClipLoss()(**model(subject.images, subject.texts)).backward()
    return _gradient(model)


def _ours(subject: Subject) -> Side:
    from training.config import ObjectiveConfig
    from training.distributed import World
    from training.gradient_cache import Outputs, gradient_cached_step
    from training.models.clip import Clip
    from training.objectives import build

    objective = ObjectiveConfig(coupled="infonce", reduction="mean", temperature=TEMPERATURE)
    model = Clip(subject.model_cfg, objective, subject.towers())
    coupled, world = build(objective), World()
    valid = subject.texts[:, 0] > 0  # every row
    split = zip(*(x.split(subject.chunk) for x in (subject.images, subject.texts, valid)))
    chunks = [{"pixel_values": images, "input_ids": texts, "valid": rows} for images, texts, rows in split]

    def step(optimizer: Any) -> None:
        optimizer.zero_grad()
        gradient_cached_step(
            forward=lambda chunk, separable: Outputs(**model(chunk, separable=separable)),
            backward=lambda loss: loss.backward(),
            chunks=chunks,
            counts={},
            weights={},
            coupled=coupled,
            world=world,
            retain=True,
        )
        optimizer.step()

    return model, step


def _open_clip(subject: Subject) -> Side:
    from open_clip.loss import ClipLoss
    from open_clip_train.train import train_one_epoch

    model, loss = subject.towers(), ClipLoss()
    batches = list(zip(subject.images.split(subject.chunk), subject.texts.split(subject.chunk)))
    args = Namespace(
        device="cpu",
        precision="fp32",
        distill=False,
        accum_freq=len(batches),
        skip_scheduler=True,
        grad_clip_norm=None,
        rank=0,
        world_size=1,
        batch_size=subject.chunk,
        log_every_n_steps=1,
        wandb=False,
    )
    data = {"train": _OneBatch(batches, subject)}

    def step(optimizer: Any) -> None:
        train_one_epoch(model, data, loss, 0, optimizer, None, None, None, args)

    return model, step


class _OneBatch:
    """What `train_one_epoch` takes for a loader: an epoch of one batch that is in memory."""

    def __init__(self, batches: list[Any], subject: Subject) -> None:
        self.dataloader, self.batches = self, batches
        self.num_batches, self.num_samples = len(batches), len(subject.images)

    def set_epoch(self, epoch: int) -> None:
        """The same batch in every one."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def _sentence_transformers(subject: Subject) -> Side:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from torch import nn

    towers = subject.towers()

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = towers

        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            images = features.get("pixel_values")
            side = towers.encode_text(features["input_ids"]) if images is None else towers.encode_image(images)
            return {"sentence_embedding": side}

    model = SentenceTransformer(modules=[Towers()], device="cpu")
    loss = CachedMultipleNegativesRankingLoss(
        model,
        scale=1 / TEMPERATURE,
        mini_batch_size=subject.chunk,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    columns = [{"pixel_values": subject.images}, {"input_ids": subject.texts}]

    def step(optimizer: Any) -> None:
        optimizer.zero_grad()
        loss(columns, None).backward()
        optimizer.step()

    return towers, step
