"""Record what every command line computes, and compare another checkout with it: the net under a reorganisation.

    python tests/golden.py record golden.json --repo=OLD             run all cases with the checkout OLD
    python tests/golden.py compare golden.json --repo=NEW            run them with NEW; exit code 1 where they differ
    python tests/golden.py compare golden.json --repo=NEW --only='data_*,train_drr'      some; patterns, by commas
    python tests/golden.py compare golden.json --repo=NEW --only='resume_*' --inputs=OLD     NEW continues OLD's files
    python tests/golden.py list                                          names, what they need, how they are marked

More flags: --work=FOLDER (new or empty) keeps the files of the cases; --fresh starts each command in an interpreter of
its own, not in a fork of one that has torch loaded, and takes four times as long; --changed='masked and clipped' (or
'masked') says that what bears this mark is meant to differ: it is reported, and is no fault.

A case is a list of command lines. They run in a temporary folder, on texts that this file writes from the language
reference of CPython, so a case depends on nothing but the command line and the files of a checkout. Recorded are
losses, rates and norms of every step, numbers of run.json and tables, and hashes of tensors, archives and data.
Seconds, paths, commits and settings are not. Tensors of optimisers are recorded without names and order, each with its
shape, so that a state which is kept in two pieces is the same as one which is kept in one.
Two machines, or two builds of torch, differ in the last bit: a file is good for the machine that recorded it.
"""
import csv
import fnmatch
import hashlib
import json
import os
import platform
import re
import runpy
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass

# --- where scripts are: the first of these that a checkout has, with what goes before the arguments ---

SCRIPTS = dict(
    probe=[('lab/probe.py',), ('probe.py',)],
    entropy=[('lab/entropy.py',), ('lab/probe.py', '--mode=entropy'), ('probe.py', '--mode=entropy')],
    diversity=[('lab/diversity.py',), ('diversity.py',)],
    export=[('gpt2.py', 'export'), ('runs.py', 'export')],
)

# One thread, one set of instructions and no network: what is left is the arithmetic of the checkout.
ENVIRONMENT = dict(
    OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2',
    MKL_CBWR='COMPATIBLE', GOMP_SPINCOUNT='1000', PYTHONHASHSEED='0', MPLBACKEND='Agg', HF_HUB_OFFLINE='1',
    HF_DATASETS_OFFLINE='1', WANDB_MODE='disabled', LC_ALL='C.UTF-8')

# What a run says of itself that follows from its arithmetic.
FACTS = re.compile('(final|mean)_(train|val|test)_loss|test_accuracy|(train|test)_bits_per_byte|epsilon|sparsity|'
                   'non_zero_params|n_params|n_steps|model_byte_size|bits_est_bytes|tolerance_spent|n_prunings|'
                   'tokens_seen|online_description_length_bytes|train_data_bytes|drawn|flops_per_token|pairs_.*')
META = ('format', 'dtype', 'vocab_size', 'tokenizer', 'start_id', 'splits', 'pairs', 'rows')
NOT_RECORDED = re.compile('.*(seconds|time|commit|per_second).*')           # columns of tables
NORMS = ('grad_norm', 'grad_norm_penalised')
HASHED = re.compile(r'.*\.(bin|mdl|txt|npy|safetensors|tiktoken)|tokenizer\.json|config\.json')
MARKS = ('masked', 'masked and clipped')


@dataclass
class Case:
    """Commands that make some files.

    commands: tuples of a script, its arguments and, where there are several processes, their number. after: names of
    the cases whose files these need. makes: files and folders that are recorded, by default out/NAME. mark: 'masked'
    where gradients of pruned weights enter the logged norms; 'masked and clipped' where they enter the step, too.
    """
    name: str
    commands: list
    after: tuple = ()
    makes: tuple = ()
    mark: str = ''

    def __post_init__(self):
        self.makes = self.makes or (f'out/{self.name}',)


# --- data ---

BYTES = ('data_bytes',)


def prepare(name, script, *flags, after=(), makes=()):
    """Make a data set, called as the case is without data_."""
    short = name.removeprefix('data_')
    return Case(name, [(script, *flags)], after, makes or (f'data/{short}',))


ROWS_OF_RECORDS = ('--source=sources/records.jsonl', '--types=url,timestamp,title,html', '--tokenizer=byte',
                   '--block_size=64', '--val_fraction=0.2', '--test_fraction=0.1', '--pair_documents=20',
                   '--num_proc=1')
DATA = [
    prepare('data_sample', 'prepare_sample'),
    prepare('data_bytes', 'prepare_text', '--name=bytes', '--source=sources/train.txt', '--val_source=sources/val.txt',
            '--test_source=sources/test.txt'),
    prepare('data_other', 'prepare_text', '--name=other', '--source=sources/other.txt', '--val_source=sources/val.txt',
            '--test_source=sources/test.txt', '--max_bytes=6000'),
    prepare('data_cut', 'prepare_text', '--name=cut', '--source=sources/texts.jsonl', '--val_fraction=0.1',
            '--test_fraction=0.1', '--clean_lines'),
    prepare('data_tail', 'prepare_text', '--name=tail', '--source=sources/train.txt', '--val_fraction=0.1',
            '--test_fraction=0.1'),
    prepare('data_tokenizer', 'train_tokenizer', '--name=bpe', '--source=sources/train.txt', '--vocab_size=400',
            makes=('data/tokenizers/bpe',)),
    prepare('data_bpe', 'prepare_text', '--name=bpe', '--source=sources/texts.jsonl', '--tokenizer=bpe',
            '--val_fraction=0.1', '--test_fraction=0.1', '--num_proc=1', after=('data_tokenizer',)),
    prepare('data_rows', 'prepare_text', '--name=rows', '--source=sources/texts.jsonl', '--rows=32',
            '--val_fraction=0.05', '--test_fraction=0.05'),
    prepare('data_rows_bpe', 'prepare_text', '--name=rows_bpe', '--source=sources/texts.jsonl', '--rows=32',
            '--truncate', '--tokenizer=bpe', '--val_fraction=0.05', '--test_fraction=0.05', '--num_proc=1',
            after=('data_tokenizer',)),
    prepare('data_pile', 'prepare_pile', '--subsets=pubmed,uspto', '--source=sources/pile.jsonl', '--tokenizer=byte',
            '--val_fraction=0.1', '--test_fraction=0.1', '--num_proc=1', makes=('data/pubmed', 'data/uspto')),
    prepare('data_meta', 'prepare_metadata', '--name=meta', *ROWS_OF_RECORDS),
    prepare('data_meta_none', 'prepare_metadata', '--name=meta_none', '--control=none', '--passes=2',
            *ROWS_OF_RECORDS),
    prepare('data_meta_same', 'prepare_metadata', '--name=meta_same', '--control=samecontext', *ROWS_OF_RECORDS),
    prepare('data_meta_bpe', 'prepare_metadata', '--name=meta_bpe', *ROWS_OF_RECORDS, '--tokenizer=bpe',
            after=('data_tokenizer',)),
    prepare('data_wiki40b_en', 'prepare_wiki40b', '--tfds_dir=sources/tfds'),
]

# --- training ---

TINY = ('--device=cpu', '--dtype=float32', '--n_layer=2', '--n_embd=16', '--n_head=2', '--block_size=32',
        '--batch_size=4', '--learning_rate=3e-3', '--log_interval=20', '--checkpoint_time=0', '--max_runtime=0',
        '--eval_blocks=8')
STEPS = ('--max_iters=60',)
PRUNED = ('--epochs_prelude=1', '--stop_epoch_at_batch_prelude=15', '--epochs=2', '--stop_epoch_at_batch=15',
          '--epochs_fine_tuning=1', '--stop_epoch_at_batch_fine_tuning=15', '--do_pruning', '--first_pruning_after=1',
          '--tolerated_relative_loss_increase=0.02')
PMMP = ('--procedure=pmmp', '--alpha=1e-3', '--procedure_learning_rate=0.04')
MIXER = ('--block_type=mixer', '--positions=none')
AUTOENCODER = ('--wrapper=autoencoder', '--objective=autoencode', '--block_size=8')
MEMORY = ('--wrapper=memory', '--chunk_size=8', '--positions=none')
GRID = ('--qat_bits=4', '--qat_rows=8', '--epochs=1', '--stop_epoch_at_batch=30', '--epochs_fine_tuning=1',
        '--stop_epoch_at_batch_fine_tuning=30')


def train(name, *flags, after=BYTES, dataset='bytes', ranks=1, mark='', steps=()):
    """Train a tiny model; out/NAME. Later flags win; steps: the command's length where flags do not say it."""
    command = 'train', *TINY, '--final_train_blocks=8', f'--dataset={dataset}', f'--out_dir=out/{name}', *steps, *flags
    return Case(name, [(*command, ranks)], after, mark=mark)


def steps(name, *flags, **more):
    """Train for 60 steps in one phase."""
    return train(name, *flags, steps=STEPS, **more)


def pruned(name, *flags, mark='masked', **more):
    """Train for 60 steps in three phases, with prunings after steps 30 and 45."""
    return train(name, *flags, steps=PRUNED, mark=mark, **more)


PROCEDURES = [
    pruned('train_vanilla'),
    pruned('train_rl1', '--procedure=rl1', '--alpha=1e-3'),
    pruned('train_drr', '--procedure=drr', '--alpha=1e-3'),
    pruned('train_pmmp', *PMMP),
    pruned('train_pmmp_start', *PMMP, '--initial_p_value=0.7', '--initial_u_value=0.1'),
    pruned('train_pmmp_lean', *PMMP, '--pmmp_state=lean'),
    pruned('train_pmmp_gamma', *PMMP, '--prune_by=gamma', '--regularise=all'),
    pruned('train_pmmp_lean_gamma', *PMMP, '--prune_by=gamma', '--pmmp_state=lean', '--first_pruning_after=0'),
    pruned('train_rl1_all_decay', '--procedure=rl1', '--alpha=1e-3', '--regularise=all', '--weight_decay=0.1'),
    pruned('train_drr_chunks', '--procedure=drr', '--alpha=1e-3', '--steps_per_chunk=2', '--regularise=all',
           '--stop_epoch_at_batch_prelude=8', '--stop_epoch_at_batch=8', '--stop_epoch_at_batch_fine_tuning=8'),
    pruned('train_dropout_accumulated', '--procedure=drr', '--alpha=1e-3', '--dropout=0.1', '--micro_batch_size=2'),
    pruned('train_rl1_clipped', '--procedure=rl1', '--alpha=1e-3', '--grad_clip=0.5', mark='masked and clipped'),
    pruned('train_pmmp_clipped', *PMMP, '--grad_clip=0.5', mark='masked and clipped'),
    steps('train_drr_dense_clipped', '--procedure=drr', '--alpha=1e-3', '--grad_clip=0.5'),
]
OPTIONS = [
    steps('train_sequential', '--order=sequential', '--train_only_on_leading_tokens=4000'),
    steps('train_permuted', '--order=permuted', '--train_only_on_leading_tokens=4000'),
    steps('train_random', '--order=random', '--eval_interval=25', '--log_every=2'),
    train('train_online', '--online', '--epochs=2', '--train_only_on_leading_tokens=3850'),
    steps('train_cosine', '--schedule=cosine', '--warmup_iters=10', '--weight_decay=0.1', '--beta2=0.95'),
    steps('train_linear', '--schedule=linear', '--warmup_iters=5', '--min_learning_rate_ratio=0.0'),
    steps('train_tied_learned', '--tied', '--positions=learned', '--activation=gelu_tanh'),
    steps('train_rotary', '--positions=rotary', '--qk_norm', '--no-bias'),
    steps('train_modern', '--positions=rotary', '--norm=rmsnorm', '--activation=relu2', '--tied', '--qk_norm',
          '--no-bias'),
    steps('train_recomputed', '--activation_checkpointing', '--dropout=0.1'),
    steps('train_bfloat16', '--dtype=bfloat16'),
    steps('train_best', '--eval_interval=10', '--keep_last=2', '--verify'),
    steps('train_from_pruned', '--init_from=out/train_drr', after=(*BYTES, 'train_drr'), mark='masked'),
    steps('train_muon', '--matrix_optimizer=muon', '--muon_rate_ratio=2', '--weight_decay=0.05'),
    pruned('train_muon_pruned', '--matrix_optimizer=muon', '--procedure=drr', '--alpha=1e-3'),
    train('train_grid', *GRID, '--bits_lambda=1'),
    train('train_grid_muon', *GRID, '--matrix_optimizer=muon', '--positions=rotary', '--norm=rmsnorm', '--tied'),
    pruned('train_grid_pruned', '--procedure=drr', '--alpha=1e-3', '--qat_bits=4', '--qat_rows=8', '--bits_lambda=1'),
]
SETS = [
    steps('train_mixture', '--data_mix=bytes:0.6,other:0.4', after=('data_bytes', 'data_other')),
    train('train_mixture_exhausted', '--data_mix=bytes:0.6,other:0.4', '--stop_when=first_exhausted', '--epochs=1',
          '--order=sequential', after=('data_bytes', 'data_other')),
    steps('train_bpe', '--order=random', dataset='bpe', after=('data_bpe',)),
    steps('train_rows', '--positions=rotary', dataset='rows', after=('data_rows',)),
    steps('train_rows_bpe', '--micro_batch_size=2', dataset='rows_bpe', after=('data_rows_bpe',)),
    steps('train_meta', '--block_size=64', '--positions=rotary', '--eval_interval=30', dataset='meta',
          after=('data_meta',)),
    steps('train_meta_same', '--block_size=64', '--loss_on=text+markup', dataset='meta_same',
          after=('data_meta_same',)),
]
ENCODERS = [
    steps('train_mixer', *MIXER),
    steps('train_mixer_heads', '--block_type=multihead_mixer', '--positions=none', '--no-final_norm'),
    steps('train_mixer_expanded', *MIXER, '--expansion=2'),
    steps('train_mixer_kernel', '--block_type=multihead_mixer', '--positions=learned', '--kernel=3'),
    pruned('train_mixer_pruned', *MIXER, '--procedure=drr', '--alpha=1e-3'),
    steps('train_autoencoder', *AUTOENCODER, '--bottleneck=8'),
    steps('train_autoencoder_unrolled', *AUTOENCODER, *MIXER, '--spread=unroll', '--n_layer_encoder=1'),
    steps('train_oracle', '--wrapper=oracle', '--objective=memory', '--bottleneck=4'),
    steps('train_oracle_added', '--wrapper=oracle', '--objective=memory', '--memory=add'),
    steps('train_oracle_beside', '--wrapper=oracle', '--objective=memory', '--memory=concat'),
    steps('train_oracle_without', '--wrapper=oracle', '--objective=memory', '--memory=none'),
    steps('train_memory', *MEMORY, '--objective=memory'),
    steps('train_memory_mixer', *MEMORY, '--objective=combined', '--block_type=mixer'),
    steps('train_memory_frozen', *MEMORY, '--objective=memory', '--encoder_ckpt=out/train_chunk_encoder',
          '--freeze_encoder', after=(*BYTES, 'train_chunk_encoder')),
    steps('train_chunk_encoder', '--block_size=8', '--positions=none', '--max_iters=20'),
    steps('train_copy', '--objective=copy'),
    steps('train_blank_copy', '--objective=blank_copy'),
    steps('train_combined', '--objective=combined'),
]
RANKS = [
    pruned('ranks_ddp', '--procedure=drr', '--alpha=1e-3', '--micro_batch_size=1', '--dropout=0.1', ranks=2),
    pruned('ranks_ddp_pmmp_muon', *PMMP, '--matrix_optimizer=muon', ranks=2),
    train('ranks_ddp_grid', *GRID, '--bits_lambda=1', ranks=2),
    pruned('ranks_fsdp', *PMMP, '--shard=full', ranks=2),
    pruned('ranks_fsdp_lean', *PMMP, '--pmmp_state=lean', '--shard=full', '--micro_batch_size=1', ranks=2),
    pruned('ranks_fsdp_clipped', '--procedure=rl1', '--alpha=1e-3', '--shard=full', '--grad_clip=0.5', ranks=2,
           mark='masked and clipped'),
    steps('ranks_fsdp_folder', '--shard=full', '--sharded_ckpt', ranks=2),
]


# --- resuming: the second command goes on where the first had finished, in a copy that is marked as paused ---

def resumed(name, longer, *flags, **more):
    """Train in two cases: NAME_begun makes a run, NAME goes on with a copy of its folder and the flags `longer`."""
    begun = train(f'{name}_begun', *flags, **more)
    paused = ('pause', f'out/{begun.name}', f'out/{name}')
    whole = train(name, *flags, *longer, '--init_from=resume', **more)
    return [begun, Case(name, [paused, *whole.commands], (*whole.after, begun.name), mark=whole.mark)]


RESUMED = [
    *resumed('resume_pmmp', ('--max_iters=60',), *PMMP, '--max_iters=35'),
    *resumed('resume_pmmp_lean', ('--max_iters=60',), *PMMP, '--pmmp_state=lean', '--max_iters=35'),
    *resumed('resume_masked', ('--stop_epoch_at_batch_fine_tuning=15',), *PRUNED, '--procedure=drr', '--alpha=1e-3',
             '--stop_epoch_at_batch_fine_tuning=7', mark='masked'),
    *resumed('resume_muon', ('--max_iters=60',), '--matrix_optimizer=muon', '--weight_decay=0.05', '--max_iters=35'),
    *resumed('resume_grid', ('--stop_epoch_at_batch_fine_tuning=30',), *GRID, '--matrix_optimizer=muon',
             '--bits_lambda=1', '--stop_epoch_at_batch_fine_tuning=15'),
    *resumed('resume_mixture', ('--max_iters=60',), '--data_mix=bytes:0.6,other:0.4', '--max_iters=35',
             after=('data_bytes', 'data_other')),
    *resumed('resume_fsdp', ('--max_iters=60',), *PMMP, '--shard=full', '--max_iters=35', ranks=2),
]


# --- distillation, probe, pruning of checkpoints ---

def distilled(name, *flags, teacher='train_teacher', mark='', ranks=1, after=()):
    command = ('distill', *TINY, *STEPS, '--dataset=bytes', f'--teacher=out/{teacher}', f'--out_dir=out/{name}', *flags,
               ranks)
    return Case(name, [command], (*BYTES, teacher, *after), mark=mark)


begun, = [distilled('resume_distill_begun', '--max_iters=35')]
goes_on = distilled('resume_distill', '--max_iters=60', '--init_from=resume', after=('resume_distill_begun',))
goes_on.commands.insert(0, ('pause', 'out/resume_distill_begun', 'out/resume_distill'))
DISTILLED = [
    steps('train_teacher', '--n_layer=4'),
    distilled('distill_all_terms', '--a_hidden=1', '--a_mse=0.1', '--layer_map=0:1,1:3', '--chunk_tokens=16'),
    distilled('distill_learned', '--positions=learned', '--micro_batch_size=2', '--dropout=0.1', '--grad_clip=1'),
    distilled('distill_free_positions', '--positions=learned', '--no-freeze_positions', '--a_cos=0', '--a_ce=1',
              '--n_embd=8'),
    distilled('distill_pruned', '--init_from=out/train_drr', after=('train_drr',), mark='masked'),
    distilled('distill_pruned_clipped', '--init_from=out/train_drr', '--grad_clip=0.5', after=('train_drr',),
              mark='masked and clipped'),
    distilled('distill_ddp', ranks=2),
    begun,
    goes_on,
]


def probed(name, encoder, *flags, script='probe', after=(), ranks=1):
    common = (f'--from_ckpt=out/{encoder}', f'--out_dir=out/{name}', '--device=cpu', '--dtype=float32')
    return Case(name, [(script, *common, *flags, ranks)], (*BYTES, encoder, *after))


DECODER = ('--max_iters=60', '--batch_size=8', '--warmup_iters=5', '--max_rows=40', '--learning_rate=3e-3',
           '--log_interval=20', '--checkpoint_time=0', '--max_runtime=0')
PROBED = [
    probed('probe_autoencoder', 'train_autoencoder_unrolled', *DECODER, '--own_decoder', '--untrained',
           '--block_type=mixer'),
    probed('probe_oracle', 'train_oracle', *DECODER, '--spread=repeat', '--micro_batch_size=4'),
    probed('probe_rotary', 'train_modern', *DECODER, '--positions=rotary', '--n_embd=8', '--order=random'),
    probed('probe_ddp', 'train_memory', *DECODER, ranks=2),
    probed('entropy_memory', 'train_memory', '--max_rows=3', script='entropy'),
    probed('entropy_oracle', 'train_oracle', '--max_rows=2', script='entropy'),
]


def cut(name, source, *flags, after=()):
    command = ('prune', f'--from_ckpt=out/{source}', f'--out_dir=out/{name}', '--device=cpu', '--dtype=float32', *flags)
    return Case(name, [command], (*BYTES, source, *after))


CUT = [
    cut('prune_magnitude', 'train_teacher', '--method=magnitude', '--sparsity=0.7'),
    cut('prune_by_tensor', 'train_modern', '--method=magnitude', '--sparsity=0.6', '--scope=tensor',
        '--drop_unused_rows'),
    cut('prune_tamade', 'train_teacher', '--tolerated_relative_loss_increase=0.05', '--regularise=all'),
    cut('prune_gamma', 'resume_pmmp_begun', '--method=gamma'),
    cut('prune_sweep', 'train_pmmp_gamma', '--method=none', '--drop_unused_rows'),
    cut('prune_mixer', 'train_mixer_expanded', '--method=magnitude', '--sparsity=0.9'),
    train('train_deep', '--n_layer=12', '--n_embd=8', '--max_iters=10'),
    *[cut(f'prune_{strategy}', 'train_deep', f'--strategy={strategy}')
      for strategy in ('3l', '6t', '6b', '3b3t', 'alt', 'distil')],
    cut('prune_sensitivity', 'train_teacher', '--strategy=sensitivity', '--keep_layers=2'),
    cut('prune_layers', 'train_drr', '--layers=1'),
]


# --- numbers, archives, text ---

def scored(name, checkpoints, *flags, after=()):
    paths = ','.join(f'out/{c}' for c in checkpoints)
    command = ('eval', f'--from_ckpt={paths}', f'--out=out/{name}', '--device=cpu', '--dtype=float32',
               '--bootstrap=50', *flags)
    return Case(name, [command], (*BYTES, *checkpoints, *after))


EVERY_METRIC = '--metrics=ce,ppl,bpb,hamming,information,random_tokens'
SCORED = [
    scored('eval_all', ('train_drr', 'train_modern'), EVERY_METRIC, '--description_length', '--split=val,test',
           '--max_tokens=2000'),
    scored('eval_context', ('train_modern',), '--minimal_context_window=20', '--dataset=bytes,other',
           after=('data_other',)),
    scored('eval_stride', ('train_modern',), '--stride=8', '--batch_size=3'),
    scored('eval_skip', ('train_modern',), '--first_token=skip', '--split=train'),
    scored('eval_mixture', ('train_mixture',), '--split=val', after=('data_other',)),
    scored('eval_encoders', ('train_memory', 'train_oracle'), EVERY_METRIC),
    scored('eval_autoencoder', ('train_autoencoder',), EVERY_METRIC),
    scored('eval_bpe', ('train_bpe',), EVERY_METRIC, after=('data_bpe',)),
    scored('eval_rows', ('train_rows',), EVERY_METRIC, after=('data_rows',)),
    scored('eval_pairs', ('train_meta',), '--pairs=meta', after=('data_meta',)),
    scored('eval_folder', ('ranks_fsdp_folder',)),
    scored('eval_hugging_face', ('export',), '--dataset=bytes'),
    scored('eval_archives', ('train_modern',), '--archive=out/pack_modern.mdl', '--online_archives=out/online.mdl',
           after=('pack_modern', 'online')),
    Case('eval_baselines', [('eval', '--dataset=bytes', '--baselines', '--out=out/eval_baselines')], BYTES),
]
TEXT = 'data/bytes/test.bin'
QUIET = ('--no-progress', '--no-verify')


def packed(name, checkpoint, *flags, text=TEXT, after=BYTES):
    archive = f'out/{name}.mdl'
    command = 'compress', 'pack', f'out/{checkpoint}', text, archive, *QUIET, '--sample_rows=16', *flags
    return Case(name, [command], (*after, checkpoint), makes=(archive,))


def unpacked(name, archive):
    command = 'compress', 'unpack', f'out/{archive}.mdl', f'out/{name}.txt', '--no-progress'
    return Case(name, [command], (archive,), makes=(f'out/{name}.txt',))


def learned(name, *flags):
    archive = f'out/{name}.mdl'
    shape = ('--online_n_layer=2', '--online_n_embd=16', '--online_n_head=2', '--online_window=32',
             '--online_block=16', '--online_streams=4')
    command = 'compress', 'online', TEXT, archive, *QUIET, *shape, '--online_updates=2', *flags
    return Case(name, [command], BYTES, makes=(archive,))


ARCHIVES = [
    packed('pack_modern', 'train_modern'),
    packed('pack_pruned', 'train_drr', '--weight_bits=4', '--streams=2', '--keep=8'),
    packed('pack_tied', 'train_tied_learned', '--block_bytes=1000', '--weight_bits=3'),
    packed('pack_mixer', 'train_mixer'),
    packed('pack_mixer_heads', 'train_mixer_heads', '--weight_bits=5'),
    packed('pack_grid', 'train_grid'),
    packed('pack_grid_muon', 'train_grid_muon'),
    packed('pack_bpe', 'train_bpe', '--weight_bits=4', text='sources/val.txt', after=('data_bpe',)),
    learned('online'),
    learned('online_mixer', '--online_block_type=mixer', '--online_dropout=0.1'),
    unpacked('unpack_modern', 'pack_modern'),
    unpacked('unpack_mixer', 'pack_mixer'),
    unpacked('unpack_online', 'online'),
]
SAID = [
    Case('sample_modern', [('sample', '--from_ckpt=out/train_modern', '--prompt=The ', '--max_new_tokens=80',
                            '--num_samples=2', '--top_k=20', '--device=cpu', '--dtype=float32')],
         (*BYTES, 'train_modern'), makes=('said/sample_modern',)),
    Case('export', [('export', 'out/train_tied_learned/ckpt.pt', 'out/export')], (*BYTES, 'train_tied_learned')),
    Case('diversity', [('diversity', '--probe=out/train_teacher', '--dataset=bytes,other', '--out_dir=out/diversity',
                        '--n_batches=3', '--n_sequences=8', '--sequence_length=16', '--head_epochs=2', '--bounds',
                        '--device=cpu')], (*BYTES, 'data_other', 'train_teacher')),
    Case('plan', [('train', *TINY, *PRUNED, *PMMP, '--dataset=bytes', '--check')], BYTES, makes=('said/plan',)),
]
CASES = {case.name: case for cases in (DATA, PROCEDURES, OPTIONS, SETS, ENCODERS, RANKS, RESUMED, DISTILLED, PROBED,
                                       CUT, SCORED, ARCHIVES, SAID) for case in cases}


# --- the texts ---

def write_sources():
    """Write sources/: plain texts, documents, documents with metadata, a shard of The Pile, Wiki-40B in TFDS's form."""
    from pydoc_data.topics import topics
    os.makedirs('sources')
    paragraphs = [p.strip() for topic in sorted(topics) for p in topics[topic].split('\n\n') if len(p.strip()) > 60]
    text = '\n\n'.join(paragraphs).replace('Python', 'Pythön 日本').encode()
    starts = dict(train=(0, 16384), val=(40000, 3000), test=(50000, 2500), other=(60000, 12000))
    for name, (start, size) in starts.items():
        # A cut must not fall inside a character.
        part = text[start:start + size].decode(errors='ignore').encode()
        with open(f'sources/{name}.txt', 'wb') as f:
            f.write(part)
    documents = paragraphs[100:260]
    write_lines('sources/texts.jsonl', [dict(text=d) for d in documents])
    write_lines('sources/records.jsonl', [record_of(i, d[:300]) for i, d in enumerate(documents)])
    subsets = ('PubMed Abstracts', 'USPTO Backgrounds', 'Pile-CC')
    write_lines('sources/pile.jsonl', [dict(text=d, meta=dict(pile_set_name=subsets[i % 3]))
                                       for i, d in enumerate(documents)])
    write_tfds('sources/tfds/wiki40b/en/1.3.0', dict(train=documents[:40], validation=documents[40:50],
                                                     test=documents[50:60]))


def write_lines(path, records):
    with open(path, 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(record) + '\n' for record in records)


def record_of(i, text):
    """Return a document with a title, an address that holds a date, and for every third one tags."""
    record = dict(title=text[:12], url=f'https://docs.org/20{10 + i % 9}/0{1 + i % 8}/15/page_{i % 5}')
    if i % 3:
        return dict(record, text=text)
    return dict(record, html=f'<p class="a">{text[:40]}</p><b>{text[40:60]}</b> <i id="x">{text[60:]}</i>')


def masked_crc(data):
    """Return the masked CRC-32C of TFRecord."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def field(number, data):
    """Return a length-delimited field of a protobuf message."""
    n = len(data)
    size = b''
    while n > 127:
        size += bytes([n & 127 | 128])
        n >>= 7
    return bytes([number << 3 | 2]) + size + bytes([n]) + data


def write_tfds(folder, texts):
    """Write {split: texts} as TensorFlow Datasets writes Wiki-40B: one shard each, and what it says of them."""
    os.makedirs(folder)
    for split, documents in texts.items():
        with open(f'{folder}/wiki40b-{split}.tfrecord-00000-of-00001', 'wb') as f:
            for text in documents:
                value = field(2, field(1, field(1, text.encode())))
                example = field(1, field(1, field(1, b'text') + value))
                length = struct.pack('<Q', len(example))
                f.write(length + struct.pack('<I', masked_crc(length)) + example + bytes(4))
    splits = [dict(name=split, shardLengths=[str(len(documents))], numBytes='1',
                   filepathTemplate='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}')
              for split, documents in texts.items()]
    with open(f'{folder}/dataset_info.json', 'w', encoding='utf-8') as f:
        json.dump(dict(name='wiki40b', version='1.3.0', configName='en', fileFormat='tfrecord', splits=splits), f)


# --- what is recorded ---

def sha(data):
    return hashlib.sha256(data).hexdigest()[:16]


def tensor_hash(tensor):
    """Return type, shape and hash of the bytes of a tensor, as one word."""
    import torch
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    kind = str(tensor.dtype).removeprefix('torch.')
    return f'{kind}{list(tensor.shape)} {sha(raw)}'


def tensors_in(value):
    """Yield all tensors in nested dicts and lists."""
    import torch
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_in(inner)


def facts_of_checkpoint(path):
    """Return the hash of each named tensor, of the unnamed ones by content, and the plain numbers of a checkpoint."""
    import torch
    checkpoint = torch.load(path, weights_only=True)
    found = {}
    for section in ('model', 'decoder', 'masks', 'grid'):
        for name, tensor in checkpoint.get(section, {}).items():
            found[f'{section} {name}'] = tensor_hash(tensor)
    # How these are split into optimisers, and in which order, is not what is compared.
    for section in ('optimizer', 'procedure'):
        found[section] = sorted(map(tensor_hash, tensors_in(checkpoint.get(section, {}))))
    found['model_args'] = json.dumps(checkpoint.get('model_args'), sort_keys=True)
    for name, value in checkpoint.items():
        if isinstance(value, (int, float)) and not NOT_RECORDED.fullmatch(name):
            found[name] = repr(value)
    return found


def facts_of_table(path):
    """Return the columns of a csv file that hold something, but those of the clock."""
    with open(path, newline='', encoding='utf-8') as f:
        rows = list(csv.DictReader(f))
    columns = [] if not rows else [name for name in rows[0] if not NOT_RECORDED.fullmatch(name)]
    table = {name: [row[name] for row in rows] for name in columns}
    return {name: values for name, values in table.items() if any(values)}


def facts_of_json(path):
    """Return what follows from arithmetic in a run.json, and what describes the files in a meta.json."""
    with open(path, encoding='utf-8') as f:
        values = json.load(f)
    if os.path.basename(path) == 'meta.json':
        names = [name for name in META if name in values]
    else:
        names = [name for name in values if FACTS.fullmatch(name)]
    return {name: json.dumps(values[name], sort_keys=True) for name in names}


def facts_of_log(path):
    """Return the lines of validations and prunings, without the time of day."""
    with open(path, encoding='utf-8') as f:
        lines = [line.rstrip('\n').partition(' ')[2] for line in f]
    return {kind: [line for line in lines if line.startswith(f'{kind} ')] for kind in ('val', 'prune', 'pairs')}


def facts_of_file(path):
    """Return what is recorded of a file, {} of one that is not."""
    name = os.path.basename(path)
    if '.sharded/' in path:
        # Which rank writes which piece is not recorded; eval_folder reads them.
        return {}
    if name.endswith('.pt'):
        return facts_of_checkpoint(path)
    if name.endswith('.csv'):
        return facts_of_table(path)
    if name in ('run.json', 'meta.json'):
        return facts_of_json(path)
    if name == 'log.txt':
        return facts_of_log(path)
    if path.startswith('said/'):
        with open(path, encoding='utf-8') as f:
            # The list of knobs is not arithmetic.
            return dict(lines=[line.rstrip() for line in f if not re.match(r'\w+ = ', line)])
    if HASHED.fullmatch(name):
        with open(path, 'rb') as f:
            data = f.read()
        return dict(bytes=len(data), sha256=sha(data))
    return {}


def facts_of_case(case):
    """Return {'path what': value} of all that a case has made; hashes in names of folders are left out."""
    found = {}
    for made in case.makes:
        paths = [made] if os.path.isfile(made) else sorted(
            os.path.join(where, name) for where, _, names in os.walk(made) for name in names)
        for path in paths:
            label = re.sub('-[0-9a-f]{6,}/', '-HASH/', path)
            found.update({f'{label} {what}': value for what, value in facts_of_file(path).items()})
    return found or dict(failed='it made no files')


# --- running ---

def place_of(repo, script):
    """Return where a script is in a checkout, and the arguments that go before a case's."""
    for place, *before in SCRIPTS.get(script, [(f'{script}.py',)]):
        if os.path.exists(os.path.join(repo, place)):
            return place, before
    raise FileNotFoundError(f'no {script} in {repo}; add its new place to SCRIPTS')


def module_of(place):
    return place.removesuffix('.py').replace('/', '.')


def run_fresh(repo, place, arguments, ranks, output):
    """Run a script as its user would, in a new interpreter or under torchrun; returns the exit code."""
    target = ['-m', module_of(place)] if os.path.dirname(place) else [os.path.join(repo, place)]
    several = [] if ranks == 1 else ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    environment = dict(os.environ, PYTHONPATH=repo, PYTHONPYCACHEPREFIX=os.path.abspath('pycache'))
    command = [sys.executable, *several, *target, *arguments]
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=output[0], stderr=output[1],
                          check=False).returncode


def run_warm(repo, place, arguments, ranks, output):
    """Run a script in forks of this process, which has torch loaded: 1 s and not 8; returns the worst exit code."""
    import matplotlib.pyplot  # noqa: F401
    import torch._dynamo  # noqa: F401
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    sys.stdout.flush()
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            become(repo, place, arguments, output, {} if ranks == 1 else as_torchrun(rank, ranks, port))
        children.append(child)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


def as_torchrun(rank, ranks, port):
    """Return the variables by which torchrun tells a process which of several it is."""
    return dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))


def become(repo, place, arguments, output, variables):
    """Turn this process into a run of a script. It never returns: what called it belongs to the parent."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output[0].fileno(), 1)
        os.dup2(output[1].fileno(), 2)
        os.environ.update(variables, PYTHONPATH=repo)
        sys.path[0] = repo
        sys.pycache_prefix = os.path.abspath('pycache')
        sys.argv = [os.path.join(repo, place), *arguments]
        if os.path.dirname(place):
            runpy.run_module(module_of(place), run_name='__main__', alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name='__main__')
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def copy_as_paused(folder, copy):
    """Copy a finished run and let its run.json say that it was interrupted there."""
    shutil.copytree(folder, copy)
    with open(f'{copy}/run.json', encoding='utf-8') as f:
        values = json.load(f)
    with open(f'{copy}/run.json', 'w', encoding='utf-8') as f:
        json.dump(dict(values, status='paused'), f)


def run_case(case, repo, fresh):
    """Run the commands of a case in the working folder; returns what it made, or {'failed': why}."""
    os.makedirs(f'said/{case.name}', exist_ok=True)
    for script, *arguments in case.commands:
        if script == 'pause':
            copy_as_paused(*arguments)
            continue
        ranks = arguments.pop() if arguments and isinstance(arguments[-1], int) else 1
        try:
            place, before = place_of(repo, script)
        except FileNotFoundError as e:
            return dict(failed=str(e))
        arguments = [*before, *arguments]
        errors = f'errors_{case.name}.txt'
        with open(f'said/{case.name}/output', 'ab') as out, open(errors, 'wb') as err:
            if fresh or script.startswith(('prepare_', 'train_tokenizer')):
                code = run_fresh(repo, place, arguments, ranks, (out, err))
            else:
                code = run_warm(repo, place, arguments, ranks, (out, err))
        if code:
            return dict(failed=f'{script}: exit code {code}: {reason_in(errors)}')
    return facts_of_case(case)


def reason_in(path):
    """Return the line of a file of errors that says why: the last error, or the last line."""
    with open(path, encoding='utf-8', errors='replace') as f:
        lines = [line.strip() for line in f if line.strip()] or ['no output']
    errors = [line for line in lines if line.startswith('error: ') or re.match(r'\w*Error', line)]
    return (errors or lines)[-1][:300]


def with_needs(names):
    """Return names and all that they need, each after what it needs."""
    ordered = []

    def add(name):
        for needed in CASES[name].after:
            add(needed)
        if name not in ordered:
            ordered.append(name)
    for name in names:
        add(name)
    return ordered


def run_all(names, repo, inputs, fresh, report):
    """Run cases, and before them what they need; inputs: the checkout that makes those which were not asked for.

    report(name, facts, seconds) is called after each case that was asked for.
    """
    write_sources()
    failed = set()
    for name in with_needs(names):
        case = CASES[name]
        began = time.time()
        missing = [needed for needed in case.after if needed in failed]
        facts = run_case(case, repo if name in names else inputs, fresh)
        if missing:
            facts = dict(failed=f'it needs {missing[0]}, which failed')
        if 'failed' in facts:
            failed.add(name)
        if name in names:
            report(name, facts, time.time() - began)
        elif name in failed:
            print(f'{name}: needed, FAILED: {facts["failed"]}', flush=True)


# --- comparing ---

def differences(old, new):
    """Return {'path what': words} of what differs; what only the new one has is no difference."""
    found = {}
    for key, value in old.items():
        if key not in new:
            found[key] = 'is missing'
        elif new[key] != value:
            found[key] = difference(value, new[key])
    if 'failed' in new and 'failed' not in old:
        found['failed'] = new['failed']
    return found


def difference(old, new):
    """Say in words how two values differ: of lists, the first place where they do."""
    if not isinstance(old, list) or not isinstance(new, list):
        return f'was {old}, is {new}'
    places = [i for i, pair in enumerate(zip(old, new)) if pair[0] != pair[1]]
    if not places:
        return f'had {len(old)} entries, has {len(new)}'
    first = places[0]
    return f'{len(places)} of {len(old)} differ, first at {first}: was {old[first]}, is {new[first]}'


def is_meant(key, mark, changed):
    """Say whether a difference is what --changed announces."""
    if not mark or not changed:
        return False
    if mark == 'masked and clipped':
        return changed in MARKS
    return key.split(' ')[-1] in NORMS


def machine():
    import torch
    with open('/proc/cpuinfo', encoding='utf-8') as f:
        models = [line.split(':')[1].strip() for line in f if line.startswith('model name')]
    return dict(python=platform.python_version(), torch=str(torch.__version__), processor=(models or ['unknown'])[0])


def record(path, names, repo, inputs, fresh):
    """Run cases and write what they make; cases of an earlier file that were not run now stay."""
    golden = dict(machine=machine(), cases={}, seconds={})
    if os.path.exists(path):
        with open(path, encoding='utf-8') as f:
            golden = dict(json.load(f), machine=machine())
    failures = []

    def report(name, facts, seconds):
        golden['cases'][name] = facts
        golden['seconds'][name] = round(seconds, 1)
        if 'failed' in facts:
            failures.append(name)
        print(f'{name}: {facts.get("failed") or f"{len(facts)} facts"}, {seconds:.1f} s', flush=True)
        with open(path, 'w', encoding='utf-8') as f:
            json.dump(golden, f, indent=1, sort_keys=True)
    run_all(names, repo, inputs, fresh, report)
    print(f'{path}: {len(names) - len(failures)} cases recorded; failed: {", ".join(failures) or "none"}')
    return bool(failures)


def compare(path, names, repo, inputs, fresh, changed):
    """Run cases and say what differs from the file; returns 1 where a difference was not announced, else 0."""
    with open(path, encoding='utf-8') as f:
        golden = json.load(f)
    if golden['machine'] != machine():
        print(f'warning: recorded on {golden["machine"]}, this is {machine()}: last bits may differ')
    names = [name for name in names if name in golden['cases']]
    faulty = []

    def report(name, facts, seconds):
        mark = CASES[name].mark
        found = differences(golden['cases'][name], facts)
        faults = {key: words for key, words in found.items() if not is_meant(key, mark, changed)}
        verdict = 'same'
        if found:
            verdict = f'{len(found)} of {len(golden["cases"][name])} facts differ, {len(faults)} of them unannounced'
        print(f'{name}: {verdict}{f" ({mark})" if mark and found else ""}, {seconds:.1f} s', flush=True)
        shown = sorted((faults or found).items(), key=lambda item: 'loss_nats' not in item[0])
        for key, words in shown[:8]:
            print(f'    {key}: {words}', flush=True)
        if faults:
            faulty.append(name)
    run_all(names, repo, inputs, fresh, report)
    print(f'{len(names)} cases, {len(faulty)} differ: {", ".join(faulty) or "none"}')
    return bool(faulty)


def selected(only):
    """Return the names of the cases that a list of patterns, by commas, names; '' is all."""
    patterns = [pattern.strip() for pattern in only.split(',') if pattern.strip()]
    for pattern in patterns:
        if not fnmatch.filter(CASES, pattern):
            raise SystemExit(f'error: --only={only}: no case is called {pattern}; see python tests/golden.py list')
    return [name for name in CASES if not patterns or any(fnmatch.fnmatch(name, p) for p in patterns)]


def main(argv):
    flags = dict(repo='', only='', inputs='', work='', changed='', fresh='')
    words = [word for word in argv if not word.startswith('--')]
    for word in argv:
        name, equals, value = word[2:].partition('=')
        if word.startswith('--') and name not in flags:
            raise SystemExit(f'error: unknown flag {word}\n{__doc__}')
        if word.startswith('--'):
            flags[name] = value if equals else 'yes'
    if words == ['list']:
        for name in selected(flags['only']):
            case = CASES[name]
            print(f'{name:28} {case.mark:20} {", ".join(case.after)}')
        return 0
    if len(words) != 2 or words[0] not in ('record', 'compare') or not os.path.isdir(flags['repo']):
        raise SystemExit(__doc__)
    if flags['changed'] and flags['changed'] not in MARKS:
        raise SystemExit(f"error: --changed={flags['changed']}, expected one of {', '.join(MARKS)}")
    names = selected(flags['only'])
    path = os.path.abspath(words[1])
    repo = os.path.abspath(flags['repo'])
    inputs = os.path.abspath(flags['inputs'] or repo)
    work = os.path.abspath(flags['work'] or tempfile.mkdtemp(prefix='golden-'))
    os.makedirs(work, exist_ok=True)
    os.chdir(work)
    try:
        if words[0] == 'record':
            return record(path, names, repo, inputs, flags['fresh'])
        return compare(path, names, repo, inputs, flags['fresh'], flags['changed'])
    finally:
        if not flags['work']:
            os.chdir('/')
            shutil.rmtree(work)


if __name__ == '__main__':
    # What must be set before an interpreter starts: begin again with it.
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], dict(os.environ, **ENVIRONMENT))
    raise SystemExit(main(sys.argv[1:]))
