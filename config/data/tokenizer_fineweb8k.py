# python train_tokenizer.py config/data/tokenizer_fineweb8k.py
# about 10 minutes on one CPU core beside the download (estimated: 1 GB at 2 MB/s; not run). Offline: --source
# A byte-level BPE of 8,000 ids from the leading 1 GB of FineWeb-Edu's 10-billion-token sample, as published.
#
# For models that train on two cores, 1,000 ids from all of the sample's training text (about a second):
#     python train_tokenizer.py --name=sample1k --source=data/sample/train.bin --vocab_size=1000 --held_out_every=0
#     python prepare_text.py --name=sample1k --tokenizer=sample1k --source=data/sample/train.bin \
#         --val_source=data/sample/val.bin --test_source=data/sample/test.bin
name = 'fineweb8k'
source = 'HuggingFaceFW/fineweb-edu'    # or local files: jsonl, parquet or text
hub_config = 'sample-10BT'
vocab_size = 8000
max_bytes = 1_000_000_000
