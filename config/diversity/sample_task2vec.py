# python -m lab.diversity config/diversity/sample_task2vec.py
# about 2 minutes on one CPU core.
# Needs: python train.py config/sample_vanilla.py
# and the sets of sample.py. Byte level: the probe is trained on other text (Python's documentation). 2,048 bytes a
# batch: in the 8,192 of a batch of 64 sequences every byte occurs, and random bytes are no upper bound any more.
out_dir = 'out/diversity_sample_task2vec'
dataset = 'byte_wikipedia,byte_pubmed,byte_uspto,byte_pubmed+byte_uspto,byte_wikipedia+byte_pubmed'
eval_sets = 'byte_wikipedia,byte_pubmed,byte_uspto'
max_tokens = 870_400            # what the models see
probe = 'out/sample_vanilla'
n_batches = 32
n_sequences = 16
bounds = True
