"""Make data/wiki40b_LANGUAGE from Wiki-40B: article texts as raw UTF-8 one after the other, all splits.

    python prepare_wiki40b.py --tfds_dir=DIR    a folder that TFDS prepared earlier, as tfrecord or array_record
    python prepare_wiki40b.py                   the same in ~/tensorflow_datasets, or let TFDS prepare it (extras)
    python prepare_wiki40b.py --source=hub      the same articles from the Hugging Face hub, streamed
    python prepare_wiki40b.py --source=hub --name=wiki40b_16mb --max_bytes=16384000 --max_eval_bytes=1000000

Order: shard after shard, as TFDS slices the set (tfds.load interleaves shards unless told not to; the hub may order
articles differently: compare the sha256). An interrupted run goes on after the last whole shard. English: 9.3 GB.
"""
import ast
import contextlib
import functools
import glob
import importlib.util
import json
import os
import re
import sys
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass

from configurator import UserError, at_least, configure, one_of, require

# -----------------------------------------------------------------------------
source = 'tfds'             # tfds: a prepared folder, or download with requirements-tfds.txt; hub: streamed
language = 'en'             # of the 41 that Wiki-40B has
tfds_dir = ''               # folder that contains wiki40b/; '' is $TFDS_DATA_DIR or ~/tensorflow_datasets
hub = 'google/wiki40b'      # hub id, or a local folder in hub layout
max_bytes = 0               # leading bytes of train to keep; 0: all
max_eval_bytes = 0          # leading bytes of val and of test; 0: all, the same for every size of train
check_articles = True       # stop where the number of articles is not what the set's own info, or the paper, says
data_dir = 'data'
name = ''                   # '' is wiki40b_LANGUAGE
overwrite = False           # replace a finished data set of this name that another command made
# -----------------------------------------------------------------------------

config = configure(globals())

from tqdm import tqdm

from corpus.bins import BinWriter, finish, may_write, sha256_file
from corpus.documents import hub_splits, hub_texts, text_bytes_of
from corpus.tfrecord import array_records, example_bytes, tfrecords
from corpus.writer import ResumeFile, is_written, print_finished

SCRIPT = 'prepare_wiki40b.py'
SPLITS = dict(train='train', validation='val', test='test')
PUBLISHED = dict(en=dict(train=2_926_536, validation=163_597, test=162_274))    # Guo et al. 2020, Wiki-40B


def check_knobs(k):
    require(one_of('source', k.source, ('tfds', 'hub')), at_least('max_bytes', k.max_bytes, 0),
            at_least('max_eval_bytes', k.max_eval_bytes, 0),
            (k.language != '', 'language is empty, expected a Wiki-40B language such as --language=en'))


# --- sources ---

@dataclass
class Shard:
    """A part of a split that is written as a whole."""
    articles: Callable          # yields its articles, bytes
    n_articles: int = None      # as the set's own info says; None: it does not


@dataclass
class Source:
    """Where the articles come from."""
    shards: dict                # split: [Shard]
    expected: dict              # split: number of articles, None where the set's own info does not say
    identity: dict              # for meta.json


def tfds_folder(tfds_dir, language):
    """Return the folder of the newest prepared version; prepare one where TensorFlow and Beam are installed."""
    root = os.path.expanduser(tfds_dir or os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets'))
    pattern = os.path.join(root, 'wiki40b', language, '*', 'dataset_info.json')
    if not glob.glob(pattern) and all(importlib.util.find_spec(m) for m in ('tensorflow', 'apache_beam')):
        import tensorflow_datasets as tfds

        # This takes hours, and access to gs://.
        tfds.builder(f'wiki40b/{language}', data_dir=root).download_and_prepare()
    infos = glob.glob(pattern)
    if not infos:
        raise UserError(f'no prepared wiki40b/{language} in {root}; name the folder that contains wiki40b/ with'
                        ' --tfds_dir, or take --source=hub, or let TFDS prepare it here, which needs TensorFlow and'
                        ' Beam: pip install -r requirements-tfds.txt')
    return max(map(os.path.dirname, infos), key=version_of)


def version_of(folder):
    """Return the numbers in a folder's name, 1.3.0 as [1, 3, 0]."""
    return [int(n) for n in re.findall(r'\d+', os.path.basename(folder))]


def tfds_source(folder, language):
    """Return the Source that a prepared TFDS folder is."""
    with open(os.path.join(folder, 'dataset_info.json'), encoding='utf-8') as f:
        info = json.load(f)
    form = info.get('fileFormat', 'tfrecord')                           # older TFDS knew one form only
    readers = dict(tfrecord=tfrecords, array_record=array_records)
    if form not in readers:
        raise UserError(f'{folder} is in form {form!r}, expected tfrecord or array_record; or take --source=hub')
    identity = dict(source='tfds', config=f'wiki40b/{language}', version=info.get('version', ''), form=form,
                    sha256=sha256_file(os.path.join(folder, 'dataset_info.json')))
    found = Source({}, {}, identity)
    for split in SPLITS:
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), f'*-{split}.{form}-*-of-*')))
        lengths = [int(n) for s in info['splits'] if s['name'] == split for n in s.get('shardLengths', [])]

        # How many shards there should be is in the info; in older ones only in the files' names.
        n_shards = len(lengths) or 1
        if paths and not lengths:
            n_shards = int(paths[0].rpartition('-')[2])
        if len(paths) != n_shards:
            raise UserError(f'{folder} holds {len(paths)} shards of {split}, expected {n_shards}; copy it again')
        articles = [functools.partial(tfds_articles, readers[form], path) for path in paths]
        found.shards[split] = [Shard(*pair) for pair in zip(articles, lengths or [None] * n_shards)]
        found.expected[split] = sum(lengths) or None
    return found


def tfds_articles(read, path):
    """Yield the articles of one shard as bytes."""
    for record in read(path):
        yield example_bytes(record, b'text')


def hub_source(hub, language):
    """Return the Source that a hub data set is."""
    splits = hub_splits(hub, language)
    missing = ', '.join(set(SPLITS) - set(splits))
    require((not missing, f'{hub!r} lacks {missing}, it has {", ".join(splits)}; expected those of google/wiki40b'))
    found = Source({}, {}, dict(source=hub, config=language))
    for split in SPLITS:
        rows = splits[split]
        info = (rows.info.splits or {}).get(split)
        found.expected[split] = getattr(info, 'num_examples', None)
        found.shards[split] = [Shard(functools.partial(hub_articles, rows, i, hub)) for i in range(rows.n_shards)]
    return found


def hub_articles(rows, shard, hub):
    """Yield the articles of one shard as bytes."""
    for text in hub_texts(rows.shard(rows.n_shards, shard)):
        if isinstance(text, str):
            yield undo_repr(text, hub)
        else:
            yield text_bytes_of(text, hub)


def undo_repr(text, where=''):
    """Return a text as bytes; one that arrives as "b'...'", the repr of bytes, becomes these bytes again."""
    if text[:2] in ("b'", 'b"') and text[-1] == text[1]:
        with contextlib.suppress(SyntaxError, ValueError):              # prose that only looks like it stays as it is
            return ast.literal_eval(text)
    return text_bytes_of(text, where)


# --- writing ---

@dataclass
class Progress:
    """How far a split is good, as resume.json has it."""
    shards: int = 0
    bytes: int = 0
    articles: int = 0


def progress_from(state, folder):
    """Return {split: Progress} of a saved state (None: there is none), from the start where files do not hold it."""
    fresh = {split: Progress() for split in SPLITS}
    if state is None:
        return fresh
    saved = {split: Progress(**done) for split, done in state['splits'].items()}
    # Of an empty file nothing is needed, so it may be missing.
    good = all(done.bytes == 0 or is_written(folder, SPLITS[split], done.bytes) for split, done in saved.items())
    if not good:
        return fresh
    return saved


def save_progress(resume, progress):
    """Write {split: Progress} to a ResumeFile."""
    resume.save(dict(splits={split: asdict(done) for split, done in progress.items()}))


class SplitWriter:
    """Write one split shard by shard, from where Progress says; save is called after each."""

    def __init__(self, folder, split, limit, progress, save, check_articles):
        self.split = split
        self.limit = limit                      # bytes, 0: none
        self.progress = progress
        self.save = save
        self.check_articles = check_articles
        self.bin = BinWriter(folder, SPLITS[split], resume_bytes=progress.bytes)
        self.bin.text_bytes = progress.bytes
        self.bin.documents = progress.articles

    @property
    def is_full(self):
        return 0 < self.limit <= self.bin.n_bytes

    def write(self, shards, expected):
        """Append the shards that are not done yet; expected: articles of all, for the bar."""
        total = expected
        if self.limit:
            total = None
        bar = tqdm(desc=self.split, total=total, initial=self.bin.documents, unit=' articles', disable=None)
        try:
            for i in range(self.progress.shards, len(shards)):
                if self.is_full:
                    break
                self.write_shard(shards[i], f'shard {i + 1} of {len(shards)} of {self.split}', bar)
                self.bin.flush()
                self.progress.shards = i + 1
                self.progress.bytes = self.bin.n_bytes
                self.progress.articles = self.bin.documents
                self.save()
        except (OSError, ValueError) as e:                              # UserError is one
            raise UserError(f'{e}; {self.progress.shards} of {len(shards)} shards of {self.split} are done and kept,'
                            ' the same command goes on from there') from None
        finally:
            bar.close()
            self.bin.file.flush()

    def write_shard(self, shard, label, bar):
        """Append the articles of one shard up to the limit, and count them where it was not reached."""
        before = self.bin.documents
        for article in shard.articles():
            if self.limit:
                article = article[:self.limit - self.bin.n_bytes]
            self.bin.write(article)
            bar.update()
            if self.is_full:
                return
        check_count(label, self.bin.documents - before, shard.n_articles, self.check_articles)

    def say(self, expected, published):
        """Check the number of articles, unless the limit cut them, and print it."""
        n = self.bin.documents
        if not self.is_full:
            check_count(f'{self.split} as a whole', n, expected or published, self.check_articles)
        why = ''
        if self.is_full:
            why = ', cut by the byte limit'
        elif expected:
            why = ', as the set itself says'
        if n == published:
            print(f'{self.split}: {n:,} articles, the published number')
        elif published:
            print(f'{self.split}: {n:,} articles{why}; not the published full split, which has {published:,}')
        else:
            print(f'{self.split}: {n:,} articles{why}; no published number to compare with')


def check_count(what, got, expected, stop):
    """Stop, or else say so, where got articles are not the expected number (None: unknown)."""
    if expected is None or got == expected:
        return
    message = f'{what} has {got:,} articles, expected {expected:,}'
    if stop:
        raise UserError(f'{message}; fetch it again, or accept it with --no-check_articles')
    print(message)


if __name__ == '__main__':
    check_knobs(types.SimpleNamespace(**config))
    folder = os.path.join(data_dir, name or f'wiki40b_{language}')
    recorded_argv = may_write(folder, SCRIPT, None, overwrite)
    if not overwrite and print_finished([folder], f'{folder} is there already, hashes as recorded'):
        sys.exit()

    # The shards of each split, in their order.
    if source == 'tfds':
        articles = tfds_source(tfds_folder(tfds_dir, language), language)
    else:
        articles = hub_source(hub, language)

    # resume.json holds how far each .tmp is good; another source or limit starts afresh.
    n_shards = {split: len(shards) for split, shards in articles.shards.items()}
    resume = ResumeFile(folder, [articles.identity, max_bytes, max_eval_bytes, n_shards])
    progress = progress_from(resume.read(), folder)
    save = functools.partial(save_progress, resume, progress)

    # One split after the other, shard after shard.
    writers = {}
    for split in SPLITS:
        limit = max_eval_bytes
        if split == 'train':
            limit = max_bytes
        writer = SplitWriter(folder, split, limit, progress[split], save, check_articles)
        writer.write(articles.shards[split], articles.expected[split])
        writer.say(articles.expected[split], PUBLISHED.get(language, {}).get(split))
        writers[SPLITS[split]] = writer.bin
    require((writers['train'].n_bytes > 0, f'{source} holds no text in train; check the folder or --hub'))

    # Give the files their names, and write meta.json last.
    finish(folder, SCRIPT, recorded_argv, writers, articles.identity)
    resume.remove()
