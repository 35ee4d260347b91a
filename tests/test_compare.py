"""runs.py compare: fair means that nothing but the data differs."""
import json

import pytest
from conftest import TINY, run_here, write_dataset

from configurator import UserError
from training.folder import read_run


@pytest.fixture(scope='module')
def three(tmp_path_factory):
    """Runs a (set one), b (set two), mix (both): the same steps, size and seed."""
    root = tmp_path_factory.mktemp('compare')
    write_dataset(str(root / 'data'), 'one')
    write_dataset(str(root / 'data'), 'two', sizes=(6000, 900, 900))
    for name, flag in (('a', '--dataset=one'), ('b', '--dataset=two'), ('mix', '--data_mix=one,two')):
        run_here('train.py', *TINY, f'--data_dir={root / "data"}', flag, '--max_iters=2', f'--out_dir={root / name}',
                 '--final_train_blocks=0', f'--log_interval={len(name)}')
    return root


def edited(three, tmp_path, **changes):
    """A copy of run a with other values in its run.json."""
    record = read_run(str(three / 'a'))
    (tmp_path / 'copy').mkdir()
    (tmp_path / 'copy' / 'run.json').write_text(json.dumps({**record, **changes}))
    return str(tmp_path / 'copy')


def compare(*argv):
    return run_here('runs.py', 'compare', *argv)


def table(out):
    """Return {setting: verdict} of what was printed."""
    return {row.split('|')[1].strip(): row.split('|')[2].strip() for row in out.splitlines() if row.startswith('|')}


def test_runs_that_differ_in_their_data_alone_are_fair(three, capsys):
    assert compare(*(three / name for name in ('a', 'b', 'mix'))) == 0
    out = capsys.readouterr().out
    found = table(out)
    assert found['dataset'] == found['data_mix'] == found['data sha256'] == found['unique training tokens'] == 'data'
    assert found['learning_rate'] == found['n_params'] == found['tokens_seen'] == found['status'] == ''
    assert 'log_interval' not in found and 'out_dir' not in found and out.rstrip().endswith('fair')
    assert 'not fair' not in out and '0.003' in out             # a rate is not rounded to four places


@pytest.mark.parametrize('change', [dict(learning_rate=1e-4), dict(n_params=7), dict(tokens_seen=1), dict(commit='x'),
                                    dict(seed=2), dict(status='paused'), dict(data=dict(tokenizer='gpt2')),
                                    dict(dropout=0.1), dict(n_steps=3)])
def test_anything_else_is_named_and_exits_with_1(change, three, tmp_path, capsys):
    assert compare(three / 'a', edited(three, tmp_path, **change)) == 1
    out = capsys.readouterr().out
    name = 'tokenizer' if 'data' in change else next(iter(change))
    assert out.rstrip().splitlines()[-1] == f'not fair: {name}' and out.splitlines()[2].split()[1] == name


def test_allowed_settings_may_differ(three, tmp_path, capsys):
    paths = [str(three / 'a'), edited(three, tmp_path, seed=2, commit='x', init_from='resume')]
    assert compare(*paths, '--allow=seed, commit') == 0
    assert table(capsys.readouterr().out)['seed'] == 'allowed'
    assert compare(*paths, '--allow=seed') == 1


@pytest.mark.parametrize('argv, message', [(['{a}'], 'at least 2'), (['{a}', '{a}/none'], 'no run.json in .*none'),
                                           (['{a}', '{b}', '--allow=sede'], 'allow names sede')])
def test_bad_input(argv, message, three):
    with pytest.raises(UserError, match=message):
        compare(*(word.format(a=three / 'a', b=three / 'b') for word in argv))


def test_two_unfinished_runs_are_no_comparison(three, tmp_path):
    copy = edited(three, tmp_path, status='paused')
    assert compare(copy, copy + '/') == 1
