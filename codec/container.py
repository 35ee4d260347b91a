"""The archive as a file: sections with CRCs, and blocks that are coded by a model or stored as they are.

An archive is magic, version, kind, a table of sections (name, length, CRC-32), a CRC-32 of all that, and the sections:
head (JSON), what its kind needs (wght: weights, tokn: a BPE model's byte strings), blks (per block: form, symbols,
bytes, CRC-32 of its text) and data. Nothing here imports torch: an archive is checked before that is loaded.
"""
import contextlib
import json
import lzma
import struct
import sys
import zlib
from typing import NamedTuple

from configurator import UserError

MAGIC = b'nMDL'
VERSION = 1
TWO_PART, ONLINE = 1, 2                         # kinds of archive
STORED, CODED = 0, 1                            # forms of a block
BLOCK = struct.Struct('<BIII')                  # the fields of a BlockEntry
SECTION = struct.Struct('<4sQI')                # name, bytes, CRC-32
MAX_BLOCK = 1 << 24                             # symbols
MAX_HEAD = 1 << 20                              # bytes of JSON
DAMAGED = 'the archive is damaged or was cut; get it again'


class Block(NamedTuple):
    """A block as a packer makes it."""
    form: int                                   # STORED or CODED
    n_symbols: int
    data: bytes                                 # what goes into the data section
    text: bytes                                 # what it decodes to


class BlockEntry(NamedTuple):
    """A line of an archive's block table."""
    form: int
    n_symbols: int
    n_bytes: int                                # in the data section
    text_crc: int                               # CRC-32 of what it decodes to


class Archive(NamedTuple):
    """An archive in memory, whose CRCs hold; what its head says has not been looked at."""
    kind: int
    head: dict
    table: list                                 # of BlockEntry
    sections: dict                              # {name: bytes}

    def blocks(self):
        """Yield (entry, its bytes of the data section) of each block."""
        start = 0
        for entry in self.table:
            end = start + entry.n_bytes
            yield entry, self.sections['data'][start:end]
            start = end


def smaller_block(n_symbols, coded, text):
    """Return a block that holds the smaller of what a coder made of n_symbols and their text itself."""
    if len(coded) < len(text):
        return Block(CODED, n_symbols, coded, text)
    return Block(STORED, len(text), text, text)


# --- out ---

def write_archive(out, kind, head, sections, blocks):
    """Write an archive to an Output; blocks: list of Block. Returns the number of bytes that are not block data."""
    json_bytes = json.dumps(head, separators=(',', ':')).encode()
    entries = [BLOCK.pack(b.form, b.n_symbols, len(b.data), zlib.crc32(b.text)) for b in blocks]
    contents = {'head': zlib.compress(json_bytes, 9)}
    contents.update(sections)
    contents['blks'] = b''.join(entries)
    contents['data'] = b''.join(b.data for b in blocks)

    # The front vouches for itself and, by the CRCs in its table, for everything that follows.
    front = MAGIC + struct.pack('<BBB', VERSION, kind, len(contents))
    for name, data in contents.items():
        front += SECTION.pack(name.encode(), len(data), zlib.crc32(data))
    out.write(front + struct.pack('<I', zlib.crc32(front)))
    for data in contents.values():
        out.write(data)
    return out.size - len(contents['data'])


# --- in ---

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


def open_archive(path):
    """Read an archive whole; whatever is wrong with it is a UserError."""
    raw = read_input(path)
    with forged_archives(path):
        return read_archive(raw, path)


def read_archive(raw, name):
    """Return the Archive in bytes that are called name; all CRCs are checked before any use."""
    if raw[:4] != MAGIC:
        raise UserError(f'{name} is not a nanoMDL archive: it starts with {raw[:4]!r}, expected {MAGIC!r}')
    version = raw[4] if len(raw) > 4 else None
    if len(raw) < 11 or version != VERSION:
        raise UserError(f'{name} has format version {version}, this program reads {VERSION}')
    kind = raw[5]
    sections, end = read_sections(raw, name)
    whole = {'head', 'blks', 'data'} <= set(sections)
    if end != len(raw) or kind not in (TWO_PART, ONLINE) or not whole:
        raise UserError(f'{name}: {len(raw) - end} bytes after the last section, or one missing: {DAMAGED}')

    # A head of any length could be made of a few bytes: what is unpacked of it is limited.
    head = json.loads(zlib.decompressobj().decompress(sections['head'], MAX_HEAD))
    entries = sections['blks']
    table = [BlockEntry(*BLOCK.unpack_from(entries, at)) for at in range(0, len(entries), BLOCK.size)]
    n_bytes = sum(entry.n_bytes for entry in table)
    if n_bytes != len(sections['data']) or any(not 0 < entry.n_symbols <= MAX_BLOCK for entry in table):
        raise UserError(f'{name}: block table: {DAMAGED}')
    return Archive(kind, head, table, sections)


def read_sections(raw, name):
    """Return ({section: bytes}, where the last one ends) of an archive's bytes, checked against its section table."""
    n_sections = raw[6]
    table_start = 7
    table_end = table_start + n_sections * SECTION.size
    if len(raw) < table_end + 4 or struct.unpack_from('<I', raw, table_end)[0] != zlib.crc32(raw[:table_end]):
        raise UserError(f'{name}: section table: {DAMAGED}')
    sections = {}
    start = table_end + 4
    for at in range(table_start, table_end, SECTION.size):
        code, length, crc = SECTION.unpack_from(raw, at)
        section = code.decode('ascii', 'replace')
        data = raw[start:start + length]
        if len(data) != length or zlib.crc32(data) != crc:
            raise UserError(f'{name}: section {section}: {DAMAGED}')
        sections[section] = data
        start += length
    return sections, start


@contextlib.contextmanager
def forged_archives(path):
    """Turn whatever the content of an archive, which anybody may have written, makes go wrong into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
            MemoryError, zlib.error, lzma.LZMAError, struct.error) as e:
        raise UserError(f'{path} holds what no packer writes ({type(e).__name__}: {str(e)[:200]}); {DAMAGED}') from None
