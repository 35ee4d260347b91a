"""Tables of exp, activations, sines and cosines for exact.py, from Python integers: the same on every machine.

Integers with FRACTION fractional bits, rounded to what a table holds at the end; nothing comes from libm.
"""
import functools
import math

import numpy as np

FRACTION = 128                                  # fractional bits of the integers that tables are computed with
ONE = 1 << FRACTION
EXP_STEPS = 256                                 # entries per nat of the exponential tables
ACTIVATION_ENTRIES = 8192                       # of the activation table, half of them for negative inputs


def _exp_neg(n, d):
    """exp(-n/d) with FRACTION bits for integers n >= 0, d > 0: Taylor series of a 1024th, squared ten times."""
    x, total, term, k = (n << FRACTION) // d >> 10, ONE, ONE, 1
    while term:
        term = term * x // k >> FRACTION
        total += -term if k % 2 else term
        k += 1
    for _ in range(10):
        total = total * total >> FRACTION
    return total


@functools.lru_cache(None)
def _constants():
    """pi (Machin) and ln 10000 = 16 ln 2 + 4 ln 625/512... = 4 (3 ln 2 + ln 5/4), with FRACTION bits."""
    def series(n, alternate):                   # arctan(1/n), or artanh(1/n)
        total, term, k = 0, ONE // n, 1
        while term:
            total += -(term // k) if alternate and k % 4 == 3 else term // k
            term, k = term // (n * n), k + 2
        return total
    return 4 * (4 * series(5, True) - series(239, True)), 4 * (3 * 2 * series(3, False) + 2 * series(9, False))


@functools.lru_cache(None)
def exp_table(top, floor):
    """Integers top·exp(-i/EXP_STEPS), i = 0, 1, ..., until they round to 0; at least floor; float64 (n,)."""
    values = [top]
    while values[-1]:
        values.append((_exp_neg(len(values), EXP_STEPS) * top + ONE // 2) >> FRACTION)
    return np.maximum(np.array(values, np.float64), floor)


@functools.lru_cache(None)
def activation_table(kind, step_bits):
    """The activation at (i - N/2)/2^step_bits, i < N = ACTIVATION_ENTRIES, as int64 with 32 fractional bits."""
    pi, half = _constants()[0], ACTIVATION_ENTRIES // 2
    up, root = [], math.isqrt((2 * ONE * ONE // pi) * ONE)                      # root = sqrt(2/pi)
    for n in range(half + 1):
        x = (n << FRACTION) >> step_bits
        if kind == 'relu2':
            gate = x
        elif kind == 'gelu_tanh':               # x·sigmoid(2u), u = sqrt(2/pi)·(x + 0.044715 x^3)
            u = root * (x + 44715 * (x * x >> FRACTION) * x // 1000000 // ONE) >> FRACTION
            gate = ONE * ONE // (ONE + _exp_neg(2 * u, ONE))
        else:                                   # x·Phi(x), Phi(x) = 1/2 + phi(x)·(x + x^3/3 + x^5/15 + ...)
            total, term, k = 0, x, 1
            while term and x < 9 * ONE:
                total, k = total + term, k + 2
                term = (term * x >> FRACTION) * x // k >> FRACTION
            density = (root * _exp_neg(n * n, 2 << 2 * step_bits) >> FRACTION) // 2
            gate = ONE if x >= 9 * ONE else ONE // 2 + (density * total >> FRACTION)
        up.append((x * gate >> FRACTION) + (1 << FRACTION - 33) >> FRACTION - 32)
    down = [0 if kind == 'relu2' else up[n] - ((n << 32) >> step_bits) for n in range(half, 0, -1)]
    return np.array(down + up[:half], np.int64)


@functools.lru_cache(None)
def rotation_table(n_positions, width):
    """cos and sin of t·10000^(-2i/width) as float64 (T, ceil(width/2)): integers with 24 fractional bits, exact."""
    log_base, n = _constants()[1], (width + 1) // 2
    cos, sin = [], []
    for i in range(n):
        angle, term, k, parts = _exp_neg(log_base * 2 * i, ONE * width), ONE, 0, [0, 0]
        while term:
            parts[k % 2] += -term if k % 4 > 1 else term
            k += 1
            term = term * angle // k >> FRACTION
        cos.append(parts[0])
        sin.append(parts[1])
    step_c, step_s = np.array(cos, object), np.array(sin, object)
    c, s = np.full(n, ONE, object), np.full(n, 0, object)
    rows = []
    for _ in range(n_positions):
        rows.append(((np.stack((c, s)) + (1 << FRACTION - 25)) >> FRACTION - 24).astype(np.float64))
        c, s = (c * step_c - s * step_s) >> FRACTION, (c * step_s + s * step_c) >> FRACTION
    both = np.stack(rows) / (1 << 24)
    return both[:, 0], both[:, 1]
