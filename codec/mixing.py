"""Adaptive counts mixed in the logistic domain: predict a bit, code it, learn from it, in integers alone.

A byte is eight bits, the highest first. Every context has a bucket of bit histories for each half of the byte; the
history of the node that the bits so far lead to gives, by an adaptive table, a probability. The mixer weighs the log
odds of all contexts, two final tables refine the result, a binary range coder codes the bit, and all of them learn it.

All compiled functions stand in this file, because numba looks at the file of a function alone to know whether its copy
on disk is stale: whoever changes a constant of logistic.py touches this file too. All integers are int64 unless an
array is narrower; the bound of each product stands beside it.
"""
import typing

import numba
import numpy as np

from codec import logistic

NAT = logistic.NAT
LIMIT = logistic.LIMIT
ONE = logistic.ONE


def _can_cache():
    """Whether numba finds a folder in which it may keep what it compiles."""
    try:
        numba.njit(cache=True)(_can_cache)
    except RuntimeError:
        return False
    return True


CACHED = _can_cache()
jit = numba.njit(cache=CACHED)


# --- sizes ---

SHARED = 17                      # contexts whose counts all streams share
PRIVATE = 4                      # further contexts, with counts of each stream's own, where streams are many
ORDERS = 6                       # the first contexts are the orders 1 … ORDERS
BUCKET = 16                      # bytes of a bucket: check byte, then the histories of the 15 nodes of half a byte
WAYS = 4                         # buckets next to each other that a context may have
MATCH_SLOTS = 1 << 20            # hashes of the match model
MATCH_LEAST = 6                  # bytes that must agree before the match model speaks
MATCH_MOST = 63
SETS = 4                         # sets of weights that the final mix averages; a guided model has one more
WEIGHT_ONE = 1 << 20             # weight 1.0
WEIGHT_MOST = 1 << 26            # weights stay between -64 and 64

OWN_ROWS = 18 * 256 + 65536 + 7 * 18 + 80    # rows of weights of the sets
GUIDED_ROWS = 8 * 16 * 7         # further rows, by bit, how sure the transformer is, and the orders seen
FINAL_ROWS = 2 * 65536           # contexts of the final tables: order 1, hashed order 2
RATE = 34                        # of learning, in units of 2^-14 a nat, once much has been seen
FIRST_RATE = 500000              # over the bytes seen plus 2000: what is added to RATE, at most 250
FINAL_RATE = 40                  # of the final mix, in the same units
CHANCE_LIMIT = 1023              # observations after which an adaptive probability is no longer an average
GUESS_COUNT = 12                 # observations that a first guess counts for

# Fields of a stream.
WRITTEN, RECENT, OLDER, WORD, LAST_WORD, THIRD_WORD, CLASSES, MATCH, MATCHED, FIELDS = range(10)
# Fields of the coder.
LOW, HIGH, CODE, AT, DECODING, CODER_FIELDS = range(6)


class Model(typing.NamedTuple):
    """All tables of the model: arrays that a step reads and writes."""
    squash: np.ndarray           # (2·LIMIT + 1,) int32
    stretch: np.ndarray          # (ONE,) int32
    reciprocal: np.ndarray       # (COUNT_LIMIT,) int32
    following: np.ndarray        # (512,) uint8: the state after a bit
    certain: np.ndarray          # (256,) bool: states that have seen one kind of bit alone
    buckets: np.ndarray          # (buckets · BUCKET,) uint8: histories in hashed contexts
    chances: np.ndarray          # (contexts · 256,) int64: 22 bits of probability, 10 of count, of each state
    match_slots: np.ndarray      # (MATCH_SLOTS,) int64: where the bytes of a hash were last followed
    match_chances: np.ndarray    # (MATCH_MOST + 1,) int64: how often the match was right, by length
    weights: np.ndarray          # (rows, inputs) int32
    final_weights: np.ndarray    # (256, sets) int32
    finals: np.ndarray           # (2 tables · 65536 contexts, 33) uint16
    history: np.ndarray          # (S, ring) uint8
    streams: np.ndarray          # (S, FIELDS) int64
    bases: np.ndarray            # (contexts,) int64: the bucket of each context
    hashes: np.ndarray           # (contexts,) int64: the hash of each context
    inputs: np.ndarray           # (inputs,) int32
    rows: np.ndarray             # (sets,) int64: the chosen row of each set
    outputs: np.ndarray          # (sets,) int64: what each set says, log odds


def input_count(contexts, guided):
    """Return how many inputs the mixer has."""
    count = 2 * contexts + 3
    if guided:
        count += 2
    return count


def row_count(guided):
    """Return how many rows of weights there are."""
    if guided:
        return OWN_ROWS + GUIDED_ROWS
    return OWN_ROWS


def initial_weights(contexts, inputs):
    """Return the weights that every row starts with: 0.18 for log odds of counts, 0.3 for the transformer's."""
    weights = np.zeros(inputs, np.int32)
    weights[0:2 * contexts + 1:2] = WEIGHT_ONE * 18 // 100
    # The match model's two inputs and the constant stand between those of the contexts and of the transformer.
    weights[2 * contexts + 3::2] = WEIGHT_ONE * 3 // 10
    return weights


# --- hashed contexts ---

@jit
def hashed(a, b):
    """Return a 32-bit hash of two 32-bit numbers: the products are below 2^62, their sum below 2^63."""
    x = a * 0x2C9277B5 + b * 0x1E35A7BD
    return (x ^ x >> 29) & 0xFFFFFFFF


@jit
def find_bucket(buckets, h):
    """Return the offset of the bucket of hash h: of WAYS places the one that has it, or the least used, emptied."""
    x = h * 0x2C9277B5                       # below 2^62
    check = x >> 8 & 0xFF
    # 32 bits of the hash times the number of buckets, at most 2^26: below 2^58.
    first = ((x >> 30) * (len(buckets) // BUCKET) >> 32) * BUCKET
    least = first
    for way in range(WAYS):
        place = first ^ way * BUCKET
        if buckets[place] == check:
            return place
        # The state of the first node grows with the number of bits seen in the bucket.
        if buckets[place + 1] < buckets[least + 1]:
            least = place
    buckets[least] = check
    for i in range(1, BUCKET):
        buckets[least + i] = 0
    return least


@jit
def hash_contexts(model, s):
    """Set the hashes of stream s for its next byte."""
    stream = model.streams[s]
    recent = stream[RECENT]
    older = stream[OLDER]
    word = stream[WORD]
    last_word = stream[LAST_WORD]
    h = model.hashes
    h[0] = hashed(recent & 0xFF, 1)
    h[1] = hashed(recent & 0xFFFF, 2)
    h[2] = hashed(recent & 0xFFFFFF, 3)
    h[3] = hashed(recent, 4)
    h[4] = hashed(hashed(recent, older & 0xFF), 5)
    h[5] = hashed(hashed(recent, older & 0xFFFF), 6)
    h[6] = hashed(word, 7)
    h[7] = hashed(hashed(word, last_word), 8)
    h[8] = hashed(hashed(recent & 0xFF, last_word), 9)
    h[9] = hashed(recent & 0xFFFF00, 10)
    h[10] = hashed(recent & 0xFF00FF, 11)
    h[11] = hashed(recent & 0xFFFFFF00, 12)
    h[12] = hashed(hashed(hashed(word, last_word), stream[THIRD_WORD]), 13)
    h[13] = hashed(hashed(word, stream[THIRD_WORD]), 14)
    h[14] = hashed(hashed(recent, older & 0xFFFFFF), 15)
    h[15] = hashed(stream[CLASSES], 16)
    h[16] = hashed(hashed(stream[CLASSES] & 0xFFFFF, recent & 0xFF), 17)
    if len(h) > SHARED:
        own = s * 8 + 64
        h[SHARED] = hashed(recent & 0xFFFF, own)
        h[SHARED + 1] = hashed(recent & 0xFFFFFF, own + 1)
        h[SHARED + 2] = hashed(recent, own + 2)
        h[SHARED + 3] = hashed(word, own + 3)


@jit
def find_buckets(model, partial):
    """Find the bucket of every context for the half byte that starts: partial is 1, or 16 … 31."""
    for i in range(len(model.bases)):
        h = model.hashes[i]
        if partial > 1:
            h = hashed(h, partial)
        model.bases[i] = find_bucket(model.buckets, h)


# --- adaptive probabilities ---

@jit
def learn_chance(chances, at, bit, reciprocal):
    """Move the probability at `at` towards bit by 1 / (count + 1.5), count up to CHANCE_LIMIT."""
    entry = chances[at]
    count = entry & 1023
    p = entry >> 10
    # |target - p| < 2^22, times at most 2^16: below 2^38.
    p += ((bit << 22) - bit - p) * reciprocal[count] >> 16
    if count < CHANCE_LIMIT:
        count += 1
    chances[at] = p << 10 | count


# --- match model ---

@jit
def find_match(model, s):
    """Follow the match of stream s by one byte, or look for a new one after the bytes just seen."""
    stream = model.streams[s]
    ring = model.history.shape[1]
    flat = model.history.reshape(-1)
    h = hashed(hashed(stream[RECENT], stream[OLDER] & 0xFFFF), 99) & MATCH_SLOTS - 1
    here = s * ring + stream[WRITTEN] % ring
    if stream[MATCHED] == 0:
        there = model.match_slots[h]
        # The slot may be of another hash: count the bytes that agree.
        length = 0
        if there >= 0:
            row = there // ring * ring
            while length < MATCH_MOST:
                a = s * ring + (stream[WRITTEN] - 1 - length) % ring
                b = row + (there - row - 1 - length) % ring
                if flat[a] != flat[b] or a == b:
                    break
                length += 1
        if length >= MATCH_LEAST:
            stream[MATCHED] = length
            stream[MATCH] = there
    model.match_slots[h] = here


@jit
def expected_byte(model, s):
    """Return the byte that the match of stream s expects, with a leading 1 bit; 0 without a match."""
    stream = model.streams[s]
    if stream[MATCHED] == 0:
        return 0
    ring = model.history.shape[1]
    at = stream[MATCH]
    return 256 + model.history[at // ring, at % ring]


# --- the model's steps ---

@jit
def collect_inputs(model, node, partial, expected, matched, depth):
    """Set the mixer's inputs for one bit; returns how many of the orders have seen this node."""
    inputs = model.inputs
    contexts = len(model.bases)
    longest = 0
    for i in range(contexts):
        state = model.buckets[model.bases[i] + node]
        inputs[2 * i] = 0
        inputs[2 * i + 1] = 0
        if state > 0:
            p = model.chances[i * 256 + state] >> 16
            inputs[2 * i] = model.stretch[p]
            # A history without a surprise speaks twice, so that it can be believed more, or less.
            if model.certain[state]:
                inputs[2 * i + 1] = model.stretch[p]
            if i < ORDERS:
                longest += 1
    # The match model speaks while the byte that it expects agrees with the bits so far.
    at = 2 * contexts
    inputs[at] = 0
    inputs[at + 1] = 0
    if expected >> 8 - depth == partial:
        p = model.match_chances[matched] >> 16
        sign = 2 * (expected >> 7 - depth & 1) - 1
        inputs[at] = sign * model.stretch[p]
        inputs[at + 1] = sign * ((p - ONE // 2) >> 6)
    inputs[at + 2] = NAT
    return longest


@jit
def ask_guide(model, frequencies, partial, depth):
    """Set the inputs of the transformer, whose frequencies are (256,) int64; returns its log odds."""
    width = 256 >> depth
    start = partial * width - 256
    half = start + (width >> 1)
    zeros = 0
    ones = 0
    for i in range(start, half):
        zeros += frequencies[i]
    for i in range(half, start + width):
        ones += frequencies[i]
    # Frequencies sum to less than 2^40: the product is below 2^56. A half byte that has none left says nothing.
    p = ONE // 2
    if zeros + ones > 0:
        p = (ones * ONE + (zeros + ones >> 1)) // (zeros + ones)
    p = min(max(p, 1), ONE - 1)
    at = 2 * len(model.bases) + 3
    x = np.int64(model.stretch[p])
    model.inputs[at] = x
    model.inputs[at + 1] = (p - ONE // 2) >> 6
    return x


@jit
def clamped(x):
    """Return x within the log odds."""
    return min(max(x, -LIMIT), LIMIT)


@jit
def mix(model, final_row):
    """Return the log odds that the sets agree on."""
    inputs = model.inputs
    total = 0
    for k in range(len(model.rows)):
        weights = model.weights[model.rows[k]]
        dot = 0
        # |input| < 2^12, |weight| <= 2^26, fewer than 2^6 inputs: below 2^44.
        for j in range(len(inputs)):
            dot += np.int64(inputs[j]) * np.int64(weights[j])
        output = clamped(dot >> 20)
        model.outputs[k] = output
        total += output * model.final_weights[final_row, k]
    return clamped(total >> 20)


@jit
def learn_weights(model, bit, rate, final_row, final_rate, p):
    """Move the chosen weights of every set, and the final ones, along the gradient of the code length."""
    inputs = model.inputs
    final_error = ((bit << 16) - p) * final_rate + 512 >> 10
    for k in range(len(model.rows)):
        output = model.outputs[k]
        # |error| < 2^16, rate < 2^9: below 2^25, shifted 2^15; times an input below 2^27.
        error = ((bit << 16) - model.squash[output + LIMIT]) * rate + 512 >> 10
        weights = model.weights[model.rows[k]]
        for j in range(len(inputs)):
            change = np.int64(inputs[j]) * error + 128 >> 8
            weights[j] = min(max(weights[j] + change, -WEIGHT_MOST), WEIGHT_MOST)
        moved = model.final_weights[final_row, k] + (output * final_error + 128 >> 8)
        model.final_weights[final_row, k] = min(max(moved, -WEIGHT_MOST), WEIGHT_MOST)


@jit
def refined(model, x, at):
    """Return the 16-bit probability that the final table `at` gives for log odds x, between two of its 33 steps."""
    place = (x + LIMIT + 1) * 32
    step = place // (2 * LIMIT + 2)
    part = place % (2 * LIMIT + 2) * 4096 // (2 * LIMIT + 2)
    # Probabilities below 2^16, parts below 2^12: the sum is below 2^29.
    low = np.int64(model.finals[at, step])
    high = np.int64(model.finals[at, step + 1])
    return low * (4096 - part) + high * part >> 12


@jit
def learn_final(model, x, at, bit):
    """Move the nearer step of the final table towards bit."""
    place = (x + LIMIT + 1) * 32 + LIMIT + 1
    step = place // (2 * LIMIT + 2)
    p = np.int64(model.finals[at, step])
    target = bit * 65535
    model.finals[at, step] = p + ((target - p) * 5 >> 8)


@jit
def code_bit(coder, data, bit, p):
    """Code one bit whose probability of being 1 is p / ONE: returns the bit, read from data or as given and written."""
    low = coder[LOW]
    high = coder[HIGH]
    # The range is below 2^32, p below 2^16: the product below 2^48. low <= middle < high.
    middle = low + ((high - low) * p >> 16)
    if coder[DECODING]:
        bit = 1 if coder[CODE] <= middle else 0
    if bit:
        high = middle
    else:
        low = middle + 1
    while (low ^ high) >> 24 == 0:
        if coder[DECODING]:
            following = 0
            if coder[AT] < len(data):
                following = np.int64(data[coder[AT]])
            coder[CODE] = (coder[CODE] << 8 & 0xFFFFFFFF) | following
        else:
            data[coder[AT]] = high >> 24
        coder[AT] += 1
        low = low << 8 & 0xFFFFFFFF
        high = (high << 8 & 0xFFFFFFFF) | 255
    coder[LOW] = low
    coder[HIGH] = high
    return bit


@jit
def learn_contexts(model, node, bit):
    """Give every context the bit: the table of its state first, then the state itself."""
    for i in range(len(model.bases)):
        at = model.bases[i] + node
        state = np.int64(model.buckets[at])
        if state > 0:
            learn_chance(model.chances, i * 256 + state, bit, model.reciprocal)
        model.buckets[at] = model.following[2 * state + bit]


@jit
def letters_before(classes):
    """Return how many letters the word has so far, at most 9, from the kinds of the last bytes."""
    count = 0
    while count < 9 and 3 <= classes & 7 <= 5:
        classes >>= 3
        count += 1
    return count


@jit
def choose_rows(model, recent, partial, depth, longest, matched, letters):
    """Choose the row of each set of weights by a small context."""
    length = min(matched, 15)
    if matched > 15:
        length = min(15 + (matched - 15 >> 4), 17)
    model.rows[0] = length * 256 + partial
    at = 18 * 256
    model.rows[1] = at + ((recent & 0xFF) * 256 | partial)
    at += 65536
    model.rows[2] = at + longest * 18 + length
    at += 7 * 18
    model.rows[3] = at + letters * 8 + depth


@jit
def code_byte(model, s, coder, data, byte, rate, frequencies):
    """Code the next byte of stream s and learn from it: returns the byte, read from data or as given and written."""
    stream = model.streams[s]
    recent = stream[RECENT]
    hash_contexts(model, s)
    expected = expected_byte(model, s)
    letters = letters_before(stream[CLASSES])
    partial = 1                              # the bits so far, behind a leading 1
    for depth in range(8):
        if depth == 0 or depth == 4:
            find_buckets(model, partial)
        node = partial
        if depth >= 4:
            node = 1 << depth - 4 | (partial & (1 << depth - 4) - 1)
        matched = 0
        if expected >> 8 - depth == partial:
            matched = stream[MATCHED]

        # Predict: all that is known of the bit, mixed, then refined by two tables.
        longest = collect_inputs(model, node, partial, expected, matched, depth)
        choose_rows(model, recent, partial, depth, longest, matched, letters)
        if len(model.rows) > SETS:
            guess = ask_guide(model, frequencies, partial, depth)
            model.rows[SETS] = OWN_ROWS + (depth * 16 + (abs(guess) >> 8)) * 7 + longest
        x = mix(model, partial)
        p = np.int64(model.squash[x + LIMIT])
        # Two final tables know the last byte, and a hash of the last two.
        first = (recent & 0xFF) << 8 | partial
        second = 65536 + ((hashed(recent & 0xFFFF, 77) >> 8) + partial * 0x9E35 & 0xFFFF)
        final = p + refined(model, x, first) + 2 * refined(model, x, second) + 2 >> 2
        final = min(max(final, 1), ONE - 1)

        # Code, then learn: each part from the bit and from what itself had said.
        bit = code_bit(coder, data, byte >> 7 - depth & 1, final)
        if matched > 0:
            right = 1 if (expected >> 7 - depth & 1) == bit else 0
            learn_chance(model.match_chances, matched, right, model.reciprocal)
        learn_contexts(model, node, bit)
        learn_weights(model, bit, rate, partial, FINAL_RATE, p)
        learn_final(model, x, first, bit)
        learn_final(model, x, second, bit)
        partial = partial << 1 | bit
    remember(model, s, partial & 0xFF)
    return partial & 0xFF


@jit
def remember(model, s, byte):
    """Append byte to the history of stream s: recent bytes, words, match."""
    stream = model.streams[s]
    ring = model.history.shape[1]
    # The match goes on, or it ends here.
    if stream[MATCHED] > 0:
        at = stream[MATCH]
        if model.history[at // ring, at % ring] == byte:
            stream[MATCHED] = min(stream[MATCHED] + 1, MATCH_MOST)
            stream[MATCH] = at // ring * ring + (at + 1) % ring
        else:
            stream[MATCHED] = 0
    model.history[s, stream[WRITTEN] % ring] = byte
    stream[WRITTEN] += 1
    stream[OLDER] = (stream[OLDER] << 8 | stream[RECENT] >> 24) & 0xFFFFFFFF
    stream[RECENT] = (stream[RECENT] << 8 | byte) & 0xFFFFFFFF
    # A word is a run of letters, without case; bytes above 127 are letters of other scripts.
    letter = byte
    if 65 <= byte <= 90:
        letter = byte + 32
    if 97 <= letter <= 122 or letter >= 128:
        stream[WORD] = hashed(stream[WORD] + 1, letter)
    elif stream[WORD] != 0:
        stream[THIRD_WORD] = stream[LAST_WORD]
        stream[LAST_WORD] = stream[WORD]
        stream[WORD] = 0
    stream[CLASSES] = (stream[CLASSES] << 3 | class_of(byte)) & 0xFFFFFFFF
    find_match(model, s)


@jit
def class_of(byte):
    """Return the kind of a byte: control, space, digit, lower case, capital, other script, comma or stop, the rest."""
    kind = 7
    if byte < 32:
        kind = 0
    elif byte == 32:
        kind = 1
    elif 48 <= byte <= 57:
        kind = 2
    elif 97 <= byte <= 122:
        kind = 3
    elif 65 <= byte <= 90:
        kind = 4
    elif byte >= 128:
        kind = 5
    elif byte == 44 or byte == 46:
        kind = 6
    return kind


@jit
def code_steps(model, coder, data, columns, frequencies):
    """Code columns (T, S) uint8, row after row, stream after stream; decoding fills them.

    frequencies: (T, S, 256) int64 of the transformer, (0, 0, 256) without one.
    """
    unguided = np.zeros(256, np.int64)
    for t in range(columns.shape[0]):
        seen = model.streams[0, WRITTEN] * len(model.streams)
        rate = RATE + FIRST_RATE // (seen + 2000)       # at most 284, below 2^9
        for s in range(columns.shape[1]):
            guide = unguided
            if len(model.rows) > SETS:
                guide = frequencies[t, s]
            columns[t, s] = code_byte(model, s, coder, data, np.int64(columns[t, s]), rate, guide)
