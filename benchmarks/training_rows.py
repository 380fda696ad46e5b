"""Training: the engine's step against the sum of its parts, the plain step, and itself under ZeRO-3 on two ranks.

The parts are what a step cannot do without (benchmarks/ranks.py); so the ratio
shows what the gradient cache, DeepSpeed's engine and our optimiser add to them.

Gradients of chunks are summed on their rank in fp32 and reduced once a step
(`reduce_gradients: step`), so the reduce-scatters, the loss's own among them,
do not grow with the chunks.
"""

from collections.abc import Iterator
from typing import Any

from benchmarks.case import Bench, Case
from benchmarks.ranks import Ranks
from curation.synth import synthesise

REACH_ZERO3 = 1.0
"""Two ranks should not be slower than one process, on two cores."""


SECONDS: dict[str, Any] = {"area": "training", "unit": "s", "better": "lower"}


def steps(bench: Bench) -> Iterator[Case]:
    pool = bench.work / "pool"
    less = 8 if bench.quick else 1
    synthesise(out=pool, pairs=512 // less, seed=0, noise=False)
    for chunk, batch, calls in ((8, 64, 8), (32, 256, 3)):
        sizes = {"batch": batch // less, "chunk": chunk // less}
        with (
            Ranks(pool, bench.work / f"one-{chunk}", ranks=1, stage="zero0", **sizes) as one,
            Ranks(pool, bench.work / f"two-{chunk}", ranks=2, stage="zero3", **sizes) as two,
        ):
            yield from _in_chunks(one, two, f"{chunk}_of_{batch}", 1 if bench.quick else calls)
            if batch == 256:
                yield _reductions(two)
    whole = 256 // less
    room = {"batch": whole, "chunk": whole, "retain": whole}
    with Ranks(pool, bench.work / "retained", ranks=1, stage="zero0", **room) as one:
        yield Case(
            name="step_retained_256",
            reach=1.03,
            peer_name="plain full-batch step: one forward, textbook loss, one backward, AdamW",
            ours=lambda: one.seconds("step"),
            peer=lambda: one.seconds("plain"),
            calls=1 if bench.quick else 3,
            **SECONDS,
        )


def _in_chunks(one: Ranks, two: Ranks, sizes: str, calls: int) -> Iterator[Case]:
    alone = lambda: one.seconds("step")  # noqa: E731
    yield Case(
        name=f"step_chunk_{sizes}",
        reach=1.05,
        peer_name="its parts by themselves: embedding, coupled loss, forward + backward of every chunk, AdamW",
        ours=alone,
        peer=lambda: one.seconds("parts"),
        calls=calls,
        **SECONDS,
    )
    yield Case(
        name=f"step_zero3_{sizes}",
        reach=REACH_ZERO3,
        peer_name="the same step in one process without ZeRO",
        ours=lambda: two.seconds("step"),
        peer=alone,
        calls=calls,
        **SECONDS,
    )


def _reductions(two: Ranks) -> Case:
    few, many = two.chunks // 2, two.chunks
    return Case(
        name="reduce_scatters",
        area="training",
        unit="calls",
        better="lower",
        reach=1.0,
        peer_name=f"itself in {few} chunks instead of {many}, ZeRO-3 on two ranks, fp32",
        ours=lambda: two.reduce_scatters(many),
        peer=lambda: two.reduce_scatters(few),
    )
