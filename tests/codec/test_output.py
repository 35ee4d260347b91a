"""codec/output.py and what compress.py writes with it: never over its input, whole or not at all, nothing left behind.

Devices are named through links in a test's folder, so that a fault, run by root, cannot replace the machine's own.
"""
import errno
import hashlib
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_here, run_script, snapshot

import compress
from codec import container, online, output, twopart
from configurator import UserError
from model import GPT, ModelConfig, model_args
from training.checkpoint import save_checkpoint

NOISE = random.Random(5).randbytes(5000)            # stored as it is: quick, and longer than a block of a file system
LITTLE = ('--no-verify', '--no-progress', '--weight_bits=6', '--streams=4', '--online_n_layer=1', '--online_n_embd=32',
          '--online_n_head=2', '--online_window=32', '--online_streams=4', '--online_block=32', '--online_updates=1')


def write_stored(path, raw=NOISE):
    """Write the archive of a file that no model made smaller."""
    head = dict(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    with output.Output(str(path)) as out:
        container.write_archive(out, container.TWO_PART, head, {}, [container.smaller_block(len(raw), raw, raw)])
        out.commit()


@pytest.fixture(scope='module')
def originals(tmp_path_factory):
    """A folder with the checkpoint of a tiny random GPT, a text, and an archive of it."""
    folder = tmp_path_factory.mktemp('originals')
    torch.manual_seed(0)
    model = GPT(ModelConfig(block_size=32, n_layer=1, n_head=2, n_embd=32))
    data = dict(dataset='toy', sha256='', start_id=10, tokenizer='byte')
    save_checkpoint(str(folder / 'ckpt.pt'), dict(model=model.state_dict(), model_args=model_args(model), masks={},
                                                  data=data))
    (folder / 'text').write_bytes(NOISE)
    write_stored(folder / 'text.mdl')
    return folder


@pytest.fixture
def place(originals, tmp_path, monkeypatch):
    """The current folder, with copies of the originals."""
    for name in os.listdir(originals):
        shutil.copy(originals / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WRITERS = dict(pack=['pack', 'ckpt.pt', 'text'], online=['online', 'text'], unpack=['unpack', 'text.mdl'])
each_verb = pytest.mark.parametrize('verb', WRITERS)


def write(verb, *more):
    """Run a verb that writes, on its own input, with a target and flags."""
    return run_here('compress.py', *WRITERS[verb], *more, *LITTLE)


def result_of(verb, path):
    """Return the original bytes that a verb's output stands for."""
    if verb == 'unpack':
        return path.read_bytes()
    archive = container.open_archive(str(path))
    return b''.join(compress.decoded(str(path), archive, 'verify', SimpleNamespace(**compress.config)))


# --- names ---

@each_verb
def test_an_input_is_never_written_over(place, verb):
    """By its name, through links of both kinds and another spelling, with --overwrite too."""
    source = WRITERS[verb][-1]
    os.symlink(source, 'symbolic')
    os.link(source, 'hard')
    before = snapshot(place)
    for target in (source, f'../{place.name}/{source}', 'symbolic', 'hard'):
        for flags in ((), ('-f',)):
            with pytest.raises(UserError, match='would be written over the input'):
                write(verb, target, *flags)
    if verb == 'pack':
        with pytest.raises(UserError, match="over the input 'ckpt.pt'"):
            write(verb, 'ckpt.pt', '-f')
    assert snapshot(place) == before


def test_a_checkpoints_folder_is_input(place):
    """Its files are not written over; an archive that lies beside them is no part of it."""
    os.mkdir('run')
    shutil.move('ckpt.pt', 'run/ckpt.pt')
    before = snapshot(place)
    for name in ('run/ckpt.pt', './run/../run/ckpt.pt'):
        with pytest.raises(UserError, match="over the input 'run'"):
            run_here('compress.py', 'pack', 'run', 'text', name, '-f', *LITTLE)
    assert snapshot(place) == before
    for flags in ((), ('-f',)):
        assert run_here('compress.py', 'pack', 'run', 'text', 'run/text.mdl', *flags, *LITTLE) == 0


@pytest.mark.slow
def test_redirected_input_is_an_input(place):
    """unpack - X < X, and with standard output appended to the input."""
    command = [sys.executable, os.path.join(ROOT, 'compress.py'), 'unpack']
    before = snapshot(place)
    with open('text.mdl', 'rb') as source, open('text.mdl', 'ab') as target:
        named = subprocess.run([*command, '-', 'text.mdl', '-f'], stdin=source, capture_output=True, text=True)
        appended = subprocess.run([*command, 'text.mdl', '-'], stdout=target, stderr=subprocess.PIPE, text=True)
    for done in (named, appended):
        assert done.returncode == 1 and 'would be written over the input' in done.stderr
        assert done.stderr.count('\n') == 1
    assert snapshot(place) == before


@each_verb
def test_what_exists_is_replaced_when_asked_only(place, verb):
    """Refused before any work, with --overwrite or -f replaced, its permissions kept."""
    (place / 'target').write_bytes(b'precious')
    os.chmod('target', 0o640)
    with pytest.raises(UserError, match=r"'target' exists already; replace it with --overwrite \(-f\)"):
        write(verb, 'target')
    assert (place / 'target').read_bytes() == b'precious'
    for flag in ('-f', '--overwrite'):
        (place / 'target').write_bytes(b'precious')
        assert write(verb, 'target', flag) == 0
        assert result_of(verb, place / 'target') == NOISE
        assert stat.S_IMODE(os.stat('target').st_mode) == 0o640
    assert not [n for n in os.listdir(place) if n.startswith('.')]


@each_verb
def test_a_name_of_its_own(place, verb):
    """FILE gives FILE.mdl, FILE.mdl gives FILE; neither replaces what is there; permissions are a new file's."""
    made = 'text' if verb == 'unpack' else 'text.mdl'
    with pytest.raises(UserError, match=f"'{made}' exists already"):
        write(verb)
    os.remove(made)
    before = os.umask(0o022)
    assert write(verb) == 0
    os.umask(before)
    assert stat.S_IMODE(os.stat(made).st_mode) == 0o644
    assert result_of(verb, place / made) == NOISE


def test_an_archive_of_another_name_gives_no_name(place):
    os.rename('text.mdl', 'archive')
    os.link('archive', '.mdl')
    for name in ('archive', '.mdl'):
        with pytest.raises(UserError, match='does not end in .mdl, so name the FILE'):
            run_here('compress.py', 'unpack', name)


@pytest.mark.parametrize('name, command', [
    ('some folder', "tar -cf 'some folder.tar' 'some folder'"), ('some folder/', "tar -cf 'some folder.tar'"),
    ('.', '.tar .')])
def test_a_folder_is_answered_with_the_tar_command(place, name, command):
    """For FILE of pack and online, with a target named or not."""
    os.mkdir('some folder')
    for verb in (['pack', 'ckpt.pt'], ['online']):
        for target in ([], ['target']):
            with pytest.raises(UserError, match='is a folder, expected a file') as e:
                run_here('compress.py', *verb, name, *target)
            assert command in str(e.value) and '\n' not in str(e.value)
    assert not os.path.exists('target')


# --- targets of every kind ---

@each_verb
@pytest.mark.parametrize('target, message', [
    ('folder', 'is a folder'), ('link', 'is a folder'), ('folder/', 'is a folder'), ('new/', 'names no file'),
    ('', 'names no file'), ('no/file', 'cannot write'), ('text/file', 'cannot write')])
def test_refused_before_any_work(place, monkeypatch, verb, target, message):
    """A folder, a name that is none: nothing is read, with --overwrite neither."""
    os.mkdir('folder')
    os.symlink('folder', 'link')

    def work(*_):
        raise AssertionError('the input has been read')
    for module in (container, online, twopart):
        monkeypatch.setattr(module, 'read_input', work)
    before = snapshot(place)
    for flags in ((), ('-f',)):
        with pytest.raises(UserError, match=message):
            write(verb, target, *flags)
    assert snapshot(place) == before


@each_verb
def test_a_symbolic_link_stays_and_its_file_is_replaced(place, verb):
    """In the file's own folder, and also where the file is not there yet; without --overwrite a link is what exists."""
    os.mkdir('far')
    (place / 'far/file').write_bytes(b'precious')
    os.symlink('far/file', 'link')
    os.symlink('far/none', 'dangling')
    for link in ('link', 'dangling'):
        with pytest.raises(UserError, match='exists already'):
            write(verb, link)
    assert (place / 'far/file').read_bytes() == b'precious' and os.listdir('far') == ['file']
    for link in ('link', 'dangling'):
        assert write(verb, link, '-f') == 0
        assert os.path.islink(link) and result_of(verb, place / link) == NOISE
    assert sorted(os.listdir('far')) == ['file', 'none']


@each_verb
def test_a_fifo_is_written_through(place, verb):
    """Its reader gets everything, and it is still a fifo."""
    os.mkfifo('fifo')
    received = []

    def read():
        with open('fifo', 'rb') as file:
            received.append(file.read())
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert write(verb, 'fifo') == 0
    assert stat.S_ISFIFO(os.stat('fifo').st_mode)
    reader.join()
    (place / 'received').write_bytes(received[0])
    assert result_of(verb, place / 'received') == NOISE


@each_verb
def test_devices_are_written_through(place, verb):
    """Nothing replaces /dev/null; /dev/full is a disk that is always full: one line, exit code 1."""
    for name in ('null', 'full'):
        os.symlink(f'/dev/{name}', name)
    before = sorted(os.listdir(place))
    assert write(verb, 'null') == 0
    with pytest.raises(UserError, match=f"cannot write 'full': {os.strerror(errno.ENOSPC)}"):
        write(verb, 'full')
    assert os.path.islink('null') and os.path.islink('full')
    assert sorted(os.listdir(place)) == before


@pytest.mark.slow
def test_verified_without_a_name(place):
    """Archives to a pipe are decoded before a byte comes out, whether the original can be read again or not."""
    script = [sys.executable, os.path.join(ROOT, 'compress.py')]
    for source, flags in (('text', dict(stdin=subprocess.DEVNULL)), ('-', dict(input=NOISE))):
        command = [*script, 'pack', 'ckpt.pt', source, '-', '--weight_bits=6', '--streams=4']
        done = subprocess.run(command, capture_output=True, **flags)
        assert done.returncode == 0 and b'verified' in done.stderr, done.stderr
        (place / 'piped').write_bytes(done.stdout)
        assert result_of('pack', place / 'piped') == NOISE


@pytest.mark.slow
@pytest.mark.parametrize('source', ['text', '-'])
def test_an_archive_that_fails_verification_is_not_kept(place, monkeypatch, source):
    """The fresh process compares with the original, on disk and from a pipe, for a file and for a stream."""
    os.symlink('/dev/null', 'null')
    write_archive = container.write_archive

    def write_another(out, kind, head, sections, blocks):
        raw = b'another text'
        head = dict(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
        return write_archive(out, kind, head, {}, [container.smaller_block(len(raw), raw, raw)])
    monkeypatch.setattr(twopart, 'write_archive', write_another)
    monkeypatch.setattr(twopart, 'read_input', lambda path: NOISE)
    before = snapshot(place)
    for target in ('target', 'null'):
        with pytest.raises(UserError, match='does not decode to the file and was not kept'):
            run_here('compress.py', 'pack', 'ckpt.pt', source, target, *LITTLE, '--verify')
    assert snapshot(place) == before


def test_a_name_taken_meanwhile(place, monkeypatch):
    """Another program's file of the same name is left alone, and what was written is not lost."""
    out = output.Output('target')
    with pytest.raises(UserError, match="'target' has been made by another program since") as e, out:
        out.write(NOISE)
        (place / 'target').write_bytes(b'precious')
        out.commit()
    assert (place / 'target').read_bytes() == b'precious'
    assert repr(out.tmp) in str(e.value) and (place / out.tmp).read_bytes() == NOISE


def test_file_systems_without_hard_links(place, monkeypatch):
    """New files get their name all the same, and what has been made meanwhile is left alone."""
    def no_link(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    monkeypatch.setattr(os, 'link', no_link)
    assert write('unpack', 'target') == 0 and (place / 'target').read_bytes() == NOISE
    with pytest.raises(UserError, match='made by another program'), output.Output('other') as out:
        (place / 'other').write_bytes(b'precious')
        out.commit()
    assert (place / 'other').read_bytes() == b'precious'


# --- disks that fill ---

class FewBytes:
    """An unbuffered file that takes 7 bytes at a time, `room` in all, as a file on a full disk does."""

    def __init__(self, room):
        self.taken = b''
        self.room = room

    def write(self, data):
        if self.room == len(self.taken):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        n_bytes = min(7, len(data), self.room - len(self.taken))
        self.taken += bytes(data[:n_bytes])
        return n_bytes

    def close(self):
        pass


def test_everything_is_written_or_it_is_an_error():
    """Short writes go on to the last byte; the error of the one that takes nothing is not lost."""
    file = FewBytes(1000)
    output.write_all(file, NOISE[:1000])
    assert file.taken == NOISE[:1000]
    file = FewBytes(999)
    with pytest.raises(OSError):
        output.write_all(file, NOISE[:1000])


def test_a_pipe_that_does_not_wait(place):
    """A non-blocking pipe takes nothing while it is full; nothing is lost."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    received = []

    def read():
        with open(readable, 'rb') as file:
            received.append(file.read())
    reader = threading.Thread(target=read)
    data = bytes(1 << 20)
    with open(writable, 'wb', buffering=0) as file:
        threading.Timer(0.05, reader.start).start()
        output.write_all(file, data)
    reader.join()
    assert received == [data]


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FailsToClose:
    """A file that says only when it is closed that its disk is full, as network file systems do."""

    close = full

    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)


NO_SPACE = f'cannot write .*: {os.strerror(errno.ENOSPC)}'


@pytest.mark.parametrize('moment', ['write', 'fsync', 'close', 'replace'])
def test_errors_of_a_file_are_one_line(place, monkeypatch, moment):
    """At any moment: what existed is as it was, no temporary file stays."""
    (place / 'target').write_bytes(b'precious')
    before = snapshot(place)
    with pytest.raises(UserError, match=NO_SPACE), output.Output('target', overwrite=True) as out:
        if moment == 'write':
            out.file = FewBytes(1000)
        elif moment == 'close':
            out.file = FailsToClose(out.file)
        else:
            monkeypatch.setattr(os, moment, full)
        out.write(NOISE)
        out.commit()
    assert snapshot(place) == before


@pytest.mark.parametrize('at_once', [False, True])
@pytest.mark.parametrize('moment', ['temporary', 'stream', 'close'])
def test_errors_of_a_stream_are_one_line(place, moment, at_once):
    """Of its temporary file, of the stream, and of closing it."""
    os.symlink('/dev/null', 'null')
    with pytest.raises(UserError, match=NO_SPACE), output.Output('null', at_once=at_once) as out:
        if moment == 'close':
            out.stream = FailsToClose(out.stream)
        else:
            out.stream = FewBytes(1000)
        if moment == 'temporary':
            out.file = FewBytes(1000)
        elif at_once:
            out.file = out.stream
        out.write(NOISE)
        out.commit()


def limited(n_bytes):
    """Return a function that makes a process's files end at n_bytes, with a short write, as a full disk does."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


@pytest.mark.slow
@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_a_cut_output_is_an_error(place, unbuffered):
    """4,096 of 5,000 bytes fit: exit code 1 and one line through -, with a name nothing stays (unbuffered: Docker)."""
    environ = dict(os.environ, PYTHONUNBUFFERED=unbuffered, PYTHONDONTWRITEBYTECODE='1')
    script = os.path.join(ROOT, 'compress.py')
    before = snapshot(place)
    with open('redirected', 'wb') as redirected:
        for target in ('-', 'named'):
            done = subprocess.run([sys.executable, script, 'unpack', 'text.mdl', target], stdout=redirected,
                                  stderr=subprocess.PIPE, text=True, env=environ, preexec_fn=limited(4096))
            assert done.returncode == 1, done.stderr
            assert done.stderr == f'error: cannot write {target!r}: {os.strerror(errno.EFBIG)}\n'
    assert snapshot(place) == before | dict(redirected=NOISE[:4096])


@pytest.mark.slow
@pytest.mark.parametrize('unbuffered', ['', '1'])
def test_full_standard_output(place, unbuffered):
    """unpack and info, whose table is short enough to stay in a buffer until the process ends."""
    for command in (['unpack', 'text.mdl', '-'], ['info', 'text.mdl']):
        with open('/dev/full', 'wb') as full:
            done = subprocess.run([sys.executable, os.path.join(ROOT, 'compress.py'), *command], stdout=full,
                                  stderr=subprocess.PIPE, text=True, env=dict(os.environ, PYTHONUNBUFFERED=unbuffered))
        assert done.returncode == 1 and done.stderr == f"error: cannot write '-': {os.strerror(errno.ENOSPC)}\n"


@pytest.mark.slow
def test_closed_standard_streams(place):
    """A shell's <&- and >&- are one line as well."""
    script = os.path.join(ROOT, 'compress.py')
    for paths, redirection in (('text.mdl -', '>&-'), ('- new', '<&-')):
        done = subprocess.run(f'exec {sys.executable} {script} unpack {paths} {redirection}', shell=True,
                              stderr=subprocess.PIPE, text=True)
        assert done.returncode == 1 and 'is closed' in done.stderr and done.stderr.count('\n') == 1
    assert not os.path.exists('new')


@pytest.mark.slow
def test_a_full_disk(place):
    """A tmpfs of 4 kB, where this machine lets one be mounted: through - and by name, for every verb that writes."""
    os.mkdir('disk')
    inside = 'mount -t tmpfs -o size=4k none disk && '
    if subprocess.run(['unshare', '-rm', 'sh', '-c', inside + 'true'], capture_output=True).returncode:
        pytest.skip('no tmpfs can be mounted here')
    script = f'{sys.executable} {os.path.join(ROOT, "compress.py")}'
    for verb, words in WRITERS.items():
        for target, stays in (('- > disk/file', '4096'), ('disk/file', '0')):
            job = f'{script} {" ".join(words)} {target} {" ".join(LITTLE)}; echo $? $(cat disk/* disk/.n* | wc -c)'
            done = subprocess.run(['unshare', '-rm', 'sh', '-c', inside + job], capture_output=True, text=True,
                                  env=dict(os.environ, PYTHONUNBUFFERED='1'))
            assert done.stdout == f'1 {stays}\n', (verb, target, done.stdout, done.stderr)
            assert f'error: cannot write {target.split()[0]!r}: {os.strerror(errno.ENOSPC)}\n' in done.stderr


# --- temporary files ---

@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@each_verb
def test_a_signal_leaves_nothing(place, verb, number):
    """While the input is awaited there is a temporary file, after the signal there is none; the exit code says why."""
    os.mkdir('new')
    *words, _ = WRITERS[verb]
    os.mkfifo('input')
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, 'compress.py'), *words, 'input', 'new/target'],
                               stderr=subprocess.PIPE)
    with open('input', 'wb'):                       # opens when the other end does
        there = os.listdir('new')
        process.send_signal(number)
        process.communicate()
    # A program that Ctrl-C ends dies of the signal: the shell sees 130, its parent the signal itself.
    assert process.returncode == (-number if number == signal.SIGINT else 128 + number)
    assert len(there) == 1 and there[0].startswith('.nanomdl-')
    assert os.listdir('new') == []


@pytest.mark.slow
def test_ignored_signals_stay_ignored(place):
    """nohup: what was told to survive a hang-up does."""
    os.mkfifo('input')
    command = [sys.executable, os.path.join(ROOT, 'compress.py'), 'unpack', 'input', 'target']
    process = subprocess.Popen(command, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    with open('input', 'wb') as file:
        process.send_signal(signal.SIGHUP)
        file.write((place / 'text.mdl').read_bytes())
    process.communicate()
    assert process.returncode == 0 and (place / 'target').read_bytes() == NOISE


def test_handlers_are_put_back(place):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert write('unpack', 'target') == 0
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


@each_verb
def test_planted_links_are_not_followed(place, verb):
    """Names that can be foretold, as earlier code had them, lead nobody to a file of ours."""
    (place / 'victim').write_bytes(b'precious')
    for name in (f'target.{os.getpid()}.tmp', 'state.tmp'):
        os.symlink('victim', name)
    assert write(verb, 'target', '--state=state') == 0
    assert (place / 'victim').read_bytes() == b'precious'


# --- the saved state of online ---

@pytest.mark.parametrize('state, message', [
    ('folder', 'is no regular file'), ('fifo', 'is no regular file'), ('null', 'is no regular file'),
    ('-', 'is no regular file'), ('no/state', 'cannot write'), ('text', "the same file as 'text'"),
    ('linked', "the same file as 'text'"), ('target', "the same file as 'target'")])
def test_states_are_refused_before_any_work(place, state, message):
    os.mkdir('folder')
    os.mkfifo('fifo')
    os.symlink('/dev/null', 'null')
    os.symlink('text', 'linked')
    with pytest.raises(UserError, match=message):
        write('online', 'target', f'--state={state}')
    assert not os.path.exists('target') and (place / 'text').read_bytes() == NOISE


def test_a_state_that_cannot_be_written(place, monkeypatch):
    """The state of before is kept, the error is one line, no temporary file stays."""
    monkeypatch.setattr(online, 'SEGMENT_SYMBOLS', 1000)
    states = []
    save = online.Session.save

    def fill_the_disk(session):
        if states:
            monkeypatch.setattr(os, 'fsync', full)
        save(session)
        states.append((place / 'state').read_bytes())

    monkeypatch.setattr(online.Session, 'save', fill_the_disk)
    with pytest.raises(UserError, match=f"cannot write 'state': {os.strerror(errno.ENOSPC)}"):
        write('online', 'target', '--state=state')
    assert len(states) == 1 and (place / 'state').read_bytes() == states[0]
    assert sorted(os.listdir(place)) == ['ckpt.pt', 'state', 'text', 'text.mdl']


def test_a_state_stays_until_the_archive_is_there(place):
    """A full disk at the very end costs no coding: the next command takes the state and ends at once."""
    os.symlink('/dev/full', 'full')
    with pytest.raises(UserError, match='cannot write'):
        write('online', 'full', '--state=state')
    assert os.path.exists('state')
    assert write('online', 'target', '--state=state') == 0 and not os.path.exists('state')
    assert result_of('online', place / 'target') == NOISE


def test_a_state_that_was_not_used_is_not_removed(place):
    """An empty file and a two-part archive need none; what has this name is left alone."""
    (place / 'mine').write_bytes(b'precious')
    (place / 'empty').write_bytes(b'')
    assert run_here('compress.py', 'online', 'empty', '--state=mine', *LITTLE) == 0
    assert run_here('compress.py', 'unpack', 'empty.mdl', '-f', '--state=mine') == 0
    assert write('unpack', 'target', '--state=mine') == 0
    assert (place / 'mine').read_bytes() == b'precious'


@pytest.mark.slow
def test_the_command_line_as_it_is_typed(place):
    """-f behind the verb, as with gzip and xz; --help says what happens to files."""
    assert run_script(os.path.join(ROOT, 'compress.py'), 'unpack', '-f', 'text.mdl', cwd=place).returncode == 0
    assert '--overwrite' in run_script(os.path.join(ROOT, 'compress.py'), '--help').stdout
