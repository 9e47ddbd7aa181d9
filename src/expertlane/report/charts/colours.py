"""Colours of the page; a cause or stage has the same one in every plot.

One hue a family: compute blue, communication orange, waiting grey, overhead purple;
its members differ in lightness. Any two that meet in a plot differ by 12 or more of CIEDE2000, to
all cones and without those for red or for green, on the light page and on the dark one; a test
computes it.
"""

from expertlane.spec.names import Cause, Gap, ProjectedCause

# Variables of the page's style sheet: on a light page and on paper, on a dark page.
PALETTE: dict[str, tuple[str, str]] = {
    "--ink": ("#1a2027", "#e8ecf0"),
    "--muted": ("#5b6670", "#a3adb7"),
    "--line": ("#d9dee3", "#333b44"),
    "--page": ("#f6f7f9", "#12161b"),
    "--card": ("#ffffff", "#1b2128"),
    "--accent": ("#00588c", "#7cc4f5"),
    "--shadow": ("#00000040", "#000000b0"),
    "--compute-1": ("#0772d2", "#1398ff"),
    "--compute-2": ("#71a6ff", "#aac2fd"),
    "--compute-3": ("#5293af", "#5890a9"),
    "--compute-4": ("#023568", "#026bc6"),
    "--communication-1": ("#f48c07", "#ea8b00"),
    "--communication-2": ("#d47a5c", "#c77052"),
    "--communication-3": ("#a36100", "#f7cf7f"),
    "--communication-4": ("#83361c", "#9a4f02"),
    "--waiting-1": ("#656565", "#a0a0a0"),
    "--waiting-2": ("#8d8d8d", "#747474"),
    "--waiting-3": ("#bbbfc8", "#4b4b4b"),
    "--overhead-1": ("#815284", "#85487f"),
    "--overhead-2": ("#5a2a3f", "#ffc3da"),
    "--proposal": ("#00588c", "#7cc4f5"),
    "--rival": ("#7d858d", "#8d959d"),
    "--others": ("#b9bfc5", "#535b64"),
    "--below": ("#2a92da", "#1e7fcb"),
    "--above": ("#d77836", "#e08537"),
    "--blue": ("#27b5ff", "#3463ab"),
    "--orange": ("#975c11", "#de7e39"),
    "--green": ("#064220", "#a2dca5"),
    "--purple": ("#512087", "#987ff2"),
    "--sky": ("#2980a1", "#86d0fc"),
    "--brick": ("#c7776f", "#bc2c0f"),
    "--yellow": ("#cfa600", "#f0e82c"),
    "--pink": ("#8e4d62", "#be849a"),
    "--silver": ("#a6acb2", "#5a5d5f"),
}

OF_CAUSE: dict[str, str] = {
    Cause.EXPERTS: "--compute-1",
    Cause.ATTENTION: "--compute-2",
    Cause.ROUTER: "--compute-3",
    Cause.HEAD: "--compute-4",
    Cause.DISPATCH_COMBINE: "--communication-1",
    Cause.TP_COLLECTIVES: "--communication-3",
    Cause.HAND_OVER: "--communication-4",
    Cause.WAITING: "--waiting-1",
    Cause.PIPELINE_BUBBLE: "--waiting-2",
    Cause.ENGINE: "--overhead-1",
    ProjectedCause.EXPERT_COMPUTE: "--compute-1",
    ProjectedCause.OTHER_COMPUTE: "--compute-2",
    ProjectedCause.WEIGHT_READS: "--compute-3",
    ProjectedCause.KV_READS: "--compute-4",
    ProjectedCause.DISPATCH_COMBINE: "--communication-1",
    ProjectedCause.CONTENTION: "--communication-2",
    ProjectedCause.IMBALANCE: "--waiting-1",
    ProjectedCause.LAUNCH: "--overhead-2",
}

# Of a timeline, what is no part of a step's causes.
OF_GAP: dict[str, str] = {Gap.IDLE: "--waiting-3", Gap.DESCHEDULED: "--overhead-2"}

# Of two deployments that a verdict names, the faster and the slower one, and of all others.
PROPOSAL, RIVAL, OTHERS = "--proposal", "--rival", "--others"
# What a cause takes off a step or adds to it; loads below and above the mean.
SAVED, ADDED = "--below", "--above"
BELOW, ABOVE = "--below", "--above"

# Of curves and points, which differ by their marks too; those in the background are grey.
SERIES = (*("--sky", "--orange", "--purple", "--blue", "--green", "--pink", "--yellow", "--brick"),)
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
BACKGROUND = "--silver"
REPORTED, REPORTED_SHAPE = "--ink", "star"

_BLACK, _WHITE = "#000000", "#ffffff"
_SHARES = (0.2126, 0.7152, 0.0722)  # of red, green and blue in luminance
_MIDDLE = 0.179  # from which black and white stand out as much


def on(colour: str) -> str:
    """The CSS variable for text on a cause's colour."""
    return f"--on-{colour.removeprefix('--')}"


def style_sheet() -> str:
    """The palette as CSS: on a screen as light or dark as its user has it, on paper light."""
    light, dark = (
        "".join(f"{name}:{looks[place]};" for name, looks in (PALETTE | _words()).items())
        for place in (0, 1)
    )
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    )


def _words() -> dict[str, tuple[str, str]]:
    """Black or white, whichever stands out more from each cause's colour."""
    found = {}
    for name in dict.fromkeys(OF_CAUSE.values()):
        light, dark = (_BLACK if _luminance(each) > _MIDDLE else _WHITE for each in PALETTE[name])
        found[on(name)] = (light, dark)
    return found


def _luminance(colour: str) -> float:
    """Relative luminance of a colour (WCAG 2), 0 to 1."""
    values = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return sum(share * value for share, value in zip(_SHARES, linear, strict=True))
