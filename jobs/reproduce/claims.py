"""The claims by name: one file each, one line here."""

from jobs.reproduce import batch, curate, flava, instruct, joint, stage2
from jobs.reproduce.claim import Claim

CLAIMS: dict[str, Claim] = {
    "joint": joint.CLAIM,
    "stage2": stage2.CLAIM,
    "batch": batch.CLAIM,
    "instruct": instruct.CLAIM,
    "flava": flava.CLAIM,
    "curate": curate.CLAIM,
}
