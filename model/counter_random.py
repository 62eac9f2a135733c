"""Random numbers that are a pure function of where they are used: no state, nothing to restore.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), with the
constants and test vectors of the authors' Random123 library.
"""

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """counter: [4, n], key: [2, n], all below 2**32 -> [4, n] random words below 2**32."""
    even, odd = counter[0::2], counter[1::2]
    for _ in range(_ROUNDS):
        product = even * _MULTIPLIERS
        even, odd = (product[::-1] >> _WORD) ^ odd ^ key, product[::-1] & _LOW
        key = (key + _WEYL) & _LOW
    return np.stack([even[0], odd[0], even[1], odd[1]])


def uniform(seed: NDArray[np.uint64], stream: NDArray[np.uint64], position: NDArray[np.uint64]) -> NDArray[np.float64]:
    """[n] numbers in [0, 1), 53 bits each; seed, stream, position: [n]."""
    counter = np.stack([position & _LOW, position >> _WORD, stream & _LOW, stream >> _WORD])
    words = philox(counter, np.stack([seed & _LOW, seed >> _WORD]))
    return ((words[0] << np.uint64(21)) | (words[1] >> np.uint64(11))) * 2.0**-53
