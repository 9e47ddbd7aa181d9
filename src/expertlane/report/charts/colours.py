"""Which colour stands for what: for a cause and a stage the same in every plot of them.

Hues after Okabe and Ito (2008), made for all kinds of colour vision, in lightnesses that stand out
from the page by 3 to 1, nearly all; names are variables of the page's style sheet, which has them
for light and dark.
"""

from expertlane.spec.names import Cause, Gap, ProjectedCause

OF_CAUSE: dict[str, str] = {
    Cause.EXPERTS: "--blue",
    Cause.ATTENTION: "--sky",
    Cause.ROUTER: "--pink",
    Cause.HEAD: "--lime",
    Cause.DISPATCH_COMBINE: "--vermillion",
    Cause.TP_COLLECTIVES: "--orange",
    Cause.HAND_OVER: "--yellow",
    Cause.WAITING: "--grey",
    Cause.PIPELINE_BUBBLE: "--silver",
    Cause.ENGINE: "--brown",
    ProjectedCause.EXPERT_COMPUTE: "--blue",
    ProjectedCause.OTHER_COMPUTE: "--sky",
    ProjectedCause.WEIGHT_READS: "--green",
    ProjectedCause.KV_READS: "--purple",
    ProjectedCause.DISPATCH_COMBINE: "--vermillion",
    ProjectedCause.CONTENTION: "--pink",
    ProjectedCause.IMBALANCE: "--grey",
    ProjectedCause.LAUNCH: "--teal",
}

# Of a timeline, what is no part of a step's causes.
OF_GAP: dict[str, str] = {Gap.IDLE: "--line", Gap.DESCHEDULED: "--brown"}

PROPOSAL = "--accent"

# Of curves and points, told apart by their marks too; those in the background are grey.
SERIES = (
    "--blue",
    "--vermillion",
    "--green",
    "--orange",
    "--purple",
    "--sky",
    "--pink",
    "--brown",
    "--lime",
    "--teal",
)
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
BACKGROUND = "--silver"
REPORTED, REPORTED_SHAPE = "--ink", "star"

# Of two deployments that a verdict names, the faster and the slower one, and of all others.
RIVAL, OTHERS = "--grey", "--silver"
# What a cause takes off a step or adds to it; loads below and above the mean.
SAVED, ADDED = "--blue", "--vermillion"
BELOW, ABOVE = "--blue", "--vermillion"
