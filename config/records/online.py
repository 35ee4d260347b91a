# python compress.py online FILE ARCHIVE config/records/online.py
# 1,000,000 bytes: about 11 minutes to pack and 13 to unpack on 2 cores (measured beside light other work).
# For texts of about a megabyte: the updates per byte of the default in larger blocks, so that fewer models are built.
online_block = 128
online_updates = 32             # every byte is trained on about 8 times
