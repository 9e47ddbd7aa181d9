"""How far whole projections were off, by what their profile's laws rest on."""

from expertlane.cost.laws.profile import Profile
from expertlane.cost.laws.times import Basis
from expertlane.results.results import Judged

# docs/validation.md says how each was judged; nothing of it was fitted.
JUDGED = {
    # calibration/judge_published.py --silicon, looked at once
    Basis.FITTED: Judged("TPOT, disaggregated, DeepSeek-R1 in float8, H100", 92, 0.38),
    # benchmarks/results/2026-11-25-bench_projection-final.json
    Basis.MEASURED: Judged("step time, 36 deployments, after expertlane calibrate", 72, 0.056),
}

_JUDGED_CARD = "h100"  # of those with fitted laws


def judged(profile: Profile) -> Judged | None:
    """Of the firmest laws that the profile has; None where nothing of that card was judged."""
    firmest = min((law.basis for law in profile.surfaces.values()), default=Basis.BOUND)
    if firmest is Basis.FITTED and profile.name != _JUDGED_CARD:
        return None
    return JUDGED.get(firmest)
