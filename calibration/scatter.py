"""Whether a law that is off for one size is off for others too: what `cost/projector.py` rests on.

python calibration/scatter.py     correlation of residuals by how many doublings sizes are apart

Residuals are logarithms of measured over predicted of the rows that laws were fitted to.
"""

import sys

import numpy as np
from cleaning import without_spikes
from compute import Law, joined, rows_of
from laws import laws_of
from sheet import CARDS
from tables import MissingTablesError, Part, read

from expertlane.cost.laws.profile import Profile, read_profile

_APART = (0.5, 1.0, 2.0, 4.0, 20.0)  # doublings, of the size that differs most
_NUM_PAIRS = 3_000_000
_EDGE = 0.01  # of the residuals, on either side, that are left out


def main() -> int:
    """Print a row for each law."""
    profile, generator = read_profile("h100"), np.random.default_rng(0)
    heads = " | ".join(f"up to {apart:g}" for apart in _APART)
    print(f"| law | standard deviation | {heads} |")
    print(f"| --- | ---: |{' ---: |' * len(_APART)}")
    for law in laws_of(CARDS["h100"]):
        try:
            print(_row(law, profile, generator))
        except MissingTablesError as error:
            print(error, file=sys.stderr)
            return 2
    return 0


def _row(law: Law, profile: Profile, generator: np.random.Generator) -> str:
    parts = []
    for source in law.sources:
        columns, _ = without_spikes(read(source.table, Part.FITTED), *source.along)
        parts.append(rows_of(law, source, columns, profile))
    rows = joined(parts)
    residual = np.log(
        rows.seconds / profile.surfaces[law.name].times(rows.roofline_s, rows.at).seconds
    )
    low, high = np.quantile(residual, [_EDGE, 1 - _EDGE])
    keep = (residual > low) & (residual < high)
    residual = residual[keep] - residual[keep].mean()
    sizes = np.log2(np.stack([np.maximum(each[keep], 1) for each in rows.at.values()]))
    first, second = generator.integers(len(residual), size=(2, _NUM_PAIRS))
    apart = np.abs(sizes[:, first] - sizes[:, second]).max(axis=0)
    squares = (residual[first] - residual[second]) ** 2 / 2 / residual.var()
    cells, least = [], 1e-9  # not the same sizes
    for most in _APART:
        among = (apart > least) & (apart <= most + 1e-9)
        cells.append(f"{1 - squares[among].mean():.2f}" if among.sum() > 100 else "")
        least = most + 1e-9
    return f"| `{law.name}` | {residual.std():.3f} | {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
