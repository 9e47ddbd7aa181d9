"""A cluster as the cost model knows it: datasheet figures and laws of time, in one TOML file."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from expertlane.cost.laws.surface import Surface
from expertlane.cost.laws.times import Basis
from expertlane.errors import SpecError
from expertlane.spec.names import Link
from expertlane.spec.ranges import Strict


@dataclass(frozen=True)
class Term:
    """One number with its bounds, and where it comes from.

    Attributes:
        basis, origin: as in `Surface`.
    """

    value: float
    low: float
    high: float
    basis: Basis
    origin: str


@dataclass(frozen=True)
class Device(Strict):
    """One GPU, or one rank's share of a CPU.

    Attributes:
        memory_bytes, memory_bytes_per_s: its memory and what reads it at best.
        flops_per_s: dense peak of products with weights of a type: `float32`, `float16`,
            `bfloat16`, `float8`, `nvfp4`, `mxfp4`; of a type that is widened as it is read, the
            peak of what it becomes.
        origin: source of these figures.
        float8_attention: the type that attention over a float8 cache computes in: keys and values
            are widened as they are read, or multiplied as they are.
    """

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    origin: str
    float8_attention: str = "bfloat16"


@dataclass(frozen=True)
class LinkSheet(Strict):
    """One kind of link, per device and direction.

    Attributes:
        bytes_per_s: rate by the datasheet.
        origin: source of the figure.
    """

    bytes_per_s: float
    origin: str


@dataclass(frozen=True, eq=False)
class Profile:
    """A device, its links, and the laws of time of both.

    Attributes:
        ranks_per_node: devices of a node, which is an NVLink domain if there is NVLink.
        links: by kind of link.
        surfaces: by what they are for and a type or variant: `gemm.bfloat16`,
            `all_gather.intra_node`; `cost.laws.device` and `cost.laws.links` say which they use.
        terms: single numbers by name: floors, overheads, contention.
        devices_per_host: devices per operating system, where a node spans several; else 0.
        framework: whose corrections its laws and terms have, by name; "" for none.
        step_factor: factor that those corrections put on laws.
        has_nvlink: whether devices of a node reach each other's memory; else over PCIe alone.
    """

    name: str
    device: Device
    ranks_per_node: int
    links: Mapping[Link, LinkSheet]
    surfaces: Mapping[str, Surface] = field(default_factory=dict)
    terms: Mapping[str, Term] = field(default_factory=dict)
    devices_per_host: int = 0
    framework: str = ""
    step_factor: float = 1.0
    has_nvlink: bool = True

    def num_hosts(self, num_devices: int) -> int:
        """Machines that a deployment is started on."""
        return -(-num_devices // (self.devices_per_host or self.ranks_per_node))

    def link_rate(self, link: Link) -> float:
        """Bytes per second of a link.

        Raises:
            SpecError: the profile has no figure for it.
        """
        sheet = self.links.get(link)
        if sheet is None:
            raise SpecError(
                f"profile {self.name} has no links.{link.name.lower()}, which this layout needs"
            )
        return sheet.bytes_per_s
