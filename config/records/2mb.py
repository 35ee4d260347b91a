# python train.py config/records/2mb_base.py config/records/2mb_sparse.py config/records/2mb.py
# about 6 CPU-minutes on one core (measured: 327 s), packing 2 and unpacking 4.
# Needs: python train.py config/records/2mb_base.py
# The winner of the duel with more fine-tuning: DRR, one pruning, 2.5 epochs under the mask through 5-bit weights.
# Then: python compress.py pack out/record_2mb data/wiki2mb/train.bin wiki2mb.mdl
out_dir = 'out/record_2mb'
epochs_fine_tuning = 2.5
qat_bits = 5.0                  # per weight that is left
bits_lambda = 2.0
