"""Make data/SUBSET from The Pile, one data set per component, all of them in one pass over the stream.

    python prepare_pile.py --subsets=pubmed,uspto                               streamed from the hub, GPT-2's tokens
    python prepare_pile.py --subsets=pubmed,uspto --source='pile/*.jsonl.zst'   shards here, in the Pile's own format
    python prepare_pile.py --subsets=pubmed --source=haritzpuerto/the_pile_00_PubMed_Abstracts --whole_source
    python prepare_pile.py --subsets=pubmed,c4 --tokenizer=byte --prefix=byte_ ...    data/byte_pubmed, ids are bytes

A record is {"text": ..., "meta": {"pile_set_name": "PubMed Abstracts"}}. Validation and test documents are chosen by
the hash of their content, so a text that occurs twice never stands on both sides. The state is saved every minute: the
same command goes on where an interrupted one was. Memory is constant. To train meanwhile, prepare a small --max_tokens
under another --prefix first.
"""
import functools
import hashlib
import json
import os
import time

import numpy as np
from tqdm import tqdm

from configurator import UserError, at_least, configure, one_of, require, run
from corpus.bins import BinWriter, finish, intact, may_write, print_splits, write_json
from corpus.documents import file_kind, hub_rows, hub_splits, local_files, records_of, text_bytes_of
from corpus.tokens import load_tokenizer, pieces_of, tokenizer_meta

subsets = ''                    # components, comma-separated: pubmed, uspto, ...; a wrong name prints the list
source = 'monology/pile-uncopyrighted'      # hub id, local folder in hub layout, or file or quoted glob of jsonl(.zst)
whole_source = False            # the source is one component and names none, as mirrors of a single one are
tokenizer = 'gpt2'              # gpt2, byte, NAME of train_tokenizer.py, or PATH of a tokenizer.json (or its folder)
end_of_text = '<|endoftext|>'   # its name in a tokenizer.json
eot = True                      # end-of-text between documents (three newlines in byte data); False: nothing, published
max_tokens = 0                  # leading training tokens of each component; 0 = all
val_fraction = 0.01             # of the documents
test_fraction = 0.01
seed = 0                        # another seed sets other documents aside
skip_broken = False             # leave out what follows the damage in a shard, say so and go on
data_dir = 'data'
prefix = ''                     # before the names: data/PREFIXpubmed
num_proc = 0                    # tokenising threads; 0 = one per core
save_every = 60.0               # seconds between saved states
overwrite = False               # replace finished data sets of these names that another command made

SCRIPT = 'prepare_pile.py'
KNOWN = dict(                   # Gao et al. 2020, The Pile, table 1
    arxiv='ArXiv', bookcorpus2='BookCorpus2', books3='Books3', dm_mathematics='DM Mathematics', enron='Enron Emails',
    europarl='EuroParl', freelaw='FreeLaw', github='Github', gutenberg='Gutenberg (PG-19)', hackernews='HackerNews',
    nih_exporter='NIH ExPorter', opensubtitles='OpenSubtitles', openwebtext2='OpenWebText2', philpapers='PhilPapers',
    pile_cc='Pile-CC', pubmed='PubMed Abstracts', pubmed_central='PubMed Central', stackexchange='StackExchange',
    ubuntu_irc='Ubuntu IRC', uspto='USPTO Backgrounds', wikipedia='Wikipedia (en)', youtube='YoutubeSubtitles')
SPLITS = ('train', 'val', 'test')
BATCH = 1 << 20                 # characters handed to the tokenizer's threads together


# --- reading: shards of (text, component) in a fixed order ---

def open_shards():
    """Return [(label, function that yields (text, component or None))] of the source, and what identifies it."""
    if files := local_files(source):
        odd = [path for path in files if file_kind(path) not in ('.jsonl', '.ndjson', '.json')]
        require((not odd, f'{odd[:1]} is not jsonl, expected shards such as 00.jsonl.zst'))
        return [(path, functools.partial(file_records, path)) for path in files], files
    require((not any(c in source for c in '*?[') and not source.startswith(('/', '.')) or os.path.isdir(source),
             f'no file matches {source!r}, expected a quoted glob such as \'pile/*.jsonl.zst\' or a hub id'))
    train = hub_splits(source)
    require(('train' in train, f'{source!r} has no split train, only {", ".join(train)}'))
    train = train['train']
    columns = ['text'] if whole_source else ['text', 'meta']
    n = train.n_shards
    shards = [(f'{source} shard {i + 1} of {n}', functools.partial(hub_records, train.shard(n, i), columns))
              for i in range(n)]
    return shards, [source, n]


def file_records(path):
    for line, record in records_of(path):
        if not isinstance(record.get('text'), str):
            raise UserError(f'{path}:{line} has no "text", it has {", ".join(record)[:200]}; expected the Pile\'s form')
        yield record['text'], component_of(record.get('meta'))


def hub_records(dataset, columns):
    for text, *meta in hub_rows(dataset, columns, "expected the Pile's form, or one component and --whole_source"):
        yield text or '', component_of(*meta) if meta else None


def component_of(meta):
    """Return meta.pile_set_name, None where there is none; some mirrors hold meta as JSON text."""
    meta = json.loads(meta) if isinstance(meta, str) and meta.startswith('{') else meta
    return meta.get('pile_set_name') if isinstance(meta, dict) else None


def split_of(text):
    """Choose the split of a document by the hash of its content, keyed by the seed."""
    digest = hashlib.blake2b(text_bytes_of(text, ''), digest_size=8, key=str(seed).encode()).digest()
    place = int.from_bytes(digest, 'big') / 2 ** 64
    return 'test' if place < test_fraction else 'val' if place < test_fraction + val_fraction else 'train'


# --- writing ---

class Component:
    """The three splits of one component being written; state is what a later process needs to go on from here."""

    def __init__(self, name, folder, tok, meta, state):
        self.name, self.folder, self.tok, self.meta, self.waiting = name, folder, tok, meta, []
        self.writers = {}
        for split in SPLITS:
            old = state.get(split, dict(n_bytes=0, text_bytes=0, documents=0, words=0))
            writer = self.writers[split] = BinWriter(folder, split, meta['dtype'], old['n_bytes'], old['documents'])
            writer.text_bytes, writer.documents, writer.words = old['text_bytes'], old['documents'], old['words']

    def state(self):
        for writer in self.writers.values():
            writer.flush()
        return {s: dict(n_bytes=w.n_bytes, text_bytes=w.text_bytes, documents=w.documents, words=w.words)
                for s, w in self.writers.items()}

    @property
    def full(self):
        return bool(max_tokens) and self.writers['train'].tokens >= max_tokens

    def write(self, split, text, ids):
        """Append one document, a list of id arrays or of bytes; nothing more once train has max_tokens."""
        if self.full:
            return 0
        writer = self.writers[split]
        before, end = writer.tokens, b'\n\n\n' if self.tok is None else np.array([self.tok.end])
        if eot and before:
            self.put(writer, end)
        if not self.full:
            writer.begin_document()
            for part in ids:
                self.put(writer, part)
            writer.words += len(text.encode('utf-8', 'replace').split()) if self.tok else 0     # of bytes: on demand
        return writer.tokens - before

    def put(self, writer, part):
        """Write bytes or ids, as many as max_tokens leaves room for."""
        if max_tokens and writer is self.writers['train']:
            part = part[:max_tokens - writer.tokens]
        n_bytes = len(part) if self.tok is None else int(self.tok.byte_lengths[part].sum())
        writer.write(part, text_bytes=n_bytes, documents=0)


def flush(waiting, tok):
    """Tokenise and write what waits [(component, split, text)], in order; return the number of tokens."""
    if tok is None:
        return sum(c.write(split, text, [text_bytes_of(text, c.name)]) for c, split, text in waiting)
    pieces = [list(pieces_of((text_bytes_of(text, c.name),), c.name)) for c, _, text in waiting]
    ids = iter(tok.encode([p for document in pieces for p in document]))
    return sum(c.write(split, text, [next(ids) for _ in document])
               for (c, split, text), document in zip(waiting, pieces))


def read_state(path, identity, folders):
    """Return the saved state of an interrupted run of the same command, or a fresh one."""
    fresh = dict(of=identity, shard=0, record=0, broken=[], components={})
    try:
        with open(path, encoding='utf-8') as f:
            old = json.load(f)
    except (OSError, ValueError):
        return fresh
    good = old.get('of') == identity and all(
        os.path.exists(p := os.path.join(folders[name], f'{split}.bin.tmp')) and os.path.getsize(p) >= done['n_bytes']
        for name, splits in old['components'].items() for split, done in splits.items())
    return old if good else fresh


def documents(shards, state):
    """Yield (text, component) from the place in state on, and move that place along."""
    for label, records in shards[state['shard']:]:
        try:
            for number, (text, component) in enumerate(records(), 1):
                if number > state['record']:
                    require((whole_source or component, f'{label} has no meta.pile_set_name (document {number:,}),'
                             ' expected a source that names components, such as monology/pile-uncopyrighted, or one'
                             ' component alone with --whole_source'))
                    state['record'] = number
                    yield text, component
        except UserError as e:
            if not (skip_broken and os.path.isfile(label)):             # a network that fails is no broken shard
                raise UserError(f'{e}; {state["shard"]} whole shards and {state["record"]:,} documents of this one are'
                                ' kept: mend it and run the same command, or leave its rest out with'
                                ' --skip_broken=True') from None
            state['broken'].append(label)
            tqdm.write(f'{label} is broken, left out from document {state["record"] + 1:,} on: {e}')
        state.update(shard=state['shard'] + 1, record=0)


def stream(shards, state, components, tok, save):
    """Read the shards from the saved place on, in batches; stop when all components are full."""
    by_name = {KNOWN[name]: c for name, c in components.items()}
    only = next(iter(components.values())) if whole_source else None
    bar, started, saved, n_tokens = tqdm(unit=' documents', disable=None), time.time(), time.time(), 0
    waiting, size = [], 0

    def flush_all():
        nonlocal waiting, size, n_tokens
        batch, waiting, size = waiting, [], 0
        n_tokens += flush(batch, tok)
        bar.set_postfix_str(f'{n_tokens / (time.time() - started):,.0f} tokens/s')

    try:
        for text, component in documents(shards, state):
            bar.update()
            if text and (target := only or by_name.get(component)):
                waiting.append((target, split_of(text), text))
                size += len(text) + 64                                  # a document of no length costs something too
            due = time.time() - saved > save_every
            if size > BATCH or due:
                flush_all()
                if all(c.full for c in components.values()):
                    break
            if due:
                save()
                saved = time.time()
    except UserError:
        flush_all()
        save()
        raise
    flush_all()
    bar.close()


def main(argv=None):
    configure(globals(), argv)
    names = [s.strip() for s in subsets.split(',') if s.strip()]
    require((names, f'subsets is empty; name components, --subsets=pubmed,uspto, of {", ".join(KNOWN)}'),
            *(one_of('subsets', n, tuple(KNOWN)) for n in names), at_least('max_tokens', max_tokens, 0),
            (not whole_source or len(names) == 1, f'whole_source takes one component, subsets has {len(names)}'),
            (min(val_fraction, test_fraction) >= 0 and val_fraction + test_fraction < 1,
             f'val_fraction = {val_fraction}, test_fraction = {test_fraction}, expected both >= 0 and a sum below 1'))
    folders = {n: os.path.join(data_dir, prefix + n) for n in names}
    recorded = {n: may_write(folder, SCRIPT, argv, overwrite) for n, folder in folders.items()}
    if not overwrite and all(metas := [intact(folder) for folder in folders.values()]):
        print('these data sets are there already, hashes as recorded')
        for folder, meta in zip(folders.values(), metas):
            print_splits(folder, meta['splits'])
        return
    tok = load_tokenizer(tokenizer, end_of_text, num_proc, data_dir)
    shards, identity = open_shards()
    meta = tokenizer_meta(tok)
    identity = json.loads(json.dumps([identity, names, tok and tok.sha256, eot, max_tokens, val_fraction, test_fraction,
                                      seed, whole_source]))
    path = os.path.join(folders[names[0]], 'resume.json')
    state = read_state(path, identity, folders)
    if state['shard'] or state['record']:
        print(f'going on from {path}: {state["shard"]} of {len(shards)} shards and {state["record"]:,} documents done')
    components = {n: Component(n, folders[n], tok, meta, state['components'].get(n, {})) for n in names}

    def save():
        state['components'] = {n: c.state() for n, c in components.items()}
        write_json(path, state)

    wanted = [s for s, share in zip(SPLITS, (1, val_fraction, test_fraction)) if share]
    stream(shards, state, components, tok, save)
    save()
    for n, c in components.items():
        found = sum(w.documents for w in c.writers.values())
        empty = [s for s in wanted if not c.writers[s].n_bytes]
        require((found, f'{source!r} holds no document of {n} ({KNOWN[n]}); check the source'),
                (not found or not empty, f'{" and ".join(empty)} of {n} would be empty, {found:,} documents were found;'
                 f' expected some in each split, give a larger --val_fraction and --test_fraction, or more documents'))
    if state['broken']:
        print(f'{len(state["broken"])} of {len(shards)} shards are broken, their ends are missing:'
              f' {", ".join(state["broken"])}')
    for n, c in components.items():
        for split in set(SPLITS) - set(wanted):
            c.writers.pop(split).abort()
        origin = dict(source=source, component=KNOWN[n], eot=eot, broken=state['broken'], seed=seed)
        finish(c.folder, SCRIPT, recorded[n], c.writers, origin, **meta)
    os.remove(path)


if __name__ == '__main__':
    run(main)
