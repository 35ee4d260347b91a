# python train.py config/record_16mb_base.py config/record_16mb_dense.py
# about 3 minutes on one H200-class GPU (estimated: 3.8e15 FLOPs at 20 TFLOP/s; not run). Needs: record_16mb_base.py
# Dense arm: 10 epochs through 3-bit weights with a penalty on bits; compress.py pack writes them.
out_dir = 'out/record_16mb_dense'
init_from = 'out/record_16mb_base'
epochs = 0.0
epochs_fine_tuning = 10.0
qat_bits = 3.0
bits_lambda = 8.0               # 1 would be the price; a run this short needs more pull to arrive anywhere (LOG)
matrix_optimizer = 'adamw'      # an orthogonalised step may drown pulls on single weights (not measured)
learning_rate = 8e-4            # where the base ends
warmup_iters = 20
min_learning_rate_ratio = 0.02
