# python train.py config/records/2mb_base.py config/records/2mb_sparse.py
# about 2 CPU-minutes on one core (measured: 115 to 130 s), packing 2.
# Needs: python train.py config/records/2mb_base.py
# Sparse arms: a procedure, one pruning, fine-tuning under the mask; compress.py pack chooses the bits of what is left,
# or --qat_bits=5 --bits_lambda=1 trains them: the smallest archive of the duel (LOG). As it stands drr; pmmp and rl1:
#     python train.py config/records/2mb_base.py config/records/2mb_sparse.py --procedure=pmmp --alpha=2e-3 \
#         --procedure_learning_rate=2e-3 --out_dir=out/record_2mb_pmmp
#     python train.py config/records/2mb_base.py config/records/2mb_sparse.py --procedure=rl1 --alpha=1e-4 \
#         --out_dir=out/record_2mb_rl1
# γ needs about 1/procedure_learning_rate steps from 1 to 0, and the main phase has 977. pmmp's alpha of 2e-2 left 12 %
# of the weights and 2.9 bits per byte.
out_dir = 'out/record_2mb_drr'
init_from = 'out/record_2mb_base'
procedure = 'drr'
epochs = 0.5
epochs_fine_tuning = 0.5        # together as many bytes as 2mb_dense.py
do_pruning = True
matrix_optimizer = 'adamw'      # an orthogonalised step may drown pulls on single weights (not measured)
learning_rate = 1.6e-3          # where the base ends
warmup_iters = 20
min_learning_rate_ratio = 0.02
alpha = 4e-5
