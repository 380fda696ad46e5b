"""A small raw pool of four shards for the jobs."""

from pathlib import Path

import pytest

from curation.synth import synthesise


@pytest.fixture(scope="session")
def raw_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs") / "pool"
    synthesise(out=folder, pairs=200, seed=0, shard_size=50, workers=1)
    return folder
