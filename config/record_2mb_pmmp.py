# python train.py config/record_2mb_base.py config/record_2mb_pmmp.py
# about 2 CPU-minutes on one core (measured: 115 to 130 s), packing 2. Needs: record_2mb_base.py
# Sparse arm: pmmp, one pruning, fine-tuning under the mask; compress.py pack chooses the bits of what is left.
out_dir = 'out/record_2mb_pmmp'
init_from = 'out/record_2mb_base'
procedure = 'pmmp'
epochs = 0.5
epochs_fine_tuning = 0.5       # together as many bytes as record_2mb_dense.py
do_pruning = True
matrix_optimizer = 'adamw'      # an orthogonalised step may drown pulls on single weights (not measured)
learning_rate = 1.6e-3          # where the base ends
warmup_iters = 20
min_learning_rate_ratio = 0.02
procedure_learning_rate = 2e-3  # γ needs about 1/rate steps from 1 to 0, and the main phase has 977
alpha = 2e-3                    # 2e-2 left 12 % of the weights and 2.9 bits per byte
