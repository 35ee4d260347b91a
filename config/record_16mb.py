# python train.py config/record_16mb_base.py config/record_16mb_drr.py config/record_16mb.py
# about 10 minutes on one H200-class GPU (estimated: 1.1e16 FLOPs at 20 TFLOP/s; not run). Needs: record_16mb_base.py
# The winner of the duel with more fine-tuning: DRR, one pruning, 25 epochs under the mask through 5-bit weights.
# Then: python compress.py pack out/record_16mb data/wiki16mb/train.bin wiki16mb.mdl
out_dir = 'out/record_16mb'
epochs_fine_tuning = 25.0
qat_bits = 5.0                  # per weight that is left
bits_lambda = 2.0
