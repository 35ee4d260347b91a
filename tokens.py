"""Text to token ids: GPT-2's vocabulary or any byte-level BPE in a tokenizer.json, lossless, in constant memory.

A tokenizer is a namespace: encode(list of str) → list of id arrays, decode(ids) → str, name, sha256, file ('' for
GPT-2's), end (id of end-of-text), byte_lengths (V,): bytes that an id stands for, which sum to the bytes of the text.
Byte data has none (None): its ids are its bytes.
"""
import codecs
import hashlib
import itertools
import os
import re
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from bins import chunks_of, sha256_file
from configurator import UserError, require

PIECE = 1 << 16                 # characters tokenised at once; a longer document is cut where the result stays the same
CUT = re.compile('[A-Za-z](?= )')
PROBE = "It's 1984,\n\n  naïve  \t日本 🙂's\r\n end 12345 "


def load_tokenizer(name, end_of_text='<|endoftext|>', n_threads=0):
    """Return a tokenizer by name: None for 'byte', 'gpt2', or the path of a tokenizer.json or its folder.

    On PROBE it must be lossless and cut where pieces_of cuts. end_of_text: its name in a tokenizer.json. n_threads 0:
    one per core.
    """
    if name == 'byte':
        return None
    tok = gpt2_tokenizer(n_threads or os.cpu_count() or 1) if name == 'gpt2' else json_tokenizer(name, end_of_text)
    whole, *halves = tok.encode([PROBE, PROBE[:-7], PROBE[-7:]])
    lossless = tok.decode(whole) == PROBE and sum(tok.byte_lengths[i] for i in whole) == len(PROBE.encode())
    additive = np.array_equal(whole, np.concatenate(halves))
    require((lossless, f'tokenizer {name!r} does not give back the bytes of its text, expected a byte-level BPE'
             ' without normaliser or prefix space, such as gpt2'),
            (additive or not lossless, f'tokenizer {name!r} joins a word and the space after it,'
             ' expected one that splits there, such as gpt2'))
    return tok


def gpt2_tokenizer(n_threads):
    import gpt2
    enc = gpt2.encoding()
    mapped = ThreadPoolExecutor(n_threads).map if n_threads > 1 else map
    pieces = [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab)]
    digest = hashlib.sha256(b''.join(len(p).to_bytes(2, 'little') + p for p in pieces)).hexdigest()
    return types.SimpleNamespace(
        name='gpt2', sha256=digest, file='', end=enc.eot_token, decode=enc.decode,
        byte_lengths=np.array([0 if i == enc.eot_token else len(p) for i, p in enumerate(pieces)]),
        encode=lambda texts: list(mapped(lambda t: np.array(enc.encode_ordinary(t), np.uint32), texts)))


def json_tokenizer(path, end_of_text):
    file = os.path.join(path, 'tokenizer.json') if os.path.isdir(path) else path
    require((os.path.isfile(file), f'tokenizer = {path!r}, expected byte, gpt2, or the path of a tokenizer.json'))
    import tokenizers
    try:
        tok = tokenizers.Tokenizer.from_file(file)
    except Exception as e:                                              # the library raises Exception itself
        raise UserError(f'{file} is not a tokenizer.json of the tokenizers library ({e})') from None
    tok.encode_special_tokens = True                                    # "<|endoftext|>" in a text is text
    end = tok.token_to_id(end_of_text)
    require((end is not None, f'{file} has no token {end_of_text!r} to stand between documents;'
             ' name its own with --end_of_text'))
    special = {i for i, token in tok.get_added_tokens_decoder().items() if token.special}
    n_ids = 1 + max(tok.get_vocab().values())
    # a byte-level BPE spells a piece with one character per byte
    lengths = np.array([0 if i in special else len(tok.id_to_token(i) or '') for i in range(n_ids)])
    return types.SimpleNamespace(
        name=os.path.basename(os.path.abspath(path)), sha256=sha256_file(file), file=file,
        end=end, byte_lengths=lengths,
        decode=lambda ids: tok.decode(list(ids), skip_special_tokens=False),
        encode=lambda texts: [np.array(e.ids) for e in tok.encode_batch_fast(texts, add_special_tokens=False)])


def pieces_of(chunks, label):
    """Decode a document and yield it in pieces of about PIECE characters, whose tokens join to those of the whole.

    Cut before a space that follows a letter: byte-level BPE's patterns end a word there whatever follows (checked on
    PROBE). Text without such a place for 16 PIECEs is cut anywhere: still lossless, at most a token longer.
    """
    decoder, text, position = codecs.getincrementaldecoder('utf-8')(), '', 0
    try:
        for chunk in itertools.chain(chunks, (b'',)):
            text, start, position = text + decoder.decode(chunk, final=not chunk), 0, position + len(chunk)
            while (match := CUT.search(text, start + PIECE)) or len(text) - start > 16 * PIECE:
                cut = match.end() if match else start + 16 * PIECE
                yield text[start:cut]
                start = cut
            text = text[start:]
    except UnicodeDecodeError as e:
        raise UserError(f'{label} is not UTF-8 (byte 0x{e.object[e.start]:02x} near byte {position + e.start:,}),'
                        ' expected UTF-8 for a BPE tokenizer; convert it, or use --tokenizer=byte') from None
    if text:
        yield text


def tokenizer_meta(tok):
    """Return what meta.json says of a tokenizer, with the files that stand beside it (extras), as bins.finish takes."""
    if tok is None:
        return dict(dtype='uint8')
    extras = {'token_bytes.bin': tok.byte_lengths.astype('<u2').tobytes()}      # one per id
    if tok.file:
        extras['tokenizer.json'] = b''.join(chunks_of(tok.file))
    return dict(dtype='uint16' if len(tok.byte_lengths) <= 1 << 16 else 'uint32', vocab_size=len(tok.byte_lengths),
                start_id=tok.end, extras=extras, tokenizer=dict(
                    name=tok.name, sha256=tok.sha256, file='tokenizer.json' if tok.file else '',
                    token_bytes='token_bytes.bin'))
