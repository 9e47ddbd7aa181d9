"""A decision to move experts while requests ran, as results keep it."""

from dataclasses import dataclass

from expertlane.results.strict import Strict


@dataclass(frozen=True)
class RebalanceResult(Strict):
    """What was predicted, what was done, and what was seen.

    Loads are those of the fullest rank over the mean, summed over layers; seconds those of the
    experts of the rank that spent most in a step. Before: the steps that the decision was taken by;
    after: as many steps after the switch, or as many as there were.

    Attributes:
        step: before which it was taken.
        switched: the step before which experts were in their new places; None where they stayed,
            or the work ended first.
        gain_s, cost_s: predicted, over as many steps as the decision was taken by.
        num_bytes: of weights to move.
        predicted_before, predicted_after: load, if tokens came evenly from all ranks.
        load_before, load_after: as counted; None after where nothing was switched.
        experts_s_before, experts_s_after: a step.
    """

    replica: int
    step: int
    switched: int | None
    gain_s: float
    cost_s: float
    num_bytes: int
    predicted_before: float
    predicted_after: float
    load_before: float
    load_after: float | None
    experts_s_before: float
    experts_s_after: float | None
