"""Tables of the counting model, all made from Python integers: squash, stretch, reciprocals, bit histories.

Probabilities are 16-bit integers (65536 is one). Logarithms of odds are integers of 1/256 nat between -LIMIT and LIMIT.
"""
import functools

import numpy as np

ONE = 1 << 16                    # probability one
NAT = 1 << 8                     # one natural unit of log odds
LIMIT = 12 * NAT - 1             # the largest log odds: p = 1 - 6e-6, the least that 16 bits can tell from one
FRACTION_BITS = 96               # of the fixed-point numbers that the tables are made with
COUNT_LIMIT = 1024               # entries of the table of reciprocals

# A bit history is a pair (n0, n1); with n1 <= n0, n0 is at most HISTORY_BOUNDS[n1]. The longer is one count, the
# shorter may be the other: 255 histories in all, one byte.
HISTORY_BOUNDS = (20, 48, 15, 8, 6, 5)
LAST_BIT_UP_TO = 17              # histories of at most so many bits also know which bit came last


# --- logistic functions ---

def _exponential_of_step():
    """Return e^(1/NAT) as a fixed-point integer, by its series."""
    total = 0
    term = 1 << FRACTION_BITS
    n = 0
    while term:
        total += term
        n += 1
        term //= n * NAT
    return total


@functools.lru_cache(None)
def odds():
    """Return the fixed-point integers e^(x/NAT) for x = 0 … LIMIT."""
    step = _exponential_of_step()
    values = [1 << FRACTION_BITS]
    for _ in range(LIMIT):
        values.append(values[-1] * step >> FRACTION_BITS)
    return tuple(values)


@functools.lru_cache(None)
def squash_table():
    """Return the probabilities of log odds -LIMIT … LIMIT, int32; entry x + LIMIT; never 0, never ONE."""
    table = np.zeros(2 * LIMIT + 1, np.int32)
    unit = 1 << FRACTION_BITS
    for x, value in enumerate(odds()):
        p = (ONE * value + (value + unit) // 2) // (value + unit)
        p = min(p, ONE - 1)
        table[LIMIT + x] = p
        table[LIMIT - x] = ONE - p
    return table


@functools.lru_cache(None)
def stretch_table():
    """Return the log odds of probabilities 0 … ONE - 1, int32: the nearest step whose odds are not above p's."""
    table = np.zeros(ONE, np.int32)
    values = odds()
    unit = 1 << FRACTION_BITS
    x = 0
    for p in range(ONE // 2, ONE):
        # Odds p / (ONE - p) >= e^(x/NAT), without a division.
        while x < LIMIT and p * unit >= values[x + 1] * (ONE - p):
            x += 1
        table[p] = x
        table[ONE - p] = -x
    table[0] = -LIMIT
    return table


@functools.lru_cache(None)
def reciprocal_table():
    """Return ONE / (n + 1.5) for n = 0 … COUNT_LIMIT - 1, int32: what the n-th observation weighs."""
    return np.array([2 * ONE // (2 * n + 3) for n in range(COUNT_LIMIT)], np.int32)


# --- bit histories ---

def _histories_of(n0, n1):
    """Return how many histories have the counts (n0, n1): 0 too many, 2 where the last bit is known, else 1."""
    larger = max(n0, n1)
    smaller = min(n0, n1)
    if smaller >= len(HISTORY_BOUNDS) or larger > HISTORY_BOUNDS[smaller]:
        return 0
    if smaller > 0 and larger + smaller <= LAST_BIT_UP_TO:
        return 2
    return 1


def _surprised(count):
    """Return what is left of the count of one bit when the other one comes: 7 and more are nearly forgotten."""
    return sum(count >= threshold for threshold in (1, 2, 3, 4, 5, 7, 8))


def _following(n0, n1, bit):
    """Return the counts after bit, within the bounds."""
    if n0 < n1:
        n1, n0 = _following(n1, n0, 1 - bit)
        return n0, n1
    if bit:
        n1 += 1
        n0 = _surprised(n0)
    else:
        n0 += 1
        n1 = _surprised(n1)
    # Counts beyond the bounds shrink in proportion.
    while not _histories_of(n0, n1):
        if n1 < 2:
            n0 -= 1
        else:
            n0 = (n0 * (n1 - 1) + n1 // 2) // n1
            n1 -= 1
    return n0, n1


@functools.lru_cache(None)
def histories():
    """Return all histories (n0, n1, last bit), fewest bits first; the index is the state, 0 is nothing seen."""
    listed = []
    most = max(HISTORY_BOUNDS) + len(HISTORY_BOUNDS)
    for total in range(most):
        for n1 in range(total + 1):
            n0 = total - n1
            count = _histories_of(n0, n1)
            if count == 2:
                listed.append((n0, n1, 0))
                listed.append((n0, n1, 1))
            elif count == 1:
                listed.append((n0, n1, 0 if n0 >= n1 else 1))
    assert len(listed) <= 256
    return tuple(listed)


@functools.lru_cache(None)
def following_table():
    """Return the state after each bit, (512,) uint8: entry 2 · state + bit."""
    index = {history: state for state, history in enumerate(histories())}
    table = np.zeros(512, np.uint8)
    for state, (n0, n1, _) in enumerate(histories()):
        for bit in (0, 1):
            m0, m1 = _following(n0, n1, bit)
            single = (m0, m1, 0 if m0 >= m1 else 1)
            table[2 * state + bit] = index.get((m0, m1, bit), index.get(single, 0))
    return table


@functools.lru_cache(None)
def certain_table():
    """Return which states have seen one kind of bit alone, (256,) bool."""
    table = np.zeros(256, np.bool_)
    for state, (n0, n1, _) in enumerate(histories()):
        table[state] = min(n0, n1) == 0 < max(n0, n1)
    return table


@functools.lru_cache(None)
def initial_chances():
    """Return the first guess (n1 + 1/8) / (n0 + n1 + 1/4) of each state, (256,) int64, 22-bit probabilities."""
    table = np.full(256, 1 << 21, np.int64)
    for state, (n0, n1, _) in enumerate(histories()):
        table[state] = ((8 * n1 + 1) << 22) // (8 * (n0 + n1) + 2)
    return table
