"""Fits profiles of cards to the measured tables of aiconfigurator-core.

python calibration/fit.py h200 b200     write their profiles
python calibration/fit.py h100 --table  also print how well laws fit, as Markdown
python calibration/fit.py --judge       all cards, with rows that are for judging alone; and a table
                                        of all
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from laws import fit_computation
from links import fit_links
from quality import Quality, markdown, side_by_side
from sheet import CARDS, Card
from tables import MissingTablesError, Part

from expertlane.cost.laws.profile import Profile, write_profile

_PROFILES = Path(__file__).parent.parent / "src/expertlane/cost/laws/profiles"


def main() -> int:
    """Fit, write, and say how well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cards", nargs="*", choices=[[], *CARDS], metavar="CARD")
    parser.add_argument("--table", action="store_true", help="print how well laws fit")
    parser.add_argument("--judge", action="store_true", help="also on rows for judging alone")
    parser.add_argument("--output", type=Path, default=_PROFILES, help="a folder")
    given = parser.parse_args()
    found = {}
    try:
        for name in given.cards or CARDS:
            profile, found[name] = _fit(CARDS[name], given.judge)
            write_profile(profile, given.output / f"{name}.toml", CARDS[name].like)
            if given.table or given.judge:
                print(f"{name}\n\n{markdown(found[name])}", flush=True)
    except MissingTablesError as error:
        print(error, file=sys.stderr)
        return 2
    if given.judge and len(found) > 1:
        print(side_by_side(found, Part.LARGEST.value))
    return 0


def _fit(card: Card, with_judging: bool) -> tuple[Profile, Sequence[Quality]]:
    computed, sent = fit_computation(card, with_judging), fit_links(card, with_judging)
    profile = replace(
        card.sheet,
        surfaces={**computed.surfaces, **sent.surfaces},
        terms={**card.sheet.terms, **computed.terms, **sent.terms},
    )
    return profile, [*computed.qualities, *sent.qualities]


if __name__ == "__main__":
    sys.exit(main())
