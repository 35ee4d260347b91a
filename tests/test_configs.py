"""Shipped configs load and would start; what documents, the Makefile and slurm/ name is there."""
import fnmatch
import functools
import glob
import importlib.util
import itertools
import math
import os
import re
import shlex
import subprocess
from dataclasses import dataclass

from conftest import ROOT, run_here

import configurator

COMMAND = re.compile(r'\b(python|torchrun|sbatch) .*?(?=`|  |;| #|$)')
CONFIG = re.compile(r'(?<![\w/])config/[\w./{},*]*\.py')
COST = re.compile(r'\babout (a|\d)|not measured yet')


def tracked(pattern):
    """Return the files of the repository whose path fits (* crosses folders), not what a user put there."""
    listed = subprocess.run(['git', '-C', ROOT, 'ls-files'], capture_output=True, text=True, timeout=600)
    there = listed.stdout.split()
    if not there:
        # An unpacked archive is no clone: what lies there is all that there is.
        below = glob.glob('**', root_dir=ROOT, recursive=True)
        there = [path for path in below if os.path.isfile(os.path.join(ROOT, path))]
    return sorted(fnmatch.filter(there, pattern))


CONFIGS = tracked('config/*.py')
DOCUMENTS = ['README.md', 'LOG.md', 'Makefile', *tracked('docs/*.md'), *tracked('slurm/*')]


def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()


def head_of(path):
    """Return the comment lines that a config begins with."""
    return list(itertools.takewhile(lambda line: line.startswith('#'), read(path).splitlines()))


@functools.cache
def knobs_of(script):
    """Return {knob: default} of a script, given as a path below the root."""
    return configurator.knobs_of(os.path.join(ROOT, script))[0]


@dataclass(frozen=True)
class Command:
    """A command line of a document: its script (a path below the root), what follows, and its number of processes."""

    text: str
    script: str
    argv: tuple
    processes: int = 1

    @classmethod
    def of(cls, text):
        """Take a command line apart; script is '' where none is named."""
        try:
            words = shlex.split(text)
        except ValueError:              # a sentence, with an apostrophe
            return cls(text, '', ())
        counts = re.findall(r'--(?:nproc_per_node|nodes|gpus-per-node)=(\d+)', text)
        after = [i for i, word in enumerate(words) if word.endswith('.py') or word.startswith('lab.')]
        if words[0] == 'sbatch':
            after = [i for i, word in enumerate(words) if word.endswith('.sbatch')]
        if not after:
            return cls(text, '', ())
        script = words[after[0]]
        if script.startswith('lab.'):
            script = script.replace('.', '/') + '.py'
        return cls(text, script, tuple(words[after[0] + 1:]), math.prod(map(int, counts)))

    def faults(self):
        """Yield what is wrong with it by name: script, config files, knobs."""
        if not self.script or not os.path.isfile(os.path.join(ROOT, self.script)):
            yield f'no script {self.script!r}'
            return
        if self.script == 'slurm/sweep.sbatch':
            missing = [word for word in self.argv if word.endswith('.txt') and not os.path.isfile(f'{ROOT}/{word}')]
            yield from (f'no list {word}' for word in missing)
            return
        knobs = knobs_of('train.py' if self.script.endswith('.sbatch') else self.script)
        for word in self.argv:
            if word.startswith('config/') and not os.path.isfile(os.path.join(ROOT, word)) and word != 'config/mine.py':
                yield f'no config {word}'
            name = re.match(r'--(no[-_])?([\w-]+)', word)
            if name and name[2].replace('-', '_') not in {*knobs, 'help'}:
                yield f'no knob {name[2]}'


def commands_in(text):
    """Yield the command lines of a text; a backslash goes on in the next line."""
    text = re.sub(r' *\\\n#? *', ' ', text)
    for line in text.splitlines():
        for found in COMMAND.finditer(line):
            yield Command.of(found[0].strip().rstrip('.,:'))


def script_of(command):
    """Return the script whose knobs a command sets: lab/bench.py and slurm/ hand configs of train.py on."""
    hands_on = command.script == 'lab/bench.py' or command.script.endswith('.sbatch')
    return 'train.py' if hands_on else command.script


def load(command):
    """Load the knobs of a command and return them; verbs and their paths are left out. Raises UserError."""
    script = script_of(command)
    argv = [os.path.join(ROOT, word) if word in CONFIGS else word for word in command.argv]
    argv = [word for word in argv if word.startswith('--') or word.endswith('.py')]
    return configurator.configure(dict(__file__=os.path.join(ROOT, script), __doc__=''), argv)


def test_every_config_loads_and_would_start(tmp_path, monkeypatch, capsys):
    """Commands of heads, README and slurm/: knobs load, trainers pass --check with the processes that are named.

    --check needs neither data nor a device, and makes nothing; the processes must divide the batch. Two commands in
    heads must not share a folder by accident.
    """
    monkeypatch.chdir(tmp_path)
    problems = []
    folders = {}
    in_heads = {command.text for path in CONFIGS for command in commands_in('\n'.join(head_of(path)))}
    texts = ['\n'.join(head_of(path)) for path in CONFIGS] + [read('README.md'), *map(read, tracked('slurm/*.sbatch'))]
    for command in {command.text: command for text in texts for command in commands_in(text)}.values():
        if not any(word in CONFIGS for word in command.argv):
            continue
        try:
            values = load(command)
            if script_of(command) in ('train.py', 'distill.py') and command.script != 'lab/bench.py':
                monkeypatch.setenv('WORLD_SIZE', str(command.processes))
                argv = [os.path.join(ROOT, word) if word in CONFIGS else word for word in command.argv]
                assert run_here(script_of(command), *argv, '--check') == 0
                assert 'FLOPs per token' in capsys.readouterr().out
        except (configurator.UserError, AssertionError) as e:
            problems.append(f'{command.text}: {e}')
            continue
        if 'out_dir' in values and command.text in in_heads:
            argv = [word for word in command.argv if not word.startswith('--from_ckpt')]
            other = folders.setdefault(values['out_dir'], argv)
            if sorted(other) != sorted(argv):
                problems.append(f'{values["out_dir"]} is the folder of {other} and of {argv}')
    problems += [f'{name} was made' for name in os.listdir(tmp_path)]
    assert not problems, '\n'.join(problems)


def test_heads_of_configs_are_commands_and_costs():
    """The first line launches this file, the second says what that costs, and what else is named exists."""
    problems = []
    for path in CONFIGS:
        head = head_of(path)
        commands = list(commands_in('\n'.join(head)))
        if not re.match(r'# (python|torchrun) ', head[0]) or path not in commands[0].argv:
            problems.append(f'{path}: {head[0]!r} does not launch it')
        second = [line for line in head[1:] if not head[0].endswith('\\') or line != head[1]][0]
        if not COST.search(second):
            problems.append(f'{path}: {second!r} is no cost')
        problems += [f'{path}: {command.text}: {fault}' for command in commands for fault in command.faults()]
    assert not problems, '\n'.join(problems)


def expanded(pattern):
    """Return the names that braces stand for."""
    braces = re.search(r'\{([^{}]*)\}', pattern)
    if not braces:
        return [pattern]
    before = pattern[:braces.start()]
    after = pattern[braces.end():]
    return [name for choice in braces[1].split(',') for name in expanded(before + choice + after)]


def test_what_documents_name_exists():
    """Configs, scripts and knobs in README, LOG, docs, the Makefile, slurm/ and scripts; old configs have new names."""
    problems = []
    for path in [*DOCUMENTS, *tracked('*.py')]:
        if path.startswith('tests/') or path == 'docs/names.md':
            continue
        for pattern in CONFIG.findall(read(path)):
            problems += [f'{path}: no {name}' for name in expanded(pattern)
                         if name != 'config/mine.py' and not glob.glob(os.path.join(ROOT, name))]
    for path in DOCUMENTS:
        text = re.sub(r'\$\(PY\) |\.venv/bin/python ', 'python ', read(path))
        if path.endswith('.sbatch'):
            text = '\n'.join(line for line in text.splitlines() if line.startswith('#     '))
        if path != 'docs/names.md':
            problems += [f'{path}: {command.text}: {fault}' for command in commands_in(text)
                         if command.script for fault in command.faults()]
    assert not problems, '\n'.join(problems)


def test_old_names_of_configs_are_answered_with_the_new():
    """Each row of docs/names.md names a file that loads with its flags, and a missing file's error says so."""
    rows = re.findall(r'^\| `(config/[\w./]+)` \| `(config/[^`]+)` \|$', read('docs/names.md'), re.MULTILINE)
    assert len(rows) > 60
    problems = []
    for old, new in rows:
        path, *flags = new.split()
        launch = next(commands_in('\n'.join(head_of(path))), None) if path in CONFIGS else None
        if os.path.exists(os.path.join(ROOT, old)) or not launch:
            problems.append(f'{old} is there, or {path} is not')
            continue
        try:
            load(Command(new, launch.script, (path, *flags)))
            load(Command(old, launch.script, (old,)))
        except configurator.UserError as e:
            if new not in str(e):
                problems.append(f'{old}: {e}')
    assert not problems, '\n'.join(problems)


def test_the_tree_in_readme_is_the_tree_on_disk():
    """Each file and folder of the root, and each module of the rooms, in the block below `## The tree`."""
    block = re.search(r'## The tree\n+```\n(.*?)```', read('README.md'), re.DOTALL)[1]
    named = set()
    room = ''
    for line in block.splitlines():
        if line.startswith(' '):
            named |= {f'{room}{name}.py' for name in line.split()}
            continue
        names = re.split(' {3,}', line)[0].split()
        named |= set(names)
        room = names[0]
    files = [path for path in tracked('*') if not path.startswith('.')]
    there = {path.split('/')[0] + '/' if '/' in path else path for path in files}
    rooms = {name.split('/')[0] for name in named if name.endswith('.py') and '/' in name}
    there |= {path for path in files if os.path.dirname(path) in rooms and not path.endswith('__init__.py')}
    assert named == there, f'only in README: {sorted(named - there)}; only on disk: {sorted(there - named)}'


def test_importing_a_script_has_no_side_effect(tmp_path, monkeypatch, capsys):
    """Importing trains nothing, reads no command line and prints nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['pytest', '--nonsense'])
    for path in [path for path in tracked('*.py') if re.fullmatch(r'(lab/)?[^/]+\.py', path)]:
        spec = importlib.util.spec_from_file_location(f'fresh_{path[:-3].replace("/", "_")}', os.path.join(ROOT, path))
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert os.listdir(tmp_path) == [] and capsys.readouterr().out == ''


def test_the_index_of_the_log_is_its_headings():
    """A line for each entry, in their order, with the address that GitHub gives a heading."""
    log = read('LOG.md')
    index = re.findall(r'^\| [\d-]+ \| \[(.+?)\]\(#([\w-]+)\) \|', log, re.MULTILINE)
    headings = re.findall(r'^## (.+)$', log, re.MULTILINE)
    assert index == [(title, re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-')) for title in headings]
