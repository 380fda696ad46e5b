"""What `gemsmith reproduce` found at full length, brought from its folder into the committed results and the docs.

    python -m benchmarks.claims runs/reproduce

Writes benchmarks/results/claims.json (every seed of every arm) and the table of
docs/reproduce.md. Claims that the folder does not have keep their figures;
rehearsals are refused.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import pages
from benchmarks.run import device
from curation.errors import UserError
from curation.manifest import read_manifest, write_json
from jobs.reproduce.claims import CLAIMS
from jobs.reproduce.page import earlier, in_words, overall, rehearsal

RESULTS = Path(__file__).parent / "results" / "claims.json"
COLUMNS = ("claim", "verdict", "minutes", "hypothesis", "difference", "95 % interval", "bound", "")


def collect(out: Path, results: Path) -> dict[str, Any]:
    """Bring the claims of OUT into `results`; all that it then holds, by name.

    Raises:
        UserError: OUT has no claim, a rehearsal, or a claim that was registered anew since.
    """
    found = {name: summary for name in CLAIMS if (summary := read_manifest(out / f"{name}.json")) is not None}
    if not found:
        raise UserError(f"{out}: has no figures of any claim ({', '.join(CLAIMS)}); gemsmith reproduce writes them")
    for name, summary in found.items():
        if how := rehearsal(summary):
            raise UserError(f"{out}/{name}.json: is a rehearsal, {how}; run it as it is registered")
        if sizes := earlier(summary):
            raise UserError(f"{out}/{name}.json: was run at sizes registered before ({sizes}); run it as it is now")
    kept = json.loads(results.read_text()) if results.exists() else {}
    kept |= {name: {**summary, "device": device()} for name, summary in found.items()}
    kept = {name: kept[name] for name in CLAIMS if name in kept}
    write_json(results, kept)
    return kept


def table(claims: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown, a line a hypothesis."""
    lines: list[tuple[str, ...]] = [COLUMNS, ("---",) * len(COLUMNS)]
    for name, summary in claims.items():
        first = (f"`{name}`", overall(summary), f"{summary['wall_s'] / 60:.0f}")
        for test in summary["tests"]:
            words = in_words(test)
            figures = (f"{words['difference']} ({words['share']})", words["interval"], words["bound"], words["verdict"])
            lines.append((*first, words["asks"], *figures))
            first = ("", "", "")
    on = "; ".join(dict.fromkeys(summary["device"] for summary in claims.values()))
    return f"Measured on {on}.\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", allow_abbrev=False)
    parser.add_argument("out", type=Path, help="the folder of `gemsmith reproduce`")
    a = parser.parse_args()
    try:
        pages.put(pages.DOCS / "reproduce.md", "benchmarks.claims", table(collect(a.out, RESULTS)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
