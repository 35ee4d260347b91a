# torchrun --nproc_per_node=8 -m lab.probe config/mixers/probe_512.py --from_ckpt=out/mixer_fineweb_512
# about 5 hours on 8 H100-class GPUs for each encoder (estimated: 5.2e18 FLOPs at 8 x 40 TFLOP/s; not run).
# Needs: python prepare_text.py config/data/fineweb.py
# and the encoders; --untrained adds the control. Settings of arXiv 2409.01482 and 2602.13466: 512 tokens, 200,000 steps
# of 128 rows, linear decay. Published there: an autoencoder's own encoder CE 0.435, accuracy .77; causal language
# models as encoders about .05.
out_dir = 'out/probe_512'
dataset = 'fineweb8k'
block_size = 512
block_type = 'multihead_mixer'  # of the decoder, whatever the encoder is
n_layer = 16
n_embd = 512
n_head = 4
spread = 'unroll'
max_iters = 200_000
batch_size = 128
learning_rate = 5e-4            # with an attention decoder 2e-4
warmup_iters = 500
schedule = 'linear'
min_learning_rate_ratio = 0.0
dtype = 'bfloat16'              # fp16 explodes in multi-head autoencoders
log_every = 10
log_interval = 500
checkpoint_time = 3600.0
