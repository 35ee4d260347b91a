"""The jobs of GPT-2 compression, from text to a packed file: offline, on a tiny GPT-2 of transformers and a BPE."""
import csv
import json
import os

import pytest
import torch
from conftest import run_here

import sparse
from codec.container import read_archive
from corpus.data import open_split
from training.checkpoint import load_checkpoint, load_model
from training.folder import read_run

transformers = pytest.importorskip('transformers')
WORDS = 'the model weighs nothing until a byte of its text has been paid for in bits and every zero is free'.split()
SHAPE = ('--n_embd=32', '--n_head=2', '--block_size=32', '--positions=learned', '--activation=gelu_tanh', '--tied')
STEPS = ('--batch_size=8', '--learning_rate=3e-3', '--max_iters=12', '--device=cpu', '--dtype=float32')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with tiny/ (12 layers, 300 ids, tokenizer.json) and data/bpe, made by the commands of the README."""
    from tokenizers import ByteLevelBPETokenizer
    folder = tmp_path_factory.mktemp('jobs')
    g = torch.Generator().manual_seed(0)
    texts = [' '.join(WORDS[i] for i in torch.randint(len(WORDS), (40,), generator=g)) + '.' for _ in range(60)]
    tok = ByteLevelBPETokenizer()
    tok.train_from_iterator(texts, 300, special_tokens=['<|endoftext|>'], show_progress=False)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=tok.get_vocab_size(), n_positions=32, n_embd=32, n_layer=12, n_head=2, bos_token_id=0,
        eos_token_id=0))
    model.save_pretrained(folder / 'tiny')
    tok.save(str(folder / 'tiny' / 'tokenizer.json'))
    with open(folder / 'texts.jsonl', 'w') as f:
        f.writelines(json.dumps(dict(text=t)) + '\n' for t in texts)
    run_here('prepare_text.py', '--name=bpe', f'--source={folder / "texts.jsonl"}', f'--tokenizer={folder / "tiny"}',
             f'--data_dir={folder / "data"}', '--val_fraction=0.1', '--test_fraction=0.1')
    (folder / 'text.txt').write_text(' '.join(texts[:3]))
    return folder


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def trained(script, out, *flags):
    assert run_here(script, f'--out_dir=out/{out}', '--dataset=bpe', *SHAPE, *STEPS, *flags) == 0
    return read_run(f'out/{out}'), load_checkpoint(f'out/{out}')


def test_truncate_pretrain_distil_finetune_evaluate_export(place, capsys):
    """Issue 5's commands in their order; each step starts from the last, and transformers loads the end."""
    assert run_here('prune.py', '--from_ckpt=tiny', '--strategy=alt', '--out_dir=out/alt6', '--device=cpu') == 0
    trained('train.py', 'pretrain', '--n_layer=6', '--init_from=out/alt6')
    record, _ = trained('distill.py', 'distil', '--n_layer=6', '--init_from=out/pretrain', '--teacher=tiny',
                        '--a_cos=1', '--chunk_tokens=64')
    assert record['status'] == 'done' and record['parent']['path'].startswith('out/pretrain')
    _, tuned = trained('train.py', 'tuned', '--n_layer=6', '--init_from=out/distil')
    capsys.readouterr()
    assert run_here('eval.py', '--from_ckpt=tiny,out/tuned', '--dataset=bpe', '--split=val,test', '--stride=16',
                    '--out=out', '--device=cpu') == 0
    folder = capsys.readouterr().out.split('wrote ')[-1].strip()
    with open(os.path.join(folder, 'table.csv'), newline='') as f:
        rows = list(csv.DictReader(f))
    assert [r['run'] for r in rows] == ['tiny', 'tiny', 'tuned', 'tuned']
    for r in rows:
        data = open_split('data', 'bpe', r['split'])
        assert int(r['tokens']) == data.n_tokens and int(r['text_bytes']) == data.text_bytes
        assert float(r['perplexity_per_word']) > float(r['perplexity']) > 1
    assert float(rows[2]['loss_nats']) < float(rows[0]['loss_nats'])
    run_here('runs.py', 'export', 'out/tuned/ckpt.pt', 'out/hf')
    model = transformers.GPT2LMHeadModel.from_pretrained('out/hf').eval()
    tok = transformers.AutoTokenizer.from_pretrained('out/hf')
    ids = torch.tensor([tok.encode('the model weighs nothing')])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, load_model('out/tuned')[0].eval()(ids), atol=1e-5)
    assert tok.decode(ids[0]) == 'the model weighs nothing' and tuned['data']['tokenizer'] == 'tiny'


@pytest.mark.parametrize('procedure', ['rl1', 'drr', 'pmmp'])
def test_sparse_gpt2(procedure):
    """Procedures and TAMADE run on a GPT-2 folder; the zeros survive export and import."""
    record, checkpoint = trained(
        'train.py', procedure, '--n_layer=12', '--init_from=tiny', f'--procedure={procedure}', '--alpha=1e-3',
        '--procedure_learning_rate=0.05', '--do_pruning', '--tolerated_relative_loss_increase=0.05',
        '--epochs_fine_tuning=0.2', '--learning_rate=1e-3')
    assert record['n_prunings'] == 1 and 0.02 < record['sparsity'] < 1 and record['parent']['path'] == 'tiny'
    for name, mask in checkpoint['masks'].items():
        assert not checkpoint['model'][name][~mask].any()
    run_here('runs.py', 'export', f'out/{procedure}', f'out/{procedure}-hf')
    model = transformers.GPT2LMHeadModel.from_pretrained(f'out/{procedure}-hf')
    assert sum(int((p != 0).sum()) for p in model.parameters()) == record['non_zero_params']
    again = load_model(f'out/{procedure}-hf')[0]
    assert sparse.count_nonzero(again.parameters()) == record['non_zero_params']


def test_a_sparse_gpt2_is_packed(place):
    """compress.py on BPE ids: two-part, the tokenizer inside, bit for bit back; the folder or its checkpoint."""
    run_here('prune.py', '--from_ckpt=tiny', '--layers=0,6', '--out_dir=out/two', '--device=cpu')
    run_here('prune.py', '--from_ckpt=out/two', '--method=magnitude', '--sparsity=0.6', '--out_dir=out/two-sparse',
             '--device=cpu')
    trained('train.py', 'packed', '--n_layer=2', '--init_from=out/two-sparse', '--max_iters=60', '--learning_rate=1e-2')
    assert read_run('out/packed')['sparsity'] > 0.5
    run_here('runs.py', 'export', 'out/packed', 'out/packed-hf')
    for model in ('out/packed/ckpt.pt', 'out/packed-hf'):
        assert run_here('compress.py', 'pack', model, 'text.txt', 'archive', '--tokenizer=tiny/tokenizer.json',
                        '--no-verify', '--no-progress', '-f') == 0
        sections = read_archive((place / 'archive').read_bytes(), 'archive')[3]
        assert {'wght', 'tokn'} <= set(sections)                            # coded, not stored, and self-contained
        assert run_here('compress.py', 'unpack', 'archive', 'back.txt', '--no-progress', '-f') == 0
        assert (place / 'back.txt').read_bytes() == (place / 'text.txt').read_bytes()
