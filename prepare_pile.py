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
import json
import os
import sys
import time
import types
from dataclasses import asdict, dataclass, field

from configurator import UserError, at_least, configure, names_in, one_of, require

# -----------------------------------------------------------------------------
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
# -----------------------------------------------------------------------------

config = configure(globals())

from tqdm import tqdm

from corpus.bins import finish, may_write
from corpus.documents import file_kind, hub_rows, hub_splits, local_files, records_of, require_hub, text_bytes_of
from corpus.tokens import load_tokenizer, tokenizer_meta
from corpus.writer import (
    EMPTY,
    PackedWriter,
    ResumeFile,
    TokenQueue,
    fractions_fit,
    hash_of,
    is_written,
    print_finished,
    split_at,
)

SCRIPT = 'prepare_pile.py'
KNOWN = dict(                   # Gao et al. 2020, The Pile, table 1
    arxiv='ArXiv', bookcorpus2='BookCorpus2', books3='Books3', dm_mathematics='DM Mathematics', enron='Enron Emails',
    europarl='EuroParl', freelaw='FreeLaw', github='Github', gutenberg='Gutenberg (PG-19)', hackernews='HackerNews',
    nih_exporter='NIH ExPorter', opensubtitles='OpenSubtitles', openwebtext2='OpenWebText2', philpapers='PhilPapers',
    pile_cc='Pile-CC', pubmed='PubMed Abstracts', pubmed_central='PubMed Central', stackexchange='StackExchange',
    ubuntu_irc='Ubuntu IRC', uspto='USPTO Backgrounds', wikipedia='Wikipedia (en)', youtube='YoutubeSubtitles')


def check_knobs(k):
    names = names_in(k.subsets)
    require((names, f'subsets is empty; name components, --subsets=pubmed,uspto, of {", ".join(KNOWN)}'),
            *(one_of('subsets', n, tuple(KNOWN)) for n in names), at_least('max_tokens', k.max_tokens, 0),
            (not k.whole_source or len(names) == 1, f'whole_source takes one component, subsets has {len(names)}'),
            fractions_fit(k.val_fraction, k.test_fraction))


# --- reading: shards of (text, component) in a fixed order ---

def open_shards(source, whole_source):
    """Return [(label, function that yields (text, component or None))] of the source, and what identifies it."""
    if files := local_files(source):
        odd = [path for path in files if file_kind(path) not in ('.jsonl', '.ndjson', '.json')]
        require((not odd, f'{odd[:1]} is not jsonl, expected shards such as 00.jsonl.zst'))
        return [(path, functools.partial(file_records, path)) for path in files], files
    require_hub(source, "a quoted glob such as 'pile/*.jsonl.zst' or a hub id")
    splits = hub_splits(source)
    require(('train' in splits, f'{source!r} has no split train, only {", ".join(splits)}'))
    train = splits['train']
    columns = ['text']
    if not whole_source:
        columns.append('meta')
    n = train.n_shards
    shards = []
    for i in range(n):
        shards.append((f'{source} shard {i + 1} of {n}', functools.partial(hub_records, train.shard(n, i), columns)))
    return shards, [source, n]


def file_records(path):
    """Yield (text, component) of a jsonl file."""
    for line, record in records_of(path):
        if not isinstance(record.get('text'), str):
            raise UserError(f'{path}:{line} has no "text", it has {", ".join(record)[:200]}; expected the Pile\'s form')
        yield record['text'], component_of(record.get('meta'))


def hub_records(rows, columns):
    """Yield (text, component) of one shard of a hub data set; None where the source names none."""
    for text, *meta in hub_rows(rows, columns, "expected the Pile's form, or one component and --whole_source"):
        component = None
        if meta:
            component = component_of(*meta)
        yield text or '', component


def component_of(meta):
    """Return meta.pile_set_name, None where there is none; some mirrors hold meta as JSON text."""
    if isinstance(meta, str) and meta.startswith('{'):
        meta = json.loads(meta)
    if not isinstance(meta, dict):
        return None
    return meta.get('pile_set_name')


@dataclass
class State:
    """How far the stream was read, as resume.json has it."""
    shard: int = 0                                      # whole shards read
    record: int = 0                                     # records read of the next one
    broken: list = field(default_factory=list)          # labels of shards that were left before their end
    components: dict = field(default_factory=dict)      # name: {split: state of its PackedWriter}


def state_from(saved, folders):
    """Return the State that was saved, a fresh one where there is none or the files do not hold what it says."""
    if saved is None:
        return State()
    for name, splits in saved['components'].items():
        if not all(is_written(folders[name], split, done['n_bytes']) for split, done in splits.items()):
            return State()
    return State(**saved)


def records_from(shards, state, whole_source, skip_broken):
    """Yield (text, component) from the place in state on, and move that place along."""
    for label, read in shards[state.shard:]:
        try:
            for number, (text, component) in enumerate(read(), 1):
                if number <= state.record:
                    continue
                require((whole_source or component, f'{label} has no meta.pile_set_name (document {number:,}),'
                         ' expected a source that names components, such as monology/pile-uncopyrighted, or one'
                         ' component alone with --whole_source'))
                state.record = number
                yield text, component
        except UserError as e:
            # Only a file is broken for good: a network that fails is no broken shard.
            if not skip_broken or not os.path.isfile(label):
                raise UserError(f'{e}; {state.shard} whole shards and {state.record:,} documents of this one are'
                                ' kept: mend it and run the same command, or leave its rest out with'
                                ' --skip_broken=True') from None
            state.broken.append(label)
            tqdm.write(f'{label} is broken, left out from document {state.record + 1:,} on: {e}')
        state.shard += 1
        state.record = 0


# --- writing ---

class Component:
    """The three splits of one component being written; val and test end where train is full."""

    def __init__(self, name, folder, dtype, tok, eot, max_tokens, state):
        separator = b''
        if eot:
            separator = b'\n\n\n'
        if eot and tok is not None:
            separator = [tok.end]
        self.name = name
        self.folder = folder
        train = PackedWriter(folder, 'train', dtype, tok, separator, max_tokens, state=state.get('train', EMPTY))
        self.writers = dict(train=train)
        for split in ('val', 'test'):
            self.writers[split] = PackedWriter(folder, split, dtype, tok, separator, leader=train,
                                               state=state.get(split, EMPTY))

    def state(self):
        return {split: writer.state() for split, writer in self.writers.items()}

    @property
    def n_tokens(self):
        return sum(writer.tokens for writer in self.writers.values())

    @property
    def is_full(self):
        return self.writers['train'].is_full

    def check(self, wanted, source):
        """Raise UserError where one of the splits that are wanted is empty."""
        n_documents = sum(writer.documents for writer in self.writers.values())
        require((n_documents, f'{source!r} holds no document of {self.name} ({KNOWN[self.name]}); check the source'))
        empty = [split for split in wanted if not self.writers[split].n_bytes]
        require((not empty, f'{" and ".join(empty)} of {self.name} would be empty, {n_documents:,} documents were'
                 ' found; expected some in each split, give a larger --val_fraction and --test_fraction, or more'
                 ' documents'))

    def leave_out_all_but(self, wanted):
        """Remove the splits that are not wanted."""
        for split in set(self.writers) - set(wanted):
            self.writers.pop(split).abort()


def save_state(resume, state, components, queue):
    """Write what waits, and how far everything is."""
    queue.flush()
    state.components = {name: component.state() for name, component in components.items()}
    resume.save(asdict(state))


def stream(records, components, queue, save, resume, k):
    """Sort documents into components and splits until all are full; save() when it is due, and before an error."""
    by_name = {KNOWN[name]: component for name, component in components.items()}
    started = time.time()
    n_before = sum(component.n_tokens for component in components.values())
    bar = tqdm(unit=' documents', disable=None)
    try:
        for text, pile_name in records:
            target = by_name.get(pile_name)
            if k.whole_source:
                target = next(iter(components.values()))
            if text and target:
                raw = text_bytes_of(text, target.name)
                place = hash_of((raw,), k.seed) / 2 ** 64
                split = split_at(place, k.test_fraction, k.test_fraction + k.val_fraction)
                queue.add(target.writers[split], (raw,), target.name, n_words=len(raw.split()))
            if resume.is_due:
                save()
            n_tokens = sum(component.n_tokens for component in components.values()) - n_before
            bar.set_postfix_str(f'{n_tokens / (time.time() - started):,.0f} tokens/s', refresh=False)
            bar.update()
            if all(component.is_full for component in components.values()):
                break
    finally:
        bar.close()


if __name__ == '__main__':
    check_knobs(types.SimpleNamespace(**config))
    names = names_in(subsets)
    folders = {n: os.path.join(data_dir, prefix + n) for n in names}
    recorded_argv = {n: may_write(folder, SCRIPT, None, overwrite) for n, folder in folders.items()}
    if not overwrite and print_finished(folders.values(), 'these data sets are there already, hashes as recorded'):
        sys.exit()

    # The source, and where an interrupted run of the same command was in it; one state serves all components.
    tok = load_tokenizer(tokenizer, end_of_text, num_proc, data_dir)
    shards, identity = open_shards(source, whole_source)
    resume = ResumeFile(folders[names[0]], [identity, names, tok and tok.sha256, eot, max_tokens, val_fraction,
                                            test_fraction, seed, whole_source], save_every)
    state = state_from(resume.read(), folders)
    if state.shard or state.record:
        print(f'going on from {resume.path}: {state.shard} of {len(shards)} shards and {state.record:,} documents done')

    # One pass over the stream fills all components.
    meta = tokenizer_meta(tok)
    queue = TokenQueue(tok)
    components = {n: Component(n, folders[n], meta['dtype'], tok, eot, max_tokens, state.components.get(n, {}))
                  for n in names}
    save = functools.partial(save_state, resume, state, components, queue)
    records = records_from(shards, state, whole_source, skip_broken)
    try:
        stream(records, components, queue, save, resume, types.SimpleNamespace(**config))
    except UserError:
        save()
        raise
    save()

    # All or nothing: each component has documents in each split that has a share.
    wanted = ['train']
    if val_fraction:
        wanted.append('val')
    if test_fraction:
        wanted.append('test')
    for component in components.values():
        component.check(wanted, source)
    if state.broken:
        print(f'{len(state.broken)} of {len(shards)} shards are broken, their ends are missing:'
              f' {", ".join(state.broken)}')

    # Give the files their names, and write each meta.json last.
    for n, component in components.items():
        component.leave_out_all_but(wanted)
        origin = dict(source=source, component=KNOWN[n], eot=eot, broken=state.broken, seed=seed)
        finish(folders[n], SCRIPT, recorded_argv[n], component.writers, origin, **meta)
    resume.remove()
