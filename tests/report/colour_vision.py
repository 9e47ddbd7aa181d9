"""How different two colours look, to whom: CIEDE2000 of colours as they are seen without a cone."""

from math import atan2, cos, degrees, exp, hypot, radians, sin, sqrt

Rgb = tuple[float, float, float]

# Machado, Oliveira and Fernandes (2009), "A Physiologically-based Model for Simulation of Color
# Vision Deficiency", severity 1.0; of linear red, green and blue.
SEEN_BY: dict[str, tuple[Rgb, Rgb, Rgb]] = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
}
# sRGB's primaries in CIE XYZ (IEC 61966-2-1), and its white, D65.
_TO_XYZ: tuple[Rgb, Rgb, Rgb] = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
_WHITE: Rgb = (0.95047, 1.0, 1.08883)


def lab(colour: str, seen_by: str = "all cones") -> Rgb:
    """CIELAB of `#rrggbb` as it is seen."""
    linear = _linear(colour)
    seen = tuple(min(1.0, max(0.0, each)) for each in _times(SEEN_BY[seen_by], linear))
    x, y, z = (
        each ** (1 / 3) if each > (6 / 29) ** 3 else each / (3 * (6 / 29) ** 2) + 4 / 29
        for each in (
            value / white
            for value, white in zip(
                _times(_TO_XYZ, (seen[0], seen[1], seen[2])), _WHITE, strict=True
            )
        )
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def difference(one: Rgb, other: Rgb) -> float:
    """CIEDE2000 of two colours in CIELAB, after Sharma, Wu and Dalal (2005)."""
    (l1, a1, b1), (l2, a2, b2) = one, other
    mean_c = (hypot(a1, b1) + hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * sqrt(mean_c**7 / (mean_c**7 + 25**7))
    c1, c2 = hypot(stretch * a1, b1), hypot(stretch * a2, b2)
    h1, h2 = (
        degrees(atan2(b, stretch * a)) % 360 if a or b else 0.0 for a, b in ((a1, b1), (a2, b2))
    )
    turn = (h2 - h1 + 180) % 360 - 180 if c1 and c2 else 0.0
    if c1 and c2 and abs(h1 - h2) == 180:
        turn = h2 - h1
    delta_l, delta_c = l2 - l1, c2 - c1
    delta_h = 2 * sqrt(c1 * c2) * sin(radians(turn / 2))
    mean_l, mean_c = (l1 + l2) / 2, (c1 + c2) / 2
    mean_h = h1 + h2
    if c1 and c2:
        mean_h = mean_h / 2 if abs(h1 - h2) <= 180 else (mean_h + 360) / 2 % 360
    hue = (
        1
        - 0.17 * cos(radians(mean_h - 30))
        + 0.24 * cos(radians(2 * mean_h))
        + 0.32 * cos(radians(3 * mean_h + 6))
        - 0.20 * cos(radians(4 * mean_h - 63))
    )
    s_l = 1 + 0.015 * (mean_l - 50) ** 2 / sqrt(20 + (mean_l - 50) ** 2)
    s_c, s_h = 1 + 0.045 * mean_c, 1 + 0.015 * mean_c * hue
    turned = 60 * exp(-(((mean_h - 275) / 25) ** 2))
    mixed = -2 * sqrt(mean_c**7 / (mean_c**7 + 25**7)) * sin(radians(turned))
    in_l, in_c, in_h = delta_l / s_l, delta_c / s_c, delta_h / s_h
    return sqrt(in_l**2 + in_c**2 + in_h**2 + mixed * in_c * in_h)


def contrast(one: str, other: str) -> float:
    """Of WCAG 2: 1 to 21."""
    dark, bright = sorted(_times(_TO_XYZ, _linear(each))[1] for each in (one, other))
    return (bright + 0.05) / (dark + 0.05)


def _linear(colour: str) -> Rgb:
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return _straight(red), _straight(green), _straight(blue)


def _straight(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _times(matrix: tuple[Rgb, Rgb, Rgb], vector: Rgb) -> Rgb:
    first, second, third = (
        sum(one * other for one, other in zip(row, vector, strict=True)) for row in matrix
    )
    return first, second, third
