"""Files that a user names to be written: never over an input, whole or not at all, and nothing left behind.

Output is what every verb of compress.py and the state of `online` are written with.
"""
import contextlib
import os
import secrets
import select
import signal
import stat
import sys
import tempfile

from codec.container import MAGIC
from configurator import UserError

UNFINISHED = set()                              # names of temporary files, which a signal that ends the process removes


@contextlib.contextmanager
def signals_remove_temporaries():
    """Let SIGINT, SIGTERM and SIGHUP remove the temporary files and leave as an exception: exit status 128 + number.

    A signal that was ignored stays ignored (nohup). The handlers of before are put back in the end.
    """
    def leave(number, frame):
        # The names are removed here, not only where the exception passes, so that no moment is too early or too late.
        for name in list(UNFINISHED):
            with contextlib.suppress(OSError):
                os.remove(name)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def write_errors(name):
    """Turn an OSError into one line that says what could not be written; a closed pipe is its reader's wish."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as e:
        raise UserError(f'cannot write {name}: {e.strerror or e}') from None


def write_all(file, data):
    """Write all of data to an unbuffered file, which may take less at a time: a disk that fills, a busy pipe."""
    left = memoryview(data)
    while len(left):
        n_bytes = file.write(left)
        if n_bytes:
            left = left[n_bytes:]
        else:
            select.select([], [file], [])


def stat_of(path, stream):
    """Return os.stat of a path, links followed, or of the stream that '-' stands for; None where there is nothing."""
    try:
        return os.fstat(stream.fileno()) if path == '-' else os.stat(path)
    except (OSError, ValueError, AttributeError):       # a stream may be closed, of no file, or None
        return None


def is_stream(path, status):
    """Tell '-', fifos, sockets and devices, which are written through, from what a new file replaces."""
    if path == '-':
        return True
    return status is not None and not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode)


def begins_as_archive(path):
    """Tell whether a file can be read and starts as an archive does."""
    with contextlib.suppress(OSError), open(path, 'rb') as file:
        return file.read(len(MAGIC)) == MAGIC
    return False


def is_same_file(path, status, source):
    """Tell whether writing to path, of which status is the os.stat, would change source: a file, a folder's, or '-'."""
    # Of a checkpoint's folder the files are input, archives that lie beside them are not.
    if os.path.isdir(source):
        inside = os.path.realpath(path).startswith(os.path.join(os.path.realpath(source), ''))
        return inside and os.path.isfile(path) and not begins_as_archive(path)
    other = stat_of(source, sys.stdin)
    if status is None or other is None:
        return '-' not in (path, source) and os.path.realpath(path) == os.path.realpath(source)
    return os.path.samestat(status, other) and not stat.S_ISCHR(status.st_mode)


def check_target(path, overwrite, inputs):
    """Return os.stat of what has a target's name, or None; raise UserError for what must not be written there."""
    status = stat_of(path, sys.stdout)
    if status is not None and stat.S_ISDIR(status.st_mode):
        raise UserError(f'{path!r} is a folder, expected the name of a file to write')
    if not os.path.basename(path):
        raise UserError(f'{path!r} names no file, expected the name of a file to write')
    for source in inputs:
        if is_same_file(path, status, source):
            raise UserError(f'{path!r} would be written over the input {source!r}; name another file')

    # Nothing is lost in a fifo or a terminal; a disk is not a file, but as full of data.
    is_disk = status is not None and stat.S_ISBLK(status.st_mode)
    passes_through = is_stream(path, status) and not is_disk
    if not overwrite and not passes_through and os.path.lexists(path):
        raise UserError(f'{path!r} exists already; replace it with --overwrite (-f), or name another file')
    return status


def check_state(path, others):
    """Raise UserError where a state cannot be saved in path, which must be none of the other files."""
    status = None if path == '-' else stat_of(path, None)
    if is_stream(path, status) or os.path.isdir(path) or not os.path.basename(path):
        raise UserError(f'state = {path!r} is no regular file; name one that can be replaced again and again')
    for other in others:
        if is_same_file(path, status, other):
            raise UserError(f'state = {path!r} is the same file as {other!r}; name another file')
    folder = os.path.dirname(os.path.realpath(path))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f'cannot write {path!r}: the folder {folder} does not exist or is not to be written in')


def open_stream(path):
    """Open what is_stream, unbuffered; '-' is a copy of standard output, so that closing it shows its last errors."""
    if path != '-':
        return open(os.open(path, os.O_WRONLY | os.O_NOCTTY), 'wb', buffering=0)
    if sys.stdout is None:
        raise UserError('standard output is closed; name a file')
    sys.stdout.flush()
    return open(os.dup(sys.stdout.fileno()), 'wb', buffering=0)


class Output:
    """A file that appears under its name, whole, only when commit() is called; or a stream ('-' is standard output).

    file: what write() fills: a temporary file with an unpredictable name, tmp, in the target's folder. For a stream
    it is one without a name, copied on commit(), or with at_once the stream itself. A symbolic link stays, and the
    file that it names is replaced. inputs: paths that are never written to, overwrite or not.
    """

    def __init__(self, path, overwrite=False, at_once=False, inputs=()):
        self.path = path
        self.overwrite = overwrite
        self.size = 0
        self.tmp = ''
        self.stream = None
        self.name = repr(path)                  # of what write() fills, in messages
        self.replaced = check_target(path, overwrite, inputs)         # os.stat of what has the name, or None
        with write_errors(repr(path)):
            if is_stream(path, self.replaced):
                self.stream = open_stream(path)
            else:
                self.file = self.open_temporary()
        if self.stream and at_once:
            self.file = self.stream
        elif self.stream:
            self.name = f'a temporary file for {path!r}'
            with write_errors(self.name):
                self.file = tempfile.TemporaryFile(buffering=0)

    def open_temporary(self):
        """Make the temporary file that becomes the target; only its owner reads it where it will replace a file."""
        self.place = os.path.realpath(self.path) if os.path.islink(self.path) else self.path
        self.tmp = os.path.join(os.path.dirname(self.place), f'.nanomdl-{secrets.token_hex(8)}.tmp')
        UNFINISHED.add(self.tmp)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        permissions = 0o600 if self.replaced else 0o666
        return open(os.open(self.tmp, flags, permissions), 'wb', buffering=0)

    def __enter__(self):
        return self

    def write(self, data):
        """Write all of data, or raise UserError."""
        with write_errors(self.name):
            write_all(self.file, data)
        self.size += len(data)

    def commit(self):
        """Give what was written its name, or to the stream; only after this has it all been written."""
        with write_errors(repr(self.path)):
            if self.stream is None:
                self.rename()
                return
            if self.file is not self.stream:
                self.file.seek(0)
                while data := self.file.read(1 << 20):
                    write_all(self.stream, data)
            self.stream.close()

    def rename(self):
        """Give the temporary file its name, and the permissions of the file that it replaces."""
        if self.replaced:
            os.fchmod(self.file.fileno(), stat.S_IMODE(self.replaced.st_mode) & 0o777)
        os.fsync(self.file.fileno())            # a disk may say only now that it is full
        self.file.close()
        if self.overwrite:
            os.replace(self.tmp, self.place)
            return

        # A link is refused where the name has been taken since; some file systems do not have links.
        try:
            os.link(self.tmp, self.place)
        except FileExistsError:
            self.keep_temporary()
        except OSError:
            if os.path.lexists(self.place):
                self.keep_temporary()
            os.replace(self.tmp, self.place)

    def keep_temporary(self):
        """Raise UserError for a name that has been taken, and leave what was written where it is."""
        UNFINISHED.discard(self.tmp)
        raise UserError(f'{self.path!r} has been made by another program since; what was to get this name is kept as '
                        f'{self.tmp!r}')

    def __exit__(self, *_):
        for file in (self.file, self.stream):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
        if self.tmp in UNFINISHED:
            with contextlib.suppress(OSError):
                os.remove(self.tmp)
            UNFINISHED.discard(self.tmp)
