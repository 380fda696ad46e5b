"""Keep pictures that lie in the clusters of a reference set: DataComp's image-based filter (arXiv 2304.14108).

The pool's embeddings are clustered; a cluster stays when it is the nearest of
any reference embedding (ImageNet-1k in the paper), and with it all of its rows.
DataComp trains the centroids by L2 and then assigns by dot product with the raw
centroids, which prefers centroids of large norm and so is not the nearest by
L2; "ip-raw" repeats that, "l2" is what the training meant.

The reference is read in blocks and only the clusters that it touches are
remembered, so its size does not matter. In a measured folder the column must be
of the same model and settings as the pool's, since other embeddings mean
nothing here; of an .npy only the width can be checked.
"""

import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from curation.errors import UserError
from curation.hashing import config_hash, file_hash
from curation.selection import clustering
from curation.selection.interface import Apart, Fold, Program
from curation.selection.nearest import Nearest, Precision
from curation.selection.reference_quantile import identities, read_reference, reference_content

BLOCK = 65_536  # reference rows that are searched at once


@dataclass(frozen=True, kw_only=True)
class ImageBased:
    """Keep survivors whose nearest centroid in `column` is the nearest of any row of `reference`; a row without an
    embedding is near to none.

    `reference`: an .npy [n, D], or an OUT folder with a finished measure of the same recipe.
    Set one: `centroids`, an .npy [K, D] or DataComp's torch-pickled array; or `clusters`, to train so
    many here by L2 on the `sample` survivors with the lowest hashes (DataComp: 100,000 clusters).
    `assignment`: "ip-raw" is the largest dot product with the raw centroids, as DataComp has it.
    `precision`: "fast" finds the same centroid at twice the speed or more, if there are tens of thousands of them and
    the processor multiplies bytes (VNNI); with few it changes nothing.

    Memory: the centroids in float32, in every worker; in the one that trains, the sample as well.
    """

    column: str = "clip_image_embedding"
    reference: str
    centroids: str | None = None
    clusters: int | None = None
    assignment: Literal["ip-raw", "l2"] = "ip-raw"
    precision: Precision = "exact"
    sample: int = 1_000_000
    iterations: int = clustering.ITERATIONS
    seed: int = 0
    scope: ClassVar[Literal["survivors"]] = "survivors"

    def __post_init__(self) -> None:
        if (self.centroids is None) == (self.clusters is None):
            raise UserError("image_based: set exactly one of centroids and clusters")
        for name in ("clusters", "sample", "iterations"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"image_based: {name} {value} is not at least 1")

    def content(self) -> str:
        """By the bytes of the arrays; a measured folder by the names of its parts.

        Raises:
            UserError: an array is missing, which is known here before hours of measuring.
        """
        arrays = {"reference": self.reference} if self._reference_is_array else {}
        if self.centroids is not None:
            arrays["centroids"] = self.centroids
        for field, name in arrays.items():
            if not Path(name).is_file():
                raise _missing(field, name)
        measured = "" if self._reference_is_array else reference_content(self.reference)
        return config_hash([measured, {field: file_hash([Path(name)]) for field, name in arrays.items()}])

    @property
    def by_row(self) -> bool:
        return self.centroids is not None

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.column,) if self.clusters is None else (self.column, "uid")

    def decide(self) -> Program:
        """{"nearest": opens the centroids, None where nothing survives, "touched": bool [K]}"""
        measured = yield Fold(self._identity, set.union, columns=(self.column,))
        if self.centroids is not None:
            centroids: Callable[[], np.ndarray] = partial(_read_centroids, self.centroids)
        else:
            centroids = yield from clustering.trained(
                self.column,
                clusters=self.clusters or 0,
                size=self.sample,
                seed=self.seed,
                iterations=self.iterations,
                spherical=False,
            )
            if centroids is None:
                return {"nearest": None, "touched": np.zeros(0, bool)}
        nearest = Nearest(centroids, "ip" if self.assignment == "ip-raw" else "l2", self.precision)
        touched = yield Apart(partial(self._touched, nearest, measured or set()))
        return {"nearest": nearest, "touched": touched}

    def _touched(self, nearest: Nearest, measured: set[tuple[bytes, ...]], folder: Path) -> np.ndarray:
        """Which centroids are the nearest of a row of the reference: bool [K]"""
        touched = np.zeros(len(nearest.centroids), bool)
        for block in self._reference_blocks(measured):
            touched[self._nearest(block, nearest, f"reference {self.reference}")] = True
        if not touched.any():
            raise UserError(f"reference {self.reference}: holds no embeddings; measure some pictures")
        return touched

    def _identity(self, table: pa.Table) -> set[tuple[bytes, ...]]:
        return {identities(table.schema, [self.column])}

    def apply(self, table: pa.Table, decision: dict[str, Any]) -> np.ndarray:
        if not table.num_rows:
            return np.zeros(0, bool)
        keep = table[self.column].is_valid().to_numpy()
        points = clustering.embeddings(clustering.having(table, self.column), self.column)
        if len(points):
            keep[keep] = decision["touched"][self._nearest(points, decision["nearest"], f"column {self.column}")]
        return keep

    def describe(self, decision: dict[str, Any]) -> dict[str, Any]:
        return {"centroids": len(decision["touched"]), "centroids_touched": int(decision["touched"].sum())}

    @property
    def _reference_is_array(self) -> bool:
        return self.reference.endswith(".npy")

    def _nearest(self, points: np.ndarray, nearest: Nearest, whose: str) -> np.ndarray:
        width = nearest.centroids.shape[1]
        if points.shape[1] != width:
            raise UserError(
                f"{whose}: embeddings of width {points.shape[1]}, but the centroids have {width}; "
                "both must come from one model"
            )
        found = nearest(points)
        if len(found) and found.min() < 0:  # FAISS finds nothing for what is no number
            raise UserError(
                f"{whose}: {np.count_nonzero(found < 0)} embeddings have no nearest centroid, since they or the "
                "centroids are NaN; leave such rows out of the array"
            )
        return found

    def _reference_blocks(self, measured: set[tuple[bytes, ...]]) -> Iterator[np.ndarray]:
        """The reference's embeddings, [<= BLOCK, D] at a time."""
        if self._reference_is_array:
            array = _load_npy("reference", self.reference)
            yield from (array[start : start + BLOCK] for start in range(0, len(array), BLOCK))
            return
        for part in read_reference(self.reference, [self.column], measured):
            if len(points := clustering.embeddings(part.drop_null(), self.column)):
                yield points


def _missing(field: str, name: str) -> UserError:
    return UserError(f"image_based: {field} {name}: no such file; name an array of embeddings [rows, width]")


def _read_centroids(name: str) -> np.ndarray:
    """float32 [K, D], C-contiguous as FAISS wants it."""
    array = _load_npy("centroids", name) if name.endswith(".npy") else _load_torch_array(name)
    return np.ascontiguousarray(array, np.float32)


def _load_npy(field: str, name: str) -> np.ndarray:
    try:
        array = np.load(name, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise _missing(field, name) from None
    except (OSError, ValueError) as reason:
        raise UserError(f"image_based: {field} {name}: cannot be read as .npy ({reason}); save it by np.save") from None
    return _matrix(array, field, name)


def _load_torch_array(name: str) -> np.ndarray:
    """The NumPy array of a `torch.save(array, file, pickle_protocol=4)`, as DataComp's clustering writes it.

    torch.load(weights_only=True) does not know protocol 4. So the pickle in the
    zip is read with an unpickler that makes NumPy arrays and nothing else.
    """
    try:
        with zipfile.ZipFile(name) as archive:
            member = next(m for m in archive.namelist() if m.endswith("/data.pkl"))
            with archive.open(member) as f:
                array = _ArrayUnpickler(f).load()
    except FileNotFoundError:
        raise _missing("centroids", name) from None
    except (OSError, zipfile.BadZipFile, StopIteration, pickle.UnpicklingError) as reason:
        raise UserError(
            f"image_based: centroids {name}: neither .npy nor a torch-pickled array ({reason}); save it by np.save"
        ) from None
    return _matrix(array, "centroids", name)


def _matrix(array: Any, field: str, name: str) -> np.ndarray:
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        raise UserError(f"image_based: {field} {name}: not a matrix of floats [rows, width]; save one by np.save")
    return array


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # NumPy 1 wrote numpy.core and NumPy 2 writes numpy._core; protocol 2 has bytes through _codecs.encode.
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")} or (
            module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct"
        ):
            return super().find_class(module.replace("numpy.core.", "numpy._core."), name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")
