# torchrun --nproc_per_node=8 train.py config/mixers/memory_4x256.py --init_from=out/memory_copy_4x256
# about 2 h on 8 H100 at 40 % of their bf16 rate (estimated: 26 B tokens of 0.88 GFLOP; not run).
# Needs: python prepare_text.py config/data/fineweb.py
# 4 chunks of 256 tokens, each earlier chunk one vector. The first part of the curriculum is copying: the second two
# chunks repeat the first two, which only the memory can know (about 30 min, estimated: 6.6 B tokens):
#     torchrun --nproc_per_node=8 train.py config/mixers/memory_4x256.py --objective=copy --max_iters=50000 \
#         --out_dir=out/memory_copy_4x256
# Controls: --memory=none; an autoencoder's encoder, --encoder_ckpt=RUN --freeze_encoder (block_size = 256 there).
out_dir = 'out/memory_mixer_4x256'
wrapper = 'memory'
objective = 'memory'
chunk_size = 256
dataset = 'fineweb8k'
n_layer = 8
n_head = 1
n_embd = 1024
block_size = 1024
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
