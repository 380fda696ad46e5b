"""The claims by name: one file each, one line here."""

from jobs.reproduce import batch, curate, flava, instruct, joint
from jobs.reproduce.claim import Claim

CLAIMS: dict[str, Claim] = {
    "joint": joint.CLAIM,
    "batch": batch.CLAIM,
    "instruct": instruct.CLAIM,
    "flava": flava.CLAIM,
    "curate": curate.CLAIM,
}
