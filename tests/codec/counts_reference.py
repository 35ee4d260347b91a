"""The counting model's equations in float64, to measure what its integers cost. Histories and hashes are shared."""
import typing

import numpy as np
from numba import njit

from codec import counts, logistic, mixing
from codec.mixing import SETS

MOST = mixing.LIMIT / mixing.NAT             # the largest log odds, in nats
LEAST = 1 / mixing.ONE                       # the least probability


class Floats(typing.NamedTuple):
    """The tables of the model that hold probabilities or weights, in float64."""
    chances: np.ndarray          # (contexts · 256,)
    observed: np.ndarray         # (contexts · 256,)
    match_chances: np.ndarray
    match_observed: np.ndarray
    weights: np.ndarray          # (rows, inputs)
    final_weights: np.ndarray    # (256, sets)
    finals: np.ndarray           # (contexts, 33)
    inputs: np.ndarray
    outputs: np.ndarray


def floats_of(model):
    """Return the float64 tables that a new integer model starts with."""
    count_mask = 1023
    return Floats(
        chances=(model.chances >> 10) / (1 << 22),
        observed=(model.chances & count_mask).astype(np.float64),
        match_chances=(model.match_chances >> 10) / (1 << 22),
        match_observed=(model.match_chances & count_mask).astype(np.float64),
        weights=model.weights / mixing.WEIGHT_ONE,
        final_weights=model.final_weights / mixing.WEIGHT_ONE,
        finals=model.finals / mixing.ONE,
        inputs=np.zeros(len(model.inputs)),
        outputs=np.zeros(SETS))


@njit
def clamped(x):
    return min(max(x, -MOST), MOST)


@njit
def stretch(p):
    p = min(max(p, LEAST), 1 - LEAST)
    return clamped(np.log(p / (1 - p)))


@njit
def squash(x):
    return 1 / (1 + np.exp(-x))


@njit
def learn_chance(chances, observed, at, bit):
    chances[at] += (bit - chances[at]) / (observed[at] + 1.5)
    observed[at] = min(observed[at] + 1, mixing.CHANCE_LIMIT)


@njit
def collect_inputs(model, floats, node, partial, expected, matched, depth):
    inputs = floats.inputs
    inputs[:] = 0
    contexts = len(model.bases)
    longest = 0
    for i in range(contexts):
        state = model.buckets[model.bases[i] + node]
        if state > 0:
            x = stretch(floats.chances[i * 256 + state])
            inputs[2 * i] = x
            if model.certain[state]:
                inputs[2 * i + 1] = x
            if i < mixing.ORDERS:
                longest += 1
    if expected >> 8 - depth == partial:
        p = floats.match_chances[matched]
        sign = 2 * (expected >> 7 - depth & 1) - 1
        inputs[2 * contexts] = sign * stretch(p)
        inputs[2 * contexts + 1] = sign * (p - .5) * 4
    inputs[2 * contexts + 2] = 1
    return longest


@njit
def mix(model, floats, final_row):
    total = 0.
    for k in range(SETS):
        dot = (floats.inputs * floats.weights[model.rows[k]]).sum()
        floats.outputs[k] = clamped(dot)
        total += floats.outputs[k] * floats.final_weights[final_row, k]
    return clamped(total)


@njit
def learn_weights(model, floats, bit, rate, final_row, p):
    for k in range(SETS):
        output = floats.outputs[k]
        error = (bit - squash(output)) * rate
        floats.weights[model.rows[k]] += floats.inputs * error
        floats.final_weights[final_row, k] += output * (bit - p) * mixing.FINAL_RATE / 2**14


@njit
def refined(floats, x, at):
    place = (x + MOST) * 32 / (2 * MOST)
    step = min(int(place), 31)
    part = place - step
    return floats.finals[at, step] * (1 - part) + floats.finals[at, step + 1] * part


@njit
def learn_final(floats, x, at, bit):
    step = int((x + MOST) * 32 / (2 * MOST) + .5)
    floats.finals[at, step] += (bit - floats.finals[at, step]) * 5 / 256


@njit
def byte_cost(model, floats, byte, rate):
    """Return the bits that the next byte of stream 0 costs, and learn from it."""
    stream = model.streams[0]
    recent = stream[mixing.RECENT]
    mixing.hash_contexts(model, 0)
    expected = mixing.expected_byte(model, 0)
    letters = mixing.letters_before(stream[mixing.CLASSES])
    partial = 1
    cost = 0.
    for depth in range(8):
        if depth == 0 or depth == 4:
            mixing.find_buckets(model, partial)
        node = partial
        if depth >= 4:
            node = 1 << depth - 4 | (partial & (1 << depth - 4) - 1)
        matched = 0
        if expected >> 8 - depth == partial:
            matched = stream[mixing.MATCHED]
        longest = collect_inputs(model, floats, node, partial, expected, matched, depth)
        mixing.choose_rows(model, recent, partial, depth, longest, matched, letters)
        x = mix(model, floats, partial)
        p = squash(x)
        first = (recent & 0xFF) << 8 | partial
        second = 65536 + ((mixing.hashed(recent & 0xFFFF, 77) >> 8) + partial * 0x9E35 & 0xFFFF)
        final = (p + refined(floats, x, first) + 2 * refined(floats, x, second)) / 4
        final = min(max(final, LEAST), 1 - LEAST)
        bit = byte >> 7 - depth & 1
        cost -= np.log2(final if bit else 1 - final)
        if matched > 0:
            right = 1 if (expected >> 7 - depth & 1) == bit else 0
            learn_chance(floats.match_chances, floats.match_observed, matched, right)
        for i in range(len(model.bases)):
            at = model.bases[i] + node
            state = np.int64(model.buckets[at])
            if state > 0:
                learn_chance(floats.chances, floats.observed, i * 256 + state, bit)
            model.buckets[at] = model.following[2 * state + bit]
        learn_weights(model, floats, bit, rate, partial, p)
        learn_final(floats, x, first, bit)
        learn_final(floats, x, second, bit)
        partial = partial << 1 | bit
    mixing.remember(model, 0, byte)
    return cost


@njit
def text_cost(model, floats, text):
    """Return the bits of text, uint8."""
    cost = 0.
    for t in range(len(text)):
        rate = (mixing.RATE + mixing.FIRST_RATE / (t + 2000)) / 2**14
        cost += byte_cost(model, floats, np.int64(text[t]), rate)
    return cost


def reference_bytes(text, memory):
    """Return the bytes that the float64 model needs for text in one stream."""
    model = counts.new_model(1, memory, 1 << 20, False)
    assert logistic.LIMIT == mixing.LIMIT
    return text_cost(model, floats_of(model), np.frombuffer(text, np.uint8)) / 8
