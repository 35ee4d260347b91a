"""configurator.py: knobs from a script's source, config files and flags; mistakes end in one line with the cure."""
import os
import signal

import pytest
from conftest import ROOT, run_script

import configurator
from configurator import UserError, configure, knobs_of, require

SCRIPT = '''"""A script."""
import os
out_dir = 'out'             # where
epochs = 2.0                # how long
max_iters = 0
verify = False
seed = 1
LN2 = 0.69
table = (1, 2)
derived = len('abc')
_private = 3
here = os.getcwd()
'''


@pytest.fixture
def script(tmp_path):
    """The namespace of a small script, as globals() of it would be."""
    path = tmp_path / 'script.py'
    path.write_text(SCRIPT)
    return dict(__file__=str(path), __doc__='A script.')


def config(tmp_path, text, name='c.py'):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_knobs_are_public_literals_only(script):
    """Constants, private names, tuples and computed values must not become knobs."""
    assert knobs_of(script['__file__'])[0] == dict(out_dir='out', epochs=2.0, max_iters=0, verify=False, seed=1)


def test_last_wins_left_to_right(script, tmp_path):
    """Flags and files in any order: the later one holds, and a file sees the values before it."""
    a, b = config(tmp_path, 'epochs = epochs * 2\nseed = 5\n',
                  'a.py'), config(tmp_path, '_n = 3\nepochs = epochs + _n\n', 'b.py')
    assert configure(script, [a, b, '--seed=7'])['epochs'] == 7.0
    assert script['seed'] == 7 and configure(script, ['--seed=7', a])['seed'] == 5


def test_second_call_starts_afresh(script):
    """Values of an earlier call in the same process must not leak into the next."""
    configure(script, ['--seed=9', '--verify'])
    values = configure(script, [])
    assert values['seed'] == 1 and script['seed'] == 1 and values['verify'] is False


def test_values_do_not_alias_defaults(script, tmp_path):
    """A config that fails half-way must leave the namespace untouched."""
    with pytest.raises(UserError):
        configure(script, [config(tmp_path, 'seed = 3\nnonsense = 1\n')])
    assert 'seed' not in script


@pytest.mark.parametrize('flag, name, value', [
    ('--max_iters=1e5', 'max_iters', 100000), ('--epochs=3', 'epochs',
                                               3.0), ('--verify', 'verify', True), ('--verify=0', 'verify', False),
    ('--no-verify', 'verify', False), ('--verify=True', 'verify',
                                       True), ('--out-dir=x=y', 'out_dir', 'x=y'), ('--out_dir=', 'out_dir', ''),
    ('--seed=-3', 'seed', -3), ('--epochs=1e-7', 'epochs', 1e-7)])
def test_types_follow_the_default(script, flag, name, value):
    """Values must take the type of the default, or a config is no longer JSON, CSV and checkpoint entry."""
    found = configure(script, [flag])[name]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize('flag, words', [
    ('--epoch=3', ("'epoch'", 'did you mean epochs', 'command line')), ('--max_iters=1.5', ('max_iters', '1.5', 'int')),
    ('--seed=ten', ('seed', 'ten', 'int')), ('--verify=maybe',
                                             ('verify', 'maybe',
                                              '--no-verify')), ('--seed', ('--seed', 'needs a value')),
    ('--max_iters=inf', ('max_iters', 'inf')), ('--no-seed', ('no_seed',)), ('out', ("'out'", '*.py')),
    ('missing.py', ("'missing.py'", 'does not exist'))])
def test_bad_flag_is_one_line_with_the_cure(script, flag, words):
    """A mistyped or ill-typed flag must not be ignored (docs/faults.md, 12)."""
    with pytest.raises(UserError) as e:
        configure(script, [flag])
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


@pytest.mark.parametrize('text, words', [
    ('epoch = 3\n', ('c.py', "'epoch'", 'did you mean epochs')), ('for i in range(3):\n    pass\n', ('c.py', "'i'")),
    ('seed = 1.5\n', ('c.py', 'seed', '1.5', 'int')), ('verify = 1\n', ('c.py', 'verify', 'bool')),
    ("epochs = '3'\n", ('c.py', "'3'", 'float')),
    ('seed = True\n', ('c.py', 'seed', 'bool')), ('seed = (\n', ('c.py:1', 'not valid Python')),
    ('seed = 1 / 0\n', ('c.py', 'ZeroDivisionError')),
    ('table = (1,)\n', ('c.py', "'table'"))])
def test_bad_config_file_is_one_line_that_names_it(script, tmp_path, text, words):
    """Fault 12: unknown keys in config files silently ignored; also wrong types and broken Python."""
    with pytest.raises(UserError) as e:
        configure(script, [config(tmp_path, text)])
    assert '\n' not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


def test_config_file_that_is_not_text_is_one_line(script, tmp_path):
    """A binary file named *.py must give a UserError, not a traceback."""
    for i, raw in enumerate((b'\xff\xfe\x00seed = 3', b'seed = 3\x00')):
        path = tmp_path / f'binary{i}.py'
        path.write_bytes(raw)
        with pytest.raises(UserError, match=f'binary{i}.py'):
            configure(script, [str(path)])


def test_a_config_that_has_moved_is_named_with_its_new_place(script, monkeypatch):
    """A command of an older README says what to type today, from any working folder; docs/names.md knows."""
    monkeypatch.chdir(ROOT)
    for path in ('config/metadata_url.py', os.path.join(ROOT, 'config', 'metadata_url.py')):
        with pytest.raises(UserError) as e:
            configure(script, [path])
        assert str(e.value).startswith(f"config file '{path}' does not exist; it is now config/")
    with pytest.raises(UserError, match='does not exist; shipped ones are in config/'):
        configure(script, ['config/other_old.py'])


def test_a_knob_that_is_gone_may_stay_at_its_old_default(script, tmp_path, monkeypatch):
    """An older config sets it to what is now always done; another value needs an answer, not a guess."""
    monkeypatch.setitem(configurator.RETIRED, 'gone', (0.5, 'use seed'))
    monkeypatch.setitem(configurator.RETIRED, 'switch', (False, 'use seed'))
    assert 'switch' not in configure(script, ['--no-switch', '--switch=0'])
    with pytest.raises(UserError, match='switch = True is no knob any more'):
        configure(script, ['--switch'])
    assert 'gone' not in configure(script, ['--gone=0.5', config(tmp_path, 'gone = 0.5\n')])
    for argument in ('--gone=0.25', config(tmp_path, 'gone = 0.25\n')):
        with pytest.raises(UserError, match='gone = 0.25 is no knob any more .*0.5.*; use seed'):
            configure(script, [argument])


def test_modules_and_private_names_may_stay_behind(script, tmp_path):
    """A config may import and compute with _names without those counting as unknown knobs."""
    assert configure(script, [config(tmp_path, 'import math\n_x = 4\nepochs = math.sqrt(_x)\n')])['epochs'] == 2.0


def test_help_prints_the_knob_block_as_it_stands(script, capsys):
    """--help must show the source with its comments and exit 0 without running anything."""
    with pytest.raises(SystemExit) as e:
        configure(script, ['--help'])
    assert e.value.code == 0 and "out_dir = 'out'             # where" in capsys.readouterr().out


def test_verbs_take_paths_of_any_name(script):
    """A FILE argument may be called anything, a config's name or a flag's included."""
    verb, paths, values = configure(script, ['pack', 'a.py', '--odd', '--seed=2'], verbs=dict(pack=2, info=1))
    assert (verb, paths, values['seed']) == ('pack', ['a.py', '--odd'], 2)
    with pytest.raises(UserError, match='did you mean pack'):
        configure(script, ['pakc', 'a', 'b'], verbs=dict(pack=2))
    with pytest.raises(UserError, match='takes 2 paths, got 1'):
        configure(script, ['pack', 'a'], verbs=dict(pack=2))


def test_a_verb_may_have_an_optional_path(script, tmp_path):
    """(fewest, most): what follows the fewest is a path unless it looks like a flag; - alone is a path."""
    verbs = dict(unpack=(1, 2))
    missing = str(tmp_path / 'no.py')
    for argv, paths in ((['a'], ['a']), (['a', '--seed=2'], ['a']), (['a', 'b', '--seed=2'], ['a', 'b']),
                        (['a', '-'], ['a', '-']), (['--a', 'b'], ['--a', 'b']), (['a', missing], ['a', missing])):
        assert configure(script, ['unpack', *argv], verbs=verbs)[1] == paths
    with pytest.raises(UserError, match="'-b' is neither"):
        configure(script, ['unpack', 'a', '-b'], verbs=verbs)
    with pytest.raises(UserError, match='unpack takes 1 to 2 paths, got 0; see python script.py --help'):
        configure(script, ['unpack'], verbs=verbs)


def test_an_existing_config_is_no_optional_path(script, tmp_path):
    """A config file in the place of a path to write would be overwritten, a path taken for a config would be run."""
    path = config(tmp_path, 'seed = 3\n')
    with pytest.raises(UserError, match='may be meant as a path or as a config file; name all 2 paths'):
        configure(script, ['unpack', 'a', path], verbs=dict(unpack=(1, 2)))
    assert configure(script, ['unpack', 'a', 'b', path], verbs=dict(unpack=(1, 2)))[2]['seed'] == 3
    assert configure(script, ['unpack', path], verbs=dict(unpack=(1, 2)))[1] == [path]


def test_f_is_short_for_overwrite(script, tmp_path):
    """gzip's and xz's habit, in any place; a script without the knob does not know it."""
    with pytest.raises(UserError, match="'-f' is neither"):
        configure(script, ['-f'])
    path = tmp_path / 'other.py'
    path.write_text('overwrite = False\nseed = 1\n')
    other = dict(__file__=str(path), __doc__='')
    assert configure(other, ['-f'])['overwrite'] is True and configure(other, [])['overwrite'] is False
    for argv in (['go', '-f', 'a', 'b'], ['go', 'a', '-f'], ['go', 'a', 'b', '-f', '--seed=2']):
        _, paths, values = configure(other, argv, verbs=dict(go=(1, 2)))
        assert values['overwrite'] is True and paths == [a for a in argv if a in ('a', 'b')]


def test_require_collects_all_problems():
    """One run must show every wrong value, not the first of them."""
    with pytest.raises(UserError) as e:
        require((False, 'a = 1'), (True, 'b = 2'), configurator.at_least('c', float('nan'), 0),
                configurator.one_of('d', 'pmpm', ('pmmp', 'rl1')))
    message = str(e.value)
    assert 'a = 1' in message and 'b = 2' not in message and 'c = nan' in message and "did you mean 'pmmp'" in message


PROGRAM = """
import configurator
def main():
    {body}
configurator.run(main)
"""


@pytest.mark.slow
def test_mistakes_of_a_script_are_one_line(tmp_path):
    """Exit codes: 1 and one line for a mistake, a signal's for Ctrl-C and a reader that has gone, else main's own."""
    cases = {"raise configurator.UserError('x = 1, expected 2')": (1, 'error: x = 1, expected 2\n'),
             'return 85': (85, ''), 'return 0': (0, ''), 'return None': (0, ''),
             'raise KeyboardInterrupt': (-signal.SIGINT, 'interrupted\n'),
             'raise BrokenPipeError': (-signal.SIGPIPE, '')}
    for body, expected in cases.items():
        path = tmp_path / 'script.py'
        path.write_text(PROGRAM.format(body=body))
        done = run_script(path)
        assert (done.returncode, done.stderr) == expected, body


def test_an_imported_script_keeps_its_defaults(tmp_path, monkeypatch):
    """configure reads the command line where the script is the program, and nowhere else."""
    path = tmp_path / 'script.py'
    path.write_text('seed = 1\n')
    monkeypatch.setattr('sys.argv', ['pytest', '--seed=3'])
    assert configurator.configure(dict(__file__=str(path), __doc__='', __name__='script')) == dict(seed=1)


def test_a_script_that_is_called_through_a_link_has_its_knobs(tmp_path):
    """A job's folder links train.py: the fields of the model's config are read beside the file itself."""
    (tmp_path / 'train.py').symlink_to(os.path.join(ROOT, 'train.py'))
    defaults, _ = knobs_of(str(tmp_path / 'train.py'))
    assert defaults['block_type'] == 'attention' and defaults == knobs_of(os.path.join(ROOT, 'train.py'))[0]


# --- knobs of earlier versions ---

@pytest.mark.parametrize('argument', ('--no-decoupled', '--decoupled=False', '--decoupled=0', 'decoupled = False',
                                      '--tokens_per_second=0', 'tokens_per_second = 0.0'))
def test_a_retired_knob_at_its_last_value_is_dropped(argument, script, tmp_path):
    """An older config or command sets it to what is now always done."""
    values = configure(script, [argument if argument.startswith('--') else config(tmp_path, argument)])
    assert values == knobs_of(script['__file__'])[0]


@pytest.mark.parametrize('argument, words', [
    ('--decoupled', 'command line: decoupled = True is no knob any more'),
    ('--decoupled=yes', 'command line: decoupled = True is no knob any more'),
    ('decoupled = True', 'c.py: decoupled = True is no knob any more'),
    ('--tokens_per_second=1e5', 'tokens_per_second = 100000.0 is no knob any more'),
    ('tokens_per_second = 5', 'tokens_per_second = 5 is no knob any more')])
def test_a_retired_knob_at_another_value_is_refused_by_name(argument, words, script, tmp_path):
    """What it did is not done any more: dropping it in silence would be another run than the one asked for."""
    with pytest.raises(UserError, match=words) as e:
        configure(script, [argument if argument.startswith('--') else config(tmp_path, argument)])
    name = words.split(': ')[-1].split(' = ')[0]
    assert '\n' not in str(e.value) and str(e.value).endswith(configurator.RETIRED[name][1])


def test_every_retired_knob_is_gone_and_says_what_to_do():
    """A name on the list that a script still has would be set by flags and dropped by configs."""
    import train
    for name, (last, instead) in configurator.RETIRED.items():
        assert name not in knobs_of(train.__file__)[0] and instead
        assert configurator.coerce(name, last, last, 'here') == last
