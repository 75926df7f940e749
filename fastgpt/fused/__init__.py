"""The fused path: model.py hands it a GPT's whole forward where the model is as it was built.

untouched.py decides which modules are as they were built, launchers.py which functions the units
call, and whole.py runs the units: embedding.py, block.py, and the head with its loss from
../linear_cross_entropy.py. For torch.compile alone, guards.py makes it see what the units read, and
eager_head.py keeps the head out of its graph where that is asked for.
"""
