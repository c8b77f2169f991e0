"""Make random numbers that are a pure function of a key: no state is saved, and every rank and machine has the same.

A generator object would have to be advanced, and saved, in step with the data. Here number k of the sample at
(seed, epoch, position) is a hash of those four integers and the number of its stream, so any rank can compute it for
any sample at any time. The hash is the finaliser of SplitMix64 (Steele, Lea, Flood, 2014) applied after each word of
the key. The arithmetic is plain 64-bit integer arithmetic, so unlike numpy's Generator methods it cannot change with a
library's version.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


def fold_seed(seed: int) -> int:
    """Return ``seed`` itself if it fits into 64 signed bits, else a hash of it in [0, 2**63).

    Clocks and the numbers of jobs can be longer than the generators take.
    """
    if -(2**63) <= seed < 2**63:
        return seed
    rest, words = abs(seed), [int(seed < 0)]
    while rest:
        words.append(rest & (2**63 - 1))
        rest >>= 63
    return int(keyed_u64(*words)[0] >> np.uint64(1))


def keyed_u64(*words: int | np.ndarray) -> np.ndarray:
    """Hash integer words that broadcast against each other, into uint64.

    Negative words wrap. An int that does not fit into 64 bits is folded (`fold_seed`).

    >>> keyed_u64(0, 1, np.arange(3)).shape
    (3,)
    """
    state = np.zeros((1,), dtype=np.uint64)
    for word in words:
        word = fold_seed(word) if isinstance(word, int) else word
        word_u64 = np.atleast_1d(np.asarray(word)).astype(np.int64).view(np.uint64)
        # state * 3 keeps (a, b) and (b, a) apart; the golden step keeps all-zero keys away from the fixed point 0.
        state = _mix(state * np.uint64(3) + word_u64 + _GOLDEN)
    return state


def keyed_uniform(*words: int | np.ndarray) -> np.ndarray:
    """Return uniform float64 in [0, 1) from the top 53 bits of `keyed_u64`, in the same shape."""
    return (keyed_u64(*words) >> _S11).astype(np.float64) * 2.0**-53
