# python train.py config/fast/sample_seed.py
# about 6 minutes on one CPU core
# Needs: python prepare_text.py --name=wiki1mb --source=FILE --max_bytes=1000000 --val_source=OTHER --test_source=THIRD
# The published recipe (wiki_16mb_vanilla.py) with its epochs divided by 450, on the leading 1,000,000 bytes: the
# reference that sample.py is to beat with a tenth of the bytes.
out_dir = 'out/fast_sample_seed'
dataset = 'wiki1mb'
model = 'transformer800k'
epochs_prelude = 150 / 450
epochs = 200 / 450
epochs_fine_tuning = 100 / 450
batch_size = 8
learning_rate = 1e-5
final_train_blocks = -1
