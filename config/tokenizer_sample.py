# python train_tokenizer.py config/tokenizer_sample.py
# about a second on one CPU core (measured on as much English text)
# Needs: python prepare_sample.py; then python prepare_text.py --name=sample1k --tokenizer=sample1k
#     --source=data/sample/train.bin --val_source=data/sample/val.bin --test_source=data/sample/test.bin
# A byte-level BPE of 1,000 ids from the sample's training text: for models that train on two cores.
name = 'sample1k'
source = 'data/sample/train.bin'
vocab_size = 1000
held_out_every = 0              # all of it is learned from: 0.4 MB is little, and val.bin stands apart
