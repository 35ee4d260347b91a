"""The archive as a file, and its data section: sections with CRCs, output that appears when whole, tokens, streams.

An archive is magic, version, a table of sections (name, length, CRC-32), a CRC-32 of all that, and the sections: head
(JSON), wght (weights), tokn (a BPE model's byte strings), blks (per block: form, symbols, bytes, CRC-32 of its text)
and data. Imported by compress.py and online.py.
"""
import hashlib
import json
import lzma
import os
import struct
import sys
import tempfile
import time
import zlib

import numpy as np

from configurator import UserError
from corpus import tokens

MAGIC, VERSION = b'nMDL', 1
TWO_PART, ONLINE = 1, 2
STORED, CODED = 0, 1
BLOCK = struct.Struct('<BIII')                  # form, symbols, bytes in the data section, CRC-32 of the decoded text
SECTION = struct.Struct('<4sQI')
MAX_BLOCK = 1 << 24
DAMAGED = 'the archive is damaged or was cut; get it again'


# --- container ---

def write_archive(out, kind, head, sections, blocks):
    """Write an archive to out; blocks [(form, symbols, data, text)]. Returns the bytes that are not block data."""
    sections = dict(head=zlib.compress(json.dumps(head, separators=(',', ':')).encode(), 9), **sections)
    sections['blks'] = b''.join(BLOCK.pack(form, n, len(data), zlib.crc32(text)) for form, n, data, text in blocks)
    sections['data'] = b''.join(data for _, _, data, _ in blocks)
    table = b''.join(SECTION.pack(name.encode(), len(data), zlib.crc32(data)) for name, data in sections.items())
    front = MAGIC + struct.pack('<BBB', VERSION, kind, len(sections)) + table
    out.write(front + struct.pack('<I', zlib.crc32(front)))
    for data in sections.values():
        out.write(data)
    return out.size - len(sections['data'])


def read_archive(raw, name):
    """Return (kind, head, block table, {section: bytes}) of an archive; all CRCs are checked before any use."""
    if raw[:4] != MAGIC:
        raise UserError(f'{name} is not a nanoMDL archive: it starts with {raw[:4]!r}, expected {MAGIC!r}')
    if len(raw) < 11 or raw[4] != VERSION:
        raise UserError(f'{name} has format version {raw[4] if len(raw) > 4 else None}, this program reads {VERSION}')
    kind, at, n = raw[5], 7, raw[6]
    end = at + n * SECTION.size
    if len(raw) < end + 4 or struct.unpack_from('<I', raw, end)[0] != zlib.crc32(raw[:end]):
        raise UserError(f'{name}: section table: {DAMAGED}')
    sections, offset = {}, end + 4
    for i in range(n):
        key, length, crc = SECTION.unpack_from(raw, at + i * SECTION.size)
        data, key = raw[offset:offset + length], key.decode('ascii', 'replace')
        if len(data) != length or zlib.crc32(data) != crc:
            raise UserError(f'{name}: section {key}: {DAMAGED}')
        sections[key], offset = data, offset + length
    if offset != len(raw) or kind not in (TWO_PART, ONLINE) or not {'head', 'blks', 'data'} <= set(sections):
        raise UserError(f'{name}: {len(raw) - offset} bytes after the last section, or one missing: {DAMAGED}')
    head = json.loads(zlib.decompressobj().decompress(sections['head'], 1 << 20))
    table = [BLOCK.unpack_from(sections['blks'], i) for i in range(0, len(sections['blks']), BLOCK.size)]
    if sum(b[2] for b in table) != len(sections['data']) or any(not 0 < b[1] <= MAX_BLOCK for b in table):
        raise UserError(f'{name}: block table: {DAMAGED}')
    return kind, head, table, sections


def read_input(path):
    """Read a whole file; '-' is standard input."""
    try:
        if path == '-':
            return sys.stdin.buffer.read()
        with open(path, 'rb') as f:
            return f.read()
    except OSError as e:
        raise UserError(f'cannot read {path!r}: {e.strerror}') from None


class Output:
    """A file that appears under its name only when commit() is called.

    '-' is standard output: with at_once what is written goes there directly, else on commit(). tmp is its place before.
    """

    def __init__(self, path, at_once=False):
        self.path, self.size, self.at_once = path, 0, at_once and path == '-'
        self.tmp = f'{os.path.join(tempfile.gettempdir(), "nanomdl") if path == "-" else path}.{os.getpid()}.tmp'
        try:
            self.file = sys.stdout.buffer if self.at_once else open(self.tmp, 'wb')
        except OSError as e:
            raise UserError(f'cannot write {path!r}: {e.strerror}') from None

    def __enter__(self):
        return self

    def write(self, data):
        try:
            self.file.write(data)
            self.file.flush()
        except BrokenPipeError:
            raise
        except OSError as e:
            raise UserError(f'cannot write {self.path!r}: {e.strerror}') from None
        self.size += len(data)

    def commit(self):
        if self.path != '-':
            self.file.close()
            os.replace(self.tmp, self.path)
        elif not self.at_once:
            sys.stdout.buffer.write(read_input(self.tmp))
            sys.stdout.buffer.flush()

    def __exit__(self, *_):
        if not self.at_once:
            self.file.close()
            if os.path.exists(self.tmp):
                os.remove(self.tmp)


class Bar:
    """Progress on standard error: share done, speed, time left, running bits per byte."""

    def __init__(self, verb, total_bytes, on=True):
        self.verb, self.total, self.started, self.shown = verb, total_bytes, time.time(), 0.0
        self.on = on and sys.stderr.isatty()

    def begin(self, done, bits=None, bytes_per_symbol=1.0):
        """Say what stands before the symbols that symbols() will count."""
        self.base, self.bits, self.bytes_per_symbol = done, bits, bytes_per_symbol

    def symbols(self, n):
        self.show(self.base + n * self.bytes_per_symbol, self.bits)

    def show(self, done, bits=None, last=False):
        now = time.time()
        if not self.on or not (last or now - self.shown > 0.5):
            return
        self.shown, seconds = now, now - self.started
        rate = done / max(seconds, 1e-9)
        left = (self.total - done) / rate if rate else 0
        bpb = f'  {bits / max(done, 1):.4f} bits/byte' if bits is not None else ''
        print(f'\r{self.verb} {done / max(self.total, 1):6.1%}  {rate / 1000:8.2f} kB/s  {left:5.0f} s left{bpb} ',
              end='\n' if last else '', file=sys.stderr, flush=True)


# --- tokens ---

def byte_strings(name):
    """Return (byte string of every id, encode: str -> ids) of a tokenizer: 'gpt2', or a tokenizers JSON file."""
    if name == 'gpt2':
        t = tokens.gpt2_encoding()
        strings = [t.decode_single_token_bytes(i) for i in range(t.n_vocab)]
        return strings, lambda text: t.encode(text, disallowed_special=())
    try:
        from tokenizers import Tokenizer
        t = Tokenizer.from_file(name)
    except Exception as e:
        raise UserError(f'cannot load the tokenizer {name!r} ({e}); name its JSON file with --tokenizer=PATH') from None
    t.encode_special_tokens = True                                      # "<|endoftext|>" in a text is text
    return tokens.byte_strings(t), lambda text: t.encode(text, add_special_tokens=False).ids


def tokenize(raw, name):
    """Return (ids, byte strings or None) of a file's bytes; refuse text that the tokenizer does not reproduce."""
    if name == 'byte':
        return np.frombuffer(raw, np.uint8), None
    strings, encode = byte_strings(name)
    try:
        ids = np.array(encode(raw.decode()), np.int32)
    except UnicodeDecodeError as e:
        raise UserError(f'the file is not UTF-8 (byte {e.start}), as {name!r} needs; use a byte model') from None
    if b''.join([strings[i] for i in ids]) != raw:
        raise UserError(f'the tokenizer {name!r} does not reproduce this file; use a byte model')
    return ids, strings


def pack_strings(strings):
    return b''.join(struct.pack('<H', len(s)) + s for s in strings)


def unpack_strings(data):
    raw, at, strings = lzma.LZMADecompressor(memlimit=1 << 28).decompress(data, 1 << 26), 0, []     # 64 MB at most
    while at < len(raw):
        n, = struct.unpack_from('<H', raw, at)
        strings.append(raw[at + 2:at + 2 + n])
        at += 2 + n
    return strings


# --- the data section: S streams in lockstep through windows of W inputs ---

def windows(n_context, n_steps, size, kept):
    """Yield (start, output, end): inputs [start, end) are one window, those from `output` on predict new symbols.

    n_context inputs are known, the last of which predicts symbol 0. A full window starts again with its last `kept`.
    """
    start, output, last = 0, n_context - 1, n_context - 1 + n_steps
    while output < last:
        end = min(start + size, last)
        yield start, output, end
        start, output = end - kept + 1, end


class Lanes:
    """The S streams of an archive: stream s codes its pieces of all blocks one after another, and keeps its context."""

    def __init__(self, model, n_streams, kept, start_id, at_once=0):
        import constriction
        self.model, self.S, self.kept, self.queue = model, n_streams, kept, constriction.stream.queue
        self.family = constriction.stream.model.Categorical(perfect=False)
        self.context = np.full((n_streams, 1), start_id, np.int64)
        self.vocab_size = model.args['vocab_size']
        at_once = at_once or n_streams
        self.parts = [slice(i, min(i + at_once, n_streams)) for i in range(0, n_streams, at_once)]
        self.caches = []

    def layout(self, n):
        """Return (steps, streams that have a symbol in the last step, start of each stream) of a block of n symbols."""
        whole, more = divmod(n, self.S)
        starts = np.arange(self.S) * whole + np.minimum(np.arange(self.S), more)
        return whole + (more > 0), more or self.S, starts

    def next_context(self, tokens, starts, n):
        """The last `kept` inputs of every stream after a block; one length for all, so that they stay in step."""
        ends = np.append(starts[1:], n)
        length = min(self.kept, int((ends - starts).min()) + self.context.shape[1])
        rows = [np.concatenate((c, tokens[a:b]))[-length:] for c, a, b in zip(self.context, starts, ends)]
        return np.stack(rows).astype(np.int64)

    def table(self, frequencies):
        return frequencies.double().cpu().numpy()

    def encode(self, tokens, tick=None):
        """Code one block of symbols; returns (bytes, code length in bits, context after it)."""
        import torch
        n = len(tokens)
        steps, active, starts = self.layout(n)
        grid = tokens[np.minimum(starts[:, None] + np.arange(steps), n - 1)].astype(np.int64)         # (S, steps)
        inputs = torch.from_numpy(np.concatenate((self.context, grid[:, :-1]), 1)).to(self.model.device)
        encoder, bits, c = self.queue.RangeEncoder(), 0.0, self.context.shape[1] - 1
        for start, output, end in windows(c + 1, steps, self.model.W, self.kept):
            rows = max(1, 8192 // (end - start))
            parts = inputs[:, start:end].split(rows)
            hidden = torch.cat([self.model.forward(part, last=end - output) for part in parts])
            size = max(1, (1 << 22) // (self.S * self.vocab_size))
            for i in range(0, end - output, size):
                part, t = hidden[:, i:i + size], output - c + i
                symbols = grid[:, t:t + part.shape[1]].T.reshape(-1)
                if t + part.shape[1] == steps:
                    symbols = symbols[:len(symbols) - self.S + active]
                f = self.table(self.model.frequencies(part.transpose(0, 1).flatten(0, 1)))[:len(symbols)]
                encoder.encode(symbols.astype(np.int32), self.family, f)
                bits += float((np.log2(f.sum(1)) - np.log2(f[np.arange(len(f)), symbols])).sum())
            if tick:
                tick((end - c) * self.S)
        return encoder.get_compressed().astype('<u4').tobytes(), bits, self.next_context(tokens, starts, n)

    def decode(self, data, n, tick=None):
        """Decode one block of n symbols; returns (symbols, context after it)."""
        import torch
        steps, active, starts = self.layout(n)
        decoder = self.queue.RangeDecoder(np.frombuffer(data, '<u4').astype(np.uint32))
        c = self.context.shape[1] - 1
        inputs = np.zeros((self.S, c + steps + 1), np.int64)
        inputs[:, :c + 1] = self.context
        self.caches = self.caches or [self.model.cache() for _ in self.parts]
        for start, output, end in windows(c + 1, steps, self.model.W, self.kept):
            for cache in self.caches:
                cache.length = 0
            for i in range(output, end):
                first = start if i == output else i
                x = torch.from_numpy(inputs[:, first:i + 1]).to(self.model.device)
                f = self.table(torch.cat([self.model.frequencies(self.model.forward(x[p], cache, last=1)[:, 0])
                                          for p, cache in zip(self.parts, self.caches)]))
                m = active if i - c == steps - 1 else self.S
                inputs[:m, i + 1] = decoder.decode(self.family, f[:m])
                if tick:
                    tick((i - c) * self.S)
        lengths = np.diff(np.append(starts, n))
        tokens = np.concatenate([row[c + 1:c + 1 + length] for row, length in zip(inputs, lengths)])
        return tokens, self.next_context(tokens, starts, n)


def arithmetic_hash(args):
    """Hash of the integer tables and of a test message through the range coder: what an archive's numbers rest on."""
    import constriction

    from codec.exact import tables_hash
    encoder = constriction.stream.queue.RangeEncoder()
    weights = (np.arange(64 * 32).reshape(64, 32) * 7919 % 1009 + 1).astype(np.float64)
    family = constriction.stream.model.Categorical(perfect=False)
    encoder.encode((np.arange(64) * 13 % 32).astype(np.int32), family, weights)
    message = encoder.get_compressed().astype('<u4').tobytes()
    return hashlib.sha256(tables_hash(args).encode() + message).hexdigest()[:16]
