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


def judged(profile: Profile) -> Judged | None:
    """Of the firmest laws that the profile has; None where another device's stand in for all."""
    firmest = min((law.basis for law in profile.surfaces.values()), default=Basis.BOUND)
    return JUDGED.get(firmest)
