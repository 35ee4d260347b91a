# python train.py config/record_16mb_base.py config/record_16mb_rl1.py
# about 3 minutes on one H200-class GPU (estimated: 3.8e15 FLOPs at 20 TFLOP/s; not run). Needs: record_16mb_base.py
# Sparse arm: rl1, one pruning, fine-tuning under the mask; compress.py pack chooses the bits of what is left.
out_dir = 'out/record_16mb_rl1'
init_from = 'out/record_16mb_base'
procedure = 'rl1'
epochs = 5.0
epochs_fine_tuning = 5.0       # together as many bytes as record_16mb_dense.py
do_pruning = True
matrix_optimizer = 'adamw'      # an orthogonalised step may drown pulls on single weights (not measured)
learning_rate = 8e-4            # where the base ends
warmup_iters = 20
min_learning_rate_ratio = 0.02
alpha = 1e-4
