"""The cluster that a user names: so many devices of one profile, for example `h100x16`."""

import re
from dataclasses import dataclass

from expertlane.cost.profile import Profile
from expertlane.cost.profile_file import read_profile, shipped_profiles
from expertlane.errors import SpecError
from expertlane.spec.ranges import RANGES, shown

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
