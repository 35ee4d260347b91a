r"""Train a byte-level BPE on any text: a tokenizer.json that transformers loads and a ranks file that tiktoken loads.

    python train_tokenizer.py --name=fineweb8k --source=HuggingFaceFW/fineweb-edu --hub_config=sample-10BT
    python train_tokenizer.py --name=mine --source='texts/*.txt' --vocab_size=1000
    python prepare_text.py --tokenizer=data/tokenizers/mine --name=mine --source='texts/*.txt'

In: UTF-8 text, streamed; files or hub data sets as prepare_text.py reads them. Out: DATA_DIR/tokenizers/NAME/
{tokenizer.json, tokenizer_config.json, ranks.tiktoken, meta.json}. Ids 0-255 are the bytes, so every byte string has
ids and comes back; merges follow in the order they were found; the last id is the end-of-text token. Every twentieth
piece of text is held out, for bytes per token on text that the merges have not seen.
"""
import base64
import os

from configurator import at_least, configure, require, run

name = ''                       # tokenizer to make, data/tokenizers/NAME
source = ''                     # file, glob (quoted; ** descends), hub id, or local folder in hub layout
vocab_size = 8000               # ids, the 256 bytes and end-of-text among them
max_bytes = 0                   # leading bytes to train on, whole pieces of about 64 kB; 0 = all
min_frequency = 2               # times that a pair must stand in the text to become a token
data_dir = 'data'
hub_config = ''                 # configuration of a hub data set, where it has several
text_field = 'text'             # column of a hub data set, key of a jsonl object
end_of_text = '<|endoftext|>'   # name of the token between documents
overwrite = False               # replace a tokenizer of this name

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"    # GPT-2's words
HELD_OUT_EVERY, HELD_OUT_BYTES = 20, 1 << 20


def pieces(documents, trained, held_out, bar):
    """Yield pieces of text to train on, their bytes into trained; every HELD_OUT_EVERY-th goes to held_out instead."""
    from tokens import pieces_of
    i = kept = 0
    for label, read in documents:
        for piece in pieces_of(read(), label):
            i, size = i + 1, len(piece.encode())
            if i % HELD_OUT_EVERY == 0 and kept < HELD_OUT_BYTES:
                held_out.append(piece)
                kept += size
                continue
            trained.append(size)
            bar.update(size)
            yield piece
            if max_bytes and sum(trained) >= max_bytes:
                return


def as_bytes(tokens):
    """Return the byte strings of byte-level BPE's tokens, which spell bytes as printable characters (GPT-2)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    byte_of = {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
    return [bytes(byte_of[c] for c in token) for token in tokens], {b: c for c, b in byte_of.items()}


def main(argv=None):
    configure(globals(), argv)
    require((name != '', 'name is empty; name the tokenizer, --name=mine makes data/tokenizers/mine'),
            (source != '', "source is empty; give files, --source='texts/*.txt', or the id of a hub data set"),
            (vocab_size > 256, f'vocab_size = {vocab_size}, expected more than 256: the bytes and {end_of_text!r}'),
            at_least('max_bytes', max_bytes, 0), at_least('min_frequency', min_frequency, 1))
    import shutil
    import sys

    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from tqdm import tqdm

    from bins import sha256_file, write_json
    from sources import open_source
    folder = os.path.join(data_dir, 'tokenizers', name)
    require((overwrite or not os.path.exists(os.path.join(folder, 'meta.json')),
             f'{folder} holds a tokenizer; give this one another --name, or replace it with --overwrite'))
    given, trained, held_out = open_source(source, hub_config, text_field), [], []
    require(('train' in given, f'{source!r} has no split train, only {", ".join(given)}; expected one to train on'))
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, min_frequency=min_frequency, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=[])
    with tqdm(unit='B', unit_scale=True, desc=name, disable=None, total=max_bytes or None) as bar:
        tok.train_from_iterator(pieces(given['train'](), trained, held_out, bar), trainer)
    n_bytes = sum(trained)
    require((n_bytes, f'source {source!r} holds no text, expected at least one byte of it; nothing was written'))
    found = tok.get_vocab_size()
    require((found == vocab_size - 1, f'vocab_size = {vocab_size}, but {n_bytes:,} bytes of text hold only'
             f' {found + 1:,} tokens that stand there {min_frequency} times; lower it, or give more text'))

    # bytes first, so that an id is a rank for tiktoken too; all pairs that make a token, as tiktoken joins any of them
    spelled = sorted(tok.get_vocab(), key=tok.get_vocab().get)
    strings, character = as_bytes(spelled)
    merged = [(t, s) for t, s in zip(spelled, strings) if len(s) > 1]
    vocab = {character[b]: b for b in range(256)} | {t: 256 + i for i, (t, _) in enumerate(merged)}
    merges = [pair for token, _ in merged for pair in sorted(
        ((token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab),
        key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        if max(vocab[pair[0]], vocab[pair[1]]) < vocab[token]]
    tok = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens([end_of_text])
    tmp = f'{folder}.{os.getpid()}.tmp'
    os.makedirs(tmp)
    try:
        tok.save(os.path.join(tmp, 'tokenizer.json'))
        write_json(os.path.join(tmp, 'tokenizer_config.json'), dict(
            tokenizer_class='PreTrainedTokenizerFast', eos_token=end_of_text, bos_token=end_of_text,
            clean_up_tokenization_spaces=False))
        with open(os.path.join(tmp, 'ranks.tiktoken'), 'wb') as f:
            for rank, string in enumerate([bytes([b]) for b in range(256)] + [s for _, s in merged]):
                f.write(base64.b64encode(string) + f' {rank}\n'.encode())
        ratio = n_held = None
        if held_out:
            n_held = len(''.join(held_out).encode())
            ratio = n_held / sum(len(e.ids) for e in tok.encode_batch(held_out, add_special_tokens=False))
        write_json(os.path.join(tmp, 'meta.json'), dict(
            vocab_size=vocab_size, pattern=PATTERN, special_tokens={end_of_text: vocab_size - 1}, source=source,
            text_bytes=n_bytes, held_out_bytes=n_held, held_out_bytes_per_token=ratio, files={
                file: sha256_file(os.path.join(tmp, file)) for file in ('tokenizer.json', 'ranks.tiktoken')},
            made_by=dict(script='train_tokenizer.py', argv=sys.argv[1:] if argv is None else argv)))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tmp, folder)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    print(f'{folder}: {vocab_size:,} ids from {n_bytes:,} bytes of text'
          + (f'; {ratio:.3f} bytes per token on {n_held:,} bytes held out' if held_out else ''))
    return 0


if __name__ == '__main__':
    run(main)
