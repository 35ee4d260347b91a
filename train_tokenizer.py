"""Learn a byte-level BPE from text: data/tokenizers/NAME, the same ids in tiktoken, transformers and this project.

    python train_tokenizer.py --name=mine8k --source='texts/*.txt'                        8,000 ids of local files
    python train_tokenizer.py config/tokenizer_fineweb8k.py                              8,000 ids of FineWeb-Edu
    python prepare_text.py --name=mine --source='texts/*.txt' --tokenizer=mine8k          and its use

In: text as prepare_text.py reads it (sources.py). Out: ranks.tiktoken (tiktoken.load.load_tiktoken_bpe), tokenizer.json
and tokenizer_config.json (transformers' AutoTokenizer), meta.json, last: settings, source, SHA-256 of the files, bytes
per token. Ids: 256 single bytes, so that any bytes have ids; the pieces in the order learned; end-of-text, which no
text encodes to. Words are cut as GPT-2 cuts them. The text is streamed; memory holds the distinct words with their
counts. The same text and settings give the same files.
"""
import base64
import hashlib
import os
import shutil
import sys

from tqdm import tqdm

from configurator import at_least, configure, require, run
from corpus import tokens
from corpus.bins import sha256_file, write_json
from corpus.documents import open_source

name = ''                       # tokenizer to make, data/tokenizers/NAME
source = ''                     # file, glob (quoted; ** descends), hub id, or local folder in hub layout
vocab_size = 8000               # ids, with the 256 bytes and end-of-text
data_dir = 'data'
hub_config = ''                 # configuration of a hub data set, where it has several
text_field = 'text'             # column of a hub data set, key of a jsonl object
max_bytes = 0                   # leading bytes of text to learn from, to the end of a piece; 0: all
held_out_every = 20             # each 20th piece (a document or 65,536 characters of one) is only measured; 0: none
min_frequency = 2               # times that a pair must occur to become a piece
overwrite = False               # replace a tokenizer of this name

# GPT-2's cut into words, as tiktoken writes it
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
MEASURED = 8 << 20              # bytes of learned and of held-out text, at most, that bytes per token are measured on


class Reader:
    """Iterate over the pieces of text to learn from, and keep what to measure on."""

    def __init__(self, documents):
        self.documents, self.digest, self.n_bytes, self.n_documents = documents, hashlib.sha256(), 0, 0
        self.learned, self.held_out = [], []

    def __iter__(self):
        kept, pieces = dict(learned=0, held_out=0), 0
        with tqdm(unit='B', unit_scale=True, desc=name, disable=None, total=max_bytes or None) as bar:
            for label, read in self.documents():
                self.n_documents += 1
                for piece in tokens.pieces_of(read(), label):
                    pieces += 1
                    part = 'held_out' if held_out_every and pieces % held_out_every == 0 else 'learned'
                    raw = piece.encode()
                    if kept[part] < MEASURED:
                        getattr(self, part).append(piece)
                        kept[part] += len(raw)
                    self.digest.update(raw)
                    self.n_bytes += len(raw)
                    bar.update(len(raw))
                    if part == 'learned':
                        yield piece
                    if max_bytes and self.n_bytes >= max_bytes:
                        return


def learn(texts):
    """Return the pieces that BPE learns from an iterable of str, by id: 256 bytes, then merges by falling frequency."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=min_frequency, show_progress=sys.stderr.isatty(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokens.byte_strings(tok)


def bytes_per_token(encoding, texts):
    n_tokens = sum(map(len, map(encoding.encode_ordinary, texts)))
    return sum(len(t.encode()) for t in texts) / n_tokens if n_tokens else 0.0


def save(folder, pieces, reader, argv):
    """Write a tokenizer's folder under a temporary name and rename it; returns its meta.json."""
    from training import huggingface
    tmp, end = f'{folder}.tmp', len(pieces)
    shutil.rmtree(tmp, ignore_errors=True)
    os.makedirs(tmp)
    try:
        with open(os.path.join(tmp, tokens.RANKS), 'wb') as f:
            f.writelines(base64.b64encode(piece) + b' %d\n' % i for i, piece in enumerate(pieces))
        huggingface.save_tokenizer(tmp, [*pieces, tokens.END_OF_TEXT.encode()], end)
        meta = dict(
            format=tokens.TOKENIZER_FORMAT, name=name, vocab_size=end + 1, pattern=PATTERN,
            special_tokens={tokens.END_OF_TEXT: end}, made_by=dict(script='train_tokenizer.py', argv=argv),
            sha256={file: sha256_file(os.path.join(tmp, file)) for file in sorted(os.listdir(tmp))},
            source=dict(source=source, config=hub_config, documents=reader.n_documents, text_bytes=reader.n_bytes,
                        sha256=reader.digest.hexdigest()))
        write_json(os.path.join(tmp, 'meta.json'), meta)
        encoding = tokens.own_encoding(tmp)
        meta['bytes_per_token'] = {part: bytes_per_token(encoding, getattr(reader, part))
                                   for part in ('learned', 'held_out') if getattr(reader, part)}
        write_json(os.path.join(tmp, 'meta.json'), meta)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(tmp, folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return meta


def main(argv=None):
    configure(globals(), argv)
    require((name != '' and name == os.path.basename(name) and name not in ('byte', 'gpt2'),
             f'name = {name!r}, expected that of a new folder of {data_dir}/tokenizers, such as --name=mine8k'),
            (source != '', "source is empty; give files, --source='texts/*.txt', or the id of a hub data set"),
            (vocab_size >= 257, f'vocab_size = {vocab_size}, expected at least 257: the 256 bytes and end-of-text'),
            (held_out_every == 0 or held_out_every >= 2, f'held_out_every = {held_out_every}, expected at least 2, or'
             ' 0 to learn from all'),
            at_least('max_bytes', max_bytes, 0), at_least('min_frequency', min_frequency, 1))
    folder = os.path.join(data_dir, 'tokenizers', name)
    require((overwrite or not os.path.exists(folder), f'{folder} exists; give this one another --name (or --data_dir),'
             ' or replace it with --overwrite'))
    splits = open_source(source, text_field, hub_config)
    require(('train' in splits, f'{source!r} has no split train, only {", ".join(splits)}; expected one to learn from'))
    reader = Reader(splits['train'])
    pieces = learn(reader)
    require((reader.n_bytes > 0, f'source {source!r} holds no text, expected at least one byte of it'),
            (len(pieces) == vocab_size - 1 or not reader.n_bytes, f'vocab_size = {vocab_size}, but {reader.n_bytes:,}'
             f' bytes of text fill only {len(pieces) + 1} ids (with pairs that occur at least {min_frequency} times);'
             ' give more text or a smaller --vocab_size'))
    meta = save(folder, pieces, reader, [a for a in (sys.argv[1:] if argv is None else argv) if a != '--overwrite'])
    measured = ', '.join(f'{value:.3f} on {part.replace("_", "-")} text' for part, value in
                         meta['bytes_per_token'].items())
    print(f'{folder}: {vocab_size:,} ids from {reader.n_bytes:,} bytes in {reader.n_documents:,} documents; bytes per'
          f' token: {measured}')
    if held_out_every and not reader.held_out:
        print(f'nothing was held out: the text has fewer than held_out_every = {held_out_every} pieces')


if __name__ == '__main__':
    run(main)
