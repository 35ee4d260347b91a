# python probe.py config/probe_sample_128.py --from_ckpt=out/gpt_sample_128,out/mixer_autoencoder_sample_128
# COST about 2 minutes on one CPU core for each encoder (0.23 s a step measured beside other work).
# Needs: the encoders, and wiki2mb: python prepare_text.py --name=wiki2mb --source=FILE of 2 MB. --untrained adds the
# control. 2 M bytes of training show a gap, not how much a vector can hold: config/probe_512.py.
out_dir = 'out/probe_sample_128'
dataset = 'wiki2mb'
block_size = 128
block_type = 'mixer'            # of the decoder, whatever the encoder is
n_layer = 4
n_embd = 64
spread = 'unroll'
max_iters = 500
batch_size = 32
learning_rate = 3e-3
warmup_iters = 50
schedule = 'linear'
