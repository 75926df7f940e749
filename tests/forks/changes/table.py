"""What forks of nanoGPT do to its model: a table of changes, each made to either implementation.

A change is a function of a GPT and an ExitStack. It changes the model in place (or returns another
one to use); what it changes outside of the model, the stack puts back. What it draws at random, it
draws the same for every implementation: test_changes.py seeds before it.
"""

from tests.forks.changes import architecture, hooks, patches, tensors, wrappers

CHANGES = {
    change.__name__: change
    for module in (architecture, wrappers, hooks, patches, tensors)
    for change in module.CHANGES
}
