"""Profiles in TOML: what is written is read, and what is wrong is named in one line."""

from dataclasses import replace

import numpy as np
import pytest

from cli.screen import telling, tells
from expertlane.cost.laws import shipped_profiles
from expertlane.cost.laws.links import LinkModel
from expertlane.cost.laws.profile import (
    Device,
    Like,
    LinkSheet,
    Profile,
    Term,
    parse_cluster,
    read_profile,
    to_toml,
    write_profile,
)
from expertlane.cost.laws.times import Basis, Surface
from expertlane.errors import SpecError, UserError
from expertlane.spec.names import Link

_PROFILE = Profile(
    name="toy",
    device=Device("Toy", 1e9, 2e9, {"float32": 1e12, "bfloat16": 3e12}, 'a "sheet"'),
    ranks_per_node=4,
    links={Link.INTRA_NODE: LinkSheet(5e9, "sheet"), Link.INTER_NODE: LinkSheet(1e9, "sheet")},
    surfaces={
        "gemm.float32": Surface(
            {"m": (1.0, 2.5, 1e6), "n": (16.0, 32.0)},
            np.array([[0.001, -1.234], [0.0, 2.0], [0.5, 0.25]]),
            0.75,
            1.25,
            Basis.MEASURED,
            "here; 12 rows",
        ),
        "memory": Surface({"bytes": (1.0,)}, np.array([0.1]), 0.9, 1.1, Basis.FITTED, "there"),
    },
    terms={"launch_s": Term(5e-6, 0.0, 1e-5, Basis.BOUND, "assumed")},
)


def _assert_same(one, other):
    assert (one.name, one.device, one.ranks_per_node, one.links, one.terms) == (
        other.name,
        other.device,
        other.ranks_per_node,
        other.links,
        other.terms,
    )
    assert list(one.surfaces) == list(other.surfaces)
    for name, surface in one.surfaces.items():
        twin = other.surfaces[name]
        assert surface.correction == pytest.approx(twin.correction, abs=5e-4)
        fields = [(s.axes, s.low, s.high, s.basis, s.origin) for s in (surface, twin)]
        assert fields[0] == fields[1]


def test_round_trip(tmp_path):
    path = write_profile(_PROFILE, tmp_path / "new" / "toy.toml")
    read = read_profile(path)
    _assert_same(read, _PROFILE)
    assert to_toml(read) == path.read_text()
    assert [each.name for each in path.parent.iterdir()] == ["toy.toml"]


def test_without_laws(tmp_path):
    bare = replace(_PROFILE, surfaces={}, terms={})
    _assert_same(read_profile(write_profile(bare, tmp_path / "bare.toml")), bare)


_UNMEASURED = ("a100pcie", "a30", "h100pcie", "l4")
_OVER_PCIE = (*_UNMEASURED, "l40s", "rtxpro6000")


@pytest.mark.parametrize("name", sorted(shipped_profiles()))
def test_shipped_profiles_are_small_and_complete(name):
    path = shipped_profiles()[name]
    assert path.stat().st_size <= 90_000
    profile = read_profile(name)
    assert profile.name == name
    assert set(profile.links) == set(Link)
    assert {"launch_s", "graph_launch_s"} <= set(profile.terms)
    assert "gemm.bfloat16" in profile.surfaces
    for each in [*profile.surfaces.values(), *profile.terms.values()]:
        assert each.origin
        is_own = name not in _UNMEASURED and not each.origin.startswith("as ")
        assert (each.basis is Basis.BOUND) or is_own


def test_laws_taken_over_are_wider_bounds():
    h100, other = read_profile("h100"), read_profile("h100pcie")
    for name, surface in other.surfaces.items():
        known = h100.surfaces[name]
        assert surface.low == pytest.approx(known.low / 1.5)
        assert surface.high == pytest.approx(known.high * 1.5)
        assert surface.origin.startswith("as h100, over this datasheet's roofline: ")


@pytest.mark.parametrize("name", sorted(shipped_profiles()))
def test_cards_on_pcie_have_no_law_that_needs_nvlink(name):
    profile = read_profile(name)
    assert profile.has_nvlink == (name not in _OVER_PCIE)
    if profile.has_nvlink:
        return
    by_nvlink = ("dispatch.", "combine.", "all_reduce.multicast.", "forwarding_bytes_per_s.")
    assert not [key for key in (*profile.surfaces, *profile.terms) if key.startswith(by_nvlink)]
    assert profile.link_rate(Link.INTRA_NODE) <= 64e9  # PCIe Gen5, 16 lanes
    assert profile.ranks_per_node == 8
    assert parse_cluster(f"{name}x16").num_nodes == 2
    message = np.array([1e9])
    took = LinkModel(profile).kv_transfer(message, message, remote=False)
    assert message / profile.link_rate(Link.INTRA_NODE) < took.seconds < took.high


def test_laws_that_are_not_taken_over_are_named(tmp_path):
    like = Like("h100", 1.5, ("dispatch", "all_reduce.multicast"))
    path = write_profile(replace(_PROFILE, has_nvlink=False), tmp_path / "toy.toml", like)
    profile = read_profile(path)
    assert not profile.has_nvlink
    assert "all_reduce.custom.intra_node" in profile.surfaces
    assert "combine.low_latency.intra_node" in profile.surfaces
    assert not [key for key in profile.surfaces if key.startswith("dispatch")]
    assert "floor_s.dispatch.low_latency.intra_node" not in profile.terms
    assert "without = " not in to_toml(_PROFILE, Like("h100", 1.5))
    write_profile(_PROFILE, path, replace(like, without=("dispatches",)))
    with pytest.raises(SpecError, match=telling("like.without h100 dispatches")):
        read_profile(path)


_TEXT = to_toml(_PROFILE)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "toy"\n', "", "name missing"),
        ('name = "toy"', "name = 3", "name 3 string"),
        (
            "ranks_per_node = 4",
            "ranks_per_node = 4.5",
            "ranks_per_node 4.5",
        ),
        (
            "ranks_per_node = 4",
            "ranks_per_node = 0",
            "ranks_per_node 0",
        ),
        ("ranks_per_node = 4", "ranks_per_node = true", "ranks_per_node true"),
        ('origin = "', 'origin = ""  # "', "origin empty"),
        ('name = "toy"', 'name = ""', "name empty"),
        ("ranks_per_node = 4", "ranks_per_node = 4\ncolour = 1", "unknown colour"),
        ("memory_bytes = 1", "memory_bytes = -1", "device.memory_bytes -1000000000.0"),
        ("bfloat16 = 3", "int2 = 3", "device.flops_per_s.int2 unknown"),
        ("[links.inter_node]", "[links.wifi]", "links.wifi intra_node inter_node"),
        ("value = 5e-06", "value = 5", "terms.launch_s.value low high"),
        ("value = 5e-06", "value = nan", "terms.launch_s.value nan 0"),
        (
            'basis = "bound"',
            'basis = "hope"',
            "hope measured fitted bound",
        ),
        ("low = 0.75", "low = 1.5", "surfaces.gemm.float32.low high"),
        ("m = [1, 2.5, 1e+06]", "m = [1, 2.5, 2]", "surfaces.gemm.float32.axes.m rise"),
        ("m = [1, 2.5, 1e+06]", "m = []", "axes.m empty list"),
        ("m = [1, 2.5, 1e+06]", "m = [0, 1, 2]", "axes.m 0.0"),
        ("1 -1234", "1", "5 6"),
        ("1 -1234", "1 x", "whole numbers"),
        ("1 -1234", "1 -99999", "beyond ±20000"),
        ("[device]", "[device", "malformed TOML"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path, old, new, said):
    assert old in _TEXT
    path = tmp_path / "bad.toml"
    path.write_text(_TEXT.replace(old, new, 1))
    with pytest.raises(SpecError) as raised:
        read_profile(path)
    text = str(raised.value)
    assert tells(text, said)
    assert text.startswith(str(path))
    assert "\n" not in text


def test_a_rack_is_one_node_of_many_hosts(tmp_path):
    rack, server = read_profile("gb200"), read_profile("b200")
    assert (rack.ranks_per_node, rack.devices_per_host) == (72, 4)
    assert [rack.num_hosts(num) for num in (1, 4, 8, 72)] == [1, 1, 2, 18]
    assert [server.num_hosts(num) for num in (1, 8, 9)] == [1, 1, 2]
    assert read_profile(write_profile(rack, tmp_path / "rack.toml")).devices_per_host == 4
    assert parse_cluster("gb200x72").num_nodes == 1
    assert parse_cluster("gb200x144").num_nodes == 2


def test_what_fills_holes_is_written_too(tmp_path):
    bare = replace(_PROFILE, surfaces={"experts.nvfp4": _PROFILE.surfaces["memory"]}, terms={})
    read = read_profile(write_profile(bare, tmp_path / "bare.toml", Like("gb200", 2)))
    assert read.surfaces["gemm.nvfp4"].basis is Basis.BOUND
    assert read.surfaces["experts.nvfp4"].basis is Basis.FITTED
    assert "experts.nvfp4.min_latency" not in read.surfaces  # of an operation with a law


def test_like_must_name_another_profile(tmp_path):
    path = tmp_path / "bad.toml"
    for like, said in [
        ('{ profile = "toy", wider = 2 }', "like.profile itself"),
        ('{ profile = "h100", wider = 0.5 }', "like.wider 0.5 1 1,000"),
        ('{ profile = "h101", wider = 2 }', "h101"),
    ]:
        path.write_text(f"like = {like}\n{_TEXT}")
        with pytest.raises(SpecError, match=telling(said)):
            read_profile(path)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(SpecError, match=telling("h101 h100")):
        read_profile("h101")
    with pytest.raises(SpecError, match=telling("zx a100 b200")):  # near none: all are named
        read_profile("zx")
    with pytest.raises(SpecError, match=telling("none.toml No such file")):
        read_profile(tmp_path / "none.toml")
    path = tmp_path / "bytes.toml"
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(SpecError, match=r"bytes\.toml: byte 8 is not UTF-8"):
        read_profile(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_profile(_PROFILE, tmp_path / "file" / "toy.toml")


def test_a_profile_without_a_link_that_is_needed():
    """A machine of one device has none; a layout of two must not end in a traceback."""
    profile = replace(read_profile("h100"), links={})
    with pytest.raises(SpecError, match=telling("h100 links.intra_node")):
        profile.link_rate(Link.INTRA_NODE)
