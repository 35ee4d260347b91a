"""Every file in config/ loads against the script of its launch line, and that launch would start."""
import glob
import importlib.util
import os
import shlex
import subprocess

import pytest
from conftest import ROOT

import configurator
import distill
import train
from lab import diversity, probe

_LISTED = subprocess.run(['git', '-C', ROOT, 'ls-files', 'config/*.py'], capture_output=True, text=True,
                         timeout=20).stdout
CONFIGS = sorted(_LISTED.split() or (os.path.relpath(p, ROOT) for p in glob.glob(os.path.join(ROOT, 'config', '*.py'))))
# the shipped ones: a user's own copy may keep the launch line of the file it was copied from


def launch_of(path):
    """Return (script, argv after it, number of processes) of a config's first comment line."""
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        line = f.readline()
    assert line.startswith('# '), f'{path} does not begin with its launch line'
    words = shlex.split(line[1:], comments=True)
    at = next((i for i, w in enumerate(words) if w.endswith('.py')), None)
    assert at is not None and words[0] in ('python', 'torchrun'), f'{path}: {line!r} is no launch line'
    n = next((int(w.split('=')[1]) for w in words[:at] if w.startswith('--nproc_per_node=')), 1)
    return words[at], words[at + 1:], n


@pytest.mark.parametrize('path', CONFIGS)
def test_config_loads_against_its_script(path):
    """A renamed knob, a typo or a launch line that starts another file (LOG, fault 12)."""
    script, argv, _ = launch_of(path)
    assert path in argv and os.path.exists(os.path.join(ROOT, script))
    namespace = dict(__file__=os.path.join(ROOT, script), __doc__='')
    defaults = configurator.knobs_of(namespace['__file__'])[0]
    values = configurator.configure(namespace, [os.path.join(ROOT, path)])
    assert values != defaults
    if 'out_dir' in defaults:                                   # two configs must not share a folder by accident
        assert os.path.basename(values['out_dir']) == os.path.basename(path)[:-3]


@pytest.mark.parametrize('path', [p for p in CONFIGS if launch_of(p)[0] in ('train.py', 'distill.py')])
def test_check_passes_with_the_processes_of_the_launch_line(path, tmp_path, monkeypatch, capsys):
    """--check needs neither data nor a device, and the launch line's process count must divide the batch."""
    script, argv, n_processes = launch_of(path)
    main = dict(zip(('train.py', 'distill.py'), (train.main, distill.main)))[script]
    monkeypatch.chdir(tmp_path)
    for world in {1, n_processes}:
        monkeypatch.setenv('WORLD_SIZE', str(world))
        assert main([*(os.path.join(ROOT, a) if a in CONFIGS else a for a in argv), '--check']) in (0, None)
    printed = capsys.readouterr().out
    for word in ('parameters', 'FLOPs per token', 'memory', "dataset = '", 'unknown: run prepare_'):
        assert word in printed
    assert os.listdir(tmp_path) == []                           # nothing was made


def test_published_settings_are_the_shipped_ones():
    """The v1 table: leading bytes, epochs, first pruning, batch; δ 0.01, β 5, seed 858, 1e-5, transformer4.1m."""
    table = {'16mb': (16_384_000, 150, 200, 100, 150, 25, 8), '50mb': (50_003_968, 100, 150, 75, 100, 10, 8),
             '300mb': (299_991_040, 20, 30, 10, 20, 1, 8), '9gb': (9_307_817_984, 0, 1, 1, 1, 1, 4)}
    for size, expected in table.items():
        for procedure in ('vanilla', 'rl1', 'drr', 'pmmp'):
            v = configurator.configure(dict(__file__=train.__file__, __doc__=''),
                                       [os.path.join(ROOT, 'config', f'wiki_{size}_{procedure}.py')])
            assert v['train_only_on_leading_tokens'] in (expected[0], 0 if size == '9gb' else expected[0])
            assert (v['procedure'], v['model'], v['batch_size']) == (procedure, 'transformer4.1m', expected[6])
            assert (v['learning_rate'], v['schedule'], v['seed'], v['grad_clip'], v['weight_decay'],
                    v['dropout']) == (1e-5, 'constant', 858, 0, 0, 0)
            if procedure != 'vanilla':
                assert v['do_pruning'] and (v['first_pruning_after'], v['prune_every']) == expected[4:6]
                assert (v['epochs_prelude'], v['epochs'], v['epochs_fine_tuning']) == expected[1:4]
                assert v['tolerated_relative_loss_increase'] == 0.01 and v['beta'] == 5 and v['initial_p_value'] == 1
                assert v['stop_epoch_at_batch_fine_tuning'] == (50_000 if size == '9gb' else 0)


def test_sample_configs_are_there_and_small(tmp_path, monkeypatch, capsys):
    """The demo's model has at most 300k parameters, and its four configs differ in the procedure alone."""
    from model import config_from_knobs, n_parameters
    for procedure in ('vanilla', 'rl1', 'drr', 'pmmp'):
        v = configurator.configure(dict(__file__=train.__file__, __doc__=''),
                                   [os.path.join(ROOT, 'config', f'sample_{procedure}.py')])
        assert v['procedure'] == procedure and v['dataset'] == 'sample'
        assert n_parameters(config_from_knobs(v, 256)) <= 300_000


def test_importing_a_script_has_no_side_effect(tmp_path, monkeypatch, capsys):
    """Importing trains nothing, reads no command line and prints nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['pytest', '--nonsense'])
    for name in ('train', 'runs', 'prune', 'distill', 'gpt2', 'prepare_text', 'prepare_metadata', 'prepare_pile',
                 'diversity', 'probe', 'plots', 'eval', 'train_tokenizer'):
        spec = importlib.util.spec_from_file_location(f'fresh_{name}', os.path.join(ROOT, f'{name}.py'))
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert os.listdir(tmp_path) == [] and capsys.readouterr().out == ''


def values_of(name, script):
    return configurator.configure(dict(__file__=script.__file__, __doc__=''), [os.path.join(ROOT, 'config', name)])


def test_the_published_settings_of_gpt2_compression():
    """DistilBERT's loss and optimiser, Li et al.'s pretraining and fine-tuning; six layers of GPT-2."""
    v = values_of('gpt2_distil6.py', distill)
    assert (v['temperature'], v['a_ce'], v['a_clm'], v['a_cos'], v['a_mse'], v['a_hidden']) == (2, 5, 2, 1, 0, 0)
    assert (v['learning_rate'], v['schedule'], v['min_learning_rate_ratio'], v['grad_clip'], v['batch_size'],
            v['epochs'], v['adam_epsilon'], v['weight_decay'], v['beta1'], v['beta2'], v['freeze_positions']) == (
                2.5e-4, 'linear', 0, 5, 4096, 4, 1e-6, 0, 0.9, 0.999, True)
    pretrain, tune = values_of('gpt2_alt6_pretrain.py', train), values_of('gpt2_finetune_wikitext103.py', train)
    for w, batch, epochs in ((pretrain, 512, 3), (tune, 256, 6)):
        assert (w['learning_rate'], w['schedule'], w['min_learning_rate_ratio'], w['batch_size'], w['epochs']) == (
            5e-5, 'linear', 0, batch, epochs)
    for w in (v, pretrain, tune):
        assert (w['model'], w['n_layer'], w['positions'], w['activation'], w['tied']) == (
            'gpt2', 6, 'learned', 'gelu_tanh', True)


@pytest.mark.parametrize('taught, control, start', [
    ('gpt2_distil6.py', 'gpt2_scratch_control6.py', {'init_from', 'freeze_positions'}),
    ('distil_byte_student.py', 'distil_byte_control.py', set())])
def test_a_control_differs_in_the_teacher_alone(taught, control, start):
    """The pair that answers whether a teacher helps: same student, data, tokens, optimiser; what it gave is away."""
    a, b = values_of(taught, distill), values_of(control, distill)
    assert {k for k in a if a[k] != b[k]} <= {'out_dir', 'a_ce', 'a_clm', 'a_cos'} | start
    assert (b['a_ce'], b['a_clm'], b['a_cos'], b['a_mse'], b['a_hidden']) == (0, 1, 0, 0, 0) and a['a_ce'] > 0


def test_the_published_settings_of_the_diversity_experiments():
    """Nothing differs but the training set; 51.48 M parameters, 1.31 B tokens, AdamW 5e-5 to 0, linear."""
    from model import config_from_knobs, n_parameters
    for size, millions in (('51m', 51.48), ('117m', 124.44)):
        v = [values_of(f'diversity_{size}_{name}.py', train) for name in ('pubmed', 'uspto', 'mix')]
        assert {k for w in v for k in w if w[k] != v[0][k]} == {'out_dir', 'data_mix'}
        assert v[2]['data_mix'] == 'pubmed:0.5,uspto:0.5'
        assert round(n_parameters(config_from_knobs(v[0], 50257)) / 1e6, 2) == millions
        assert (v[0]['max_iters'], v[0]['batch_size'], v[0]['block_size'], v[0]['learning_rate'], v[0]['schedule'],
                v[0]['min_learning_rate_ratio'], v[0]['warmup_iters'], v[0]['weight_decay'], v[0]['dropout']) == (
                    20_000, 64, 1024, 5e-5, 'linear', 0, 0, 0, 0.1)
    sample = [values_of(f'diversity_sample_{name}.py', train)
              for name in ('wikipedia', 'pubmed', 'uspto', 'pubmed_uspto', 'wikipedia_pubmed')]
    assert {k for w in sample for k in w if w[k] != sample[0][k]} == {'out_dir', 'data_mix'}
    w = sample[0]                                               # at most two passes over the same number of bytes
    assert w['max_iters'] * w['batch_size'] * w['block_size'] <= 2 * w['train_only_on_leading_tokens']
    measured = values_of('diversity_sample_task2vec.py', diversity)
    assert measured['max_tokens'] == w['train_only_on_leading_tokens'] and measured['sequence_length'] == 128
    published = values_of('diversity_task2vec.py', diversity)
    assert (published['n_sequences'], published['sequence_length'], published['head_epochs'],
            published['head_batch_size'], published['head_learning_rate']) == (512, 128, 10, 8, 5e-5)


def test_the_published_settings_of_metadata():
    """GPT-2 on 256 rows of 1,024 for 100,000 steps; the five runs differ in their data alone."""
    found = [values_of(f'metadata_{name}.py', train) for name in ('all', 'url', 'html', 'none', 'samecontext')]
    v = found[0]
    assert (v['model'], v['positions'], v['activation'], v['tied'], v['batch_size'], v['max_iters'], v['warmup_iters'],
            v['learning_rate'], v['beta1'], v['beta2'], v['adam_epsilon'], v['weight_decay'], v['seed']) == (
                'gpt2', 'learned', 'gelu_tanh', True, 256, 100_000, 6000, 1e-4, 0.9, 0.98, 1e-6, 0.01, 42)
    small = [values_of(f'metadata_sample_{name}.py', train) for name in ('none', 'url', 'title', 'samecontext')]
    for runs in (found, small):
        assert len({w['dataset'] for w in runs}) == len(runs)
        assert all({k for k in runs[0] if runs[0][k] != w[k]} <= {'out_dir', 'dataset'} for w in runs)
    assert small[0]['max_iters'] * small[0]['batch_size'] * small[0]['block_size'] == pytest.approx(1.5e6, rel=1e-3)


def test_the_published_settings_of_probes():
    """512 tokens, 128 rows, 200,000 steps, warm-up 500, linear decay to 0."""
    v = values_of('probe_512.py', probe)
    assert (v['block_size'], v['batch_size'], v['max_iters'], v['warmup_iters'], v['schedule'],
            v['min_learning_rate_ratio'], v['weight_decay'], v['dtype'], v['mode'], v['spread']) == (
                512, 128, 200_000, 500, 'linear', 0, 0, 'bfloat16', 'information', 'unroll')


def test_the_fast_recipes_train_on_a_tenth_of_the_bytes():
    """The twins of the seed's configs, and the small pair on which the recipe was found."""
    from model import config_from_knobs, n_parameters

    def epochs(v):
        return v['epochs_prelude'] + v['epochs'] + v['epochs_fine_tuning']
    for procedure in ('vanilla', 'pmmp'):
        slow, fast = (values_of(f'wiki_16mb_{procedure}{end}.py', train) for end in ('', '_fast'))
        assert epochs(fast) == pytest.approx(epochs(slow) / 10) and fast['procedure'] == slow['procedure']
        assert (fast['dataset'], fast['train_only_on_leading_tokens']) == (
            slow['dataset'], slow['train_only_on_leading_tokens'])
        sizes = [n_parameters(config_from_knobs(v, 256)) for v in (slow, fast)]
        assert sizes[1] <= sizes[0]
    slow, published = (values_of(f'{name}.py', train) for name in ('fast_sample_seed', 'wiki_16mb_vanilla'))
    assert epochs(slow) == pytest.approx(epochs(published) / 450) and slow['learning_rate'] == 1e-5
    fast = values_of('fast_sample_base.py', train)
    assert fast['train_only_on_leading_tokens'] * epochs(fast) < 1.03 * 1e6 * epochs(slow) / 10


def test_the_arms_of_the_record_start_from_one_base_and_see_as_many_bytes():
    """A duel in which one arm trains longer, or starts from another model, shows nothing."""
    for size in ('2mb', '16mb'):
        arms = [configurator.configure(dict(__file__=train.__file__, __doc__=''), [
            os.path.join(ROOT, 'config', f'record_{size}_{name}.py') for name in ('base', arm)])
            for arm in ('dense', 'pmmp', 'drr', 'rl1')]
        own = {'out_dir', 'procedure', 'alpha', 'procedure_learning_rate', 'do_pruning', 'epochs', 'epochs_fine_tuning',
               'qat_bits', 'bits_lambda'}
        assert all({k for k in v if v[k] != arms[0][k]} <= own for v in arms)
        assert len({v['epochs'] + v['epochs_fine_tuning'] for v in arms}) == 1
        assert arms[0]['init_from'] == f'out/record_{size}_base' and arms[0]['qat_bits'] and not arms[1]['qat_bits']


def test_wikipedia_runs_keep_their_dates():
    """They inherited 83,000 and 86,000 s; with the shorter defaults these numbers stand in the files."""
    paths = [path for path in CONFIGS if os.path.basename(path).startswith('wiki_')]
    assert len(paths) > 15
    for path in paths:
        values = configurator.configure(dict(__file__=train.__file__, __doc__=''), [os.path.join(ROOT, path)])
        assert (values['checkpoint_time'], values['max_runtime']) == (83_000, 86_000), path
