# torchrun --nproc_per_node=8 train.py config/mixers/autoencoder_512.py
# about 1 h on 8 H100 at 40 % of their bf16 rate (estimated: 13.1 B tokens of 0.90 GFLOP; not run).
# Needs: python prepare_text.py config/data/fineweb.py
# 512 tokens through one vector of 1,024 numbers: 8 encoder and 8 decoder blocks. --shard=full where it does not fit.
out_dir = 'out/mixer_autoencoder_512'
wrapper = 'autoencoder'
objective = 'autoencode'
spread = 'unroll'
dataset = 'fineweb8k'
n_layer = 8
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
