"""Cluster profiles in TOML: the shipped ones, reading them strictly, and writing them.

A file holds what `Profile` has. A surface's table is a string of whole numbers, thousandths of a
logarithm, one line for every knot of all axes but the last. `like` takes the laws of another
shipped profile over to this one's datasheet, as bounds and wider.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from expertlane.cost.laws.profile import Device, LinkSheet, Profile, Term
from expertlane.cost.laws.surface import Surface
from expertlane.cost.laws.times import Basis
from expertlane.cost.number_types import ITEM_BYTES
from expertlane.errors import SpecError
from expertlane.spec.files import CONFIG_BYTES, read_toml, write_text
from expertlane.spec.names import Link
from expertlane.spec.ranges import RANGES, shown

Law = TypeVar("Law", Surface, Term)
ReadT = TypeVar("ReadT", Device, LinkSheet, Surface, Term)

_PER_LOGARITHM = 1000  # of a table's numbers
_LARGEST = 20 * _PER_LOGARITHM  # exp(20): no correction is that far from a roofline


def shipped_profiles() -> dict[str, Path]:
    """The profiles that come with expertlane, by name."""
    folder = Path(__file__).parent / "profiles"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_profile(name_or_path: str | Path) -> Profile:
    """Read a shipped profile by name, or a file.

    Raises:
        SpecError: there is none, or the file breaks a rule; one line that names file and key.
    """
    given = str(name_or_path)
    is_name = Path(given).name == given and not given.endswith(".toml")
    shipped = shipped_profiles()
    if is_name and given not in shipped:
        raise SpecError(
            f"no cluster profile is called {given}; "
            f"there are {', '.join(shipped)}, or give a file that ends in .toml"
        )
    path = shipped[given] if is_name else Path(given)
    data = read_toml(path, CONFIG_BYTES)
    try:
        return _profile(_Table(data, ""))
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None


def write_profile(profile: Profile, path: Path) -> Path:
    """Write a profile whole or not at all; return its path.

    Raises:
        UserError: its folder can't be written to.
    """
    return write_text(path, to_toml(profile))


def to_toml(profile: Profile) -> str:
    """The text of a profile's file."""
    import tomli_w  # not needed to read

    data = {
        "name": profile.name,
        "ranks_per_node": profile.ranks_per_node,
        "device": asdict(profile.device),
        "links": {link.name.lower(): asdict(sheet) for link, sheet in profile.links.items()},
        "terms": {name: _as_table(term) for name, term in profile.terms.items()},
    }
    text = tomli_w.dumps(data, indent=0)
    return text + "".join(_surface_text(*each) for each in profile.surfaces.items())


def _surface_text(name: str, surface: Surface) -> str:
    """A surface's part of the file; by hand, for axes and tables on one line a row."""
    import tomli_w

    head = tomli_w.dumps(_as_table(surface))
    axes = ", ".join(
        f"{axis} = [{', '.join(f'{knot:.6g}' for knot in knots)}]"
        for axis, knots in surface.axes.items()
    )
    rounded = np.rint(np.asarray(surface.correction) * _PER_LOGARITHM).astype(np.int64)
    rows = rounded.reshape(-1, rounded.shape[-1] if rounded.ndim else 1)
    table = "\n".join(" ".join(map(str, row)) for row in rows.tolist())
    return (
        f'\n[surfaces."{name}"]\n{head}axes = {{ {axes} }}\n'
        f'correction_thousandths = """\n{table}"""\n'
    )


def _as_table(law: Law) -> dict[str, Any]:
    """A term, or of a surface what is no array."""
    keys = ("value", "low", "high") if isinstance(law, Term) else ("low", "high")
    numbers = {key: float(f"{getattr(law, key):.4g}") for key in keys}
    return {**numbers, "basis": law.basis.label, "origin": law.origin}


class _Table:
    """A TOML table whose keys are taken one by one, so that unknown ones are found."""

    def __init__(self, data: Mapping[str, Any], place: str) -> None:
        self._left = dict(data)
        self._place = place

    def place(self, key: str) -> str:
        return f"{self._place}{key}"

    def has(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str) -> Any:
        if key not in self._left:
            raise SpecError(f"{self.place(key)} is missing")
        return self._left.pop(key)

    def text(self, key: str) -> str:
        value = self.take(key)
        if not isinstance(value, str) or not value:
            raise SpecError(f"{self.place(key)} is {shown(value)}; it must be text")
        return value

    def number(self, key: str, named: str | None = None) -> float:
        """A number in the range of its key, or of `named`."""
        return RANGES[named or key].take(self.place(key), self.take(key))

    def table(self, key: str) -> "_Table":
        value = self.take(key)
        if not isinstance(value, dict):
            raise SpecError(f"{self.place(key)} is {shown(value)}; it must be a table")
        return _Table(value, f"{self.place(key)}.")

    def tables(self, key: str) -> dict[str, "_Table"]:
        if not self.has(key):
            return {}
        inner = self.table(key)
        return {name: inner.table(name) for name in list(inner._left)}

    def basis(self) -> Basis:
        value = self.text("basis")
        known = {each.label: each for each in Basis}
        if value not in known:
            raise SpecError(
                f"{self.place('basis')} is {shown(value)}; it must be one of {', '.join(known)}"
            )
        return known[value]

    def read(self, kind: type[ReadT], named: str | None = None, **made: Any) -> ReadT:
        """A dataclass whose fields are this table's keys.

        Args:
            named: the range of its numbers, if not that of their keys.
            made: fields that are made of other keys.
        """
        for each in fields(kind):
            if each.name in made:
                continue
            if each.type is float:
                made[each.name] = self.number(each.name, named)
            else:
                made[each.name] = self.basis() if each.type is Basis else self.text(each.name)
        self.end()
        return kind(**made)

    def end(self) -> None:
        if self._left:
            raise SpecError(f"{self.place(next(iter(self._left)))} is an unknown key")


def _profile(table: _Table) -> Profile:
    own = Profile(
        name=table.text("name"),
        device=_device(table.table("device")),
        ranks_per_node=int(table.number("ranks_per_node", "num_devices")),
        links=_links(table.tables("links")),
        surfaces={name: _surface(each) for name, each in table.tables("surfaces").items()},
        terms={name: _term(each) for name, each in table.tables("terms").items()},
    )
    like = table.table("like") if table.has("like") else None
    table.end()
    return own if like is None else _with_laws_of(own, like)


def _with_laws_of(own: Profile, like: _Table) -> Profile:
    """`own` with the other's laws where it has none of its own."""
    name, wider = like.text("profile"), like.number("wider")
    like.end()
    if name == own.name:
        raise SpecError(f"{like.place('profile')} is this profile itself")
    other = read_profile(name)

    def widened(laws: Mapping[str, Law], origin: str) -> dict[str, Law]:
        return {
            key: replace(
                law,
                low=law.low / wider,
                high=law.high * wider,
                basis=Basis.BOUND,
                origin=f"{origin}: {law.origin}",
            )
            for key, law in laws.items()
        }

    surfaces = widened(other.surfaces, f"as {name}, over this datasheet's roofline")
    terms = widened(other.terms, f"as {name}")
    return replace(own, surfaces={**surfaces, **own.surfaces}, terms={**terms, **own.terms})


def _device(table: _Table) -> Device:
    flops = table.table("flops_per_s")
    peaks = {dtype: flops.number(dtype, "flops_per_s") for dtype in ITEM_BYTES if flops.has(dtype)}
    flops.end()
    return table.read(Device, flops_per_s=peaks)


def _links(tables: Mapping[str, _Table]) -> dict[Link, LinkSheet]:
    links = {}
    for name, table in tables.items():
        known = {link.name.lower(): link for link in Link}
        if name not in known:
            raise SpecError(f"links.{name} must be one of {', '.join(known)}")
        links[known[name]] = table.read(LinkSheet)
    return links


def _term(table: _Table) -> Term:
    term = table.read(Term, "term")
    if not term.low <= term.value <= term.high:
        raise SpecError(
            f"{table.place('value')} must lie between low and high: "
            f"{term.low:g}, {term.value:g}, {term.high:g}"
        )
    return term


def _surface(table: _Table) -> Surface:
    axes, place = _axes(table), table.place("correction_thousandths")
    shape = tuple(map(len, axes.values()))
    correction = _numbers(table.text("correction_thousandths"), shape, place) / _PER_LOGARITHM
    surface = table.read(Surface, "correction", axes=axes, correction=correction)
    if not surface.low <= 1 <= surface.high:
        raise SpecError(
            f"{table.place('low')} and high must lie on both sides of 1: "
            f"{surface.low:g}, {surface.high:g}"
        )
    return surface


def _axes(table: _Table) -> dict[str, tuple[float, ...]]:
    place = table.place("axes")
    given = table.take("axes")
    if not isinstance(given, dict):
        raise SpecError(f"{place} is {shown(given)}; it must be a table")
    axes = {}
    for name, knots in given.items():
        if not isinstance(knots, list) or not knots:
            raise SpecError(f"{place}.{name} is {shown(knots)}; it must be a list of knots")
        axes[name] = tuple(RANGES["knot"].take(f"{place}.{name}", knot, "holds") for knot in knots)
        if any(b <= a for a, b in zip(axes[name], axes[name][1:], strict=False)):
            raise SpecError(f"{place}.{name} must rise")
    return axes


def _numbers(text: str, shape: tuple[int, ...], place: str) -> np.ndarray[Any, Any]:
    try:
        numbers = np.array([int(word) for word in text.split()], dtype=np.float64)
    except ValueError as error:
        raise SpecError(f"{place} must hold whole numbers: {error}") from None
    if len(numbers) != math.prod(shape):
        raise SpecError(f"{place} has {len(numbers)} numbers; the axes need {math.prod(shape)}")
    if np.abs(numbers).max(initial=0) > _LARGEST:
        raise SpecError(f"{place} has a number beyond ±{_LARGEST}")
    return numbers.reshape(shape)


_NAMED = re.compile(r"(?P<profile>.+)x(?P<count>[0-9]{1,7})")


@dataclass(frozen=True, eq=False)
class ModelledCluster:
    """Devices of one kind on nodes of `profile.ranks_per_node`; the last node may hold fewer."""

    profile: Profile
    num_devices: int

    @property
    def num_nodes(self) -> int:
        """Nodes that hold a device."""
        return -(-self.num_devices // self.profile.ranks_per_node)

    def __str__(self) -> str:
        return f"{self.profile.name}x{self.num_devices}"


def parse_cluster(text: str) -> ModelledCluster:
    """Read `h100x16`, or `mine.tomlx2` for a profile that `expertlane calibrate` wrote.

    Raises:
        SpecError: not of this form, no device, an unknown profile, or a damaged file.
    """
    found = _NAMED.fullmatch(text.strip())
    count = None if found is None else RANGES["num_devices"].parse(found["count"])
    if found is None or count is None:
        raise SpecError(
            f"cluster {shown(text)} is not PROFILExCOUNT, for example h100x16 (COUNT: "
            f"{RANGES['num_devices']}); profiles: "
            f"{', '.join(shipped_profiles())}, or a TOML file of expertlane calibrate"
        )
    return ModelledCluster(read_profile(found["profile"]), int(count))
