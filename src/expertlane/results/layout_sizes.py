"""A layout in files."""

from dataclasses import dataclass

from expertlane.results.strict import Strict
from expertlane.spec.layout import Layout


@dataclass(frozen=True)
class LayoutSizes(Strict):
    """A layout as the file spells it.

    Raises:
        SpecError: the sizes break a layout's rules.
    """

    replicas: int
    pp_size: int
    dp_size: int
    tp_size: int
    ep_size: int

    def __post_init__(self) -> None:
        _ = self.layout

    @classmethod
    def of(cls, layout: Layout) -> "LayoutSizes":
        """The sizes of `layout`."""
        return cls(layout.replicas, layout.pp, layout.dp, layout.tp, layout.ep)

    @property
    def layout(self) -> Layout:
        """Back again."""
        return Layout(self.replicas, self.pp_size, self.dp_size, self.tp_size, self.ep_size)
