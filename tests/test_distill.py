"""distill.py: the terms against their formulas, train.py to the last bit, ranks, resume, bad input."""
import csv
import json
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, run_here, same, snapshot, torchrun, write_dataset
from torch.utils._python_dispatch import TorchDispatchMode

import distill
from configurator import UserError
from model import GPT, ModelConfig, model_args
from training import huggingface
from training.checkpoint import load_checkpoint, load_model, save_checkpoint
from training.folder import close_run_folders, read_run, read_status
from training.plan import Schedule
from training.process import PAUSED

ZERO = dict.fromkeys(distill.TERMS, 0.0)


def gpt(seed=0, **options):
    torch.manual_seed(seed)
    model = GPT(ModelConfig(**dict(block_size=16, vocab_size=61, n_layer=2, n_embd=24, n_head=2, positions='learned')
                            | options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def rows(seed=0, vocab_size=61):
    """Ids and targets (3, 16), some of them without a score."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(vocab_size, (3, 16), generator=g) for _ in 'xy')
    y[2, 5:] = -1
    return x, y


def plain_terms(student, teacher, x, y, tau, pairs):
    """The published formulas written out over the scored tokens, nothing in chunks."""
    scored = y >= 0
    outputs = [[], []]
    for model, kept in zip((student, teacher), outputs):
        for block in model.blocks:
            block.register_forward_hook(lambda m, a, out, kept=kept: kept.append(out))
    s, h_s = student(x)[scored], student.hidden(x)[scored]
    t, h_t = teacher(x)[scored].detach(), teacher.hidden(x)[scored].detach()
    p, q = (t / tau).softmax(-1), (s / tau).softmax(-1)
    return torch.stack((
        F.cross_entropy(s, y[scored], reduction='sum'), tau ** 2 * (p * (p / q).log()).sum(), ((s - t) ** 2).sum(),
        (1 - F.cosine_similarity(h_s, h_t)).sum(),
        sum(((outputs[0][i] - outputs[1][j].detach())[scored] ** 2).mean(-1).sum() for i, j in pairs)))


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('chunk', [1, 7, 1000])
def test_terms_and_gradients_are_those_of_the_formulas(chunk, tied):
    """Every term alone and all together, whatever the chunk; gradients by plain autograd."""
    pairs = [(0, 1), (1, 3)]
    for term in (*distill.TERMS, ''):
        weights = ZERO | ({term: 1.0} if term else dict(clm=0.7, ce=1.3, mse=0.01, cos=2.0, hidden=0.5))
        found = []
        for reference in (False, True):
            student, teacher, (x, y) = gpt(1, tied=tied), gpt(2, n_layer=4, tied=tied), rows()
            if reference:
                terms = plain_terms(student, teacher, x, y, 1.7, pairs)
                loss = (terms * torch.tensor([weights[t] for t in distill.TERMS])).sum()
            else:
                teacher.requires_grad_(False)
                loss, *terms = distill.Distillation(student, teacher, weights, 1.7, chunk, pairs)(x, y)
                terms = torch.stack(terms)
            (loss / 3).backward()
            found.append((loss.detach(), [p.grad if p.grad is not None else torch.zeros(1)
                                          for p in student.parameters()], terms.detach()))
        (a, grads_a, terms_a), (b, grads_b, terms_b) = found
        assert float(a) == pytest.approx(float(b), rel=1e-5)
        for i, name in enumerate(distill.TERMS):
            if weights[name]:
                assert float(terms_a[i]) == pytest.approx(float(terms_b[i]), rel=1e-5)
        for g, h in zip(grads_a, grads_b):
            assert torch.allclose(g, h, rtol=1e-4, atol=1e-6 * float(h.abs().max()) + 1e-9)


def test_a_teacher_that_is_the_student_teaches_nothing():
    """Exactly 0, not nearly: the distribution and the direction are the same."""
    student, teacher, (x, y) = gpt(1), gpt(1), rows()
    weights = dict.fromkeys(distill.TERMS, 1.0)
    terms = distill.Distillation(student, teacher, weights, 2.0, 7, [(0, 0), (1, 1)])(x, y)[1:]
    assert terms[0] > 0 and terms[1:].tolist() == [0, 0, 0, 0]


class Largest(TorchDispatchMode):
    """Remember the most elements that any result of an operation has."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.n = max(self.n, t.numel())
        return out


def test_logits_never_exist_for_more_than_a_chunk():
    """Forward and backward: no tensor larger than chunk x V or the head itself, while all logits are 10 times that."""
    V, chunk = 5000, 16
    student, teacher = gpt(1, vocab_size=V, n_embd=8, block_size=64), gpt(2, vocab_size=V, n_embd=8, block_size=64)
    x = torch.randint(V, (4, 64))
    module = distill.Distillation(student, teacher.requires_grad_(False), dict.fromkeys(distill.TERMS, 1.0), 2.0, chunk)
    with Largest() as largest:
        module(x, x)[0].backward()
    assert chunk * V <= largest.n <= chunk * V + V * 8 < x.numel() * V / 10


# --- the script ---

@pytest.fixture(scope='module')
def teacher(toy, tmp_path_factory):
    """A run folder of 4 layers on toy, trained for a few steps."""
    folder = tmp_path_factory.mktemp('teacher') / 'run'
    run_here('train.py', *TINY, '--n_layer=4', f'--data_dir={toy}', '--dataset=toy', f'--out_dir={folder}',
             '--max_iters=15', '--final_train_blocks=0', '--positions=learned')
    return str(folder)


@pytest.fixture
def distil(toy, tmp_path, teacher):
    """Run distill.py with tiny sizes; returns its exit status. Later flags win."""
    def call(*flags, out='run'):
        return run_here('distill.py', *TINY, f'--data_dir={toy}', '--dataset=toy', f'--teacher={teacher}',
                        f'--out_dir={tmp_path / out}', '--max_iters=6', '--positions=learned', *flags)
    return call


@pytest.fixture
def keep_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def table(folder):
    with open(os.path.join(folder, 'train_loss.csv'), newline='') as f:
        return [{k: v for k, v in row.items() if k != 'seconds'} for row in csv.DictReader(f)]


@pytest.mark.parametrize('flags', [(), ('--block_type=mixer', '--positions=none'),
                                   ('--micro_batch_size=2', '--dropout=0.1', '--grad_clip=0.5')])
def test_next_tokens_alone_are_train_py(distil, toy, tmp_path, flags):
    """Issue 5: a_clm = 1 and all else 0 gives train.py's losses and weights bit for bit on a CPU."""
    distil('--a_ce=0', '--a_cos=0', '--a_clm=1', '--no-freeze_positions', *flags)
    run_here('train.py', *TINY, f'--data_dir={toy}', '--dataset=toy', f'--out_dir={tmp_path / "plain"}',
             '--max_iters=6', '--positions=learned', '--final_train_blocks=0', *flags)
    mine, plain = table(tmp_path / 'run'), table(tmp_path / 'plain')
    assert [r['loss_nats'] for r in mine] == [r['loss_nats'] for r in plain] and len(mine) == 6
    a, b = (load_checkpoint(str(tmp_path / name)) for name in ('run', 'plain'))
    assert all(same(a[key], b[key]) for key in ('model', 'optimizer'))
    assert a['final_train_loss'] == b['final_train_loss']
    assert read_run(tmp_path / 'run')['test_bits_per_byte'] == read_run(
        tmp_path / 'plain')['test_bits_per_byte']


def test_splits_of_a_batch_give_one_loss(distil, tmp_path):
    """Same global batch, other micro-batches and chunks: to a relative 1e-6."""
    found = []
    for i, flags in enumerate((('--micro_batch_size=8',), ('--micro_batch_size=2',),
                               ('--micro_batch_size=1', '--chunk_tokens=9'))):
        distil(*flags, out=f'r{i}')
        found.append([float(r['loss']) for r in table(tmp_path / f'r{i}')])
    assert found[1] == pytest.approx(found[0], rel=2e-6) and found[2] == pytest.approx(found[0], rel=2e-6)
    facts = [load_checkpoint(str(tmp_path / f'r{i}'))['final_train_loss'] for i in range(3)]
    assert facts[1:] == pytest.approx([facts[0]] * 2, rel=1e-6)


def test_the_student_learns_from_the_teacher(distil, tmp_path, teacher):
    """All terms fall, positions stay, the table adds up, and the files are those of a training run."""
    assert distil('--max_iters=60', '--a_hidden=0.1', '--eval_interval=30') == 0
    found, log = table(tmp_path / 'run'), (tmp_path / 'run' / 'log.txt').read_text()
    for name in ('loss', 'loss_nats', 'loss_ce', 'loss_cos', 'loss_hidden'):
        assert float(found[-1][name]) < float(found[0][name])
    for r in found:
        assert float(r['loss']) == pytest.approx(2 * float(r['loss_nats']) + 5 * float(r['loss_ce']) + float(
            r['loss_cos']) + 0.1 * float(r['loss_hidden']), abs=2e-5)
    torch.manual_seed(858)
    fresh = GPT(ModelConfig(**load_checkpoint(str(tmp_path / 'run'))['model_args']))
    student, checkpoint = load_model(str(tmp_path / 'run'))
    assert torch.equal(student.position.weight, fresh.position.weight)
    assert not torch.equal(student.embed.weight, fresh.embed.weight)
    record = read_run(tmp_path / 'run')
    assert record['status'] == 'done' and record['teacher_checkpoint'] == checkpoint['teacher']
    assert checkpoint['teacher']['sha256'] and log.count('val phase=distillation') == 2
    assert os.path.exists(tmp_path / 'run' / 'best.pt')


@pytest.mark.parametrize('number', (signal.SIGUSR1, signal.SIGINT))
def test_a_paused_run_ends_with_the_same_bytes(number, distil, tmp_path, monkeypatch, keep_ctrl_c):
    """A signal at step 3, then init_from=resume: tensors and table equal those of an unbroken run."""
    flags = ('--dropout=0.1', '--a_hidden=1')
    distil(*flags, out='whole')
    real = Schedule.rate

    def interrupt(self, step, peak):
        if step == 3:
            os.kill(os.getpid(), number)
        return real(self, step, peak)
    with monkeypatch.context() as patch:
        patch.setattr(Schedule, 'rate', interrupt)
        assert distil(*flags) == PAUSED and read_status(tmp_path / 'run') == 'paused'
    with pytest.raises(UserError, match='cannot resume: a_ce = 1.0'):
        distil(*flags, '--init_from=resume', '--a_ce=1')
    assert distil(*flags, '--init_from=resume') == 0
    a, b = (load_checkpoint(str(tmp_path / name)) for name in ('whole', 'run'))
    assert all(same(a[key], b[key]) for key in ('model', 'optimizer'))
    assert table(tmp_path / 'run') == table(tmp_path / 'whole')
    record = tmp_path / 'run' / 'run.json'                  # a signal in the final scoring leaves that to a resume
    record.write_text(json.dumps(dict(read_run(tmp_path / 'run'), status='paused')))
    before = (tmp_path / 'run' / 'ckpt.pt').read_bytes()
    assert distil(*flags, '--init_from=resume') == 0 and read_status(tmp_path / 'run') == 'done'
    assert (tmp_path / 'run' / 'ckpt.pt').read_bytes() == before


@pytest.mark.slow
def test_two_ranks_see_the_same_batches(distil, tmp_path, toy, teacher):
    """torchrun with two processes: the losses of one, to float rounding."""
    distil('--micro_batch_size=4')
    done = torchrun(2, 'distill.py', *TINY, f'--data_dir={toy}', '--dataset=toy', f'--teacher={teacher}',
                    f'--out_dir={tmp_path / "two"}', '--max_iters=6', '--positions=learned')
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = table(tmp_path / 'run'), table(tmp_path / 'two')
    for a, b in zip(one, two, strict=True):
        for name in ('loss', 'loss_nats', 'loss_ce', 'loss_cos', 'grad_norm'):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3 if name == 'grad_norm' else 2e-5)


def test_masks_and_truncated_students(distil, tmp_path, teacher, toy):
    """prune.py --layers makes the student, its pruned weights stay zero, and a GPT-2 folder can teach."""
    run_here('prune.py', f'--from_ckpt={teacher}', '--method=magnitude', '--sparsity=0.5',
             f'--out_dir={tmp_path / "p"}', '--no-sweep_dead_units', '--device=cpu')
    run_here('prune.py', f'--from_ckpt={tmp_path / "p"}', '--layers=0,2', f'--out_dir={tmp_path / "s"}',
             '--device=cpu')
    distil(f'--init_from={tmp_path / "s"}')
    student = load_checkpoint(str(tmp_path / 'run'))
    assert len(student['masks']) > 5 and student['parent']['path'].startswith(str(tmp_path / 's'))
    for name, mask in student['masks'].items():
        assert not student['model'][name][~mask].any()
    write_dataset(str(tmp_path / 'data'))
    torch.manual_seed(0)
    model = GPT(ModelConfig(block_size=32, n_embd=32, n_head=2, n_layer=3, positions='learned', tied=True))
    save_checkpoint(str(tmp_path / 'big.pt'), dict(
        model=model.state_dict(), model_args=model_args(model), masks={}, config={},
        data=dict(dataset='toy', sha256='', tokenizer='byte', start_id=10)))
    huggingface.main(['export', str(tmp_path / 'big.pt'), str(tmp_path / 'hf')])
    assert distil(f'--teacher={tmp_path / "hf"}', '--n_embd=16', '--a_cos=0', out='other') == 0


def test_bfloat16(distil, tmp_path):
    """Autocast, on a CPU too: the loss is near that of float32."""
    distil('--dtype=bfloat16', out='narrow')
    distil()
    a, b = (float(table(tmp_path / name)[-1]['loss']) for name in ('narrow', 'run'))
    assert a == pytest.approx(b, rel=0.03) and math.isfinite(a)


@pytest.mark.parametrize('flags, words', [
    (('--teacher=',), 'teacher is empty'), (('--teacher=nowhere/at/all.pt',), 'no checkpoint at'),
    (('--n_embd=16',), 'a_cos = 1.0 compares states of one width, teacher 32, student 16; use --a_cos=0'),
    (('--n_embd=16', '--a_cos=0', '--a_hidden=1'), 'a_hidden = 1.0 compares'),
    (('--block_size=64',), 'was built for at most 32'), (('--temperature=0',), 'temperature = 0.0, expected > 0'),
    (('--a_hidden=1', '--layer_map=0:4'), "layer_map = '0:4', expected"),
    (('--a_hidden=1', '--layer_map=x'), "layer_map = 'x', expected"),
    (('--a_ce=0', '--a_clm=0', '--a_cos=0'), 'all weights of the loss are 0'), (('--a_ce=-1',), 'a_ce = -1.0'),
    (('--batch_size=9', '--micro_batch_size=2'), 'not a multiple'),
    (('--max_iters=0', '--epochs=0'), 'nothing to train'),
    (('--wrapper=oracle',), "wrapper = 'oracle', but a student predicts the next token"),
    (('--block_size=31', '--block_type=mixer', '--positions=none'), "block_size = 31, a mixer's must be even"),
    (('--learning_rate=1e30', '--max_iters=50'), 'try a lower --learning_rate')])
def test_bad_input(distil, tmp_path, flags, words):
    """One line with the value and the cure."""
    with pytest.raises(UserError) as error:
        distil(*flags)
    assert words in str(error.value) and '\n' not in str(error.value)


def test_another_vocabulary(distil, tmp_path):
    """Teacher and student share the tokens."""
    model = gpt(vocab_size=99)
    save_checkpoint(str(tmp_path / 'v.pt'), dict(
        model=model.state_dict(), model_args=model_args(model), masks={}, config={},
        data=dict(dataset='toy', sha256='', tokenizer='gpt2', start_id=10)))
    with pytest.raises(UserError, match="reads 'gpt2' tokens with a vocabulary of 99"):
        distil(f'--teacher={tmp_path / "v.pt"}')


def failing(*_):
    raise RuntimeError('out of memory')


def test_a_start_that_fails_costs_no_older_run(distil, tmp_path, monkeypatch):
    """Out of memory in the first step of --overwrite: the finished run is as it was; else it is replaced, no rest."""
    distil()
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Schedule, 'rate', failing)
        with pytest.raises(RuntimeError, match='out of memory'):
            distil('--overwrite')
    assert (tmp_path / 'run.old').exists()
    close_run_folders()                                     # as at exit
    assert snapshot(tmp_path) == before
    assert distil('--overwrite', '--seed=3') == 0
    assert read_run(tmp_path / 'run')['seed'] == 3 and os.listdir(tmp_path) == ['run']


def test_a_student_does_not_replace_its_teacher(distil, teacher):
    """--teacher=X --out_dir=X --overwrite: X would be gone with the first checkpoint."""
    before = snapshot(teacher)
    with pytest.raises(UserError, match='lies in out_dir'):
        distil(f'--out_dir={teacher}', '--overwrite')
    assert snapshot(teacher) == before


def test_a_teacher_with_an_encoder_is_refused(distil, tmp_path):
    """It takes whole rows as they are, not the tokens before them."""
    save_checkpoint(str(tmp_path / 'o.pt'), dict(
        model={}, model_args=dict(block_size=32, vocab_size=256, n_layer=1, n_head=1, n_embd=32, wrapper='oracle'),
        masks={}, config={}, data=dict(dataset='toy', sha256='', tokenizer='byte', start_id=10)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('training.checkpoint.load_weights', lambda *_: None)
        with pytest.raises(UserError, match="has wrapper = 'oracle', expected a model without an encoder"):
            distil(f'--teacher={tmp_path / "o.pt"}')


def test_check_prints_the_plan(distil, tmp_path, capsys):
    """Steps and parameters of the student, whether the data are there or not; nothing is written."""
    assert distil('--check') == 0
    assert '6 steps' in capsys.readouterr().out
    assert distil('--check', '--dataset=nowhere') == 0
    assert 'steps, tokens         unknown' in capsys.readouterr().out
    assert not (tmp_path / 'run').exists()


def test_pairs_of_layers():
    """Evenly spaced, the last on the last; or as they are named."""
    assert distill.pairs_of('', 2, 4) == [(0, 1), (1, 3)]
    assert distill.pairs_of('', 3, 12) == [(0, 3), (1, 7), (2, 11)]
    assert distill.pairs_of('0:1, 1:0', 2, 4) == [(0, 1), (1, 0)]
    for bad in ('0', '0:1:2', ',', '2:0'):
        with pytest.raises(UserError, match='layer_map'):
            distill.pairs_of(bad, 2, 4)


def test_compiled():
    """What torch.compile makes of the loss, hooks and chunks included, has the same values and gradients."""
    found, (x, y) = [], rows()
    for compiled in (False, True):
        student, taught = gpt(1), gpt(2, n_layer=4).requires_grad_(False)
        module = distill.Distillation(student, taught, dict.fromkeys(distill.TERMS, 1.0), 2.0, 7, [(0, 1), (1, 3)])
        losses = (torch.compile(module, backend='aot_eager') if compiled else module)(x, y)
        losses[0].backward()
        found.append(torch.cat((losses.detach()[1:], *(p.grad.flatten() for p in student.parameters()))))
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)
