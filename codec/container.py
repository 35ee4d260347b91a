"""The archive as a file, and its data section: sections with CRCs, output that appears when whole, tokens, streams.

An archive is magic, version, a table of sections (name, length, CRC-32), a CRC-32 of all that, and the sections: head
(JSON), wght (weights), tokn (a BPE model's byte strings), blks (per block: form, symbols, bytes, CRC-32 of its text)
and data. Imported by compress.py and online.py.
"""
import contextlib
import hashlib
import json
import lzma
import os
import secrets
import select
import signal
import stat
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
    if path == '-' and sys.stdin is None:
        raise UserError('standard input is closed; name a file')
    try:
        if path == '-':
            return sys.stdin.buffer.read()
        with open(path, 'rb') as f:
            return f.read()
    except OSError as e:
        raise UserError(f'cannot read {path!r}: {e.strerror}') from None


# --- output ---

UNFINISHED = set()                              # names of temporary files, which a signal that ends the process removes


@contextlib.contextmanager
def signals_remove_temporaries():
    """Let SIGINT, SIGTERM and SIGHUP remove the temporary files and leave as an exception: exit status 128 + number.

    A signal that was ignored stays ignored (nohup). The handlers of before are put back in the end.
    """
    def leave(number, frame):
        # The names are removed here, not only where the exception passes, so that no moment is too early or too late.
        for name in list(UNFINISHED):
            with contextlib.suppress(OSError):
                os.remove(name)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def write_errors(name):
    """Turn an OSError into one line that says what could not be written; a closed pipe is its reader's wish."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as e:
        raise UserError(f'cannot write {name}: {e.strerror or e}') from None


def write_all(file, data):
    """Write all of data to an unbuffered file, which may take less at a time: a disk that fills, a busy pipe."""
    left = memoryview(data)
    while len(left):
        n_bytes = file.write(left)
        if n_bytes:
            left = left[n_bytes:]
        else:
            select.select([], [file], [])


def stat_of(path, stream):
    """Return os.stat of a path, links followed, or of the stream that '-' stands for; None where there is nothing."""
    try:
        return os.fstat(stream.fileno()) if path == '-' else os.stat(path)
    except (OSError, ValueError, AttributeError):       # a stream may be closed, of no file, or None
        return None


def is_stream(path, found):
    """Tell '-', fifos, sockets and devices, which are written through, from what a new file replaces."""
    return path == '-' or (found is not None and not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode))


def begins_as_archive(path):
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        return file.read(len(MAGIC)) == MAGIC
    return False


def is_same_file(path, found, source):
    """Tell whether writing to path, of which found is the os.stat, would change source: a file, a folder's, or '-'."""
    if os.path.isdir(source):                   # a checkpoint's: its files are input, archives that lie beside are not
        inside = os.path.realpath(path).startswith(os.path.join(os.path.realpath(source), ''))
        return inside and os.path.isfile(path) and not begins_as_archive(path)
    other = stat_of(source, sys.stdin)
    if found is None or other is None:
        return '-' not in (path, source) and os.path.realpath(path) == os.path.realpath(source)
    return os.path.samestat(found, other) and not stat.S_ISCHR(found.st_mode)


def check_target(path, overwrite, inputs):
    """Return os.stat of what has a target's name, or None; raise UserError for what must not be written there."""
    found = stat_of(path, sys.stdout)
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise UserError(f'{path!r} is a folder, expected the name of a file to write')
    if not os.path.basename(path):
        raise UserError(f'{path!r} names no file, expected the name of a file to write')
    for source in inputs:
        if is_same_file(path, found, source):
            raise UserError(f'{path!r} would be written over the input {source!r}; name another file')

    # Nothing is lost in a fifo or a terminal; a disk is not a file, but as full of data.
    stream = is_stream(path, found) and not (found is not None and stat.S_ISBLK(found.st_mode))
    if not overwrite and not stream and os.path.lexists(path):
        raise UserError(f'{path!r} exists already; replace it with --overwrite (-f), or name another file')
    return found


def check_state(path, others):
    """Raise UserError where a state cannot be saved in path, which must be none of the other files."""
    found = None if path == '-' else stat_of(path, None)
    if path == '-' or is_stream(path, found) or os.path.isdir(path) or not os.path.basename(path):
        raise UserError(f'state = {path!r} is no regular file; name one that can be replaced again and again')
    for other in others:
        if is_same_file(path, found, other):
            raise UserError(f'state = {path!r} is the same file as {other!r}; name another file')
    folder = os.path.dirname(os.path.realpath(path))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f'cannot write {path!r}: the folder {folder} does not exist or is not to be written in')


def open_stream(path):
    """Open what is_stream, unbuffered; '-' is a copy of standard output, so that closing it shows its last errors."""
    if path != '-':
        return open(os.open(path, os.O_WRONLY | os.O_NOCTTY), 'wb', buffering=0)
    if sys.stdout is None:
        raise UserError('standard output is closed; name a file')
    sys.stdout.flush()
    return open(os.dup(sys.stdout.fileno()), 'wb', buffering=0)


class Output:
    """A file that appears under its name, whole, only when commit() is called; or a stream ('-' is standard output).

    file: what write() fills: a temporary file with an unpredictable name, tmp, in the target's folder. For a stream
    it is one without a name, copied on commit(), or with at_once the stream itself. A symbolic link stays, and the
    file that it names is replaced. inputs: paths that are never written to, overwrite or not.
    """

    def __init__(self, path, overwrite=False, at_once=False, inputs=()):
        self.path = path
        self.overwrite = overwrite
        self.size = 0
        self.tmp = ''
        self.stream = None
        self.name = repr(path)                  # of what write() fills, in messages
        self.found = check_target(path, overwrite, inputs)
        with write_errors(repr(path)):
            if is_stream(path, self.found):
                self.stream = open_stream(path)
            else:
                self.file = self.open_temporary()
        if self.stream and at_once:
            self.file = self.stream
        elif self.stream:
            self.name = f'a temporary file for {path!r}'
            with write_errors(self.name):
                self.file = tempfile.TemporaryFile(buffering=0)

    def open_temporary(self):
        """Make the temporary file that becomes the target; only its owner reads it where it will replace a file."""
        self.place = os.path.realpath(self.path) if os.path.islink(self.path) else self.path
        self.tmp = os.path.join(os.path.dirname(self.place), f'.nanomdl-{secrets.token_hex(8)}.tmp')
        UNFINISHED.add(self.tmp)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        return open(os.open(self.tmp, flags, 0o600 if self.found else 0o666), 'wb', buffering=0)

    def __enter__(self):
        return self

    def write(self, data):
        with write_errors(self.name):
            write_all(self.file, data)
        self.size += len(data)

    def commit(self):
        """Give what was written its name, or to the stream; only after this has it all been written."""
        with write_errors(repr(self.path)):
            if self.stream is None:
                self.rename()
                return
            if self.file is not self.stream:
                self.file.seek(0)
                while data := self.file.read(1 << 20):
                    write_all(self.stream, data)
            self.stream.close()

    def rename(self):
        if self.found:
            os.fchmod(self.file.fileno(), stat.S_IMODE(self.found.st_mode) & 0o777)
        os.fsync(self.file.fileno())            # a disk may say only now that it is full
        self.file.close()
        if self.overwrite:
            os.replace(self.tmp, self.place)
            return

        # A link is refused where the name has been taken since; some file systems do not have links.
        try:
            os.link(self.tmp, self.place)
        except FileExistsError:
            self.keep_temporary()
        except OSError:
            if os.path.lexists(self.place):
                self.keep_temporary()
            os.replace(self.tmp, self.place)

    def keep_temporary(self):
        UNFINISHED.discard(self.tmp)
        raise UserError(f'{self.path!r} has been made by another program since; what was to get this name is kept as '
                        f'{self.tmp!r}')

    def __exit__(self, *_):
        for file in (self.file, self.stream):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
        if self.tmp in UNFINISHED:
            with contextlib.suppress(OSError):
                os.remove(self.tmp)
            UNFINISHED.discard(self.tmp)


# --- progress ---

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
