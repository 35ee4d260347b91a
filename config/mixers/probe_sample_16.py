# python -m lab.probe config/mixers/probe_sample_16.py --from_ckpt=out/gpt_16,out/mixer_autoencoder_sample_16 \
#     --own_decoder
# about a minute on one CPU core for each decoder (measured beside other work).
# Needs: python train.py config/mixers/autoencoder_sample_16.py
# Needs: python train.py config/mixers/gpt_sample.py --block_size=16 --batch_size=64 --max_iters=2000 \
#     --out_dir=out/gpt_16
# --untrained adds the control. 16 bytes in 64 numbers: short enough for an autoencoder to learn from 2 M bytes.
out_dir = 'out/probe_sample_16'
dataset = 'wiki2mb'
block_size = 16
block_type = 'mixer'            # of the decoder, whatever the encoder is
n_layer = 4
n_embd = 64
spread = 'unroll'
max_iters = 1000
batch_size = 64
learning_rate = 3e-3
warmup_iters = 50
schedule = 'linear'
