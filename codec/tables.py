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
ACTIVATION_FRACTION = 32                        # fractional bits of what the activation table holds
ROTATION_FRACTION = 24                          # and of sines and cosines


def _exp_neg(numerator, denominator):
    """Return exp(-numerator/denominator) of integers >= 0 and > 0: Taylor series of a 1024th, squared ten times."""
    x = (numerator << FRACTION) // denominator >> 10
    total = ONE
    term = ONE
    k = 1
    while term:
        term = term * x // k >> FRACTION
        total += -term if k % 2 else term
        k += 1
    for _ in range(10):
        total = total * total >> FRACTION
    return total


# --- constants ---

def _odd_powers(n, alternate):
    """Return the sum of 1/(k·n^k) over odd k, artanh(1/n); with alternating signs it is arctan(1/n)."""
    total = 0
    term = ONE // n
    k = 1
    while term:
        negative = alternate and k % 4 == 3
        total += -(term // k) if negative else term // k
        term = term // (n * n)
        k += 2
    return total


@functools.lru_cache(None)
def _pi():
    """Return pi by Machin's formula."""
    return 4 * (4 * _odd_powers(5, True) - _odd_powers(239, True))


@functools.lru_cache(None)
def _ln_10000():
    """Return ln 10000 = 4 ln 10 = 4 (3 ln 2 + ln 5/4), with ln 2 = 2 artanh 1/3 and ln 5/4 = 2 artanh 1/9."""
    return 4 * (3 * 2 * _odd_powers(3, False) + 2 * _odd_powers(9, False))


# --- exponentials ---

@functools.lru_cache(None)
def exp_table(top, floor):
    """Integers top·exp(-i/EXP_STEPS), i = 0, 1, ..., until they round to 0; at least floor; float64 (n,)."""
    values = [top]
    while values[-1]:
        exact = _exp_neg(len(values), EXP_STEPS) * top
        values.append((exact + ONE // 2) >> FRACTION)
    return np.maximum(np.array(values, np.float64), floor)


# --- activations ---

def _logistic_gate(x, root):
    """Return sigmoid(2u), u = sqrt(2/pi)·(x + 0.044715 x^3): what gelu_tanh multiplies x with."""
    cube = 44715 * (x * x >> FRACTION) * x // 1000000 // ONE
    u = root * (x + cube) >> FRACTION
    return ONE * ONE // (ONE + _exp_neg(2 * u, ONE))


def _normal_gate(n, step_bits, root):
    """Return Phi(x) = 1/2 + phi(x)·(x + x^3/3 + x^5/15 + ...) at x = n/2^step_bits: what gelu multiplies x with."""
    x = (n << FRACTION) >> step_bits
    if x >= 9 * ONE:
        return ONE
    total = 0
    term = x
    k = 1
    while term:
        total += term
        k += 2
        term = (term * x >> FRACTION) * x // k >> FRACTION
    density = (root * _exp_neg(n * n, 2 << 2 * step_bits) >> FRACTION) // 2
    return ONE // 2 + (density * total >> FRACTION)


@functools.lru_cache(None)
def activation_table(kind, step_bits):
    """The activation at (i - N/2)/2^step_bits, i < N = ACTIVATION_ENTRIES, as int64 with 32 fractional bits."""
    half = ACTIVATION_ENTRIES // 2
    root = math.isqrt((2 * ONE * ONE // _pi()) * ONE)                           # sqrt(2/pi)
    rounding = 1 << FRACTION - ACTIVATION_FRACTION - 1
    positive = []
    for n in range(half + 1):
        x = (n << FRACTION) >> step_bits
        if kind == 'relu2':
            gate = x
        elif kind == 'gelu_tanh':
            gate = _logistic_gate(x, root)
        else:
            gate = _normal_gate(n, step_bits, root)
        positive.append((x * gate >> FRACTION) + rounding >> FRACTION - ACTIVATION_FRACTION)

    # Below zero the gelus are f(-x) = f(x) - x; the squared relu is 0.
    negative = []
    for n in range(half, 0, -1):
        x = (n << ACTIVATION_FRACTION) >> step_bits
        negative.append(0 if kind == 'relu2' else positive[n] - x)
    return np.array(negative + positive[:half], np.int64)


# --- rotations ---

def _cos_sin(angle):
    """Return cos and sin of an angle by their Taylor series."""
    cos = 0
    sin = 0
    term = ONE
    k = 0
    while term:
        signed = -term if k % 4 > 1 else term
        if k % 2:
            sin += signed
        else:
            cos += signed
        k += 1
        term = term * angle // k >> FRACTION
    return cos, sin


@functools.lru_cache(None)
def rotation_table(n_positions, width):
    """cos and sin of t·10000^(-2i/width) as float64 (T, ceil(width/2)): integers with 24 fractional bits, exact."""
    n = (width + 1) // 2
    steps = [_cos_sin(_exp_neg(_ln_10000() * 2 * i, ONE * width)) for i in range(n)]
    step_cos = np.array([cos for cos, _ in steps], object)
    step_sin = np.array([sin for _, sin in steps], object)

    # Each position is the one before it, turned by one step.
    cos = np.full(n, ONE, object)
    sin = np.full(n, 0, object)
    rounding = 1 << FRACTION - ROTATION_FRACTION - 1
    rows = []
    for _ in range(n_positions):
        rounded = (np.stack((cos, sin)) + rounding) >> FRACTION - ROTATION_FRACTION
        rows.append(rounded.astype(np.float64))
        cos, sin = (cos * step_cos - sin * step_sin) >> FRACTION, (cos * step_sin + sin * step_cos) >> FRACTION
    both = np.stack(rows) / (1 << ROTATION_FRACTION)
    return both[:, 0], both[:, 1]
