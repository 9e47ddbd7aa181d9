"""How far whole projections were off, by what is projected and what its laws rest on."""

from expertlane.cost.laws.frameworks import JudgedGroup, judged_groups
from expertlane.cost.laws.profile import Profile
from expertlane.cost.laws.times import Basis
from expertlane.results.hardware import Judged

# benchmarks/results/2026-11-25-bench_projection-final.json; nothing of it was fitted.
CALIBRATED = Judged("step time, 36 deployments, after expertlane calibrate", 72, 0.056)


def judged(
    profile: Profile, weights: str, *, has_two_pools: bool = False, has_drafts: bool = False
) -> Judged | None:
    """Of the same device, number type and way of serving; None where nothing like it was judged.

    A profile that was measured on its machine was judged as such. Others by their device's name:
    with the overheads of a framework where it has some.
    """
    firmest = min((law.basis for law in profile.surfaces.values()), default=Basis.BOUND)
    if firmest is Basis.MEASURED:
        return CALIBRATED
    kind = profile.name, weights, has_two_pools, has_drafts, bool(profile.framework)
    for each in judged_groups():
        if kind == _kind(each):
            return Judged(_what(each), each.num_rows, each.tpot)
    return None


def _kind(group: JudgedGroup) -> tuple[str, str, bool, bool, bool]:
    return (
        group.hardware,
        group.weights,
        group.has_two_pools,
        group.has_drafts,
        group.is_fitted,
    )


def _what(group: JudgedGroup) -> str:
    pools = "disaggregated" if group.has_two_pools else "aggregated"
    drafts = ", multi-token prediction" if group.has_drafts else ""
    return f"TPOT of DeepSeek-R1, {group.hardware.upper()}, {group.weights}, {pools}{drafts}"
