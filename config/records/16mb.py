# python train.py config/records/16mb_base.py config/records/16mb.py
# about 10 minutes on one H200-class GPU (estimated: 1.1e16 FLOPs at 20 TFLOP/s; not run).
# Needs: python train.py config/records/16mb_base.py
# The winner of the duel of 2 MB, at 16: DRR, one pruning, 25 epochs under the mask through 5-bit weights.
# Then: python compress.py pack out/record_16mb data/wiki16mb/train.bin wiki16mb.mdl
out_dir = 'out/record_16mb'
init_from = 'out/record_16mb_base'
procedure = 'drr'
alpha = 4e-5
epochs = 5.0
epochs_fine_tuning = 25.0
do_pruning = True
qat_bits = 5.0                  # per weight that is left
bits_lambda = 2.0
matrix_optimizer = 'adamw'      # an orthogonalised step may drown pulls on single weights (not measured)
learning_rate = 8e-4            # where the base ends
warmup_iters = 20
min_learning_rate_ratio = 0.02
