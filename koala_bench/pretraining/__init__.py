"""Makes a small target model, such as the bundled one, or a draft model for one.

Comes in: a corpus of dialogues. Goes out: a folder that transformers loads, with its model card.
Read ``loop`` first. No other run needs this.
"""
