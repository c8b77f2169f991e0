"""Keyed random numbers: fixed for ever, independent of how they are asked for, uniform."""

from __future__ import annotations

import numpy as np

from mirl.keyed import keyed_u64, keyed_uniform


def test_the_numbers_never_change():
    # A change would silently give every resumed run other images.
    found = [hex(int(value)) for value in keyed_u64(1, 2, np.array([0, 1, -1]))]
    assert found == ["0x9f34293988a76413", "0xbe74ff43d58d89d4", "0xf3e13e9a9ebcedc6"]


def test_the_hash_is_splitmix64_in_plain_integers():
    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    for words in ((0,), (5, 2**63 - 1), (-3, 7, 11)):
        state = 0
        for word in words:
            state = mix((state * 3 + word + 0x9E3779B97F4A7C15) % 2**64)
        assert int(keyed_u64(*words)[0]) == state


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
