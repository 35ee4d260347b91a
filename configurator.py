"""Knobs: module-level literals of a script, overridden by config files and --key=value, left to right, last wins.

    python SCRIPT.py [VERB PATH...] [CONFIG.py...] [--key=value...]      --help prints the knobs as the source has them

A knob is a public lower-case int, float, bool or str assigned a literal at the top level of the script; a script that
says configure(globals(), fields_of='model.ModelConfig') takes the fields of that dataclass as knobs too. A config file
is Python, run in a namespace that holds the current values, so `epochs = epochs * 2` works; names that start with `_`
are private to it. "Off" is '', 0 or -1, as each knob's comment says. -f is short for --overwrite where a script has it.
"""
import ast
import difflib
import os
import signal
import sys
import types


class UserError(ValueError):
    """A mistake the user can mend: one line with the value, the expectation and the cure."""


# Knobs of earlier versions: {name: (the only value that may still be given, what to do instead)}.
RETIRED = {
    'decoupled': (False, 'the penalty goes through the optimiser, as published'),
    'tokens_per_second': (0.0, '--check prints hours for two speeds'),
    'mode': ('information', 'what each token costs is asked by python -m lab.entropy --from_ckpt=out/RUN'),
}



def knobs_of(path):
    """Return ({knob: default}, source text of the knob block) of a script, read from its source: nothing is run."""
    with open(path, encoding='utf-8') as f:
        source = f.read()
    body = ast.parse(source).body
    lines = source.splitlines()
    defaults = {}
    places = []
    for node in body:
        name, value = literal_of(node)
        if name:
            defaults[name] = value
            places.append(node)
    block = text_between(lines, places)

    # A script may be called through a link; the modules that it names lie beside the file itself.
    folder = os.path.dirname(os.path.realpath(path))
    for module, name in dataclasses_named_in(body):
        fields, text = fields_of(os.path.join(folder, f'{module}.py'), name)
        for field, value in fields.items():
            defaults.setdefault(field, value)
        block += f'\n# fields of {name} in {module}.py are knobs too\n{text}'
    return defaults, block


def literal_of(node):
    """Return the name and the value of a knob that a statement assigns, ('', None) where it assigns none."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target = node.targets[0]
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        target = node.target
    else:
        return '', None
    if not isinstance(target, ast.Name) or target.id.startswith('_') or not target.id.islower():
        return '', None
    try:
        value = ast.literal_eval(node.value)
    except ValueError:
        return '', None
    if type(value) not in (int, float, bool, str):
        return '', None
    return target.id, value


def text_between(lines, nodes):
    """Return the source lines from the first statement to the last, with the comments right above the first."""
    if not nodes:
        return ''
    first = nodes[0].lineno
    while first > 1 and lines[first - 2].lstrip().startswith('#'):
        first -= 1
    return '\n'.join(lines[first - 1:nodes[-1].end_lineno])


def dataclasses_named_in(body):
    """Yield (module, class) of each `configure(..., fields_of='module.Class')` among top-level statements."""
    for node in body:
        call = getattr(node, 'value', None)
        if not isinstance(call, ast.Call) or getattr(call.func, 'id', '') != 'configure':
            continue
        for keyword in call.keywords:
            if keyword.arg == 'fields_of':
                yield keyword.value.value.split('.')


def fields_of(path, name):
    """Return ({field: default}, source text) of a dataclass in a file."""
    with open(path, encoding='utf-8') as f:
        source = f.read()
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    nodes = [node for node in classes[name].body if literal_of(node)[0]]
    fields = dict(literal_of(node) for node in nodes)
    return fields, text_between(source.splitlines(), nodes)


def coerce(name, value, default, where):
    """Return value as the type of default: int widens to float, an integral float narrows to int; else UserError."""
    kind = type(default)
    if type(value) is kind:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    raise UserError(f'{where}: {name} = {value!r} is a {type(value).__name__},'
                    f' expected {kind.__name__} (default {default!r})')


def parse(name, text, default, where):
    """Turn the text after --name= into a value of the type of default."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        if text.lower() in ('true', '1', 'yes', 'on'):
            return True
        if text.lower() in ('false', '0', 'no', 'off'):
            return False
        raise UserError(f'{where}: --{name}={text} is not a bool; write --{name} (true), --no-{name} or --{name}=False')
    try:
        if any(c in text.lower() for c in '.enif'):
            value = float(text)
        else:
            value = int(text)
    except ValueError:
        raise UserError(f'{where}: --{name}={text} is not a number;'
                        f' expected {type(default).__name__}, default {default!r}') from None
    return coerce(name, value, default, where)


def names_in(text):
    """Return the parts of a comma-separated list, without spaces around them and without empty ones."""
    return [part.strip() for part in text.split(',') if part.strip()]


def retired(name, value, where):
    """Say whether a knob of an earlier version is given at the value that it now always has; refuse another value."""
    if name not in RETIRED:
        return False
    only, instead = RETIRED[name]
    if value != only:
        raise UserError(f'{where}: {name} = {value!r} is no knob any more (it was {only!r} in every shipped config);'
                        f' {instead}')
    return True


def retired_flag(name, equals, text, where):
    """Say whether --NAME, --no-NAME or --NAME=text is a knob of an earlier version; refuse all but its last value."""
    positive = name.removeprefix('no_')
    if not equals and positive in RETIRED and type(RETIRED[positive][0]) is bool:
        return retired(positive, positive == name, where)
    if name not in RETIRED:
        return False
    return retired(name, parse(name, text, RETIRED[name][0], where), where)


def unknown(name, defaults, where):
    close = difflib.get_close_matches(name, defaults, 1, 0.5)
    hint = 'see --help for the list'
    if close:
        hint = f'did you mean {close[0]}?'
    return UserError(f'{where}: unknown knob {name!r}; {hint}')


def name_today(path):
    """Return what docs/names.md calls a config file of an earlier version today, '' where it says nothing."""
    old = f'`config/{os.path.basename(path)}`'
    table = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'docs', 'names.md')
    try:
        with open(table, encoding='utf-8') as f:
            rows = [[cell.strip() for cell in line.split('|')] for line in f if line.startswith('|')]
    except OSError:
        return ''
    return ''.join(row[2].strip('`') for row in rows if row[1] == old)


def run_config_file(path, values, defaults):
    """Execute one config file over the current values and return the new values."""
    try:
        with open(path, encoding='utf-8') as f:
            code = compile(f.read(), path, 'exec')
    except FileNotFoundError:
        now = name_today(path)
        hint = 'shipped ones are in config/'
        if now:
            hint = f'it is now {now}'
        raise UserError(f'config file {path!r} does not exist; {hint}') from None
    except SyntaxError as e:
        raise UserError(f'{path}:{e.lineno}: not valid Python: {e.msg}') from None
    except ValueError as e:                     # not UTF-8, or a null byte
        raise UserError(f'{path} is not a text file: {e}') from None
    space = dict(values, __file__=path)
    try:
        exec(code, space)
    except Exception as e:
        raise UserError(f'{path}: {type(e).__name__}: {e}') from e

    # What it leaves behind are knobs, but for what it imported and its private names.
    for name, value in space.items():
        if name.startswith('_') or isinstance(value, types.ModuleType):
            continue
        if name not in defaults and retired(name, value, path):
            continue
        if name not in defaults:
            raise unknown(name, defaults, path)
        values[name] = coerce(name, value, defaults[name], path)
    return values


def split_paths(argv, count, command):
    """Return (paths, other arguments) of the arguments that follow a verb.

    count: number of paths, which may have any name; or (fewest, most), where a path beyond the fewest does not start
    with a dash (- alone is one); or -1, any number of names that are neither flags nor config files. Raises UserError.
    """
    if count == -1:
        paths = [a for a in argv if not a.startswith('--') and not a.endswith('.py')]
        return paths, [a for a in argv if a not in paths]
    fewest, most = count if isinstance(count, tuple) else (count, count)
    if len(argv) < fewest:
        expected = f'{fewest} to {most}'
        if fewest == most:
            expected = fewest
        raise UserError(f'{command} takes {expected} paths, got {len(argv)}; see python {command.split()[0]} --help')

    # What follows the paths that must be there is one more path, or the first flag or config file.
    paths = argv[:fewest]
    rest = argv[fewest:]
    while rest and len(paths) < most:
        if rest[0].startswith('-') and rest[0] != '-':
            break
        if rest[0].endswith('.py') and os.path.isfile(rest[0]):
            raise UserError(f'{command}: {rest[0]!r} may be meant as a path or as a config file; '
                            f'name all {most} paths before a config file, or leave the path out')
        paths.append(rest.pop(0))
    return paths, rest


def configure(namespace, argv=None, verbs=None, fields_of='', default_verb='', rules=None):
    """Set a script's knobs from argv and return them as a dict; with verbs, return (verb, paths, dict).

    namespace: globals() of the script. argv: list of str; by default the command line where the script is the program,
    and nothing where it is imported. verbs: {verb: number of paths, or what else split_paths takes}; default_verb: what
    is meant where none is named. fields_of: a dataclass whose fields are knobs too, found in the source by knobs_of.
    rules(knobs as attributes): what require checks right after, before anything heavy is imported.
    Defaults are read from the source, so a second call in one process starts afresh. Raises UserError; --help exits 0.
    """
    defaults, block = knobs_of(namespace['__file__'])
    if argv is None and namespace.get('__name__', '__main__') != '__main__':
        return ('', [], defaults) if verbs else defaults
    if argv is None:
        as_program()
        argv = sys.argv[1:]
    argv = list(argv)
    asks_for_help = '--help' in argv or '-h' in argv
    if default_verb and not asks_for_help and (not argv or argv[0].startswith('--')):
        argv = [default_verb, *argv]
    if asks_for_help or (verbs and not argv):
        print_help(namespace['__doc__'], block)
        raise SystemExit(0)

    # The verb and its paths come first, then config files and flags in any order.
    script = os.path.basename(namespace['__file__'])
    has_overwrite = isinstance(defaults.get('overwrite'), bool)
    verb = ''
    paths = []
    if verbs:
        verb, paths, argv = split_verb(argv, verbs, script, has_overwrite)
    values = dict(defaults)
    for arg in argv:
        if arg == '-f' and has_overwrite:
            arg = '--overwrite'
        if arg.startswith('--'):
            set_by_flag(arg, values, defaults)
        elif arg.endswith('.py'):
            values = run_config_file(arg, values, defaults)
        else:
            raise UserError(f'{script}: {arg!r} is neither a config file (*.py) nor --key=value')
    namespace.update(values)
    if rules:
        require(*rules(types.SimpleNamespace(**values)))
    return (verb, paths, values) if verbs else values


def print_help(docstring, block):
    """Print what --help says: the docstring and the knob block as the source has them."""
    print(docstring or '')
    if block:
        print('# knobs, with their defaults')
    print(block)


def split_verb(argv, verbs, script, has_overwrite):
    """Return (verb, its paths, other arguments) of a command line that begins with a verb; UserError where it is none.

    Where the script has the knob overwrite, -f may stand between the verb and the paths, as gzip's and xz's users
    write it.
    """
    verb = argv[0]
    rest = argv[1:]
    if verb not in verbs:
        close = difflib.get_close_matches(verb, verbs, 1, 0.4)
        hint = ''
        if close:
            hint = f'did you mean {close[0]}? '
        raise UserError(f'{script}: unknown verb {verb!r}; {hint}known: {", ".join(verbs)}')
    if has_overwrite and rest[:1] == ['-f']:
        paths, rest = split_paths(rest[1:], verbs[verb], f'{script} {verb}')
        return verb, paths, ['-f', *rest]
    paths, rest = split_paths(rest, verbs[verb], f'{script} {verb}')
    return verb, paths, rest


def set_by_flag(flag, values, defaults):
    """Set the knob that --key=value, --key or --no-key names."""
    where = 'command line'
    name, equals, text = flag[2:].partition('=')
    name = name.replace('-', '_')
    default = defaults.get(name)
    if name in defaults and equals:
        values[name] = parse(name, text, default, where)
    elif isinstance(default, bool):
        values[name] = True
    elif not equals and name.startswith('no_') and isinstance(defaults.get(name[3:]), bool):
        values[name[3:]] = False
    elif retired_flag(name, equals, text, where):
        return
    elif name in defaults:
        raise UserError(f'{where}: --{name} needs a value, write --{name}={default!r}')
    else:
        raise unknown(name, defaults, where)


def require(*rules):
    """Raise one UserError that lists every rule that fails; a rule is (holds, message with the value and the cure)."""
    refuse(failed(*rules))


def failed(*rules):
    """Return the messages of the rules that fail."""
    return [message for holds, message in rules if not holds]


def refuse(problems):
    """Raise one UserError that lists all problems; none, no error."""
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError('; '.join(f'({i}) {problem}' for i, problem in enumerate(problems, 1)))


def one_of(name, value, choices):
    """Rule for require: value is among choices."""
    close = difflib.get_close_matches(str(value), [str(c) for c in choices], 1, 0.5)
    hint = ''
    if close:
        hint = f' (did you mean {close[0]!r}?)'
    return value in choices, f'{name} = {value!r}, expected one of {", ".join(map(repr, choices))}{hint}'


def at_least(name, value, low):
    """Rule for require: value >= low (nan fails)."""
    return low <= value < float('inf'), f'{name} = {value!r}, expected at least {low}'


def as_program():
    """Make this process behave as a script should: mistakes are one line, and idle threads sleep.

    Called before torch is imported, so that OpenMP's idle threads soon sleep instead of spinning: beside another busy
    process a step on two threads took 2.0 s with libgomp's default and 0.09 s with this; alone there is no difference.
    """
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')
    sys.excepthook = say_in_one_line


def say_in_one_line(kind, error, trace):
    """Print what ended the script: a UserError as one line (exit code 1), Ctrl-C as one word (the shell sees 130)."""
    if issubclass(kind, UserError):
        print(f'error: {error}', file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
    elif issubclass(kind, BrokenPipeError):
        # The reader of our output (head, less) has gone: end as the system's own programs do, without a word.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
    else:
        sys.__excepthook__(kind, error, trace)


def run(main):
    """Call main() as a script and leave with what it returns."""
    as_program()
    raise SystemExit(main())
