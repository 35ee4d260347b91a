# python probe.py config/probe_sample_128.py --from_ckpt=out/gpt_sample_128,out/mixer_autoencoder_sample_128
# COST about 2 minutes on one CPU core for each encoder (0.14 s a step measured beside other work).
# Needs: the two encoders of config/. What they are at 500 steps, an autoencoder of 128 bytes has not yet learnt more
# than how often bytes occur (3.2 nats, accuracy .15): train it longer, or see probe_sample_16.py.
out_dir = 'out/probe_sample_128'
dataset = 'wiki2mb'
block_size = 128
block_type = 'mixer'            # of the decoder, whatever the encoder is
n_layer = 4
n_embd = 64
spread = 'unroll'
max_iters = 800
batch_size = 32
learning_rate = 3e-3
warmup_iters = 50
schedule = 'linear'
