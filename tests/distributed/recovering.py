"""Lose ranks of a pool, replace them, and see that all hear from all others."""

import numpy as np
import pytest

from distributed.on_ranks import WAYS, Exchange, ExchangeAmong, Lose, LoseAmong
from engine.ranks.processes import wait_until
from expertlane.errors import RanksLostError


def check_exchange(pool, value):
    """All ranks hear from all others what they should, in the pool's epoch."""
    told = pool.call(Exchange(value))
    num_ranks = pool.num_ranks
    for rank, heard in enumerate(told):
        rows = [[pool.epoch, source, rank, value] for source in range(num_ranks)]
        np.testing.assert_array_equal(heard, rows)


def check_among(pool, value):
    """Those that are present hear from each other."""
    ranks = sorted(pool.present)
    for rank, heard in zip(ranks, pool.call(ExchangeAmong(ranks, value)), strict=True):
        rows = [[pool.epoch, source, rank, value] for source in ranks]
        np.testing.assert_array_equal(heard, rows)


def lose(pool, ways):
    """Lose ranks during an exchange; the error."""
    with pytest.raises(RanksLostError) as caught:
        pool.call(Lose(ways))
    return caught.value


def replace(pool, lost):
    """Begin epochs until no more ranks are lost; those that were replaced."""
    for _ in range(len(WAYS)):
        try:
            pool.begin_epoch(lost)
        except RanksLostError as error:
            lost |= error.ranks
        else:
            return lost
    raise AssertionError("ranks are lost for ever")


def lose_among(pool, ways):
    """Lose ranks while those that are present hear from each other; which were lost."""
    with pytest.raises(RanksLostError) as caught:
        pool.call(LoseAmong(sorted(pool.present), ways))
    return caught.value.ranks


def lose_for_good(pool, ways):
    """Lose ranks, and go on without them."""
    while left := ways.keys() - pool.absent:  # a rank may leave an epoch before it is lost
        lost = lose_among(pool, {rank: ways[rank] for rank in left})
        while lost:
            try:
                pool.begin_epoch(lost, replaces=False)
                lost = frozenset()
            except RanksLostError as error:
                lost = error.ranks


def start(pool, ranks):
    """Start ranks ahead, and serve until they are up."""
    pool.start(ranks)
    assert pool.starting >= {*ranks}
    wait_for(pool, lambda: pool.ahead >= {*ranks})
    assert not pool.starting & {*ranks}


def wait_for(pool, condition):
    """Serve, as far as there is something to do, until it is true."""

    def looks():
        pool.check()
        return condition()

    assert wait_until(looks, seconds=30)
