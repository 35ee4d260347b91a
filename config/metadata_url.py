# torchrun --nproc_per_node=8 train.py config/metadata_url.py
# COST about 4.6 hours on 8 H100-class GPUs (estimated: 2.2e19 FLOPs at 8 x 170 TFLOP/s; not run).
# Needs: python prepare_metadata.py --source='shards/*.jsonl.gz' --types=url
#        --name=c4meta_url
# then: python eval.py --from_ckpt=out/metadata_url --pairs=c4meta
# GPT-2 on documents with metadata, settings of BigScience's modeling-metadata.
# Here: the address alone.
out_dir = 'out/metadata_url'
dataset = 'c4meta_url'
model = 'gpt2'
positions = 'learned'           # these three make it a GPT-2
activation = 'gelu_tanh'
tied = True
max_iters = 100_000
batch_size = 256                # rows of 1,024 tokens
micro_batch_size = 16
learning_rate = 1e-4
schedule = 'linear'             # and its end at 0 are not stated by the source
warmup_iters = 6000
min_learning_rate_ratio = 0.0
beta2 = 0.98
adam_epsilon = 1e-6
weight_decay = 0.01
seed = 42
eval_interval = 2000
eval_blocks = 1000
final_train_blocks = 1000
checkpoint_time = 1800.0
