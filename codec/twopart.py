"""Two-part archives: a model, quantised for one file, and that file coded by it in integers; decodes on any machine.

head: bytes, sha256; and where a block is coded, the model's args, start_id, tokenizer, streams, keep, sites, wide,
arithmetic, strings (a hash, for GPT-2's own vocabulary, which is not in the archive). Sections: wght, tokn.

torch is imported when the first block needs its model: not for an archive that holds its file as it is.
"""
import hashlib
import lzma
import os
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from codec.container import CODED, DAMAGED, STORED, TWO_PART, read_input, smaller_block, write_archive
from codec.progress import Bar, say
from codec.text import byte_strings, pack_strings, text_of, tokenize, unpack_strings
from configurator import UserError
from corpus.tokens import tokenizer_folder


@dataclass
class Packing:
    """How a file is packed: the knobs of compress.py that have these names."""
    weight_bits: float = 0.0
    streams: int = 0
    keep: int = 0
    block_bytes: int = 1 << 20
    sample_rows: int = 96
    tokenizer: str = ''
    device: str = 'cpu'
    threads: int = 0
    progress: bool = False


@dataclass
class Unpacking:
    """How an archive is decoded: the knobs of compress.py that have these names. The result does not depend on them."""
    device: str = 'cpu'
    threads: int = 0
    streams_at_once: int = 0
    progress: bool = False


# --- out ---

class Text(NamedTuple):
    """A file as a model reads it."""
    tokenizer: str                              # its name
    ids: np.ndarray                             # (n,)
    strings: list | None                        # the byte string of each id; None: an id is a byte
    start_id: int                               # what stands before the first


def text_for(checkpoint, raw, tokenizer):
    """Tokenise a file's bytes for a checkpoint. tokenizer: a name, or '' for what the checkpoint names."""
    data = checkpoint.get('data') or {}
    vocab_size = checkpoint['model_args']['vocab_size']
    name = tokenizer or data.get('tokenizer') or 'byte'
    path = name
    if not (tokenizer or name in ('byte', 'gpt2') or os.path.isfile(name)):
        # The name is of the run's data set, beside which the tokenizer may still lie.
        folder = tokenizer_folder(checkpoint)
        path = os.path.join(folder, 'tokenizer.json') if folder else name
    ids, strings = tokenize(raw, path)
    if len(ids) and int(ids.max()) >= vocab_size:
        raise UserError(f'the file has id {int(ids.max())}, the model {vocab_size}; use its own tokenizer')
    return Text(name, ids, strings, int(data.get('start_id', 10)))


def pack(checkpoint_path, path, out, options):
    """Write the two-part archive of a file under a checkpoint's model to out, an Output. options: Packing.

    Returns (original, length in bytes that the model's probabilities promise).
    """
    from codec import exact, quantised
    from training.checkpoint import load_checkpoint
    checkpoint = load_checkpoint(checkpoint_path)
    exact.check_covered(dict(checkpoint['model_args'], dropout=0.0))
    raw = read_input(path)
    text = text_for(checkpoint, raw, options.tokenizer)
    blocks = []
    bits = 0.0
    if len(text.ids):
        fitted = quantised.fit(checkpoint, text, options)
        blocks, bits = code_blocks(fitted.coder, text, len(raw), options)

    # A model that no block is coded with stays out, and the head says nothing of it.
    head = dict(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    sections = {}
    if any(block.form == CODED for block in blocks):
        head.update(fitted.settings)
        sections['wght'] = fitted.section
        if text.strings and text.tokenizer == 'gpt2':
            head['strings'] = hashlib.sha256(pack_strings(text.strings)).hexdigest()
        elif text.strings:
            sections['tokn'] = lzma.compress(pack_strings(text.strings), preset=9)
    else:
        say('no block is worth coding with this model: the file is stored as it is', options.progress)
    n_overhead = write_archive(out, TWO_PART, head, sections, blocks)
    return raw, n_overhead + bits / 8


def code_blocks(coder, text, n_bytes, options):
    """Return ([Block], their code length in bits) of a Text of n_bytes."""
    bar = Bar('pack', n_bytes, options.progress)
    blocks = []
    bits = 0.0
    done = 0
    for i in range(0, len(text.ids), options.block_bytes):
        ids = text.ids[i:i + options.block_bytes]
        original = text_of(ids, text.strings)
        bar.begin(done, bits, len(original) / len(ids))
        coded, coded_bits, context = coder.encode(ids, bar.symbols)
        block = smaller_block(len(ids), coded, original)
        if block.form == CODED:
            coder.context = context
            bits += coded_bits
        else:
            # The streams' contexts go on as if this block were not there.
            bits += 8 * len(original)
        blocks.append(block)
        done += len(original)
    bar.show(done, bits, last=True)
    return blocks, bits


# --- in ---

def strings_of(archive):
    """Return the byte string of each id of an archive's text, or None where an id is a byte."""
    if 'tokn' in archive.sections:
        return unpack_strings(archive.sections['tokn'])
    if 'strings' not in archive.head:
        return None
    name = archive.head['tokenizer']
    strings, _ = byte_strings(name)
    if hashlib.sha256(pack_strings(strings)).hexdigest() != archive.head['strings']:
        raise UserError(f'the tokenizer {name!r} found here is not the one of the archive')
    return strings


def decode_blocks(archive, verb, options):
    """Yield the bytes of each block of a two-part archive, checked against its CRC. options: Unpacking."""
    strings = strings_of(archive)
    bar = Bar(verb, archive.head['bytes'], options.progress)
    coder = None
    n_read = 0
    done = 0
    for entry, data in archive.blocks():
        n_read += len(data)
        if entry.form == STORED:
            text = data
        else:
            if coder is None:
                from codec import quantised
                coder = quantised.coder_of(archive, options)
            bar.begin(done)
            ids, coder.context = coder.decode(data, entry.n_symbols, bar.symbols)
            text = text_of(ids, strings)
        if zlib.crc32(text) != entry.text_crc:
            raise UserError(f'a block decodes to other bytes than were packed: other arithmetic here, or {DAMAGED}')
        done += len(text)
        bar.show(done, 8 * n_read)
        yield text
    bar.show(done, 8 * n_read, last=True)
