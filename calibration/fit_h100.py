"""Fits the H100 profile to the measured tables of aiconfigurator-core.

python calibration/fit_h100.py            write the profile
python calibration/fit_h100.py --table    also print how well it fits, as Markdown
python calibration/fit_h100.py --judge    the same with rows that are for judging alone
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from fitted import Fitted, Fitter
from laws import FITTERS as COMPUTE
from links import FITTERS as LINKS
from quality import markdown
from sheet import H100
from tables import MissingTablesError

from expertlane.cost.laws.profile_file import write_profile

_PROFILE = Path(__file__).parent.parent / "src/expertlane/cost/laws/profiles/h100.toml"
_FITTERS: list[Fitter] = [*COMPUTE, *LINKS]


def main() -> int:
    """Fit, write, and say how well."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print how well laws fit")
    parser.add_argument("--judge", action="store_true", help="also on rows for judging alone")
    parser.add_argument("--output", type=Path, default=_PROFILE)
    given = parser.parse_args()
    profile = H100
    qualities = []
    try:
        for fit in _FITTERS:
            fitted: Fitted = fit(H100, given.judge)
            profile = replace(
                profile,
                surfaces={**profile.surfaces, **fitted.surfaces},
                terms={**profile.terms, **fitted.terms},
            )
            qualities += fitted.qualities
    except MissingTablesError as error:
        print(error, file=sys.stderr)
        return 2
    write_profile(profile, given.output)
    if given.table or given.judge:
        print(markdown(qualities), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
