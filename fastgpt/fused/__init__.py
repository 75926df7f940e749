"""The fused path of a GPT: model.py hands it a whole forward, where the model is as it was built.

untouched.py asks which modules are, launchers.py what the units are made of, whole.py runs them:
embedding.py, block.py, and the head with its loss from ../linear_cross_entropy.py.
"""
