"""Laws of computation, fitted: GEMM, experts, attention of all kinds, other mixers, memory.

Every law is fitted to one table of one framework, so that it is one implementation's law; latent
prefill has two forms, each with its own `key_dim`, and so two tables.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from quality import Quality
from tables import SOURCE, Array, Columns, Part, Table, group_numbers, read, without_spikes

from expertlane.calibrate.fit import Rows, fit_surface
from expertlane.cost.laws.device import DeviceModel, roofline
from expertlane.cost.laws.profile import Profile
from expertlane.cost.laws.times import Basis, Surface
from expertlane.cost.step.operation import BYTES_ALONE, STATES, OpKind

Sizes = Mapping[str, Array | float]


@dataclass(frozen=True)
class Source:
    """A table as rows of a kind of operation.

    Attributes:
        sizes: those that `SIZES` names for the kind.
        shape: columns by which rows are left out together.
        along: columns along which time must not fall, or, with a minus, must not rise.
    """

    table: Table
    sizes: Callable[[Columns], Sizes]
    shape: tuple[str, ...]
    along: tuple[str, ...]


@dataclass(frozen=True)
class Law:
    """What is fitted.

    Attributes:
        axes: by name, knots.
        what: which kernels the rows timed.
        smoothness: as `fit_correction` has it.
        library: of a law beside the usual one of its kind and type.
    """

    kind: OpKind
    dtype: str
    sources: tuple[Source, ...]
    axes: Mapping[str, Sequence[float]]
    what: str
    smoothness: float = 0.3
    library: str = ""

    @property
    def name(self) -> str:
        """Of its surface."""
        if self.kind in BYTES_ALONE:
            return str(self.kind)
        return f"{self.kind}.{self.dtype}{f'.{self.library}' if self.library else ''}"


def fit_law(law: Law, sheet: Profile, with_judging: bool) -> tuple[Surface, Quality]:
    """A law over a datasheet's rooflines, and how well it fits."""
    parts, num_cleaned, num_cached = [], 0, 0
    for source in law.sources:
        columns, dropped = without_spikes(read(source.table, Part.FITTED), *source.along)
        num_cleaned += dropped
        if law.kind in STATES:
            columns, dropped = _without_cached(law, source, columns, sheet)
            num_cached += dropped
        parts.append(rows_of(law, source, columns, sheet))
    rows = joined(parts)
    path = " and ".join(dict.fromkeys(source.table.path for source in law.sources))
    cached = f", {num_cached} rows of caches" if num_cached else ""
    surface, held_out = fit_surface(
        rows,
        law.axes,
        basis=Basis.FITTED,
        origin=f"{SOURCE}, {path}: {law.what}; {num_cleaned} spikes left out{cached}",
        smoothness=law.smoothness,
    )
    return surface, Quality(
        name=law.name,
        source=path,
        num_fitted=len(rows),
        num_cleaned=num_cleaned + num_cached,
        held_out=held_out,
        judged=_judge(law, surface, sheet) if with_judging else {},
    )


def _without_cached(
    law: Law, source: Source, columns: Columns, sheet: Profile
) -> tuple[Columns, int]:
    """Drop rows faster than the memory: a state is in no cache when its layer's turn comes again.

    Returns:
        The rows kept, and how many were dropped.
    """
    least_s = roofline(sheet.device, law.kind, law.dtype, source.sizes(columns)).seconds
    keep = columns["seconds"] >= least_s
    return {name: values[keep] for name, values in columns.items()}, int((~keep).sum())


def rows_of(law: Law, source: Source, columns: Columns, sheet: Profile) -> Rows:
    """Rows of a source's table as a fit takes them."""
    floor_s = sheet.terms[f"{law.kind}_floor_s"].value
    base = roofline(sheet.device, law.kind, law.dtype, source.sizes(columns), floor_s)
    others = tuple(name for name in columns if name not in source.shape)
    seconds = columns["seconds"]
    return Rows(
        at={axis: np.broadcast_to(base.at[axis], seconds.shape) for axis in law.axes},
        roofline_s=base.seconds,
        seconds=seconds,
        shape=group_numbers(columns, without=others),
    )


def joined(parts: list[Rows]) -> Rows:
    """Rows of several sources; no shape is shared between them."""
    shapes, before = [], 0
    for part in parts:
        shapes.append(part.shape + before)
        before += int(part.shape.max()) + 1
    return Rows(
        at={axis: np.concatenate([part.at[axis] for part in parts]) for axis in parts[0].at},
        roofline_s=np.concatenate([part.roofline_s for part in parts]),
        seconds=np.concatenate([part.seconds for part in parts]),
        shape=np.concatenate(shapes),
    )


def _judge(law: Law, surface: Surface, sheet: Profile) -> dict[str, Array]:
    """Logarithms of measured over predicted of rows that no fit has seen, by what they are."""
    profile = Profile(
        name=sheet.name,
        device=sheet.device,
        ranks_per_node=sheet.ranks_per_node,
        links=sheet.links,
        surfaces={law.name: surface},
        terms=sheet.terms,
    )
    model = DeviceModel(profile)
    parts = [Part.LARGEST] + ([Part.SKEWED] if law.kind is OpKind.EXPERTS else [])
    judged = {}
    for part in parts:
        errors = []
        for source in law.sources:
            columns = read(source.table, part)
            times = model.times(law.kind, law.dtype, source.sizes(columns))
            errors.append(np.log(columns["seconds"] / times.seconds))
        judged[part.value] = np.concatenate(errors)
    return judged
