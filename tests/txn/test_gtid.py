"""Names of transactions and branches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordlib.errors import InvariantViolation
from coordlib.txn import gtid as names
from coordlib.txn.gtid import BranchName, GtidMinter

GTIDS = st.binary(min_size=16, max_size=16)
TAGS = st.binary(min_size=5, max_size=5)
BRANCHES = st.builds(
    BranchName,
    TAGS,
    st.binary(min_size=2, max_size=2),
    st.integers(0, 255),
    st.just(b"") | TAGS,
    st.binary(max_size=names.EVIDENCE_SIZE_MAX),
)


@given(
    times=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=50), session=st.integers(1, (1 << 63) - 1)
)
def test_gtids_rise_whatever_the_estimate_of_log_time_does(times: list[int], session: int) -> None:
    """Byte order is the order of minting, and none comes twice."""
    minter = GtidMinter()
    minted = [minter.mint(time, session) for time in times]
    assert minted == sorted(set(minted))
    assert all(names.session_of(gtid) == session for gtid in minted)
    assert all(names.mint_ms_of(gtid) >= time for gtid, time in zip(minted, times, strict=True))


def test_a_full_counter_carries_into_time() -> None:
    """More gtids within a millisecond than the counter has numbers go on in the next."""
    minter = GtidMinter()
    minted = [minter.mint(5, 7) for _ in range(70_000)]
    assert minted == sorted(set(minted))
    assert {5, 6} == {names.mint_ms_of(gtid) for gtid in minted}


def test_a_log_time_beyond_the_layout_is_refused() -> None:
    """48 bits of milliseconds end in the year 10889; nothing wraps round."""
    minter = GtidMinter()
    assert minter.mint((1 << 48) - 1, 1)[:6] == b"\xff" * 6
    with pytest.raises(InvariantViolation):
        minter.mint(1 << 48, 1)


@given(cluster=TAGS, other=TAGS, gtid=GTIDS, branch=BRANCHES)
def test_names_go_through_a_database_and_back(
    cluster: bytes, other: bytes, gtid: bytes, branch: BranchName
) -> None:
    """They fit, have only characters that need no quoting, and another cluster does not take them for its own."""
    bqual = branch.pack()
    assert BranchName.unpack(bqual) == branch
    gtrid, text = names.gtrid_of(cluster, gtid), names.bqual_text(bqual)
    assert len(gtrid) == 34
    assert 15 <= len(text) <= 48  # XA: at most 64
    assert set(gtrid + text) <= set("0123456789ABCDEFGHIJKLMNOPQRSTUV")
    assert names.parse_gtrid(cluster, gtrid) == gtid
    assert names.parse_bqual(text) == bqual
    gid = names.postgresql_gid(cluster, gtid, bqual)
    assert len(gid) < 200
    assert gid.startswith("1129271876_")
    assert names.parse_postgresql_gid(cluster, gid) == (gtid, bqual)
    if other != cluster:
        assert names.parse_gtrid(other, gtrid) is None
        assert names.parse_postgresql_gid(other, gid) is None


@given(bqual=st.binary(max_size=40))
def test_what_is_a_bqual_has_one_meaning(bqual: bytes) -> None:
    """Bytes that are read as a bqual are what would be written for it; flags without what they announce are not."""
    name = BranchName.unpack(bqual)
    assert name is None or name.pack() == bqual


def test_a_flag_without_its_field_is_no_bqual() -> None:
    """A shortened name is not taken for another branch's."""
    full = BranchName(b"12345", b"ab", 1, b"67890", b"e").pack()
    assert [len(full[:end]) for end in range(len(full)) if BranchName.unpack(full[:end])] == []


@given(text=st.text(max_size=60))
def test_foreign_names_are_not_ours(text: str) -> None:
    """Whatever others keep in the same database is left alone."""
    cluster = names.cluster_tag(b"shop")
    assert names.parse_gtrid(cluster, text) is None
    assert names.parse_postgresql_gid(cluster, text) is None
    assert names.parse_postgresql_gid(cluster, f"1129271876_{text}_{text}") is None


@pytest.mark.parametrize("gtrid", ["lower", "0", "=", "0" * 33 + "1", " " + "0" * 33])
def test_a_name_that_is_not_canonical_is_not_ours(gtrid: str) -> None:
    """One name has one spelling: no two spellings are taken for one transaction."""
    assert names.parse_gtrid(b"\0" * 5, gtrid) is None


def test_the_names_never_change() -> None:
    """They are in databases' logs: a new version must find what an old one has prepared."""
    cluster, resource = names.cluster_tag(b"shop"), names.resource_tag("orders")
    gtid = names.join_gtid(1_700_000_000_123, 42, 3)
    assert gtid.hex() == "018bcfe5687b000000000000002a0003"
    bqual = BranchName(resource, names.node_tag("n1"), 1).pack()
    assert names.gtrid_of(cluster, gtid) == EXPECTED_GTRID
    assert names.bqual_text(bqual) == EXPECTED_BQUAL
    assert names.postgresql_gid(cluster, gtid, bqual) == EXPECTED_GID


EXPECTED_GTRID = "9EGVIRHM065SVPB8FC00000000000AG00C"
EXPECTED_BQUAL = "HHPGBCD1AR9G200"
EXPECTED_GID = "1129271876_OUVHVklSSE0wNjVTVlBCOEZDMDAwMDAwMDAwMDBBRzAwQw==_SEhQR0JDRDFBUjlHMjAw"
