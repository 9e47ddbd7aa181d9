"""How well the laws of transfers predict: rows left out of the fit, then rows that only judge.

python -m calibration.links_report FOLDER [--judge], FOLDER being `systems/data/h100_sxm/comm` of
aiconfigurator-core. `--judge` opens the largest decile of sizes and the rows of 8 nodes.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from calibration.links import LinkFit, fit_links, rows_of
from calibration.links_tables import Sample, Split, read_split

from expertlane.cost.links import law_times
from expertlane.cost.profile import Device, LinkSheet, Profile
from expertlane.cost.surface import Floats
from expertlane.spec.names import Link


@dataclass(frozen=True)
class Quality:
    """How far predictions were from measurements.

    Attributes:
        part: `left out`, `largest` or `8 nodes`.
        median, p90: of the relative error, max(measured/predicted, predicted/measured) − 1.
        covered: share of rows within low and high.
        bias: the median of measured over predicted.
    """

    law: str
    part: str
    num_rows: int
    median: float
    p90: float
    covered: float
    bias: float


def judge_links(fit: LinkFit, splits: Mapping[str, Split], profile: Profile) -> list[Quality]:
    """Of every law, every part that has rows."""
    found = []
    for law, surface in fit.surfaces.items():
        errors = fit.errors[law]
        ratio = np.exp(errors)
        within = (ratio >= surface.low) & (ratio <= surface.high)
        found.append(_quality(law, "left out", ratio, within))
        for part, samples in (("largest", splits[law].largest), ("8 nodes", splits[law].far)):
            if samples:
                found.append(_quality(law, part, *_ratios(fit, law, samples, profile)))
    return found


def _ratios(
    fit: LinkFit, law: str, samples: Sequence[Sample], profile: Profile
) -> tuple[Floats, np.ndarray]:
    """[N] measured over predicted, and whether it lies within the bounds."""
    profile = Profile(
        profile.name,
        profile.device,
        profile.ranks_per_node,
        profile.links,
        fit.surfaces,
        fit.terms,
    )
    rows = rows_of(law, samples, profile)
    link = Link.INTER_NODE if law.endswith("inter_node") else Link.INTRA_NODE
    at = rows.at
    times = law_times(profile, law, fit.surfaces[law], link, at["bytes"], at["ranks"], at["nodes"])
    within = (rows.seconds >= times.low) & (rows.seconds <= times.high)
    return rows.seconds / times.seconds, within


def _quality(law: str, part: str, ratio: Floats, within: np.ndarray) -> Quality:
    error = np.maximum(ratio, 1 / ratio) - 1
    return Quality(
        law=law,
        part=part,
        num_rows=len(ratio),
        median=float(np.median(error)),
        p90=float(np.percentile(error, 90)),
        covered=float(within.mean()),
        bias=float(np.median(ratio)),
    )


def _datasheet() -> Profile:
    links = {
        Link.INTRA_NODE: LinkSheet(450e9, "NVLink 4, per direction"),
        Link.INTER_NODE: LinkSheet(50e9, "400 Gb/s"),
    }
    return Profile("h100", Device("H100 SXM", 80e9, 3.35e12, {}, ""), 8, links)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--judge", action="store_true")
    arguments = parser.parse_args()
    splits = read_split(arguments.folder, judge=arguments.judge)
    spikes = sum(split.num_spikes for split in splits.values())
    rows = sum(len(split.fitted) for split in splits.values())
    print(f"{rows} rows fitted, {spikes} spikes left out")
    print(
        f"{'law':38} {'rows of':9} {'rows':>5} {'median':>7} {'p90':>7} {'within':>7} {'bias':>6}"
    )
    profile = _datasheet()
    for each in judge_links(fit_links(splits, profile), splits, profile):
        print(
            f"{each.law:38} {each.part:9} {each.num_rows:5} {each.median:7.1%} {each.p90:7.1%} "
            f"{each.covered:7.0%} {each.bias:6.2f}"
        )


if __name__ == "__main__":
    main()
