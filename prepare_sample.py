"""Make data/sample from text that ships with every CPython: the language reference in pydoc_data. Offline.

    python prepare_sample.py            about 0.47 MB of English at byte level → data/sample/{train,val,test}.bin

Topics stand in sorted order, three newlines between them. Some repeat others (`compound` contains `if`, `for`, `try`):
topics that share a paragraph form one group, and whole groups go to val or test. The text differs between Python
versions: meta.json records version and hashes.
"""
import hashlib
import os
import platform

from configurator import configure, require, run
from corpus.bins import BinWriter, finish, intact, may_write, print_splits

data_dir = 'data'
name = 'sample'
seed = 0                # another seed gives other val and test topics
overwrite = False       # replace a data set of this name that another script made

SHARE = 0.09            # of the bytes, for val and for test
LARGEST = 0.03          # groups above this share stay in train: val and test then hold at least three subjects each
PARAGRAPH = 60          # characters from which a shared paragraph counts: shorter ones are headings and grammar lines


def groups_of(topics):
    """Return lists of topic names; topics in different lists share no paragraph, white space aside."""
    groups = []
    for topic in sorted(topics):
        paragraphs = {' '.join(p.split()) for p in topics[topic].split('\n\n')}
        paragraphs, names = {p for p in paragraphs if len(p) >= PARAGRAPH}, [topic]
        for group in [g for g in groups if g[0] & paragraphs]:
            groups.remove(group)
            paragraphs, names = paragraphs | group[0], names + group[1]
        groups.append((paragraphs, names))
    return [sorted(names) for _, names in groups]


def split_topics(topics, seed):
    """Return {'train', 'val', 'test'} → sorted topic names; val and test fill up in hashed order, up to SHARE."""
    size = {topic: len(text.encode()) for topic, text in topics.items()}
    total, splits = sum(size.values()), dict(train=[], val=[], test=[])
    by_hash = {hashlib.sha256(f'{seed} {group[0]}'.encode()).digest(): group for group in groups_of(topics)}
    for _, group in sorted(by_hash.items()):
        n_bytes = sum(size[t] for t in group)
        filled = {split: sum(size[t] for t in splits[split]) for split in ('val', 'test')}
        fits = [s for s in filled if filled[s] + n_bytes <= SHARE * total and n_bytes <= LARGEST * total]
        splits[min(fits, key=filled.get, default='train')] += group         # the emptier of val and test
    return {split: sorted(names) for split, names in splits.items()}


def main(argv=None):
    configure(globals(), argv)
    require((name != '', 'name is empty, expected a folder name such as --name=sample'))
    from pydoc_data.topics import topics
    folder = os.path.join(data_dir, name)
    names = split_topics(topics, seed)
    texts = {split: [topics[t].strip('\n').encode() for t in names[split]] for split in names}
    joined = {split: b'\n\n\n'.join(parts) + b'\n' for split, parts in texts.items()}
    old = intact(folder)
    hashes = {split: hashlib.sha256(text).hexdigest() for split, text in joined.items()}
    if old and {split: entry['sha256'] for split, entry in old['splits'].items()} == hashes:
        return print_splits(folder, old['splits'])
    recorded_argv = may_write(folder, 'prepare_sample.py', argv, overwrite)
    writers = {split: BinWriter(folder, split) for split in joined}
    for split, writer in writers.items():
        writer.write(joined[split], documents=len(texts[split]))
    finish(folder, 'prepare_sample.py', recorded_argv, writers, dict(
        source='pydoc_data.topics', python=platform.python_version(), topics=names,
        sha256=hashlib.sha256(''.join(topics[t] for t in sorted(topics)).encode()).hexdigest()))


if __name__ == '__main__':
    run(main)
