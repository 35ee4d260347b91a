# python train.py config/records/2mb_base.py config/records/2mb_dense.py
# about 2 CPU-minutes on one core (measured: 115 to 130 s), packing 2.
# Needs: python train.py config/records/2mb_base.py
# Dense arm: one epoch through 3-bit weights with a penalty on bits; compress.py pack writes them.
out_dir = 'out/record_2mb_dense'
init_from = 'out/record_2mb_base'
epochs = 0.0
epochs_fine_tuning = 1.0
qat_bits = 3.0
bits_lambda = 8.0               # 1 would be the price; a run this short needs more pull to arrive anywhere (LOG)
matrix_optimizer = 'adamw'      # an orthogonalised step may drown pulls on single weights (not measured)
learning_rate = 1.6e-3          # where the base ends
warmup_iters = 20
min_learning_rate_ratio = 0.02
