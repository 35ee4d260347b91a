# python prepare_text.py config/data/openwebtext.py
# about 3 hours (estimated: 40 GB of text at 4 MB/s; not run); 18 GB of ids. Offline: --source='FILES*.jsonl'
# OpenWebText (the public copy of WebText) as GPT-2's BPE, documents joined by end-of-text, about 9 billion ids.
name = 'openwebtext'
source = 'Skylion007/openwebtext'       # or local files, jsonl, parquet or text
tokenizer = 'gpt2'
val_fraction = 0.0005
test_fraction = 0.0005
clean_lines = False                     # True: without near-duplicate lines and HTML, as the paper did it
