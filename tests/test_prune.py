"""prune.py as a script: measured sparsity, exact counts, masks that later training holds, refusals."""
import os

import pytest
import torch
from conftest import OneProcess, run_here, snapshot

import prune
import score
import sparse
from configurator import UserError
from corpus.data import open_split
from model import GPT, ModelConfig, model_args, n_parameters
from training.checkpoint import load_checkpoint, load_model, save_checkpoint
from training.folder import read_run


@pytest.fixture
def trained(train_tiny, tmp_path):
    """A run folder of 20 steps with PMMP, its gamma still in the checkpoint."""
    train_tiny('--max_iters=20', '--procedure=pmmp', '--alpha=1e-4', '--procedure_learning_rate=0.05',
               '--final_train_blocks=0')
    return str(tmp_path / 'run')


def pruned(trained, tmp_path, toy, *flags, out='pruned'):
    run_here('prune.py', f'--from_ckpt={trained}', f'--out_dir={tmp_path / out}', f'--data_dir={toy}', '--device=cpu',
             *flags)
    return load_checkpoint(str(tmp_path / out)), read_run(str(tmp_path / out))


def zeros(checkpoint, names):
    return sum(int((checkpoint['model'][n] == 0).sum()) for n in names)


@pytest.mark.parametrize('scope', ['global', 'tensor'])
def test_magnitude_prunes_exactly_that_share(trained, tmp_path, toy, scope):
    """docs/faults.md, 11: half asked, half pruned, over all tensors or in each."""
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
    gamma = load_checkpoint(trained)['procedure']['gamma']
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
    logits = [load_model(str(tmp_path / out))[0](x) for out in 'ab']
    assert torch.allclose(*logits, atol=1e-6)


def test_masks_hold_in_later_training(trained, tmp_path, toy, train_tiny):
    """init_from takes the masks along: what prune.py zeroed is zero after fine-tuning."""
    checkpoint, _ = pruned(trained, tmp_path, toy, '--method=magnitude', '--sparsity=0.6')
    train_tiny('--max_iters=5', f'--init_from={tmp_path / "pruned"}', '--final_train_blocks=0', out='tuned')
    tuned = load_checkpoint(str(tmp_path / 'tuned'))
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
        run_here('prune.py', f'--from_ckpt={trained}', f'--out_dir={trained}', f'--data_dir={toy}', '--overwrite')
    assert snapshot(trained) == before


def test_gamma_needs_a_pmmp_checkpoint(train_tiny, tmp_path, toy):
    """A vanilla checkpoint has no γ: said, not guessed."""
    train_tiny('--max_iters=2', '--final_train_blocks=0', out='plain')
    with pytest.raises(UserError, match='holds no gamma'):
        pruned(str(tmp_path / 'plain'), tmp_path, toy, '--method=gamma')


# --- whole layers ---

@pytest.fixture
def deep(tmp_path):
    """A 12-layer GPT-2-like checkpoint with a mask in layer 2, on the data set toy."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(block_size=16, n_embd=8, n_head=2, n_layer=12, positions='learned', tied=True,
                            activation='gelu_tanh')).eval()
    mask = torch.rand(32, 8) < 0.5
    with torch.no_grad():
        model.blocks[2].feed_forward.up.weight.mul_(mask)
    save_checkpoint(str(tmp_path / 'deep.pt'), dict(
        model=model.state_dict(), model_args=model_args(model), masks={'blocks.2.feed_forward.up.weight': mask},
        config={}, data=dict(dataset='toy', sha256='', tokenizer='byte', start_id=10)))
    return str(tmp_path / 'deep.pt'), model


@pytest.mark.parametrize('strategy, kept', [('3l', (0, 6, 11)), ('6t', range(6, 12)), ('6b', range(6)),
                                            ('3b3t', (0, 2, 4, 7, 9, 11)), ('alt', range(0, 12, 2)),
                                            ('distil', (0, 2, 4, 7, 9, 11))])
def test_a_strategy_keeps_whole_layers(deep, tmp_path, toy, strategy, kept):
    """Blocks bit for bit, in order; embeddings, norm and head too; parent and layers are named."""
    path, teacher = deep
    found, record = pruned(path, tmp_path, toy, f'--strategy={strategy}')
    student = load_model(str(tmp_path / 'pruned'))[0]
    assert student.config.n_layer == len(kept) == found['model_args']['n_layer']
    for mine, i in zip(student.blocks, kept):
        assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(),
                                                     teacher.blocks[i].state_dict().values()))
    for part in ('embed', 'position', 'norm', 'head'):
        assert all(torch.equal(a, b) for a, b in zip(getattr(student, part).parameters(),
                                                     getattr(teacher, part).parameters()))
    assert record['layers'] == found['config']['layers'] == ','.join(map(str, kept))
    assert found['parent']['path'] == path and found['parent']['sha256']
    at = [i for i, k in enumerate(kept) if k == 2]
    assert list(found['masks']) == [f'blocks.{i}.feed_forward.up.weight' for i in at]


def test_all_layers_kept_are_the_teacher(deep, tmp_path, toy):
    """Bit for bit; and train.py goes on from a truncated checkpoint."""
    path, teacher = deep
    pruned(path, tmp_path, toy, '--layers=' + ','.join(map(str, range(12))))
    x = torch.randint(256, (2, 16))
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path / 'pruned'))[0].eval()(x), teacher(x))


@pytest.mark.parametrize('n, strategy, kept', [
    (24, '6t', (13, 15, 17, 19, 21, 23)), (36, 'alt', (0, 6, 12, 18, 24, 30)), (48, 'distil', (0, 8, 16, 25, 33, 41)),
    (36, '3b3t', (0, 6, 12, 23, 29, 35)), (18, 'alt', (0, 3, 6, 9, 12, 15)), (8, '3l', (0, 2, 5)),
    (6, '6b', (0, 1, 2, 3, 4, 5))])
def test_other_depths(n, strategy, kept):
    """Li et al.'s table, and evenly spaced layers where it has no entry."""
    assert tuple(prune.layers_of_strategy(strategy, n, 'gpt2')) == kept


def test_sensitivity_drops_what_matters_least(deep, tmp_path, toy, capsys):
    """Brute force: every layer left out in turn, twice, on the leading validation blocks."""
    path, teacher = deep
    text = open_split(toy, 'toy', 'val').head(16 * sparse.CALIBRATION_BLOCKS)
    blocks, left, out = list(teacher.blocks), list(range(12)), []
    for _ in range(2):
        losses = {}
        for dropped in left:
            teacher.blocks = torch.nn.ModuleList(blocks[i] for i in left if i != dropped)
            losses[dropped] = score.score(teacher, text, 16, 64, OneProcess())['nats']
        out.append(min(losses, key=losses.get))
        left.remove(out[-1])
    found, record = pruned(path, tmp_path, toy, '--strategy=sensitivity', '--keep_layers=10')
    assert found['config']['layers'] == ','.join(map(str, left)) == record['layers']
    assert record['loss_after'] == pytest.approx(min(losses.values()) / text.n_tokens)
    printed = capsys.readouterr().out
    assert [f'layer {i} out: validation loss' in printed for i in out] == [True, True]


@pytest.mark.parametrize('flags, words', [
    (('--strategy=al',), "did you mean 'alt'"), (('--layers=0,12',), 'numbers from 0 to 11'),
    (('--layers=4,2',), 'ascending'), (('--layers=1,1',), 'different'), (('--layers=a',), 'expected numbers'),
    (('--strategy=alt', '--layers=1'), 'expected one of them'),
    (('--strategy=sensitivity', '--keep_layers=13'), 'expected 1 to 12')])
def test_bad_layers(deep, tmp_path, toy, flags, words):
    """One line, nothing written."""
    with pytest.raises(UserError, match=words):
        pruned(deep[0], tmp_path, toy, *flags)
    assert not os.path.exists(tmp_path / 'pruned')


def test_published_sizes():
    """GPT-2 small 124.44 M, six layers 81.91 M, three 60.65 M."""
    gpt2 = dict(block_size=1024, vocab_size=50257, n_embd=768, n_head=12, positions='learned', tied=True)
    sizes = [n_parameters(ModelConfig(n_layer=n, **gpt2)) for n in (12, 6, 3)]
    assert [round(n / 1e6, 2) for n in sizes] == [124.44, 81.91, 60.65]
