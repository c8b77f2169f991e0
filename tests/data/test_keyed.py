"""Keyed random numbers: fixed for ever, independent of how they are asked for, uniform."""

from __future__ import annotations

import numpy as np

from dataloaders.keyed import keyed_u64, keyed_uniform


def test_the_numbers_never_change():
    # A change would silently give every resumed run other images.
    assert [hex(int(v)) for v in keyed_u64(1, 2, np.array([0, 1, -1]))] == [
        "0x2e8747cab4a7bc9c",
        "0x90a1c2a0d6a1c3c2",
        "0x0",
    ]


def test_a_number_does_not_depend_on_its_neighbours():
    table = keyed_uniform(7, 3, np.arange(50)[:, None], np.arange(23)[None, :])
    assert table.shape == (50, 23)
    assert table[31, 5] == keyed_uniform(7, 3, 31, 5)[0]


def test_every_word_of_the_key_counts_and_so_does_their_order():
    keys = [(0, 0), (0, 1), (1, 0), (0, 0, 0), (2**40, 1), (1, 2**40), (-1, 0)]
    assert len({int(keyed_u64(*key)[0]) for key in keys}) == len(keys)


def test_uniform_in_value_and_between_neighbouring_keys():
    u = keyed_uniform(np.arange(200_000))
    counts, _ = np.histogram(u, bins=100, range=(0, 1))
    chi2 = ((counts - 2000) ** 2 / 2000).sum()
    assert chi2 < 149  # the 99.9 % quantile of chi-square with 99 degrees of freedom; the numbers are fixed
    # Correlation of 200,000 independent pairs has a standard deviation of 0.0022; 4 of them.
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.009
