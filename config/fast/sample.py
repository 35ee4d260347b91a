# python train.py config/fast/sample_base.py config/fast/sample.py
# about 20 seconds on one CPU core, of which scoring 200,000 bytes takes 5
# What the ablations left: 200 smaller steps, Muon for the matrices, QK-norm.
out_dir = 'out/fast_sample'
block_size = 256
batch_size = 2
matrix_optimizer = 'muon'
learning_rate = 4e-3
warmup_iters = 20
qk_norm = True
