"""Training on row data and evaluating pairs: what is scored, what is seen, and that batching moves no number.

The records' titles name the word that their text repeats, so that a model can learn to read them: the second byte, the
first one that pairs score, is known from the title alone.
"""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, OneProcess, run_here, torchrun

import score
from configurator import UserError
from corpus import bins
from corpus.data import open_pairs, open_split
from model import GPT, ModelConfig
from training.checkpoint import load_model
from training.folder import read_run

WORDS = 'zero byte loss mask line gain rule tree fold step'.split()
LEARN = ('--dataset=meta', '--positions=rotary', '--block_size=64', '--batch_size=16', '--log_interval=20')


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """data/meta, meta_none and meta_same: 300 documents of a word said again and again, with a title naming it."""
    folder = tmp_path_factory.mktemp('rows')
    rng = np.random.default_rng(0)
    with open(folder / 'records.jsonl', 'w') as f:
        for i in range(300):
            word, tail = rng.choice(WORDS), ' '.join(rng.choice(list('abcdefgh'), 3))
            text = ' '.join(['a' + word] * int(rng.integers(2, 15))) + f' {tail} {i}'
            f.write(json.dumps(dict(text=text, title=word, url=f'https://{i % 3}.org/')) + '\n')
    for name, control in (('meta', ''), ('meta_none', 'none'), ('meta_same', 'samecontext')):
        run_here('prepare_metadata.py', f'--source={folder / "records.jsonl"}', '--types=url,title', '--tokenizer=byte',
                 '--block_size=64', '--val_fraction=0.2', '--test_fraction=0.1', '--num_proc=1',
                 f'--name={name}', f'--control={control}', f'--data_dir={folder}')
    return str(folder)


@pytest.fixture(scope='module')
def trained(data_dir, tmp_path_factory):
    """A model that has read the titles for 200 steps; returns its run folder."""
    out = str(tmp_path_factory.mktemp('out') / 'run')
    run_here('train.py', *TINY, *LEARN, f'--data_dir={data_dir}', f'--out_dir={out}', '--max_iters=200',
             '--eval_interval=100', '--learning_rate=5e-3', '--eval_blocks=20')
    return out


def tiny_model(**more):
    torch.manual_seed(0)
    return GPT(ModelConfig(**dict(dict(block_size=64, n_layer=2, n_embd=32, n_head=2, positions='rotary'), **more)))


def losses(out):
    with open(f'{out}/train_loss.csv') as f:
        head, *lines = f.read().splitlines()
    return [float(line.split(',')[head.split(',').index('loss_nats')]) for line in lines]


# --- what is scored, what is seen ---

@pytest.mark.parametrize('loss_on', ['text', 'text+markup'])
def test_prefix_and_padding_give_exactly_no_gradient(data_dir, loss_on):
    """The gradient of a batch's loss with respect to the logits is 0.0 wherever no text is predicted, and not there."""
    rows = open_split(data_dir, 'meta', 'train').scoring(loss_on)
    starts = np.arange(0, 64 * 30, 64)
    x, y = map(torch.from_numpy, rows.gather(starts, 64))
    model, kept = tiny_model(), []
    model.head.register_forward_hook(lambda module, given, out: kept.append(out.retain_grad() or out))
    model(x, y).backward()
    by_position = kept[0].grad.abs().amax(-1)
    mask = torch.from_numpy(rows.rows_at(starts, 64)[1])
    assert (mask == 2).any() and (by_position[mask != 1] == 0).all() and (by_position[mask == 1] > 0).all()


@pytest.mark.parametrize('positions', ['rotary', 'learned'])
def test_hidden_padding_is_seen_by_no_text(positions):
    """With rotary positions, which are relative, a row behind n hidden inputs has the logits of the row alone."""
    model = tiny_model(positions=positions).eval()
    model.left_padding = True
    x = torch.randint(256, (3, 40))
    alone, n = model(x), torch.tensor([0, 7, 24])
    padded = torch.full((3, 64), 99)
    for i in range(3):
        padded[i, :n[i]], padded[i, n[i]:n[i] + 40] = -1, x[i]
    found = model(padded)
    assert torch.isfinite(found).all()
    for i in range(3):
        same = torch.allclose(found[i, n[i]:n[i] + 40], alone[i], atol=1e-5)
        assert same == (positions == 'rotary' or n[i] == 0)
    plain = tiny_model(positions=positions).eval()
    assert torch.allclose(plain(x), alone, atol=1e-6)


# --- training ---

@pytest.mark.slow
def test_step_loss_does_not_depend_on_the_split(data_dir, tmp_path):
    """Rows score different numbers of tokens: whole batches, micro-batches of 2, and two ranks give one loss."""
    flags = [*TINY, *LEARN, f'--data_dir={data_dir}', '--max_iters=8', '--eval_blocks=8', '--final_train_blocks=0']
    run_here('train.py', *flags, f'--out_dir={tmp_path / "whole"}')
    run_here('train.py', *flags, f'--out_dir={tmp_path / "micro"}', '--micro_batch_size=2')
    done = torchrun(2, 'train.py', *flags, f'--out_dir={tmp_path / "ranks"}', '--micro_batch_size=4')
    assert done.returncode == 0, done.stderr[-2000:]
    whole, *others = (losses(tmp_path / name) for name in ('whole', 'micro', 'ranks'))
    assert len(whole) == 8
    for other in others:
        np.testing.assert_allclose(other, whole, atol=2e-6)             # the csv has six decimals
    a, b = (read_run(str(tmp_path / name)) for name in ('whole', 'ranks'))
    for key in ('pairs_title_with_nats', 'pairs_all_difference_nats', 'mean_test_loss'):
        assert abs(a[key] - b[key]) < 1e-5


def test_training_counts_text_and_validates_pairs(trained, data_dir):
    """Tokens are scored ones; bits per byte are of the text; pairs are in log, run.json; the title is read."""
    found, rows = read_run(trained), open_split(data_dir, 'meta', 'val')
    with open(f'{trained}/log.txt') as f:
        lines = [line for line in f if 'pairs type=' in line]
    assert len(lines) == 2 * 3 and 'type=url step=100' in lines[0] and 'true_wins=' in lines[0]
    assert found['tokens_seen'] < 200 * 16 * 64 * 0.9
    assert found['pairs_title_with_nats'] < found['pairs_title_without_nats'] - 0.01
    test = open_split(data_dir, 'meta', 'test')
    assert found['test_bits_per_byte'] == pytest.approx(found['mean_test_loss'] / np.log(2))      # a token is a byte
    assert test.n_targets == test.text_bytes < test.n_tokens and rows.n_targets > 0


def test_samecontext_trains_and_resumes(data_dir, tmp_path):
    """Hidden padding through training, validation and resuming; a control with other losses than the plain one."""
    flags = [*TINY, *LEARN, f'--data_dir={data_dir}', '--eval_blocks=4', '--final_train_blocks=0']
    for name in ('meta_same', 'meta_none'):
        run_here('train.py', *flags, f'--dataset={name}', f'--out_dir={tmp_path / name}', '--max_iters=5')
    assert losses(tmp_path / 'meta_same') != losses(tmp_path / 'meta_none')
    with pytest.raises(UserError, match="cannot resume: loss_on = 'text.markup', the checkpoint has 'text'"):
        run_here('train.py', *flags, '--dataset=meta_same', f'--out_dir={tmp_path / "meta_same"}', '--max_iters=9',
                    '--loss_on=text+markup', '--init_from=resume')
    run_here('eval.py', f'--from_ckpt={tmp_path / "meta_same"}', f'--data_dir={data_dir}', '--device=cpu',
             f'--out={tmp_path}')
    row, = read_run(str(next(tmp_path.glob('eval-*'))))['rows']
    assert row['loss_nats'] == pytest.approx(read_run(str(tmp_path / 'meta_same'))['mean_test_loss'], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('shard', ['', 'full'])
def test_hidden_padding_on_two_ranks(data_dir, tmp_path, shard):
    """DDP and FSDP2 hide the same inputs as one process does."""
    flags = [*TINY, *LEARN, '--dataset=meta_same', f'--data_dir={data_dir}', '--max_iters=4', '--eval_blocks=4',
             '--final_train_blocks=0']
    run_here('train.py', *flags, f'--out_dir={tmp_path / "one"}')
    done = torchrun(2, 'train.py', *flags, f'--shard={shard}', f'--out_dir={tmp_path / "two"}')
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(losses(tmp_path / 'two'), losses(tmp_path / 'one'), atol=1e-5)


def test_hidden_padding_compiled(data_dir):
    """What torch.compile makes of a forward with hidden padding has the same loss and gradients."""
    x, y = map(torch.from_numpy, open_split(data_dir, 'meta_same', 'train').gather(np.arange(0, 64 * 8, 64), 64))
    assert (x < 0).any()
    found = []
    for compiled in (False, True):
        model = tiny_model()
        model.left_padding = True
        loss = (torch.compile(model, backend='aot_eager', fullgraph=True) if compiled else model)(x, y)
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, grad), (compiled_loss, compiled_grad) = found
    assert abs(compiled_loss / loss - 1) < 1e-6 and (compiled_grad - grad).norm() < 1e-6 * grad.norm()


def test_a_student_hides_the_same_padding(data_dir, tmp_path):
    """distill.py on such rows: with next tokens alone its losses are train.py's; rows of another length are refused."""
    flags = [*TINY, '--dataset=meta_same', f'--data_dir={data_dir}', '--positions=rotary', '--max_iters=4',
             '--eval_blocks=4', '--batch_size=16']
    run_here('train.py', *flags, '--block_size=64', '--final_train_blocks=0', f'--out_dir={tmp_path / "plain"}')
    taught = [*flags, f'--teacher={tmp_path / "plain"}', '--no-freeze_positions', f'--out_dir={tmp_path / "run"}']
    run_here('distill.py', *taught, '--block_size=64', '--a_ce=0', '--a_cos=0', '--a_clm=1')
    assert losses(tmp_path / 'run') == losses(tmp_path / 'plain')
    with pytest.raises(UserError, match="block_size = 32, 'meta_same' has rows of 64 tokens"):
        run_here('distill.py', *taught, '--block_size=32')


def test_another_mask_is_other_data(data_dir, tmp_path):
    """A run is not resumed on the same ids with another mask; --verify reads the mask too."""
    shutil.copytree(data_dir, tmp_path / 'data')
    flags = [*TINY, *LEARN, f'--data_dir={tmp_path / "data"}', f'--out_dir={tmp_path / "run"}', '--eval_blocks=4',
             '--final_train_blocks=0']
    run_here('train.py', *flags, '--max_iters=2')
    mask, meta = tmp_path / 'data/meta/train.mask.bin', tmp_path / 'data/meta/meta.json'
    mask.write_bytes(mask.read_bytes().replace(b'\1', b'\2', 1))
    with pytest.raises(UserError, match='train.mask.bin does not have the SHA-256'):
        run_here('train.py', *flags, '--max_iters=4', '--init_from=resume', '--verify')
    found = json.loads(meta.read_text())
    found['splits']['train']['mask_sha256'] = bins.sha256_file(mask)
    meta.write_text(json.dumps(found))
    with pytest.raises(UserError, match='cannot resume: sha256 is'):
        run_here('train.py', *flags, '--max_iters=4', '--init_from=resume')


@pytest.mark.parametrize('flags, message', [
    (['--block_size=32'], "block_size = 32, 'meta' has rows of 64 tokens; set --block_size=64"),
    (['--order=random'], "takes order = 'permuted' or 'sequential'"),
    (['--loss_on=prefix'], "loss_on = 'prefix', expected one of 'text', 'text.markup'"),
    (['--dataset=', '--data_mix=meta:1'], 'meta of data_mix = .* is row data, expected sets of running text')])
def test_training_refuses_in_one_line(data_dir, tmp_path, flags, message):
    """What cannot be meant is said before the run folder is made."""
    with pytest.raises(UserError, match=message):
        run_here('train.py', *TINY, *LEARN, f'--data_dir={data_dir}', f'--out_dir={tmp_path / "no"}', *flags)
    assert not (tmp_path / 'no').exists()


def test_loss_on_needs_row_data(train_tiny):
    with pytest.raises(UserError, match="loss_on = 'text.markup' needs row data, 'toy' has none"):
        train_tiny('--loss_on=text+markup')


# --- evaluation ---

def test_pairs_table(trained, data_dir, tmp_path, capsys):
    """with / without / difference and its interval, per type and together, all pieces and first ones; the probe."""
    run_here('eval.py', f'--from_ckpt={trained}', '--pairs=meta', f'--data_dir={data_dir}', '--device=cpu',
             '--dtype=float32', f'--out={tmp_path}', '--bootstrap=200')
    rows = read_run(str(next(tmp_path.glob('eval-*'))))['rows']
    assert [(r['type'], r['pieces']) for r in rows] == [(t, p) for t in ('url', 'title', 'all')
                                                       for p in ('all', 'first')]
    by = {(r['type'], r['pieces']): r for r in rows}
    for r in rows:
        assert r['difference_nats'] == pytest.approx(r['with_nats'] - r['without_nats'])
        assert r['difference_low'] <= r['difference_nats'] <= r['difference_high']
        assert r['with_bits_per_byte'] == pytest.approx(r['with_nats'] / np.log(2))
        assert r['documents'] == by['title', 'all']['documents'] > 20
    assert by['title', 'first']['tokens'] < by['title', 'all']['tokens']
    assert by['title', 'first']['difference_high'] < 0 and by['title', 'first']['true_wins'] > 0.6
    printed = capsys.readouterr().out
    assert 'difference_nats' in printed and 'true_wins' in printed and 'bits_per_byte |' in printed


def test_pair_losses_are_those_of_the_rows_one_by_one(trained, data_dir):
    """Batches of 32, of 1, of three ranks and a loop of this test over rows agree to 1e-6."""
    model, env = load_model(trained, 'cpu')[0].eval(), OneProcess()
    arms = open_pairs(data_dir, 'meta')['title']
    rows, sums = arms['with'], {}
    for size in (32, 1):
        sums[size] = score.row_sums(model, rows, size, env)
    np.testing.assert_allclose(sums[32], sums[1], rtol=1e-6, atol=1e-5)
    assert abs(np.subtract(*(s[0].sum() / s[1].sum() for s in sums.values()))) < 1e-6
    for i in (0, 5, 9):
        x, y = map(torch.from_numpy, rows.gather([64 * i], 64))
        with torch.no_grad():
            assert float(model(x, y)) == pytest.approx(sums[32][0, i], rel=1e-5)
        assert (y >= 0).sum() == sums[32][1, i]
    several = [score.row_sums(model, rows, 8, OneProcess(rank, 3)) for rank in range(3)]
    np.testing.assert_allclose(sum(several), sums[32], rtol=1e-6, atol=1e-5)


def test_interval_of_the_difference():
    """Every document 0.1 nats better per token: an interval of one point; documents weigh their tokens."""
    tokens = np.array([10.0, 30.0, 60.0] * 20)
    b = np.stack((tokens * np.tile([1.0, 2.0, 3.0], 20), tokens))
    found = score.difference(b - np.stack((0.1 * tokens, 0 * tokens)), b, 100)
    assert found['without_nats'] == pytest.approx(2.5) and found['difference_nats'] == pytest.approx(-0.1)
    assert found['difference_low'] == pytest.approx(-0.1) and found['difference_high'] == pytest.approx(-0.1)
    half = b.copy()
    half[0, ::2] -= tokens[::2]                                         # half of the tokens 1 nat better
    wide = score.difference(half, b, 500)
    assert wide['difference_low'] < wide['difference_nats'] < wide['difference_high'] < 0
    none = score.difference(half, b, 0)
    assert none['difference_low'] is None and none['difference_nats'] == wide['difference_nats']


def test_pairs_refuse_other_data(trained, toy, data_dir, tmp_path):
    """A set without pairs, and rows longer than the model."""
    with pytest.raises(UserError, match="'toy' has no paired rows, expected one made by prepare_metadata.py"):
        run_here('eval.py', f'--from_ckpt={trained}', '--pairs=toy', f'--data_dir={toy}', f'--out={tmp_path}')
    run_here('train.py', *TINY, f'--data_dir={toy}', '--dataset=toy', f'--out_dir={tmp_path / "short"}',
             '--max_iters=1')
    with pytest.raises(UserError, match='rows have 64 tokens, .* was built for at most 32'):
        run_here('eval.py', f'--from_ckpt={tmp_path / "short"}', '--pairs=meta', f'--data_dir={data_dir}',
                 f'--out={tmp_path}')


def test_rows_score_as_text(trained, data_dir):
    """score.evaluate over rows: bytes are those of the scored tokens, of leading rows too."""
    model, rows = load_model(trained, 'cpu')[0], open_split(data_dir, 'meta', 'val')
    for n in (0, 5):
        found = score.evaluate(model, rows, 64, 16, OneProcess(), max_blocks=n)
        assert found['tokens'] == found['text_bytes'] == rows.head(n * 64).n_targets
        assert found['bits_per_byte'] == pytest.approx(found['loss_nats'] / np.log(2))
