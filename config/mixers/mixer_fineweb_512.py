# torchrun --nproc_per_node=8 train.py config/mixers/mixer_fineweb_512.py
# about 1 h on 8 H100 at 40 % of their bf16 rate (estimated: 13.1 B tokens of 0.90 GFLOP; not run).
# Needs: python prepare_text.py config/data/fineweb.py
# Published settings of arXiv 2409.01482's masked mixer: flat, kernel 1, own 8,000-token BPE.
out_dir = 'out/mixer_fineweb_512'
dataset = 'fineweb8k'
n_layer = 16
n_head = 1
n_embd = 1024
block_size = 512
positions = 'none'
final_norm = False
block_type = 'mixer'
batch_size = 128
max_iters = 200_000
learning_rate = 5e-4
schedule = 'linear'
min_learning_rate_ratio = 0.0
warmup_iters = 500
dtype = 'bfloat16'              # float16 explodes in multi-head autoencoders, as published
eval_interval = 5_000
eval_blocks = 1_000
final_train_blocks = 1_000
