"""What laws of cards are fitted to: every card's kernels and transfers, without their tables."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "calibration"))

from laws import laws_of
from links_tables import COUNTS, far_sources_of_laws, sources_of_laws
from sheet import CARDS

from expertlane.cost.laws.profile import read_profile


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_profile_has_the_laws_that_its_card_is_fitted_to(card):
    """Those beyond are as of another card."""
    profile = read_profile(card.sheet.name)
    fitted = {law.name for law in laws_of(card)} | set(sources_of_laws(card)) - {COUNTS}
    own = {name for name, law in profile.surfaces.items() if not law.origin.startswith("as ")}
    assert own == fitted
    for law in laws_of(card):
        tables = [each.table.path for each in law.sources]
        assert all(path in profile.surfaces[law.name].origin for path in tables), law.name


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_transfers_are_of_their_own_tables_and_grow_with_what_is_sent(card):
    sources = {**sources_of_laws(card), **far_sources_of_laws(card)}
    for law, of_law in sources.items():
        kind = law.split(".")[1]
        for each in of_law:
            nic, near = each.bytes_of(np.array([128.0, 256.0]))
            over_nics = law.endswith("inter_node")
            grows = nic if over_nics else near
            assert law == COUNTS or grows[1] > grows[0] > 0, law
            assert (nic > 0).all() == (over_nics and law != COUNTS)
            assert (each.nodes > 1) == over_nics
            is_deepep = kind in ("low_latency", "forwarded") or law == COUNTS
            assert ("deepep" in each.table.path) == is_deepep, law
            assert ("alltoall" in each.table.path) == kind.endswith("sided"), law
