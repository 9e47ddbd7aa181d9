"""Which colour stands for what, the same in every plot.

The palette is Okabe and Ito's (2008), made for all kinds of colour vision, with three more of
other lightness; names are variables of the page's style sheet, which has them for light and dark.
"""

from expertlane.spec.names import Cause, ProjectedCause, Stage

OF_CAUSE: dict[str, str] = {
    Cause.EXPERTS: "--blue",
    Cause.ATTENTION: "--sky",
    Cause.ROUTER: "--pink",
    Cause.HEAD: "--green",
    Cause.DISPATCH_COMBINE: "--vermillion",
    Cause.TP_COLLECTIVES: "--orange",
    Cause.HAND_OVER: "--yellow",
    Cause.WAITING: "--grey",
    Cause.PIPELINE_BUBBLE: "--silver",
    Cause.ENGINE: "--brown",
    ProjectedCause.EXPERT_COMPUTE: "--blue",
    ProjectedCause.OTHER_COMPUTE: "--sky",
    ProjectedCause.WEIGHT_READS: "--green",
    ProjectedCause.KV_READS: "--lime",
    ProjectedCause.DISPATCH_COMBINE: "--vermillion",
    ProjectedCause.CONTENTION: "--pink",
    ProjectedCause.IMBALANCE: "--grey",
    ProjectedCause.LAUNCH: "--purple",
}

OF_STAGE: dict[str, str] = {
    Stage.IDLE.label: "--silver",
    Stage.EMBED.label: "--lime",
    Stage.ATTENTION.label: "--sky",
    Stage.ROUTER.label: "--pink",
    Stage.DISPATCH.label: "--vermillion",
    Stage.EXPERTS.label: "--blue",
    Stage.COMBINE.label: "--purple",
    Stage.COLLECTIVES.label: "--orange",
    Stage.HAND_OVER.label: "--yellow",
    Stage.HEAD.label: "--green",
    Stage.SETUP.label: "--brown",
}

# Of curves and points, told apart by their marks too.
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
    "--grey",
)
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
