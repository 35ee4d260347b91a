# python probe.py config/probe_sample_16.py --from_ckpt=out/gpt_16,out/autoencoder_16 --untrained --own_decoder
# COST about 15 s on one CPU core for each decoder (measured beside other work).
# Needs two encoders, half a minute and a minute:
#        python train.py config/gpt_sample_128.py --block_size=16 --batch_size=64 --out_dir=out/gpt_16
#        python train.py config/mixer_autoencoder_sample_128.py --block_size=16 --batch_size=64 --final_norm
#                        --out_dir=out/autoencoder_16
# 16 bytes in 64 numbers: short enough for an autoencoder to learn in half a million bytes, and so for the gap to show.
out_dir = 'out/probe_sample_16'
dataset = 'wiki2mb'
block_size = 16
block_type = 'mixer'            # of the decoder, whatever the encoder is
n_layer = 4
n_embd = 64
spread = 'unroll'
max_iters = 400
batch_size = 64
learning_rate = 3e-3
warmup_iters = 50
schedule = 'linear'
