"""Text to token ids, lossless: GPT-2's vocabulary, one of train_tokenizer.py, any byte-level BPE in a tokenizer.json.

A tokenizer is a namespace: encode(list of str) → list of id arrays, decode(ids) → str, name, sha256, file ('' for
GPT-2's), end (id of end-of-text), byte_lengths (V,): bytes that an id stands for, which sum to the bytes of the text.
Byte data has none (None): its ids are its bytes. Memory is constant.
A folder of train_tokenizer.py holds ranks.tiktoken, a line "base64 of the piece, space, id" each, tokenizer.json with
the same ids for transformers, and meta.json.
"""
import base64
import codecs
import hashlib
import itertools
import json
import os
import re
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from configurator import UserError, require
from corpus.bins import sha256_file
from corpus.documents import chunks_of

PIECE = 1 << 16                 # characters tokenised at once; a longer document is cut where the result stays the same
CUT = re.compile('[A-Za-z](?= )')
PROBE = "It's 1984,\n\n  naïve  \t日本 🙂's\r\n end 12345 "


END_OF_TEXT = '<|endoftext|>'
RANKS = 'ranks.tiktoken'
TOKENIZER_FORMAT = 'nanomdl-tokenizer-1'


def load_tokenizer(name, end_of_text=END_OF_TEXT, n_threads=0, data_dir='data'):
    """Return a tokenizer by name: None for 'byte', 'gpt2', one in data_dir/tokenizers, or the path of a tokenizer.json.

    A path may be its folder. On PROBE it must be lossless and cut where pieces_of cuts. end_of_text: its name in a
    tokenizer.json. n_threads 0: one per core.
    """
    if name == 'byte':
        return None
    path, n_threads = path_of(name, data_dir), n_threads or os.cpu_count() or 1
    if name == 'gpt2':
        from training import huggingface
        enc = huggingface.encoding()
        pieces = [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab)]
        digest = hashlib.sha256(b''.join(len(p).to_bytes(2, 'little') + p for p in pieces)).hexdigest()
        tok = tiktoken_tokenizer(enc, name, digest, '', n_threads)
    elif os.path.exists(os.path.join(path, RANKS)):
        enc, file = own_encoding(path), os.path.join(path, 'tokenizer.json')
        digest = sha256_file(file)                      # in the name too: trained again, it is another tokenizer
        tok = tiktoken_tokenizer(enc, f'{enc.name}@{digest[:8]}', digest, file, n_threads)
    else:
        tok = json_tokenizer(path, end_of_text)
    whole, *halves = tok.encode([PROBE, PROBE[:-7], PROBE[-7:]])
    lossless = tok.decode(whole) == PROBE and sum(tok.byte_lengths[i] for i in whole) == len(PROBE.encode())
    additive = np.array_equal(whole, np.concatenate(halves))
    require((lossless, f'tokenizer {name!r} does not give back the bytes of its text, expected a byte-level BPE'
             ' without normaliser or prefix space, such as gpt2'),
            (additive or not lossless, f'tokenizer {name!r} joins a word and the space after it,'
             ' expected one that splits there, such as gpt2'))
    return tok


def path_of(name, data_dir='data'):
    """Return where a tokenizer is: name itself where that exists or nothing is known of it, else in data_dir."""
    own = os.path.join(data_dir, 'tokenizers', name)
    return own if not os.path.exists(name) and os.path.isdir(own) else name


def tiktoken_tokenizer(enc, name, sha256, file, n_threads):
    mapped = ThreadPoolExecutor(n_threads).map if n_threads > 1 else map
    return types.SimpleNamespace(
        name=name, sha256=sha256, file=file, end=enc.eot_token, decode=enc.decode,
        byte_lengths=np.array([0 if i == enc.eot_token else len(enc.decode_single_token_bytes(i))
                               for i in range(enc.n_vocab)]),
        encode=lambda texts: list(mapped(lambda t: enc.encode_to_numpy(t, disallowed_special=()), texts)))


def own_encoding(folder):
    """Return a tokenizer of train_tokenizer.py as a tiktoken.Encoding, checked against the hashes of its meta.json."""
    import tiktoken
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            meta = json.load(f)
        with open(os.path.join(folder, RANKS), 'rb') as f:
            ranks = {base64.b64decode(piece): int(rank) for piece, rank in map(bytes.split, f)}
        found = {file: sha256_file(os.path.join(folder, file)) for file in meta['sha256']}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f'{folder} is no whole tokenizer ({type(e).__name__}: {e}); train it again with'
                        ' train_tokenizer.py') from None
    require((meta.get('format') == TOKENIZER_FORMAT, f'{folder} has format {meta.get("format")!r}, this version reads'
             f' {TOKENIZER_FORMAT!r}; train it again with train_tokenizer.py'),
            (found == meta['sha256'], f'the files of {folder} do not have the SHA-256 of its meta.json; train it again'
             ' with train_tokenizer.py'))
    return tiktoken.Encoding(meta['name'], pat_str=meta['pattern'], mergeable_ranks=ranks,
                             special_tokens=meta['special_tokens'])


def byte_strings(tok):
    """Return the byte string of every id of a tokenizers.Tokenizer, as a byte-level BPE spells them."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]     # GPT-2's way to print bytes as characters
    hidden = [b for b in range(256) if b not in visible]
    as_byte = {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
    tokens = [tok.id_to_token(i) or '' for i in range(tok.get_vocab_size())]
    return [bytes(as_byte[c] for c in s) if all(c in as_byte for c in s) else s.encode() for s in tokens]


def bytes_encoder(encode, strings):
    """Return encode (str -> ids) for any bytes: what is not UTF-8 goes byte by byte, as every single byte is an id."""
    single = {s: i for i, s in reversed(list(enumerate(strings))) if len(s) == 1}

    def encode_bytes(text):
        ids = []
        while text:
            try:
                return ids + list(encode(text.decode()))
            except UnicodeDecodeError as e:
                ids += [*encode(text[:e.start].decode()), *(single[text[i:i + 1]] for i in range(e.start, e.end))]
                text = text[e.end:]
        return ids
    return encode_bytes


def json_tokenizer(path, end_of_text):
    file = os.path.join(path, 'tokenizer.json') if os.path.isdir(path) else path
    require((os.path.isfile(file), f'tokenizer = {path!r}, expected byte, gpt2, the path of a'
             ' tokenizer.json, or the --name of one that train_tokenizer.py made'))
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
    PROBE). Text without such a place for 4 PIECEs is cut anywhere: still lossless, at most a token longer (on a
    million spaces tiktoken's stack overflows, on 4 PIECEs it does not).
    """
    decoder, text, position = codecs.getincrementaldecoder('utf-8')(), '', 0
    try:
        for chunk in itertools.chain(chunks, (b'',)):
            text, start, position = text + decoder.decode(chunk, final=not chunk), 0, position + len(chunk)
            while (match := CUT.search(text, start + PIECE)) or len(text) - start > 4 * PIECE:
                cut = match.end() if match else start + 4 * PIECE
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
