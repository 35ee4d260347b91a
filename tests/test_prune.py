"""prune.py and bench.py as scripts: measured sparsity, exact counts, masks that later training holds, refusals."""
import json
import os

import pytest
import torch
from conftest import snapshot

import bench
import prune
import runs
from configurator import UserError


@pytest.fixture
def trained(train_tiny, tmp_path):
    """A run folder of 20 steps with PMMP, its gamma still in the checkpoint."""
    train_tiny('--max_iters=20', '--procedure=pmmp', '--alpha=1e-4', '--procedure_learning_rate=0.05',
               '--final_train_blocks=0')
    return str(tmp_path / 'run')


def pruned(trained, tmp_path, toy, *flags, out='pruned'):
    prune.main([f'--from_ckpt={trained}', f'--out_dir={tmp_path / out}', f'--data_dir={toy}', '--device=cpu', *flags])
    return runs.load_checkpoint(str(tmp_path / out)), runs.read_run(str(tmp_path / out))


def zeros(checkpoint, names):
    return sum(int((checkpoint['model'][n] == 0).sum()) for n in names)


@pytest.mark.parametrize('scope', ['global', 'tensor'])
def test_magnitude_prunes_exactly_that_share(trained, tmp_path, toy, scope):
    """METHODS §7 fault 11: half asked, half pruned, over all tensors or in each."""
    flags = ('--method=magnitude', '--sparsity=0.5', f'--scope={scope}', '--no-sweep_dead_units')
    checkpoint, record = pruned(trained, tmp_path, toy, *flags)
    sizes = {n: m.numel() for n, m in checkpoint['masks'].items()}
    assert zeros(checkpoint, sizes) == round(0.5 * sum(sizes.values()))
    if scope == 'tensor':
        assert all(int((~m).sum()) == round(0.5 * m.numel()) for m in checkpoint['masks'].values())
    assert record['status'] == 'done' and record['parent']['sha256']


def test_tamade_respects_delta(trained, tmp_path, toy):
    """The loss measured after pruning (not assumed) is within δ of the loss before."""
    _, record = pruned(trained, tmp_path, toy, '--tolerated_relative_loss_increase=0.05', '--no-sweep_dead_units')
    assert record['loss_after'] <= record['loss_before'] * 1.05
    assert record['epsilon'] > 0 and 0 < record['sparsity'] < 1


def test_gamma_keeps_what_gamma_says(trained, tmp_path, toy):
    """γ < ½ is the rule of --method=gamma, weight by weight."""
    checkpoint, _ = pruned(trained, tmp_path, toy, '--method=gamma', '--no-sweep_dead_units')
    gamma = runs.load_checkpoint(trained)['procedure']['gamma']
    assert any((g < 0.5).any() for g in gamma.values())
    assert all(torch.equal(checkpoint['masks'][n], g >= 0.5) for n, g in gamma.items())


def test_sweep_and_unused_rows_leave_the_loss(trained, tmp_path, toy):
    """A sweep of a heavily pruned model zeroes more weights; rows of unused ids cost nothing."""
    flags = ('--method=magnitude', '--sparsity=0.97', '--scope=global')
    before, _ = pruned(trained, tmp_path, toy, *flags, '--no-sweep_dead_units', out='a')
    after, _ = pruned(trained, tmp_path, toy, *flags, '--drop_unused_rows', out='b')
    assert zeros(after, after['masks']) > zeros(before, before['masks'])
    x = torch.randint(97, 122, (2, 32))
    x[x == 106] = 101                                       # 'j' does not occur in the corpus
    logits = [runs.load_model(str(tmp_path / out))[0](x) for out in 'ab']
    assert torch.allclose(*logits, atol=1e-6)


def test_masks_hold_in_later_training(trained, tmp_path, toy, train_tiny):
    """init_from takes the masks along: what prune.py zeroed is zero after fine-tuning."""
    checkpoint, _ = pruned(trained, tmp_path, toy, '--method=magnitude', '--sparsity=0.6')
    train_tiny('--max_iters=5', f'--init_from={tmp_path / "pruned"}', '--final_train_blocks=0', out='tuned')
    tuned = runs.load_checkpoint(str(tmp_path / 'tuned'))
    for name, mask in checkpoint['masks'].items():
        assert not tuned['model'][name][~mask].any()
        assert not torch.equal(tuned['model'][name], checkpoint['model'][name])


@pytest.mark.parametrize('flags, words', [
    (('--method=magnitud',), "did you mean 'magnitude'"), (('--sparsity=1.5',), 'share in [0, 1]'),
    (('--from_ckpt=nowhere',), 'no checkpoint'), (('--tolerated_relative_loss_increase=-1',), 'at least 0')])
def test_bad_input(trained, tmp_path, toy, flags, words):
    """One line that names the value and the cure, and nothing written."""
    with pytest.raises(UserError, match=words.replace('[', r'\[').replace(']', r'\]')):
        pruned(trained, tmp_path, toy, *flags)
    assert not os.path.exists(tmp_path / 'pruned')


def test_never_overwrites_its_own_parent(trained, tmp_path, toy):
    """out_dir = the folder of from_ckpt would delete the checkpoint it reads."""
    before = snapshot(trained)
    with pytest.raises(UserError, match='choose another --out_dir'):
        prune.main([f'--from_ckpt={trained}', f'--out_dir={trained}', f'--data_dir={toy}', '--overwrite'])
    assert snapshot(trained) == before


def test_gamma_needs_a_pmmp_checkpoint(train_tiny, tmp_path, toy):
    """A vanilla checkpoint has no γ: said, not guessed."""
    train_tiny('--max_iters=2', '--final_train_blocks=0', out='plain')
    with pytest.raises(UserError, match='holds no gamma'):
        pruned(str(tmp_path / 'plain'), tmp_path, toy, '--method=gamma')


def test_bench_measures_the_step_of_a_config(tmp_path):
    """bench.py's rows have a median, and the plain baseline is of the same size as our model."""
    config = tmp_path / 'c.py'
    config.write_text("# python train.py c.py\nn_layer = 1\nn_embd = 16\nn_head = 2\nblock_size = 16\nbatch_size = 2\n"
                      "procedure = 'pmmp'\n")
    out = tmp_path / 'bench.json'
    assert bench.main(['step', str(config), '--pairs=2', f'--json_path={out}', '--device=cpu']) == 0
    row = json.loads(out.read_text())['step']['rows'][0]
    assert row['milliseconds'] > 0 and row['tokens_per_second'] > 0 and row['procedure'] == 'pmmp'
