"""Everything between a clone and a submission on Kaggle: docs/kaggle.md walks through it.

`profiles` says what a target machine has; `datasets` makes bundles of code and weights, which `arc_kernel.bundle` finds
again; `wheels` brings what the machine lacks (`target` knows its markers and tags, `resolve` the versions, `download` the
files, `lock` how they are written down, `check` whether they go together); `metadata` and `push` upload it, for `commands`,
which knows what belongs to one submission; `session` checks the machine the notebook woke up on.
Nothing here knows training; `datasets` knows model folders and whether a model can be asked in chat, `session` a challenges file.
"""
