"""Everything between a clone and a submission on Kaggle: docs/kaggle.md walks through it.

`profiles` says what a target machine has; `wheels` brings what it lacks; `metadata` and `push` upload it; `session` checks
the machine the notebook woke up on. Nothing here knows tasks, prompts or models.
"""
