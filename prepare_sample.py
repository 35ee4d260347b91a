"""Make data/sample from text that ships with every CPython: the language reference in pydoc_data. Offline.

    python prepare_sample.py            about 0.47 MB of English at byte level → data/sample/{train,val,test}.bin

Topics stand in sorted order, three newlines between them. Some repeat others (`compound` contains `if`, `for`, `try`):
topics that share a paragraph form one group, and whole groups go to val or test. The text differs between Python
versions: meta.json records version and hashes.
"""
import hashlib
import os
import platform
import sys

from configurator import configure, require

# -----------------------------------------------------------------------------
data_dir = 'data'
name = 'sample'
seed = 0                # another seed gives other val and test topics
overwrite = False       # replace a data set of this name that another script made
# -----------------------------------------------------------------------------

configure(globals())

from corpus.bins import BinWriter, finish, intact, may_write, print_splits

SCRIPT = 'prepare_sample.py'
SHARE = 0.09            # of the bytes, for val and for test
LARGEST = 0.03          # groups above this share stay in train: val and test then hold at least three subjects each
PARAGRAPH = 60          # characters from which a shared paragraph counts: shorter ones are headings and grammar lines


def paragraphs_of(text):
    """Return the long paragraphs of a text as a set, white space aside."""
    joined = {' '.join(paragraph.split()) for paragraph in text.split('\n\n')}
    return {paragraph for paragraph in joined if len(paragraph) >= PARAGRAPH}


def groups_of(topics):
    """Return lists of topic names; topics in different lists share no paragraph, white space aside."""
    groups = []                         # of (paragraphs, names)
    for topic in sorted(topics):
        paragraphs = paragraphs_of(topics[topic])
        names = [topic]
        # A topic joins all groups that it shares a paragraph with.
        for group in [group for group in groups if group[0] & paragraphs]:
            groups.remove(group)
            paragraphs |= group[0]
            names += group[1]
        groups.append((paragraphs, names))
    return [sorted(names) for _, names in groups]


def split_topics(topics, seed):
    """Return {'train', 'val', 'test'} → sorted topic names; val and test fill up in hashed order, up to SHARE."""
    size = {topic: len(text.encode()) for topic, text in topics.items()}
    total = sum(size.values())
    splits = dict(train=[], val=[], test=[])
    by_hash = {hashlib.sha256(f'{seed} {group[0]}'.encode()).digest(): group for group in groups_of(topics)}
    for _, group in sorted(by_hash.items()):
        n_bytes = sum(size[topic] for topic in group)
        filled = {split: sum(size[topic] for topic in splits[split]) for split in ('val', 'test')}
        fits = [split for split in filled
                if filled[split] + n_bytes <= SHARE * total and n_bytes <= LARGEST * total]
        emptier = min(fits, key=filled.get, default='train')
        splits[emptier] += group
    return {split: sorted(names) for split, names in splits.items()}


if __name__ == '__main__':
    require((name != '', 'name is empty, expected a folder name such as --name=sample'))
    from pydoc_data.topics import topics
    folder = os.path.join(data_dir, name)

    # The text of each split, and its hash.
    names = split_topics(topics, seed)
    texts = {split: [topics[topic].strip('\n').encode() for topic in names[split]] for split in names}
    joined = {split: b'\n\n\n'.join(parts) + b'\n' for split, parts in texts.items()}
    hashes = {split: hashlib.sha256(text).hexdigest() for split, text in joined.items()}

    # The same text again is left as it is, whatever wrote it.
    meta = intact(folder)
    if meta and {split: entry['sha256'] for split, entry in meta['splits'].items()} == hashes:
        print_splits(folder, meta['splits'])
        sys.exit()

    # Write the splits, then meta.json.
    recorded_argv = may_write(folder, SCRIPT, None, overwrite)
    writers = {split: BinWriter(folder, split) for split in joined}
    for split, writer in writers.items():
        writer.write(joined[split], documents=len(texts[split]))
    whole = ''.join(topics[topic] for topic in sorted(topics))
    finish(folder, SCRIPT, recorded_argv, writers, dict(
        source='pydoc_data.topics', python=platform.python_version(), topics=names,
        sha256=hashlib.sha256(whole.encode()).hexdigest()))
