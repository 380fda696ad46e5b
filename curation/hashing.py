"""Random choices as functions of (seed, uid), so that no output depends on order or workers.

Every draw of the pipeline (shuffles, balancing, masks, caption choice) goes
through `hash64`. BLAKE2b costs about a microsecond, is the same on every
platform and, unlike Python's `hash`, in every process.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def hash64(*parts: str | int) -> int:
    """An unsigned 64-bit hash of the parts; ("ab", "c") and ("a", "bc") differ. A lone surrogate, which json allows and
    UTF-8 cannot hold, is hashed as what it is."""
    digest = hashlib.blake2b("\x00".join(map(str, parts)).encode(errors="surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def hash64_many(seed: str | int, uids: Iterable[str]) -> np.ndarray:
    """`hash64(seed, uid)` for every uid: uint64 [n]."""
    prefix = hashlib.blake2b(f"{seed}\x00".encode(), digest_size=8)
    out = bytearray()
    for uid in uids:
        h = prefix.copy()
        h.update(uid.encode(errors="surrogatepass"))
        out += h.digest()
    return np.frombuffer(bytes(out), dtype="<u8")


def uniform_many(seed: str | int, uids: Iterable[str]) -> np.ndarray:
    """Uniform draws in [0, 1) as functions of (seed, uid): float64 [n]."""
    return (hash64_many(seed, uids) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def config_hash(config: Any) -> str:
    """16 hex digits that name a configuration: its JSON with sorted keys, hashed."""
    import json

    return hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def file_hash(paths: Sequence[Path]) -> str:
    """16 hex digits that name the contents of these files, in this order."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
        digest.update(b"\x00")
    return digest.hexdigest()
