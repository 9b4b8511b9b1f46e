"""Any small checkpoint becomes a clean model folder that transformers 4.57 and 5.x and vLLM read alike.

`draft`: a folder in the making; `openelm`, `template`, `context`, `vocabulary`: what can be done to it; `make`: all of that in
one pass over the weights; `trimmed`: the copy with fewer tokens that a run opens; `table`: what a person choosing a model wants to
know. Nothing in a checkpoint is ever run.
"""
