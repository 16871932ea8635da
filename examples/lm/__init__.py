"""Helpers of ``train_lm.py``: the text, the model and the loss figure."""
